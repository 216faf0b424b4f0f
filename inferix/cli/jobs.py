"""The videos that a run makes: which, in which order, and where their frames go.

Whatever decides that (samples, prompt files, typed prompts, the web page, several processes) is decided here; a runner
iterates ``jobs`` and streams each.
"""

import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from inferix.cli.file_names import prompt_stem, prompt_stems, settings_suffix
from inferix.cli.main import rank
from inferix.cli.model_paths import ROOT, display_path
from inferix.cli.prompts import example_prompt, prompt_note, read_prompts, storyboard_of, typed_prompts
from inferix.cli.report import Report, quantization_name
from inferix.errors import InputError
from inferix.pipelines.pipeline import Pipeline
from inferix.pipelines.storyboard import Storyboard
from inferix.video import SegmentedVideoWriter, VideoWriter
from inferix.webrtc.session import Session, WebRTCConfig


def webrtc_session(args: Namespace) -> AbstractContextManager[Session | None]:
    """Return a context that serves the web page with ``--enable_webrtc``, from rank 0; its value is None otherwise."""
    if not args.enable_webrtc or rank() > 0:
        return nullcontext()
    try:
        from inferix.webrtc.server import serve
    except ImportError as error:
        raise InputError(f"streaming needs aiortc and aiohttp ({error}): run ./setup.sh") from None
    return serve(WebRTCConfig(args.webrtc_host, args.webrtc_port, args.webrtc_exit, args.webrtc_wait))


def jobs(args: Namespace, pipeline: Pipeline, session: Session | None = None) -> Iterator["Job"]:
    """Yield every video to generate: those of the flags, and with a ``session`` those that are asked for on its page.

    Prints each file when it is complete, which may be while the next job is generated, and the report after the last. Ranks
    above 0 take part in what rank 0 generates, and get no jobs.
    """
    if not pipeline.is_main_process:
        pipeline.worker_loop()
        return
    if getattr(args, "enable_profiling", False):
        pipeline.stage_seconds = {}
    report, planner = Report(args, pipeline), Planner(args, pipeline, session)
    planned = planner.from_flags()
    if session is not None:
        session.ready(quantization_name(args), report.bytes_after)
        planned = session.clips(planned, planner.from_prompt)
    generated: deque[Job] = deque()
    try:
        for job in planned:
            yield job
            generated.append(job)
            while len(generated) > (1 if session is None else 0):  # the page offers a file before it waits for a prompt
                report.add(generated.popleft())
    finally:
        while generated:
            report.add(generated.popleft())
    report.print()


@dataclass
class Job:
    """One call of ``pipeline.stream``, and the files that its frames go to."""

    prompts: list | Iterator
    """As ``stream`` takes them. With a web page they end early when the clip is stopped there."""
    paths: list[Path]
    """One for each batch entry."""
    num_blocks: int | None
    """Pieces that the stream will yield; None: not known."""
    session: Session | None
    num_rollout: int | None = None
    image: Tensor | None = None
    endless: bool = False
    """Write files of a minute each, which stay whatever ends the video."""
    storyboard: Storyboard | None = None
    """The video's prompts, where one of them was typed on the page; it is saved beside the video."""
    stopped: bool = False
    """Whether the video was ended on the page."""
    writers: list[VideoWriter | SegmentedVideoWriter] = field(default_factory=list)
    seconds: float = 0.0
    """From the first block's begin to the last file's end, without the time in which other jobs were generated."""

    def writer(self) -> "JobWriter":
        return JobWriter(self)

    def finish(self) -> int:
        """Wait until the files are complete, print their names, and return the number of their frames."""
        start = time.perf_counter()
        written = [writer for writer in self.writers if writer.frames]
        for writer in written:
            paths = writer.result()
            for path in [paths] if isinstance(paths, Path) else paths:
                self.announce_file("file written       ", path)
            if self.storyboard is not None:
                self.announce_file("storyboard written ", self.storyboard.write(writer.path.with_suffix(".yaml")))
        self.seconds += time.perf_counter() - start
        return sum(writer.frames for writer in written)

    def announce_file(self, label: str, path: Path) -> None:
        """Print a file's name, and offer it on the web page."""
        print(f"{label}{display_path(path)}")
        if self.session is not None:
            self.session.add_file(path)


class JobWriter:
    """Write frames to the files of ``job``, and show those of the first on the web page, as a context manager."""

    def __init__(self, job: Job):
        self.job = job

    def __enter__(self) -> "JobWriter":
        job = self.job
        with ExitStack() as stack:
            kind: Any = SegmentedVideoWriter if job.endless else VideoWriter
            job.writers = [stack.enter_context(kind(path)) for path in job.paths]
            self.progress = stack.enter_context(tqdm(total=job.num_blocks, desc=job.paths[0].stem[:24], unit="block"))
            self.stack = stack.pop_all()
        if job.session is not None:
            job.session.begin_clip(job.num_blocks)
        self.start = time.perf_counter()
        return self

    def write(self, frames: Tensor) -> None:
        """Write frames [B, t, 3, H, W] in [0, 1]; return after a pause where a viewer has paused."""
        for writer, video in zip(self.job.writers, frames):
            writer.write(video)
        self.progress.update()
        if self.job.session is not None:
            self.job.session.show(frames[0])

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        self.stack.__exit__(error_type, error, traceback)
        self.job.seconds = time.perf_counter() - self.start
        if self.job.session is not None:
            self.job.storyboard, self.job.stopped = self.job.session.end_clip(), self.job.session.stop_requested
        if self.job.endless and error_type in (KeyboardInterrupt, SystemExit):
            self.job.finish()


class Planner:
    """Make jobs of the flags, and of single prompts that come later."""

    def __init__(self, args: Namespace, pipeline: Pipeline, session: Session | None):
        self.args, self.session = args, session
        self.pipeline: Any = pipeline  # of the class that belongs to ``args.model``
        self.folder, self.suffix = args.output_folder or ROOT / "outputs", settings_suffix(args)
        self.make = self.self_forcing if args.model == "self_forcing" else self.causvid

    def from_flags(self) -> Iterator[Job]:
        """Yield the jobs of ``--prompt`` and the flags that replace it; without them, of an example prompt."""
        args, prompts = self.args, self.args.prompts or [example_prompt(self.pipeline.config)]
        if args.storyboard:
            storyboard = storyboard_of(args, self.pipeline.config)
            yield self.make(storyboard, prompt_stem("; ".join(entry.prompt for entry in storyboard.entries)))
        elif args.model == "self_forcing":
            yield from map(self.make, prompts, prompt_stems(prompts, args.save_with_index))
        elif args.is_interactive:
            yield from self.interactive(chain(args.prompts or [], typed_prompts()))
        elif args.diff_prompt or args.diff_prompt_file:
            yield from self.diff_prompts(read_prompts(args.diff_prompt_file) if args.diff_prompt_file else prompts)
        else:
            yield from map(self.make, prompts, prompt_stems(prompts, False))

    def from_prompt(self, prompt: str) -> Job:
        """Return the job of a prompt that was typed on the page."""
        return self.make(prompt, prompt_stem(prompt))

    def interactive(self, typed: Iterator[str]) -> Iterator[Job]:
        """Yield the job of prompts from standard input, and further ones with the rest when one is stopped on the page."""
        for first in typed:
            job = self.causvid(chain([first], typed), f"{prompt_stem(first)}-interactive")
            yield job
            if not job.stopped:
                return

    def diff_prompts(self, prompts: list[str]) -> Iterator[Job]:
        """Yield the job of prompts for one rollout each, and further ones with the rest when one is stopped on the page."""
        while prompts:
            left, stem = iter(prompts), prompt_stem("; ".join(prompts))
            job = self.causvid(prompts[0], stem) if len(prompts) == 1 else self.causvid(left, stem, len(prompts))
            yield job
            prompts = list(left) if job.stopped and len(prompts) > 1 else []

    def self_forcing(self, prompts: str | Storyboard, stem: str) -> Job:
        """Return the job of all samples of a prompt, or of prompts over time: one batch."""
        args, pipeline = self.args, self.pipeline
        image = pipeline.read_image(args.image_path) if args.i2v else None
        fixed = isinstance(prompts, str) and self.session is None
        by_block = repeat(prompts) if isinstance(prompts, str) else prompts.prompts(count())
        batches = ([prompt] * args.num_samples for prompt in self.announced(zip(count(), by_block)))
        return Job(
            prompts=next(batches) if fixed else batches,
            paths=[self.path(f"{stem}-{args.seed}-{sample}") for sample in range(args.num_samples)],
            num_blocks=pipeline.num_blocks(args.num_output_frames, int(args.i2v)),
            session=self.session,
            image=image,
            endless=args.endless,
        )

    def causvid(self, prompts: str | Iterator[str] | Storyboard, stem: str, num_rollout: int | None = None) -> Job:
        """Return the job of one video: a single prompt for all its rollouts, one for each, or a storyboard's."""
        args, pipeline = self.args, self.pipeline
        size, clip = pipeline.config.num_frame_per_block, pipeline.config.image_or_video_shape[1]
        num_rollout = args.num_rollout or num_rollout or (None if isinstance(prompts, Iterator) else 3)
        blocks = rollout_blocks(clip // size, args.num_overlap_frames // size)
        if isinstance(prompts, Storyboard):
            by_block = prompts.prompts(blocks)
        else:
            rollouts = repeat(prompts) if isinstance(prompts, str) else prompts
            by_block = chain.from_iterable(repeat(prompt, clip // size) for prompt in rollouts)
        return Job(
            prompts=each_rollout(self.announced(zip(blocks, by_block)), clip // size),
            paths=[self.path(f"{stem}-{args.seed}")],
            num_blocks=pipeline.num_blocks(iter(()), num_rollout, args.num_overlap_frames, clip),
            session=self.session,
            num_rollout=num_rollout,
        )

    def announced(self, given: Iterator[tuple[int, str]]) -> Iterator[str]:
        """Yield the prompts of the video's blocks, and say on the page and in a printed note what the model has to say.

        Args:
            given: number and prompt of every block. With the page a typed prompt takes over.
        """
        last = None
        for prompt in (prompt for _, prompt in given) if self.session is None else self.session.prompts(given):
            if prompt != last:
                note = prompt_note(self.pipeline, prompt)
                if note:
                    print(f"note: {note}")
                if self.session is not None:
                    self.session.announce(prompt, note)
            yield prompt
            last = prompt

    def path(self, name: str) -> Path:
        """Return a path in the output folder; ``VideoWriter`` numbers it where there is such a file."""
        return self.folder / f"{name}{self.suffix}.mp4"


def rollout_blocks(length: int, overlap: int) -> Iterator[int]:
    """Yield the number in the video, from 0, of every block of rollout after rollout.

    The blocks that a rollout takes over have the number of the first one that it generates, and so the same prompt.
    """
    for first in count(step=length - overlap):
        yield from (first + max(block, overlap if first else 0) for block in range(length))


def each_rollout(prompts: Iterator[str], length: int) -> Iterator[Iterator[str]]:
    """Yield the prompts of each rollout's blocks, of which there are ``length``, without end."""
    while True:
        yield islice(prompts, length)

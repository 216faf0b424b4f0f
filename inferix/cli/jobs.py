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
from itertools import chain, cycle, repeat
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from inferix.cli.file_names import prompt_stem, prompt_stems, settings_suffix
from inferix.cli.main import rank
from inferix.cli.model_paths import ROOT, display_path
from inferix.cli.prompts import example_prompt, prompt_note, read_prompts, typed_prompts
from inferix.cli.report import Report, quantization_name
from inferix.errors import InputError
from inferix.pipelines.pipeline import Pipeline
from inferix.video import VideoWriter
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
        steers = "clip" if args.model == "self_forcing" else "rollout"
        session.ready(quantization_name(args), report.bytes_after, steers)
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
    writers: list[VideoWriter] = field(default_factory=list)
    seconds: float = 0.0
    """From the first block's begin to the last file's end, without the time in which other jobs were generated."""

    def writer(self) -> "JobWriter":
        return JobWriter(self)

    def finish(self) -> int:
        """Wait until the files are complete, print their names, and return the number of their frames."""
        start = time.perf_counter()
        written = [writer for writer in self.writers if writer.frames]
        for writer in written:
            path = writer.result()
            print(f"file written       {display_path(path)}")
            if self.session is not None:
                self.session.add_file(path)
        self.seconds += time.perf_counter() - start
        return sum(writer.frames for writer in written)


class JobWriter:
    """Write frames to the files of ``job``, and show those of the first on the web page, as a context manager."""

    def __init__(self, job: Job):
        self.job = job

    def __enter__(self) -> "JobWriter":
        job = self.job
        with ExitStack() as stack:
            job.writers = [stack.enter_context(VideoWriter(path)) for path in job.paths]
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

    def __exit__(self, error_type, error, traceback) -> None:
        self.stack.__exit__(error_type, error, traceback)
        self.job.seconds = time.perf_counter() - self.start


class Planner:
    """Make jobs of the flags, and of single prompts that come later."""

    def __init__(self, args: Namespace, pipeline: Pipeline, session: Session | None):
        self.args, self.pipeline, self.session = args, pipeline, session
        self.folder, self.suffix = args.output_folder or ROOT / "outputs", settings_suffix(args)
        self.make = self.self_forcing if args.model == "self_forcing" else self.causvid

    def from_flags(self) -> Iterator[Job]:
        """Yield the jobs of ``--prompt`` and the flags that replace it; without them, of an example prompt."""
        args, prompts = self.args, self.args.prompts or [example_prompt(self.pipeline.config)]
        if args.model == "self_forcing":
            yield from map(self.make, prompts, prompt_stems(prompts, args.save_with_index))
        elif args.is_interactive:
            typed = chain(args.prompts or [], typed_prompts())
            first = next(typed)
            yield self.make(chain([first], typed), f"{prompt_stem(first)}-interactive")
        elif args.diff_prompt or args.diff_prompt_file:
            prompts = read_prompts(args.diff_prompt_file) if args.diff_prompt_file else prompts
            yield self.make(prompts, prompt_stem("; ".join(prompts)))
        else:
            yield from map(self.make, ([prompt] for prompt in prompts), prompt_stems(prompts, False))

    def from_prompt(self, prompt: str) -> Job:
        """Return the job of a prompt that was typed on the page."""
        return self.make(prompt if self.args.model == "self_forcing" else [prompt], prompt_stem(prompt))

    def self_forcing(self, prompt: str, stem: str) -> Job:
        """Return the job of all samples of a prompt: one batch."""
        args, pipeline = self.args, self.pipeline
        image = pipeline.read_image(args.image_path) if args.i2v else None
        samples = range(args.num_samples)
        batch = list(self.announced([prompt])) * args.num_samples
        return Job(
            prompts=batch if self.session is None else self.session.until_stopped(repeat(batch)),
            paths=[self.path(f"{stem}-{args.seed}-{sample}") for sample in samples],
            num_blocks=pipeline.num_blocks(args.num_output_frames, int(args.i2v)),
            session=self.session,
            image=image,
        )

    def causvid(self, prompts: list[str] | Iterator[str], stem: str) -> Job:
        """Return the job of one video: a single prompt for all its rollouts, or one for each."""
        args, pipeline = self.args, self.pipeline
        single = isinstance(prompts, list) and len(prompts) == 1
        num_rollout = 3 if single and args.num_rollout is None else args.num_rollout
        clip = pipeline.config.image_or_video_shape[1]
        rollouts = cycle(prompts) if single else iter(prompts)
        return Job(
            prompts=self.announced(rollouts) if self.session is None else self.steered(rollouts),
            paths=[self.path(f"{stem}-{args.seed}")],
            num_blocks=pipeline.num_blocks(prompts, num_rollout, args.num_overlap_frames, clip),
            session=self.session,
            num_rollout=num_rollout,
        )

    def announced(self, prompts: Iterator[str] | list[str]) -> Iterator[str]:
        """Yield the prompts, and say on the page and in a printed note what the model has to say about a new one."""
        last = None
        for prompt in prompts:
            note = prompt_note(self.pipeline, prompt)
            if note and prompt != last:
                print(f"note: {note}")
            if self.session is not None:
                self.session.announce(prompt, note)
            yield prompt
            last = prompt

    def steered(self, prompts: Iterator[str]) -> Iterator[Iterator[str]]:
        """Yield for every rollout an iterator over its blocks: the given prompt, or the one that was typed on the page."""
        for prompt in self.announced(self.session.steer(prompts)):
            yield self.session.until_stopped(repeat(prompt))

    def path(self, name: str) -> Path:
        """Return a path in the output folder; ``VideoWriter`` numbers it where there is such a file."""
        return self.folder / f"{name}{self.suffix}.mp4"

"""Jobs: what one call of ``pipeline.stream`` is given, made of the flags, and where its frames go."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from inferix.cli.devices import fitting_batch
from inferix.cli.file_names import prompt_stem, prompt_stems, video_names
from inferix.cli.model_paths import display_path
from inferix.cli.prompts import example_prompt, prompt_note, read_prompts, storyboard_of, typed_prompts
from inferix.cli.record import Recorder, output_folder
from inferix.errors import InputError
from inferix.pipelines.pipeline import Pipeline
from inferix.pipelines.storyboard import Storyboard, first_frame
from inferix.video import SegmentedVideoWriter, VideoWriter
from inferix.webrtc.session import Session


@dataclass
class Job:
    """One call of ``pipeline.stream``, and the files that its frames go to."""

    args: Namespace
    """The flags of a run that makes this alone."""
    prompts: list | Iterator
    """As ``stream`` takes them. With a web page they end early when the clip is stopped there."""
    prompt_history: list[str]
    """The prompts that were generated so far, one after the other."""
    paths: list[Path]
    """One for each batch entry."""
    samples: Sequence[int]
    """The numbers of the batch entries among the prompt's samples."""
    generator: torch.Generator
    recorder: Recorder
    num_blocks: int | None
    """Pieces that the stream will yield; None: not known."""
    session: Session | None
    first_frame: Callable[[int], int]
    """Returns the first pixel frame of a block of the video, both counted from 0."""
    num_rollout: int | None = None
    num_output_frames: int | None = None
    image: Tensor | None = None
    endless: bool = False
    """Write files of a minute each, which stay whatever ends the video."""
    storyboard: Storyboard | None = None
    """The video's prompts, where one of them was typed on the page; it is saved beside the video."""
    stopped: bool = False
    """Whether the video was ended on the page."""
    writers: list[VideoWriter | SegmentedVideoWriter] = field(default_factory=list)
    start: float = 0.0
    """When the first block was begun, by ``time.perf_counter``."""
    seconds: float = 0.0
    """From the first block's begin to the last file's end, without the time in which other jobs were generated."""
    batch: "BatchHooks | None" = None
    """The batch of which this is a part."""

    def writer(self) -> "JobWriter":
        return JobWriter(self)

    def finish(self) -> int:
        """Wait until the files are complete, print their names, and return the number of their frames."""
        start = time.perf_counter()
        written = [writer for writer in self.writers if writer.frames]
        for writer in written:
            try:
                paths = writer.result()
                for path in [paths] if isinstance(paths, Path) else paths:
                    self.announce_file("file written       ", path)
                if self.storyboard is not None:
                    self.announce_file("storyboard written ", self.storyboard.write(writer.path.with_suffix(".yaml")))
            except InputError as error:
                self.report_file_error(error)
        self.seconds += time.perf_counter() - start
        return sum(writer.frames for writer in written)

    def report_file_error(self, error: InputError) -> None:
        """Print what went wrong with a file and show it on the web page, where the video is watched all the same.

        Without the page, and before its first frame, raise ``error``.
        """
        if self.session is None or not self.session.has_generated:
            raise error
        if str(error) != self.session.problem:
            print(f"error: {error}", file=sys.stderr)
            self.session.report_problem(str(error))

    def announce_file(self, label: str, path: Path) -> None:
        """Print a file's name, and offer it on the web page."""
        print(f"{label}{display_path(path)}")
        if self.session is not None:
            self.session.add_file(path)


class BatchHooks(Protocol):
    """What a batch does in place of a single video's progress bar, record and errors."""

    def update(self) -> None:
        """Note that a block was written."""

    def record(self, job: Job, sample: int, writer: VideoWriter) -> None:
        """Record a complete file, in its writer's thread."""

    def handle_error(self, error: BaseException) -> bool:
        """Return whether the batch goes on after ``error``, which is recorded then."""

    def overwrites(self, path: Path) -> bool:
        """Return whether a video takes the place of the file at ``path``."""


class JobWriter:
    """Write frames to the files of ``job``, and show those of the first on the web page, as a context manager."""

    def __init__(self, job: Job):
        self.job = job

    def __enter__(self) -> "JobWriter":
        job = self.job
        with ExitStack() as stack:
            self.stack = stack
            self._open_files()
            bar = tqdm(total=job.num_blocks, desc=job.paths[0].stem[:24], unit="block", disable=job.batch is not None)
            self.progress = job.batch or stack.enter_context(bar)
            self.stack = stack.pop_all()
        if job.session is not None:
            job.session.begin_clip(job.num_blocks, job.first_frame)
        job.start = time.perf_counter()
        return self

    def _open_files(self) -> None:
        job, self.job.writers = self.job, []
        try:
            for sample, path in zip(job.samples, job.paths):
                writer = self._open(sample, path)
                self.stack.enter_context(writer)
                job.writers.append(writer)
        except InputError as error:
            job.report_file_error(error)

    def _open(self, sample: int, path: Path) -> VideoWriter | SegmentedVideoWriter:
        """Return the writer of a batch entry, which records the file when it is complete."""
        job = self.job
        if job.endless:
            return SegmentedVideoWriter(path, on_complete=partial(self._record, sample))
        if job.batch is None:
            return VideoWriter(path, on_complete=partial(self._record, sample))
        return VideoWriter(
            path, overwrite=job.batch.overwrites(path), on_complete=partial(job.batch.record, job, sample)
        )

    def _record(self, sample: int, writer: VideoWriter) -> None:
        job = self.job
        identity = job.recorder.identity(job.args, "; ".join(job.prompt_history), sample)
        job.recorder.add(identity, job, writer)

    def write(self, frames: Tensor) -> None:
        """Write frames [B, t, 3, H, W] in [0, 1]; return after a pause where a viewer has paused."""
        try:
            for writer, video in zip(self.job.writers, frames):
                writer.write(video)
        except InputError as error:
            self.job.report_file_error(error)
            self.job.writers = []
            if self.job.endless:  # what comes from now on is kept
                self._open_files()
        self.progress.update()
        if self.job.session is not None:
            self.job.session.show(frames[0])

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> bool:
        try:
            self.stack.__exit__(error_type, error, traceback)
        except InputError as file_error:
            self.job.report_file_error(file_error)
        self.job.seconds = time.perf_counter() - self.job.start
        if self.job.session is not None:
            self.job.storyboard, self.job.stopped = self.job.session.end_clip(), self.job.session.stop_requested
        if self.job.endless and error_type in (KeyboardInterrupt, SystemExit):
            self.job.finish()
        return error is not None and self.job.batch is not None and self.job.batch.handle_error(error)


class Planner:
    """Make jobs of the flags, and of single prompts that come later."""

    def __init__(self, args: Namespace, pipeline: Pipeline, recorder: Recorder, session: Session | None = None):
        self.args, self.recorder, self.session = args, recorder, session
        self.pipeline: Any = pipeline  # of the class that belongs to ``args.model``
        self.folder = output_folder(args)
        can_start_from_image = args.model == "self_forcing" and args.vae == "full"
        self.read_image = getattr(pipeline, "read_image", None) if can_start_from_image else None
        """Makes an image file the model's first frame; None: it cannot start from one."""

    def make(self, prompts: str | Storyboard, stem: str) -> Iterator[Job]:
        """Yield the jobs of a prompt, or of prompts over time: of Self-Forcing one for as many samples as fit into memory."""
        if self.args.model == "causvid":
            yield self.causvid(prompts, stem)
            return
        for samples in self.sample_batches():
            yield self.self_forcing(prompts, stem, samples)

    def sample_batches(self, batch: int | None = None) -> list[range]:
        """Return the samples of a prompt, divided into batches of at most ``batch`` (default: what fits into memory)."""
        total = getattr(self.args, "num_samples", 1)
        batch = batch or (total if self.session is not None else fitting_batch(self.args, self.pipeline, total))
        return [range(first, min(first + batch, total)) for first in range(0, total, batch)]

    def from_flags(self) -> Iterator[Job]:
        """Yield the jobs of ``--prompt`` and the flags that replace it; without them, of an example prompt."""
        args, prompts = self.args, self.args.prompts or [example_prompt(self.pipeline.config)]
        if args.storyboard:
            storyboard = storyboard_of(args, self.pipeline.config)
            yield from self.make(storyboard, prompt_stem("; ".join(entry.prompt for entry in storyboard.entries)))
        elif args.model == "self_forcing":
            yield from chain.from_iterable(map(self.make, prompts, prompt_stems(prompts, args.save_with_index)))
        elif args.is_interactive:
            yield from self.interactive(chain(args.prompts or [], typed_prompts()))
        elif args.diff_prompt or args.diff_prompt_file:
            yield from self.diff_prompts(read_prompts(args.diff_prompt_file) if args.diff_prompt_file else prompts)
        else:
            yield from chain.from_iterable(map(self.make, prompts, prompt_stems(prompts, False)))

    def from_prompt(self, prompt: str, image: Tensor | None = None) -> Job:
        """Return the job of a prompt that was typed on the page, and of the image that it starts from."""
        if self.args.model == "causvid":
            return self.causvid(prompt, prompt_stem(prompt))
        return self.self_forcing(prompt, prompt_stem(prompt), range(self.args.num_samples), image)

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

    def self_forcing(
        self, prompts: str | Storyboard, stem: str, samples: Sequence[int], image: Tensor | None = None
    ) -> Job:
        """Return the job of some samples of a prompt, or of prompts over time: one batch.

        Args:
            prompts: one, or a storyboard.
            stem: of the files' names.
            samples: their numbers, of ``--num_samples``.
            image: what it starts from, in place of ``--image_path``.
        """
        args, pipeline, prompt_history = self.args, self.pipeline, list[str]()
        size, num_frames = pipeline.config.num_frame_per_block, args.num_output_frames
        if image is not None and not args.i2v and num_frames is not None:
            num_frames -= size - 1  # the image's frame takes the place of a block
        if image is None and args.i2v:
            image = pipeline.read_image(args.image_path)
        num_given = 0 if image is None else 1
        fixed = isinstance(prompts, str) and self.session is None
        by_block = repeat(prompts) if isinstance(prompts, str) else prompts.prompts(count())
        batches = ([prompt] * len(samples) for prompt in self.announced(zip(count(), by_block), prompt_history))
        return Job(
            args=args,
            prompts=next(batches) if fixed else batches,
            prompt_history=prompt_history,
            paths=self.paths(video_names(args, stem, samples)),
            samples=samples,
            generator=pipeline.seeded(args.seed, samples, args.num_samples),
            recorder=self.recorder,
            num_blocks=pipeline.num_blocks(num_frames, num_given),
            session=self.session,
            first_frame=partial(first_frame, block_size=size, num_given=num_given),
            num_output_frames=num_frames,
            image=image,
            endless=args.endless,
        )

    def causvid(self, prompts: str | Iterator[str] | Storyboard, stem: str, num_rollout: int | None = None) -> Job:
        """Return the job of one video: a single prompt for all its rollouts, one for each, or a storyboard's."""
        args, pipeline, prompt_history = self.args, self.pipeline, list[str]()
        size, clip = pipeline.config.num_frame_per_block, pipeline.config.image_or_video_shape[1]
        num_rollout = args.num_rollout or num_rollout or (None if isinstance(prompts, Iterator) else 3)
        blocks = rollout_blocks(clip // size, args.num_overlap_frames // size)
        if isinstance(prompts, Storyboard):
            by_block = prompts.prompts(blocks)
        else:
            rollouts = repeat(prompts) if isinstance(prompts, str) else prompts
            by_block = chain.from_iterable(repeat(prompt, clip // size) for prompt in rollouts)
        return Job(
            args=args,
            prompts=each_rollout(self.announced(zip(blocks, by_block), prompt_history), clip // size),
            prompt_history=prompt_history,
            paths=self.paths(video_names(args, stem)),
            samples=[0],
            generator=pipeline.seeded(args.seed),
            recorder=self.recorder,
            num_blocks=pipeline.num_blocks(iter(()), num_rollout, args.num_overlap_frames, clip),
            session=self.session,
            first_frame=partial(first_frame, block_size=size),
            num_rollout=num_rollout,
        )

    def announced(self, given: Iterator[tuple[int, str]], prompt_history: list[str]) -> Iterator[str]:
        """Yield the prompts of the video's blocks, and say on the page and in a printed note what the model has to say.

        Args:
            given: number and prompt of every block. With the page a typed prompt takes over.
            prompt_history: every prompt that is new is appended to it.
        """
        last = None
        for prompt in (prompt for _, prompt in given) if self.session is None else self.session.prompts(given):
            if prompt != last:
                prompt_history.append(prompt)
                note = prompt_note(self.pipeline, prompt)
                if note:
                    tqdm.write(f"note: {note}")
                if self.session is not None:
                    self.session.announce(prompt, note)
            yield prompt
            last = prompt

    def paths(self, names: list[str]) -> list[Path]:
        """Return paths in the output folder; ``VideoWriter`` numbers those where there is such a file."""
        return [self.folder / f"{name}.mp4" for name in names]


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

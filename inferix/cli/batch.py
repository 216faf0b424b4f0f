"""Batches: the videos of a prompt file, or of data parallelism; which are missing, and what became of each."""

import gc
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from inferix.cli.data_parallel import WorkQueue
from inferix.cli.file_names import entry_names
from inferix.cli.main import interrupt, is_communication_error
from inferix.cli.manifest import Record, video_key
from inferix.cli.model_paths import display_path
from inferix.cli.planner import Job, Planner
from inferix.cli.prompt_file import PromptEntry, entry_args
from inferix.cli.record import Recorder
from inferix.cli.report import Report
from inferix.errors import FailedVideosError, InputError, WriteError
from inferix.pipelines.pipeline import Pipeline
from inferix.video import VideoWriter, wait_for_writers
from inferix.video_files import remove_stale_partials

POLL_SECONDS = 0.2
"""Between two looks at whether the other groups have ended."""


@dataclass
class Unit:
    """Videos that are generated as one batch: some samples of an entry."""

    number: int
    entry: PromptEntry
    names: dict[int, str]
    """File name, without suffix, of each sample."""
    identities: dict[int, Record]
    """What the manifest says of each sample."""

    def __post_init__(self) -> None:
        self.keys = {sample: video_key(identity) for sample, identity in self.identities.items()}


class Batch:
    """Yields the jobs of this process's group, records every video, and goes on where a prompt fails.

    A video is complete when its file exists and has a record; those of a prompt file that are complete are not made again
    unless ``--overwrite`` is set. Videos that failed in an earlier run come last.

    Args:
        args: the flags, with ``entries``.
        pipeline: ready to generate; the main process of its group.
        recorder: appends the records.
        report: of the whole batch, printed by the first group.
    """

    def __init__(self, args: Namespace, pipeline: Pipeline, recorder: Recorder, report: Report):
        self.args, self.pipeline, self.recorder, self.report = args, pipeline, recorder, report
        self.manifest, self.folder = recorder.manifest, recorder.manifest.path.parent
        self.queue = WorkQueue(pipeline.parallel)
        self.is_first = pipeline.parallel.data_parallel_rank == 0
        self.remakes = args.overwrite or not args.prompt_file
        """Whether videos that were complete before this run are made again."""
        self.start = time.perf_counter()
        self.manifest.refresh(end=self.queue.agree("manifest", self.manifest.size()))  # lines beyond are this run's
        self.units = self.plan()
        self.names = {key: unit.names[sample] for unit in self.units for sample, key in unit.keys.items()}
        self.complete_before = 0 if self.remakes else sum(map(self.manifest.is_complete, self.names))
        self.made: set[str] = set()
        """The videos that were made in this run, by any group."""
        self.failed: dict[str, str] = {}
        """The message of each video that failed in this run."""
        total = len(self.names) - self.complete_before
        self.bar = tqdm(total=total, desc=self.folder.name[:24], unit="video", smoothing=0, disable=not self.is_first)

    def plan(self) -> list[Unit]:
        """Return all units, those that failed in an earlier run last. They have the same numbers in all groups."""
        planner = Planner(self.args, self.pipeline, self.recorder)
        batch, units = self.queue.agree("batch", len(planner.sample_batches()[0])), list[Unit]()
        for entry, names in zip(self.args.entries, entry_names(self.args, self.args.entries)):
            flags = entry_args(self.args, entry)
            for samples in planner.sample_batches(batch):
                identities = {s: self.recorder.identity(flags, entry.prompt, s, entry.id) for s in samples}
                units.append(Unit(len(units), entry, {s: names[s] for s in samples}, identities))
        records = self.manifest.by_key
        return sorted(units, key=lambda unit: any(records.get(key, {}).get("error") for key in unit.keys.values()))

    def jobs(self) -> Iterator[Job]:
        """Yield the job of one unit after the other that this group is to make.

        Raises:
            FailedVideosError: in the first group, when all groups have ended, where videos failed.
            KeyboardInterrupt: after Ctrl-C, when the videos that were begun are complete.
        """
        if self.is_first:
            remove_stale_partials(self.folder, set(self.manifest.by_file))
        interrupt.graceful = True
        with self.bar:
            for unit in self.units:
                if self.stop_requested():
                    break
                if self.missing(unit) and self.queue.claim(unit.number):
                    self.refresh()  # a process that is no more may have made it after the last look
                    yield from self.unit_jobs(unit)
            wait_for_writers()
            self.queue.end()
            while self.is_first and not self.queue.all_ended():
                self.stop_requested()  # tells the other groups
                self.refresh()
                time.sleep(POLL_SECONDS)
            self.refresh()
        stopped = self.queue.stop_requested()
        if self.is_first:  # the others end without an error, upon which torchrun would end those that still write
            self.finish(stopped)
            if stopped:
                raise KeyboardInterrupt

    def stop_requested(self) -> bool:
        """Return whether Ctrl-C was pressed in any group."""
        if interrupt.requested:
            self.queue.request_stop()
        return self.queue.stop_requested()

    def missing(self, unit: Unit) -> list[int]:
        """Return the samples of a unit that are to be made."""
        there = self.made.__contains__ if self.remakes else self.manifest.is_complete
        return [sample for sample, key in unit.keys.items() if not there(key)]

    def unit_jobs(self, unit: Unit) -> Iterator[Job]:
        """Yield the job of what is missing of a unit, and in place of one that needs too much memory two of half the size."""
        planner = Planner(entry_args(self.args, unit.entry), self.pipeline, self.recorder)
        batches = [samples] if (samples := self.missing(unit)) else []
        while batches:
            samples = batches.pop(0)
            part = UnitPart(self, unit, samples)
            try:
                prompt, stem = unit.entry.model_prompt, unit.names[samples[0]]
                if self.args.model == "self_forcing":
                    job = planner.self_forcing(prompt, stem, samples)
                else:
                    job = planner.causvid(prompt, stem)
            except InputError as error:  # the image cannot be read
                part.record_error(error)
                continue
            job.paths, job.batch = planner.paths([unit.names[sample] for sample in samples]), part
            yield job
            batches += part.halves

    def free_memory(self) -> None:
        """Let go of what a job that failed has left."""
        self.pipeline.pipeline.kv_cache = None
        gc.collect()
        if self.pipeline.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- all groups

    def refresh(self) -> None:
        """Take note of what all groups have recorded since the last call."""
        for record in self.manifest.refresh():
            key = video_key(record)
            if key not in self.names:
                continue
            if record.get("error"):
                self.failed[key] = record["error"]
            else:
                self.failed.pop(key, None)
                self.made.add(key)
                self.report.frames += record["frames"]
        self.bar.n = len(self.made) + len(self.failed)
        self.bar.refresh()

    def finish(self, stopped: bool) -> None:
        """Print the report. Raises FailedVideosError where videos failed, unless the run was ``stopped``."""
        self.report.seconds = time.perf_counter() - self.start
        self.report.print()
        before = f", {self.complete_before} complete before" if self.complete_before else ""
        failed = f", {len(self.failed)} failed" if self.failed else ""
        print(f"videos             {len(self.made)} made{before}{failed}: {display_path(self.manifest.path)}")
        left = len(self.names) - self.complete_before - len(self.made)
        if stopped:
            print(f"{left} of {len(self.names)} videos are not made yet: the same command goes on", file=sys.stderr)
        elif self.failed:
            raise FailedVideosError(
                f"{len(self.failed)} of {len(self.names)} videos failed, the last one for: "
                f"{list(self.failed.values())[-1]} ({display_path(self.manifest.path)} has all; the same command tries again)"
            )


class UnitPart:
    """Records what becomes of one job: some samples of a unit."""

    def __init__(self, batch: Batch, unit: Unit, samples: list[int]):
        self.batch, self.unit, self.samples = batch, unit, samples
        self.halves: list[list[int]] = []
        """Smaller jobs to do in place of this one, for which there was too little memory."""

    def update(self) -> None:
        self.batch.refresh()

    def overwrites(self, path: Path) -> bool:
        """Whether the file was recorded, and is to be made again or is no longer what was recorded."""
        batch, record = self.batch, self.batch.manifest.by_file.get(path.name)
        if record is None or not batch.args.prompt_file:
            return False
        return batch.args.overwrite or video_key(record) in self.unit.keys.values()

    def record(self, job: Job, sample: int, writer: VideoWriter) -> None:
        self.batch.recorder.add(self.unit.identities[sample], job, writer)

    def handle_error(self, error: BaseException) -> bool:
        """Record an error and return True; False where it is not one of this prompt alone.

        With several ranks in the group, one that fails while they compute leaves the others waiting for it: then the error is
        recorded and ends the run.
        """
        if not isinstance(error, InputError | RuntimeError | MemoryError) or isinstance(error, WriteError):
            return False
        if isinstance(error, RuntimeError) and is_communication_error(error):
            return False
        parallel = self.batch.pipeline.pipeline.context_parallel
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        lost_gpu = isinstance(error, torch.AcceleratorError) and not out_of_memory
        alone = parallel is None or (isinstance(error, InputError) and not parallel.in_block)
        goes_on = alone and not lost_gpu
        if out_of_memory and goes_on and len(self.samples) > 1:
            middle = len(self.samples) // 2
            self.halves = [self.samples[:middle], self.samples[middle:]]
        else:
            self.record_error(error)
        error.__traceback__ = None if goes_on else error.__traceback__  # its frames hold the clip's tensors
        self.batch.free_memory()
        return goes_on

    def record_error(self, error: BaseException) -> None:
        """Append a record with the error for each video, and print it."""
        for sample in self.samples:
            self.batch.recorder.add_error(self.unit.identities[sample], error)
        message = " ".join(str(error).split())[:300] or type(error).__name__
        tqdm.write(f"failed: {self.unit.names[self.samples[0]]}: {message}", file=sys.stderr)
        self.batch.refresh()

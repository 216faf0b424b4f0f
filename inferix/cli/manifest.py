"""``manifest.jsonl``: a JSON object on one line for each video of a folder, appended by many processes at once."""

import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inferix.cli.model_paths import display_path
from inferix.errors import WriteError

Record = dict[str, Any]

IDENTITY = ("id", "prompt", "extended_prompt", "seed", "sample", "num_samples", "image_sha256", "settings")
"""Keys of a record that say which video it is: with the same values the same video is made."""


def video_key(record: Record) -> str:
    """Return a text that is the same for two records of the same video."""
    return json.dumps([record.get(name) for name in IDENTITY], sort_keys=True)


class Manifest:
    """The records of a folder.

    A record is appended under a lock, in one write, and is on the disk when ``append`` returns. A last line without an end,
    which a crash has left, is removed by the next ``append``, with a note; a damaged line is ignored, with a note.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.by_key: dict[str, Record] = {}
        """The last record of each video."""
        self.by_file: dict[str, Record] = {}
        """The last record of each file, by its name."""
        self._offset = self._lines = 0

    def append(self, record: Record) -> None:
        """Append a record. Raises WriteError, and leaves no part of it, where the file cannot be written."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._repair(descriptor)
                end = os.fstat(descriptor).st_size
                if os.write(descriptor, line) < len(line):
                    os.ftruncate(descriptor, end)
                    raise WriteError(f"cannot write to {self.path}: the disk is full")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise WriteError(f"cannot write to {self.path}: {error.strerror}") from None

    def _repair(self, descriptor: int) -> None:
        """End the last line where it is complete but for that, and remove it where it is not."""
        size = os.fstat(descriptor).st_size
        if not size or os.pread(descriptor, 1, size - 1) == b"\n":
            return
        content = os.pread(descriptor, size, 0)
        begin = content.rfind(b"\n") + 1
        if _parse(content[begin:]) is not None:
            os.write(descriptor, b"\n")
            return
        os.ftruncate(descriptor, begin)
        _note(f"{display_path(self.path)} ended in half a line, which a crash had left: removed it")

    def size(self) -> int:
        """Return the bytes of the file, 0 where it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def refresh(self, end: int | None = None) -> list[Record]:
        """Read the lines that were appended since the last call, up to byte ``end``; return their records."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # replaced, or shortened by hand
                    self.by_key, self.by_file, self._offset, self._lines = {}, {}, 0, 0
                file.seek(self._offset)
                content = file.read(-1 if end is None else max(0, end - self._offset))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise WriteError(f"{self.path} cannot be read: {error.strerror}") from None
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        records = []
        for line in complete.splitlines():
            self._lines += 1
            record = _parse(line)
            if record is None:
                _note(f"{display_path(self.path)}, line {self._lines}, is damaged: its video counts as not made")
                continue
            self.by_key[video_key(record)] = record
            if isinstance(name := record.get("file"), str):
                self.by_file[name] = record
            records.append(record)
        return records

    def is_complete(self, key: str) -> bool:
        """Return whether the video has a record without an error, and its file is the one that was recorded."""
        record = self.by_key.get(key)
        if record is None or record.get("error") or self.by_file.get(record.get("file", "")) is not record:
            return False
        try:
            return (self.path.parent / record["file"]).stat().st_size == record.get("bytes")
        except OSError:
            return False


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, None where it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _note(text: str) -> None:
    tqdm.write(f"note: {text}", file=sys.stderr)

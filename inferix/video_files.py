"""How a complete video gets its name, and what becomes of incomplete ones when a process is killed."""

import errno
import fcntl
import filecmp
import itertools
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def lock(file: BinaryIO) -> None:
    """Lock an incomplete file as long as ``file`` is open, so that ``remove_stale_partials`` leaves it."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)


def publish(partial: Path, path: Path, overwrite: bool = False) -> Path:  # type: ignore[return]
    """Give a complete file its name, or, unless ``overwrite``, the first numbered one that is free, and return it.

    A file of such a name with the same bytes stays and is returned instead. Nothing is overwritten, whatever other
    processes do at the same time. ``partial`` may be left.
    """
    if overwrite:
        partial.replace(path)
        return path
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            _link(partial, candidate)
            return candidate
        except FileExistsError:
            with suppress(OSError):  # a dangling link, or removed in the meantime
                if filecmp.cmp(partial, candidate, shallow=False):
                    return candidate


def _link(partial: Path, path: Path) -> None:
    """Make ``partial`` appear as ``path``. Raises FileExistsError if there is such a file."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        path.open("xb").close()  # a file system without hard links: reserve the name first
        partial.replace(path)


def remove_stale_partials(folder: Path, recorded: set[str], min_age: float = 1) -> None:
    """Remove what processes that were killed left in ``folder``.

    That is their incomplete files, which no living process holds a lock on, and complete files whose ``on_complete`` had not
    returned: those are the same file as an incomplete one.

    Args:
        folder: need not exist.
        recorded: names that stay in any case.
        min_age: seconds since a file was written, below which it stays: another process may be about to lock it.
    """
    for partial in folder.glob(".*.partial.mp4"):
        with suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(file.fileno())
            if time.time() - status.st_mtime < min_age:
                continue
            if status.st_nlink > 1:
                for path in folder.glob("[!.]*.mp4"):
                    if path.name not in recorded and path.samefile(partial):
                        path.unlink()
            partial.unlink()

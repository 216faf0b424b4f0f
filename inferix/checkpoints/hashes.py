"""Hashes of files, computed in threads of their own: that of a checkpoint takes seconds, for which Python's lock is not held."""

import hashlib
import mmap
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from inferix.background import in_background

Versions = tuple[tuple[Path, int], ...]
"""Files, and when they were changed."""

_hashes: dict[Versions, Future[str]] = {}


def file_hash(*paths: Path) -> str:
    """Return the SHA-256 of files, one after the other. Files that have not changed since are not read again."""
    return begin_hash(*paths).result()


def begin_hash(*paths: Path) -> Future[str]:
    """Begin what ``file_hash`` waits for. Nothing waits for it where the program ends."""
    versions = tuple((path, path.stat().st_mtime_ns) for path in paths)
    if versions not in _hashes:
        _hashes[versions] = in_background(_hash, paths)
    return _hashes[versions]


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # in one call: beside a thread that computes, each call would wait for Python's lock
                digest.update(content)
    return digest.hexdigest()

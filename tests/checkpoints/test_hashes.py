"""Hashes of files."""

import hashlib
import os
import subprocess
import sys

import pytest

from inferix.checkpoints.hashes import begin_hash, file_hash

PROGRAM = """
import sys
from pathlib import Path
from inferix.checkpoints.hashes import begin_hash
print(begin_hash(Path(sys.argv[1])).done())
"""


def test_files_one_after_the_other(tmp_path):
    paths = [tmp_path / name for name in ("first", "empty", "last")]
    for path, content in zip(paths, (b"one", b"", b"two")):
        path.write_bytes(content)
    assert file_hash(*paths) == hashlib.sha256(b"onetwo").hexdigest()
    assert file_hash(paths[1]) == hashlib.sha256(b"").hexdigest()


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert begin_hash(path).result() == file_hash(path) and begin_hash(path) is begin_hash(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 1))
    assert file_hash(path) == hashlib.sha256(b"two").hexdigest()


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        begin_hash(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):  # a folder cannot be read
        file_hash(tmp_path)


def test_the_program_ends_without_waiting(tmp_path):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 2**42)  # without content on the disk; its hash would take the better part of an hour
    command = [sys.executable, "-c", PROGRAM, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "False\n"

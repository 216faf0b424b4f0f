"""A tokenizer in this process and, with a large vocabulary, in one of its own: the same ids, and nothing left behind."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import BASE, ROOT
from tokenizers import Tokenizer

from inferix.errors import InputError
from inferix.models.tokenizer import LARGE, PromptTokenizer

SMALL = BASE / "google/umt5-xxl"
TEXTS = ["A red cat", "", "two\nlines\tand a tab", "naïve ﬁancé 的 🐈", "cat dog " * 60, '"quoted" \\ back']

PROGRAM = """
import signal, sys, time
from pathlib import Path
from inferix.models.tokenizer import PromptTokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
tokenizer = PromptTokenizer(Path(sys.argv[1]), 32)
print(tokenizer.reader.pid, flush=True)
tokenizer.encode("A red cat")
print("encoded", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The golden tokenizer with 30,000 pieces more, some of them in the texts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((SMALL / "tokenizer.json").read_text())
    pieces = ["▁cat", "▁dog", "▁red", "cat", *(f"▁{number:05d}-{'x' * 24}" for number in range(30_000))]
    content["model"]["vocab"] += [[piece, -3.0 - number / 1e4] for number, piece in enumerate(pieces)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert (folder / "tokenizer.json").stat().st_size > LARGE
    return folder


def ids(folder: Path, text: str, length: int) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    return tokenizer.encode(text).ids


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_small_vocabulary_needs_no_process():
    tokenizer = PromptTokenizer(SMALL, 32)
    assert tokenizer.reader is None
    assert [tokenizer.encode(text) for text in TEXTS] == [ids(SMALL, text, 32) for text in TEXTS]


def test_a_large_one_gives_the_same_ids(large):
    tokenizer = PromptTokenizer(large, 32)
    reader = tokenizer.reader
    assert [tokenizer.encode(text) for text in TEXTS] == [ids(large, text, 32) for text in TEXTS]
    assert (tokenizer.token_to_id("<unk>"), tokenizer.token_to_id("▁dog"), tokenizer.token_to_id("nothing")) == (
        2,
        Tokenizer.from_file(str(large / "tokenizer.json")).token_to_id("▁dog"),
        None,
    )
    assert tokenizer.reader is reader and reader.poll() is None and tokenizer.tokenizer is None
    del tokenizer
    gc.collect()
    assert reader.poll() is not None


def test_its_process_may_end(large):
    tokenizer = PromptTokenizer(large, 32)
    tokenizer.encode("A red cat")
    tokenizer.reader.kill()
    assert tokenizer.encode("two cats") == ids(large, "two cats", 32)
    assert tokenizer.encode("A red cat") == ids(large, "A red cat", 32) and tokenizer.reader is None


@pytest.mark.parametrize("damage", [lambda content: content[:-10], lambda content: "{}" + " " * LARGE])
def test_a_damaged_file(large, tmp_path, damage):
    (tmp_path / "tokenizer.json").write_text(damage((large / "tokenizer.json").read_text()))
    tokenizer = PromptTokenizer(tmp_path, 32)
    with pytest.raises(InputError, match=rf"{tmp_path} cannot be read: truncated, or of another kind"):
        tokenizer.wait()


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_the_program(large, number, encoded):
    """Also where that is killed while the vocabulary is being read."""
    command = [sys.executable, "-c", PROGRAM, str(large)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as program:
        reader = int(program.stdout.readline())
        if encoded:
            assert program.stdout.readline() == "encoded\n"
        program.send_signal(number)
        wait_until_gone(reader)

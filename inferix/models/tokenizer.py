"""UMT5's tokenizer, read by a process of its own where its vocabulary is large.

The tokenizers library needs 0.8 s for 256,000 pieces and keeps Python's lock meanwhile: threads beside it would wait.
"""

import json
import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock
from typing import Any

from tokenizers import Tokenizer

from inferix.errors import DAMAGED, InputError, input_errors

LARGE = 2**20
"""Bytes of a file for which a process is started, which takes 0.1 s of a core."""


def read(path: Path, text_len: int) -> Tokenizer:
    """Read a ``tokenizer.json``; texts become at most ``text_len`` ids. Raises InputError where it is damaged."""
    with input_errors(path.parent, OSError, ValueError, hint=DAMAGED):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            if type(error) is Exception:  # the library has no other class for a file that it cannot parse
                raise ValueError(error) from None
            raise
    tokenizer.no_padding()
    tokenizer.enable_truncation(text_len)
    return tokenizer


class PromptTokenizer:
    """Turns texts into at most ``text_len`` token ids each.

    Args:
        folder: holds ``tokenizer.json``.
        text_len: ids at most, the end token included.

    Raises:
        InputError: if the file is missing or damaged; a large one is found damaged by ``wait``.
    """

    def __init__(self, folder: Path, text_len: int):
        self.path, self.text_len, self.lock = folder / "tokenizer.json", text_len, Lock()
        self.reader: Popen | None = None
        self.tokenizer: Tokenizer | None = None
        if not self.path.is_file():
            raise InputError(f"{folder} holds no tokenizer.json; see weights/README.md")
        if self.path.stat().st_size < LARGE:
            self.tokenizer = read(self.path, text_len)
        else:
            with suppress(OSError):  # no more processes: the first text is waited for
                self.reader = start_reader(self.path, text_len)
                weakref.finalize(self, end_reader, self.reader)

    def wait(self) -> None:
        """Wait until the vocabulary has been read."""
        self.token_to_id("<unk>")

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        return self._ask("encode", text)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of ``token``, None where there is no such token."""
        return self._ask("token_to_id", token)

    def _ask(self, question: str, text: str) -> Any:
        with self.lock:
            reader, self.reader = self.reader, None  # for good where it has ended, or where this call is interrupted
            if reader is not None:
                try:
                    print(json.dumps([question, text]), file=reader.stdin, flush=True)
                    reply = json.loads(reader.stdout.readline())  # type: ignore[union-attr]
                except (OSError, ValueError):
                    pass  # the file may be damaged: reading it here says so
                else:
                    self.reader = reader
                    return reply
            if self.tokenizer is None:
                self.tokenizer = read(self.path, self.text_len)
            return answer(self.tokenizer, question, text)


def answer(tokenizer: Tokenizer, question: str, text: str) -> list[int] | int | None:
    """Return what ``PromptTokenizer`` returns for a call of its method ``question``."""
    return tokenizer.encode(text).ids if question == "encode" else tokenizer.token_to_id(text)


def start_reader(path: Path, text_len: int) -> Popen:
    """Start this module as a process that reads ``path`` and answers questions, a line of JSON each, until its input ends."""
    root = str(Path(__file__).parents[2])  # a checkout runs without being installed
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", __name__, str(path), str(text_len)]
    # a session of its own: Ctrl-C is for the process that asks, with which it ends
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=environment, start_new_session=True)


def end_reader(reader: Popen) -> None:
    """End the process, whatever it does."""
    reader.kill()
    reader.communicate()


if __name__ == "__main__":
    tokenizer = read(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(answer(tokenizer, *json.loads(line))), flush=True)

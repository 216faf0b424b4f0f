"""The exception for bad input, which the user can correct."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: a path, a file, a setting or a combination of them that cannot work.

    The message is one line that says what is wrong and what to do. The runners print it and exit with 2.
    """


class FailedVideosError(Exception):
    """Some videos of a batch could not be made; the others were. The runners print the message and exit with 1."""


class WriteError(InputError):
    """A file cannot be written: the folder, its permissions, or a full disk."""


DAMAGED = "cannot be read: truncated, or of another kind; download it again"
"""What a message says of a file."""
NOT_THE_INPUT = ("out of memory", "allocate memory", "CUDA error")
"""Parts of the messages of RuntimeErrors that say nothing about the input: PyTorch has no class of its own for all."""


@contextmanager
def input_errors(source: Path | str, *kinds: type[Exception], hint: str = "") -> Iterator[None]:
    """Raise InputError, naming ``source``, in place of an exception of one of the ``kinds``.

    Everything else passes through: a missing package, a lack of memory, Ctrl-C and bugs are not bad input.

    Args:
        source: file, folder or setting that is being read.
        kinds: what the code inside raises for bad input.
        hint: what is wrong and what to do; default: the exception's own message.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError) or any(text in str(error) for text in NOT_THE_INPUT):
            raise
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{source} not found; see weights/README.md for where to get it") from None
        if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:  # EINVAL: mapping half a file
            hint = f"cannot be read: {error.strerror}"
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} {hint}" if hint else f"{source}: {message}") from None

"""Calls in threads that nothing waits for when the program ends."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(function: Callable[..., T], *args: Any) -> Future[T]:
    """Begin to call ``function(*args)`` in a thread, and return its future.

    Other than one of ``concurrent.futures``' own threads, this one does not hold up the program's end.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, name=function.__name__, daemon=True).start()
    return future

"""Ctrl-C and SIGTERM: uninterruptible steps, and a message about what can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), which is treated as Ctrl-C is."""


def raise_on_sigterm() -> None:
    """Makes SIGTERM raise :class:`Terminated`; for the main program of a process."""

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


@contextmanager
def unbroken() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the end of the block, so that an update of weights is atomic.

    Outside the main thread, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) is not None
    }
    try:
        for number in before:
            signal.signal(number, lambda number, frame: held.append((number, frame)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in held[:1]:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        else:
            signal.raise_signal(number)


@contextmanager
def keeping(saved: Callable[[], str | None]) -> Iterator[None]:
    """Attaches to an interruption what was saved, for the message.

    Arguments:
        saved: Returns what was saved and can be resumed ("2 of 4 batches"), or ``None``; called when
            the block was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        with suppress(ValueError, OSError):  # a damaged folder must not hide the interruption
            stop.saved = saved()  # type: ignore[attr-defined]
        raise

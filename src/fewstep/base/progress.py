"""The progress protocol of long work: stages with a total, and ticks within them.

A function that may take long has an argument ``progress: Progress | bool | None = None`` and does::

    with progress_of(progress) as shown:
        shown.stage("sampling", total=batches * nfe)
        ...  # per unit:
        shown.tick()

Its caller gives ``True`` for a bar on the error stream, ``False`` or ``None`` for nothing, or an
object with the two methods of :class:`Progress`. Inner functions take ``progress: Progress = SILENT``.
A network evaluation's callback without arguments is ``shown.tick``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@runtime_checkable
class Progress(Protocol):
    """The progress of long work: the work calls its methods.

    A stage ends where the next begins. Units are the stage's own: network evaluations when sampling,
    steps when training.
    """

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Begins a stage: its name, its number of units, the number already done."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Counts units of the stage; the note is shown beside them until the next note."""


class Silent:
    """A progress that shows nothing."""

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Does nothing."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Does nothing."""


SILENT = Silent()
"""The default progress of inner functions."""


@contextmanager
def progress_of(value: Progress | bool | None) -> Iterator[Progress]:
    """Yields the progress of an argument; a bar is closed at the end, also after an error.

    ``True`` is a bar for each stage on the error stream, or one line for each stage where that is
    not a terminal (a log file). Of the processes that ``torchrun`` or ``accelerate launch`` started
    only the first shows anything. A caller's own object is passed on and not closed.

    Arguments:
        value: ``True``, ``False``, ``None``, or an object with ``stage`` and ``tick``.

    Raises:
        TypeError: If it is something else.
    """
    if value is None or value is False:
        yield SILENT
    elif value is True:
        if os.environ.get("RANK", "0") != "0":
            yield SILENT
        elif sys.stderr.isatty():
            bars = _Bars()
            try:
                yield bars
            finally:
                bars.close()
        else:
            yield _Lines()
    elif isinstance(value, Progress) and not isinstance(value, type):
        yield value
    else:
        raise TypeError(
            "progress is True, False, or an object with the methods stage(name, total, done=) and "
            f"tick(amount, note), got {type(value).__name__}"
        )


class _Lines:
    """One line for each stage."""

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        count = "" if total is None else f": {done} of {total}"
        sys.stderr.write(f"{name}{count}\n")
        sys.stderr.flush()

    def tick(self, amount: int = 1, note: str = "") -> None:
        pass


class _Bars:
    """A bar for the current stage; finished stages stay above it."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        bar = self._started()
        self._end()
        self._task = bar.add_task(name, total=total, completed=done, note="")

    def tick(self, amount: int = 1, note: str = "") -> None:
        if self._task is None:
            self.stage("working")
        assert self._bar is not None
        assert self._task is not None
        if note:
            self._bar.update(self._task, advance=amount, note=note)
        else:
            self._bar.advance(self._task, amount)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _started(self) -> RichProgress:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self._bar

    def _end(self) -> None:
        """Prints the last stage as it ended, above the bar of the next: many stages scroll."""
        if self._bar is None or self._task is None:
            return
        task = next(t for t in self._bar.tasks if t.id == self._task)
        self._bar.stop_task(self._task)
        self._bar.console.print(self._bar.make_tasks_table([task]))
        self._bar.remove_task(self._task)

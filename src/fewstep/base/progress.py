"""One protocol for following long work: stages with a total, and ticks within them."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Whoever wants to follow long work gives one of these; the work calls it.

    A stage ends where the next begins. Units are the stage's own: network evaluations when sampling,
    steps when training.
    """

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Begins a stage: what is done, how many units it has, how many of them are there already."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Counts units of the stage; the note is shown beside them."""


class Silent:
    """Follows nothing."""

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Does nothing."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Does nothing."""


SILENT = Silent()
"""What work takes if nobody follows it."""

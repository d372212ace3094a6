"""Shared code of the commands that train: resumable runs, and the final picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.base.files import read_json
from fewstep.base.progress import Progress


class Resumed:
    """A progress that says first at which step a run is resumed.

    Arguments:
        inner: The progress.
        report: Writes a line.
    """

    def __init__(self, inner: Progress, report: Callable[[str], None]) -> None:
        self._inner, self._report = inner, report

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Begins a stage."""
        if done:
            self._report(f"resumed at step {done}")
        self._inner.stage(name, total, done=done)

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Counts steps."""
        self._inner.tick(amount, note)


def _checkpoint(out: Path) -> dict[str, Any] | None:
    if not (out / "checkpoint.json").exists():
        return None
    state = read_json(out / "checkpoint.json", what="checkpoint")
    return state if isinstance(state, dict) else {}


def saved_step(out: Path) -> str | None:
    """Returns in words the step of an interrupted run's checkpoint."""
    step = (_checkpoint(out) or {}).get("step")
    return f"the checkpoint of step {step} is saved" if step else None

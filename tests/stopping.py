"""A progress that stops a run, for tests of what an interrupted run leaves and how it is resumed."""

from __future__ import annotations

from fewstep.base.progress import Silent


class Stopped(Exception):
    """The run was stopped by its progress."""


class Stopping(Silent):
    """Records the units of work that are done, and stops the run when they come to a number.

    Arguments:
        after: The number of units; left out, nothing is stopped.
        stage: The name of the stage whose units are counted, with those done before the run; left out, the units of this
            run in all stages.
        error: What is raised.
    """

    def __init__(
        self,
        after: int | None = None,
        *,
        stage: str | None = None,
        error: type[BaseException] = Stopped,
    ) -> None:
        self._after, self._stage, self._error = after, stage, error
        self._count, self._counting = 0, stage is None
        self.steps: list[int] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        del total
        if self._stage is not None:
            self._count, self._counting = done, name == self._stage

    def tick(self, amount: int = 1, note: str = "") -> None:
        if not self._counting:
            return
        self._count += amount
        self.steps.append(self._count)
        self.notes.append(note)
        if self._after is not None and self._count >= self._after:
            raise self._error

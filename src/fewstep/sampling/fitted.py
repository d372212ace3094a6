r"""Grids that were fitted to a model: the file behind ``grid="auto:FILE"``."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fewstep.base.files import loads_json, write_json
from fewstep.diffusion.grids import MOST_STEPS, TimeGrid, explicit
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record

FORMAT, VERSION = "fewstep.grids", 1
PREFIX = "auto:"
"""What the name of a grid begins with if it is the path of such a file."""

MOST_GRIDS = 10_000


@dataclass(frozen=True)
class FittedGrid:
    """The times that suit a solver at a number of steps.

    Attributes:
        solver: The solver's name.
        times: The times, from the start to the end; the last may be the schedule's zero.
        head: Whether it begins with an analytic head start.
        error: The measured distance to the reference, or ``None``.
    """

    solver: str
    times: tuple[float, ...]
    head: bool = False
    error: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.times) - 1


@dataclass(frozen=True)
class FittedGrids:
    """Grids for several numbers of steps, fitted to one model.

    Attributes:
        schedule: The model's schedule.
        fingerprint: The model's fingerprint, or an empty text.
        grids: The grids; of one solver at one number of steps there is only one.
        recommended: For each number of steps, the solver that is recommended.
    """

    schedule: NoiseSchedule
    fingerprint: str
    grids: tuple[FittedGrid, ...]
    recommended: Mapping[int, str]

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("there are no grids in it")
        keys = {(grid.solver, grid.steps) for grid in self.grids}
        if len(keys) != len(self.grids):
            raise ValueError("it has two grids of one solver for one number of steps")
        for grid in self.grids:
            self._times(grid.times)  # raises if they do not fit the schedule
        for steps, solver in self.recommended.items():
            if (solver, steps) not in keys:
                raise ValueError(f"it recommends {solver!r} for {steps} steps without such a grid")

    def _times(self, times: tuple[float, ...] | Tensor) -> TimeGrid:
        return explicit(self.schedule, times=times)

    def solver_for(self, steps: int) -> str:
        """Returns the solver that is recommended for a number of steps, or for the nearest."""
        if not self.recommended:
            raise ValueError("the file recommends no solver; name one")
        return self.recommended[min(self.recommended, key=lambda k: (abs(k - steps), k))]

    def fit(self, solver: str, steps: int) -> tuple[TimeGrid, bool]:
        """Returns the grid for a solver and a number of steps, and whether it has a head start.

        Grids of that solver, or else of the recommended ones; for a number of steps between those
        in the file the times are interpolated at equal fractions of the way, and beyond them the
        nearest grid is stretched.

        Raises:
            ValueError: If the number of steps is out of range.
        """
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"steps must be from 1 to {MOST_STEPS}, got {steps}")
        own = {grid.steps: grid for grid in self.grids if grid.solver == solver}
        if not own:
            best = {(name, k) for k, name in self.recommended.items()}
            own = {g.steps: g for g in self.grids if (g.solver, g.steps) in best}
            own = own or {g.steps: g for g in self.grids}
        if steps in own:
            return self._times(own[steps].times), own[steps].head
        known = sorted(own)
        place = bisect.bisect(known, steps)
        low, high = own[known[max(place - 1, 0)]], own[known[min(place, len(known) - 1)]]
        alike = low.head == high.head and self._zero(low) == self._zero(high)
        if low is high or not alike:
            nearest = min(low, high, key=lambda grid: abs(grid.steps - steps))
            return self._times(_stretch(nearest, steps)), nearest.head
        share = (1 / low.steps - 1 / steps) / (1 / low.steps - 1 / high.steps)
        times = torch.lerp(_stretch(low, steps), _stretch(high, steps), share)
        return self._times(times), low.head

    def _zero(self, grid: FittedGrid) -> bool:
        return grid.times[-1] < self.schedule.t_min

    def to_record(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule.to_record(),
            "fingerprint": self.fingerprint,
            "recommended": {str(k): name for k, name in sorted(self.recommended.items())},
            "grids": [
                {
                    "solver": grid.solver,
                    "steps": grid.steps,
                    "times": list(grid.times),
                    **({"head": True} if grid.head else {}),
                    **({"error": grid.error} if grid.error is not None else {}),
                }
                for grid in self.grids
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Writes the file, whole or not at all; returns its path."""
        return write_json(path, self.to_record())

    @classmethod
    def from_record(cls, content: Any) -> FittedGrids:
        """Returns the grids that JSON describes.

        Raises:
            ValueError: If it describes none; the message says why.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            got = content.get("format") if isinstance(content, dict) else content
            raise ValueError(
                f"it holds no fitted grids: its format is {got!r:.40}, not {FORMAT!r}"
            )
        if content.get("version") != VERSION:
            raise ValueError(
                f"it has version {content.get('version')!r:.20}; this fewstep reads version {VERSION}"
            )
        expected = {"format", "version", "schedule", "fingerprint", "recommended", "grids"}
        if set(content) != expected:
            wrong = sorted(set(content) ^ expected)
            raise ValueError(
                f"its keys must be {sorted(expected)}; {wrong[0]!r:.40} is not as expected"
            )
        grids, recommended = content["grids"], content["recommended"]
        if not isinstance(grids, list) or len(grids) > MOST_GRIDS:
            raise ValueError("its grids must be a list")
        if not isinstance(content["fingerprint"], str):
            raise ValueError("its fingerprint must be a text")
        if not isinstance(recommended, dict) or not all(
            isinstance(name, str) and steps.isascii() and steps.isdigit() and len(steps) < 7
            for steps, name in recommended.items()
        ):
            raise ValueError("what it recommends must be names of solvers by numbers of steps")
        if not isinstance(content["schedule"], dict):
            raise ValueError("its schedule must be a JSON object")
        return cls(
            schedule_from_record(content["schedule"]),
            content["fingerprint"],
            tuple(_grid(entry) for entry in grids),
            {int(steps): name for steps, name in recommended.items()},
        )

    @classmethod
    def load(cls, path: str | Path) -> FittedGrids:
        """Reads a file.

        Raises:
            ValueError: If it is missing or holds no fitted grids.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"grid file {str(path)!r} cannot be read: {error.strerror}") from None
        try:
            return cls.from_record(loads_json(text, what="it"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"grid file {str(path)!r}: {error}") from None


def _stretch(grid: FittedGrid, steps: int) -> Tensor:
    """Returns times at equal fractions of a grid's way."""
    times = torch.tensor(grid.times, dtype=torch.float64)
    where = torch.linspace(0, grid.steps, steps + 1, dtype=torch.float64)
    below = where.floor().long().clamp(max=grid.steps - 1)
    # In this root of time good grids are nearly even, so lines between their points are good.
    root = times.clamp_min(0).pow(2 / 3)
    made = torch.lerp(root[below], root[below + 1], where - below).pow(1.5)
    made[0], made[-1] = times[0], times[-1]
    return made


def _grid(entry: Any) -> FittedGrid:
    if not isinstance(entry, dict):
        raise ValueError(f"a grid is a JSON object, got {entry!r:.40}")
    unknown = set(entry) - {"solver", "steps", "times", "head", "error"}
    if unknown:
        raise ValueError(f"a grid has an unknown key {min(unknown)!r:.40}")
    solver, times = entry.get("solver"), entry.get("times")
    if not isinstance(solver, str):
        raise ValueError(f"the solver of a grid is a name, got {solver!r:.40}")
    if (
        not isinstance(times, list)
        or not 2 <= len(times) <= MOST_STEPS
        or not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in times)
        or not all(math.isfinite(t) for t in times)
    ):
        raise ValueError("the times of a grid are a list of two or more numbers")
    if entry.get("steps") != len(times) - 1:
        raise ValueError(f"{len(times)} times are not {entry.get('steps')!r:.20} steps")
    head, error = entry.get("head", False), entry.get("error")
    if not isinstance(head, bool):
        raise ValueError(f"the head of a grid is true or false, got {head!r:.40}")
    if error is not None and (not isinstance(error, (int, float)) or isinstance(error, bool)):
        raise ValueError(f"the error of a grid is a number, got {error!r:.40}")
    return FittedGrid(solver, tuple(float(t) for t in times), head, error)


def is_fitted(grid: object) -> TypeGuard[str]:
    """Whether the name of a grid means a file."""
    return isinstance(grid, str) and grid.startswith(PREFIX)


def read_fitted(grid: str, schedule: NoiseSchedule) -> FittedGrids:
    """Returns the grids that ``"auto:FILE"`` means.

    Raises:
        ValueError: If the file is missing or damaged, or is for another schedule.
    """
    found = FittedGrids.load(grid.removeprefix(PREFIX))
    if not _alike(found.schedule, schedule):
        raise ValueError(
            f"the grids in {grid.removeprefix(PREFIX)!r} were fitted for the schedule "
            f"{found.schedule.name!r}, the model has {schedule.name!r}; make others with fewstep analyze"
        )
    return replace(found, schedule=schedule)


def _alike(one: NoiseSchedule, two: NoiseSchedule) -> bool:
    """Whether two schedules are the same curve in the same times: a table may have been rounded."""
    if one == two:
        return True
    if (one.t_min, one.t_max, one.t_zero) != (two.t_min, two.t_max, two.t_zero):
        return False
    times = torch.linspace(one.t_min, one.t_max, 33, dtype=torch.float64)
    return all(
        torch.allclose(f(times), g(times), rtol=1e-4, atol=1e-7)
        for f, g in ((one.alpha, two.alpha), (one.sigma, two.sigma))
    )

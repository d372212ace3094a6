r"""The profile of a model: for each budget the best solver and times, as measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fewstep.base.files import read_json, sweep, write_json
from fewstep.base.paths import check_path
from fewstep.base.records import check_header
from fewstep.base.tables import Column, Table
from fewstep.diffusion.grids import MOST_STEPS, TimeGrid, explicit
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.sampling.planning import NO_BUDGET, planned
from fewstep.sampling.recipe import SamplerRecipe, recipe_of
from fewstep.sampling.request import SamplerRequest
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers import solver as make_solver
from fewstep.solvers.dpm_v3 import check_statistics
from fewstep.solvers.multistep import Multistep

FORMAT, VERSION = "fewstep.profile", 1
GRIDS_FORMAT = "fewstep.grids"
"""The previous format: times without the costs, the default's errors and the guidance."""

PROFILE = "profile.json"
"""The name of the profile in a model's folder."""

PREFIX = "auto:"
"""The prefix of a grid's name that is the path of a profile."""

MEASURED = Multistep.name
"""The solver with measured weights."""

MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class ProfileEntry:
    """The times that suit a solver at a number of steps.

    Attributes:
        solver: The solver's name.
        times: The times, from the start to the end; the last may be the schedule's zero.
        head: Whether it begins with an analytic head start.
        error: The expected RMS distance to the model's own many-step solution, or ``None``.
        default_error: That of the static default at the same budget, or ``None``.
        cost: The network evaluations of the measurement of these times, or ``None``.
        weights: The measured weights, of the solver ``multistep``; they hold for these times only.
    """

    solver: str
    times: tuple[float, ...]
    head: bool = False
    error: float | None = None
    default_error: float | None = None
    cost: int | None = None
    weights: Sequence[Sequence[float]] = ()

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.times) - 1

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        known = {k: getattr(self, k) for k in ("error", "default_error", "cost")}
        return {
            "solver": self.solver,
            "steps": self.steps,
            "times": list(self.times),
            **({"head": True} if self.head else {}),
            **{key: value for key, value in known.items() if value is not None},
            **({"weights": [list(w) for w in self.weights]} if self.weights else {}),
        }

    @classmethod
    def from_record(cls, content: Any) -> ProfileEntry:
        """Returns the entry that a JSON object describes.

        Raises:
            ValueError: If it describes none; the message says why.
        """
        if not isinstance(content, dict):
            raise ValueError(f"an entry is a JSON object, got {content!r:.40}")
        keys = {"solver", "steps", "times", "head", "error", "default_error", "cost", "weights"}
        if others := set(content) - keys:
            raise ValueError(f"an entry has an unknown key {min(others)!r:.40}")
        solver, times = content.get("solver"), content.get("times")
        if not isinstance(solver, str):
            raise ValueError(f"the solver of an entry is a name, got {solver!r:.40}")
        if (
            not isinstance(times, list)
            or not 2 <= len(times) <= MOST_STEPS
            or not all(_is_number(t) for t in times)
        ):
            raise ValueError("the times of an entry are a list of two or more numbers")
        if content.get("steps") != len(times) - 1:
            raise ValueError(f"{len(times)} times are not {content.get('steps')!r:.20} steps")
        head, cost = content.get("head", False), content.get("cost")
        if not isinstance(head, bool):
            raise ValueError(f"the head of an entry is true or false, got {head!r:.40}")
        for key in ("error", "default_error"):
            if content.get(key) is not None and not _is_number(content[key]):
                raise ValueError(f"the {key} of an entry is a number, got {content[key]!r:.40}")
        if cost is not None and (type(cost) is not int or cost < 0):
            raise ValueError(f"the cost of an entry is a number of evaluations, got {cost!r:.40}")
        return cls(
            solver,
            tuple(float(t) for t in times),
            head,
            content.get("error"),
            content.get("default_error"),
            cost,
            _weights(content.get("weights", [])),
        )


@dataclass(frozen=True)
class Profile:
    r"""Solvers and times for several budgets, measured on one model.

    Errors are root mean square distances to the model's own many-step solution from the same noise, in the units
    of a sample; costs are evaluations of one image.

    Attributes:
        schedule: The model's schedule.
        fingerprint: The model's fingerprint; an empty text if it is not known.
        entries: The times; at most one for each solver and number of steps.
        recommended: For each number of steps, the recommended solver.
        guidance: The scale of guidance that it was measured with, 1 for none; ``None`` if it is not
            known.
        about: The settings of the measurement: evaluations, seconds, samples, seed, conditions. For readers.
        statistics: Of the model, for ``dpm-solver-v3`` at any number of steps: rows :math:`(\lambda, l, s)`. Empty
            in profiles of earlier versions.

    Example:
        >>> profile = fewstep.load("fashion", device="cpu").profile
        >>> recipe = profile.recipe(8)
        >>> recipe.nfe
        8
    """

    schedule: NoiseSchedule
    fingerprint: str
    entries: tuple[ProfileEntry, ...]
    recommended: Mapping[int, str]
    guidance: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    statistics: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", check_statistics(self.statistics))
        if not self.entries:
            raise ValueError("there are no times in it")
        keys = {(entry.solver, entry.steps) for entry in self.entries}
        if len(keys) != len(self.entries):
            raise ValueError("it has two entries of one solver for one number of steps")
        for entry in self.entries:
            self._times(entry.times)  # raises if they do not fit the schedule
            if entry.weights and (entry.solver, len(entry.weights)) != (MEASURED, entry.steps):
                raise ValueError(
                    f"weights belong to {MEASURED!r}, one row per step; {entry.solver} with "
                    f"{entry.steps} steps has {len(entry.weights)} rows"
                )
        for steps, solver in self.recommended.items():
            if (solver, steps) not in keys:
                raise ValueError(
                    f"it recommends {solver!r} for {steps} steps without such an entry"
                )

    def recipe(self, nfe: int) -> SamplerRecipe:
        """Returns the recommended sampler for a budget, as a recipe for this model.

        For a budget between the measured ones the times are interpolated, see :meth:`fit`.

        Arguments:
            nfe: The number of network evaluations.

        Raises:
            ValueError: If the solver cannot meet the budget (with the nearest ones).
        """
        stored = recipe_of(self.schedule, planned(self.schedule, self.request(nfe=nfe)))
        return replace(
            stored,
            guidance=None if self.guidance == 1 else self.guidance,
            model=self.fingerprint or None,
        )

    def request(
        self,
        *,
        nfe: int | None = None,
        steps: int | None = None,
        solver: str | Solver | None = None,
    ) -> SamplerRequest:
        """Returns the request for a budget: solver and times, from this profile.

        Arguments:
            nfe: The number of network evaluations; or
            steps: the number of steps.
            solver: The solver; left out, the recommended one.
        """
        budget = nfe if nfe is not None else steps
        if budget is None:
            raise ValueError(NO_BUDGET)
        chosen = self.solver_for(budget) if solver is None else solver
        method = chosen if isinstance(chosen, Solver) else make_solver(chosen)
        grid, head = self.fit(method.name, method.steps_for(budget) if steps is None else steps)
        start = float(grid.times[0]) if head else None
        return SamplerRequest(
            chosen,
            nfe=nfe,  # type: ignore[arg-type]
            grid=grid,
            head_start=start,  # type: ignore[arg-type]
            options=self.options_for(method.name, grid.steps),
        )

    def options_for(self, solver: str, steps: int) -> dict[str, Any]:
        """Returns the options of a solver on its times: the measured weights or statistics, if any."""
        option = make_solver(solver).measured if solver in SOLVERS else None
        if option is not None and self.statistics:
            return {option: self.statistics}
        entry = self._entry(solver, steps)
        return {"weights": entry.weights} if entry is not None and entry.weights else {}

    def of_model(self) -> Sequence[Sequence[float]]:
        """Returns the statistics of the model.

        Raises:
            ValueError: If it has none.
        """
        if not self.statistics:
            raise ValueError(
                "the profile has no statistics, since an earlier version measured it; measure the model again "
                "(fewstep fit)"
            )
        return self.statistics

    def _entry(self, solver: str, steps: int) -> ProfileEntry | None:
        wanted = (solver, steps)
        return next((e for e in self.entries if (e.solver, e.steps) == wanted), None)

    def table(self) -> Table:
        """Returns one row for each budget: the recommended sampler, its error, the default's, the cost."""
        rows = []
        for steps, name in sorted(self.recommended.items()):
            entry = next(e for e in self.entries if (e.solver, e.steps) == (name, steps))
            zero = self._is_zero(entry)
            rows.append(
                {
                    "nfe": make_solver(name).nfe(steps, ends_at_zero=zero),
                    "steps": steps,
                    "solver": name,
                    "head_start": entry.times[0] if entry.head else None,
                    "error": entry.error,
                    "default_error": entry.default_error,
                    "cost": entry.cost,
                    "ratio": entry.error / entry.default_error
                    if entry.error is not None and entry.default_error
                    else None,
                }
            )
        return Table(
            rows,
            [
                Column("nfe", "NFE"),
                Column("solver", left=True),
                Column("error", "distance", "{:.4f}".format),
                Column("ratio", "of the static default", "{:.2f}".format),
            ],
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _times(self, times: tuple[float, ...] | Tensor) -> TimeGrid:
        return explicit(self.schedule, times=times)

    def solver_for(self, steps: int) -> str:
        """Returns the recommended solver for a number of steps, or for the nearest."""
        if not self.recommended:
            raise ValueError("the file recommends no solver; name one")
        if steps in self.recommended:
            return self.recommended[steps]
        nearest = min(self.recommended, key=lambda k: (abs(k - steps), k))
        entries = [e for e in self.entries if e.steps == nearest and not e.weights]
        # Weights hold for their own times; between budgets a solver without weights replaces it.
        if self.recommended[nearest] != MEASURED or not entries:
            return self.recommended[nearest]
        return min(entries, key=lambda e: math.inf if e.error is None else e.error).solver

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
        own = {entry.steps: entry for entry in self.entries if entry.solver == solver}
        if solver == MEASURED and steps not in own:
            raise ValueError(
                f"{MEASURED!r} was measured for {sorted(own)} steps, not for {steps}; name another "
                "solver, or measure this budget too"
            )
        if not own:
            best = {(name, k) for k, name in self.recommended.items()}
            own = {e.steps: e for e in self.entries if (e.solver, e.steps) in best}
            own = own or {e.steps: e for e in self.entries}
        if steps in own:
            return self._times(own[steps].times), own[steps].head
        known = sorted(own)
        place = bisect.bisect(known, steps)
        low, high = own[known[max(place - 1, 0)]], own[known[min(place, len(known) - 1)]]
        alike = low.head == high.head and self._is_zero(low) == self._is_zero(high)
        if low is high or not alike:
            nearest = min(low, high, key=lambda entry: abs(entry.steps - steps))
            return self._times(_stretch(nearest, steps)), nearest.head
        share = (1 / low.steps - 1 / steps) / (1 / low.steps - 1 / high.steps)
        times = torch.lerp(_stretch(low, steps), _stretch(high, steps), share)
        return self._times(times), low.head

    def _is_zero(self, entry: ProfileEntry) -> bool:
        return self.schedule.is_zero(entry.times[-1])

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule.to_record(),
            "fingerprint": self.fingerprint,
            "guidance": self.guidance,
            **({"about": dict(self.about)} if self.about else {}),
            **({"statistics": [list(row) for row in self.statistics]} if self.statistics else {}),
            "recommended": {str(k): name for k, name in sorted(self.recommended.items())},
            "entries": [entry.to_record() for entry in self.entries],
        }

    def save(self, path: str | Path) -> Path:
        """Writes the file, atomically; returns its path."""
        check_path(path, "path")
        sweep(Path(path).parent, of=Path(path).name)  # of a killed process
        return write_json(path, self.to_record())

    @classmethod
    def from_record(cls, content: Any) -> Profile:
        """Returns the profile of a JSON object.

        Raises:
            ValueError: If it is not a profile; the message has the reason.
        """
        check_header(content, "it", [FORMAT, GRIDS_FORMAT], VERSION)
        of = "entries" if content["format"] == FORMAT else "grids"
        expected = {"format", "version", "schedule", "fingerprint", "recommended", of}
        expected |= {"guidance"} if content["format"] == FORMAT else set()
        optional = {"about", "statistics"}
        if set(content) - optional != expected:
            wrong = sorted((set(content) - optional) ^ expected)
            raise ValueError(
                f"its keys must be {sorted(expected)}; {wrong[0]!r:.40} is not as expected"
            )
        entries, recommended = content[of], content["recommended"]
        if not isinstance(entries, list) or len(entries) > MOST_ENTRIES:
            raise ValueError(f"its {of} must be a list")
        guidance = content.get("guidance")
        if guidance is not None and not _is_number(guidance):
            raise ValueError(f"its guidance must be a number, got {guidance!r:.40}")
        about = content.get("about", {})
        if not isinstance(about, dict):
            raise ValueError(f"its about must be a JSON object, got {about!r:.40}")
        if not isinstance(content["fingerprint"], str):
            raise ValueError("its fingerprint must be a text")
        if not isinstance(recommended, dict) or not all(
            isinstance(name, str) and steps.isascii() and steps.isdigit() and len(steps) < 7
            for steps, name in recommended.items()
        ):
            raise ValueError("its recommended must be names of solvers by numbers of steps")
        if not isinstance(content["schedule"], dict):
            raise ValueError("its schedule must be a JSON object")
        return cls(
            schedule_from_record(content["schedule"]),
            content["fingerprint"],
            tuple(ProfileEntry.from_record(entry) for entry in entries),
            {int(steps): name for steps, name in recommended.items()},
            guidance,
            about,
            check_statistics(content.get("statistics", [])),
        )

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a file: a profile, or the grids that earlier versions fitted.

        Raises:
            ValueError: If it is missing or holds no profile.
        """
        content = read_json(path, what="profile")
        try:
            return cls.from_record(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"profile {str(path)!r}: {error}") from None


def _stretch(entry: ProfileEntry, steps: int) -> Tensor:
    """Returns times at equal fractions of the way of an entry's."""
    times = torch.tensor(entry.times, dtype=torch.float64)
    where = torch.linspace(0, entry.steps, steps + 1, dtype=torch.float64)
    below = where.floor().long().clamp(max=entry.steps - 1)
    # In this root of time good grids are nearly evenly spaced, so linear interpolation is accurate.
    root = times.clamp_min(0).pow(2 / 3)
    result = torch.lerp(root[below], root[below + 1], where - below).pow(1.5)
    result[0], result[-1] = times[0], times[-1]
    return result


def _weights(value: Any) -> Sequence[Sequence[float]]:
    rows: Any = value if isinstance(value, list) and len(value) <= MOST_STEPS else [None]
    if not all(isinstance(row, list) and all(_is_number(w) for w in row) for row in rows):
        raise ValueError(
            f"the weights of an entry are a list of numbers per step, got {value!r:.40}"
        )
    return Multistep(rows).weights


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def names_profile(grid: object) -> TypeGuard[str]:
    """Whether the name of a grid refers to a profile."""
    return isinstance(grid, str) and grid.startswith(PREFIX)


def is_profile(path: str | Path) -> bool:
    """Returns whether a file says that it is a profile; its content is not checked."""
    try:
        content = read_json(path, what="profile")
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") in (FORMAT, GRIDS_FORMAT)


def read_profile(source: Profile | str | Path, schedule: NoiseSchedule) -> Profile:
    """Returns a profile for a model with this schedule: itself, or that of a path or an ``auto:`` name.

    Raises:
        ValueError: If the file is missing or damaged, or is for another schedule.
        TypeError: If it is neither profile nor path.
    """
    if not isinstance(source, (Profile, str, Path)):
        raise TypeError(
            f"profile must be a Profile or the path of one, got {type(source).__name__}"
        )
    where = "" if isinstance(source, Profile) else f" {str(source).removeprefix(PREFIX)!r}"
    profile = (
        source if isinstance(source, Profile) else Profile.load(str(source).removeprefix(PREFIX))
    )
    if not _alike(profile.schedule, schedule):
        raise ValueError(
            f"the profile{where} was measured for the schedule {profile.schedule.name!r}, the model has "
            f"{schedule.name!r}; measure this model (fewstep analyze)"
        )
    return profile if profile.schedule is schedule else replace(profile, schedule=schedule)


def _alike(one: NoiseSchedule, two: NoiseSchedule) -> bool:
    """Whether two schedules are equal up to the rounding of a table."""
    if one == two:
        return True
    if (one.t_min, one.t_max, one.t_zero) != (two.t_min, two.t_max, two.t_zero):
        return False
    times = torch.linspace(one.t_min, one.t_max, 33, dtype=torch.float64)
    return all(
        torch.allclose(f(times), g(times), rtol=1e-4, atol=1e-7)
        for f, g in ((one.alpha, two.alpha), (one.sigma, two.sigma))
    )

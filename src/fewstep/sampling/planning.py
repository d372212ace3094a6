"""From names and numbers to a plan: the one place where solver, grid and budget meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.plan import Plan
from fewstep.sampling.fitted import is_fitted, read_fitted
from fewstep.solvers import Solver
from fewstep.solvers import solver as make_solver
from fewstep.solvers.base import NO_PLAN

GRID_OPTIONS = frozenset({"t_start", "t_end", "to_zero", "power", "rho", "times"})
"""The options of a plan that belong to its grid; all others are the solver's."""


def plan(
    solver: str | Solver,
    schedule: NoiseSchedule,
    *,
    nfe: int | None = None,
    steps: int | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    integer_times: bool = False,
    **options: Any,
) -> Plan:
    r"""Returns the plan of a solver.

    Arguments:
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"``, or a solver.
        schedule: The noise schedule.
        nfe: The number of network calls; or
        steps: the number of steps. Neither is needed if the grid has its times.
        grid: A name in :data:`fewstep.GRIDS`, ``"auto:FILE"`` for the grids that ``fewstep analyze``
            fitted to a model (and, with solver ``"auto"``, its solver), or a grid; left out, the
            solver's own.
        head_start: A time below the schedule's largest: the calls above it are replaced by the
            Gaussian solution with the mean and the variance of the data.
        integer_times: Whether the grid is rounded to trained levels.
        options: Options of the grid (``t_start``, ``t_end``, ``to_zero``, ``power``, ``rho``,
            ``times``) and of the solver.

    Raises:
        ValueError: If a name is unknown, or the budget cannot be met (the message has the
            nearest budgets).
        TypeError: If solver or grid have no such option.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {schedule!r}; make one with fewstep.schedule(name)"
        )
    if is_fitted(grid):
        return _fitted(
            solver, schedule, nfe, steps, grid, head_start, integer_times=integer_times, **options
        )
    if solver == "auto":
        choice = choose(
            schedule, grid.steps if isinstance(grid, TimeGrid) else _budget(nfe, steps)
        )
        nfe, steps = (None if isinstance(grid, TimeGrid) else choice.nfe), None
        solver = choice.solver
        options = {**choice.options_on(grid), **options}
        grid = choice.grid if grid is None else grid
        head_start = choice.head_start if head_start is None else head_start
    grid_options = {k: v for k, v in options.items() if k in GRID_OPTIONS}
    solver_options = {k: v for k, v in options.items() if k not in GRID_OPTIONS}
    if isinstance(solver, Solver):
        if solver_options:
            raise TypeError(
                f"a solver that is made already takes no options, got {', '.join(solver_options)}"
            )
        method = solver
    else:
        method = make_solver(solver, **solver_options)
    if method.adaptive:
        raise ValueError(NO_PLAN.format(method.name))
    if head_start is not None:
        if grid == "explicit":
            _check_head(head_start, grid_options.get("times"))
        elif grid_options.get("t_start") is not None or isinstance(grid, TimeGrid):
            raise ValueError("give head_start, or the start of the grid, not both")
        else:
            grid_options["t_start"] = head_start
    knots = _grid(method, schedule, nfe=nfe, steps=steps, grid=grid, options=grid_options)
    if integer_times:
        knots = knots.rounded()
    made = method.plan(knots)
    return replace(made, head=True) if head_start is not None else made


def _check_head(head_start: float, times: Any) -> None:
    try:
        first = float(times[0])
    except (TypeError, ValueError, IndexError):
        return  # the grid says what is wrong with its times
    if first != head_start:
        raise ValueError(f"head_start is {head_start:g}, but the first of the times is {first:g}")


def _fitted(
    solver: str | Solver,
    schedule: NoiseSchedule,
    nfe: int | None,
    steps: int | None,
    grid: Any,
    head_start: float | None,
    *,
    integer_times: bool,
    **options: Any,
) -> Plan:
    """Returns the plan on a grid of a file."""
    given = sorted(GRID_OPTIONS & {k for k, v in options.items() if v is not None})
    if head_start is not None:
        given.append("head_start")
    if given:
        raise ValueError(f"the grid {grid!r} has its times already, got {given[0]} as well")
    found = read_fitted(grid, schedule)
    if nfe is not None and steps is not None:
        raise ValueError(f"give nfe or steps, not both; got nfe={nfe} and steps={steps}")
    budget = _budget(nfe, steps)
    if solver == "auto":
        solver = found.solver_for(budget)
    method = solver if isinstance(solver, Solver) else make_solver(solver, **options)
    if steps is None:
        steps = method.steps_for(budget)
    knots, head = found.fit(method.name, steps)
    made = plan(method, schedule, nfe=nfe, grid=knots, integer_times=integer_times)
    return replace(made, head=head)


def _budget(nfe: int | None, steps: int | None) -> int:
    budget = nfe if nfe is not None else steps
    if budget is None:
        raise ValueError("give nfe, the number of network calls")
    return budget


def _grid(
    method: Solver,
    schedule: NoiseSchedule,
    *,
    nfe: int | None,
    steps: int | None,
    grid: str | TimeGrid | None,
    options: Mapping[str, Any],
) -> TimeGrid:
    if nfe is not None and steps is not None:
        raise ValueError(f"give nfe or steps, not both; got nfe={nfe} and steps={steps}")
    if isinstance(grid, TimeGrid):
        if options:
            raise ValueError(
                f"a grid that is made already takes no options, got {', '.join(options)}"
            )
        if grid.schedule != schedule:
            raise ValueError(
                f"the grid was made for schedule {grid.schedule.name!r}, the plan is for {schedule.name!r}"
            )
        found = grid
    else:
        if nfe is not None:
            own = method.default_grid[1] if grid is None else {}
            to_zero = bool({**own, **options}.get("to_zero", False))
            steps = method.steps_for(nfe, ends_at_zero=to_zero)
            if (grid or method.default_grid[0]) == "explicit":
                steps = None
        elif steps is None and "times" not in options:
            raise ValueError("give nfe, the number of network calls, or steps")
        found = method.make_grid(schedule, steps, grid, **options)  # type: ignore[arg-type]
    made = method.nfe(found.steps, ends_at_zero=found.ends_at_zero)
    if nfe is not None and made != nfe:
        raise ValueError(
            f"{method.name} makes {made} calls on this grid of {found.steps} steps, not {nfe}"
        )
    if steps is not None and found.steps != steps:
        raise ValueError(f"the grid has {found.steps} steps, not {steps}")
    return found


@dataclass(frozen=True)
class Choice:
    """What ``solver="auto"`` stands for."""

    solver: str
    nfe: int
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    head_start: float | None = None

    def options_on(self, grid: object) -> dict[str, Any]:
        """Returns the options, without those of the grid where another grid is given."""
        if grid is None:
            return dict(self.options)
        return {key: value for key, value in self.options.items() if key not in GRID_OPTIONS}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        grid = f" on the grid {self.grid!r}" if self.grid else ""
        return f"{self.solver}{grid}{f' ({options})' if options else ''} with {self.nfe} calls"


def choose(schedule: NoiseSchedule, nfe: int) -> Choice:
    """Returns what ``auto`` stands for at a budget, for this kind of schedule.

    The table is in ``docs/choosing.md``, with the measurements behind it.
    """
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    if not schedule.discrete:
        return Choice("tab3", nfe, "quadratic")
    solver = "unipc3" if nfe < 10 else "tab3"
    return Choice(solver, nfe, "power", {"power": 1.5})

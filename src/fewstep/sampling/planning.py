r"""From solver, grid and budget to a plan; plans are cached."""

from __future__ import annotations

import difflib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fewstep.diffusion.grids import GRIDS, TimeGrid, check_start, check_strength, over_default
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.plan import Plan
from fewstep.sampling.auto import AUTO, choose, describe
from fewstep.sampling.request import UNSET, Contradiction, SamplerRequest, as_text
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers import solver as make_solver

EXPLICIT = "explicit"
ENDS = ("strength", "t_start", "t_end", "to_zero")
"""The options that every evenly spaced grid has."""

GRID_OPTIONS = frozenset(
    name
    for build in GRIDS.values()
    for name in inspect.signature(build).parameters
    if name not in ("schedule", "steps")
)
"""The options of a request that belong to its grid; all others are the solver's."""

MOST_PLANS = 128
"""The size of the cache of plans; the least recently used is dropped first."""

NO_BUDGET = "give nfe, the number of network evaluations, or steps"

ADAPTIVE = (
    "{name} chooses its steps while it runs, so it {takes}has no plan beforehand; leave {out} out and "
    "give rtol and atol, or freeze one of its runs with fewstep.sampling.adaptive.freeze"
)


@dataclass(frozen=True)
class Planned:
    """A plan, with the request that it was built from.

    Attributes:
        plan: The plan.
        solver: The solver.
        grid: Its grid.
        name: The solver's name in the registry, or ``None`` for a solver that was given as an object.
        grid_name: The name of the grid; ``None`` is the solver's own.
        options: The options of solver and grid, by name.
        head_start: The time of an analytic head start, or ``None``.
        chosen: What ``auto`` chose, in one line; ``None`` if the solver was named.
    """

    plan: Plan
    solver: Solver
    grid: TimeGrid
    name: str | None
    grid_name: str | None
    options: Mapping[str, Any]
    head_start: float | None
    chosen: str | None = None


def planned(
    schedule: NoiseSchedule,
    request: SamplerRequest,
    *,
    integer_times: bool = False,
    default_nfe: int | None = None,
) -> Planned:
    """Returns the plan of a solver, a grid and a budget; the same request has the same plan.

    Arguments:
        schedule: The noise schedule.
        request: The request; it has neither plan nor recipe nor profile.
        integer_times: Whether the grid is rounded to training timesteps.
        default_nfe: The budget if none is given; left out, a budget must be given.

    Raises:
        Contradiction: If two parts of it contradict each other.
        ValueError: If a name is unknown, or the budget cannot be met (with the nearest budgets).
        TypeError: If neither solver nor grid have an option (with those that they have).
    """
    try:
        key = _key(schedule, request, integer_times, default_nfe)
    except TypeError:  # an option that cannot be compared
        return _planned(schedule, request, integer_times, default_nfe)
    return _MEMORY.get(key) or _MEMORY.put(
        key, schedule, _planned(schedule, request, integer_times, default_nfe)
    )


def _planned(
    schedule: NoiseSchedule, request: SamplerRequest, integer_times: bool, default_nfe: int | None
) -> Planned:
    if request.nfe is not UNSET and request.steps is not UNSET:
        raise Contradiction(
            f"give nfe or steps, not both; got nfe={request.nfe} and steps={request.steps}"
        )
    solver = AUTO if request.solver is None else request.solver
    if is_adaptive(solver):
        check_adaptive(request)
    nfe, steps, grid = request.nfe, request.steps, request.grid
    head_start = request.head_start
    options = dict(request.options)
    if "times" in options:
        _check_times(grid)
        grid = EXPLICIT
    _check_start(schedule, grid, options)
    own = _own_steps(grid, options)
    if nfe is None and steps is None and own is None:
        if default_nfe is None:
            raise ValueError(NO_BUDGET)
        nfe = default_nfe
    chosen = solver == AUTO
    if solver == AUTO:
        choice = choose(schedule, nfe or steps or own or 1)
        solver = choice.solver
        if grid is None:
            grid, options = choice.grid, over_default(choice.options, options)
            if head_start is None and not {"t_start", "strength"} & set(options):
                head_start = choice.head_start
    method, for_grid = _method(solver, grid, options)
    if head_start is not None:
        _check_head(head_start, grid, for_grid)
        if request.head_start is not None:  # a user's
            check_start(schedule, head_start, "head_start")
        if not isinstance(grid, TimeGrid) and grid != EXPLICIT:
            for_grid["t_start"] = head_start
    knots = _grid(method, schedule, nfe=nfe, steps=steps, grid=grid, options=for_grid)
    if integer_times:
        knots = knots.rounded()
    plan = method.plan(knots)
    if head_start is not None:
        plan = replace(plan, head=True)
    name = solver if isinstance(solver, str) else None
    if isinstance(grid, TimeGrid):
        named, options = EXPLICIT, {**options, "times": grid.times.tolist()}
    else:
        named = grid
        if steps is not None and named != EXPLICIT and _steps_of(method, plan, knots) != steps:
            named, options = EXPLICIT, {**_solver_options(method, options), "times": _times(knots)}
    description = None
    if chosen:
        label = "given" if isinstance(grid, TimeGrid) else grid
        description = describe(method.name, label, options, plan.nfe)
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}
    return Planned(plan, method, knots, name, named, plain, head_start, description)


def check_adaptive(request: SamplerRequest, *, plan: bool = True) -> None:
    """Raises for arguments that an adaptive solver does not have, or because it has no plan.

    Raises:
        Contradiction: If a budget, a grid or a head start is given, or a plan is needed.
    """
    given = [n for n in ("nfe", "steps", "grid", "head_start") if getattr(request, n) is not UNSET]
    if not given and not plan:
        return
    name = (
        request.solver if isinstance(request.solver, str) else getattr(request.solver, "name", "")
    )
    takes = f"takes no {as_text(given)} and " if given else ""
    out = as_text(given) if given else "the plan"
    raise Contradiction(ADAPTIVE.format(name=name, takes=takes, out=out))


def is_adaptive(solver: object) -> bool:
    """Whether a solver, given as an object or by name, chooses its steps while it runs."""
    if isinstance(solver, str):
        return solver != AUTO and SOLVERS[solver]().adaptive
    return isinstance(solver, Solver) and solver.adaptive


def grid_options(grid: str | None) -> frozenset[str]:
    """Returns the options of a grid by name; of no grid those of any evenly spaced one."""
    if grid is None:
        return frozenset(ENDS)
    names = [
        name
        for name, parameter in inspect.signature(GRIDS[grid]).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("schedule", "steps")
    ]
    return frozenset(names or ENDS)


def solver_options(solver: str) -> frozenset[str]:
    """Returns the options of a solver by name."""
    return frozenset(inspect.signature(SOLVERS[solver]).parameters)


def _method(
    solver: str | Solver,
    grid: str | TimeGrid | None,
    options: Mapping[str, Any],
) -> tuple[Solver, dict[str, Any]]:
    """Returns the solver, and the options of the grid."""
    if isinstance(grid, TimeGrid):
        of_grid = frozenset[str]()
        if conflicting := sorted(GRID_OPTIONS & set(options)):
            raise Contradiction(
                f"a grid object already has its times, got {as_text(conflicting)} as well; leave "
                f"{'it' if len(conflicting) == 1 else 'them'} out"
            )
    else:
        if grid is None and not isinstance(solver, Solver):
            build = SOLVERS[solver]
            own = getattr(build, "func", build).default_grid[0]  # type: ignore[attr-defined]
        else:
            own = grid if grid is not None else solver.default_grid[0]  # type: ignore[union-attr]
        of_grid = grid_options(own)
    if isinstance(solver, Solver):
        if others := sorted(set(options) - of_grid):
            raise Contradiction(f"a solver object already has its options, got {as_text(others)}")
        return solver, dict(options)
    of_solver = solver_options(solver) - of_grid
    check_options(
        solver, None if isinstance(grid, TimeGrid) else grid, options, of_solver, of_grid
    )
    method = make_solver(solver, **{k: v for k, v in options.items() if k in of_solver})
    return method, {k: v for k, v in options.items() if k in of_grid}


def check_options(
    solver: str,
    grid: str | None,
    options: Mapping[str, Any],
    of_solver: frozenset[str],
    of_grid: frozenset[str],
) -> None:
    """Raises ``TypeError`` for an option that neither solver nor grid have, with those that they have."""
    others = sorted(set(options) - of_solver - of_grid)
    if not others:
        return
    place = f"the grid {grid!r}" if grid else "its grid"
    parts = (
        f"the solver {solver!r}: {', '.join(sorted(of_solver)) or 'none'}",
        f"{place}: {', '.join(sorted(of_grid)) or 'none'}",
    )
    near = difflib.get_close_matches(str(others[0]), sorted(of_solver | of_grid), n=1, cutoff=0.7)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise TypeError(f"Unknown option {others[0]!r}.{hint} Options of {'; of '.join(parts)}")


def _check_times(grid: str | TimeGrid | None) -> None:
    if isinstance(grid, TimeGrid):
        raise Contradiction("a grid object already has its times, got times as well; leave it out")
    if grid is not None and grid != EXPLICIT:
        GRIDS[grid]  # an unknown name is the first error
        raise Contradiction(
            f"the grid {grid!r} places its own times, got times as well; leave one of them out "
            "(times alone are the grid 'explicit')"
        )


def _check_head(
    head_start: float, grid: str | TimeGrid | None, options: Mapping[str, Any]
) -> None:
    if isinstance(grid, TimeGrid) or grid == EXPLICIT:
        times = grid.times if isinstance(grid, TimeGrid) else options.get("times")
        try:
            first = float(times[0])  # type: ignore[index]
        except (TypeError, ValueError, IndexError):
            return  # the grid itself raises for wrong times
        if first != head_start:
            raise Contradiction(
                f"head_start is {head_start:g}, but the first of the times is {first:g}"
            )
    else:
        for other in ("t_start", "strength"):
            if other in options:
                raise Contradiction(
                    f"head_start and {other} are both the first time of the grid; give one of them"
                )


def _check_start(
    schedule: NoiseSchedule, grid: str | TimeGrid | None, options: Mapping[str, Any]
) -> None:
    """Raises for a first time, or a share of the grid, that is not plausible."""
    if "strength" in options:
        check_strength(options["strength"])
        if "t_start" in options:
            raise Contradiction(
                "strength and t_start are both the first time of the grid; give one of them"
            )
        if grid == EXPLICIT:
            raise Contradiction(
                "the given times already have a first time, got strength as well; leave one of "
                "them out"
            )
    if "t_start" in options:
        check_start(schedule, options["t_start"])


def _own_steps(grid: str | TimeGrid | None, options: Mapping[str, Any]) -> int | None:
    """Returns the number of steps that a grid has by itself."""
    if isinstance(grid, TimeGrid):
        return grid.steps
    if grid != EXPLICIT:
        return None
    times = options.get("times")
    if times is None:
        raise ValueError("the grid 'explicit' needs times, for example times=[1.0, 0.5, 0.01]")
    try:
        return max(1, len(times) - (0 if options.get("to_zero") else 1))
    except TypeError:
        return 1  # the grid itself raises for wrong times


def _grid(
    method: Solver,
    schedule: NoiseSchedule,
    *,
    nfe: int | None,
    steps: int | None,
    grid: str | TimeGrid | None,
    options: Mapping[str, Any],
) -> TimeGrid:
    if isinstance(grid, TimeGrid):
        if grid.schedule != schedule:
            raise ValueError(
                f"the grid was made for schedule {grid.schedule.name!r}, the plan is for {schedule.name!r}"
            )
        time_grid = grid
    else:
        count = steps
        if nfe is not None:
            own = method.default_grid[1] if grid is None else _defaults(grid)
            count = method.steps_for(nfe, ends_at_zero=_to_zero(schedule, {**own, **options}))
        if grid == EXPLICIT:
            count = None
        time_grid = method.make_grid(schedule, count, grid, **options)  # type: ignore[arg-type]
    cost = method.nfe(time_grid.steps, ends_at_zero=time_grid.ends_at_zero)
    if nfe is not None and cost != nfe:
        raise ValueError(
            f"{method.name} makes {cost} evaluations on this grid of {time_grid.steps} steps, not {nfe}"
        )
    if steps is not None and time_grid.steps != steps:
        raise ValueError(f"the grid has {time_grid.steps} steps, not {steps}")
    return time_grid


def _defaults(grid: str) -> Mapping[str, Any]:
    """Returns whether a grid ends at zero by itself, as an option."""
    end = inspect.signature(GRIDS[grid]).parameters.get("to_zero")
    return {} if end is None else {"to_zero": end.default}


def _to_zero(schedule: NoiseSchedule, options: Mapping[str, Any]) -> bool:
    end = options.get("t_end")
    return bool(options.get("to_zero", False)) or (end is not None and schedule.is_zero(end))


def _steps_of(method: Solver, plan: Plan, knots: TimeGrid) -> int:
    """Returns the number of steps for a budget: some methods meet one with two numbers of steps."""
    return method.steps_for(plan.nfe, ends_at_zero=knots.ends_at_zero)


def _solver_options(method: Solver, options: Mapping[str, Any]) -> dict[str, Any]:
    names = solver_options(method.name) if method.name in SOLVERS else frozenset()
    return {k: v for k, v in options.items() if k in names}


def _times(knots: TimeGrid) -> list[float]:
    return knots.times.tolist()


class _Memory:
    """A cache of plans; the least recently used is dropped first."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, tuple[NoiseSchedule, Planned]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Planned | None:
        with self._lock:
            entry = self._plans.get(key)
            if entry is None:
                return None
            self._plans.move_to_end(key)
            return entry[1]

    def put(self, key: Any, schedule: NoiseSchedule, value: Planned) -> Planned:
        # The schedule is referenced, so that its id in the key is not reused.
        with self._lock:
            self._plans[key] = schedule, value
            while len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return value


_MEMORY = _Memory()


def _key(
    schedule: NoiseSchedule, request: SamplerRequest, integer_times: bool, default_nfe: int | None
) -> Any:
    key = (
        id(schedule),
        _frozen(request.solver),
        request.nfe,
        request.steps,
        _frozen(request.grid),
        _frozen(request.head_start),
        tuple(sorted((name, _frozen(value)) for name, value in request.options.items())),
        integer_times,
        default_nfe,
    )
    hash(key)
    return key


def _frozen(value: Any) -> Any:
    """Returns the key of a value: equal only for values of one type.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(value, (list, tuple, range)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError("a plan with gradients is not cached")
        return "tensor", str(value.dtype), _frozen(value.tolist())
    if isinstance(value, TimeGrid):
        if value.times.requires_grad:
            raise TypeError("a plan with gradients is not cached")
        return value
    if isinstance(value, (bool, int, float, str, Solver)) or value is UNSET:
        return type(value).__qualname__, value
    raise TypeError(f"no key for {type(value).__name__}")

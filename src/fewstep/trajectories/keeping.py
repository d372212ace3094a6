r"""Which states are kept: from what a user asks for to a sampler whose states they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.registry import unknown
from fewstep.diffusion.grids import GRIDS, TimeGrid
from fewstep.diffusion.grids import grid as make_grid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Lin
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.planning import GRID_OPTIONS, choose
from fewstep.sampling.planning import plan as make_plan
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.solvers import Solver

Keep = int | str | Sequence[int] | Sequence[float]
"""What may be asked for; see :func:`fewstep.record`."""

DEFAULT_GRID = "quadratic"
ALL = "all"


@dataclass(frozen=True)
class Kept:
    """A sampler as a recipe, and which of its states are kept.

    Attributes:
        recipe: The sampler, with everything said.
        times: The times of the kept states, the first is that of the initial state.
        knots: Their numbers among the plan's knots; ``None`` if the sampler has no plan.
    """

    recipe: SamplerRecipe
    times: list[float]
    knots: list[int] | None


def kept(
    denoiser: Denoiser,
    keep: Keep,
    *,
    solver: str | Solver,
    nfe: int | None,
    plan: Plan | None,
    recipe: SamplerRecipe | str | Path | None,
    grid: str | TimeGrid | None,
    options: Mapping[str, Any],
    guidance: float | None,
) -> Kept:
    """Returns the sampler that the arguments of :func:`fewstep.record` describe, and what is kept.

    Raises:
        ValueError, TypeError: If something does not fit, or the sampler draws noise on its way.
    """
    schedule = denoiser.schedule
    integer = denoiser.integer_times
    if plan is not None or recipe is not None:
        if plan is not None and recipe is not None:
            raise ValueError("give a plan or a recipe, not both")
        extra = {"grid": grid, **options}
        if given := [name for name, value in extra.items() if value is not None]:
            raise ValueError(
                f"a plan or a recipe has its times and options already, got {', '.join(given)}"
            )
        if plan is None:
            read = recipe if isinstance(recipe, SamplerRecipe) else SamplerRecipe.load(recipe)  # type: ignore[arg-type]
            guidance = read.guidance if guidance is None else guidance
            guidance = None if guidance == 1 else guidance
            if read.kind == "adaptive":
                return _adaptive(denoiser, keep, read.options, guidance)
            plan = read.plan_for(schedule, integer_times=integer)
    elif solver == "dopri5":
        if grid is not None:
            raise ValueError("dopri5 chooses its times itself; leave the grid out")
        return _adaptive(denoiser, keep, options, guidance)
    else:
        plan = _plan(schedule, keep, solver, nfe, grid, options, integer)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    if plan.stochastic:
        raise ValueError(
            f"{plan.name or 'the plan'} draws noise on its way, so x_T does not determine the "
            "trajectory; take a deterministic sampler, such as tab3 or ddim"
        )
    if plan.head:
        raise ValueError(
            "the plan has an analytic head start: its first state is not that of the noise, from "
            "which an operator starts; take a plan without one"
        )
    knots = _knots(plan, _wanted(keep, plan.grid, integer))
    made = SamplerRecipe(kind="plan", name=plan.name, plan=plan, guidance=guidance)
    return Kept(made, [float(plan.knots[k]) for k in knots], knots)


def _adaptive(
    denoiser: Denoiser, keep: Keep, options: Mapping[str, Any], guidance: float | None
) -> Kept:
    try:
        made = AdaptiveSampler(denoiser, **options)
    except TypeError as error:
        raise TypeError(f"dopri5: {error}") from None
    ends = make_grid("log-rho", denoiser.schedule, 32, t_start=made.t_start, t_end=made.t_end)
    if isinstance(keep, (list, tuple)) and keep and all(isinstance(k, int) for k in keep):
        raise ValueError(
            f"dopri5 has no knots that could be numbered, got keep = {keep}; give times as "
            "decimal numbers, or a grid such as 'quadratic:4'"
        )
    recipe = SamplerRecipe(
        kind="adaptive", name="dopri5", options=dict(options), guidance=guidance
    )
    times = _wanted(keep, ends, False)
    return Kept(recipe, [float(t) for t in times], None)


def _plan(
    schedule: NoiseSchedule,
    keep: Keep,
    solver: str | Solver,
    nfe: int | None,
    grid: str | TimeGrid | None,
    options: Mapping[str, Any],
    integer: bool,
) -> Plan:
    """Returns the plan of a solver, its grid bent so that the kept times are among its knots."""
    # The times of other grids, made or read from files, are meant; they are not bent.
    spaced = grid is None or (isinstance(grid, str) and grid in GRIDS and grid != "explicit")
    if solver == "auto" and spaced:
        choice = choose(schedule, nfe if nfe is not None else 0)
        solver, options = choice.solver, {**choice.options_on(grid), **options}
        grid = choice.grid if grid is None else grid
    calls = None if isinstance(grid, TimeGrid) or grid == "explicit" else nfe
    first = make_plan(solver, schedule, nfe=calls, grid=grid, integer_times=integer, **options)
    times = _wanted(keep, first.grid, integer)
    known = set(first.knots.tolist())
    if not spaced or all(isinstance(t, int) for t in times) or set(times) <= known:
        return first
    bent = _bent(first.grid, [float(t) for t in times], integer)
    own = {name: value for name, value in options.items() if name not in GRID_OPTIONS}
    return make_plan(solver, schedule, grid=TimeGrid(schedule, bent, first.ends_at_zero), **own)


def _wanted(keep: Keep, grid: TimeGrid, integer: bool) -> list[int] | list[float]:
    """Returns the kept knots by number (integers) or the kept times (floats), both ends among them."""
    schedule, knots = grid.schedule, grid.times.tolist()
    if isinstance(keep, bool) or keep is None:
        raise TypeError(f"keep must be a number of states, a grid, knots or times, got {keep!r}")
    if isinstance(keep, (list, tuple)):
        if keep and all(isinstance(k, int) and not isinstance(k, bool) for k in keep):
            return _numbers([int(k) for k in keep], len(knots))
        if not keep or not all(
            isinstance(k, (int, float)) and not isinstance(k, bool) for k in keep
        ):
            raise TypeError(f"keep must be knots (integers) or times (decimals), got {keep!r:.80}")
        times = [float(t) for t in keep]
    else:
        name, frames = _grid_of(keep, schedule)
        if name == ALL:
            return list(range(len(knots)))
        # No grid reaches sigma = 0 evenly; the last of its times is then moved there.
        end = None if grid.ends_at_zero else knots[-1]
        times = make_grid(name, schedule, frames, t_start=knots[0], t_end=end).times.tolist()
        times[-1] = knots[-1]
    if integer:
        times = [float(round(t)) for t in times]
    start, end = knots[0], knots[-1]
    inner = [t for t in times if not _same(t, start, knots) and not _same(t, end, knots)]
    found = [start, *inner, end]
    if any(b >= a for a, b in itertools.pairwise(found)):
        raise ValueError(
            f"the kept times must decrease and lie between {start:g} and {end:g}, got {times}"
        )
    return found


def _grid_of(keep: int | str | Any, schedule: NoiseSchedule) -> tuple[str, int | None]:
    if isinstance(keep, int):
        # The time of edm is sigma itself; evenly in its root, all would be near pure noise.
        keep = f"{'karras' if schedule.name == 'edm' else DEFAULT_GRID}:{keep}"
    if not isinstance(keep, str):
        raise TypeError(
            f"keep must be a number of states, a grid, knots or times, got {keep!r:.60}"
        )
    if keep == ALL:
        return ALL, None
    name, _, number = keep.partition(":")
    if name == "quad":
        name = DEFAULT_GRID
    if name not in GRIDS or name == "explicit":
        raise ValueError(unknown("grid", name, [g for g in GRIDS if g != "explicit"]))
    if not number.isascii() or not number.isdigit() or not 0 < int(number) <= 100_000:
        raise ValueError(f"keep must be as 'quadratic:4', or 'all', got {keep!r:.60}")
    return name, int(number)


def _numbers(keep: list[int], knots: int) -> list[int]:
    found = sorted({k + knots if k < 0 else k for k in keep} | {0, knots - 1})
    if found[0] < 0 or found[-1] >= knots:
        raise ValueError(f"keep must be knots from 0 to {knots - 1}, got {keep}")
    return found


def _same(a: float, b: float, knots: Sequence[float]) -> bool:
    return abs(a - b) <= 1e-9 * abs(knots[0] - knots[-1])


def _knots(plan: Plan, wanted: list[int] | list[float]) -> list[int]:
    """Returns the numbers of the knots, having checked that the plan has states there."""
    knots = plan.knots.tolist()
    rows = plan.structure.rows
    there = {0, *(r.state for r in rows if isinstance(r, Lin) and r.state is not None)}
    found = []
    for item in wanted:
        if isinstance(item, int):
            k = item
        else:
            k = min(sorted(there), key=lambda j: abs(knots[j] - item))
            if not _same(knots[k], item, knots):
                raise ValueError(
                    f"the time {item:g} is not a knot of the plan, the nearest is {knots[k]:g} "
                    f"(knot {k} of {len(knots) - 1}); give knots by number, or a solver instead of "
                    "a plan, whose grid is then made to fit"
                )
        if k not in there:
            raise ValueError(f"the plan has no state at knot {k}; it has {sorted(there)!r:.200}")
        found.append(k)
    return found


def _bent(grid: TimeGrid, times: Sequence[float], integer: bool) -> Tensor:
    r"""Returns a grid of as many steps in which all kept times are knots.

    Each kept time has a place between two knots, a fraction in :math:`\lambda`. It gets the nearest
    knot, and the knots between two kept times are moved along evenly.
    """
    schedule, steps = grid.schedule, grid.steps
    lam = schedule.lam(grid.times[:-1] if grid.ends_at_zero else grid.times)
    inner = torch.tensor(times[1:-1], dtype=torch.float64)
    wanted = schedule.lam(inner)
    above = torch.searchsorted(lam, wanted).clamp(1, len(lam) - 1)
    share = (wanted - lam[above - 1]) / (lam[above] - lam[above - 1])
    places = [0.0, *(above - 1 + share).tolist(), float(steps)]
    if steps < len(places) - 1:
        raise ValueError(
            f"{len(places) - 1} kept states after x_T need as many steps at least, the sampler has "
            f"{steps}; raise nfe or keep less"
        )
    numbers = [0]
    for left, place in enumerate(places[1:-1], start=1):
        last = steps - (len(places) - 1 - left)
        numbers.append(min(max(round(place), numbers[-1] + 1), last))
    numbers.append(steps)
    bent = torch.empty(steps + 1, dtype=torch.float64)
    index = torch.arange(len(lam), dtype=torch.float64)
    for (a, b), (p, q) in zip(
        itertools.pairwise(numbers), itertools.pairwise(places), strict=True
    ):
        at = p + (q - p) * torch.arange(b - a + 1, dtype=torch.float64) / (b - a)
        low = at.floor().clamp(0, len(lam) - 2).long()
        between = torch.lerp(lam[low], lam[low + 1], (at - index[low]).clamp(0, 1))
        bent[a : b + 1] = schedule.time(between)
    if integer:
        bent = bent.round()
    for k, t in zip(numbers, times, strict=True):
        bent[k] = t
    return bent

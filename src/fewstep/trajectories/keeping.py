r"""The states that are recorded: from the user's arguments to a sampler that reaches them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
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
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve, resolve_plan

Keep = int | str | Sequence[int] | Sequence[float]
"""The type of the argument ``keep`` of :func:`fewstep.record`."""

DEFAULT_GRID = "quadratic"
DEFAULT_NFE = 20
ALL = "all"


@dataclass(frozen=True)
class RecordedStates:
    """A sampler as a recipe, and the states of it to record.

    Attributes:
        recipe: The resolved sampler.
        times: The times of the recorded states, the first is that of the initial state.
        knots: Their indices among the plan's knots; ``None`` if the sampler has no plan.
    """

    recipe: SamplerRecipe
    times: list[float]
    knots: list[int] | None


def recorded_states(
    denoiser: Denoiser, keep: Keep, request: SamplerRequest, *, guidance: float | None
) -> RecordedStates:
    """Returns the sampler that the arguments of :func:`fewstep.record` describe, and the states to record.

    Raises:
        ValueError, TypeError: If an argument does not fit, or the sampler is stochastic.
    """
    resolved = resolve(denoiser, request, guidance=guidance, default_nfe=DEFAULT_NFE)
    sampler = resolved.sampler
    if isinstance(sampler, AdaptiveSampler):
        return _adaptive(keep, sampler, resolved.recipe)
    if not isinstance(sampler, PlanSampler):
        raise ValueError(
            "this model has a built-in sampler of one evaluation, which has no trajectory; record "
            "the model that it was distilled from"
        )
    if sampler.residual is not None:
        raise ValueError(
            "a spatial residual is not part of a plan, and a store holds plans; record the plan alone, "
            "or a recipe without residual"
        )
    integer = denoiser.integer_times
    plan = sampler.plan
    if _is_spaced(request):
        plan = _through(plan, denoiser, keep, request)
    if plan.stochastic:
        raise ValueError(
            f"{plan.name or 'the plan'} is stochastic, so x_T does not determine the "
            "trajectory; use a deterministic sampler, such as tab3 or ddim"
        )
    if plan.head:
        raise ValueError(
            "the plan has an analytic head start: its first state is not that of the noise, from "
            "which an operator starts; use a plan without one"
        )
    knots = _knots(plan, _wanted(keep, plan.grid, integer))
    recipe = SamplerRecipe(
        kind="plan", name=plan.name, plan=plan, guidance=resolved.recipe.guidance
    )
    return RecordedStates(recipe, [float(plan.knots[k]) for k in knots], knots)


def _adaptive(keep: Keep, sampler: AdaptiveSampler, recipe: SamplerRecipe) -> RecordedStates:
    if isinstance(keep, (list, tuple)) and keep and all(isinstance(k, int) for k in keep):
        raise ValueError(
            f"dopri5 has no knots to number, got keep = {keep}; give times as "
            "decimal numbers, or a grid such as 'quadratic:4'"
        )
    schedule = sampler.denoiser.schedule
    ends = make_grid("log-rho", schedule, 32, t_start=sampler.t_start, t_end=sampler.t_end)
    return RecordedStates(recipe, [float(t) for t in _wanted(keep, ends, False)], None)


def _is_spaced(request: SamplerRequest) -> bool:
    """Whether the grid has a name: explicit times are not adjusted."""
    if any(source is not None for source in (request.plan, request.recipe, request.profile)):
        return False
    if "times" in request.options:
        return False
    grid = request.grid
    return grid is None or (isinstance(grid, str) and grid in GRIDS and grid != "explicit")


def _through(plan: Plan, denoiser: Denoiser, keep: Keep, request: SamplerRequest) -> Plan:
    """Returns the plan if the recorded times are among its knots, else the solver's on an adjusted grid.

    The weights of a measured plan hold at its own times alone, so a profile's plan is not adjusted: ``auto``
    then takes the default of the model's schedule.
    """
    integer = denoiser.integer_times
    if plan.head or _reaches(plan.grid, _wanted(keep, plan.grid, integer)):
        return plan
    schedule = denoiser.schedule
    first = resolve_plan(schedule, request, integer_times=integer, default_nfe=DEFAULT_NFE)
    times = _wanted(keep, first.grid, integer)
    if first.plan.head or _reaches(first.grid, times):
        return first.plan
    bent = _bent(first.grid, [float(t) for t in times], integer)
    grid = TimeGrid(schedule, bent, first.grid.ends_at_zero)
    return resolve_plan(schedule, SamplerRequest(first.solver, grid=grid)).plan


def _reaches(grid: TimeGrid, wanted: list[int] | list[float]) -> bool:
    """Whether all states are knots of the grid: knots by number, or the same times."""
    return all(isinstance(t, int) for t in wanted) or set(wanted) <= set(grid.times.tolist())


def _wanted(keep: Keep, grid: TimeGrid, integer: bool) -> list[int] | list[float]:
    """Returns the recorded knots by number (integers) or times (floats), including both ends."""
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
        # No evenly spaced grid reaches sigma = 0; its last time is then moved there.
        end = None if grid.ends_at_zero else knots[-1]
        times = make_grid(name, schedule, frames, t_start=knots[0], t_end=end).times.tolist()
        times[-1] = knots[-1]
    if integer:
        times = [float(round(t)) for t in times]
    start, end = knots[0], knots[-1]
    inner = [t for t in times if not _same(t, start, knots) and not _same(t, end, knots)]
    ordered = [start, *inner, end]
    if any(b >= a for a, b in itertools.pairwise(ordered)):
        raise ValueError(
            f"the times in keep must decrease and lie between {start:g} and {end:g}, got {times}"
        )
    return ordered


def _grid_of(keep: int | str | Any, schedule: NoiseSchedule) -> tuple[str, int | None]:
    if isinstance(keep, int):
        # The time of edm is sigma itself; evenly spaced in its root, all would be near pure noise.
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
    numbers = sorted({k + knots if k < 0 else k for k in keep} | {0, knots - 1})
    if numbers[0] < 0 or numbers[-1] >= knots:
        raise ValueError(f"keep must be knots from 0 to {knots - 1}, got {keep}")
    return numbers


def _same(a: float, b: float, knots: Sequence[float]) -> bool:
    return abs(a - b) <= 1e-9 * abs(knots[0] - knots[-1])


def _knots(plan: Plan, wanted: list[int] | list[float]) -> list[int]:
    """Returns the indices of the knots, after a check that the plan has states there."""
    knots = plan.knots.tolist()
    rows = plan.structure.rows
    there = {0, *(r.state for r in rows if isinstance(r, Lin) and r.state is not None)}
    indices = []
    for item in wanted:
        if isinstance(item, int):
            k = item
        else:
            k = min(sorted(there), key=lambda j: abs(knots[j] - item))
            if not _same(knots[k], item, knots):
                raise ValueError(
                    f"the time {item:g} is not a knot of the plan, the nearest is {knots[k]:g} "
                    f"(knot {k} of {len(knots) - 1}); give knots by number, or a solver instead of "
                    "a plan, whose grid is then adjusted"
                )
        if k not in there:
            raise ValueError(f"the plan has no state at knot {k}; it has {sorted(there)!r:.200}")
        indices.append(k)
    return indices


def _bent(grid: TimeGrid, times: Sequence[float], integer: bool) -> Tensor:
    r"""Returns a grid of the same number of steps in which all recorded times are knots.

    Each recorded time lies between two knots, at a fraction in :math:`\lambda`. The nearest knot is moved
    to it, and the knots between two recorded times are moved in proportion.
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
            f"{len(places) - 1} states after x_T need at least as many steps, the sampler has "
            f"{steps}; raise nfe or keep fewer"
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

r"""The training-free sampler from which a family starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.grids import grid as make_grid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.learned.families import FAMILIES, Family
from fewstep.learned.learned_plan import Base
from fewstep.sampling.auto import AUTO
from fewstep.sampling.profile import Profile
from fewstep.sampling.request import SamplerRequest
from fewstep.solvers import Solver
from fewstep.solvers import solver as make_solver


def start_of(
    name: str,
    schedule: NoiseSchedule,
    nfe: int,
    *,
    solver: str | Solver | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    integer_times: bool = False,
    options: Mapping[str, Any] | None = None,
    profile: Profile | None = None,
    family_options: Mapping[str, Any] | None = None,
) -> Base:
    r"""Returns the sampler from which a family starts: as requested, or as its class declares.

    A family declares a :class:`~fewstep.learned.learned_plan.Start`: the choice of ``auto``, or a
    solver on the power grid whose last step goes on to :math:`\sigma = 0`. The solver ``"auto"``
    is the choice of ``auto`` whatever the family declares. With a profile that choice is the
    recommended sampler of the profile (solver, times, weights, head start), or, where the family cannot
    start from it, the profile's next best that it accepts.

    Arguments:
        name: A family in :data:`fewstep.learned.FAMILIES`.
        schedule: The noise schedule.
        nfe: The number of network evaluations.
        solver: The solver, instead of the declared one.
        grid: The grid, instead of the declared one.
        head_start: The time of an analytic head start.
        integer_times: Whether the grid is rounded to training timesteps.
        options: Options of solver and grid.
        profile: The profile of the model, for the choice of ``auto``
            (:func:`fewstep.sampling.resolve.own_profile`).
        family_options: The options of the family: with some it accepts more solvers.

    Raises:
        ValueError: If a name is unknown or the budget cannot be met.
    """
    options = dict(options or {})
    family = FAMILIES[name]
    declared, origin = family.start.solver, "given"
    if solver is None:
        origin = "auto" if declared is None else "family"
    elif solver == AUTO:
        origin = "auto"
    if profile is not None and origin == "auto":
        accepted = _accepted(profile, family, nfe, family_options or {})
        if accepted is not None:
            request = profile.request(nfe=nfe, solver=accepted)
            return Base.of(schedule, request, integer_times=integer_times, origin="profile")
    if declared is not None and solver != AUTO:
        solver = declared if solver is None else solver
        if grid is None and not options and head_start is None:
            options = {"times": _power_to_zero(schedule, nfe, rounded=integer_times)}
    request = SamplerRequest(solver, nfe=nfe, grid=grid, head_start=head_start, options=options)
    return Base.of(schedule, request, integer_times=integer_times, origin=origin)


def _accepted(
    profile: Profile, family: Family, nfe: int, options: Mapping[str, Any]
) -> str | None:
    """Returns the profile's best solver for a budget from which a family can start, or ``None``."""
    own = [e for e in profile.entries if e.steps == nfe]
    own.sort(key=lambda e: math.inf if e.error is None else e.error)
    names = [profile.solver_for(nfe), *(e.solver for e in own)]
    for name in names:
        weights = profile.options_for(name, nfe)
        if family.accepts(make_solver(name, **weights), **options):
            return name
    return None


def _power_to_zero(schedule: NoiseSchedule, nfe: int, *, rounded: bool) -> list[float]:
    """Returns the times of the power grid with its last step going on to zero noise."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    power = make_grid("power", schedule, nfe, power=1.5 if schedule.discrete else 2.0)
    times = (power.rounded() if rounded else power).times.tolist()
    return [*times[:-1], schedule.t_zero]

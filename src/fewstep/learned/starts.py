r"""The training-free sampler from which a family starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.grids import grid as make_grid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.learned.families import FAMILIES
from fewstep.learned.learned_plan import Base
from fewstep.sampling.request import SamplerRequest
from fewstep.solvers import Solver


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
) -> Base:
    r"""Returns the sampler from which a family starts: as requested, or as its class declares.

    A family declares a :class:`~fewstep.learned.learned_plan.Start`: the choice of ``auto``, or a
    solver on the power grid whose last step goes on to :math:`\sigma = 0`. The solver ``"auto"``
    is the choice of ``auto`` whatever the family declares.

    Arguments:
        name: A family in :data:`fewstep.learned.FAMILIES`.
        schedule: The noise schedule.
        nfe: The number of network evaluations.
        solver: The solver, instead of the declared one.
        grid: The grid, instead of the declared one.
        head_start: The time of an analytic head start.
        integer_times: Whether the grid is rounded to training timesteps.
        options: Options of solver and grid.

    Raises:
        ValueError: If a name is unknown or the budget cannot be met.
    """
    options = dict(options or {})
    declared = FAMILIES[name].start.solver
    if declared is not None and solver != "auto":
        solver = declared if solver is None else solver
        if grid is None and not options and head_start is None:
            options = {"times": _power_to_zero(schedule, nfe, rounded=integer_times)}
    request = SamplerRequest(solver, nfe=nfe, grid=grid, head_start=head_start, options=options)
    return Base.of(schedule, request, integer_times=integer_times)


def _power_to_zero(schedule: NoiseSchedule, nfe: int, *, rounded: bool) -> list[float]:
    """Returns the times of the power grid with its last step going on to zero noise."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    power = make_grid("power", schedule, nfe, power=1.5 if schedule.discrete else 2.0)
    times = (power.rounded() if rounded else power).times.tolist()
    return [*times[:-1], schedule.t_zero]

r"""From which training-free sampler a family starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.grids import grid as make_grid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.learned.families import STARTS
from fewstep.learned.learned_plan import Base
from fewstep.sampling.planning import choose
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
    r"""Returns the sampler from which a family starts: what is given, and else what suits it.

    The families over a solver start from what ``auto`` chooses; those over GGDM from ``ddim`` or
    ``ddpm`` on the same kind of grid, with a last step onto :math:`\sigma = 0`, as the paper has it,
    unless the solver is said to be ``"auto"``.
    """
    options = dict(options or {})
    own = next((s for prefix, s in STARTS.items() if name.startswith(prefix)), None)
    if solver == "auto":
        solver = own = None
    common: dict[str, Any] = {"nfe": nfe, "integer_times": integer_times}
    if own is None and solver is None and grid is None:
        choice = choose(schedule, nfe)
        options = {**choice.options, **options}
        start = choice.head_start if head_start is None else head_start
        return Base.of(
            choice.solver, schedule, grid=choice.grid, head_start=start, **common, **options
        )
    if own is not None and grid is None and not options and head_start is None:
        options = {"times": _onto_zero(schedule, nfe, rounded=integer_times)}
        grid = "explicit"
    return Base.of(
        solver or own or choose(schedule, nfe).solver,
        schedule,
        grid=grid,
        head_start=head_start,
        **common,
        **options,
    )


def _onto_zero(schedule: NoiseSchedule, nfe: int, *, rounded: bool) -> list[float]:
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    made = make_grid("power", schedule, nfe, power=1.5 if schedule.discrete else 2.0)
    times = (made.rounded() if rounded else made).times.tolist()
    return [*times[:-1], schedule.t_zero]

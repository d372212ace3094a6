r"""Which stretch of :math:`\lambda` each draw of a plan stands for."""

from __future__ import annotations

from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise


def draw_intervals(plan: Plan) -> list[tuple[float, float] | None]:
    r"""Returns the interval of :math:`\lambda` that each draw of a plan is the noise of, in order and disjoint.

    A draw begins where the one before it ends, but not before the step that it is in, and ends at the next
    network evaluation, or at the plan's end. A draw of which no interval is left (a second one at one place, noise
    that is added back as in EDM's churn) has none.
    """
    knots = plan.grid.lam.detach().tolist()
    times = plan.schedule.lam(plan.times.detach()).tolist()
    last = knots[-2] if plan.ends_at_zero else knots[-1]
    ends: list[tuple[float, float]] = []
    waiting, begin = 0, knots[0]
    for row in plan.structure.rows:
        if isinstance(row, Noise):
            waiting += 1
        elif isinstance(row, Eval):
            ends += [(begin, times[row.at])] * waiting
            waiting = 0
        elif isinstance(row, Lin) and row.state is not None and not waiting:
            begin = knots[row.state]
        if isinstance(row, Lin) and row.state is not None and waiting:
            ends += [(begin, min(knots[row.state], last))] * waiting
            waiting, begin = 0, knots[row.state]
    ends += [(begin, last)] * waiting
    intervals: list[tuple[float, float] | None] = []
    reached = knots[0]
    for start, end in ends:
        start = max(start, reached)
        intervals.append((start, end) if end > start else None)
        reached = max(reached, end)
    return intervals

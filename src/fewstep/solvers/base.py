r"""What a solver is: equations on a tape, and what it declares about itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from fewstep.diffusion.grids import (
    MOST_STEPS,
    TimeGrid,
    grid,
    late_start,
    over_default,
    useful_start,
)
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.checks import point_mass_defect
from fewstep.plans.plan import Plan
from fewstep.plans.tape import Form, Tape

NEARLY_UNIFORM: tuple[str, Mapping[str, Any]] = ("power", {"power": 1.15})
"""The default grid of multistep solvers whose order falls at the end.

Even steps in time are what networks with errors of their own near pure noise need at 5 evaluations; a
little denser towards the data is better at 10 and 20. See docs/choosing.md.
"""

LOGISTIC: tuple[str, Mapping[str, Any]] = ("logistic", {"center": -1.5, "scale": 2.2})
"""The default grid of multistep solvers without a corrector: like that, but even in no schedule's time."""

NO_PLAN = (
    "{} chooses its steps while it runs, so it has no plan beforehand; sample "
    "with it, or freeze one of its runs with fewstep.sampling.adaptive.freeze"
)
"""The error message for a plan of an adaptive solver; takes its name."""


class Solver(ABC):
    r"""A training-free sampler: a frozen dataclass whose fields are its options.

    A subclass writes :meth:`equations`; plans, checks and the search for a number of steps that
    meets a budget come from here.

    Attributes:
        name: The name in :data:`fewstep.solvers.SOLVERS`.
        prediction: The prediction in which the equations are written.
        stochastic: Whether it draws noise after the initial state.
        exact: Whether the plan is exact on a point mass, i.e. whether it integrates a constant
            :math:`\varepsilon` exactly; checked whenever a plan is made.
        adaptive: Whether it chooses its steps while it runs. Then it has no plan, no number of
            evaluations beforehand and no grid: :meth:`plan` and :meth:`nfe` raise.
        default_grid: The grid used when none is given: its name and options. On a schedule for which
            it does not suit, another; see :meth:`default_grid_on`.
        grid_on_flows: The default grid on schedules with a flow coordinate, if it is another than the
            schedule would take.
        starts_late: Whether its default grid of K steps starts at the time :math:`T (1 - 1 / K)`; see
            :func:`~fewstep.diffusion.grids.late_start`.
        twin: The scheduler of diffusers that has the same table, if there is one; what follows
            describe how that scheduler, or the family that it belongs to, behaves there.
        spacing: Its ``timestep_spacing``.
        spaces_points: Whether it spaces N points; else N steps, of which the last point is left out.
        ends_above_zero: Whether it ends at the lowest training timestep and not at :math:`\sigma = 0`.
        lowers_final: Whether it obeys ``lower_order_final``: the option is ``lower_final`` here.
        always_lowers_final: Whether at any number of steps; else below 15.
        first_order_start: Whether its first step is of first order (DDIM's) and never corrected.
        measured: The option that :func:`fewstep.fit` measures for every number of steps, or ``None``.
        starts_flows_at_noise: Whether it starts at pure noise with ``use_flow_sigmas``; else at the
            noisiest training timestep.

    Example:
        >>> from fewstep.solvers import solver
        >>> kutta = solver("rho-kutta3")
        >>> kutta.order, kutta.nfe(3), kutta.steps_for(9)
        (3, 9, 3)
    """

    name: str
    prediction: ClassVar[Prediction] = Prediction.EPS
    stochastic: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    default_grid: ClassVar[tuple[str, Mapping[str, Any]]] = ("uniform", {})
    grid_on_flows: ClassVar[str | None] = None
    starts_late: ClassVar[bool] = False
    twin: ClassVar[str | None] = None
    spacing: ClassVar[str] = "linspace"
    spaces_points: ClassVar[bool] = False
    ends_above_zero: ClassVar[bool] = False
    lowers_final: ClassVar[bool] = False
    always_lowers_final: ClassVar[bool] = False
    first_order_start: ClassVar[bool] = False
    measured: ClassVar[str | None] = None
    starts_flows_at_noise: ClassVar[bool] = False

    def prediction_on(self, schedule: NoiseSchedule) -> Prediction:
        """Returns the prediction that the equations are written for on a schedule."""
        del schedule
        return self.prediction

    @final
    def default_grid_on(
        self, schedule: NoiseSchedule, steps: int = 1
    ) -> tuple[str, Mapping[str, Any]]:
        """Returns the default grid of this number of steps on a schedule: its name and options."""
        name, options = self.default_grid
        other = schedule.suits.get(name)
        if schedule.flow_coordinate and self.grid_on_flows is not None:
            other = self.grid_on_flows, {}
        if other is not None:
            ends = {key: value for key, value in options.items() if key == "to_zero"}
            name, options = other[0], {**other[1], **ends}
        starts = [
            useful_start(schedule),
            late_start(schedule, steps) if self.starts_late else None,
        ]
        given = [start for start in starts if start is not None]
        return name, {**options, "t_start": min(given)} if given else options

    @property
    @abstractmethod
    def order(self) -> int:
        """The order of convergence on smooth problems (of the marginals, if stochastic).

        Of multistep methods it is that of the steps inside, which is observed while the error of the first step is
        the smaller one; see :attr:`asymptotic_order`.
        """

    @property
    @final
    def asymptotic_order(self) -> int:
        """The order of convergence as the number of steps goes to infinity.

        A first step of first order has a local error of second order in its length: so it is at most 2 then, on grids
        whose first step is not shorter and shorter than the others.
        """
        return min(self.order, 2) if self.first_order_start else self.order

    @property
    @final
    def order_text(self) -> str:
        """The order for tables: ``4 (2)`` if it is 2 as steps go to infinity."""
        limit = self.asymptotic_order
        return str(self.order) if limit == self.order else f"{self.order} ({limit})"

    @abstractmethod
    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        """Writes the method on the tape and returns the final state."""

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        """Returns the number of network evaluations (NFE) for this number of steps."""
        del ends_at_zero
        return steps

    @final
    def make_grid(
        self, schedule: NoiseSchedule, steps: int, name: str | None, **options: Any
    ) -> TimeGrid:
        """Returns the grid of that name, or the solver's own; ``options`` override its options."""
        if name is None:
            name, own = self.default_grid_on(schedule, steps)
            options = over_default(own, options)
        return grid(name, schedule, steps, **options)

    @final
    def steps_for(self, nfe: int, *, ends_at_zero: bool = False) -> int:
        """Returns the number of steps that costs exactly ``nfe`` network evaluations.

        Raises:
            ValueError: If no number of steps does; the message has the nearest budgets that work.
        """
        if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
            raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
        if nfe > MOST_STEPS:
            raise ValueError(f"nfe must be at most {MOST_STEPS}, got {nfe}")
        costs = {k: self.nfe(k, ends_at_zero=ends_at_zero) for k in range(1, nfe + 2)}
        for steps, cost in costs.items():
            if cost == nfe:
                return steps
        below = max((c for c in costs.values() if c < nfe), default=None)
        above = min(c for c in costs.values() if c > nfe)
        near = " or ".join(str(c) for c in (below, above) if c is not None)
        raise ValueError(
            f"{self.name} cannot use exactly {nfe} network evaluations; the nearest budgets are {near}"
        )

    @final
    def plan(self, grid: TimeGrid) -> Plan:
        """Returns the plan on a grid, audited.

        Raises:
            ValueError: If the method is not defined on this grid.
        """
        tape = Tape(grid, self.prediction_on(grid.schedule))
        plan = tape.finish(self.equations(tape, grid.numeric()), self.name)
        expected = self.nfe(grid.steps, ends_at_zero=grid.ends_at_zero)
        if plan.nfe != expected:
            raise AssertionError(
                f"{self.name} declares {expected} evaluations and makes {plan.nfe}"
            )
        if self.exact:
            _audit(plan, grid)
        return plan


@dataclass(frozen=True)
class EtaSolver(Solver):
    """Common part of solvers with a share of noise ``eta``: without it they are deterministic."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0


def staged_nfe(stages: int, steps: int, *, ends_at_zero: bool) -> int:
    """Returns the evaluations of so many stages a step; a last step onto zero noise has one."""
    return stages * (steps - 1) + 1 if ends_at_zero else stages * steps


def _audit(plan: Plan, grid: TimeGrid) -> None:
    """Checks that constant noise and data pass through unchanged, which any error of scale breaks."""
    defect = point_mass_defect(plan, grid.alpha[-1], grid.sigma[-1])
    # Coefficients cancel in the check itself, and the more the closer it starts to pure noise.
    size = float(plan.values.detach().abs().max()) + 1e-4 * float(grid.rho[0].detach())
    if not defect <= 1e-10 * max(1.0, size):
        raise AssertionError(
            f"{plan.name} claims to be exact on a point mass, the defect is {defect:.3g}"
        )


def transfer(x: Form, f: Form, grid: TimeGrid, i: int, j: int) -> Form:
    r"""Returns the DDIM map :math:`\frac{\alpha_j}{\alpha_i} x + (\sigma_j - \frac{\alpha_j}{\alpha_i} \sigma_i) \varepsilon`."""
    a, s = grid.alpha, grid.sigma
    return move(x, f, a[i], s[i], a[j], s[j])


def move(x: Form, f: Form, a: Tensor, s: Tensor, a_end: Tensor, s_end: Tensor) -> Form:
    r"""Returns the DDIM map between two pairs of scales :math:`(\alpha, \sigma)`."""
    ratio = a_end / a
    return ratio * x + (s_end - ratio * s) * f


def check_order(name: str, order: object, low: int, high: int) -> None:
    """Raises unless an order is an integer in a range."""
    if not isinstance(order, int) or isinstance(order, bool) or not low <= order <= high:
        raise ValueError(
            f"the order of {name} must be an integer from {low} to {high}, got {order!r}"
        )


def check_number(name: str, value: object, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raises unless an option is a finite number in a range."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= float(value) <= high:  # type: ignore[arg-type]
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be a number {bound}, got {value!r}")

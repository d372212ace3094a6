r"""Multistep methods: exponential Adams–Bashforth (DEIS) and the PNDM family.

For any scalar schedule the probability-flow ODE is :math:`dy/d\rho = \varepsilon` with
:math:`y = x / \alpha` and :math:`\rho = \sigma / \alpha`. The DEIS methods integrate a polynomial
through the last model outputs exactly; they differ in the variable of the polynomial.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.quadrature import ADAMS_BASHFORTH, gauss_legendre
from fewstep.diffusion.scalars import column
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import LOGISTIC, Solver, check_order, transfer


@dataclass(frozen=True)
class _ExponentialAdams(Solver):
    r"""Common part: :math:`x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_j \left( \int_{\rho_t}^{\rho_s} \ell_j \, d\rho \right) \varepsilon_j`."""

    degree: int = 3
    lower_final: bool = False

    default_grid: ClassVar[tuple[str, Mapping[str, Any]]] = ("power", {"power": 1.5})
    ends_above_zero: ClassVar[bool] = True
    first_order_start: ClassVar[bool] = True
    _prefix: ClassVar[str]
    _reaches_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_order(self._prefix, self.degree, 0, 3)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self._prefix}{self.degree}"

    @property
    def order(self) -> int:
        # A last step of degree 0 has a local error of order 2.
        return min(self.degree + 1, 2) if self.lower_final else self.degree + 1

    _nodes_each: ClassVar[int] = 32

    @abstractmethod
    def _variable(self, grid: TimeGrid, u: Tensor) -> Tensor:
        """Returns the variable of the polynomial at points u of the variable of integration."""

    def _points(self, grid: TimeGrid) -> tuple[Tensor, Tensor]:
        """Returns the variable of integration and that of the polynomial at the grid points."""
        # In u = log rho the integrand is smooth over many orders of magnitude of rho.
        return -grid.lam, self._variable(grid, -grid.lam)

    def _density(self, u: Tensor) -> Tensor:
        r"""Returns :math:`d\rho / du`."""
        return u.exp()

    def _kinks(self, grid: TimeGrid) -> Tensor | None:
        """Returns the points of the variable of integration where the integrand has a kink."""
        del grid
        return None

    def _weights(self, grid: TimeGrid) -> list[list[Tensor]]:
        r"""Returns the weights of each step's model outputs, newest first; all steps at once."""
        degrees = [self._degree_at(grid, i) for i in range(grid.steps)]
        weights: list[list[Tensor]] = [[]] * grid.steps
        curved = [i for i, degree in enumerate(degrees) if degree]
        if not curved:
            return weights
        first, last = curved[0], curved[-1] + 1  # these steps are consecutive
        u, v = self._points(grid)
        kinks = self._kinks(grid)
        edges, owners = _pieces(u[first : last + 1], kinks)
        owners = owners + first
        nodes, shares = gauss_legendre(self._nodes_each if kinks is None else 8)
        half = edges.diff()[:, None] / 2
        points = (edges[1:] + edges[:-1])[:, None] / 2 + half * nodes
        value = self._variable(grid, points.reshape(-1)).reshape(points.shape)
        measure = half * shares * self._density(points)
        for degree in sorted(set(degrees) - {0}):
            steps = [i for i in curved if degrees[i] == degree]
            inside = torch.tensor(degrees)[owners] == degree
            owner, at, share = owners[inside], value[inside], measure[inside]
            rows = []
            for j in range(degree + 1):
                row = share
                for k in range(degree + 1):
                    if k != j:
                        near, other = v[owner - j], v[owner - k]
                        row = row * ((at - other[:, None]) / (near - other)[:, None])
                rows.append(row.sum(1))
            table = torch.zeros(grid.steps, degree + 1, dtype=torch.float64)
            table = table.index_add(0, owner, torch.stack(rows, 1)) * grid.alpha[1:, None]
            for i in steps:
                row = column(table[i])
                weights[i] = [row[j] for j in range(degree + 1)]
        return weights

    def _degree_at(self, grid: TimeGrid, i: int) -> int:
        degree = min(self.degree, i)
        if grid.is_last_zero(i) and not self._reaches_zero:
            return 0
        if self.lower_final:
            degree = min(degree, grid.steps - 1 - i)
        return degree

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, history, weights = tape.x, list[Form](), self._weights(grid)
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[: self.degree]]
            if not weights[i]:
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            form = grid.alpha[i + 1] / grid.alpha[i] * x
            for c, e in zip(weights[i], history, strict=False):
                form = form + c * e
            x = tape.state(form, i + 1)
        return x


def _pieces(ends: Tensor, kinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the edges of the pieces of all steps, descending, and to which step each piece belongs."""
    if kinks is None:
        return ends, torch.arange(len(ends) - 1)
    inside = (kinks < ends[0].detach()) & (kinks > ends[-1].detach())
    edges = torch.cat([ends, kinks[inside]])
    order = torch.argsort(edges.detach(), descending=True, stable=True)
    starts = (order < len(ends)).cumsum(0)[:-1] - 1
    return edges[order], starts


class TAB(_ExponentialAdams):
    r"""tAB-DEIS: exponential Adams–Bashforth, polynomial in time.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \sum_{j=0}^{r} C_j \, \varepsilon_{t_j}, \qquad
        C_j = \alpha_s \int_{\rho_t}^{\rho_s} \ell_j(t(\rho)) \, d\rho

    The first steps use the lower degrees 0, 1, ... The integrals are Gauss–Legendre in
    :math:`\log\rho` to rounding; the original code has a left Riemann sum of 10,000 points in
    float32, off by up to 3e-3 in the first step at 5 steps; these are the exact ones. A last
    step onto :math:`\sigma = 0` is DDIM's.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), tAB-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: one network evaluation per step.

    Order: ``degree + 1`` for the steps inside, and at most 2 as steps go to infinity: the first step is DDIM's, with a local
    error of order 2 in its length, on any schedule (a grid whose first step shrinks faster than the others keeps
    the order). How soon that is seen depends on data and schedule:
    for Gaussian data of deviation 1.6 from 12 steps on with ``flow`` and ``vp-cosine``, and below errors of 1e-5 with
    linear :math:`\beta`; for a deviation of 0.3 below errors of 1e-5 with ``flow``, and 1e-8 with linear
    :math:`\beta`. A start of higher order would need more evaluations; the published method has none.

    Arguments:
        degree: The degree r of the polynomial, 0 (DDIM) to 3.
        lower_final: Whether the degree falls to 1 and 0 in the last two steps.
    """

    _prefix = "tab"

    def _variable(self, grid: TimeGrid, u: Tensor) -> Tensor:
        return grid.schedule.time(-u)

    def _points(self, grid: TimeGrid) -> tuple[Tensor, Tensor]:
        return -grid.lam, grid.times

    def _kinks(self, grid: TimeGrid) -> Tensor | None:
        """Returns log rho at the kinks of the schedule strictly inside of the steps."""
        times = grid.schedule.breakpoints()
        if times is None:
            return None
        ends = grid.times.detach().flip(0)
        ends = ends[1:] if grid.ends_at_zero else ends
        times = times[(times > ends[0] + 1e-9) & (times < ends[-1] - 1e-9)]
        above = torch.searchsorted(ends, times).clamp(1, len(ends) - 1)
        near = torch.minimum((ends[above] - times).abs(), (times - ends[above - 1]).abs())
        return -grid.schedule.lam(times[near > 1e-9])


class RhoAB(_ExponentialAdams):
    r"""rhoAB-DEIS: Adams–Bashforth of variable step in :math:`\rho = \sigma / \alpha`.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_{j=0}^{r} \varepsilon_{t_j}
        \int_{\rho_t}^{\rho_s} \ell_j(\rho) \, d\rho

    The integrand is a polynomial, which Gauss–Legendre integrates exactly; the original code
    has a Riemann sum here too (error 1e-5 to 2e-4).

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoAB-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: one network evaluation per step.

    Order: ``degree + 1``, and at most 2 as steps go to infinity, see :class:`TAB`.

    Arguments:
        degree: The degree r of the polynomial, 0 (DDIM) to 3.
        lower_final: Whether the degree falls to 1 and 0 in the last two steps.
    """

    _prefix = "rhoab"
    _reaches_zero = True

    _nodes_each = 2  # a polynomial of degree 3 at most: exact

    def _variable(self, grid: TimeGrid, u: Tensor) -> Tensor:
        return u

    def _points(self, grid: TimeGrid) -> tuple[Tensor, Tensor]:
        return grid.rho, grid.rho

    def _density(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)


@dataclass(frozen=True)
class LogRhoAB(_ExponentialAdams):
    r"""log-rho AB: exponential Adams–Bashforth, polynomial in :math:`\log\rho = -\lambda`.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_{j=0}^{r} \varepsilon_{t_j}
        \int_{\rho_t}^{\rho_s} \ell_j(\log\rho) \, d\rho

    This is what ``diffusers.DEISMultistepScheduler`` computes: its ``solver_order`` 1, 2, 3 are
    degrees 0, 1, 2, and below 15 steps it lowers the order in the last two (``lower_final=True``).
    Its tables agree with these to float32 (it forms them in float32). A last step onto
    :math:`\sigma = 0` is DDIM's.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023)
        | https://arxiv.org/abs/2204.13902

    Cost: one network evaluation per step.

    Order: ``degree + 1``, and at most 2 as steps go to infinity, see :class:`TAB`. With steps that
    grow towards the data (uniform in time) degrees 2 and 3 are unstable at few steps: so the
    degree falls in the last two steps by default; on the log-rho grid ``lower_final=False`` is stable too.

    Arguments:
        degree: The degree r of the polynomial, 0 (DDIM) to 3.
        lower_final: Whether the degree falls to 1 and 0 in the last two steps.
    """

    lower_final: bool = True

    _prefix = "logrhoab"
    lowers_final: ClassVar[bool] = True
    default_grid = LOGISTIC
    grid_on_flows = "uniform"

    def _variable(self, grid: TimeGrid, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class IPNDM(Solver):
    r"""iPNDM: the DDIM step with Adams–Bashforth weights of an even grid.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \left( \sigma_s - \frac{\alpha_s}{\alpha_t} \sigma_t \right)
        \sum_j b_j \, \varepsilon_{t_j}, \qquad b = (1), \ \tfrac12 (3, -1), \ \tfrac1{12} (23, -16, 5),
        \ \tfrac1{24} (55, -59, 37, -9)

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), iPNDM
        | https://arxiv.org/abs/2204.13902
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022)
        | https://arxiv.org/abs/2202.09778

    Cost: one network evaluation per step.

    Order: 2, for any number of model outputs: constant weights ignore how :math:`\rho` curves along
    the grid. At few steps the third and fourth output still reduce the error by a constant factor.

    Arguments:
        answers: The number of model outputs combined, 1 (DDIM) to 4.
    """

    answers: int = 4

    name = "ipndm"
    default_grid = ("logistic", {"scale": 3.0})
    ends_above_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_order("ipndm (answers)", self.answers, 1, 4)

    @property
    def order(self) -> int:
        return min(2, self.answers)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, history = tape.x, list[Form]()
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[: self.answers - 1]]
            x = tape.state(transfer(x, adams_bashforth(history), grid, i, i + 1), i + 1)
        return x


@dataclass(frozen=True)
class GradientEstimation(Solver):
    r"""Gradient estimation: the DDIM step with the last two model outputs, weighted beyond the newest.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \left( \sigma_s - \frac{\alpha_s}{\alpha_t} \sigma_t \right)
        \left( \gamma \, \varepsilon_{t_0} + (1 - \gamma) \, \varepsilon_{t_1} \right)

    The first step, and a last one that ends at :math:`\sigma = 0`, are those of DDIM. With :math:`\gamma = 3/2` it is
    :class:`IPNDM` of two outputs.

    References:
        | Interpreting and Improving Diffusion Models from an Optimization Perspective (Permenter & Yuan, 2024), algorithm 2
        | https://arxiv.org/abs/2306.04848

    Cost: one network evaluation per step.

    Order: 1, for any :math:`\gamma`, as the weights ignore the lengths of steps.

    Arguments:
        gamma: The weight :math:`\gamma` of the newest output; 1 is DDIM.
    """

    gamma: float = 2.0

    name = "gradient-estimation"
    default_grid = ("logistic", {"scale": 3.0})
    ends_above_zero: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 1

    def __post_init__(self) -> None:
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, got {self.gamma}")

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, before = tape.x, None
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            direction = f
            if before is not None and not (grid.ends_at_zero and i + 1 == grid.steps):
                direction = self.gamma * f + (1 - self.gamma) * before
            x = tape.state(transfer(x, direction, grid, i, i + 1), i + 1)
            before = f
        return x


def adams_bashforth(history: list[Form]) -> Form:
    """Returns the even-grid Adams–Bashforth combination of model outputs, newest first."""
    combined = Form({})
    for b, e in zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True):
        combined = combined + b * e
    return combined


@dataclass(frozen=True)
class PNDM(Solver):
    r"""PNDM: iPNDM with a pseudo Runge–Kutta start.

    With the DDIM map :math:`\phi(x, \varepsilon; t \to s)` and :math:`m = (t + s) / 2`, each of the
    first three steps is :math:`\phi(x, \tfrac16 (e_1 + 2 e_2 + 2 e_3 + e_4))`,

    .. math:: e_1 = \varepsilon(x, t), \quad e_2 = \varepsilon(\phi(x, e_1; t \to m), m), \quad
        e_3 = \varepsilon(\phi(x, e_2; t \to m), m), \quad e_4 = \varepsilon(\phi(x, e_3; t \to s), s)

    and the others are those of :class:`IPNDM`. A step onto :math:`\sigma = 0` among the first
    three is iPNDM's, as the network is not evaluated there.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022)
        | https://arxiv.org/abs/2202.09778

    Cost: K + 9 network evaluations for K >= 3 steps, 4 K below.

    Order: 2, see :class:`IPNDM`.
    """

    name = "pndm"
    spacing: ClassVar[str] = "leading"
    spaces_points: ClassVar[bool] = True
    ends_above_zero: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 2

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        pseudo = min(3, steps - 1 if ends_at_zero else steps)
        return steps + 3 * pseudo

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        t, schedule = grid.times, grid.schedule
        if schedule.flow_coordinate:
            raise ValueError(
                f"pndm begins with steps of several stages, which near pure noise amplify errors by the "
                f"ratios of sigma / alpha ({float(grid.rho[0] / grid.rho[1]):.3g} in the first step); on "
                f"{schedule.name!r} use ipndm, which has none, or heun"
            )
        x, history = tape.x, list[Form]()
        for i in range(grid.steps):
            _, e1 = tape.evaluate(x, t[i])
            history = [e1, *history[:3]]
            if i >= 3 or grid.is_last_zero(i):
                x = tape.state(transfer(x, adams_bashforth(history), grid, i, i + 1), i + 1)
                continue
            middle = (t[i] + t[i + 1]) / 2
            ratio = schedule.alpha(middle) / grid.alpha[i]
            weight = schedule.sigma(middle) - ratio * grid.sigma[i]
            _, e2 = tape.evaluate(ratio * x + weight * e1, middle)
            _, e3 = tape.evaluate(ratio * x + weight * e2, middle)
            _, e4 = tape.evaluate(transfer(x, e3, grid, i, i + 1), t[i + 1])
            combined = (e1 + 2 * e2 + 2 * e3 + e4) / 6
            x = tape.state(transfer(x, combined, grid, i, i + 1), i + 1)
        return x

r"""Exponential integrators in data prediction: multistep, and Runge–Kutta by the tables of Hochbruck and Ostermann.

In :math:`\lambda` the probability-flow ODE is :math:`dy / d\lambda = -y + D` for :math:`y = x / \alpha`. Its linear
part is integrated exactly; the methods differ in how they follow the data D within a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import phi
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import Solver, check_number, check_order, staged_nfe


def exponential_weights(nodes: Sequence[Any], z: Tensor) -> list[Any]:
    r"""Returns the weights of model outputs at given nodes in a step with the exponential weight :math:`e^{-z (1 - u)}`.

    .. math:: w_j = z \int_0^1 e^{-z (1 - u)} \ell_j(u) \, du, \qquad
        z \int_0^1 e^{-z (1 - u)} u^k \, du = z \, k! \, \varphi_{k+1}(-z)

    with the Lagrange basis of the nodes, of which there are at most 4; u is 0 at the step's start and 1 at its end.
    """
    moments = [z * math.factorial(k) * phi(k + 1, -z) for k in range(len(nodes))]
    weights = []
    for j, node in enumerate(nodes):
        polynomial: list[Any] = [1.0]
        for k, other in enumerate(nodes):
            if k != j:
                scale = 1.0 / (node - other)
                above = [0.0, *polynomial]
                below = [*polynomial, 0.0]
                polynomial = [(p - other * q) * scale for p, q in zip(above, below, strict=True)]
        weight = moments[0] * 0.0
        for c, moment in zip(polynomial, moments, strict=True):
            weight = weight + c * moment
        weights.append(weight)
    return weights


@dataclass(frozen=True)
class RESMultistep(Solver):
    r"""Exponential Adams–Bashforth in data prediction: the multistep methods of RES.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s \sum_{j=0}^{q-1} w_j D_j, \qquad
        w_j = h \int_0^1 e^{-h (1 - u)} \ell_j(u) \, du, \qquad h = \lambda_s - \lambda_t

    with the polynomial through the last q model outputs in :math:`\lambda`, integrated exactly by
    :math:`\varphi`-functions. The first steps have fewer outputs; a last step onto :math:`\sigma = 0` is
    the network's data. With two outputs it differs from DPM-Solver++(2M) by the exact weight of the slope.

    References:
        | Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling (Zhang et al., 2023)
        | https://arxiv.org/abs/2308.02157
        | Exponential multistep methods of Adams-type (Hochbruck & Ostermann, 2011)
        | https://doi.org/10.1007/s10543-011-0332-6

    Cost: one network evaluation per step.

    Order: q; at most 2 with ``lower_final``, and as steps go to infinity, as the first step is DDIM's.

    Arguments:
        outputs: The number q of model outputs, 1 (DDIM) to 4.
        lower_final: Whether the last steps have fewer outputs, down to 1.
    """

    outputs: int = 2
    lower_final: bool = True

    prediction: ClassVar[Prediction] = Prediction.X0
    lowers_final: ClassVar[bool] = True
    first_order_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_order("res (outputs)", self.outputs, 1, 4)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"res-{self.outputs}m"

    @property
    def order(self) -> int:
        return min(self.outputs, 2) if self.lower_final else self.outputs

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, history = tape.x, list[Form]()
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[: self.outputs - 1]]
            a = grid.alpha[i + 1]
            if grid.is_last_zero(i):
                x = tape.state(a * f, i + 1)
                continue
            count = min(len(history), grid.steps - i) if self.lower_final else len(history)
            h = grid.lam[i + 1] - grid.lam[i]
            nodes = [(grid.lam[i - k] - grid.lam[i]) / h for k in range(count)]
            form = grid.sigma[i + 1] / grid.sigma[i] * x
            for weight, past in zip(exponential_weights(nodes, h), history, strict=False):
                form = form + a * weight * past
            x = tape.state(form, i + 1)
        return x


Phi = Callable[[int], Any]
"""Returns :math:`\\varphi_k` at a fixed argument."""


@dataclass(frozen=True)
class _ExponentialRK(Solver):
    r"""Common part: :math:`y_i = e^{-c_i h} y + h \sum_j a_{ij}(-h) D_j`, and so at the end with :math:`b_j`."""

    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})
    grid_on_flows: ClassVar[str | None] = "uniform"
    _order: ClassVar[int]

    @property
    def order(self) -> int:
        return self._order

    @property
    def _nodes(self) -> tuple[float, ...]:
        """The stages' places :math:`c_i` after the first."""
        raise NotImplementedError

    def _rows(self, phis: Sequence[Phi]) -> list[list[Any]]:
        r"""Returns the rows of a after the first and last b, given :math:`\varphi` at :math:`-c_i h` and at -h."""
        raise NotImplementedError

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(1 + len(self._nodes), steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, schedule = tape.x, grid.schedule
        for i in range(grid.steps):
            x, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                x = tape.state(grid.alpha[i + 1] * f, i + 1)
                continue
            h = grid.lam[i + 1] - grid.lam[i]
            phis = [_memoised(-c * h) for c in (*self._nodes, 1.0)]
            *stages, last = self._rows(phis)
            outputs, sigma = [f], grid.sigma[i]
            for c, row in zip(self._nodes, stages, strict=True):
                if c == 1:
                    time, a, s = grid.times[i + 1], grid.alpha[i + 1], grid.sigma[i + 1]
                else:
                    time = schedule.time(grid.lam[i] + c * h)
                    a, s = schedule.alpha(time), schedule.sigma(time)
                _, f = tape.evaluate(self._sum(s / sigma * x, a * h, row, outputs), time)
                outputs.append(f)
            end = grid.sigma[i + 1] / sigma * x
            x = tape.state(self._sum(end, grid.alpha[i + 1] * h, last, outputs), i + 1)
        return x

    @staticmethod
    def _sum(form: Form, scale: Tensor, row: Sequence[Any], outputs: Sequence[Form]) -> Form:
        for weight, output in zip(row, outputs, strict=True):
            if weight is not None:
                form = form + scale * weight * output
        return form


def _memoised(z: Any) -> Phi:
    values: dict[int, Any] = {}

    def at(order: int) -> Any:
        if order not in values:
            values[order] = phi(order, z)
        return values[order]

    return at


@dataclass(frozen=True)
class RES2S(_ExponentialRK):
    r"""Exponential Runge–Kutta of two stages and second order: the single-step method of RES.

    .. math:: u = e^{-c h} y + c h \varphi_1(-c h) D_t, \qquad
        y_s = e^{-h} y + h \left( \varphi_1 - \frac{\varphi_2}{c} \right) D_t + h \frac{\varphi_2}{c} D(u), \qquad
        y = x / \alpha, \ \varphi_k = \varphi_k(-h), \ h = \lambda_s - \lambda_t

    References:
        | Explicit Exponential Runge–Kutta Methods for Semilinear Parabolic Problems (Hochbruck & Ostermann, 2005), (5.4)
        | https://doi.org/10.1137/040611434
        | Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling (Zhang et al., 2023)
        | https://arxiv.org/abs/2308.02157

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 2.

    Arguments:
        c2: The place c of the stage in the step, in :math:`\lambda`; 1/2 is the exponential midpoint rule,
            1 the exponential Heun's.
    """

    c2: float = 0.5

    name = "res-2s"
    _order = 2

    def __post_init__(self) -> None:
        check_number("c2", self.c2, low=0.05, high=1.0)

    @property
    def _nodes(self) -> tuple[float, ...]:
        return (self.c2,)

    def _rows(self, phis: Sequence[Phi]) -> list[list[Any]]:
        stage, end = phis
        second = end(2) / self.c2
        return [[self.c2 * stage(1)], [end(1) - second, second]]


@dataclass(frozen=True)
class RES3S(_ExponentialRK):
    r"""Exponential Runge–Kutta of three stages and third order.

    .. math:: a_{21} = c_2 \varphi_{1,2}, \quad
        a_{31} = \tfrac23 \varphi_{1,3} - \tfrac{4}{9 c_2} \varphi_{2,3}, \quad a_{32} = \tfrac{4}{9 c_2} \varphi_{2,3}, \quad
        b = \left( \varphi_1 - \tfrac32 \varphi_2, \ 0, \ \tfrac32 \varphi_2 \right)

    with :math:`\varphi_{k,i} = \varphi_k(-c_i h)` and :math:`c_3 = 2/3`; see :class:`RES2S` for the step.

    References:
        | Explicit Exponential Runge–Kutta Methods for Semilinear Parabolic Problems (Hochbruck & Ostermann, 2005), (5.9)
        | https://doi.org/10.1137/040611434

    Cost: three network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 3.

    Arguments:
        c2: The place of the second stage in the step, in :math:`\lambda`.
    """

    c2: float = 0.5

    name = "res-3s"
    _order = 3

    def __post_init__(self) -> None:
        check_number("c2", self.c2, low=0.05, high=1.0)

    @property
    def _nodes(self) -> tuple[float, ...]:
        return (self.c2, 2 / 3)

    def _rows(self, phis: Sequence[Phi]) -> list[list[Any]]:
        second, third, end = phis
        a32, b3 = 4 / (9 * self.c2) * third(2), 1.5 * end(2)
        return [
            [self.c2 * second(1)],
            [2 / 3 * third(1) - a32, a32],
            [end(1) - b3, None, b3],
        ]


class Krogstad4S(_ExponentialRK):
    r"""Krogstad's exponential Runge–Kutta method of four stages and fourth order.

    .. math:: &a_{21} = \tfrac12 \varphi_{1,2}, \quad a_{31} = \tfrac12 \varphi_{1,3} - \varphi_{2,3}, \ a_{32} = \varphi_{2,3}, \quad
        a_{41} = \varphi_{1,4} - 2 \varphi_{2,4}, \ a_{43} = 2 \varphi_{2,4} \\
        &b = (\varphi_1 - 3 \varphi_2 + 4 \varphi_3, \ 2 \varphi_2 - 4 \varphi_3, \ 2 \varphi_2 - 4 \varphi_3, \ 4 \varphi_3 - \varphi_2)

    with the stages at 0, 1/2, 1/2 and 1; see :class:`RES2S` for the step.

    References:
        | Generalized integrating factor methods for stiff PDEs (Krogstad, 2005)
        | https://doi.org/10.1016/j.jcp.2004.08.006
        | Explicit Exponential Runge–Kutta Methods for Semilinear Parabolic Problems (Hochbruck & Ostermann, 2005), (5.18)
        | https://doi.org/10.1137/040611434

    Cost: four network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 4.
    """

    name = "krogstad-4s"
    _order = 4

    @property
    def _nodes(self) -> tuple[float, ...]:
        return (0.5, 0.5, 1.0)

    def _rows(self, phis: Sequence[Phi]) -> list[list[Any]]:
        half, _, whole, end = phis
        middle = 2 * end(2) - 4 * end(3)
        return [
            [0.5 * half(1)],
            [0.5 * half(1) - half(2), half(2)],
            [whole(1) - 2 * whole(2), None, 2 * whole(2)],
            [end(1) - 3 * end(2) + 4 * end(3), middle, middle, 4 * end(3) - end(2)],
        ]


class HochbruckOstermann5S(_ExponentialRK):
    r"""The exponential Runge–Kutta method of five stages that is of fourth order on stiff problems too.

    .. math:: &a_{51} = \tfrac12 \varphi_{1,5} - 2 a_{52} - a_{54}, \quad
        a_{52} = a_{53} = \tfrac12 \varphi_{2,5} - \varphi_{3,4} + \tfrac14 \varphi_{2,4} - \tfrac12 \varphi_{3,5}, \quad
        a_{54} = \tfrac14 \varphi_{2,5} - a_{52} \\
        &b = (\varphi_1 - 3 \varphi_2 + 4 \varphi_3, \ 0, \ 0, \ 4 \varphi_3 - \varphi_2, \ 4 \varphi_2 - 8 \varphi_3)

    with the stages at 0, 1/2, 1/2, 1 and 1/2, the first as :class:`Krogstad4S` and
    :math:`a_{42} = a_{43} = \varphi_{2,4}`; see :class:`RES2S` for the step.

    References:
        | Explicit Exponential Runge–Kutta Methods for Semilinear Parabolic Problems (Hochbruck & Ostermann, 2005), (5.19)
        | https://doi.org/10.1137/040611434

    Cost: five network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 4.
    """

    name = "hochbruck-ostermann-5s"
    _order = 4

    @property
    def _nodes(self) -> tuple[float, ...]:
        return (0.5, 0.5, 1.0, 0.5)

    def _rows(self, phis: Sequence[Phi]) -> list[list[Any]]:
        half, _, whole, _, end = phis
        a52 = 0.5 * half(2) - whole(3) + 0.25 * whole(2) - 0.5 * half(3)
        a54 = 0.25 * half(2) - a52
        return [
            [0.5 * half(1)],
            [0.5 * half(1) - half(2), half(2)],
            [whole(1) - 2 * whole(2), whole(2), whole(2)],
            [0.5 * half(1) - 2 * a52 - a54, a52, a52, a54],
            [
                end(1) - 3 * end(2) + 4 * end(3),
                None,
                None,
                4 * end(3) - end(2),
                4 * end(2) - 8 * end(3),
            ],
        ]

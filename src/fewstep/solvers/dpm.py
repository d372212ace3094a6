r"""Multistep solvers in data prediction: DPM-Solver++ 2M and 3M, and the stochastic 2M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import phi
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import LOGISTIC, NEARLY_UNIFORM, Solver, check_number


def difference(grid: TimeGrid, i: int, newer: Form, older: Form, *, back: int = 1) -> Form:
    r"""Returns the slope between two model outputs in :math:`\lambda`, times the coming step h.

    ``newer`` is of grid point ``i - back + 1``, ``older`` one before.
    """
    h = grid.lam[i + 1] - grid.lam[i]
    gap = grid.lam[i - back + 1] - grid.lam[i - back]
    return h / gap * (newer - older)


def _degree(grid: TimeGrid, i: int, most: int, *, lower_final: bool) -> int:
    if grid.is_last_zero(i):
        return 0
    degree = min(most, i)
    return min(degree, grid.steps - 1 - i) if lower_final else degree


@dataclass(frozen=True)
class _DPMpp(Solver):
    """Common part: the exponential step in data prediction with finite differences."""

    lower_final: bool = True

    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid = LOGISTIC
    grid_on_flows = "uniform"
    _most: ClassVar[int]
    lowers_final: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 2

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, history = tape.x, list[Form]()
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[:2]]
            a, s = grid.alpha[i + 1], grid.sigma[i + 1]
            h = grid.lam[i + 1] - grid.lam[i]
            form = s / grid.sigma[i] * x - a * torch.expm1(-h) * f
            degree = _degree(grid, i, self._most, lower_final=self.lower_final)
            if degree:
                form = form + self._correction(grid, i, degree, history)
            x = tape.state(form, i + 1)
        return x

    def _correction(self, grid: TimeGrid, i: int, degree: int, history: list[Form]) -> Form:
        raise NotImplementedError


class DPMpp2M(_DPMpp):
    r"""DPM-Solver++(2M): second-order multistep in data prediction.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t - \alpha_s (e^{-h} - 1)
        \left( D_t + \frac{h}{2 h_{-1}} (D_t - D_{-1}) \right), \qquad h = \lambda_s - \lambda_t

    The first step, and a last step onto :math:`\sigma = 0`, are DDIM's; by default the last step is so
    everywhere, which few steps need. diffusers lowers the order of a last step above zero below 15 steps only.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022), algorithm 2
        | https://arxiv.org/abs/2211.01095

    Cost: one network evaluation per step.

    Order: 2.

    Arguments:
        lower_final: Whether the last step is of first order.
    """

    name = "dpmpp-2m"
    twin = "diffusers:DPMSolverMultistepScheduler"
    _most = 1

    def _correction(self, grid: TimeGrid, i: int, degree: int, history: list[Form]) -> Form:
        h = grid.lam[i + 1] - grid.lam[i]
        slope = difference(grid, i, history[0], history[1])
        return -0.5 * grid.alpha[i + 1] * torch.expm1(-h) * slope


@dataclass(frozen=True)
class DPMpp3M(_DPMpp):
    r"""DPM-Solver++(3M): multistep in data prediction with three model outputs.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t - \alpha_s (e^{-h} - 1) D_t
        + \alpha_s h \varphi_2(-h) \, D' + c \, \alpha_s h \varphi_3(-h) \, D''

    with the slope :math:`D'` and the second divided difference :math:`D''` of the model outputs in
    :math:`\lambda`, scaled by the step h. The second step is :class:`DPMpp2M`'s; so is
    the last but one with ``lower_final``.

    The published rule, and every implementation of it, has :math:`c = 1`. A divided difference is
    half a second derivative, so the expansion has :math:`c = 2`: with 1 the method is of
    second order, with an error some times below that of 2M. ``consistent=True`` uses 2.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
        | https://arxiv.org/abs/2211.01095

    Cost: one network evaluation per step.

    Order: 2; with ``consistent=True`` and without ``lower_final`` 3, and at most 2 as steps go to infinity, as the
    first step is DDIM's.

    Arguments:
        lower_final: Whether the order falls to 2 and 1 in the last two steps.
        consistent: Whether the weight of the second difference is the one of third order.
    """

    consistent: bool = False

    name = "dpmpp-3m"
    first_order_start: ClassVar[bool] = True
    default_grid = NEARLY_UNIFORM
    grid_on_flows = None
    twin = "diffusers:DPMSolverMultistepScheduler"
    _most = 2

    @property
    def order(self) -> int:
        return 3 if self.consistent and not self.lower_final else 2

    def _correction(self, grid: TimeGrid, i: int, degree: int, history: list[Form]) -> Form:
        a, h = grid.alpha[i + 1], grid.lam[i + 1] - grid.lam[i]
        first = difference(grid, i, history[0], history[1])
        if degree == 1:
            return -0.5 * a * torch.expm1(-h) * first
        second = difference(grid, i, history[1], history[2], back=2)
        r0 = (grid.lam[i] - grid.lam[i - 1]) / h
        r1 = (grid.lam[i - 1] - grid.lam[i - 2]) / h
        curve = (first - second) / (r0 + r1)
        slope = first + r0 * curve
        # e/h + 1 = h phi_2(-h), and 1/2 - (e + h)/h^2 = 1/2 - phi_2(-h) = h phi_3(-h).
        weight = 2 if self.consistent else 1
        return a * h * phi(2, -h) * slope + weight * a * h * phi(3, -h) * curve


@dataclass(frozen=True)
class DPMpp2MSDE(Solver):
    r"""DPM-Solver++(2M) SDE: second-order multistep for the reverse SDE.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-(1 + \eta) h})
        \left( D_t + \frac{h}{2 h_{-1}} (D_t - D_{-1}) \right) + \sigma_s \sqrt{1 - e^{-2 \eta h}} \, z

    The first step, and a last step onto :math:`\sigma = 0` (without noise), are of first order.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
        | https://arxiv.org/abs/2211.01095

    Cost: one network evaluation per step.

    Order: 1 of the marginals in general (the noise within a step is not resolved), 2 as
    :math:`\eta \to 0`.

    Arguments:
        eta: The weight of the noise; 1 is the reverse SDE, 0 is :class:`DPMpp2M`.
        lower_final: Whether the last step is of first order.
    """

    eta: float = 1.0
    lower_final: bool = True

    name = "dpmpp-2m-sde"
    lowers_final: ClassVar[bool] = True
    prediction: ClassVar[Prediction] = Prediction.X0
    stochastic: ClassVar[bool] = True
    default_grid = NEARLY_UNIFORM
    twin = "diffusers:DPMSolverMultistepScheduler"

    def __post_init__(self) -> None:
        check_number("eta", self.eta)

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, previous = tape.x, None
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            a, s = grid.alpha[i + 1], grid.sigma[i + 1]
            h = grid.lam[i + 1] - grid.lam[i]
            if grid.is_last_zero(i):
                x = tape.state(a * f, i + 1)
                continue
            weight = -a * torch.expm1(-(1 + self.eta) * h)
            form = s / grid.sigma[i] * torch.exp(-self.eta * h) * x + weight * f
            if previous is not None and _degree(grid, i, 1, lower_final=self.lower_final):
                form = form + 0.5 * weight * difference(grid, i, f, previous)
            if self.eta:
                noise: Tensor = s * torch.sqrt(-torch.expm1(-2 * self.eta * h))
                form = form + noise * tape.noise()
            x = tape.state(form, i + 1)
            previous = f
        return x

r"""One-step methods of several stages: Runge–Kutta in :math:`\rho`, Heun, EDM, and single-step DPM-Solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import phi
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import Solver, check_number, staged_nfe, transfer


@dataclass(frozen=True)
class _RhoRK(Solver):
    r"""Common part: an explicit tableau (A, b, c) on :math:`dy/d\rho = \varepsilon`.

    Where the schedule has a flow coordinate (rectified flows, cosines) it is on
    :math:`d(x / (\alpha + \sigma)) / ds = \varepsilon - x_0`, :math:`s = \sigma / (\alpha + \sigma)`: there
    :math:`\rho` is in the hundreds or thousands near pure noise, and stages weighted with its changes
    amplify every error by as much. On a rectified flow s is the time.
    """

    _matrix: ClassVar[tuple[tuple[float, ...], ...]]
    _weights: ClassVar[tuple[float, ...]]
    _order: ClassVar[int]

    @property
    def order(self) -> int:
        return self._order

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(len(self._weights), steps, ends_at_zero=ends_at_zero)

    def prediction_on(self, schedule: NoiseSchedule) -> Prediction:
        return Prediction.FLOW if schedule.flow_coordinate else Prediction.EPS

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        if grid.schedule.flow_coordinate:
            return self._in_flow(tape, grid)
        x = tape.x
        for i in range(grid.steps):
            if grid.is_last_zero(i):
                _, f = tape.evaluate(x, grid.times[i])
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            start = (grid.times[i], grid.alpha[i], grid.rho[i])
            end = (grid.times[i + 1], grid.alpha[i + 1], grid.rho[i + 1])
            x = tape.state(self._step(tape, grid, x, start, end), i + 1)
        return x

    def _in_flow(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            start = (grid.times[i], grid.alpha[i], grid.sigma[i])
            x = tape.state(self._flow_step(tape, grid, x, start, i), i + 1)
        return x

    def _flow_step(
        self, tape: Tape, grid: TimeGrid, x: Form, start: tuple[Tensor, Tensor, Tensor], i: int
    ) -> Form:
        """One step from a point (t, alpha, sigma) to grid point i + 1 in the flow coordinate."""
        t, a, s = start
        total, end = a + s, grid.alpha[i + 1] + grid.sigma[i + 1]
        here, there = s / total, grid.sigma[i + 1] / end
        h = there - here
        form = x / total
        if grid.is_last_zero(i):
            x, f = tape.evaluate(x, t)
            return end / total * x + end * h * f
        slopes: list[Form] = []
        for stage, row in enumerate(self._matrix):
            c = sum(row)
            if c == 0:
                time, scale = t, total
            elif c == 1:
                time, scale = grid.times[i + 1], end
            else:
                place = here + c * h
                time = grid.schedule.time(torch.log((1 - place) / place))
                scale = grid.schedule.alpha(time) + grid.schedule.sigma(time)
            y = x
            if row:
                y = scale / total * x
                for weight, k in zip(row, slopes, strict=True):
                    if weight:
                        y = y + scale * h * weight * k
            if stage == 3:
                # The slopes so far are summed up before the fourth evaluation, which frees them.
                y, form = tape.state(y), tape.state(form)
            y, f = tape.evaluate(y, time)
            slopes.append(f)
            if self._weights[stage]:
                form = form + h * self._weights[stage] * f
        return form * end

    def _step(
        self,
        tape: Tape,
        grid: TimeGrid,
        x: Form,
        start: tuple[Tensor, Tensor, Tensor],
        end: tuple[Tensor, Tensor, Tensor],
    ) -> Form:
        """One step between two points (t, alpha, rho)."""
        (t, a, r), (t_end, a_end, r_end) = start, end
        h = r_end - r
        slopes: list[Form] = []
        form = a_end / a * x
        for stage, row in enumerate(self._matrix):
            c = sum(row)
            if c == 0:
                time, scale = t, a
            elif c == 1:
                time, scale = t_end, a_end
            else:
                time = grid.schedule.time(-torch.log(r + c * h))
                scale = grid.schedule.alpha(time)
            y = x
            if row:
                y = scale / a * x
                for weight, k in zip(row, slopes, strict=True):
                    if weight:
                        y = y + scale * h * weight * k
            if stage == 3:
                # The slopes so far are summed up before the fourth evaluation, which frees them.
                y, form = tape.state(y), tape.state(form)
            _, f = tape.evaluate(y, time)
            slopes.append(f)
            if self._weights[stage]:
                form = form + a_end * h * self._weights[stage] * f
        return form


class RhoMidpoint(_RhoRK):
    r"""rho-midpoint (rhoRK-DEIS): the explicit midpoint rule in :math:`\rho`.

    .. math:: y_s = y_t + h \, \varepsilon\left(y_t + \tfrac h2 \varepsilon_t, \ \rho_t + \tfrac h2\right),
        \qquad y = x / \alpha, \ h = \rho_s - \rho_t

    The stage lies between grid times. A last step onto :math:`\sigma = 0` is DDIM's.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: two network evaluations per step.

    Order: 2.
    """

    name = "rho-midpoint"
    ends_above_zero: ClassVar[bool] = True
    default_grid = ("power", {"power": 1.5})
    _matrix = ((), (0.5,))
    _weights = (0.0, 1.0)
    _order = 2


class RhoHeun(_RhoRK):
    r"""rho-Heun (rhoRK-DEIS): Heun's method in :math:`\rho`.

    .. math:: y_s = y_t + \tfrac h2 \left( \varepsilon_t + \varepsilon(y_t + h \varepsilon_t, \rho_s) \right),
        \qquad y = x / \alpha, \ h = \rho_s - \rho_t

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`, which is DDIM's.

    Order: 2.
    """

    name = "rho-heun"
    ends_above_zero: ClassVar[bool] = True
    default_grid = ("power", {"power": 1.5})
    _matrix = ((), (1.0,))
    _weights = (0.5, 0.5)
    _order = 2


class RhoKutta3(_RhoRK):
    r"""rho-Kutta (rhoRK-DEIS): Kutta's method of order 3 in :math:`\rho`.

    .. math:: y_s = y_t + \tfrac h6 (k_1 + 4 k_2 + k_3), \quad k_2 = \varepsilon(y_t + \tfrac h2 k_1),
        \quad k_3 = \varepsilon(y_t + h (2 k_2 - k_1))

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: three network evaluations per step; one in a last step onto :math:`\sigma = 0`, which is DDIM's.

    Order: 3.
    """

    name = "rho-kutta3"
    ends_above_zero: ClassVar[bool] = True
    default_grid = ("power", {"power": 1.5})
    _matrix = ((), (0.5,), (-1.0, 2.0))
    _weights = (1 / 6, 4 / 6, 1 / 6)
    _order = 3


class RhoRK4(_RhoRK):
    r"""rho-RK4 (rhoRK-DEIS): the classical Runge–Kutta method in :math:`\rho`.

    .. math:: y_s = y_t + \tfrac h6 (k_1 + 2 k_2 + 2 k_3 + k_4), \quad k_2 = \varepsilon(y_t + \tfrac h2 k_1),
        \quad k_3 = \varepsilon(y_t + \tfrac h2 k_2), \quad k_4 = \varepsilon(y_t + h k_3)

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
        | https://arxiv.org/abs/2204.13902

    Cost: four network evaluations per step; one in a last step onto :math:`\sigma = 0`, which is DDIM's.

    Order: 4.
    """

    name = "rho-rk4"
    ends_above_zero: ClassVar[bool] = True
    default_grid = ("power", {"power": 1.5})
    _matrix = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    _weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    _order = 4


class Heun(_RhoRK):
    r"""Heun's method as EDM uses it: :class:`RhoHeun` on the Karras grid, ending at :math:`\sigma = 0`.

    .. math:: y_s = y_t + \tfrac h2 \left( \varepsilon_t + \varepsilon(y_t + h \varepsilon_t, \rho_s) \right),
        \qquad y = x / \alpha, \ h = \rho_s - \rho_t

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithm 1
        | https://arxiv.org/abs/2206.00364

    Cost: 2 K - 1 network evaluations for K steps that end at :math:`\sigma = 0`.

    Order: 2.
    """

    name = "heun"
    spaces_points: ClassVar[bool] = True
    default_grid = ("karras", {"to_zero": True})
    _matrix = RhoHeun._matrix
    _weights = RhoHeun._weights
    _order = 2


@dataclass(frozen=True)
class EDMStochastic(_RhoRK):
    r"""EDM's stochastic sampler: noise is added (churn), then Heun removes it.

    .. math:: \hat\rho = \rho_t (1 + \gamma), \quad \gamma = \min(S_{churn} / K, \sqrt 2 - 1)
        \text{ if } S_{min} \le \rho_t \le S_{max}, \quad
        \hat y = y_t + S_{noise} \sqrt{\hat\rho^2 - \rho_t^2} \, z

    followed by the step of :class:`Heun` from :math:`\hat\rho`. Where :math:`\hat\rho` would lie
    above the noisiest level of the schedule nothing is added.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), algorithm 2
        | https://arxiv.org/abs/2206.00364

    Cost: 2 K - 1 network evaluations for K steps that end at :math:`\sigma = 0`.

    Order: 1 (of the marginals, at constant :math:`S_{churn}`: the churn of each step is a first-order splitting).

    Arguments:
        s_churn: The amount of noise :math:`S_{churn}`; 0 is :class:`Heun`.
        s_min: The smallest :math:`\rho` at which noise is added.
        s_max: The largest.
        s_noise: The scale of the noise; 1 keeps the marginals.
    """

    s_churn: float = 5.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.0

    name = "edm-stochastic"
    spaces_points: ClassVar[bool] = True
    default_grid: ClassVar[tuple[str, Any]] = ("karras", {"to_zero": True})
    _matrix = RhoHeun._matrix
    _weights = RhoHeun._weights
    _order = 1

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_min", "s_max", "s_noise"):
            check_number(name, getattr(self, name))

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.s_churn > 0

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.s_noise == 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        most = float(grid.schedule.rho(torch.tensor(grid.schedule.t_max, dtype=torch.float64)))
        churn = min(self.s_churn / grid.steps, math.sqrt(2) - 1)
        flow = grid.schedule.flow_coordinate
        for i in range(grid.steps):
            start = (grid.times[i], grid.alpha[i], grid.rho[i])
            level = float(grid.rho[i].detach())
            if churn and self.s_min <= level <= self.s_max and level * (1 + churn) <= most:
                rho = grid.rho[i] * (1 + churn)
                time = grid.schedule.time(-rho.log())
                scale = grid.schedule.alpha(time)
                spread = self.s_noise * torch.sqrt(rho.square() - grid.rho[i].square())
                x = scale / grid.alpha[i] * x + scale * spread * tape.noise()
                start = (time, scale, rho)
            if flow:
                point = (start[0], start[1], start[1] * start[2])
                x = tape.state(self._flow_step(tape, grid, x, point, i), i + 1)
                continue
            if grid.is_last_zero(i):
                x, f = tape.evaluate(x, start[0])
                ratio = grid.alpha[i + 1] / start[1]
                x = tape.state(ratio * x - ratio * start[1] * start[2] * f, i + 1)
                continue
            end = (grid.times[i + 1], grid.alpha[i + 1], grid.rho[i + 1])
            x = tape.state(self._step(tape, grid, x, start, end), i + 1)
        return x


def _between(grid: TimeGrid, i: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns (t, alpha, sigma) at a share of step i in :math:`\lambda`."""
    lam = grid.lam[i] + share * (grid.lam[i + 1] - grid.lam[i])
    t = grid.schedule.time(lam)
    return t, grid.schedule.alpha(t), grid.schedule.sigma(t)


@dataclass(frozen=True)
class _DPMSolver(Solver):
    """Common part of the single-step solvers: DDIM in a last step onto zero."""

    _stages: ClassVar[int]

    default_grid = ("log-rho", {})
    grid_on_flows: ClassVar[str | None] = "uniform"

    @property
    def order(self) -> int:
        return self._stages

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(self._stages, steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                form = transfer(x, f, grid, i, i + 1)
            else:
                form = self._step(tape, grid, i, x, f)
            x = tape.state(form, i + 1)
        return x

    def _step(self, tape: Tape, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        raise NotImplementedError


class DPM2(_DPMSolver):
    r"""DPM-Solver-2: single step with a stage halfway in :math:`\lambda`.

    .. math:: u = \frac{\alpha_m}{\alpha_t} x_t - \sigma_m (e^{h/2} - 1) \varepsilon_t, \qquad
        x_s = \frac{\alpha_s}{\alpha_t} x_t - \sigma_s (e^h - 1) \varepsilon(u, m), \qquad h = \lambda_s - \lambda_t

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), algorithm 1
        | https://arxiv.org/abs/2206.00927

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`, which is DDIM's.

    Order: 2.
    """

    name = "dpm2"
    _stages = 2

    def _step(self, tape: Tape, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        a, h = grid.alpha[i], grid.lam[i + 1] - grid.lam[i]
        t, a_mid, s_mid = _between(grid, i, 0.5)
        _, middle = tape.evaluate(a_mid / a * x - s_mid * torch.expm1(h / 2) * f, t)
        return grid.alpha[i + 1] / a * x - grid.sigma[i + 1] * torch.expm1(h) * middle


class DPM3(_DPMSolver):
    r"""DPM-Solver-3: single step with stages at a third and two thirds in :math:`\lambda`.

    .. math:: u_1 &= \tfrac{\alpha_1}{\alpha_t} x_t - \sigma_1 (e^{h/3} - 1) \varepsilon_t, \qquad
            D_1 = \varepsilon(u_1) - \varepsilon_t \\
        u_2 &= \tfrac{\alpha_2}{\alpha_t} x_t - \sigma_2 (e^{2h/3} - 1) \varepsilon_t
            - 2 \sigma_2 \left( \tfrac{e^{2h/3} - 1}{2h/3} - 1 \right) D_1, \qquad D_2 = \varepsilon(u_2) - \varepsilon_t \\
        x_s &= \tfrac{\alpha_s}{\alpha_t} x_t - \sigma_s (e^h - 1) \varepsilon_t
            - \tfrac32 \sigma_s \left( \tfrac{e^h - 1}{h} - 1 \right) D_2

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), algorithm 2
        | https://arxiv.org/abs/2206.00927

    Cost: three network evaluations per step; one in a last step onto :math:`\sigma = 0`, which is DDIM's.

    Order: 3.
    """

    name = "dpm3"
    _stages = 3

    def _step(self, tape: Tape, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        a, h = grid.alpha[i], grid.lam[i + 1] - grid.lam[i]
        t1, a1, s1 = _between(grid, i, 1 / 3)
        _, f1 = tape.evaluate(a1 / a * x - s1 * torch.expm1(h / 3) * f, t1)
        t2, a2, s2 = _between(grid, i, 2 / 3)
        z = 2 * h / 3
        # (e^z - 1) / z - 1 = z phi_2(z), without cancellation.
        u2 = a2 / a * x - s2 * torch.expm1(z) * f - 2 * s2 * z * phi(2, z) * (f1 - f)
        _, f2 = tape.evaluate(u2, t2)
        s = grid.sigma[i + 1]
        return (
            grid.alpha[i + 1] / a * x - s * torch.expm1(h) * f - 1.5 * s * h * phi(2, h) * (f2 - f)
        )

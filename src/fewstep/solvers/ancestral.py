r"""Ancestral samplers: a deterministic step below the next noise level, then noise up to it.

With :math:`y = x / \alpha` and :math:`\rho = \sigma / \alpha` a step goes from :math:`\rho_t` to
:math:`\rho_d \le \rho_s` without noise, and :math:`\sqrt{\rho_s^2 - \rho_d^2} \, z` brings it to
:math:`\rho_s`. The members differ in :math:`\rho_d` and in the step down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import EtaSolver, Solver, check_number, check_order, staged_nfe, transfer


def ancestral_level(grid: TimeGrid, start: Tensor, end: Tensor, eta: float) -> Tensor:
    r"""Returns the level :math:`\rho_d` to which an ancestral step from ``start`` to ``end`` goes down.

    .. math:: \rho_d^2 = \rho_s^2 - \eta^2 \rho_s^2 \left( 1 - \frac{\rho_s^2}{\rho_t^2} \right)

    and on schedules with a flow coordinate :math:`s = \sigma / (\alpha + \sigma)`, as in ComfyUI and
    diffusers for flows, :math:`s_d = s_s \left(1 - \eta (1 - s_s / s_t)\right)`.

    Raises:
        ValueError: If :math:`\eta` asks for more noise than there is at the end.
    """
    if not eta:
        return end
    if not grid.schedule.flow_coordinate:
        return level_below(start, end, eta)
    here, there = start / (1 + start), end / (1 + end)
    share = 1 - eta * (1 - there / here)
    _check_share(share, end, eta)
    down = there * share
    return down / (1 - down)


def level_below(start: Tensor, end: Tensor, eta: float) -> Tensor:
    r"""Returns :math:`\rho_d` of the first formula of :func:`ancestral_level`.

    Raises:
        ValueError: If :math:`\eta` asks for more noise than there is at the end.
    """
    share = 1 - eta**2 * (1 - (end / start).square())
    _check_share(share, end, eta)
    return end * torch.sqrt(share)


def _check_share(share: Tensor, end: Tensor, eta: float) -> None:
    if not float(share.detach()) >= 0:
        raise ValueError(
            f"eta = {eta:g} asks for more noise than there is at sigma / alpha = {float(end):.4g}; "
            "at most 1 is possible everywhere"
        )


@dataclass(frozen=True)
class _Ancestral(EtaSolver):
    """Common part: down, by DDIM unless overridden, then noise; DDIM in a last step onto zero."""

    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})
    grid_on_flows: ClassVar[str | None] = "uniform"
    _stages: ClassVar[int] = 1

    @property
    def order(self) -> int:
        return 1 if self.eta else self._stages

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(self._stages, steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            x, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                x = tape.state(self._onto_zero(grid, i, x, f), i + 1)
                continue
            end = grid.rho[i + 1]
            level = self._level(grid, i)
            form = self._down(tape, grid, i, level, x, f)
            if float(level.detach()) < float(end.detach()):
                spread = torch.sqrt(end.square() - level.square())
                form = form + grid.alpha[i + 1] * spread * tape.noise()
            x = tape.state(form, i + 1)
        return x

    def _level(self, grid: TimeGrid, i: int) -> Tensor:
        return ancestral_level(grid, grid.rho[i], grid.rho[i + 1], self.eta)

    def _onto_zero(self, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        return transfer(x, f, grid, i, i + 1)

    def _down(self, tape: Tape, grid: TimeGrid, i: int, level: Tensor, x: Form, f: Form) -> Form:
        r"""Returns the state at :math:`\rho_d`, in the scale :math:`\alpha_s` of the step's end."""
        del tape
        a = grid.alpha[i + 1]
        return a / grid.alpha[i] * x + a * (level - grid.rho[i]) * f


class EulerAncestral(_Ancestral):
    r"""Euler ancestral: DDIM down, then noise.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s (\rho_d - \rho_t) \varepsilon_t
        + \alpha_s \sqrt{\rho_s^2 - \rho_d^2} \, z, \qquad
        \rho_d^2 = \rho_s^2 \left( 1 - \eta^2 (1 - \rho_s^2 / \rho_t^2) \right)

    Stochastic DDIM by another name, but on flows, where :math:`\rho_d` is that of ComfyUI's and
    diffusers' samplers of the name: :math:`s_d = s_s (1 - \eta (1 - s_s / s_t))` for
    :math:`s = \sigma / (\alpha + \sigma)`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), and k-diffusion (Crowson, 2022)
        | https://arxiv.org/abs/2206.00364
        | https://github.com/crowsonkb/k-diffusion

    Cost: one network evaluation per step.

    Order: 1.

    Arguments:
        eta: The share of noise; 0 is DDIM.
    """

    name = "euler-ancestral"


class DPM2Ancestral(_Ancestral):
    r"""DPM2 ancestral: the step of DPM-Solver-2 down, then noise.

    .. math:: u = \alpha_m \left( \frac{x_t}{\alpha_t} + (\rho_m - \rho_t) \varepsilon_t \right), \qquad
        x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s (\rho_d - \rho_t) \, \varepsilon(u, m)
        + \alpha_s \sqrt{\rho_s^2 - \rho_d^2} \, z, \qquad \rho_m = \sqrt{\rho_t \rho_d}

    On flows the step is that in :math:`s = \sigma / (\alpha + \sigma)`, with :math:`s_m = \sqrt{s_t s_d}`
    and the :math:`\rho_d` of :class:`EulerAncestral`, as in ComfyUI.

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), and k-diffusion (Crowson, 2022)
        | https://arxiv.org/abs/2206.00927
        | https://github.com/crowsonkb/k-diffusion

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 1; with :math:`\eta = 0` it is DPM-Solver-2, of order 2.

    Arguments:
        eta: The share of noise.
    """

    name = "dpm2-ancestral"
    _stages = 2

    def prediction_on(self, schedule: NoiseSchedule) -> Prediction:
        return Prediction.FLOW if schedule.flow_coordinate else Prediction.EPS

    def _onto_zero(self, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        if not grid.schedule.flow_coordinate:
            return super()._onto_zero(grid, i, x, f)
        total = grid.alpha[i] + grid.sigma[i]
        return grid.alpha[i + 1] * (x / total - grid.sigma[i] / total * f)

    def _down(self, tape: Tape, grid: TimeGrid, i: int, level: Tensor, x: Form, f: Form) -> Form:
        if grid.schedule.flow_coordinate:
            return self._down_in_flow(tape, grid, i, level, x, f)
        rho, a = grid.rho[i], grid.alpha[i + 1]
        middle = torch.sqrt(rho * level)
        time = grid.schedule.time(-middle.log())
        scale = grid.schedule.alpha(time)
        u = scale / grid.alpha[i] * x + scale * (middle - rho) * f
        _, f = tape.evaluate(u, time)
        return a / grid.alpha[i] * x + a * (level - rho) * f

    def _down_in_flow(
        self, tape: Tape, grid: TimeGrid, i: int, level: Tensor, x: Form, f: Form
    ) -> Form:
        total, here = grid.alpha[i] + grid.sigma[i], grid.rho[i] / (1 + grid.rho[i])
        down = level / (1 + level)
        middle = torch.sqrt(here * down)
        time = grid.schedule.time(torch.log((1 - middle) / middle))
        scale = grid.schedule.alpha(time) + grid.schedule.sigma(time)
        _, f = tape.evaluate(scale / total * x + scale * (middle - here) * f, time)
        # x / (alpha + sigma) has 1 - s_d of the data; in the scale of the end there is alpha_s.
        return grid.alpha[i + 1] / (1 - down) * (x / total + (down - here) * f)


class DPMpp2SAncestral(_Ancestral):
    r"""DPM-Solver++(2S) ancestral: the single-step method of second order in data prediction down, then noise.

    .. math:: u = \frac{\sigma_m}{\sigma_t} x_t - \alpha_m (e^{-h/2} - 1) D_t, \qquad
        x_s = \alpha_s \left( \frac{\rho_d}{\sigma_t} x_t - (e^{-h} - 1) D(u, m) \right)
        + \alpha_s \sqrt{\rho_s^2 - \rho_d^2} \, z, \qquad h = \log(\rho_t / \rho_d)

    with m halfway between t and d in :math:`\lambda`, and the :math:`\rho_d` of :class:`EulerAncestral`.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022), and k-diffusion (Crowson, 2022)
        | https://arxiv.org/abs/2211.01095
        | https://github.com/crowsonkb/k-diffusion

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 1; with :math:`\eta = 0` it is DPM-Solver++(2S), of order 2.

    Arguments:
        eta: The share of noise.
    """

    name = "dpmpp-2s-ancestral"
    prediction: ClassVar[Prediction] = Prediction.X0
    _stages = 2

    def _onto_zero(self, grid: TimeGrid, i: int, x: Form, f: Form) -> Form:
        return grid.alpha[i + 1] * f

    def _down(self, tape: Tape, grid: TimeGrid, i: int, level: Tensor, x: Form, f: Form) -> Form:
        rho, a = grid.rho[i], grid.alpha[i + 1]
        middle = torch.sqrt(rho * level)
        time = grid.schedule.time(-middle.log())
        scale, part = grid.schedule.alpha(time), middle / rho
        u = scale / grid.alpha[i] * part * x + scale * (1 - part) * f
        _, f = tape.evaluate(u, time)
        return a / grid.alpha[i] * (level / rho) * x + a * (1 - level / rho) * f


@dataclass(frozen=True)
class TCD(_Ancestral):
    r"""The step of trajectory consistency distillation: down to a share of the next time, then noise.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s (\rho_{s'} - \rho_t) \varepsilon_t
        + \alpha_s \sqrt{\rho_s^2 - \rho_{s'}^2} \, z, \qquad s' = (1 - \gamma) s

    rounded down to a training timestep where there are. For networks that were distilled so; of
    others it makes samples that lack variance, at any number of steps.

    References:
        | Trajectory Consistency Distillation (Zheng et al., 2024)
        | https://arxiv.org/abs/2402.19159

    Cost: one network evaluation per step.

    Order: 0, as its steps down do not become small; with :math:`\gamma = 0` it is DDIM, of order 1.

    Arguments:
        eta: :math:`\gamma`, from 0 to 1: the share of each time that is noise.
    """

    eta: float = 0.3

    name = "tcd"

    def __post_init__(self) -> None:
        check_number("eta", self.eta, high=1.0)

    @property
    def order(self) -> int:
        return 0 if self.eta else 1

    def _level(self, grid: TimeGrid, i: int) -> Tensor:
        time = (1 - self.eta) * grid.times[i + 1]
        if grid.schedule.discrete:
            time = time.floor()
        elif float(time.detach()) <= grid.schedule.t_zero:
            return grid.rho[i + 1] * 0.0
        return grid.schedule.rho(time)


def _ddpm_step(grid: TimeGrid, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weights of state and output in an ancestral step, and the share of its end that is new noise."""
    ratio = grid.alpha[i + 1] / grid.alpha[i]
    share = (grid.rho[i + 1] / grid.rho[i]).square()
    weight = grid.sigma[i + 1] * share.sqrt() - ratio * grid.sigma[i]
    return ratio, weight, torch.sqrt(1 - share)


@dataclass(frozen=True)
class LangevinCorrected(Solver):
    r"""Predictor–corrector: ancestral steps, each followed by Langevin steps at the level that it reached.

    .. math:: x \leftarrow x - \delta \frac{\varepsilon}{\sigma} + \sqrt{2 \delta} \, z, \qquad \delta = 2 r^2 \sigma^2

    which is the published step :math:`\delta = 2 (r \|z\| / \|s\|)^2` with the norms that they have for the exact
    network on most of the way, :math:`\|s\| = \|z\| / \sigma`: so it is a plan. The predictor is DDPM's. No corrector
    at :math:`\sigma = 0`.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), algorithms 2 to 5
        | https://arxiv.org/abs/2011.13456

    Cost: 1 + ``corrections`` network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 0: the corrector has a bias of its own, of order :math:`r^2`, at any number of steps; without it 1.

    Arguments:
        corrections: The number of Langevin steps at each level.
        snr: Their signal-to-noise ratio r; 0.16 in the paper for small images.
    """

    corrections: int = 1
    snr: float = 0.16

    name = "langevin-corrected"
    stochastic: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})
    grid_on_flows: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        check_order("langevin-corrected (corrections)", self.corrections, 0, 100)
        check_number("snr", self.snr, high=0.7)

    @property
    def order(self) -> int:
        return 0 if self.corrections and self.snr else 1

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(1 + self.corrections, steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            (ratio, weight, spread), s = _ddpm_step(grid, i), grid.sigma[i + 1]
            form = ratio * x + weight * f + s * spread * tape.noise()
            x = tape.state(form, None if self.corrections else i + 1)
            for k in range(self.corrections):
                _, f = tape.evaluate(x, grid.times[i + 1])
                form = x - 2 * self.snr**2 * s * f + 2 * self.snr * s * tape.noise()
                x = tape.state(form, i + 1 if k == self.corrections - 1 else None)
        return x


@dataclass(frozen=True)
class RePaint(Solver):
    r"""RePaint: ancestral steps, each taken again from its own result with the noise put back.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} (x_t - \sigma_t \varepsilon) + \sigma_s \frac{\rho_s}{\rho_t} \varepsilon
        + \sigma_s \sqrt{1 - \rho_s^2 / \rho_t^2} \, z, \qquad
        x_t \leftarrow \frac{\alpha_t}{\alpha_s} x_s + \sqrt{\sigma_t^2 - \alpha_t^2 \sigma_s^2 / \alpha_s^2} \, z'

    For inpainting (:class:`fewstep.guidance.Inpainted`): going back and forth at a noise level lets the new part come
    to terms with the noisy image. With more steps and more passes the samples tend to those given the image, where all
    other solvers keep a bias. Without a mask it is DDPM at a multiple of the cost. The last step onto
    :math:`\sigma = 0` is taken once, without noise. The published jumps of several steps are one step here.

    References:
        | RePaint: Inpainting using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), algorithm 1
        | https://arxiv.org/abs/2201.09865

    Cost: ``passes`` network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 1 of the marginals.

    Arguments:
        passes: How often each step is taken; 10 in the paper.
    """

    passes: int = 2

    name = "repaint"
    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})
    grid_on_flows: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        check_order("repaint (passes)", self.passes, 1, 1000)

    @property
    def order(self) -> int:
        return 1

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(self.passes, steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            if grid.is_last_zero(i):
                _, f = tape.evaluate(x, grid.times[i])
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            (ratio, weight, spread), s = _ddpm_step(grid, i), grid.sigma[i + 1]
            for k in range(self.passes):
                _, f = tape.evaluate(x, grid.times[i])
                form = ratio * x + weight * f + s * spread * tape.noise()
                if k == self.passes - 1:
                    x = tape.state(form, i + 1)
                else:
                    x = tape.state(form / ratio + grid.sigma[i] * spread * tape.noise())
        return x


@dataclass(frozen=True)
class LCM(Solver):
    r"""The step of consistency models: the network's data, then the noise of the next level.

    .. math:: x_s = \alpha_s D_t + \sigma_s z

    For networks that were distilled so (LCM, consistency models); of others it makes samples that
    lack variance, at any number of steps. A last step onto :math:`\sigma = 0` has no noise.

    References:
        | Consistency Models (Song et al., 2023), algorithm 1
        | https://arxiv.org/abs/2303.01469
        | Latent Consistency Models (Luo et al., 2023)
        | https://arxiv.org/abs/2310.04378

    Cost: one network evaluation per step.

    Order: 0: it takes the network for a map to the data, and not for a field.
    """

    name = "lcm"
    prediction: ClassVar[Prediction] = Prediction.X0
    stochastic: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 0

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            form = grid.alpha[i + 1] * f
            if not grid.is_last_zero(i):
                form = form + grid.sigma[i + 1] * tape.noise()
            x = tape.state(form, i + 1)
        return x

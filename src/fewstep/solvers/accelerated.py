r"""The provably accelerated DDIM and DDPM, and the vanilla rules of the same theory.

Written for the variance-preserving chain :math:`X_t = \sqrt{A_t} X_0 + \sqrt{1 - A_t} W`. Any other
schedule is the same ODE in another scale: with :math:`A = 1 / (1 + \rho^2)` the state
:math:`x \sqrt A / \alpha` is variance preserving, and the rules act on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.scalars import column
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import Solver, transfer


class _Levels:
    """The levels A of a grid, and the scale that makes the state variance preserving."""

    def __init__(self, grid: TimeGrid) -> None:
        cumulative = 1 / (1 + grid.rho.square())
        self.cumulative = column(cumulative)
        self.scale = column(cumulative.sqrt() / grid.alpha)
        # 1 - A without cancellation, and the eps form of a score: s = -eps / sqrt(1 - A).
        self.noise = column(grid.rho * cumulative.sqrt())

    def step(self, i: int) -> tuple[Tensor, Tensor]:
        r"""Returns (a, 1 - a) of step i, :math:`a = A_i / A_{i+1}`."""
        a = self.cumulative[i] / self.cumulative[i + 1]
        removed = self.noise[i].square() - self.noise[i + 1].square()
        return a, removed / self.cumulative[i + 1]


@dataclass(frozen=True)
class DDIMTheory(Solver):
    r"""The deterministic rule of the theory, linearised: half the score.

    .. math:: Y_{t-1} = \frac{1}{\sqrt{a_t}} \left( Y_t + \frac{1 - a_t}{2} s_t(Y_t) \right)

    For theory plots; with few steps its coefficient is badly off, use ``ddim``.

    References:
        | Towards Faster Non-Asymptotic Convergence for Diffusion-Based Generative Models (Li et al., 2024)
        | https://arxiv.org/abs/2306.09251

    Cost: one network evaluation per step.

    Order: 1.
    """

    name = "ddim-theory"
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x = _Levels(grid), tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            x = tape.state(_halfway(levels, i, x, f), i + 1)
        return x


def _halfway(levels: _Levels, i: int, x: Form, f: Form) -> Form:
    a, b = levels.step(i)
    form = levels.scale[i] * x - b / (2 * levels.noise[i]) * f
    return form / (a.sqrt() * levels.scale[i + 1])


@dataclass(frozen=True)
class DDPMTheory(Solver):
    r"""The stochastic rule of the theory.

    .. math:: Y_{t-1} = \frac{1}{\sqrt{a_t}} \left( Y_t + (1 - a_t) s_t(Y_t) + \sqrt{1 - a_t} \, Z_t \right)

    No noise in a last step onto :math:`\sigma = 0`.

    References:
        | Accelerating Convergence of Score-Based Diffusion Models, Provably (Li et al., 2024)
        | https://arxiv.org/abs/2403.03852

    Cost: one network evaluation per step.

    Order: 1 (of the marginals).
    """

    name = "ddpm-theory"
    grid_on_flows: ClassVar[str | None] = "logistic"
    stochastic: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x = _Levels(grid), tape.x
        for i in range(grid.steps):
            a, b = levels.step(i)
            _, f = tape.evaluate(x, grid.times[i])
            form = levels.scale[i] * x - b / levels.noise[i] * f
            if not grid.is_last_zero(i):
                form = form + b.sqrt() * tape.noise()
            x = tape.state(form / (a.sqrt() * levels.scale[i + 1]), i + 1)
        return x


@dataclass(frozen=True)
class AcceleratedDDIM(Solver):
    r"""Accelerated DDIM as it is used in practice: the DDIM step plus a momentum in :math:`\varepsilon`.

    .. math:: x_{t-1} = \frac{x_t}{\sqrt{a_t}} + \left( \sqrt{1 - A_{t-1}} - \sqrt{\tfrac{1 - A_t}{a_t}} \right) \varepsilon_t
        + w_t (\varepsilon_{t+1} - \varepsilon_t), \qquad
        w_t = \sqrt{A_{t-1}} \, \frac{G_t(A_{t-1}) - G_t(A_t)}{A_t - A_{t+1}}, \qquad
        G_t(g) = A_t \sqrt{\tfrac{1 - g}{g}} + \arcsin \sqrt g

    It integrates the line through the last two model outputs, as a function of A, exactly. The first
    step is DDIM's. A last step onto :math:`\sigma = 0` (A = 1) is regular.

    References:
        | Accelerating Convergence of Score-Based Diffusion Models, Provably (Li et al., 2024), and its code
        | https://arxiv.org/abs/2403.03852

    Cost: one network evaluation per step.

    Order: 2.
    """

    name = "accelerated-ddim"

    @property
    def order(self) -> int:
        return 2

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x, previous = _Levels(grid), tape.x, None
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            form = transfer(x, f, grid, i, i + 1)
            if previous is not None:
                weight = arcsin_weight(*(levels.cumulative[k] for k in (i - 1, i, i + 1)))
                form = form + weight / levels.scale[i + 1] * (previous - f)
            x = tape.state(form, i + 1)
            previous = f
        return x


def arcsin_weight(noisier: Tensor, current: Tensor, target: Tensor) -> Tensor:
    r"""Returns the momentum weight :math:`w_t` of three levels :math:`A_{t+1} < A_t < A_{t-1}`."""

    def antiderivative(level: Tensor) -> Tensor:
        return current * torch.sqrt((1 - level) / level) + torch.asin(level.sqrt().clamp(max=1.0))

    return target.sqrt() * (antiderivative(target) - antiderivative(current)) / (current - noisier)


@dataclass(frozen=True)
class AcceleratedDDIMTheory(Solver):
    r"""Accelerated DDIM as it is proved: a step back towards noise, then two scores.

    .. math:: Y_t^- &= \sqrt{a_{t+1}} \left( Y_t - \tfrac{1 - a_{t+1}}{2} s_t(Y_t) \right) \\
        Y_{t-1} &= \frac{1}{\sqrt{a_t}} \left[ Y_t + \tfrac{1 - a_t}{2} s_t(Y_t)
        + \tfrac{(1 - a_t)^2}{4 (1 - a_{t+1})} \left( s_t(Y_t) - \sqrt{a_{t+1}} \, s_{t+1}(Y_t^-) \right) \right]

    The noisier level t + 1 is the previous grid point. At the first step there is none on the
    grid, and the step is DDIM's. Linearised coefficients: below some 64 evaluations plain ``ddim`` is better.

    References:
        | Accelerating Convergence of Score-Based Diffusion Models, Provably (Li et al., 2024), eq. (15)
        | https://arxiv.org/abs/2403.03852

    Cost: two network evaluations per step, one in the first: 2 K - 1.

    Order: 2.
    """

    name = "accelerated-ddim-theory"
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 2

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        del ends_at_zero
        return 2 * steps - 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x = _Levels(grid), tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if i == 0:
                x = tape.state(transfer(x, f, grid, 0, 1), 1)
                continue
            back, lost = levels.step(i - 1)
            y = levels.scale[i] * x + lost / (2 * levels.noise[i]) * f
            _, older = tape.evaluate(back.sqrt() / levels.scale[i - 1] * y, grid.times[i - 1])
            x = tape.state(_momentum(levels, i, x, f, older), i + 1)
        return x


def _momentum(levels: _Levels, i: int, x: Form, f: Form, older: Form) -> Form:
    """Rule (15c) in eps form: the last term has the scores of levels i and i - 1."""
    a, b = levels.step(i)
    back, lost = levels.step(i - 1)
    change = f / levels.noise[i] - back.sqrt() / levels.noise[i - 1] * older
    form = levels.scale[i] * x - b / (2 * levels.noise[i]) * f - b.square() / (4 * lost) * change
    return form / (a.sqrt() * levels.scale[i + 1])


@dataclass(frozen=True)
class AcceleratedDDIMLagged(Solver):
    r"""Accelerated DDIM of the theory, with the score of the previous step instead of a second evaluation.

    .. math:: Y_{t-1} = \frac{1}{\sqrt{a_t}} \left[ Y_t + \tfrac{1 - a_t}{2} s_t(Y_t)
        + \tfrac{(1 - a_t)^2}{4 (1 - a_{t+1})} \left( s_t(Y_t) - \sqrt{a_{t+1}} \, s_{t+1}(Y_{t+1}) \right) \right]

    The first step is DDIM's.

    References:
        | Accelerating Convergence of Score-Based Diffusion Models, Provably (Li et al., 2024), eq. (15)
        | https://arxiv.org/abs/2403.03852

    Cost: one network evaluation per step.

    Order: 2.
    """

    name = "accelerated-ddim-lagged"
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 2

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x, previous = _Levels(grid), tape.x, None
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if previous is None:
                form = transfer(x, f, grid, i, i + 1)
            else:
                form = _momentum(levels, i, x, f, previous)
            x = tape.state(form, i + 1)
            previous = f
        return x


_VARIANTS = ("inside", "readme", "cifar-code", "fork")


@dataclass(frozen=True)
class AcceleratedDDPM(Solver):
    r"""Accelerated DDPM: half of the noise before the network evaluation, half after.

    .. math:: Y_t^+ = Y_t + \sqrt{\tfrac{1 - a_t}{2}} \, Z_t, \qquad
        Y_{t-1} = \frac{1}{\sqrt{a_t}} \left( Y_t^+ + (1 - a_t) s_t(Y_t^+) + \sqrt{\tfrac{1 - a_t}{2}} \, Z_t^+ \right)

    The network gets the same time although the state carries more noise: that is intended. No
    second noise in a last step onto :math:`\sigma = 0`. Meant for some 20 evaluations and more;
    below that the deterministic rules are far better.

    References:
        | Accelerating Convergence of Score-Based Diffusion Models, Provably (Li et al., 2024), eq. (24)
        | https://arxiv.org/abs/2403.03852

    Cost: one network evaluation per step.

    Order: 1 (of the marginals), with a constant some 2.5 times below DDPM's; 2 on Gaussian data.

    Arguments:
        variant: Where the noises go. ``"inside"`` is the rule above, that of the
            derivation; ``"readme"`` adds the second after dividing by :math:`\sqrt{a_t}`; ``"cifar-code"``
            moreover scales the first by :math:`\sqrt{a_t}`; ``"fork"`` uses the posterior variance.
            The last three are in the authors' material, and are here for comparison.
    """

    variant: str = "inside"

    name = "accelerated-ddpm"
    grid_on_flows: ClassVar[str | None] = "logistic"
    stochastic: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.variant not in _VARIANTS:
            raise ValueError(
                f"variant must be one of {', '.join(_VARIANTS)}, got {self.variant!r}"
            )

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        levels, x = _Levels(grid), tape.x
        for i in range(grid.steps):
            a, b = levels.step(i)
            first = second = torch.sqrt(b / 2)
            if self.variant == "cifar-code":
                first = torch.sqrt(a * b / 2)
            elif self.variant == "fork":
                posterior = b * (levels.noise[i + 1] / levels.noise[i]).square()
                first = second = torch.sqrt(posterior / 2)
            form = x + first / levels.scale[i] * tape.noise()
            u, f = tape.evaluate(form, grid.times[i])
            form = (levels.scale[i] * u - b / levels.noise[i] * f) / a.sqrt()
            if not grid.is_last_zero(i):
                inner = 1 / a.sqrt() if self.variant == "inside" else 1.0
                form = form + second * inner * tape.noise()
            x = tape.state(form / levels.scale[i + 1], i + 1)
        return x

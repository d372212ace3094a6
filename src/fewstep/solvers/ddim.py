r"""First-order methods: DDIM and its stochastic relatives, Euler, and the exponential Euler on the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import gauss_legendre
from fewstep.diffusion.scalars import column
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import EtaSolver, Solver, check_number, transfer


def _loss(grid: TimeGrid, i: int) -> Tensor:
    r"""Returns :math:`1 - \rho_{i+1}^2 / \rho_i^2`, the share of the noise that a step removes."""
    return 1 - (grid.rho[i + 1] / grid.rho[i]).square()


@dataclass(frozen=True)
class DDIM(EtaSolver):
    r"""DDIM, deterministic (:math:`\eta = 0`) or stochastic.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} (x_t - \sigma_t \varepsilon) + \sqrt{\sigma_s^2 - s^2} \, \varepsilon
        + s z, \qquad s = \eta \, \sigma_s \sqrt{1 - \rho_s^2 / \rho_t^2}

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), eq. (12), (16)
        | https://arxiv.org/abs/2010.02502

    Cost: one network evaluation per step.

    Order: 1.

    Its default grid of K steps starts at :math:`T (1 - 1 / K)` with :math:`x = \sigma z`, as DDIM does in
    diffusers ("leading"). The state before is nearly all noise, where small networks err most, and one
    long step carries that error to the end.

    Arguments:
        eta: The share :math:`\eta` of the noise of DDPM; 0 is the probability-flow ODE. It may
            exceed 1 as long as :math:`s \le \sigma_s`.
    """

    eta: float = 0.0

    name = "ddim"
    default_grid: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "logistic",
        {"center": -1.0, "scale": 1.5},
    )
    grid_on_flows: ClassVar[str | None] = "uniform"
    starts_late: ClassVar[bool] = True
    spacing: ClassVar[str] = "leading"
    spaces_points: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if not self.eta or grid.is_last_zero(i):
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            share = self.eta**2 * _loss(grid, i)
            if float(share.detach()) > 1:
                most = 1 / float(_loss(grid, i).detach().sqrt())
                raise ValueError(
                    f"eta = {self.eta:g} adds more noise than there is at t = "
                    f"{float(grid.times[i + 1]):.4g} (step {i + 1} of {grid.steps}); "
                    f"at most {most:.4g} is possible there"
                )
            ratio, s = grid.alpha[i + 1] / grid.alpha[i], grid.sigma[i + 1]
            weight = s * torch.sqrt(1 - share) - ratio * grid.sigma[i]
            x = tape.state(ratio * x + weight * f + s * torch.sqrt(share) * tape.noise(), i + 1)
        return x


@dataclass(frozen=True)
class GDDIM(Solver):
    r"""gDDIM: the :math:`\lambda`-family of reverse SDEs, exact on a point mass.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} (x_t - \sigma_t \varepsilon) + \sigma_s q^{\lambda^2} \varepsilon
        + \sigma_s \sqrt{1 - q^{2 \lambda^2}} \, z, \qquad q = \rho_s / \rho_t

    :math:`\lambda = 0` is DDIM, :math:`\lambda = 1` is stochastic DDIM with :math:`\eta = 1`.

    References:
        | gDDIM: Generalized denoising diffusion implicit models (Zhang et al., 2023)
        | https://arxiv.org/abs/2206.05564

    Cost: one network evaluation per step.

    Order: 1.

    Arguments:
        lam: The weight :math:`\lambda` of the noise in the reverse SDE.
    """

    lam: float = 1.0

    name = "gddim"
    spaces_points: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("lam", self.lam)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.lam > 0

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if not self.lam or grid.is_last_zero(i):
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            ratio, s = grid.alpha[i + 1] / grid.alpha[i], grid.sigma[i + 1]
            exponent = self.lam**2 * (grid.lam[i] - grid.lam[i + 1])
            weight = s * exponent.exp() - ratio * grid.sigma[i]
            noise = s * torch.sqrt(-torch.expm1(2 * exponent))
            x = tape.state(ratio * x + weight * f + noise * tape.noise(), i + 1)
        return x


@dataclass(frozen=True)
class DDPM(Solver):
    r"""DDPM: ancestral sampling along the grid, with fixed variances.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} (x_t - \sigma_t \varepsilon) + \sigma_s \frac{\rho_s}{\rho_t} \varepsilon
        + s z, \qquad s^2_{small} = \sigma_s^2 \left(1 - \frac{\rho_s^2}{\rho_t^2}\right), \quad
        s^2_{large} = \sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2} \sigma_s^2

    The small variance is stochastic DDIM with :math:`\eta = 1`; the last step onto
    :math:`\sigma = 0` adds no noise.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 2
        | https://arxiv.org/abs/2006.11239

    Cost: one network evaluation per step.

    Order: 1.

    Arguments:
        variance: ``"small"`` (posterior of a point) or ``"large"`` (of unit-variance data).
    """

    variance: str = "small"

    name = "ddpm"
    spacing: ClassVar[str] = "leading"
    spaces_points: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance must be 'small' or 'large', got {self.variance!r}")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.variance == "small"

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                x = tape.state(transfer(x, f, grid, i, i + 1), i + 1)
                continue
            ratio, s = grid.alpha[i + 1] / grid.alpha[i], grid.sigma[i + 1]
            weight = s * grid.rho[i + 1] / grid.rho[i] - ratio * grid.sigma[i]
            removed = _loss(grid, i).sqrt()
            noise = (s if self.variance == "small" else grid.sigma[i]) * removed
            x = tape.state(ratio * x + weight * f + noise * tape.noise(), i + 1)
        return x


@dataclass(frozen=True)
class AnalyticDDIM(Solver):
    r"""Analytic-DPM's DDIM (A-DDIM): DDIM plus the noise of the optimal variance.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} (x_t - \sigma_t \varepsilon) + \sigma_s \varepsilon + s z, \qquad
        s^2 = \left( \frac{\alpha_s \sigma_t}{\alpha_t} - \sigma_s \right)^2 (1 - \sigma_t^2 \Gamma_t), \qquad
        \Gamma_t = \frac1d E \| \nabla \log p_t \|^2

    :math:`1 - \sigma_t^2 \Gamma_t` is clipped to [0, 1], its range for any data.

    References:
        | Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance (Bao et al., 2022)
        | https://arxiv.org/abs/2201.06503

    Cost: one network evaluation per step, and one estimate of :math:`\Gamma` beforehand.

    Order: 1.

    Arguments:
        gamma: :math:`\Gamma` at the first K grid times. Left out, that of Gaussian data,
            :math:`1 / (\alpha^2 v + \sigma^2)`.
        data_std: The standard deviation :math:`\sqrt v` of the data, for that.
    """

    gamma: Sequence[float] | None = None
    data_std: float = 0.5

    name = "analytic-ddim"
    stochastic: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("data_std", self.data_std)

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        if self.gamma is not None and len(self.gamma) != grid.steps:
            raise ValueError(
                f"gamma must have one value for each of the {grid.steps} steps, got {len(self.gamma)}"
            )
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            a, s = grid.alpha[i], grid.sigma[i]
            if self.gamma is None:
                gamma = 1 / (a.square() * self.data_std**2 + s.square())
            else:
                gamma = torch.tensor(float(self.gamma[i]), dtype=torch.float64)
            form = transfer(x, f, grid, i, i + 1)
            share = (1 - s.square() * gamma).clamp(0, 1)
            if not grid.is_last_zero(i):
                noise = (grid.alpha[i + 1] * s / a - grid.sigma[i + 1]).abs() * share.sqrt()
                form = form + noise * tape.noise()
            x = tape.state(form, i + 1)
        return x


@dataclass(frozen=True)
class Euler(Solver):
    r"""Euler on the probability-flow ODE in time.

    .. math:: x_s = x_t + (s - t) \left( f(t) x_t + \frac{g(t)^2}{2 \sigma_t} \varepsilon \right)

    Here for comparison with DEIS: the linear part is not integrated exactly, so large steps are
    unstable.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), eq. (13)
        | https://arxiv.org/abs/2011.13456

    Cost: one network evaluation per step.

    Order: 1.
    """

    name = "euler"
    ends_above_zero: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        return _euler(tape, grid, 0.0)


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler–Maruyama on the :math:`\lambda`-family of reverse SDEs.

    .. math:: x_s = x_t + (s - t) \left( f(t) x_t + \frac{1 + \lambda^2}{2} \frac{g(t)^2}{\sigma_t} \varepsilon \right)
        + \lambda g(t) \sqrt{t - s} \, z

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456

    Cost: one network evaluation per step.

    Order: 1 (of the marginals).

    Arguments:
        lam: The weight :math:`\lambda` of the noise; 1 is the usual reverse SDE.
    """

    lam: float = 1.0

    name = "euler-maruyama"
    ends_above_zero: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("lam", self.lam)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.lam > 0

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        return _euler(tape, grid, self.lam)


def _euler(tape: Tape, grid: TimeGrid, lam: float) -> Form:
    t, schedule = grid.times, grid.schedule
    if grid.ends_at_zero and schedule.t_zero != 0.0:
        raise ValueError(
            f"Euler's method steps in time, and {schedule.name!r} has no time with sigma = 0; "
            "leave out to_zero"
        )
    inner = t[:-1]
    drift, g2 = column(schedule.drift(inner)), column(schedule.diffusion(inner))
    x = tape.x
    for i in range(grid.steps):
        _, f = tape.evaluate(x, t[i])
        step = t[i + 1] - t[i]
        slope = (1 + lam**2) / 2 * g2[i] / grid.sigma[i]
        form = (1 + step * drift[i]) * x + step * slope * f
        if lam and not grid.is_last_zero(i):
            form = form + lam * torch.sqrt(-step * g2[i]) * tape.noise()
        x = tape.state(form, i + 1)
    return x


@dataclass(frozen=True)
class EIScore(Solver):
    r"""The exponential Euler method on the score: the linear part exact, the score frozen.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t - \alpha_s \int_{\rho_t}^{\rho_s} \alpha \rho \, d\rho \;
        \nabla \log p_t(x_t)

    For variance-preserving schedules the weight is :math:`\alpha_s / \alpha_t - 1`. Worse than
    Euler: the score grows like :math:`1 / \sigma` within a step, which freezing ignores. It is
    here for comparison: it shows why DEIS works with :math:`\varepsilon`.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), ingredient 1
        | https://arxiv.org/abs/2204.13902

    Cost: one network evaluation per step.

    Order: 1.
    """

    name = "ei-score"
    ends_above_zero: ClassVar[bool] = True
    prediction: ClassVar[Prediction] = Prediction.SCORE
    exact: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        schedule = grid.schedule

        # In u = log rho the integrand is alpha rho^2; all steps at once.
        inner = grid.steps - 1 if grid.ends_at_zero else grid.steps
        x_nodes, w_nodes = gauss_legendre(48)
        edges = -grid.lam[: inner + 1]
        half = edges.diff()[:, None] / 2
        u = (edges[1:] + edges[:-1])[:, None] / 2 + half * x_nodes
        values = schedule.alpha(schedule.time(-u.reshape(-1))).reshape(u.shape) * (2 * u).exp()
        areas = column((half * w_nodes * values).sum(1))
        x = tape.x
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            if grid.is_last_zero(i):
                ratio = grid.alpha[i + 1] / grid.alpha[i]
                x = tape.state(ratio * x + ratio * grid.sigma[i].square() * f, i + 1)
                continue
            form = grid.alpha[i + 1] / grid.alpha[i] * x - grid.alpha[i + 1] * areas[i] * f
            x = tape.state(form, i + 1)
        return x

r"""Solvers of the reverse SDE in data prediction: DPM-Solver++ SDE, SA-Solver and ER-SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import gauss_legendre, phi
from fewstep.diffusion.scalars import column
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.ancestral import level_below
from fewstep.solvers.base import EtaSolver, Solver, check_number, check_order, staged_nfe
from fewstep.solvers.dpm import difference
from fewstep.solvers.exponential import exponential_weights


@dataclass(frozen=True)
class DPMppSDE(EtaSolver):
    r"""DPM-Solver++ SDE: single step with a stage within, noise in both halves of the step.

    With :math:`y = x / \alpha`, the ancestral level :math:`\rho_d` of a pair of levels (that of
    :class:`~fewstep.solvers.ancestral.EulerAncestral`) and the stage m at a share r of the step in :math:`\lambda`:

    .. math:: y_m &= \frac{\rho_{d(m)}}{\rho_t} y_t + \left( 1 - \frac{\rho_{d(m)}}{\rho_t} \right) D_t
        + \sqrt{\rho_m^2 - \rho_{d(m)}^2} \, z_m \\
        y_s &= \frac{\rho_{d(s)}}{\rho_t} y_t + \left( 1 - \frac{\rho_{d(s)}}{\rho_t} \right)
        \left( D_t + \frac{D_m - D_t}{2 r} \right) + \sqrt{\rho_s^2 - \rho_{d(s)}^2} \, z_s

    :math:`z_m` and :math:`z_s` are increments of one Brownian motion in :math:`\rho`:
    :math:`z_s = c z_m + \sqrt{1 - c^2} z'` with :math:`c^2 = (\rho_t - \rho_m) / (\rho_t - \rho_s)`.

    References:
        | k-diffusion (Crowson, 2022), DPM-Solver++ (stochastic)
        | https://github.com/crowsonkb/k-diffusion
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
        | https://arxiv.org/abs/2211.01095

    Cost: two network evaluations per step; one in a last step onto :math:`\sigma = 0`.

    Order: 1 of the marginals; 2 with :math:`\eta = 0`.

    Arguments:
        eta: The share of noise.
        r: The place of the stage in the step.
    """

    eta: float = 1.0
    r: float = 0.5

    name = "dpmpp-sde"
    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})
    grid_on_flows: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("r", self.r, low=0.05, high=0.95)

    @property
    def order(self) -> int:
        return 1 if self.eta else 2

    def nfe(self, steps: int, *, ends_at_zero: bool = False) -> int:
        return staged_nfe(2, steps, ends_at_zero=ends_at_zero)

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x = tape.x
        for i in range(grid.steps):
            x, f = tape.evaluate(x, grid.times[i])
            a, rho, end = grid.alpha[i + 1], grid.rho[i], grid.rho[i + 1]
            if grid.is_last_zero(i):
                x = tape.state(a * f, i + 1)
                continue
            lam = grid.lam[i] + self.r * (grid.lam[i + 1] - grid.lam[i])
            time = grid.schedule.time(lam)
            scale, middle = grid.schedule.alpha(time), (-lam).exp()
            down = level_below(rho, middle, self.eta)
            u = scale / grid.alpha[i] * (down / rho) * x + scale * (1 - down / rho) * f
            z = None
            if self.eta:
                z = tape.noise()
                u = u + scale * torch.sqrt(middle.square() - down.square()) * z
            _, g = tape.evaluate(u, time)
            down = level_below(rho, end, self.eta)
            share = 1 / (2 * self.r)
            form = a / grid.alpha[i] * (down / rho) * x
            form = form + a * (1 - down / rho) * ((1 - share) * f + share * g)
            if z is not None:
                common = (rho - middle) / (rho - end)
                spread = a * torch.sqrt(end.square() - down.square())
                form = form + spread * torch.sqrt(common) * z
                form = form + spread * torch.sqrt(1 - common) * tape.noise()
            x = tape.state(form, i + 1)
        return x


@dataclass(frozen=True)
class DPMpp3MSDE(EtaSolver):
    r"""DPM-Solver++(3M) SDE: multistep for the reverse SDE with three model outputs.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t + \alpha_s (1 - e^{-z}) D_t
        + \alpha_s z \varphi_2(-z) D' + \alpha_s z \varphi_3(-z) D'' + \sigma_s \sqrt{1 - e^{-2 \eta h}} \, \xi,
        \qquad z = (1 + \eta) h

    with the slope :math:`D'` and the second divided difference :math:`D''` of the model outputs in
    :math:`\lambda`, scaled by the step h, as in :class:`~fewstep.solvers.dpm.DPMpp3M`. The second step has two outputs.

    References:
        | k-diffusion (Crowson, 2022), DPM-Solver++(3M) SDE
        | https://github.com/crowsonkb/k-diffusion
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022)
        | https://arxiv.org/abs/2211.01095

    Cost: one network evaluation per step.

    Order: 1 of the marginals in general, 2 as :math:`\eta \to 0`.

    Arguments:
        eta: The weight of the noise; 1 is the reverse SDE.
        lower_final: Whether the last two steps have two outputs and one.
    """

    eta: float = 1.0
    lower_final: bool = True

    name = "dpmpp-3m-sde"
    lowers_final: ClassVar[bool] = True
    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {"scale": 3.0})

    @property
    def order(self) -> int:
        return 1 if self.eta else 2

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        x, history = tape.x, list[Form]()
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[:2]]
            a, s = grid.alpha[i + 1], grid.sigma[i + 1]
            if grid.is_last_zero(i):
                x = tape.state(a * f, i + 1)
                continue
            h = grid.lam[i + 1] - grid.lam[i]
            z = (1 + self.eta) * h
            form = s / grid.sigma[i] * torch.exp(-self.eta * h) * x - a * torch.expm1(-z) * f
            count = min(len(history), grid.steps - i) if self.lower_final else len(history)
            if count > 1:
                slope = difference(grid, i, history[0], history[1])
                if count > 2:
                    older = difference(grid, i, history[1], history[2], back=2)
                    near = (grid.lam[i] - grid.lam[i - 1]) / h
                    far = (grid.lam[i - 1] - grid.lam[i - 2]) / h
                    curve = (slope - older) / (near + far)
                    slope = slope + near * curve
                    form = form + a * z * phi(3, -z) * curve
                form = form + a * z * phi(2, -z) * slope
            if self.eta:
                form = form + s * torch.sqrt(-torch.expm1(-2 * self.eta * h)) * tape.noise()
            x = tape.state(form, i + 1)
        return x


@dataclass(frozen=True)
class SASolver(Solver):
    r"""SA-Solver: stochastic Adams methods, predictor and corrector with the same noise.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} e^{-\tau^2 h} x_t + \alpha_s \sum_j w_j D_j
        + \sigma_s \sqrt{1 - e^{-2 \tau^2 h}} \, \xi, \qquad
        w_j = z \int_0^1 e^{-z (1 - u)} \ell_j(u) \, du, \qquad z = (1 + \tau^2) h

    The predictor interpolates older model outputs, the corrector the one at the predicted point too, which
    is not evaluated again at the corrected one. With two outputs the weight of the slope is :math:`z / 2`, as
    in the authors' code. Corrector and next predictor are one row here, as in :class:`~fewstep.solvers.unipc.UniPC`.

    References:
        | SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models (Xue et al., 2023)
        | https://arxiv.org/abs/2309.05019

    Cost: one network evaluation per step.

    Order: 1 of the marginals in general. Without noise that of the corrector, at most one more than that of the
    predictor; without corrector that of the predictor, and at most 2 as steps go to infinity, as the first step is then
    of first order. At most 2 with ``lower_final``.

    Arguments:
        predictor: The number of model outputs of the predictor, 1 to 3.
        corrector: That of the corrector, 1 to 3; 0 is no corrector.
        tau: The weight :math:`\tau` of the noise; 1 is the reverse SDE, 0 the ODE.
        rho_min: Noise is added from this level :math:`\rho = \sigma / \alpha` on,
        rho_max: up to this one; the authors leave it out at both ends.
        lower_final: Whether the last steps have fewer outputs, down to 1.
    """

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    rho_min: float = 0.0
    rho_max: float = 1e9
    lower_final: bool = True

    name = "sa-solver"
    lowers_final: ClassVar[bool] = True
    always_lowers_final: ClassVar[bool] = True
    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {"scale": 0.7})

    def __post_init__(self) -> None:
        check_order("sa-solver (predictor)", self.predictor, 1, 3)
        check_order("sa-solver (corrector)", self.corrector, 0, 3)
        for name in ("tau", "rho_min", "rho_max"):
            check_number(name, getattr(self, name))

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.tau > 0

    @property
    def order(self) -> int:
        if self.tau:
            return 1
        inside = min(self.corrector, self.predictor + 1) if self.corrector else self.predictor
        return min(inside, 2) if self.lower_final else inside

    @property
    def first_order_start(self) -> bool:  # type: ignore[override]
        return not self.corrector

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        y, history = tape.x, list[Form]()
        predicted: Form | None = None
        for i in range(grid.steps):
            y, f = tape.evaluate(y, grid.times[i])
            x = y
            left = grid.steps - i
            if predicted is not None and self.corrector:
                # Both start at one state and have the same noise, so the outputs alone differ.
                count = min(self.corrector, len(history) + 1)
                count = min(count, left + 2) if self.lower_final else count
                x = y + self._change(grid, i - 1, [f, *history][:count], True) - predicted
            history = [f, *history[: max(self.predictor, self.corrector - 1) - 1]]
            a, s = grid.alpha[i + 1], grid.sigma[i + 1]
            if grid.is_last_zero(i):
                y = tape.state(a * f, i + 1)
                continue
            count = min(self.predictor, len(history))
            count = min(count, left) if self.lower_final else count
            predicted = self._change(grid, i, history[:count], False)
            power = self._tau(grid, i) ** 2
            h = grid.lam[i + 1] - grid.lam[i]
            form = s / grid.sigma[i] * torch.exp(-power * h) * x + predicted
            if power:
                form = form + s * torch.sqrt(-torch.expm1(-2 * power * h)) * tape.noise()
            y = tape.state(form, i + 1)
        return y

    def _tau(self, grid: TimeGrid, i: int) -> float:
        return self.tau if self.rho_min <= float(grid.rho[i].detach()) <= self.rho_max else 0.0

    def _change(self, grid: TimeGrid, i: int, outputs: list[Form], corrects: bool) -> Form:
        """What the model outputs add in step i, newest first; of the corrector the first is at its end."""
        h = grid.lam[i + 1] - grid.lam[i]
        z = (1 + self._tau(grid, i) ** 2) * h
        first = i + 1 if corrects else i
        nodes: list[Any] = [(grid.lam[first - k] - grid.lam[i]) / h for k in range(len(outputs))]
        if len(outputs) == 2:
            total, slope = -torch.expm1(-z), 0.5 * z / (nodes[0] - nodes[1])
            base = total * (outputs[1] if corrects else outputs[0])
            form = base + slope * (outputs[0] - outputs[1])
        else:
            form = Form({})
            for weight, output in zip(exponential_weights(nodes, z), outputs, strict=True):
                form = form + weight * output
        return grid.alpha[i + 1] * form


def _noise_scale(log_rho: Tensor) -> Tensor:
    r"""Returns :math:`\phi(\rho) / \rho = e^{\rho^{0.3}} + 10`, the noise scale that the authors found best."""
    return torch.exp(torch.exp(0.3 * log_rho)) + 10.0


@dataclass(frozen=True)
class ERSDE(Solver):
    r"""ER-SDE: multistep for an extended reverse SDE whose noise falls off towards the data.

    With :math:`\phi(\rho) = \rho (e^{\rho^{0.3}} + 10)`, :math:`r = \phi(\rho_s) / \phi(\rho_t)` and the
    divided differences :math:`D', D''` of the model outputs in :math:`\rho`:

    .. math:: y_s = r y_t + (1 - r) D_t + \left( \rho_s - \rho_t + \phi(\rho_s) \int_{\rho_s}^{\rho_t} \frac{d\rho}{\phi} \right) D'
        + \left( \frac{(\rho_s - \rho_t)^2}{2} + \phi(\rho_s) \int_{\rho_s}^{\rho_t} \frac{\rho - \rho_t}{\phi} \, d\rho \right) D''
        + \sqrt{\rho_s^2 - r^2 \rho_t^2} \, z, \qquad y = x / \alpha

    The integrals are Gauss–Legendre in :math:`\log\rho`; the authors' code, and ComfyUI, have sums of 100 and
    200 points. A last step onto :math:`\sigma = 0` is the network's data.

    References:
        | Elucidating the solution space of extended reverse-time SDE for diffusion models (Cui et al., 2023)
        | https://arxiv.org/abs/2309.06169

    Cost: one network evaluation per step.

    Order: 1 of the marginals.

    Arguments:
        outputs: The number of model outputs, 1 to 3.
    """

    outputs: int = 3

    name = "er-sde"
    prediction: ClassVar[Prediction] = Prediction.X0
    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[tuple[str, Any]] = ("logistic", {})

    def __post_init__(self) -> None:
        check_order("er-sde (outputs)", self.outputs, 1, 3)

    @property
    def order(self) -> int:
        return 1

    def _integrals(self, grid: TimeGrid) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\int d\rho / \phi` and :math:`\int (\rho - \rho_t) / \phi \, d\rho` of all steps."""
        inner = grid.steps - 1 if grid.ends_at_zero else grid.steps
        nodes, shares = gauss_legendre(32)
        edges = -grid.lam[: inner + 1]
        half = -edges.diff()[:, None] / 2
        u = (edges[1:] + edges[:-1])[:, None] / 2 + half * nodes
        weight = half * shares / _noise_scale(u)  # d rho / phi = du / (phi / rho)
        gap = u.exp() - edges[:-1, None].exp()
        return column(weight.sum(1)), column((weight * gap).sum(1))

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        plain, moment = self._integrals(grid)
        rho, x = grid.rho, tape.x
        history: list[Form] = []
        slopes: list[Form] = []
        for i in range(grid.steps):
            _, f = tape.evaluate(x, grid.times[i])
            history = [f, *history[:1]]
            a = grid.alpha[i + 1]
            if grid.is_last_zero(i):
                x = tape.state(a * f, i + 1)
                continue
            start, end = (rho[k] * _noise_scale(-grid.lam[k]) for k in (i, i + 1))
            ratio, step = end / start, rho[i + 1] - rho[i]
            form = a / grid.alpha[i] * ratio * x + a * (1 - ratio) * f
            if self.outputs > 1 and i:
                slope = (history[0] - history[1]) / (rho[i] - rho[i - 1])
                form = form + a * (step + end * plain[i]) * slope
                slopes = [slope, *slopes[:1]]
                if self.outputs > 2 and i > 1:
                    curve = 2 * (slopes[0] - slopes[1]) / (rho[i] - rho[i - 2])
                    form = form + a * (step.square() / 2 + end * moment[i]) * curve
            spread = torch.sqrt(rho[i + 1].square() - (ratio * rho[i]).square())
            x = tape.state(form + a * spread * tape.noise(), i + 1)
        return x

r"""UniPC: a predictor and a corrector that share their network evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import phi
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import Solver, check_order


@dataclass(frozen=True)
class UniPC(Solver):
    r"""UniPC of order p in data prediction: UniP-p predicts, UniC-p corrects.

    From grid point t to s, :math:`h = \lambda_s - \lambda_t`, with the differences
    :math:`D_k = (m_k - m_0) / r_k` of the model outputs at :math:`\lambda_t + r_k h`:

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t - \alpha_s (e^{-h} - 1) m_0 - \alpha_s B(h) \sum_k a_k D_k,
        \qquad \sum_k r_k^{n-1} a_k = \frac{n! \, (-h) \varphi_{n+1}(-h)}{B(h)}

    The predictor uses the p - 1 older model outputs, the corrector one more: the one at the
    predicted point, which is not computed again at the corrected one. Corrector and next predictor
    are one row here, so the states between steps are the predicted ones, as the network sees them.
    The order grows from 1 in the first steps, and with ``lower_final`` (as in diffusers at any number of steps) falls to 1
    in the last ones.

    References:
        | UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao et al., 2023)
        | https://arxiv.org/abs/2302.04867

    Cost: one network evaluation per step.

    Order: p, and p + 1 observed where the first steps do not matter; at most 2 with
    ``lower_final``, whose last step is of first order. As steps go to infinity it is at most 3, as the first step is
    DDIM's, corrected once.

    Arguments:
        degree: The order p, 1 to 3.
        variant: The function B: ``"bh1"`` is :math:`-h`, ``"bh2"`` is :math:`e^{-h} - 1`.
        lower_final: Whether the order falls to 1 in the last steps.
    """

    degree: int = 2
    variant: str = "bh2"
    lower_final: bool = True

    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Mapping[str, Any]]] = ("power", {"power": 1.05})
    twin = "diffusers:UniPCMultistepScheduler"
    lowers_final: ClassVar[bool] = True
    always_lowers_final: ClassVar[bool] = True
    starts_flows_at_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_order("unipc", self.degree, 1, 3)
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"unipc{self.degree}"

    @property
    def order(self) -> int:
        return min(self.degree, 2) if self.lower_final else self.degree

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        y = tape.x
        outputs = list[Form]()
        predictor, degree = None, 1
        for i in range(grid.steps):
            y, f = tape.evaluate(y, grid.times[i])
            x = y
            if predictor is not None:
                # Both start at one state, so what the corrector changes is in the outputs alone.
                x = y + self._change(grid, i - 1, degree, outputs, f) - predictor
            outputs = [f, *outputs[: self.degree - 1]]
            degree = min(self.degree, i + 1)
            if grid.is_last_zero(i):
                degree = 1
            elif self.lower_final:
                degree = min(degree, grid.steps - i)
            predictor = self._change(grid, i, degree, outputs, None)
            ends = grid.is_last_zero(i)  # the weight of the state is zero there
            form = predictor if ends else grid.sigma[i + 1] / grid.sigma[i] * x + predictor
            y = tape.state(form, i + 1)
        return y

    def _change(
        self, grid: TimeGrid, i: int, degree: int, outputs: list[Form], newest: Form | None
    ) -> Form:
        """What step i of order ``degree`` adds: predictor, or corrector if the output at its end is given."""
        lam, a = grid.lam, grid.alpha[i + 1]
        h = lam[i + 1] - lam[i]
        expm1 = torch.expm1(-h)
        form = -a * expm1 * outputs[0]
        ratios: list[Any] = [(lam[i - k] - lam[i]) / h for k in range(1, degree)]
        slopes = [
            (outputs[k] - outputs[0]) / r for k, r in zip(range(1, degree), ratios, strict=True)
        ]
        if newest is not None:
            ratios.append(1.0)
            slopes.append(newest - outputs[0])
        if not slopes:
            return form
        scale = -h if self.variant == "bh1" else expm1
        for c, slope in zip(self._weights(h, ratios, scale), slopes, strict=True):
            form = form - a * scale * c * slope
        return form

    @staticmethod
    def _weights(h: Tensor, ratios: list[Any], scale: Tensor) -> list[Any]:
        count = len(ratios)
        if count == 1:
            # One difference: the value that UniPC's authors use, instead of the solution of the system.
            return [0.5]
        b = [math.factorial(n) * -h * phi(n + 1, -h) / scale for n in range(1, count + 1)]
        # The system is a Vandermonde matrix: a_k has the coefficients of the Lagrange basis at r_k.
        if count == 2:
            r, s = ratios
            return [(b[1] - s * b[0]) / (r - s), (b[1] - r * b[0]) / (s - r)]
        solution = []
        for k, r in enumerate(ratios):
            s, u = (other for j, other in enumerate(ratios) if j != k)
            solution.append((b[2] - (s + u) * b[1] + s * u * b[0]) / ((r - s) * (r - u)))
        return solution

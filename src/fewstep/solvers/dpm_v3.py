r"""DPM-Solver-v3: exponential multistep in the parametrisation that suits a model, by its measured statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.quadrature import integrate, lagrange
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import NEARLY_UNIFORM, Solver, check_order
from fewstep.solvers.exponential import exponential_weights

MOST_LEVELS = 10_000
"""The most noise levels of statistics; more is a damaged or a hostile file."""


class Statistics:
    r"""The functions :math:`l(\lambda)` and :math:`s(\lambda)` through measured values, and their integrals.

    Piecewise cubics without overshoot (PCHIP) between the levels, constant beyond them. They have a continuous slope, which
    a method of third order needs, and exact integrals.

    Arguments:
        rows: For each level :math:`(\lambda, l, s)`, in ascending order of :math:`\lambda`.
    """

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        levels, *functions = ([row[k] for row in rows] for k in range(3))
        cubics = [_cubics(levels, values) for values in functions]
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self._cubics = torch.tensor(cubics, dtype=torch.float64)  # (2, pieces, 4)
        steps = self.levels.diff() if len(rows) > 1 else torch.ones(1, dtype=torch.float64)
        whole = _polynomial(self._cubics, steps, integral=True).cumsum(1)
        self._areas = torch.cat([torch.zeros(2, 1, dtype=torch.float64), whole], 1)

    def at(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns l and s at points :math:`\lambda`."""
        piece, past, _ = self._place(lam)
        linear, scale = _polynomial(self._cubics[:, piece], past)
        return linear, scale

    def integrals(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\int l` and :math:`\int s` from the first level to points :math:`\lambda`."""
        piece, past, beyond = self._place(lam)
        cubics = self._cubics[:, piece]
        areas = self._areas[:, piece] + _polynomial(cubics, past, integral=True)
        linear, scale = areas + beyond * _polynomial(cubics, past)
        return linear, scale

    def _place(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the piece of each point, how far it is in the piece, and how far beyond all levels."""
        inside = lam.clamp(float(self.levels[0]), float(self.levels[-1]))
        piece = torch.searchsorted(self.levels, inside.detach().contiguous(), right=True) - 1
        piece = piece.clamp(0, self._cubics.shape[1] - 1)
        return piece, inside - self.levels[piece], lam - inside


def _polynomial(cubics: Tensor, past: Tensor, *, integral: bool = False) -> Tensor:
    """Returns the values of cubics with coefficients (..., 4), lowest degree first, or their integrals from 0."""
    total = torch.zeros_like(past)
    for k in (3, 2, 1, 0):
        total = total * past + cubics[..., k] / (k + 1 if integral else 1)
    return total * past if integral else total


def _cubics(levels: list[float], values: list[float]) -> list[list[float]]:
    """Returns the coefficients of the monotone cubic in each piece (Fritsch & Butland, 1984)."""
    if len(levels) == 1:
        return [[values[0], 0.0, 0.0, 0.0]]
    steps = [b - a for a, b in itertools.pairwise(levels)]
    chords = [(b - a) / h for (a, b), h in zip(itertools.pairwise(values), steps, strict=True)]
    slopes = [chords[0], *(0.0 for _ in chords[1:]), chords[-1]]
    for k in range(1, len(chords)):
        before, after = chords[k - 1], chords[k]
        if before * after > 0:
            a, b = 2 * steps[k] + steps[k - 1], steps[k] + 2 * steps[k - 1]
            slopes[k] = (a + b) / (a / before + b / after)
    cubics = []
    for k, (h, chord) in enumerate(zip(steps, chords, strict=True)):
        left, right = slopes[k], slopes[k + 1]
        second, third = (3 * chord - 2 * left - right) / h, (left + right - 2 * chord) / (h * h)
        cubics.append([values[k], left, second, third])
    return cubics


@dataclass(frozen=True)
class DPMSolverV3(Solver):
    r"""DPM-Solver-v3: predictor and corrector in the parametrisation of measured statistics.

    In :math:`\lambda = \log(\alpha / \sigma)` the probability-flow ODE is :math:`d(x / \alpha) / d\lambda = -(\sigma / \alpha) \varepsilon`.
    A linear term with any :math:`l(\lambda)` can be split off and integrated exactly, and what remains can be rescaled with any
    :math:`s(\lambda)`:

    .. math:: f = \frac{\sigma \varepsilon - l x}{\alpha} = \frac{(1 - l) x}{\alpha} - D, \qquad
        g(\lambda) = e^{-\int_t^\lambda s} f(\lambda), \\
        x_s = \alpha_s \, e^{-\int_t^s l} \left( \frac{x_t}{\alpha_t}
            - \int_{\lambda_t}^{\lambda_s} e^{\int_t^\lambda (l + s)} \, g(\lambda) \, d\lambda \right)

    This is exact for any l and s. The solver integrates the polynomial in :math:`\lambda` through the last q values of g; l and s decide
    how well that suits the model. The paper minimises the error of a step of first order: l so that f depends least on x, s so
    that g changes least along a trajectory,

    .. math:: l = \frac{\sigma}{d} \, \mathbb{E} \, \mathrm{tr} \, \nabla_x \varepsilon, \qquad
        s = \frac{\mathbb{E} \langle f, f' \rangle}{\mathbb{E} \langle f, f \rangle}, \qquad f' = \frac{df}{d\lambda},

    which :func:`fewstep.fit` measures, one number for each noise level. Known members of the family: :math:`l = 1, s = 0` is the exponential
    multistep method in data prediction (``res-2m``, ``res-3m``), :math:`l = 0, s = -1` that in noise prediction (``logrhoab0`` to ``2``).

    The corrector interpolates through the value at the predicted point too, in place of the oldest one. As in the published code that value
    stays the one at the predicted state, and a first step has none. A last step onto :math:`\sigma = 0` is the network's data.
    With ``lower_final`` the last step is one of data prediction of first order whatever the statistics are, so that no noise is left in the sample;
    in the published code it is of first order in their parametrisation, which is 3 % worse on the embedded model at 5, 8 and 12 evaluations.

    What differs from the paper: its l and s, and a third statistic b, have one number for each coordinate and noise level.
    Here they are the same for all coordinates, so that a plan serves any shape, and b, the mean of what s leaves
    of :math:`f'`, is 0. Integrals are exact for cubics through the measured levels, where the
    paper has sums over 1,200 levels: so a few dozen levels are enough.

    With statistics a step is not exact on data of one point; its error falls with the order of the method, as that of
    everything else. Statistics of another model cost accuracy at few steps, and nothing at many. They are means
    over all samples: where samples differ much, as on mixtures in two dimensions, a sampler without them can be several times better.

    References:
        | DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics (Zheng et al., 2023), (5), (8), (10), (11)
        | https://arxiv.org/abs/2310.13268

    Cost: one network evaluation per step.

    Order: q; at most 2 with ``lower_final``, and as steps go to infinity, as the first step is of first order.

    Arguments:
        outputs: The number q of model outputs of a step, 1 to 3.
        statistics: For each measured noise level :math:`(\lambda, l, s)`, ascending in :math:`\lambda`; constant beyond the ends. Left
            out, l = 1 and s = 0 everywhere: data prediction.
        corrector: Whether each state is corrected once its model output is known; this costs no evaluation.
        lower_final: Whether the last steps have fewer outputs, down to 1, and the last one is in data prediction.
    """

    outputs: int = 3
    statistics: Sequence[Sequence[float]] = ()
    corrector: bool = True
    lower_final: bool = True

    name = "dpm-solver-v3"
    prediction: ClassVar[Prediction] = Prediction.X0
    default_grid: ClassVar[tuple[str, Mapping[str, Any]]] = NEARLY_UNIFORM
    lowers_final: ClassVar[bool] = True
    first_order_start: ClassVar[bool] = True
    measured: ClassVar[str | None] = "statistics"

    def __post_init__(self) -> None:
        check_order("dpm-solver-v3 (outputs)", self.outputs, 1, 3)
        rows = check_statistics(self.statistics)
        object.__setattr__(self, "statistics", rows)
        # A step in data prediction is exact on a point; in any other parametrisation it is not.
        object.__setattr__(self, "exact", not rows)

    @property
    def order(self) -> int:
        return min(self.outputs, 2) if self.lower_final else self.outputs

    @cached_property
    def _measured(self) -> Statistics | None:
        return Statistics(self.statistics) if self.statistics else None

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        y = tape.x
        values = list[Form]()  # -f at the newest grid points, newest first
        predictor, count = None, 1
        for i in range(grid.steps):
            y, output = tape.evaluate(y, grid.times[i])
            values = [self._value(grid, i, y, output), *values[: self.outputs - 1]]
            x = y
            if self.corrector and predictor is not None and count > 1:
                places = [i - 1, i, *range(i - 2, i - count, -1)]
                used = [values[i - place] for place in places]
                # Both start at one state, so what the corrector changes is in the values of f alone.
                x = y + self._change(grid, i - 1, places, used) - predictor
            if grid.is_last_zero(i):
                y = tape.state(grid.alpha[i + 1] * output, i + 1)
                continue
            if self.lower_final and i == grid.steps - 1:
                y = tape.state(_data_step(x, output, grid, i), i + 1)
                continue
            count = len(values)
            if self.lower_final:
                count = min(count, grid.steps - i)
            places = list(range(i, i - count, -1))
            predictor = self._change(grid, i, places, values[:count])
            y = tape.state(self._decay(grid, i) * x + predictor, i + 1)
        return y

    def _value(self, grid: TimeGrid, i: int, x: Form, output: Form) -> Form:
        r"""Returns :math:`-f = D - (1 - l) x / \alpha` at a grid point."""
        if self._measured is None:
            return output
        (linear, _) = self._measured.at(_plain(grid.lam)[i : i + 1])
        return output - ((1 - linear[0]) / grid.alpha[i]) * x

    def _decay(self, grid: TimeGrid, i: int) -> Any:
        r"""Returns the factor of the state in step i, :math:`(\alpha_s / \alpha_t) \exp(-\int l)`."""
        if self._measured is None:
            return grid.sigma[i + 1] / grid.sigma[i]
        area, _ = self._measured.integrals(_plain(grid.lam)[i : i + 2])
        return grid.alpha[i + 1] / grid.alpha[i] * (area[0] - area[1]).exp()

    def _change(self, grid: TimeGrid, i: int, places: list[int], values: list[Form]) -> Form:
        """Returns what step i adds to the decayed state: the integral of the polynomial through values of f."""
        lam, a = grid.lam, grid.alpha[i + 1]
        h = lam[i + 1] - lam[i]
        if self._measured is None:
            weights = exponential_weights([(lam[k] - lam[i]) / h for k in places], h)
        else:
            weights = self._weights(self._measured, _plain(lam), i, places)
        form = Form({})
        for weight, value in zip(weights, values, strict=True):
            form = form + (a * weight) * value
        return form

    @staticmethod
    def _weights(statistics: Statistics, lam: Tensor, i: int, places: list[int]) -> list[Any]:
        r"""Returns the weights of f at grid points in step i.

        .. math:: w_j = e^{-\int_t^{\lambda_j} s} \int_{\lambda_t}^{\lambda_s} e^{-\int_\lambda^s l + \int_t^\lambda s} \, \ell_j(\lambda) \, d\lambda
        """
        nodes = [lam[k] for k in places]
        start, end = lam[i], lam[i + 1]
        linear, scale = statistics.integrals(torch.stack([start, end, *nodes]))

        def integrand(u: Tensor) -> Tensor:
            to_linear, to_scale = statistics.integrals(u)
            return (to_linear - linear[1] + to_scale - scale[0]).exp() * lagrange(nodes, u)

        levels = statistics.levels
        kinks = levels[(levels > start.detach()) & (levels < end.detach())]
        rows = integrate(integrand, start, end, breaks=kinks)
        weights = rows * (scale[0] - scale[2:]).exp()
        return list(weights.unbind()) if weights.requires_grad else weights.tolist()


def _data_step(x: Form, data: Form, grid: TimeGrid, i: int) -> Form:
    r"""Returns step i in data prediction, :math:`\frac{\sigma_s}{\sigma_t} x + \left( \alpha_s - \frac{\sigma_s}{\sigma_t} \alpha_t \right) D`."""
    ratio = grid.sigma[i + 1] / grid.sigma[i]
    return ratio * x - (grid.alpha[i + 1] * torch.expm1(grid.lam[i] - grid.lam[i + 1])) * data


def check_statistics(value: object) -> tuple[tuple[float, float, float], ...]:
    r"""Returns statistics as rows of numbers.

    Raises:
        TypeError: If they are no rows of numbers.
        ValueError: If a row has not :math:`(\lambda, l, s)`, finite, or levels do not ascend.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        rows = [tuple(float(v) for v in row) for row in value]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise TypeError(
            "the statistics of dpm-solver-v3 are rows (lambda, l, s), as in the profile that fewstep.fit "
            f"measures (profile.statistics), got {value!r:.60}"
        ) from None
    if len(rows) > MOST_LEVELS:
        raise ValueError(
            f"the statistics of dpm-solver-v3 have at most {MOST_LEVELS} rows, got {len(rows)}"
        )
    for k, row in enumerate(rows):
        if len(row) != 3 or not all(math.isfinite(v) for v in row):
            raise ValueError(
                "each row of the statistics of dpm-solver-v3 has three finite numbers, lambda, l and s; "
                f"row {k} is {row!r:.60}"
            )
        if k and not row[0] > rows[k - 1][0]:
            raise ValueError(
                f"the statistics of dpm-solver-v3 ascend in lambda; row {k} has {row[0]:g} after "
                f"{rows[k - 1][0]:g}"
            )
    return tuple(rows)  # type: ignore[return-value]


def _plain(values: Tensor) -> Tensor:
    """Returns a vector whose elements are tensors."""
    return values.as_subclass(Tensor)

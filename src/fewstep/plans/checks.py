r"""What a plan does, exactly: on a point mass, on Gaussian data, and as a table.

On such data the optimal network is affine, so a plan can be run on the *weights* of the data,
of the initial draw and of the further draws, instead of on samples: closed form, no sampling.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, coefficients, mixture
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise

MOST_COORDINATES = 64
"""How many coordinates the noise of a register has in the point-mass check before they are compressed."""


class Moments(NamedTuple):
    """The mean and the variance of the samples, each coordinate, float64 scalars."""

    mean: Tensor
    variance: Tensor


def _weights(plan: Plan, variance: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    r"""Returns the weights of the result over (data mean, initial draw, draws), data :math:`N(m, V)`.

    ``alpha`` and ``sigma`` are those of the initial state.
    """
    width = 2 + plan.n_noise
    basis = torch.eye(width, dtype=torch.float64)
    start = alpha * basis[0] + torch.sqrt(alpha.square() * variance + sigma.square()) * basis[1]
    registers: list[Tensor] = [start]
    a, s = plan.scales[:, 0], plan.scales[:, 1]
    # eps(x) = sigma (x - alpha m) / (alpha^2 V + sigma^2), then converted to the plan's prediction.
    slope = s / (a.square() * variance + s.square())
    shift, factor = coefficients(Prediction.EPS, plan.prediction, alpha=a, sigma=s)
    for row in plan.structure.rows:
        if isinstance(row, Lin):
            weights = plan.values[row.offset : row.offset + len(row.terms)]
            registers.append(weights @ torch.stack([registers[r] for r in row.terms]))
        elif isinstance(row, Eval):
            x = registers[row.of]
            eps = slope[row.at] * (x - a[row.at] * basis[0])
            registers.append(shift[row.at] * x + factor[row.at] * eps)
        else:
            assert isinstance(row, Noise)
            registers.append(basis[2 + row.draw])
    return registers[plan.structure.result]


def _start(plan: Plan) -> tuple[Tensor, Tensor]:
    t = plan.knots[0].detach()
    return plan.schedule.alpha(t), plan.schedule.sigma(t)


def point_mass_defect(plan: Plan, alpha: Tensor, sigma: Tensor) -> float:
    r"""Returns how far the plan is from exact when the data are a single point c.

    Then :math:`\varepsilon` is constant along every trajectory: each network input, and the sample,
    must be :math:`\alpha \, c + \sigma z` with a standard normal z. The model outputs are the ideal
    ones, so that rounding is not amplified from evaluation to evaluation as the defect of a slip is.

    Arguments:
        plan: The plan.
        alpha: The scale of the data at the last knot.
        sigma: The scale of the noise at the last knot.
    """
    # A register is the weight of c, and the coordinates of its noise in an orthonormal basis: the
    # draws, or a basis of what the registers still in use span, so that long plans cost no more a row.
    width, used = min(1 + plan.n_noise, MOST_COORDINATES), 1
    with torch.no_grad():
        start_alpha, start_sigma = (float(scale) for scale in _start(plan))
        scales: list[list[float]] = plan.scales.tolist()
        ideal = [p.tolist() for p in mixture(plan.prediction, *plan.scales.unbind(1))]
    numbers, defect = plan.numbers, 0.0
    first = numpy.zeros(width)
    first[0] = start_sigma
    registers: list[tuple[float, Any] | None] = [(start_alpha, first)]

    def eps(state: tuple[float, Any] | None, a: float, s: float) -> Any:
        nonlocal defect
        assert state is not None
        data, noise = state[0], math.sqrt(state[1] @ state[1])
        gap = max(abs(data - a), abs(noise - s))
        defect = gap if not gap <= defect else defect  # NaN stays
        return state[1] / noise if noise else state[1] * math.nan

    for i, row in enumerate(plan.structure.rows):
        if isinstance(row, Lin):
            data, noise = 0.0, 0.0
            for place, r in enumerate(row.terms, start=row.offset):
                c, other = numbers[place], registers[r]
                assert other is not None
                data, noise = data + c * other[0], noise + c * other[1]
            registers.append((data, noise))
        elif isinstance(row, Eval):
            z = eps(registers[row.of], *scales[row.at])
            registers.append((ideal[0][row.at], ideal[1][row.at] * z))
        else:
            if used == width:
                width, used = _compressed(registers)
            draw = numpy.zeros(width)
            draw[used] = 1.0
            used += 1
            registers.append((0.0, draw))
        for r in plan.structure.last_reads[i]:
            registers[r] = None
    eps(registers[plan.structure.result], float(alpha.detach()), float(sigma.detach()))
    return defect


def _compressed(registers: list[Any]) -> tuple[int, int]:
    """Writes the noises of the registers in use in a basis of their span; returns its capacity and its size."""
    live = [k for k, register in enumerate(registers) if register is not None]
    columns = numpy.stack([registers[k][1] for k in live], 1)
    triangle: Any = numpy.linalg.qr(columns, mode="r")
    size = len(triangle)
    width = max(MOST_COORDINATES, 2 * size)
    for column, k in enumerate(live):
        noise = numpy.zeros(width)
        noise[:size] = triangle[:, column]
        registers[k] = (registers[k][0], noise)
    return width, size


def gaussian_moments(plan: Plan, mean: float, std: float) -> Moments:
    r"""Returns mean and variance of the samples if the data are :math:`N(mean, std^2)`, exactly.

    The initial state has the law of the data at the first knot. Differentiable in the plan's
    values and times. The truth at the last knot is :math:`(\alpha m, \alpha^2 s^2 + \sigma^2)`.
    """
    variance = torch.tensor(float(std) ** 2, dtype=torch.float64)
    weights = _weights(plan, variance, *_start(plan))
    return Moments(weights[0] * mean, weights[1:].square().sum())


def table_difference(first: Plan, second: Plan) -> float:
    """Returns the largest difference between two plans' flat tables, relative to their size.

    Raises:
        ValueError: If the plans make different numbers of evaluations or draws, or are written
            for different predictions.
    """
    if (first.nfe, first.n_noise, first.prediction) != (
        second.nfe,
        second.n_noise,
        second.prediction,
    ):
        raise ValueError(f"the tables do not correspond: {first!r} and {second!r}")
    difference = 0.0
    for one, two in zip(first.flat(), second.flat(), strict=True):
        if one.numel():
            size = max(1.0, float(two.abs().max()))
            difference = max(difference, float((one - two).abs().max()) / size)
    return difference

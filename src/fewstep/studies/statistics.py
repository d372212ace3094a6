r"""The statistics of DPM-Solver-v3, measured on a model along its own trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.noise import generator_at
from fewstep.diffusion.prediction import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.studies.reference import Reference, coordinate
from fewstep.studies.spline import spline_slopes

MOVE = 0.05
"""The size of the differences, relative to the noise."""

ROUNDING = 1e-10
"""A smaller share of the mean square of the prediction is rounding."""

ADDRESS = "linear part"
"""The tag of the random directions."""


def measure_statistics(
    denoiser: Denoiser, reference: Reference, *, seed: int = 0, progress: Progress = SILENT
) -> tuple[tuple[float, float, float], ...]:
    r"""Returns the statistics of :class:`fewstep.solvers.dpm_v3.DPMSolverV3`: rows :math:`(\lambda, l, s)`.

    The linear part is the mean trace of the Jacobian, by Hutchinson's estimate with one random direction
    v of signs for each sample and node,

    .. math:: l = \frac{\sigma}{d} \, \mathbb{E} \, \mathrm{tr} \, \nabla_x \varepsilon \approx
        \frac{1}{\delta d} \, \mathbb{E} \langle v, \varepsilon(x + \delta \sigma v) - \varepsilon(x) \rangle,

    a difference instead of a product with the Jacobian: any network can do it, without gradients, and the term of
    second order in :math:`\delta` has mean zero. With it :math:`f = (\sigma \varepsilon - l x) / \alpha` and its
    derivative along the trajectories, that of a cubic spline, give
    :math:`s = \mathbb{E} \langle f, f' \rangle / \mathbb{E} \langle f, f \rangle`.

    Cost: one evaluation of each sample at each node.

    Arguments:
        denoiser: The model, with its guidance.
        reference: Reference trajectories.
        seed: The seed of the random directions.
        progress: Ticks at each evaluation.

    References:
        | DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics (Zheng et al., 2023), (7) and (11); here one number for each noise level, and no bias
        | https://arxiv.org/abs/2310.13268

    Example:
        >>> from fewstep.studies.reference import draw_noise, follow
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> reference = follow(denoiser, draw_noise(denoiser, 8, 0), {}, intervals=12)
        >>> rows = measure_statistics(denoiser, reference)
        >>> len(rows), rows[0][0] < rows[-1][0]
        (13, True)
    """
    schedule, times = reference.schedule, reference.times
    lam, sigma = schedule.lam(times), schedule.sigma(times)
    traces = list[float]()
    for node in range(len(times)):
        x, eps = reference.x[node], reference.eps[node]
        v = _signs(x, seed, node)
        with torch.no_grad():
            moved = denoiser(
                x + MOVE * float(sigma[node]) * v,
                float(times[node]),
                prediction=Prediction.EPS,
                **reference.cond,
            )
        progress.tick()
        traces.append(float((v * (moved - eps)).cpu().double().mean()) / MOVE)
    scales = _scales(reference, torch.tensor(traces, dtype=torch.float64))
    return tuple(zip(lam.tolist(), traces, scales.tolist(), strict=True))


def _signs(x: Tensor, seed: int, node: int) -> Tensor:
    r"""Returns a random direction of signs for each sample, with shape (B, \*)."""
    samples = [
        torch.randint(0, 2, x.shape[1:], generator=generator_at(ADDRESS, seed, sample, node))
        for sample in range(len(x))
    ]
    return (2 * torch.stack(samples) - 1).to(x)


def _scales(reference: Reference, linear: Tensor) -> Tensor:
    """Returns s at all nodes, shape (S)."""
    schedule, times = reference.schedule, reference.times
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.lam(times)
    # The nodes are even in this coordinate, and not in lam.
    slopes = spline_slopes(coordinate(schedule, times))
    slopes = slopes / (slopes @ lam)[:, None]
    squares, products, sizes = (torch.zeros_like(lam) for _ in range(3))
    for x, eps in zip(reference.x.unbind(1), reference.eps.unbind(1), strict=True):
        states, outputs = x.flatten(1).cpu().double(), eps.flatten(1).cpu().double()
        noise = (sigma / alpha)[:, None] * outputs
        f = noise - (linear / alpha)[:, None] * states
        sizes += noise.square().sum(1)
        squares += f.square().sum(1)
        products += (f * (slopes @ f)).sum(1)
    # Where the linear part is all there is, as with Gaussian data of mean zero, f is rounding.
    present = squares > ROUNDING * sizes
    return torch.where(present, products / torch.where(present, squares, 1.0), 0.0)

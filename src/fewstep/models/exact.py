r"""Denoisers in closed form: a mixture of isotropic Gaussians, and a finite data set.

Their predictions are exact, so the error of a sample is that of the solver alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.conditions import AcceptedConditions
from fewstep.models.denoiser import Denoiser

Numbers = Sequence[float] | Sequence[Sequence[float]] | Tensor


NO_CONDITIONS = AcceptedConditions(frozenset(), owner="an exact model")


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {schedule!r:.60}; make one with fewstep.schedule(name)"
        )


def _numbers(name: str, value: Numbers) -> Tensor:
    """Returns finite numbers as a float64 tensor."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers, got {value!r:.60}") from None
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return numbers


class GaussianMixture(Denoiser):
    r"""The exact denoiser of a mixture of isotropic Gaussians.

    .. math:: \varepsilon(x, t) = \sigma \sum_k r_k \frac{x - \alpha m_k}{\alpha^2 s_k^2 + \sigma^2}, \qquad
        r_k \propto w_k \, N(x; \alpha m_k, (\alpha^2 s_k^2 + \sigma^2) I)

    Arguments:
        means: The means, with shape (K, D).
        stds: The standard deviations, with shape (K); 0 is a point.
        weights: The weights, with shape (K), positive; they are normalised.
        schedule: The noise schedule.
    """

    accepts = NO_CONDITIONS
    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self, means: Numbers, stds: Numbers, weights: Numbers, schedule: NoiseSchedule
    ) -> None:
        super().__init__()
        _check_schedule(schedule)
        means, stds, weights = (
            _numbers(name, value)
            for name, value in (("means", means), ("stds", stds), ("weights", weights))
        )
        if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != stds.shape:
            raise ValueError(
                "means, stds and weights must have shapes (K, D), (K) and (K), got "
                f"{tuple(means.shape)}, {tuple(stds.shape)} and {tuple(weights.shape)}"
            )
        if not bool((weights > 0).all()) or not bool((stds >= 0).all()):
            raise ValueError("weights must be positive and stds not negative")
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("weights", weights / weights.sum())
        self.schedule, self.native = schedule, Prediction.EPS
        self.event_shape = (means.shape[1],)
        mean = (self.weights[:, None] * means).sum(0)
        spread = stds.square()[:, None] + (means - mean).square()
        self.data_mean, self.data_std = mean, (self.weights[:, None] * spread).sum(0).sqrt()

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns sigma (B, 1), variances (B, K), offsets (B, K, D), and log joint densities (B, K), of which a constant is left out."""
        t = t.to(torch.float64)
        alpha, sigma = (f.exp().to(x)[:, None] for f in self.schedule.log_scales(t))
        variance = torch.addcmul(sigma.square(), alpha.square(), self.stds.to(x).square())
        offset = torch.addcmul(x[:, None, :], alpha[:, :, None], self.means.to(x), value=-1)
        log_joint = torch.addcdiv(
            self.weights.to(x).log(), offset.square().sum(-1), variance, value=-0.5
        ).sub(variance.log(), alpha=x.shape[-1] / 2)
        return sigma, variance, offset, log_joint

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        del cond
        sigma, variance, offset, log_joint = self._parts(x, t)
        share = log_joint.softmax(-1) / variance
        return sigma * (share[:, :, None] * offset).sum(1)

    def log_prob(self, x: Tensor, t: Tensor | float) -> Tensor:
        r"""Returns :math:`\log p_t(x)` in nats, with shape (B).

        Raises:
            ValueError: If a time is NaN or outside of the schedule.
        """
        times = torch.as_tensor(t, dtype=torch.float64)
        self.schedule.check_times(times)
        times = times.expand(x.shape[0])
        return self._parts(x, times)[3].logsumexp(-1) - x.shape[-1] / 2 * math.log(2 * math.pi)

    def draw(self, n: int, *, t: float | None = None, seed: int = 0) -> Tensor:
        """Returns n draws of the data, or of the noised data at time t, (n, D), float64.

        Raises:
            ValueError: If the time is NaN or outside of the schedule.
        """
        generator = generator_at(seed, n)
        index = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        z = torch.randn((n, self.means.shape[1]), generator=generator, dtype=torch.float64)
        x0 = self.means.cpu()[index] + self.stds.cpu()[index, None] * z
        if t is None:
            return x0
        time = torch.tensor(t, dtype=torch.float64)
        self.schedule.check_times(time)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        return self.schedule.alpha(time) * x0 + self.schedule.sigma(time) * noise


class DataSet(Denoiser):
    r"""The optimal denoiser of a finite data set: the minimum of the training loss.

    .. math:: x_0(x, t) = \sum_i r_i \, x^{(i)}, \qquad r_i \propto \exp\left( -\frac{\|x - \alpha x^{(i)}\|^2}{2 \sigma^2} \right)

    Cost: one pass over the data for each sample.

    Arguments:
        points: The data, with shape (N, \*).
        schedule: The noise schedule.
        chunk: The number of points in a chunk of the computation.
    """

    accepts = NO_CONDITIONS
    points: Tensor

    def __init__(self, points: Tensor, schedule: NoiseSchedule, *, chunk: int = 16_384) -> None:
        super().__init__()
        _check_schedule(schedule)
        if not isinstance(points, Tensor):
            raise TypeError(f"points must be a tensor, got {type(points).__name__}")
        if points.ndim < 2 or not len(points) or not points.is_floating_point():
            raise ValueError(
                "points must be floating and have shape (N, *) with N >= 1, got "
                f"{points.dtype} with shape {tuple(points.shape)}"
            )
        if not bool(points.isfinite().all()):
            raise ValueError("points must be finite, got NaN or infinity")
        self.register_buffer("points", points.detach().flatten(1))
        self.schedule, self.native = schedule, Prediction.X0
        self.event_shape = tuple(points.shape[1:])
        self.data_mean = points.double().mean(0)
        self.data_std = points.double().std(0, unbiased=False)
        self.chunk = chunk

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        del cond
        t = t.to(torch.float64)
        alpha, sigma = (f.exp().to(x)[:, None] for f in self.schedule.log_scales(t))
        flat = x.flatten(1)
        # Softmax over chunks: running maximum, total and weighted sum.
        top = torch.full_like(sigma, -torch.inf)
        total, mean = torch.zeros_like(sigma), torch.zeros_like(flat)
        for points in self.points.split(self.chunk):
            points = points.to(x)
            # |x - a p|^2 up to |x|^2, which is the same for all points.
            distance = alpha.square() * points.square().sum(1) - 2 * alpha * (flat @ points.T)
            logits = -distance / (2 * sigma.square())
            new = torch.maximum(top, logits.amax(1, keepdim=True))
            share, shrink = (logits - new).exp(), (top - new).exp()
            total = total * shrink + share.sum(1, keepdim=True)
            mean = mean * shrink + share @ points
            top = new
        return (mean / total).reshape(x.shape)


def smooth(schedule: NoiseSchedule) -> GaussianMixture:
    """Returns the embedded model ``mixture-smooth``: four overlapping modes in the plane."""
    means = [(1.5, 0.0), (-0.75, 1.3), (-0.75, -1.3), (0.2, 0.1)]
    return GaussianMixture(means, (0.25, 0.35, 0.2, 0.3), (0.3, 0.25, 0.25, 0.2), schedule)


def sharp(schedule: NoiseSchedule, *, std: float = 0.01) -> GaussianMixture:
    """Returns the embedded model ``mixture-sharp``: eight narrow modes on a wavy circle."""
    angles = [2 * math.pi * k / 8 + 0.1 for k in range(8)]
    radius = [1.5 * (1 + 0.15 * math.cos(3 * a)) for a in angles]
    means = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radius, angles, strict=True)]
    return GaussianMixture(means, [std] * 8, (1, 2, 1, 1.5, 1, 1, 2, 1), schedule)

r"""Distances that need no features: sliced Wasserstein, and RMS to a reference from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.features import FeatureMap
from fewstep.metrics.intervals import Estimate, jackknife, student
from fewstep.metrics.reference import Reference
from fewstep.metrics.sides import two_sides


def sliced_wasserstein(
    a: Tensor,
    b: Tensor | Reference,
    *,
    features: FeatureMap = None,
    heldout: bool = False,
    projections: int = 128,
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the sliced 2-Wasserstein distance, with an interval.

    .. math:: \left( \frac1P \sum_p W_2^2(\theta_p \cdot a, \theta_p \cdot b) \right)^{1/2}

    over P random directions. Sets of different sizes are compared by their quantiles.

    References:
        | Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015)
        | https://doi.org/10.1007/s10851-014-0506-3

    Arguments:
        a: Samples, with shape (n, \*).
        b: Samples, with shape (m, \*); or a reference.
        features: The feature extractor, see :func:`fewstep.metrics.fid`.
        heldout: Whether to compare with the held-out samples of the reference.
        projections: The number P of directions.
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the directions and blocks.
    """
    fa, fb = two_sides(a, b, features, least=2, heldout=heldout)
    directions = _directions(fa.shape[1], projections, seed)
    # Sorted once: leaving out samples does not change the order. One direction per row.
    pa, pb = ((side @ directions).T.contiguous().sort(1) for side in (fa, fb))

    def select(projected: torch.return_types.sort, index: Tensor) -> Tensor:
        n = projected.values.shape[1]
        if len(index) == n:
            return projected.values
        selected = torch.zeros(n, dtype=torch.bool)
        selected[index] = True
        return projected.values[selected[projected.indices]].reshape(-1, len(index))

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        return _gap(select(pa, i), select(pb, j)).sqrt()[None]

    return jackknife(statistic, (len(fa), len(fb)), level=level, blocks=blocks, seed=seed)[0]


def sliced_distance(a: Tensor, b: Tensor, *, projections: int = 128, seed: int = 0) -> Tensor:
    r"""Returns the mean over P random directions of :math:`W_2^2`, a scalar; differentiable.

    It is the square of :func:`sliced_wasserstein`, in the dtype of the features.

    Arguments:
        a: Features, with shape (n, D).
        b: Features, with shape (m, D).
        projections: The number P of directions.
        seed: Their seed.
    """
    directions = _directions(a.shape[1], projections, seed).to(a)
    return _gap(*((side @ directions).T.sort(1).values for side in (a, b)))


def _directions(dimension: int, projections: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((dimension, projections), generator=generator, dtype=torch.float64)
    return directions / directions.norm(dim=0)


def _gap(left: Tensor, right: Tensor) -> Tensor:
    """Returns the mean square distance of two sets of sorted projections, (P, n) and (P, m)."""
    if left.shape != right.shape:
        count = max(left.shape[1], right.shape[1])
        left, right = _quantiles(left, count), _quantiles(right, count)
    return (left - right).square().mean()


def _quantiles(ordered: Tensor, count: int) -> Tensor:
    """Returns the empirical quantiles at the middles of ``count`` equal shares."""
    share = (torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5) / count
    n = ordered.shape[1]
    return ordered[:, (share * n).long().clamp(max=n - 1)]


def rms(a: Tensor, b: Tensor, *, level: float = 0.95) -> Estimate:
    r"""Returns the root mean square difference of samples from the same noise, with an interval.

    The interval is Student's for the mean square over samples, transformed by the root.

    Arguments:
        a: Samples, with shape (n, \*), n >= 2.
        b: The reference, of the same shape; sample i of both started from the same noise.
        level: The probability that the interval covers.
    """
    if a.shape != b.shape or a.ndim < 1 or len(a) < 2:
        raise ValueError(
            f"two sets of one shape with n >= 2 are compared, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    squares = (a.double() - b.double()).square().flatten(1).mean(1)
    if not bool(squares.isfinite().all()):
        raise ValueError("the samples are not all finite")
    mean, n = squares.mean(), len(squares)
    width = student(level, n - 1) * squares.std() / n**0.5
    low, high = (mean - width).clamp(min=0).sqrt(), (mean + width).sqrt()
    return Estimate(float(mean.sqrt()), float(low), float(high), level, "Student", (n, n))

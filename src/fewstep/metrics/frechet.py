r"""The Fréchet distance between Gaussians fitted to features (FID)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.metrics.features import FeatureMap, two_sides
from fewstep.metrics.intervals import Estimate, jackknife


class Statistics(NamedTuple):
    """The mean (D) and the covariance (D, D) of features, float64, and their number n."""

    mean: Tensor
    covariance: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Returns the statistics of features (n, D); the covariance is the unbiased one."""
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> Tensor:
    r"""Returns the squared Fréchet distance, a float64 scalar; differentiable.

    .. math:: \| m_a - m_b \|^2 + \operatorname{tr} \left( S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2} \right)

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
        | https://arxiv.org/abs/1706.08500
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2)
    # At zero eigenvalues the root has no derivative; they add nothing.
    positive = cross > cross.detach().abs().max() * 1e-14
    trace = torch.where(positive, cross, torch.ones_like(cross)).sqrt()
    trace = torch.where(positive, trace, torch.zeros_like(trace)).sum()
    gap = (a.mean - b.mean).square().sum()
    return gap + a.covariance.trace() + b.covariance.trace() - 2 * trace


def fid(
    a: Tensor,
    b: Tensor,
    *,
    features: FeatureMap = None,
    extrapolate: bool = False,
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the Fréchet distance between two sets of samples, with an interval.

    FID of n samples is biased upwards by about c / n. With ``extrapolate`` it is measured on
    random subsets of n, n/2 and n/4 of both sides, and a line in 1/n is carried to 0.

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
        | https://arxiv.org/abs/1706.08500
        | Effectively Unbiased FID and Inception Score and where to find them (Chong & Forsyth, 2020)
        | https://arxiv.org/abs/1911.07023

    Arguments:
        a: Samples, with shape (n, \*), n >= 2.
        b: Samples, with shape (m, \*), m >= 2.
        features: What to look at: the name of an embedded extractor, a
            :class:`~fewstep.metrics.Features`, any callable (n, \*) to (n, D); left out, the
            samples themselves, flattened.
        extrapolate: Whether to remove the bias of finite samples.
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks and subsets.

    Raises:
        ValueError: If there is one sample, the dimensions differ, or a value is not finite.
    """
    fa, fb = two_sides(a, b, features, least=8 if extrapolate else 2)

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        left, right = fa[i], fb[j]
        if not extrapolate:
            return frechet_distance(Statistics.of(left), Statistics.of(right))[None]
        return _extrapolated(left, right, seed)[None]

    return jackknife(statistic, (len(fa), len(fb)), level=level, blocks=blocks, seed=seed)[0]


def _extrapolated(a: Tensor, b: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    orders = [torch.randperm(len(side), generator=generator) for side in (a, b)]
    inverse, values = list[float](), list[Tensor]()
    for parts in (1, 2, 4):
        pieces = [
            [side[o] for o in order.tensor_split(parts)]
            for side, order in zip((a, b), orders, strict=True)
        ]
        distances = [
            frechet_distance(Statistics.of(left), Statistics.of(right))
            for left, right in zip(*pieces, strict=True)
        ]
        inverse.append(float(parts))
        values.append(torch.stack(distances).mean())
    x = torch.tensor(inverse, dtype=torch.float64)
    y = torch.stack(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return y.mean() - slope * x.mean()

r"""The Fréchet distance between Gaussians fitted to features (FID)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.metrics.features import FeatureMap
from fewstep.metrics.intervals import Estimate, jackknife
from fewstep.metrics.reference import Reference
from fewstep.metrics.sides import against, two_sides
from fewstep.metrics.statistics import Statistics


def frechet_distance(a: Statistics, b: Statistics, *, root: Tensor | None = None) -> Tensor:
    r"""Returns the squared Fréchet distance, a float64 scalar; differentiable.

    .. math:: \| m_a - m_b \|^2 + \operatorname{tr} \left( S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2} \right)

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
        | https://arxiv.org/abs/1706.08500

    Arguments:
        a: The statistics of one side.
        b: Those of the other side.
        root: The square root of the covariance of ``a``, if it is there already.
    """
    if root is None:
        root = square_root(a.covariance)
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2)
    # At zero eigenvalues the root has no derivative; they contribute nothing to the trace.
    positive = cross > cross.detach().abs().max() * 1e-14
    trace = torch.where(positive, cross, torch.ones_like(cross)).sqrt()
    trace = torch.where(positive, trace, torch.zeros_like(trace)).sum()
    gap = (a.mean - b.mean).square().sum()
    return gap + a.covariance.trace() + b.covariance.trace() - 2 * trace


def square_root(covariance: Tensor) -> Tensor:
    """Returns the symmetric square root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def fid(
    a: Tensor,
    b: Tensor | Reference,
    *,
    features: FeatureMap = None,
    heldout: bool = False,
    extrapolate: bool = False,
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the Fréchet distance (FID) between two sets of samples, with an interval.

    .. math:: \| m_a - m_b \|^2 + \operatorname{tr} \left( S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2} \right)

    where m and S are the mean and the covariance of the features of either set.

    .. code-block:: python

        reference = fewstep.metrics.Reference.load("fashion")
        print(fewstep.metrics.fid(images, reference))       # value, low and high end of the interval

    Cost: features of all samples once, and an eigendecomposition, O(D³), for each block.

    FID of n samples is biased upwards by about c / n. With ``extrapolate`` it is computed on
    random subsets of n, n/2 and n/4 of both sides, and a line in 1/n is extrapolated to 0.

    Against a :class:`~fewstep.metrics.Reference` the statistics of all its data are taken as
    exact: the interval is that of the samples alone, and only their side is resampled.

    References:
        | GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017)
        | https://arxiv.org/abs/1706.08500
        | Effectively Unbiased FID and Inception Score and where to find them (Chong & Forsyth, 2020)
        | https://arxiv.org/abs/1911.07023

    Arguments:
        a: Samples, with shape (n, \*), n >= 2.
        b: Samples, with shape (m, \*), m >= 2; or a reference.
        features: The feature extractor: the name of an embedded one, a
            :class:`~fewstep.metrics.Features`, any callable (n, \*) to (n, D); left out, that
            of the reference, or else the samples themselves, flattened. Against a
            reference, ``a`` may also be its features already, with shape (n, D).
        heldout: Whether to compare with the held-out samples of the reference instead.
        extrapolate: Whether to remove the bias of finite samples.
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks and subsets.

    Returns:
        The distance, in squared units of the features, with the interval of the jackknife.

    Raises:
        ValueError: If there are too few samples, the dimensions differ, a value is not finite, or
            other features are requested than those of the reference.
    """
    least = 8 if extrapolate else 2
    settings = {"level": level, "blocks": blocks, "seed": seed}
    right: Side
    if isinstance(b, Reference) and not heldout:
        fa, right = against(a, b, features, least=least), b.statistics
        known, size = True, right.n
    else:
        fa, right = two_sides(a, b, features, least=least, heldout=heldout)
        known, size = False, len(right)
    statistic = _extrapolated(fa, right, seed) if extrapolate else _plain(fa, right)
    return jackknife(statistic, (len(fa), size), fixed=(False, known), **settings)[0]


Side = Tensor | Statistics
Statistic = Callable[[Tensor, Tensor], Tensor]
"""Takes the rows of each side, returns the statistics of a jackknife."""


def _of(side: Side) -> Statistics:
    return side if isinstance(side, Statistics) else Statistics.of(side)


def _plain(a: Tensor, b: Side) -> Statistic:
    """The distance between some rows of each side.

    One side is whole at a time: its statistics and the root of its covariance are computed once.
    """
    wholes = Statistics.of(a), _of(b)
    roots = [square_root(whole.covariance) for whole in wholes]

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        if len(i) < len(a):
            return frechet_distance(wholes[1], Statistics.of(a[i]), root=roots[1])[None]
        right = wholes[1]
        if isinstance(b, Tensor) and len(j) < len(b):
            right = Statistics.of(b[j])
        return frechet_distance(wholes[0], right, root=roots[0])[None]

    return statistic


def _extrapolated(a: Tensor, b: Side, seed: int) -> Statistic:
    def statistic(i: Tensor, j: Tensor) -> Tensor:
        return _extrapolate(a[i], b if isinstance(b, Statistics) else b[j], seed)[None]

    return statistic


def _extrapolate(a: Side, b: Side, seed: int) -> Tensor:
    """Returns the distance at 1 / n = 0, by a line through those of n, n/2 and n/4 samples."""
    generator = torch.Generator().manual_seed(seed + 1)

    def shuffled(side: Side) -> Side:
        if isinstance(side, Statistics):
            return side
        return side[torch.randperm(len(side), generator=generator)]

    def pieces(side: Side, parts: int) -> Sequence[Side]:
        if isinstance(side, Statistics):
            return [side] * parts
        return side.tensor_split(parts)

    a, b = shuffled(a), shuffled(b)
    inverse, values = list[float](), list[Tensor]()
    for parts in (1, 2, 4):
        pairs = zip(pieces(a, parts), pieces(b, parts), strict=True)
        distances = [frechet_distance(_of(left), _of(right)) for left, right in pairs]
        inverse.append(float(parts))
        values.append(torch.stack(distances).mean())
    x = torch.tensor(inverse, dtype=torch.float64)
    y = torch.stack(values)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return y.mean() - slope * x.mean()

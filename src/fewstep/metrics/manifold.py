r"""Precision, recall, density and coverage: the shares of one set within the support of the other."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.metrics.features import FeatureMap
from fewstep.metrics.intervals import Estimate, jackknife
from fewstep.metrics.reference import Reference
from fewstep.metrics.sides import two_sides


class PrecisionRecall(NamedTuple):
    """Four shares, each with an interval.

    Attributes:
        precision: The share of samples within the real manifold.
        recall: The share of real points within the samples' manifold.
        density: How many real neighbourhoods a sample lies in, on average, divided by k.
        coverage: The share of real neighbourhoods that hold a sample.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def precision_recall(
    a: Tensor,
    b: Tensor | Reference,
    *,
    features: FeatureMap = None,
    heldout: bool = False,
    neighbours: int = 5,
    level: float = 0.95,
    blocks: int = 10,
    seed: int = 0,
) -> PrecisionRecall:
    r"""Returns precision, recall, density and coverage of samples a with respect to real data b.

    The manifold of a set is the union of balls around its points that reach to their k-th
    nearest neighbour.

    References:
        | Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al., 2019)
        | https://arxiv.org/abs/1904.06991
        | Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020)
        | https://arxiv.org/abs/2002.09797

    Arguments:
        a: Samples, with shape (n, \*), n > ``neighbours`` + 1.
        b: Real data, with shape (m, \*), likewise; or a reference.
        features: The feature extractor, see :func:`fewstep.metrics.fid`.
        heldout: Whether to compare with the held-out samples of the reference.
        neighbours: The number k of neighbours.
        level: The probability that the intervals cover.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks.

    Raises:
        ValueError: If there are too few samples, the dimensions differ, or a value is not finite.
    """
    if not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours must be a positive integer, got {neighbours!r}")
    fa, fb = two_sides(a, b, features, least=2 * (neighbours + 2), heldout=heldout)
    exactly = "donot_use_mm_for_euclid_dist"  # the fast formula would lose half of the digits
    aa, bb, ba = (
        torch.cdist(x, y, compute_mode=exactly) for x, y in ((fa, fa), (fb, fb), (fb, fa))
    )

    # The nearest point is the point itself, so the k-th neighbour has rank k + 1.
    reach_a, reach_b = _Reach(aa, neighbours + 1), _Reach(bb, neighbours + 1)

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        between = ba if len(j) == len(fb) else ba[j]
        between = between if len(i) == len(fa) else between[:, i]
        real, fake = reach_b(j)[:, None], reach_a(i)[None, :]
        inside = between < real
        return torch.stack(
            [
                inside.any(0).double().mean(),
                (between < fake).any(1).double().mean(),
                inside.double().sum(0).mean() / neighbours,
                (between.amin(1) < real[:, 0]).double().mean(),
            ]
        )

    sizes = (len(fa), len(fb))
    estimates = jackknife(statistic, sizes, level=level, blocks=blocks, seed=seed)
    precision, recall, density, coverage = estimates
    return PrecisionRecall(_share(precision), _share(recall), density, _share(coverage))


def _share(estimate: Estimate) -> Estimate:
    """Clips the interval of a share to [0, 1]."""
    return replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


class _Reach:
    """The distance from each point to its k-th nearest among some of the points."""

    def __init__(self, distances: Tensor, rank: int) -> None:
        self.distances, self.rank = distances, rank
        # With a list of the nearest points each block can be left out without sorting again.
        listed = min(len(distances), 4 * rank + 8)
        self.near, self.neighbours = distances.topk(listed, dim=1, largest=False)

    def __call__(self, index: Tensor) -> Tensor:
        selected = torch.zeros(len(self.distances), dtype=torch.bool)
        selected[index] = True
        alive = selected[self.neighbours[index]]
        hit = alive & (alive.cumsum(1) == self.rank)
        radius = self.near[index].gather(1, hit.int().argmax(1, keepdim=True))[:, 0]
        short = ~hit.any(1)
        if bool(short.any()):
            rows = self.distances[index[short]][:, index]
            radius[short] = rows.kthvalue(self.rank, dim=1).values
        return radius

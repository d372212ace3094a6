r"""The kernel distance (KID): the squared maximum mean discrepancy of features, unbiased."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.base.registry import Registry
from fewstep.metrics.features import FeatureMap
from fewstep.metrics.intervals import Estimate, jackknife
from fewstep.metrics.reference import Reference
from fewstep.metrics.sides import two_sides

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Takes features (n, D) and (m, D), returns the kernel matrix (n, m)."""


def linear(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`a \cdot b / D`: it compares the means of the features only."""
    return a @ b.T / a.shape[1]


def cubic(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`(a \cdot b / D + 1)^3`, the kernel of KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor, *, width: float | None = None) -> Tensor:
    r"""Returns the mean of :math:`e^{-\|a - b\|^2 / 2 w^2}` over w = 1/2, 1, 2 times a width.

    The width, left out, is the median distance within ``b`` (of at most 1000 of its points),
    without a gradient.
    """
    squares = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
    if width is None:
        width = median_distance(b)
    return torch.stack([(-squares / (2 * (s * width) ** 2)).exp() for s in (0.5, 1.0, 2.0)]).mean(
        0
    )


def median_distance(features: Tensor) -> float:
    """Returns the median distance between different points of (at most 1000 of) the features."""
    some = features.detach()[:1000]
    distance = torch.pdist(some)
    return max(float(distance.median()), 1e-12) if distance.numel() else 1.0


KERNELS: Registry[Kernel] = Registry(
    "kernel", {"linear": linear, "cubic": cubic, "gaussian": gaussian}
)


def mmd2(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    r"""Returns the unbiased squared discrepancy from three kernel matrices; differentiable.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m (m - 1)} \sum_{i \ne j} k(y_i, y_j)
        - \frac{2}{n m} \sum_{i, j} k(x_i, y_j)

    References:
        | A Kernel Two-Sample Test (Gretton et al., 2012), eq. (3)
        | https://jmlr.org/papers/v13/gretton12a.html
    """
    n, m = xy.shape
    inside = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    inside = inside + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return inside - 2 * xy.mean()


def kid(
    a: Tensor,
    b: Tensor | Reference,
    *,
    features: FeatureMap = None,
    heldout: bool = False,
    kernel: str | Kernel = "cubic",
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the kernel distance between two sets of samples, unbiased, with an interval.

    It may be negative: its mean is 0 if the two distributions are the same.

    References:
        | Demystifying MMD GANs (Binkowski et al., 2018)
        | https://arxiv.org/abs/1801.01401

    Arguments:
        a: Samples, with shape (n, \*), n >= 3.
        b: Samples, with shape (m, \*), m >= 3; or a reference.
        features: The feature extractor, see :func:`fewstep.metrics.fid`.
        heldout: Whether to compare with the held-out samples of the reference.
        kernel: ``"cubic"``, ``"linear"``, ``"gaussian"``, or a callable.
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks.

    Raises:
        ValueError: If there are too few samples, the dimensions differ, or a value is not finite.
    """
    fa, fb = two_sides(a, b, features, least=3, heldout=heldout)
    if isinstance(kernel, str):
        function: Kernel = KERNELS[kernel]
        if kernel == "gaussian":
            width = median_distance(fb)
            function = lambda x, y: gaussian(x, y, width=width)  # noqa: E731 - one width for all blocks
    else:
        function = kernel
    matrices = function(fa, fa), function(fb, fb), function(fa, fb)
    return discrepancy(*matrices, level=level, blocks=blocks, seed=seed)


def discrepancy(
    xx: Tensor,
    yy: Tensor,
    xy: Tensor,
    *,
    level: float = 0.95,
    blocks: int = 20,
    seed: int = 0,
) -> Estimate:
    r"""Returns the unbiased squared discrepancy :func:`mmd2` from three kernel matrices, with an interval.

    Arguments:
        xx: The kernel matrix (n, n) within the first samples.
        yy: That within the second samples, shape (m, m).
        xy: That between them, shape (n, m).
        level: The probability that the interval covers.
        blocks: The number of blocks of the jackknife.
        seed: The seed of the blocks.
    """
    left, right, across = _Sums(xx), _Sums(yy), _Sums(xy)

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        n, m = len(i), len(j)
        out_i, out_j = _others(i, len(xx)), _others(j, len(yy))
        inside = left.without(out_i, out_i, diagonal=False) / (n * (n - 1))
        inside = inside + right.without(out_j, out_j, diagonal=False) / (m * (m - 1))
        return (inside - 2 * across.without(out_i, out_j) / (n * m))[None]

    return jackknife(statistic, (len(xx), len(yy)), level=level, blocks=blocks, seed=seed)[0]


class _Sums:
    """Sums over a kernel matrix without some rows and columns; each costs those alone."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.rows, self.columns = matrix, matrix.sum(1), matrix.sum(0)
        self.total = self.rows.sum()

    def without(self, rows: Tensor, columns: Tensor, *, diagonal: bool = True) -> Tensor:
        both = self.matrix[rows][:, columns].sum()
        total = self.total - self.rows[rows].sum() - self.columns[columns].sum() + both
        if diagonal:
            return total
        entries = self.matrix.diagonal()
        return total - entries.sum() + entries[rows].sum()


def _others(index: Tensor, n: int) -> Tensor:
    out = torch.ones(n, dtype=torch.bool)
    out[index] = False
    return out.nonzero().flatten()

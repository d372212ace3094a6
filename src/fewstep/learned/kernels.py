r"""Kernels by name, with widths that suit the real features."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.kernel import KERNELS, Kernel, cubic, gaussian, linear, median_distance


def named_kernel(name: str, real: Tensor) -> Kernel:
    """Returns the kernel of a name, with the widths that suit the (scaled) real features (M, D).

    Beside those of :data:`fewstep.metrics.KERNELS`: ``"mixture"``, the mean of all three, and
    ``"scales"``, Gaussians whose widths run from the median distance down to that of nearest
    neighbours, the finest that so many samples resolve.

    Raises:
        ValueError: If the name is unknown.
    """
    width = median_distance(real)
    if name == "mixture":
        return lambda a, b: (linear(a, b) + cubic(a, b) + gaussian(a, b, width=width)) / 3
    if name == "scales":
        some = real[:1000]
        apart = torch.cdist(some, some).fill_diagonal_(torch.inf).amin(1)
        finest = float(apart[apart.isfinite()].median()) if len(some) > 1 else width
        return scales(width, min(width, max(finest, width / 256)))
    if name == "gaussian":
        return lambda a, b: gaussian(a, b, width=width)
    return KERNELS[name]


def scales(widest: float, finest: float, count: int = 5) -> Kernel:
    """Returns the mean of Gaussian kernels whose widths are spaced evenly in their logarithm."""
    widths = [widest * (finest / widest) ** (k / (count - 1)) for k in range(count)]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        squares = squares.clamp(min=0)
        total = torch.zeros_like(squares)
        for w in widths:  # in place: large matrices cost more to allocate than to compute
            total += (squares * (-0.5 / w**2)).exp_()
        return total / count

    return kernel

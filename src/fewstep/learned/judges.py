r"""Evaluation of candidates: on noise, real data and features that the search does not train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.learned.kernels import named_kernel
from fewstep.metrics.features import Features, pixels
from fewstep.metrics.intervals import Estimate, jackknife
from fewstep.metrics.kernel import mmd2
from fewstep.metrics.manifold import precision_recall

IMAGE = 3
"""The dimensions of an image: channels, height, width."""
LEAST = 20
"""The fewest samples for precision and recall."""
LEVEL = 0.95
"""The level of the intervals of scores."""


def random_features(shape: tuple[int, ...], *, seed: int = 0) -> Features:
    r"""Returns the features of a network with random weights, which no loss was trained on.

    Images go through three convolutions with random weights; the means and the deviations of each
    channel after each are the features, at a fixed scale. Vectors are their own features.

    Arguments:
        shape: The shape of a sample.
        seed: The seed of the weights.
    """
    if len(shape) != IMAGE:
        return pixels()
    generator = torch.Generator().manual_seed(seed + 1)
    layers, channels = list[Tensor](), shape[0]
    for width in (32, 64, 128):
        weight = torch.randn((width, channels, 3, 3), generator=generator)
        layers.append(weight * (2 / (9 * channels)) ** 0.5)
        channels = width

    def network(images: Tensor) -> Tensor:
        x, statistics = images.float(), list[Tensor]()
        for weight in layers:
            x = nn.functional.conv2d(x, weight.to(x), padding=1).relu()
            statistics += [x.mean((2, 3)), x.flatten(2).std(2, unbiased=False)]
            if min(x.shape[2:]) > 1:
                x = nn.functional.avg_pool2d(x, 2)
        return torch.cat(statistics, 1)

    digest = hashlib.sha256(f"fewstep random features {tuple(shape)} {seed}".encode()).hexdigest()
    return Features(network, name=f"random-{seed}", sha256=digest)


@dataclass(frozen=True)
class Judge:
    r"""The discrepancy of samples from a reference, with a characteristic kernel.

    Attributes:
        extract: The feature extractor, not that of the loss.
        real: The features of the reference, shape (M, D), scaled to a root mean square of 1.
        scale: Their scale.
        kernel: The kernel.
        inside: The kernel matrix within the reference, shape (M, M).
    """

    extract: Callable[[Tensor], Tensor]
    real: Tensor
    scale: float
    kernel: Callable[[Tensor, Tensor], Tensor]
    inside: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, features: Tensor, extract: Callable[[Tensor], Tensor]) -> Judge:
        """Returns the judge with these reference features (M, D)."""
        features = features.double()
        # Centred, so that the root mean square is that of the differences.
        scale = float(1 / (features - features.mean(0)).square().mean().sqrt().clamp(min=1e-12))
        real = features * scale
        kernel = named_kernel("scales", real)
        return cls(extract, real, scale, kernel, kernel(real, real))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Returns the scaled features of samples, float64."""
        return self.extract(x).flatten(1).cpu().double() * self.scale

    @torch.no_grad()
    def score(self, x: Tensor) -> float:
        """Returns the squared discrepancy, unbiased; smaller is better, about 0 is the best."""
        features = self.features(x)
        if not bool(features.isfinite().all()):
            return float("inf")
        between = self.kernel(features, self.real)
        return float(mmd2(self.kernel(features, features), self.inside, between))

    @torch.no_grad()
    def diversity(self, x: Tensor) -> tuple[float, float]:
        """Returns precision and recall."""
        features = self.features(x)
        count = min(len(features), len(self.real))
        if not bool(features.isfinite().all()):
            return 0.0, 0.0
        if count < LEAST:
            return 1.0, 1.0
        manifold = precision_recall(features[:count], self.real[:count], blocks=2)
        return manifold.precision.value, manifold.recall.value


def discrepancy_change(
    judge: Judge, features: Tensor, before: Tensor, *, level: float = LEVEL
) -> Estimate:
    """Returns how much larger the squared discrepancy of features (n, D) is than that of others.

    Sample i of both comes from the same noise, so most of the variance of the samples and that of
    the reference cancel; the interval is that of the jackknife over both.

    Arguments:
        judge: The judge.
        features: The features of samples, unscaled.
        before: Those of the others.
        level: The level of the interval.
    """
    a, b = features * judge.scale, before * judge.scale
    kernel, real = judge.kernel, judge.real
    inside = kernel(a, a) - kernel(b, b)
    inside.fill_diagonal_(0)
    across = kernel(a, real) - kernel(b, real)
    rows, row_across, column_across = inside.sum(1), across.sum(1), across.sum(0)

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        n, m = len(i), len(j)
        if m == len(real):
            within = rows[i].sum()
            if n < len(a):
                out = torch.ones(len(a), dtype=torch.bool)
                out[i] = False
                left = out.nonzero().flatten()
                within = within - rows[left].sum() + inside[left][:, left].sum()
            between = row_across[i].sum()
        else:
            within, between = rows.sum(), column_across[j].sum()
        return (within / (n * (n - 1)) - 2 * between / (n * m))[None]

    return jackknife(statistic, (len(a), len(real)), level=level)[0]

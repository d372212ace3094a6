r"""What a search makes small: distances to a teacher's samples, and discrepancies from real data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.base.registry import Registry
from fewstep.diffusion.noise import generator_at
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.kernel import KERNELS, Kernel, cubic, gaussian, linear, median_distance, mmd2

Distance = Callable[[Tensor, Tensor], Tensor]
"""Takes samples and targets (B, *), returns distances (B), differentiable in the first."""


class Outcome(NamedTuple):
    r"""What the sampler made of a batch.

    Attributes:
        x: The samples, with shape (B, \*).
        states: The inputs of the calls but the first, each (B, \*); empty if nobody asked.
    """

    x: Tensor
    states: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    r"""What a batch started from, and what it is compared with.

    Attributes:
        step: The number of the training step; it addresses whatever an objective draws.
        pairs: How many of the first rows have a teacher.
        target: The teacher's samples of these rows, with shape (pairs, \*), or ``None``.
        states: The teacher's states at the knots between, each (pairs, \*).
    """

    step: int
    pairs: int
    target: Tensor | None = None
    states: tuple[Tensor, ...] = ()


class Objective(ABC):
    """A differentiable loss of a batch of samples.

    Attributes:
        paired: Whether it compares with a teacher from the same noise.
        wants_states: Whether it looks at the states on the way.
    """

    paired: bool = False
    wants_states: bool = False

    @abstractmethod
    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        """Returns the loss, a scalar."""


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean square of the difference, each sample, shape (B)."""
    return (x - y).flatten(1).square().mean(1)


def pseudo_huber(x: Tensor, y: Tensor) -> Tensor:
    r"""Returns :math:`\sqrt{\|x - y\|^2 / d + c^2} - c` with c = 0.03, each sample, shape (B)."""
    return (mse(x, y) + 0.03**2).sqrt() - 0.03


DISTANCES: Registry[Distance] = Registry("distance", {"mse": mse, "pseudo-huber": pseudo_huber})


def feature_distance(features: FeatureMap) -> Distance:
    """Returns the mean square of the difference of features, as a distance."""
    look = extractor(features)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = look(y)
        return mse(look(x), wanted)

    return distance


class Endpoint(Objective):
    r"""The distance to the samples that a teacher makes of the same noise.

    Arguments:
        distance: ``"mse"``, ``"pseudo-huber"``, ``"features"``, or a callable (perceptual
            distances of other libraries, for example).
        features: The extractor of ``"features"``.
    """

    paired = True

    def __init__(self, distance: str | Distance = "mse", *, features: FeatureMap = None) -> None:
        if distance == "features":
            self.distance = feature_distance(features)
        else:
            self.distance = DISTANCES[distance] if isinstance(distance, str) else distance

    def each(self, x: Tensor, target: Tensor) -> Tensor:
        """Returns the distance of each sample, shape (B)."""
        return self.distance(x, target)

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        assert batch.target is not None
        return self.each(outcome.x[: batch.pairs], batch.target).mean()


class Trajectory(Endpoint):
    """The mean distance to a teacher at all knots after the first.

    The knots must be common, so it needs a family that does not move times.

    Arguments:
        distance: As of :class:`Endpoint`.
        features: As of :class:`Endpoint`.
    """

    wants_states = True

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        total = super().loss(outcome, batch)
        for state, target in zip(outcome.states, batch.states, strict=True):
            total = total + mse(state[: batch.pairs], target).mean()
        return total / (1 + len(batch.states))


class MMD(Objective):
    r"""The squared discrepancy of features from real ones, unbiased: the loss of DDSS.

    The features are scaled to a root mean square of 1 over the real ones. ``"cubic"`` is the
    kernel of KID; ``"linear"`` sees means alone; ``"gaussian"`` is characteristic (three widths
    about the median distance); ``"mixture"`` is the mean of the three. It may be negative.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830

    Arguments:
        real: Features of real samples, with shape (M, D).
        look: The extractor.
        kernel: A name, or a callable (n, D), (m, D) to (n, m) that sees the features unscaled.
        real_batch: How many real samples are compared with in a step.
        seed: The seed of their choice.
    """

    def __init__(
        self,
        real: Tensor,
        look: Callable[[Tensor], Tensor],
        *,
        kernel: str | Kernel = "mixture",
        real_batch: int = 1000,
        seed: int = 0,
    ) -> None:
        self.look, self.seed = look, seed
        self.scale = 1.0
        if isinstance(kernel, str):
            self.scale = float(1 / real.square().mean().sqrt())
        self.real = real * self.scale
        self.kernel = named_kernel(kernel, self.real) if isinstance(kernel, str) else kernel
        self.real_batch = min(real_batch, len(real))

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        chosen = torch.randint(
            len(self.real),
            (self.real_batch,),
            generator=generator_at(self.seed, REAL, batch.step),
        )
        # Features may be on another device than the samples.
        x = self.look(outcome.x).flatten(1)
        return self.value(x, self.real[chosen].to(x))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the discrepancy of features x (n, D) from scaled real ones y (m, D)."""
        x = x * self.scale
        with torch.no_grad():
            yy = self.kernel(y, y)
        return mmd2(self.kernel(x, x), yy, self.kernel(x, y))


REAL = 104_729
"""The part of an address that says: a choice of real samples."""


def named_kernel(name: str, real: Tensor) -> Kernel:
    """Returns a kernel by name, with the widths that suit the (scaled) real features.

    Beside those of :data:`fewstep.metrics.KERNELS`: ``"mixture"``, the mean of all three, and
    ``"scales"``, Gaussians whose widths run from the median distance down to that of nearest
    neighbours, so that they see whatever the data are fine enough to show.
    """
    width = median_distance(real)
    if name == "mixture":
        return lambda a, b: (linear(a, b) + cubic(a, b) + gaussian(a, b, width=width)) / 3
    if name == "scales":
        some = real[:1000]
        apart = torch.cdist(some, some).fill_diagonal_(torch.inf).amin(1)
        least = float(apart[apart.isfinite()].median()) if len(some) > 1 else width
        return scales(width, min(width, max(least, width / 256)))
    if name == "gaussian":
        return lambda a, b: gaussian(a, b, width=width)
    return KERNELS[name]


def scales(widest: float, finest: float, count: int = 5) -> Kernel:
    """Returns the mean of Gaussian kernels whose widths are spaced evenly in their logarithm."""
    widths = [widest * (finest / widest) ** (k / (count - 1)) for k in range(count)]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        squares = squares.clamp(min=0)
        return torch.stack([(-squares / (2 * w**2)).exp() for w in widths]).mean(0)

    return kernel

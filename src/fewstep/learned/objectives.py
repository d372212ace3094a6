r"""Search objectives: distances from a teacher's samples, and discrepancies from real data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.base.registry import Registry
from fewstep.learned.adversarial import Adversarial, AdversarialData
from fewstep.learned.distances import Distance, distance_of, mse
from fewstep.learned.kernels import named_kernel
from fewstep.learned.objective import Batch as Batch
from fewstep.learned.objective import Given as Given
from fewstep.learned.objective import Objective as Objective
from fewstep.learned.objective import Outcome as Outcome
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.kernel import Kernel, mmd2


class Endpoint(Objective):
    r"""The distance from the samples of a teacher with the same noise.

    .. math:: L = \frac1B \sum_b d(x^b, \hat x^b)

    Arguments:
        distance: ``"mse"``, ``"pseudo-huber"``, ``"features"``, or a callable (perceptual
            distances of other libraries, for example).
        features: The extractor of ``"features"``.
    """

    paired = True

    def __init__(self, distance: str | Distance = "mse", *, features: FeatureMap = None) -> None:
        self.distance = distance_of(distance, features)
        self.features = distance == "features"

    @classmethod
    def build(cls, given: Given) -> Endpoint:
        return cls(given.settings.distance, features=given.extract)

    def distances(self, x: Tensor, target: Tensor) -> Tensor:
        return self.distance(x, target)

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        assert batch.target is not None
        return self.distances(outcome.x[: batch.pairs], batch.target).mean()


class Perceptual(Endpoint):
    r"""The distance from the samples of a teacher with the same noise, in the features of the loss.

    .. math:: L = \frac1B \sum_b \| \phi(x^b) - \phi(\hat x^b) \|^2 / D

    The least squares of points alone are met by samples that are smoother than the teacher's, and features see that.

    Arguments:
        features: The feature extractor.
    """

    def __init__(self, features: FeatureMap) -> None:
        super().__init__("features", features=features)

    @classmethod
    def build(cls, given: Given) -> Perceptual:
        return cls(given.extract)


class Trajectory(Endpoint):
    r"""The mean distance from a teacher at all knots after the first.

    .. math:: L = \frac{1}{S B} \sum_b \left( d(x^b, \hat x^b)
        + \sum_{n=1}^{S-1} \| y_n^b - \hat y_n^b \|^2 / d \right)

    The knots must be common, so it needs a family without learned times.

    Arguments:
        distance: As of :class:`Endpoint`.
        features: As of :class:`Endpoint`.
    """

    wants_states = True

    @classmethod
    def build(cls, given: Given) -> Trajectory:
        base = given.learned.base
        if given.learned.learns_times or base.plan().nfe != base.grid.steps:
            raise ValueError(
                "the objective trajectory needs states at common times: a family without learned "
                "times (ggdm, ggdm+pred, vars, ddim-sigma; gs with times=False), one evaluation per step"
            )
        return cls(given.settings.distance, features=given.extract)

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        total = super().loss(outcome, batch)
        for state, target in zip(outcome.states, batch.states, strict=True):
            total = total + mse(state[: batch.pairs], target).mean()
        return total / (1 + len(batch.states))


class MMD(Objective):
    r"""The squared discrepancy of features from real ones, unbiased: the loss of DDSS.

    .. math:: L = \frac{1}{B (B - 1)} \sum_{i \ne j} k(\phi_i, \phi_j)
        + \frac{1}{m (m - 1)} \sum_{i \ne j} k(r_i, r_j) - \frac{2}{B m} \sum_{i, j} k(\phi_i, r_j)

    with features :math:`\phi` (B, D) of the samples and m real ones r. It may be negative. Features
    are scaled to a root mean square of 1 over the real ones. ``"cubic"`` is the kernel of KID;
    ``"linear"`` compares means alone; ``"gaussian"`` is characteristic (three widths about the median
    distance); ``"mixture"`` is the mean of the three.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830

    Arguments:
        real: Features of real samples, with shape (M, D).
        extract: The feature extractor.
        kernel: A name, or a callable (n, D), (m, D) to (n, m) of unscaled features.
        real_batch: The number m of real samples in a step.
        seed: The seed of their choice.
    """

    needs_data = True
    features = True
    steps = 60
    batch_size = (256, 128)
    anchor = (("endpoint", 0.1),)

    def __init__(
        self,
        real: Tensor,
        extract: Callable[[Tensor], Tensor],
        *,
        kernel: str | Kernel = "mixture",
        real_batch: int = 1000,
        seed: int = 0,
    ) -> None:
        self.extract, self.seed = extract, seed
        self.scale = 1.0
        if isinstance(kernel, str):
            self.scale = float(1 / real.square().mean().sqrt())
        self.real = real * self.scale
        self.kernel = named_kernel(kernel, self.real) if isinstance(kernel, str) else kernel
        self.real_batch = min(real_batch, len(real))

    @classmethod
    def build(cls, given: Given) -> MMD:
        assert given.reference is not None
        return cls(
            given.reference.features.to(given.dtype),
            extractor(given.reference.extractor),
            kernel=given.settings.kernel,
            real_batch=given.settings.real_batch,
            seed=given.seed,
        )

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        # Features may be on another device than the samples.
        x = self.extract(outcome.x).flatten(1)
        return self.value(x, batch.drawn(self.real, self.real_batch, self.seed).to(x))

    @torch.no_grad()
    def typical(self, value: float, x: Tensor) -> float:
        # Near the data the unbiased value of n samples is noise of this order, of either sign.
        features = self.extract(x).flatten(1) * self.scale
        within = self.kernel(features, features)
        noise = float(within.diagonal().mean() - within.mean()) / max(1, len(x) - 1)
        return max(abs(value), noise, 1e-8)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the discrepancy of features x (n, D) from scaled real ones y (m, D)."""
        x = x * self.scale
        with torch.no_grad():
            yy = self.kernel(y, y)
        return mmd2(self.kernel(x, x), yy, self.kernel(x, y))


class Reward(Objective):
    r"""The negative mean of a reward of the user's.

    .. math:: L = - \frac1B \sum_b r(x^b)

    Candidates are selected by it on held-out noise, as long as they do not lose recall or get further from
    the reference (real data, or the teacher's samples): a reward alone is lowered by what it does not see.

    Arguments:
        reward: Takes samples (B, \*), returns how good each is, (B); with a gradient, unless the
            optimizer needs none.
    """

    scored = True

    def __init__(self, reward: Callable[[Tensor], Tensor]) -> None:
        self.reward = reward

    @classmethod
    def build(cls, given: Given) -> Reward:
        if given.settings.reward is None:
            raise ValueError(
                "the objective reward needs a callable of samples: search={'reward': ...}, from Python"
            )
        return cls(given.settings.reward)

    def score(self, x: Tensor) -> Tensor:
        value = self.reward(x)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"a reward returns a tensor of shape ({len(x)},), got {got}")
        return -value

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        del batch
        return self.score(outcome.x).mean()


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    {
        "endpoint": Endpoint,
        "perceptual": Perceptual,
        "trajectory": Trajectory,
        "mmd": MMD,
        "adversarial": Adversarial,
        "adversarial-data": AdversarialData,
        "reward": Reward,
    },
)
"""The search objectives by name. A new one is a subclass of :class:`Objective` and a line here."""

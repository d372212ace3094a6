r"""Judges of candidates: on noise, real data and features that the search does not train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.learned.objectives import named_kernel
from fewstep.metrics.features import Features, pixels
from fewstep.metrics.frechet import fid
from fewstep.metrics.kernel import kid, mmd2
from fewstep.metrics.manifold import precision_recall
from fewstep.metrics.reference import Reference
from fewstep.metrics.transport import rms

IMAGE = 3
"""The dimensions of an image: channels, height, width."""
LEAST = 20
"""With fewer samples precision and recall mean nothing."""
MOST_REAL = 500
"""The real samples of a final score, if there are fewer made ones."""


def random_features(shape: tuple[int, ...], *, seed: int = 0) -> Features:
    r"""Returns features of a network that was never trained: nobody can have learned to please it.

    Images go through three convolutions with random weights; the means and the deviations of each
    channel after each are the features, at a fixed scale. Vectors are looked at as they are.

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
        x, found = images.float(), list[Tensor]()
        for weight in layers:
            x = nn.functional.conv2d(x, weight.to(x), padding=1).relu()
            found += [x.mean((2, 3)), x.flatten(2).std(2, unbiased=False)]
            if min(x.shape[2:]) > 1:
                x = nn.functional.avg_pool2d(x, 2)
        return torch.cat(found, 1)

    digest = hashlib.sha256(f"fewstep random features {tuple(shape)} {seed}".encode()).hexdigest()
    return Features(network, name=f"random-{seed}", sha256=digest)


@dataclass(frozen=True)
class Judge:
    r"""The discrepancy of samples from a reference, with a kernel that sees every difference.

    Attributes:
        look: The features, not those of the loss.
        real: The reference in them, shape (M, D), scaled to a root mean square of 1.
        scale: What they were scaled with.
        kernel: The kernel.
        inside: The mean of the kernel within the reference.
    """

    look: Callable[[Tensor], Tensor]
    real: Tensor
    scale: float
    kernel: Callable[[Tensor, Tensor], Tensor]
    inside: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, features: Tensor, look: Callable[[Tensor], Tensor]) -> Judge:
        """Returns the judge with these reference features (M, D)."""
        features = features.double()
        # Centred, so that the root mean square is that of the differences.
        scale = float(1 / (features - features.mean(0)).square().mean().sqrt().clamp(min=1e-12))
        real = features * scale
        kernel = named_kernel("scales", real)
        return cls(look, real, scale, kernel, kernel(real, real))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Returns the scaled features of samples, float64."""
        return self.look(x).flatten(1).cpu().double() * self.scale

    @torch.no_grad()
    def score(self, x: Tensor) -> float:
        """Returns the squared discrepancy, unbiased; smaller is better, about 0 is the best."""
        found = self.features(x)
        if not bool(found.isfinite().all()):
            return float("inf")
        return float(mmd2(self.kernel(found, found), self.inside, self.kernel(found, self.real)))

    @torch.no_grad()
    def diversity(self, x: Tensor) -> tuple[float, float]:
        """Returns precision and recall."""
        found = self.features(x)
        count = min(len(found), len(self.real))
        if not bool(found.isfinite().all()):
            return 0.0, 0.0
        if count < LEAST:
            return 1.0, 1.0
        made = precision_recall(found[:count], self.real[:count], blocks=2)
        return made.precision.value, made.recall.value


def final_scores(
    x: Tensor, *, target: Tensor | None, reference: Reference | None, judge: Judge
) -> dict[str, Any]:
    """Returns the scores of samples from seeds that were never used, each with its interval.

    Arguments:
        x: The samples, in the order of their numbers.
        target: The teacher's samples of the first numbers, if there is one.
        reference: Real data in the features of the loss; scores are against the held-out part.
        judge: The judge.
    """
    scores: dict[str, Any] = {}
    if target is not None and len(target) > 1:
        scores["rms to the teacher"] = rms(x[: len(target)].flatten(1), target.flatten(1))
    if reference is not None:
        name = reference.features_name
        # More real samples than made ones cost much and say little.
        most = max(MOST_REAL, len(x))
        reference = replace(reference, heldout=reference.heldout[:most])
        scores[f"FID ({name})"] = fid(x, reference)
        scores[f"KID ({name})"] = kid(x, reference, heldout=True)
        if min(len(x), len(reference.heldout)) >= LEAST:
            found = precision_recall(x, reference, heldout=True)
            scores[f"precision ({name})"] = found.precision
            scores[f"recall ({name})"] = found.recall
    name = getattr(judge.look, "name", "features")
    real = judge.real[: max(MOST_REAL, len(x))]
    scores[f"MMD2 ({name})"] = kid(judge.features(x), real, kernel=judge.kernel)
    return {key: asdict(value) for key, value in scores.items()}

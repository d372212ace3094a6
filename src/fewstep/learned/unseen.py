r"""Final scores: in features that the search never looked at, on noise and real samples that it did not use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fewstep.learned.judges import IMAGE, LEAST, LEVEL, Judge, discrepancy_change, random_features
from fewstep.learned.verdict import (
    DISTANCE,
    PRECISION,
    RECALL,
    REWARD,
    SPREAD,
    TEACHER,
    TRAINED,
    UNSEEN,
    Score,
)
from fewstep.metrics.features import EMBEDDED, Features, identity, name_of, pixels
from fewstep.metrics.frechet import fid
from fewstep.metrics.intervals import Estimate, student
from fewstep.metrics.kernel import discrepancy
from fewstep.metrics.manifold import precision_recall
from fewstep.metrics.transport import rms

MOST_FID = 256
"""The largest number of features of which FID is shown."""
MOST_SURPLUS = 4.0
"""The most by which a start may spread more than real samples."""
WAVES = 64
"""The number of random waves that are the features of vectors."""


def wavelets(shape: tuple[int, ...]) -> Features:
    r"""Returns features without weights: sizes of Haar wavelet coefficients, and the image at 4 x 4.

    At each of up to three scales the mean absolute value and the root mean square of the horizontal,
    vertical and diagonal differences of each channel: blur, noise and texture show in them.

    Arguments:
        shape: The shape (C, H, W) of an image.
    """

    def network(images: Tensor) -> Tensor:
        x, statistics = images.float(), list[Tensor]()
        for _ in range(3):
            if min(x.shape[2:]) < 2:
                break
            x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
            c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
            for detail in (a - b + c - d, a + b - c - d, a - b - c + d):
                size = detail.flatten(2)
                statistics += [size.abs().mean(2), (size.square().mean(2) + 1e-12).sqrt()]
            x = (a + b + c + d) / 4
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)
        return torch.cat([*statistics, small.flatten(1)], 1)

    digest = hashlib.sha256(f"fewstep wavelets {tuple(shape)}".encode()).hexdigest()
    return Features(network, name="wavelets", sha256=digest)


def waves(shape: tuple[int, ...]) -> Features:
    r"""Returns features of vectors: cosines of random projections, of a few scales."""
    generator = torch.Generator().manual_seed(11)
    size = int(torch.Size(shape).numel())
    weight = torch.randn((size, WAVES), generator=generator, dtype=torch.float64)
    weight = weight * 4 ** torch.rand(WAVES, generator=generator, dtype=torch.float64)
    phase = 6.3 * torch.rand(WAVES, generator=generator, dtype=torch.float64)

    def network(x: Tensor) -> Tensor:
        return (x.flatten(1).double() @ weight.to(x.device) + phase.to(x.device)).cos()

    digest = hashlib.sha256(f"fewstep waves {tuple(shape)}".encode()).hexdigest()
    return Features(network, name="waves", sha256=digest)


def random_vectors(shape: tuple[int, ...]) -> Features:
    """Returns features of vectors: those of a network of two layers with random weights."""
    generator = torch.Generator().manual_seed(12)
    size = int(torch.Size(shape).numel())
    first = torch.randn((size + 1, WAVES), generator=generator, dtype=torch.float64)
    second = torch.randn((WAVES, WAVES), generator=generator, dtype=torch.float64) / WAVES**0.5

    def network(x: Tensor) -> Tensor:
        x = x.flatten(1).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        return ((x @ first.to(x)).relu() @ second.to(x)).relu()

    digest = hashlib.sha256(f"fewstep random vectors {tuple(shape)}".encode()).hexdigest()
    return Features(network, name="random-2", sha256=digest)


def unseen_extractors(
    shape: tuple[int, ...],
    used: Sequence[Callable[[Tensor], Tensor]],
    more: Sequence[Callable[[Tensor], Tensor]] = (),
) -> list[Callable[[Tensor], Tensor]]:
    """Returns extractors that a search does not use, at least two; of different kinds.

    For images a network with random weights, wavelets, and the embedded classifiers if they take
    such images; for vectors the points, random waves and a random network.

    Arguments:
        shape: The shape of a sample.
        used: The extractors of the loss and of the selection.
        more: Further ones to add.
    """
    extractors: list[Callable[[Tensor], Tensor]] = [*more]
    if len(shape) == IMAGE:
        extractors += [random_features(shape, seed=2), wavelets(shape)]
        if shape == (1, 28, 28):
            extractors += [Features.load(name) for name in EMBEDDED]
    else:
        extractors += [pixels(), random_vectors(shape), waves(shape)]
    identities = {identity(extract) or id(extract) for extract in used}
    return [e for e in extractors if (identity(e) or id(e)) not in identities]


@dataclass(frozen=True)
class Space:
    """A feature space of the final scores, with samples that the search did not use.

    Attributes:
        extract: The feature extractor.
        real: The features (M, D) of samples that the search did not use.
        role: What the search did with these features.
    """

    extract: Callable[[Tensor], Tensor]
    real: Tensor
    role: str = UNSEEN

    @property
    def name(self) -> str:
        """The name of the features and their role, for reports."""
        return f"{name_of(self.extract)}, {self.role}"

    @cached_property
    def judge(self) -> Judge:
        """The kernel distance from the samples."""
        return Judge.of(self.real, self.extract)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Returns the features of samples, float64, shape (n, D)."""
        return self.extract(x).flatten(1).cpu().double()


def final_scores(
    x: Tensor,
    *,
    start: Tensor | None = None,
    target: Tensor | None,
    target_role: str,
    spaces: Sequence[Space],
    groups: Tensor | None = None,
    reward: Callable[[Tensor], Tensor] | None = None,
) -> list[Score]:
    """Returns the scores of samples from seeds that were not used before, each with its interval.

    Arguments:
        x: The samples, in the order of their numbers.
        start: The start's samples from the same noise, for the changes; left out, x is the start's.
        target: The teacher's samples of the first numbers, if there is one.
        target_role: What the search did with the distance to the teacher.
        spaces: The feature spaces.
        groups: The class of each sample, or ``None``.
        reward: The user's reward, if it was an objective.
    """
    scores = list[Score]()
    if reward is not None:
        scores.append(_reward(reward, x, start))
    if target is not None and len(target) > 1:
        n = len(target)
        estimate = rms(x[:n].flatten(1), target.flatten(1))
        change = None if start is None else _rms_change(x[:n], start[:n], target)
        scores.append(
            Score(f"rms to the teacher ({target_role})", TEACHER, estimate, target_role, change)
        )
    for space in spaces:
        features = space.features(x)
        before = None if start is None else space.features(start)
        if not bool(features.isfinite().all()):
            raise ValueError("the features of the samples are not all finite")
        judge, real = space.judge, space.real.double()
        if features.shape[1] <= MOST_FID and min(len(features), len(real)) > 1:
            value = fid(features, real)
            scores.append(Score(f"FID ({space.name})", DISTANCE, value, space.role))
        scaled = features * judge.scale
        matrices = judge.kernel(scaled, scaled), judge.inside, judge.kernel(scaled, judge.real)
        estimate = discrepancy(*matrices)
        change = None if before is None else discrepancy_change(judge, features, before)
        scores.append(Score(f"MMD2 ({space.name})", DISTANCE, estimate, space.role, change))
        count = min(len(features), len(real))
        if count >= LEAST:
            manifold = precision_recall(features, real[: max(count, LEAST)])
            for kind, share in ((PRECISION, manifold.precision), (RECALL, manifold.recall)):
                scores.append(Score(f"{kind} ({space.name})", kind, share, space.role))
    unseen = next((s for s in spaces if s.role == UNSEEN), None)
    if unseen is not None:
        scores.append(_spread(unseen, x, x if start is None else start, groups))
    return scores


def _reward(reward: Callable[[Tensor], Tensor], x: Tensor, start: Tensor | None) -> Score:
    """Returns the mean reward of samples, and its change from the start's."""
    with torch.no_grad():
        value = reward(x).cpu().double()
        change = None if start is None else _mean(value - reward(start).cpu().double())
    return Score(f"reward ({TRAINED})", REWARD, _mean(value), TRAINED, change)


def _mean(values: Tensor) -> Estimate:
    n = len(values)
    width = student(LEVEL, n - 1) * float(values.std()) / n**0.5 if n > 1 else math.inf
    value = float(values.mean())
    return Estimate(value, value - width, value + width, LEVEL, "Student", (n, n))


def _rms_change(x: Tensor, start: Tensor, target: Tensor) -> Estimate:
    """Returns how much larger the RMS distance of x from the target is than that of the start."""
    a, b = ((side.double() - target.double()).square().flatten(1).mean(1) for side in (x, start))
    roots = a.mean().sqrt(), b.mean().sqrt()
    value = float(roots[0] - roots[1])
    # The root's derivative at each mean turns the difference into a mean over samples.
    terms = a / (2 * roots[0]).clamp(min=1e-30) - b / (2 * roots[1]).clamp(min=1e-30)
    width = student(LEVEL, len(a) - 1) * float(terms.std()) / len(a) ** 0.5
    return Estimate(
        value, value - width, value + width, LEVEL, "Student, paired", (len(a), len(a))
    )


def _spread(space: Space, x: Tensor, start: Tensor, groups: Tensor | None) -> Score:
    """Returns the spread of the class that lost most of it, relative to the start's.

    The spread is the trace of the covariance of the features within a class. Where the start
    spreads more than real samples, because of noise, the surplus may be lost.
    """
    after, before, real = space.features(x), space.features(start), space.real.double()
    ranks = torch.zeros(len(x), dtype=torch.long) if groups is None else groups
    groups_of = [(ranks == group).nonzero().flatten() for group in ranks.unique().tolist()]
    within = torch.stack([before[rows].var(0).sum() for rows in groups_of]).mean()
    # The classes of real samples are not known; their means are taken to be as far apart as the start's.
    between = before.var(0).sum() - within
    least = (real.var(0).sum() - between).clamp(min=float(within) / MOST_SURPLUS)
    surplus = float(within / least.clamp(min=1e-30))
    worst, which = None, 0
    for group, rows in enumerate(groups_of):
        squares = [
            (side[rows] - side[rows].mean(0)).square().sum(1).clamp(min=1e-30)
            for side in (after, before)
        ]
        means = [s.mean() for s in squares]
        ratio = float(means[0] / means[1]) * max(1.0, surplus)
        terms = squares[0] / means[0] - squares[1] / means[1]
        # Three standard errors: the worst of many classes is looked at.
        width = 3 * float(terms.std()) / len(rows) ** 0.5
        if worst is None or ratio < worst.value:
            low, high = ratio * (1 - width), ratio * (1 + width)
            worst = Estimate(ratio, low, high, 0.997, "Student, paired", (len(rows), len(rows)))
            which = group
    assert worst is not None
    if start is x:
        worst = Estimate(1.0, 1.0, 1.0, 0.997, "the start itself", worst.sizes)
    worst = replace(
        worst, method=f"{worst.method}, {which}" if groups is not None else worst.method
    )
    name = "class" if groups is not None else "set"
    return Score(f"spread of the least varied {name} ({space.name})", SPREAD, worst)

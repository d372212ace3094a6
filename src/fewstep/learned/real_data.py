r"""The real data of a search: one part for the loss, one for the selection, one for the final scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.learned.judges import IMAGE, random_features
from fewstep.metrics.features import EMBEDDED as EXTRACTORS
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.real import RealData as Images
from fewstep.metrics.real import order
from fewstep.metrics.reference import EMBEDDED, Reference, unused_images

logger = logging.getLogger("fewstep")


MOST = 2000
"""The most real samples with which candidates or results are compared."""


@dataclass(frozen=True)
class RealData:
    r"""The real data of a search: three parts that share no sample.

    Attributes:
        loss: The reference of the loss, of which it uses ``features``.
        judge: The reference in the features of the selection; the same object if there are no others.
        selection: The rows of the held-out features with which candidates are selected.
        final: The rows of the held-out features with which the result is scored.
        samples: Real samples of the final part, (n, \*), for other features; ``None`` if only
            features are given.
    """

    loss: Reference
    judge: Reference
    selection: Tensor
    final: Tensor
    samples: Tensor | None = None

    @property
    def independent(self) -> bool:
        """Whether the selection has features that the loss does not use."""
        return self.judge is not self.loss


def real_data(data: Any, features: FeatureMap, shape: tuple[int, ...]) -> RealData | None:
    r"""Returns the real data of a search, or ``None`` if there are none.

    The judge uses other features than the loss: random ones if the real samples themselves are
    given, another embedded extractor for embedded data. A :class:`Reference` has one kind of
    features; the judge then has the held-out samples, in the features of the loss. One half of the
    held-out samples selects candidates, the other scores the result.

    Arguments:
        data: A name, a path, a tensor (n, \*), a :class:`Reference` or ``None``.
        features: The features of the loss; left out, those that suit the shape.
        shape: The shape of a sample.

    Raises:
        TypeError, ValueError: If the data are none of these, or of another shape.
    """
    if data is None:
        return None
    unseen = random_features(shape)
    if isinstance(data, Reference):
        half = order(len(data.heldout)).tensor_split(2)
        return RealData(data, data, half[0][:MOST], half[1][:MOST])
    if isinstance(data, Tensor):
        if tuple(data.shape[1:]) != shape or len(data) < 40:
            raise ValueError(
                f"data must have shape (n, {', '.join(map(str, shape))}) with n of at least 40, got "
                f"{tuple(data.shape)}"
            )
        half = len(data) // 2
        parts = (data[:half], data[half:])
        own = loss_features(features, shape)
        loss, judge = Reference.of(*parts, features=own), Reference.of(*parts, features=unseen)
        return _parts(loss, judge, len(parts[1]), lambda index: parts[1][index])
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data is a name, a path, a tensor or a Reference, got {data!r:.60}")
    if len(shape) != IMAGE:
        raise ValueError(f"{str(data)!r} holds images, the model's samples have shape {shape}")
    size = shape[1] if shape[1] == shape[2] else None
    embedded = str(data) in EMBEDDED
    own = extractor(loss_features(features, shape))
    reference = Reference.load(data, own, size=None if embedded else size)
    if reference.event_shape is not None and tuple(reference.event_shape) != shape:
        raise ValueError(
            f"the images of {str(data)!r} have shape {tuple(reference.event_shape)}, the model's "
            f"samples {shape}"
        )
    if embedded:
        judge = Reference.load(data, _other(reference.features_name))
        half = order(len(judge.heldout)).tensor_split(2)
        images = unused_images(str(data))
        return RealData(reference, judge, half[0][:MOST], half[1][:MOST], images)
    images = Images.read(data, size=size)
    judge = Reference.load(data, unseen, size=size)
    return _parts(reference, judge, images.m, images.heldout)


def _parts(
    loss: Reference, judge: Reference, m: int, samples: Callable[[Tensor], Tensor]
) -> RealData:
    """Returns the data with the m samples held out in halves; features are stored in their order."""
    heldout = order(m)[: len(judge.heldout)]
    rows = heldout.argsort().argsort()  # the row of each in the stored features
    half = len(heldout) // 2
    return RealData(
        loss, judge, rows[:half][:MOST], rows[half:][:MOST], samples(heldout[half:][:MOST])
    )


def _other(name: str) -> str:
    """Returns an embedded extractor other than that of the loss."""
    return next(other for other in EXTRACTORS if other != name)


def loss_features(features: FeatureMap, shape: tuple[int, ...]) -> FeatureMap:
    """Returns the features of the loss: those given, or those that suit the shape of a sample."""
    if features is not None or len(shape) != IMAGE:
        return features
    if shape == (1, 28, 28):
        return "fashion"
    logger.info("no features were given: mmd compares those of a random network")
    return random_features(shape, seed=1)

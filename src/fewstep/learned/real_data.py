r"""The real data of a search: in the features of the loss, and in others for the judge."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.learned.judges import IMAGE, random_features
from fewstep.metrics.features import EMBEDDED as EXTRACTORS
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.reference import EMBEDDED, Reference

logger = logging.getLogger("fewstep")


def references(
    data: Any, features: FeatureMap, shape: tuple[int, ...]
) -> tuple[Reference | None, Reference | None]:
    r"""Returns the reference of the loss, and that of the judge.

    The judge uses other features than the loss: random ones if the real samples themselves are
    given, another embedded extractor for embedded data. A :class:`Reference` has one kind of
    features; the judge then has the held-out samples, in the features of the loss.

    Arguments:
        data: A name, a path, a tensor (n, \*), a :class:`Reference` or ``None``.
        features: The features of the loss; left out, those that suit the shape.
        shape: The shape of a sample.

    Raises:
        TypeError, ValueError: If the data are none of these, or of another shape.
    """
    if data is None:
        return None, None
    unseen = random_features(shape)
    if isinstance(data, Reference):
        return data, data
    if isinstance(data, Tensor):
        if tuple(data.shape[1:]) != shape or len(data) < 40:
            raise ValueError(
                f"data must have shape (n, {', '.join(map(str, shape))}) with n of at least 40, got "
                f"{tuple(data.shape)}"
            )
        half = len(data) // 2
        parts = (data[:half], data[half:])
        own = _features(features, shape)
        return Reference.of(*parts, features=own), Reference.of(*parts, features=unseen)
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data is a name, a path, a tensor or a Reference, got {data!r:.60}")
    if len(shape) != IMAGE:
        raise ValueError(f"{str(data)!r} holds images, the model's samples have shape {shape}")
    size = shape[1] if shape[1] == shape[2] else None
    embedded = str(data) in EMBEDDED
    own = extractor(_features(features, shape))
    reference = Reference.load(data, own, size=None if embedded else size)
    if reference.event_shape is not None and tuple(reference.event_shape) != shape:
        raise ValueError(
            f"the images of {str(data)!r} have shape {tuple(reference.event_shape)}, the model's "
            f"samples {shape}"
        )
    if embedded:
        return reference, Reference.load(data, _other(reference.features_name))
    return reference, Reference.load(data, unseen, size=size)


def _other(name: str) -> str:
    """Returns an embedded extractor other than that of the loss."""
    return next(other for other in EXTRACTORS if other != name)


def _features(features: FeatureMap, shape: tuple[int, ...]) -> FeatureMap:
    if features is not None or len(shape) != IMAGE:
        return features
    if shape == (1, 28, 28):
        return "fashion"
    logger.info("no features were given: mmd compares those of a random network")
    return random_features(shape, seed=1)

r"""Distances between samples and the teacher's samples from the same noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.base.registry import Registry
from fewstep.metrics.features import FeatureMap, extractor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Takes samples and targets (B, *), returns distances (B), differentiable in the first."""


def mse(x: Tensor, y: Tensor) -> Tensor:
    r"""Returns :math:`\|x - y\|^2 / d` of each sample, shape (B)."""
    return (x - y).flatten(1).square().mean(1)


def pseudo_huber(x: Tensor, y: Tensor) -> Tensor:
    r"""Returns :math:`\sqrt{\|x - y\|^2 / d + c^2} - c` with c = 0.03 of each sample, shape (B)."""
    return (mse(x, y) + 0.03**2).sqrt() - 0.03


DISTANCES: Registry[Distance] = Registry("distance", {"mse": mse, "pseudo-huber": pseudo_huber})
"""The distances without feature extractor by name; ``"features"`` is :func:`feature_distance`."""


def feature_distance(features: FeatureMap) -> Distance:
    """Returns the mean square of the difference of features, as a distance."""
    extract = extractor(features)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = extract(y)
        return mse(extract(x), target)

    return distance


def distance_of(distance: str | Distance, features: FeatureMap = None) -> Distance:
    """Returns the distance of a name, or the callable itself.

    Arguments:
        distance: A name in :data:`DISTANCES`, ``"features"``, or a callable.
        features: The extractor of ``"features"``.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(distance):
        return distance
    if distance == "features":
        return feature_distance(features)
    if distance not in DISTANCES:
        raise ValueError(
            f"unknown distance {distance!r}; there are features, {', '.join(DISTANCES)}"
        )
    return DISTANCES[distance]

"""Arguments of a PlanScheduler: lists of numbers, clipping of predicted data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def clip(config: Mapping[str, Any], x0: Tensor) -> Tensor:
    r"""Returns predicted data (B, \*) clipped or thresholded, as the configuration asks."""
    if config["thresholding"]:
        sizes = x0.flatten(1).abs()
        at = config["dynamic_thresholding_ratio"] * (sizes.shape[1] - 1)
        low = int(at)
        below = sizes.kthvalue(low + 1, dim=1).values
        above = sizes.kthvalue(min(low + 2, sizes.shape[1]), dim=1).values
        most = config["sample_max_value"]  # below 1 it has precedence, as in diffusers
        bound = torch.lerp(below, above, at - low).clamp(min=1.0, max=most)
        bound = bound.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-bound, bound) / bound
    bound = config["clip_sample_range"]
    return x0.clamp(-bound, bound)


def numbers(name: str, values: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    """Returns given timesteps or sigmas as numbers."""
    if values is None:
        return None
    try:
        listed = values.tolist() if hasattr(values, "tolist") else list(values)  # type: ignore[union-attr]
        listed = tuple(float(v) for v in listed)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, got {values!r:.80}") from None
    if not listed:
        raise ValueError(f"{name} must not be empty")
    return listed


def number(name: str, value: Any) -> float:
    """Returns a given number.

    Raises:
        ValueError: If it is none, or not finite.
    """
    try:
        converted = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r:.80}") from None
    if not math.isfinite(converted):
        raise ValueError(f"{name} must be finite, got {converted!r}")
    return converted

"""The checks of what a user says of a network to :meth:`fewstep.Denoiser.wrap`, before any evaluation."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedules import NoiseSchedule


def check_network(network: Any) -> None:
    """Refuses what cannot be called, and classes, which would be called to make an instance.

    Raises:
        TypeError: If it is one of those.
    """
    if not callable(network):
        raise TypeError(f"the network must be callable, got {type(network).__name__}")
    if inspect.isclass(network):
        raise TypeError(
            f"the network must be an instance, got the class {network.__name__}; make one: {network.__name__}(...)"
        )


def event_shape_of(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of one sample as a tuple.

    Raises:
        ValueError: If it is no sequence of positive integers.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str) or any(isinstance(size, bool) for size in value):
            raise TypeError
        shape = tuple(operator.index(size) for size in value)
    except TypeError:
        shape = (0,)
    if any(size < 1 for size in shape):
        raise ValueError(
            "event_shape must be a sequence of positive integers, the shape of one sample without the batch, "
            f"e.g. (3, 32, 32), got {value!r:.60}"
        )
    return shape


def check_moments(
    mean: Tensor | float | Sequence[float] | None,
    std: Tensor | float | Sequence[float] | None,
    shape: tuple[int, ...] | None,
) -> None:
    """Refuses a mean or a standard deviation that no data of this shape can have.

    Raises:
        ValueError: If one is not finite, does not fit the shape, or the deviation is negative.
    """
    for name, value in (("data_mean", mean), ("data_std", std)):
        if value is None:
            continue
        numbers = _numbers(value)
        if numbers is None:
            raise ValueError(
                f"{name} must be a number or a tensor of numbers, got {type(value).__name__}"
            )
        if shape is not None and not _fits(numbers.shape, shape):
            raise ValueError(
                f"{name} has the shape {tuple(numbers.shape)}; give a number, or a tensor that broadcasts to the "
                f"shape of one sample, {shape}"
            )
        if not numbers.is_meta and not bool(numbers.isfinite().all()):
            raise ValueError(f"{name} must be finite")
        if name == "data_std" and not numbers.is_meta and bool(numbers.lt(0).any()):
            raise ValueError(
                f"{name} must not be negative, got {float(numbers.min()):g}; it is the standard deviation"
            )


def _numbers(value: Any) -> Tensor | None:
    """Returns real numbers as a tensor, ``None`` for anything else."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if numbers.dtype == torch.bool or numbers.is_complex() else numbers


def _fits(numbers: torch.Size, shape: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(numbers, shape) == shape
    except RuntimeError:
        return False


def check_model_time(to_model_time: Callable[[Tensor], Any], schedule: NoiseSchedule) -> None:
    """Refuses a map of times that does not return a time for each sample, tried at both ends of the schedule.

    Raises:
        TypeError: If it is not callable, or returns no tensor.
        ValueError: If the times have another shape, or are not finite.
    """
    if not callable(to_model_time):
        raise TypeError(f"to_model_time must be a function, got {type(to_model_time).__name__}")
    ends = torch.tensor([schedule.t_max, schedule.t_max, schedule.t_min])
    try:
        times = to_model_time(ends.clone())
    except RuntimeError:  # it may need times on another device, or of another type
        return
    check_times(times, ends)
    if not times.is_meta and not bool(times.isfinite().all()):
        raise ValueError(
            f"to_model_time maps the schedule's times {schedule.t_max:g} and {schedule.t_min:g} to "
            f"{times.flatten()[[0, -1]].tolist()}; conditioning timesteps must be finite"
        )


def check_times(times: Any, given: Tensor) -> None:
    """Refuses what is no tensor with one time for each sample, or one for all.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(times, Tensor):
        raise TypeError(f"to_model_time must return a tensor of times, got {type(times).__name__}")
    if times.ndim and len(times) != len(given):
        raise ValueError(
            f"to_model_time must return a time for each sample, with shape ({len(given)},), "
            f"got {tuple(times.shape)}"
        )


def null_condition_of(value: Any) -> dict[str, Any]:
    """Returns the null values of conditions as a dict.

    Raises:
        TypeError: If it is no mapping of names.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            "null_condition must map names of conditions to their null values, e.g. {'class_labels': 10}, "
            f"got {value!r:.60}"
        )
    return dict(value)

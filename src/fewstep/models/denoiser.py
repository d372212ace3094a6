r"""Denoisers: any network in one coordinate system."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, convert
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.conditions import AcceptedConditions, Conditions


class Denoiser(nn.Module, ABC):
    r"""A network with its schedule, asked for any of the five predictions.

    Attributes:
        schedule: The noise schedule that it was trained with.
        native: What it predicts.
        event_shape: The shape of one sample, or ``None`` if unknown.
        null_condition: For each condition, the value that stands for none (for guidance).
        data_mean: The mean of the data, a number or of the event's shape (for a head start).
        data_std: The standard deviation of the data, likewise.
        accepts: The conditions that the network takes.
        calls: The network calls of one evaluation (2 with guidance).
    """

    schedule: NoiseSchedule
    native: Prediction
    event_shape: tuple[int, ...] | None = None
    null_condition: Mapping[str, Any] = {}
    accepts: AcceptedConditions = AcceptedConditions()
    data_mean: Tensor | float | None = None
    data_std: Tensor | float | None = None
    calls: int = 1

    @abstractmethod
    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        r"""Returns the native prediction, (B, \*), at a state (B, \*) and times (B)."""

    @final
    def forward(
        self, x: Tensor, t: Tensor | float, *, prediction: Prediction | str = "eps", **cond: Any
    ) -> Tensor:
        r"""Returns a prediction, converted exactly.

        Arguments:
            x: The state, with shape (B, \*).
            t: The time, a number or a tensor with shape () or (B).
            prediction: What is wanted: ``"eps"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``.
            cond: The conditions, e.g. ``class_labels``.
        """
        target = Prediction.of(prediction)
        if any(not isinstance(v, Tensor) or not v.ndim for v in cond.values()):
            cond = Conditions.of(self, len(x), cond).at(range(len(x)), x.device)
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        value = self.raw(x, _times(times, x), **cond)
        if target is self.native:
            return value
        return convert(
            value,
            x,
            alpha=self.schedule.alpha(times),
            sigma=self.schedule.sigma(times),
            source=self.native,
            target=target,
        )

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU if there is none."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @final
    def prepare(self, n: int, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the conditions ready for one batch of n samples, on the model's device.

        Raises:
            ValueError, TypeError: If a condition does not fit; see :meth:`Conditions.of`.
        """
        return Conditions.of(self, n, cond).at(range(n))

    def built_in_sampler(self) -> Any:
        """Returns the sampler that this model brings, or ``None``: any solver samples it then."""
        return None

    def fingerprint(self) -> str:
        """Returns a SHA-256 of what this model is: schedule, prediction, shape and every weight.

        Two models with the same one give the same answers, as far as can be told without reading
        code: a plain function has no weights to look at. Guidance is part of a sampler, not of it.
        """
        digest = hashlib.sha256()
        shape = None if self.event_shape is None else list(self.event_shape)
        about = [self.schedule.to_record(), self.native.value, shape]
        digest.update(json.dumps(about, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @staticmethod
    def wrap(
        network: Callable[..., Tensor],
        *,
        schedule: NoiseSchedule,
        prediction: Prediction | str,
        event_shape: Sequence[int] | None = None,
        to_model_time: Callable[[Tensor], Tensor] | None = None,
        integer_times: bool = False,
        null_condition: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
    ) -> Denoiser:
        r"""Returns a denoiser from any callable.

        Arguments:
            network: ``network(x, t, **cond)`` with x (B, \*) and t (B), returning (B, \*).
            schedule: The noise schedule that it was trained with.
            prediction: What it predicts: ``"eps"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``.
            event_shape: The shape of one sample; without it, give ``noise=`` when sampling.
            to_model_time: Maps schedule times (B) to what the network is given; left out, they
                are given as they are (for tabulated schedules the fractional index).
            integer_times: Whether the network knows only whole indices: grids are then rounded
                when they are made, and stages between grid points get the nearest index.
            null_condition: For each condition the value that stands for none, for guidance.
            num_classes: The number of classes; labels outside are then refused. Left out, the
                network's attribute of that name, if it has one.
            data_mean: The mean of the data, for a head start.
            data_std: The standard deviation of the data, for a head start.

        Raises:
            TypeError: If the network is not callable, or the schedule is not a schedule.
        """
        if not callable(network):
            raise TypeError(f"the network must be callable, got {type(network).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {schedule!r}; make one with fewstep.schedule(name)"
            )
        if integer_times and not schedule.discrete:
            raise ValueError(
                f"integer_times needs a tabulated schedule, {schedule.name!r} has continuous times"
            )
        return WrappedNetwork(
            network,
            schedule=schedule,
            prediction=Prediction.of(prediction),
            event_shape=None if event_shape is None else tuple(event_shape),
            to_model_time=to_model_time,
            integer_times=integer_times,
            null_condition=null_condition,
            num_classes=num_classes,
            data_mean=data_mean,
            data_std=data_std,
        )


def _times(t: Tensor, x: Tensor) -> Tensor:
    """Times as (B) on the state's device, never below float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return t.to(device=x.device, dtype=dtype).expand(x.shape[0])


class WrappedNetwork(Denoiser):
    """A callable with its schedule and conventions; made by :meth:`Denoiser.wrap`."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        *,
        schedule: NoiseSchedule,
        prediction: Prediction,
        event_shape: tuple[int, ...] | None,
        to_model_time: Callable[[Tensor], Tensor] | None = None,
        integer_times: bool = False,
        null_condition: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.native = prediction
        self.event_shape = event_shape
        self.integer_times = integer_times
        self.null_condition = dict(null_condition or {})
        self.data_mean, self.data_std = data_mean, data_std
        self._to_model_time = to_model_time
        self.accepts = AcceptedConditions.of(network, num_classes=num_classes)

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self.integer_times:
            t = t.round().long()
        if self._to_model_time is not None:
            t = self._to_model_time(t)
        value = self.network(x, t, **cond)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the network must return a tensor of the state's shape {tuple(x.shape)}, got {got} "
                "(of a network with learned variances take the first half of the channels)"
            )
        return value

r"""Denoisers: any network in one coordinate system."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.base.devices import find_device
from fewstep.diffusion.prediction import Prediction, convert
from fewstep.diffusion.schedules import Flow, NoiseSchedule
from fewstep.models.calling import COMPUTING, NetworkCaller
from fewstep.models.conditions import AcceptedConditions, Conditions
from fewstep.models.description import (
    check_model_time,
    check_moments,
    check_network,
    event_shape_of,
    null_condition_of,
)


class Denoiser(nn.Module, ABC):
    r"""A network with the noise schedule that it was trained with: the model of every sampler.

    It is created by :func:`fewstep.load` or :meth:`Denoiser.wrap`, and returns any of the five predictions
    of :class:`fewstep.Prediction` at a state :math:`x = \alpha(t) x_0 + \sigma(t) \varepsilon`, (B, \*) to (B, \*).

    A custom model derives from it: it sets ``schedule``, ``native`` and ``event_shape`` and
    defines :meth:`raw`.

    Cost: one network evaluation for each call; with guidance one of twice the batch (``passes``).

    Attributes:
        schedule: The noise schedule, :math:`\alpha(t)` and :math:`\sigma(t)`.
        native: The network's own prediction; others are converted exactly.
        event_shape: The shape of one sample, (C, H, W) for images, or ``None`` if it is not known.
        null_condition: For each condition its null value (for guidance).
        accepts: The conditions that the network takes.
        unguided: The error message for guidance without a null condition.
        integer_times: Whether the network takes integer timesteps only; grids are then rounded.
        data_mean: The mean of the data, a number or of the event's shape (for a head start).
        data_std: The standard deviation of the data, likewise.
        profile: Its :class:`fewstep.Profile`, which ``auto`` uses, or ``None``.
        passes: The forward passes of the network in one evaluation (2 with guidance).
        latents: Whether the samples are latents of an autoencoder, and no pictures.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> x = torch.randn(3, 2)
        >>> eps, x0 = denoiser(x, 0.5), denoiser(x, 0.5, prediction="x0")
        >>> t = torch.tensor(0.5)
        >>> alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        >>> torch.allclose(alpha * x0 + sigma * eps, x, atol=1e-5)
        True
    """

    schedule: NoiseSchedule
    native: Prediction
    event_shape: tuple[int, ...] | None = None
    null_condition: Mapping[str, Any] = {}
    accepts: AcceptedConditions = AcceptedConditions()
    unguided: str = (
        "guidance needs a null condition: Denoiser.wrap(..., null_condition={name: value})"
    )
    data_mean: Tensor | float | None = None
    data_std: Tensor | float | None = None
    profile: Any = None
    integer_times: bool = False
    passes: int = 1
    latents: bool = False

    @abstractmethod
    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        r"""Returns the native prediction, (B, \*), at a state (B, \*) and times (B), which are not checked."""

    @final
    def forward(
        self, x: Tensor, t: Tensor | float, *, prediction: Prediction | str = "eps", **cond: Any
    ) -> Tensor:
        r"""Returns a prediction, converted exactly; one evaluation of the network.

        Arguments:
            x: The state, with shape (B, \*).
            t: The time in the schedule's units, a number or a tensor with shape () or (B).
            prediction: The prediction to return: ``"eps"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``.
            cond: The conditions, e.g. ``class_labels``: for all samples, or one for each.

        Raises:
            TypeError: If the time is no number.
            ValueError: If the prediction is unknown, the time is not finite, a condition does not fit, or the network
                returns another shape. Times outside of the schedule are left to the network: whoever asks whether a
                description is right evaluates there.
        """
        target = Prediction.of(prediction)
        times = _checked_times(t, len(x))
        if not torch.compiler.is_compiling():
            with contextlib.suppress(RuntimeError):  # under vmap and in traces they have no values
                if not bool(times.isfinite().all()):
                    raise ValueError(f"t must be finite, got {times.flatten().tolist()!r:.60}")
        return self.evaluate(x, times, prediction=target, **cond)

    @final
    def evaluate(
        self, x: Tensor, t: Tensor | float, *, prediction: Prediction | str = "eps", **cond: Any
    ) -> Tensor:
        r"""Returns what a call does, at times that were checked before, as those of a sampler's grid.

        Arguments:
            x: The state, with shape (B, \*).
            t: The time, a number or a tensor with shape () or (B).
            prediction: The prediction to return.
            cond: The conditions.

        Raises:
            ValueError: As a call does, but for times.
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
        for tensors in (self.parameters(), self.buffers()):
            for tensor in tensors:
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
        """Returns the built-in sampler of this model, or ``None`` if any solver samples it."""
        return None

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the model: schedule, prediction, shape and all weights.

        Models with the same fingerprint have the same predictions, except that code is not hashed: of
        a plain function nothing is. Guidance is part of a sampler, not of a model.

        Cost: one pass over the weights, on the CPU. It is not cached: torch does not count changes that
        are made through ``.data``, as averages of weights are. :func:`matches` is, for checks.
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
        network: Callable[..., Any],
        *,
        schedule: NoiseSchedule,
        prediction: Prediction | str,
        event_shape: Sequence[int] | None = None,
        to_model_time: Callable[[Tensor], Tensor] | None = None,
        integer_times: bool = False,
        time_reversed: bool = False,
        null_condition: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Denoiser:
        r"""Returns a denoiser from any callable; ``fewstep.studies.model_check`` checks its description.

        The network may return the prediction (B, \*), a tuple or list that begins with it, an object
        with ``.sample``, a dict (``"sample"``, the prediction's name, or its only tensor), or (B, 2C, \*)
        with a learned variance, which is dropped. The state is cast to the type of a module's weights
        and the output back to the state's. A module in training mode is in evaluation mode during
        each evaluation, and in training mode afterwards (unless the denoiser is trained: ``.train()``).
        So are modules that a function or a method refers to, also through objects and lists; one that is
        created or looked up in an evaluation is not seen, and must be in evaluation mode by itself.

        Arguments:
            network: ``network(x, t, **cond)`` with x (B, \*) and t (B), a module or a function.
            schedule: The noise schedule that it was trained with.
            prediction: Its prediction: ``"eps"``, ``"x0"``, ``"v"``, ``"score"`` or ``"flow"``, or the names
                in diffusers, ``"epsilon"``, ``"sample"``, ``"v_prediction"``, ``"flow_prediction"``.
            event_shape: The shape of one sample; without it, give ``noise=`` when sampling.
            to_model_time: Maps schedule times (B) to conditioning timesteps; left out, they are the
                times themselves (for tabulated schedules the possibly fractional index).
            integer_times: Whether the network takes integer timesteps only (int64), as one with a table of
                embeddings does: grids are then rounded, and stages between grid points get the
                nearest timestep.
            time_reversed: For the schedule ``flow``, whether the network's time is 0 at noise and 1 at
                data, as in most code for flow matching: it is given 1 - t, before ``to_model_time``, and
                its velocity is :math:`dx/d(1 - t) = x_0 - \varepsilon`, data minus noise. (By default it
                is given t, 1 at noise, and its velocity is :math:`\varepsilon - x_0`.)
            null_condition: For each condition its null value, for guidance.
            num_classes: The number of classes; labels outside are then refused. Left out, the
                network's attribute of that name, if it has one.
            data_mean: The mean of the data, for a head start.
            data_std: The standard deviation of the data, for a head start.
            device: The device of the network and of the samples; a module is moved there. Left out,
                that of its parameters, or of the modules that a function refers to.
            dtype: The type in which the network computes; a module is converted to it.

        Raises:
            TypeError: If the network is not callable, or the schedule is not a schedule.
            ValueError: If the prediction is unknown, or an option does not fit the schedule.

        Example:
            >>> def network(x, t):  # x (B, 2), t (B)
            ...     return x / (1 + t.view(-1, 1))
            >>> denoiser = fewstep.Denoiser.wrap(
            ...     network, schedule=fewstep.schedule("edm"), prediction="eps", event_shape=(2,)
            ... )
            >>> fewstep.sample(denoiser, 4, solver="ddim", nfe=5).shape
            torch.Size([4, 2])
        """
        if isinstance(network, Denoiser):
            raise TypeError("this is a Denoiser already; use it as it is")
        check_network(network)
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {schedule!r:.60}; make one with "
                "fewstep.schedule(name), or of betas with fewstep.schedule('tabulated', betas=betas)"
            )
        if integer_times and not schedule.discrete:
            raise ValueError(
                f"integer_times needs a tabulated schedule, {schedule.name!r} has continuous times"
            )
        if time_reversed and not isinstance(schedule, Flow):
            raise ValueError(
                f"time_reversed needs the schedule 'flow', got {schedule.name!r}; for others map the "
                "times with to_model_time="
            )
        if dtype is not None and dtype not in COMPUTING:
            raise ValueError(f"dtype must be a floating type, got {dtype!r}")
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}")
        shape = event_shape_of(event_shape)
        check_moments(data_mean, data_std, shape)
        if to_model_time is not None and not integer_times:
            check_model_time(to_model_time, schedule)
        null_values = null_condition_of(null_condition)
        place = torch.device("meta") if str(device) == "meta" else None
        if device is not None and place is None:
            place = find_device(device)
        if isinstance(network, nn.Module):
            network.to(device=place, dtype=dtype)
        return WrappedNetwork(
            network,
            schedule=schedule,
            prediction=Prediction.of(prediction),
            event_shape=shape,
            to_model_time=to_model_time,
            integer_times=integer_times,
            time_reversed=time_reversed,
            null_condition=null_values,
            num_classes=num_classes,
            data_mean=data_mean,
            data_std=data_std,
            device=place,
            dtype=dtype,
        )


def _checked_times(t: Tensor | float, n: int) -> Tensor:
    """Returns a user's times as float64 on the CPU, where a check of their values does not wait for a device.

    Raises:
        TypeError, ValueError: If they are no numbers, or have another shape.
    """
    try:
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"t must be a number or a tensor of times, got {t!r:.60}") from None
    if times.ndim > 1 or (times.ndim == 1 and len(times) not in (1, n)):
        raise ValueError(
            f"t must be a number or have shape () or ({n},) for {n} samples, got {tuple(times.shape)}"
        )
    return times


def _times(t: Tensor, x: Tensor) -> Tensor:
    """Times as (B) on the state's device, never below float32; a copy, which the network may write to."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return t.to(device=x.device, dtype=dtype).expand(x.shape[0]).clone()


_matches: weakref.WeakKeyDictionary[Denoiser, tuple[Any, str]] = weakref.WeakKeyDictionary()


def matches(denoiser: Denoiser, fingerprint: str) -> bool:
    """Returns whether a model has a fingerprint; for checks that are made in every call.

    The fingerprint is computed again only if a weight has been replaced or written to, as far as torch
    counts that: a change through ``.data`` alone is not noticed.
    """
    try:
        weights = itertools.chain(denoiser.parameters(), denoiser.buffers())
        state = (id(denoiser.schedule), denoiser.native, denoiser.event_shape)
        state += tuple((id(w), w.data_ptr(), w._version, w.dtype) for w in weights)
    except RuntimeError:  # an inference tensor, or one without memory, has no such counter
        return denoiser.fingerprint() == fingerprint
    before = _matches.get(denoiser)
    if before is None or before[0] != state:
        before = state, denoiser.fingerprint()
        _matches[denoiser] = before
    return before[1] == fingerprint


class WrappedNetwork(Denoiser):
    """A callable with its schedule and conventions, created by :meth:`Denoiser.wrap`."""

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        schedule: NoiseSchedule,
        prediction: Prediction,
        event_shape: tuple[int, ...] | None,
        to_model_time: Callable[[Tensor], Tensor] | None = None,
        integer_times: bool = False,
        time_reversed: bool = False,
        null_condition: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.native = prediction
        self.event_shape = event_shape
        self.integer_times, self.time_reversed = integer_times, time_reversed
        self.null_condition = dict(null_condition or {})
        self.accepts = AcceptedConditions.of(network, num_classes=num_classes)
        self.data_mean, self.data_std = data_mean, data_std
        self.to_model_time = to_model_time
        # The device of a module is that of its parameters, also after .to().
        self._place = None if any(True for _ in self.parameters()) else device
        self._caller = NetworkCaller(network, device=self._place, dtype=dtype)
        inner = getattr(network, "caller", None)
        if isinstance(inner, NetworkCaller):
            inner.device, inner.dtype = self._place, dtype
        # Only training of this denoiser (an operator) leaves its network in training mode.
        self.training = False

    @property
    def device(self) -> torch.device:
        """The device of the network if known, else the CPU."""
        modules = [self, *self._caller.modules(self.network)]
        tensors = (
            p for module in modules for p in itertools.chain(module.parameters(), module.buffers())
        )
        if self._place is not None:
            return self._place
        return next((p.device for p in tensors), torch.device("cpu"))

    def networks(self) -> list[nn.Module]:
        """Returns the modules that this model evaluates, without what only adapts their arguments."""
        return self._caller.modules(self.network)

    def model_time(self, t: Tensor) -> Tensor:
        """Returns the conditioning timesteps of the network at times of the schedule, (B)."""
        if self.integer_times:
            t = t.round().long()
        if self.time_reversed:
            t = 1 - t
        return t if self.to_model_time is None else self.to_model_time(t)

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        value = self._caller(
            self.network,
            x,
            self.model_time(t),
            cond,
            prediction=self.native,
            training=self.training,
        )
        return -value if self.time_reversed and self.native is Prediction.FLOW else value

    def as_called(self) -> WrappedNetwork:
        """Returns a view of this model, with the same weights, whose times are the network's own."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.to_model_time, view.integer_times, view.time_reversed = None, False, False
        return view

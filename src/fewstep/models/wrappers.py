r"""Denoisers around a denoiser: guidance, clipping, dynamic thresholding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.models.conditions import joined
from fewstep.models.denoiser import Denoiser


class Wrapper(Denoiser):
    """A denoiser around another; everything but :meth:`raw` is that of the inner one."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        if not isinstance(inner, Denoiser):
            raise TypeError(
                f"{type(self).__name__} needs a Denoiser, got {type(inner).__name__}; make one with "
                "fewstep.Denoiser.wrap(network, ...)"
            )
        if inner.built_in_sampler() is not None:
            raise ValueError(
                f"this model has a built-in sampler and cannot be wrapped in {type(self).__name__}; "
                "guidance and clipping belong to the trajectories that it was distilled from"
            )
        self.inner = inner
        self.schedule, self.native = inner.schedule, inner.native
        self.event_shape, self.null_condition = inner.event_shape, inner.null_condition
        self.data_mean, self.data_std = inner.data_mean, inner.data_std
        self.passes, self.accepts = inner.passes, inner.accepts
        self.integer_times, self.unguided = inner.integer_times, inner.unguided
        self.latents = inner.latents

    @property
    def device(self) -> torch.device:
        """The device of the inner model."""
        return self.inner.device

    def fingerprint(self) -> str:
        """Returns that of the inner model: guidance and clipping are settings of a sampler."""
        return self.inner.fingerprint()


class Guided(Wrapper):
    r"""Classifier-free guidance: extrapolates from the unconditional to the conditional prediction.

    .. math:: D = D_\emptyset + w \, (D_c - D_\emptyset)

    which is the same in every prediction, since they are affine in each other. ``fewstep.sample(...,
    guidance=w)`` wraps a model in it.

    .. code-block:: python

        guided = fewstep.Guided(fewstep.load("fashion"), 2.0)
        images = fewstep.sample(guided, 16, nfe=10, class_labels=3)

    Cost: the network runs once for each evaluation, on a batch of twice the size (``passes`` is 2). The
    state, the times and the conditions without a null value are the same in both halves.

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022)
        | https://arxiv.org/abs/2207.12598

    Arguments:
        inner: A denoiser with a ``null_condition``: for each condition that is guided, the null
            value (the label of no class, the empty prompt).
        scale: The scale w: 1 is the conditional model, 0 the unconditional one.

    Raises:
        ValueError: If the model has no null condition or a built-in sampler, or the scale is not
            finite; and in each evaluation, if none of the guided conditions is given.
        TypeError: If the scale is not a number.
    """

    def __init__(self, inner: Denoiser, scale: float) -> None:
        super().__init__(inner)
        if not inner.null_condition:
            raise ValueError(inner.unguided)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"the scale of guidance is a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"the scale of guidance is a finite number, got {scale!r}")
        self.scale = float(scale)
        self.passes = 2 * inner.passes
        self.accepts = replace(inner.accepts, any_of=frozenset(inner.null_condition))

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        conditional, unconditional = both_predictions(self, x, t, cond)
        return torch.lerp(unconditional, conditional, self.scale)


def both_predictions(
    guided: Wrapper, x: Tensor, t: Tensor, cond: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    r"""Returns the native predictions with the conditions and with their null values, each (B, \*).

    One pass of the network, on a batch of twice the size.
    """
    guided.accepts.check_names(list(cond))
    empty = {
        name: _no_condition(guided.null_condition[name], value, name)
        if name in guided.null_condition
        else value
        for name, value in cond.items()
    }
    both = joined(cond, empty)
    value = guided.inner.raw(torch.cat([x, x]), torch.cat([t, t]), **both)
    conditional, unconditional = value.chunk(2)
    return conditional, unconditional


def _no_condition(null: Any, value: Any, name: str) -> Any:
    """Returns the null value once for each row of a condition."""
    if isinstance(value, Tensor) and value.ndim:
        return torch.as_tensor(null).to(value).expand_as(value)
    if isinstance(value, list):
        return [null] * len(value)
    raise ValueError(f"guidance needs one value of {name!r} for each sample, got {value!r:.60}")


class Clipped(Wrapper):
    """Clips the predicted data to a range; its native prediction is ``x0``.

    Arguments:
        inner: The denoiser.
        low: The lower end.
        high: The upper end.
    """

    def __init__(self, inner: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(inner)
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        self.low, self.high = low, high
        self.native = Prediction.X0

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.inner.evaluate(x, t, prediction=Prediction.X0, **cond).clamp(
            self.low, self.high
        )


class Thresholded(Wrapper):
    r"""Dynamic thresholding: clips each predicted sample to a quantile s of its magnitudes and divides by s.

    References:
        | Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022), section 2.3
        | https://arxiv.org/abs/2205.11487

    Arguments:
        inner: The denoiser.
        quantile: The quantile of the magnitudes, 0.995 in the paper.
        limit: The range of the data, [-limit, limit]; below it nothing is changed.
    """

    def __init__(self, inner: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__(inner)
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {quantile}")
        if not 0 < limit < float("inf"):
            raise ValueError(f"limit must be a positive number, got {limit}")
        self.quantile, self.limit = quantile, limit
        self.native = Prediction.X0

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        x0 = self.inner.evaluate(x, t, prediction=Prediction.X0, **cond)
        sizes = x0.flatten(1).abs()
        # torch.quantile is limited to 16 million values; kthvalue is not.
        place = self.quantile * (sizes.shape[1] - 1)
        low = int(place)
        below = sizes.kthvalue(low + 1, dim=1).values
        above = sizes.kthvalue(min(low + 2, sizes.shape[1]), dim=1).values
        scale = torch.lerp(below, above, place - low).clamp(min=self.limit)
        scale = scale.reshape(-1, *[1] * (x.ndim - 1))
        return x0.clamp(-scale, scale) * (self.limit / scale)

r"""A network as a plan evaluates it, with times and conversion factors computed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import coefficients
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan


def bind(
    denoiser: Denoiser, plan: Plan, batch: int, cond: Mapping[str, Any], like: Tensor
) -> Callable[[Tensor, int], Tensor]:
    r"""Returns the network as a plan evaluates it: ``f(x, k)`` in the plan's prediction at its k-th time.

    Times and conversion factors are computed beforehand, so an evaluation costs the network and at
    most two tensor operations.

    Arguments:
        denoiser: The denoiser.
        plan: The plan.
        batch: The number of samples.
        cond: The conditions, ready for this batch.
        like: A state, for device and type.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    # Copied on the device: a network may write to the times that it is given.
    rows = _times(plan, like.device, dtype).unsqueeze(1).repeat(1, batch).unbind()
    if denoiser.native is plan.prediction:
        return lambda x, k: denoiser.raw(x, rows[k], **cond)
    scales = plan.scales.detach()
    shift, factor = coefficients(
        denoiser.native, plan.prediction, alpha=scales[:, 0], sigma=scales[:, 1]
    )
    shifts: list[float] = shift.tolist()
    factors: list[float] = factor.tolist()

    def evaluate(x: Tensor, k: int) -> Tensor:
        value = denoiser.raw(x, rows[k], **cond)
        return torch.mul(value, factors[k]).add_(x, alpha=shifts[k])

    return evaluate


def _times(plan: Plan, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the times on a device, copied there once a plan: the copy makes the host wait."""
    key = ("times", device, dtype)
    times = plan.derived.get(key)
    if times is None:
        with torch.inference_mode(False):
            times = plan.times.detach().to(device=device, dtype=dtype, copy=True)
        plan.derived[key] = times
    return times

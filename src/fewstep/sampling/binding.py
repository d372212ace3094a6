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
    times = plan.times.detach().to(device=like.device, dtype=dtype)
    rows = [t.expand(batch) for t in times.unbind()]
    scales = plan.scales.detach()
    shift, factor = coefficients(
        denoiser.native, plan.prediction, alpha=scales[:, 0], sigma=scales[:, 1]
    )
    shifts: list[float] = shift.tolist()
    factors: list[float] = factor.tolist()
    same = denoiser.native is plan.prediction

    def evaluate(x: Tensor, k: int) -> Tensor:
        value = denoiser.raw(x, rows[k], **cond)
        if same:
            return value
        return torch.mul(value, factors[k]).add_(x, alpha=shifts[k])

    return evaluate

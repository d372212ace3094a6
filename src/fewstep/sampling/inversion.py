r"""Inversion: the noise from which a deterministic sampler draws given data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import grid
from fewstep.models.conditions import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.ode.dormand_prince import Integration
from fewstep.ode.field import Field, check_state
from fewstep.sampling.protocol import DEFAULT_BATCH
from fewstep.solvers.adaptive import check_positive, check_tolerances


def invert(
    denoiser: Denoiser,
    x: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
    batch_size: int | None = None,
    guidance: float | None = None,
    first: int = 0,
    **cond: Any,
) -> Tensor:
    r"""Returns the noise of data: the probability-flow ODE from the smallest time to the largest.

    ``fewstep.sample(denoiser, noise=invert(denoiser, x))`` returns x, up to the errors of the two solvers: with
    ``dopri5`` their tolerances, with a solver of few steps its own error. With other conditions, or another guidance,
    it returns an edit of x.

    The data are taken as states at the schedule's smallest time, as in :func:`fewstep.log_likelihood`. The noise of
    data that the model would hardly draw is no standard normal; its size tells so.

    Cost: that of Dormand–Prince, 6 network evaluations for each step, accepted or not.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3
        | https://arxiv.org/abs/2011.13456

    Arguments:
        denoiser: The model.
        x: The data, with shape (n, \*), float32 or float64.
        rtol: The relative tolerance of each step.
        atol: The absolute tolerance.
        max_steps: The most steps of a sample.
        batch_size: The samples in one network evaluation.
        guidance: The scale of classifier-free guidance; 1 is none.
        first: The number of the first sample, for messages.
        cond: The conditions, e.g. ``class_labels``.

    Returns:
        The noise, with the shape of x, for ``sample(noise=)``.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if anything does not fit; and if the network returns
            NaN or cannot meet the tolerance.
    """
    check_state(denoiser, x)
    check_positive("batch_size", DEFAULT_BATCH if batch_size is None else batch_size)
    check_tolerances(rtol, atol, max_steps)
    conditions = Conditions.of(denoiser, len(x), cond)
    if guidance is not None and guidance != 1:
        denoiser = Guided(denoiser, guidance)
    times = grid("log-rho", denoiser.schedule, 1).times.flip(0)
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(batch_size or DEFAULT_BATCH):
            part = x.detach()[rows.to(x.device)]
            network = Field(denoiser, part, conditions.at(rows.tolist(), part.device))
            samples = [first + i for i in rows.tolist()]
            parts.append(Integration(network, times, rtol, atol, max_steps, samples).run(part).x)
    return torch.cat(parts) / denoiser.schedule.prior_std()

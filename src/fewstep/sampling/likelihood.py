r"""Likelihoods: the probability-flow ODE from data to noise, with the change of volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.grids import grid
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.conditions import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.ode.dormand_prince import Integration, Solution
from fewstep.ode.field import (
    STATES,
    Field,
    Place,
    Slope,
    check_state,
    exact_type,
    finite_rows,
    not_finite,
    stage_weights,
    volume_change,
)
from fewstep.sampling.protocol import DEFAULT_BATCH
from fewstep.sampling.request import Contradiction, as_text
from fewstep.solvers.adaptive import check_positive, check_tolerances
from fewstep.solvers.rk import RhoHeun, RhoKutta3, RhoMidpoint, RhoRK4

PROBE = -2
"""The index of the first probe of a likelihood; the next are below it, distinct from all other draws."""


_FIXED = {method.name: method for method in (RhoMidpoint, RhoHeun, RhoKutta3, RhoRK4)}


class LogLikelihood(NamedTuple):
    r"""The result of :func:`log_likelihood`.

    Attributes:
        nats: The logarithm of the density, with shape (B), float64.
        bits_per_dim: :math:`-\text{nats} / (d \log 2)` in the model's own range, with shape (B).
            For images of 256 levels scaled to [-1, 1], add :math:`\log_2 127.5 = 6.99` to
            compare with densities in levels.
        nfe: The number of network evaluations for each sample (the mean, if it differs). The backward
            passes are not counted: one for each probe, or with ``exact`` one for each dimension.
    """

    nats: Tensor
    bits_per_dim: Tensor
    nfe: float


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    seed: int = 0,
    exact: bool = False,
    probes: int | None = None,
    probe: str = "rademacher",
    solver: str | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    guidance: float | None = None,
    first: int = 0,
    **cond: Any,
) -> LogLikelihood:
    r"""Returns the log-likelihood of data under the model's probability-flow ODE.

    The data are taken as states at the schedule's smallest time :math:`t_0`, and carried to the
    largest, T, together with the change of volume:

    .. math:: \log p(x_{t_0}) = \log N(x_T; 0, \sigma_T^2 I) + d \, (\log\alpha_T - \log\alpha_{t_0})
        + \int_{\rho_{t_0}}^{\rho_T} \alpha \, \operatorname{div}_x \varepsilon \, d\rho

    So this is the density of data with the little noise of :math:`t_0`, in the model's own range.
    It is the density of what the sampler draws if it is solved exactly, the start from
    :math:`N(0, \sigma_T^2 I)` included. The divergence is exact, or Hutchinson's estimate
    :math:`v^\top \partial_x \varepsilon \, v` with probes v fixed along the trajectory: unbiased, with
    the error of a mean over ``probes``. Sample i depends on ``(seed, i)`` alone.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix D.2
        | https://arxiv.org/abs/2011.13456
        | FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019)
        | https://arxiv.org/abs/1810.01367

    Cost: with ``dopri5`` 2 network evaluations and 6 for each step, with fixed steps the stages of the solver for
    each step; each with one backward pass for each probe.

    Arguments:
        denoiser: The model; its output must be differentiable in the state. Parameters need no
            gradients.
        x: The data, with shape (n, \*), float32 or float64.
        seed: The seed of the probes.
        exact: Whether the divergence is exact: d backward passes for each network evaluation.
        probes: The number of probes, 1 by default; each costs a backward pass for each network evaluation.
        probe: The distribution of a probe: ``"rademacher"`` (signs) or ``"normal"``.
        solver: ``"dopri5"`` (the default without ``steps``), or with a fixed number of steps in
            rho ``"rho-midpoint"``, ``"rho-heun"``, ``"rho-kutta3"`` (the default with ``steps``)
            or ``"rho-rk4"``, on the Karras grid.
        steps: The number of fixed steps.
        rtol: The relative tolerance of ``dopri5``, 1e-5 by default; it holds for the change of volume per
            dimension as well.
        atol: Its absolute tolerance, 1e-5 by default.
        max_steps: Its most steps, 1000 by default.
        batch_size: The samples in one network evaluation.
        guidance: The scale of classifier-free guidance; 1 is none.
        first: The number of the first sample, to do a part of a larger run.
        cond: The conditions, e.g. ``class_labels``.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if anything does not fit; and if
            the network returns NaN, is not differentiable, or cannot meet the tolerance.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> x = fewstep.sample(denoiser, 4, nfe=10, noise=torch.randn(4, 2, dtype=torch.float64))
        >>> result = fewstep.log_likelihood(denoiser, x, exact=True, steps=20)
        >>> result.nats.shape, result.nfe
        (torch.Size([4]), 60.0)
    """
    check_state(denoiser, x)
    if exact and probes is not None:
        raise Contradiction(
            f"exact=True computes the divergence without probes, got probes={probes} as well; leave one of them out"
        )
    probes = 1 if probes is None else probes
    check_positive("probes", probes)
    check_positive("batch_size", DEFAULT_BATCH if batch_size is None else batch_size)
    if probe not in ("rademacher", "normal"):
        raise ValueError(f"probe must be 'rademacher' or 'normal', got {probe!r}")
    method = _method(solver, steps)
    given = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    if method is not None and (
        extra := [name for name, value in given.items() if value is not None]
    ):
        raise Contradiction(
            f"fixed steps have no tolerance, got {as_text(extra)}; leave {'it' if len(extra) == 1 else 'them'} "
            "out, or take the solver dopri5"
        )
    rtol, atol = (1e-5 if value is None else value for value in (rtol, atol))
    max_steps = 1000 if max_steps is None else max_steps
    check_tolerances(rtol, atol, max_steps)
    conditions = Conditions.of(denoiser, len(x), cond)
    if guidance is not None and guidance != 1:
        denoiser = Guided(denoiser, guidance)
    schedule = denoiser.schedule
    times = grid("karras", schedule, steps or STATES).times.flip(0)

    nats: list[Tensor] = []
    evaluations: list[int] = []
    for rows in torch.arange(len(x)).split(batch_size or DEFAULT_BATCH):
        part = x.detach()[rows.to(x.device)]
        samples = [first + i for i in rows.tolist()]
        probed = None if exact else _probes(NoiseSource(seed, samples), part, probes, probe)
        network = Field(denoiser, part, conditions.at(rows.tolist(), part.device), divergence=True)
        network.probes = probed
        if method is None:
            solution = Integration(network, times[[0, -1]], rtol, atol, max_steps, samples).run(
                part
            )
        else:
            solution = _fixed(network, method, times, part, samples)
        evaluations += solution.evaluations
        assert solution.volume is not None
        nats.append(_log_prior(schedule, times, solution.x) + solution.volume)
    total = torch.cat(nats)
    dimensions = x[0].numel()
    return LogLikelihood(
        total, -total / (dimensions * math.log(2)), sum(evaluations) / len(evaluations)
    )


def _log_prior(schedule: NoiseSchedule, times: Tensor, x: Tensor) -> Tensor:
    """Returns the terms of the log-likelihood outside of the integral."""
    flat = x.reshape(len(x), -1).to(exact_type(x))
    log_alpha = schedule.log_alpha(times[[0, -1]])
    log_sigma = float(schedule.log_sigma(times[-1]))
    each = float(log_alpha[1] - log_alpha[0]) - log_sigma - 0.5 * math.log(2 * math.pi)
    return flat.shape[1] * each - flat.square().sum(1) / (2 * math.exp(2 * log_sigma))


def _probes(source: NoiseSource, x: Tensor, number: int, kind: str) -> Tensor:
    r"""Returns probes with shape (number, B, \*)."""
    draws = [
        source.draw(PROBE - k, x.shape[1:], dtype=x.dtype, device=x.device) for k in range(number)
    ]
    v = torch.stack(draws)
    return v if kind == "normal" else torch.where(v < 0, -1.0, 1.0).to(x)


def _method(solver: str | None, steps: int | None) -> type[RhoHeun] | None:
    """Returns the class of a solver with fixed steps, or ``None`` for the adaptive one."""
    if solver is None:
        solver = "dopri5" if steps is None else "rho-kutta3"
    if steps is not None:
        check_positive("steps", steps)
    if solver == "dopri5":
        if steps is not None:
            raise ValueError(
                f"dopri5 chooses its steps; leave out steps = {steps}, or use another solver"
            )
        return None
    if solver not in _FIXED:
        raise ValueError(
            f"the solver of a likelihood is dopri5, {', '.join(sorted(_FIXED))}; got {solver!r}"
        )
    if steps is None:
        raise ValueError(f"{solver} needs steps, a number of steps")
    return _FIXED[solver]  # type: ignore[return-value]


def _fixed(
    network: Field, method: type[RhoHeun], times: Tensor, x: Tensor, samples: Sequence[int]
) -> Solution:
    """Integrates state and volume by a tableau in rho, on given times."""
    schedule = network.denoiser.schedule
    flat = x.detach().reshape(len(x), -1)
    volume = torch.zeros(len(x), dtype=exact_type(x), device=x.device)
    rhos = schedule.rho(times)
    evaluations = 0

    def place_at(t: Tensor) -> Place:
        t = t.expand(len(x))
        return Place(t, schedule.alpha(t), schedule.sigma(t), torch.ones_like(t))

    for i in range(len(times) - 1):
        h = (rhos[i + 1] - rhos[i]).expand(len(x))
        start, end = place_at(times[i]), place_at(times[i + 1])
        stages: list[Place] = []
        slopes: list[Slope] = []
        for row in method._matrix:
            c, place, state = sum(row), start, flat
            if c:
                place = end if c == 1 else place_at(schedule.time(-torch.log(rhos[i] + c * h[0])))
                weights = stage_weights(row, h, start, stages, place)
                state = weights.apply(flat, [slope.eps for slope in slopes])
            stages.append(place)
            slopes.append(network(state, place.t))
            evaluations += 1
            finite = finite_rows(slopes[-1])
            if not bool(finite.all()):
                raise ValueError(not_finite(finite, evaluations, samples, place))
        volume = volume + volume_change(method._weights, h, stages, slopes)
        weights = stage_weights(method._weights, h, start, stages, end)
        flat = weights.apply(flat, [slope.eps for slope in slopes])
    return Solution(flat.reshape(x.shape), volume, [evaluations] * len(x), [], times)

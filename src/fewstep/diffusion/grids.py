r"""Time grids: the times that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.base.aliases import aliases_of, names_without
from fewstep.base.registry import Registry, check_numbers, check_options
from fewstep.diffusion.published_grids import (
    ays,
    beta,
    bong_tangent,
    dynamic_shift,
    flow_shift,
    kl_optimal,
    leading,
    linear_quadratic,
    normal,
    polyexponential,
    sgm_uniform,
    simple,
)
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.diffusion.time_grid import MOST_STEPS as MOST_STEPS
from fewstep.diffusion.time_grid import TimeGrid, check_steps, spaced
from fewstep.diffusion.time_grid import check_start as check_start
from fewstep.diffusion.time_grid import check_strength as check_strength

CENTER, SCALE = -0.55, 2.2
"""The default center and scale of the grid ``logistic``."""


NOISE, DATA = -6.0, 5.5
"""Schedules differ in whether they reach below, or above, these half log-SNRs."""


def lam_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """Returns the half log-SNR at the largest and at the smallest time of a schedule."""
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    first, last = schedule.lam(ends).tolist()
    return first, last


def useful_start(schedule: NoiseSchedule) -> float | None:
    r"""Returns the time at :math:`\lambda = -6` if a VP schedule begins lower, else ``None``.

    A cosine table of few levels begins at -9, a schedule with zero terminal SNR at minus infinity. There
    :math:`x = \sigma z` to a part in 400, so that no evaluation is worth spending; and a step from there of
    width :math:`\Delta\lambda` multiplies the error of an :math:`\varepsilon` network by
    :math:`e^{\Delta\lambda}`, which ruins the sample. Schedules that end above 5.5 (rectified flow, EDM) do
    not take part: their networks predict the data well from pure noise.
    """
    first, last = lam_range(schedule)
    if first >= NOISE or last > DATA:
        return None
    return float(schedule.time(torch.tensor(NOISE, dtype=torch.float64)))


def late_start(schedule: NoiseSchedule, steps: int) -> float | None:
    """Returns the time T (1 - 1 / K) of K steps for a schedule as in :func:`useful_start`, else ``None``."""
    return (
        None if steps == 1 or lam_range(schedule)[1] > DATA else schedule.t_max * (1 - 1 / steps)
    )


def over_default(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a grid's default options with the given ones over them; a given start replaces a default one."""
    start = {"t_start"} if {"t_start", "strength"} & set(given) else set[str]()
    return {**{k: v for k, v in default.items() if k not in start}, **given}


def power(
    schedule: NoiseSchedule,
    steps: int,
    *,
    power: float = 1.0,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    r"""Evenly spaced in :math:`t^{1/\kappa}`: :math:`t_i = (T^{1/\kappa} + \frac iK (t_0^{1/\kappa} - T^{1/\kappa}))^\kappa`.

    Arguments:
        schedule: The schedule.
        steps: The number of steps.
        power: The exponent :math:`\kappa`; 1 is uniform, 2 quadratic.
        t_start: The first time; left out, the schedule's largest.
        t_end: The last time; left out, the schedule's smallest.
        to_zero: Whether one of the steps goes from the last time on to :math:`\sigma = 0`.
        strength: The share s of the grid that is run, instead of ``t_start``: the first time is the
            point at the share 1 - s of the way from the largest time to the last, on the axis in
            which the grid is even (t, its root, :math:`\log\rho`, :math:`\rho^{1/7}`). So K steps are
            the last K of a grid of K / s steps, as in the image-to-image pipelines of diffusers.
    """
    if not power > 0:
        raise ValueError(f"power must be positive, got {power!r}")

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        a, b = start ** (1 / power), end ** (1 / power)
        return (a + u * (b - a)) ** power

    return spaced(
        schedule,
        steps,
        place,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
    )


def uniform(
    schedule: NoiseSchedule,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    """Evenly spaced in time; see :func:`power` for the options."""
    return power(schedule, steps, t_start=t_start, t_end=t_end, to_zero=to_zero, strength=strength)


def quadratic(
    schedule: NoiseSchedule,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    """Evenly spaced in the square root of time; see :func:`power` for the options."""
    return power(
        schedule,
        steps,
        power=2.0,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
    )


def log_rho(
    schedule: NoiseSchedule,
    steps: int,
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    r"""Evenly spaced in :math:`\log\rho = -\lambda`, half the log-SNR."""

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        a, b = schedule.lam(start), schedule.lam(end)
        return schedule.time(a + u * (b - a))

    return spaced(
        schedule,
        steps,
        place,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
    )


def karras(
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    r"""Evenly spaced in :math:`\rho^{1/7}`, :math:`\rho = \sigma / \alpha`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. (5)
        | https://arxiv.org/abs/2206.00364

    Arguments:
        schedule: The schedule.
        steps: The number of steps.
        rho: The exponent, 7 in the paper.
        t_start: The first time.
        t_end: The last time.
        to_zero: Whether one of the steps goes from the last time on to :math:`\sigma = 0`.
        strength: The share of the grid that is run; see :func:`power`.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho!r}")

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        a, b = (schedule.rho(t) ** (1 / rho) for t in (start, end))
        return schedule.time(-rho * torch.log(a + u * (b - a)))

    return spaced(
        schedule,
        steps,
        place,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
    )


def logistic(
    schedule: NoiseSchedule,
    steps: int,
    *,
    center: float = CENTER,
    scale: float = SCALE,
    floor: float | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = False,
    strength: float | None = None,
) -> TimeGrid:
    r"""At the quantiles of a logistic distribution of :math:`\lambda`, cut to the range of the schedule.

    .. math:: \lambda_i = c + s \, \mathrm{logit}(u_i), \qquad
        u_i \text{ evenly from } S\left(\tfrac{\lambda_T - c}{s}\right) \text{ to } S\left(\tfrac{\lambda_0 - c}{s}\right)

    with the sigmoid S. It depends on noise levels only, not on the schedule's time: the steps are
    densest at :math:`\sigma \approx e^{-c} \alpha`, where pictures take shape, and thin out towards noise and
    data. With c = 0 and s = 1 it is uniform in the time of rectified flow. The defaults are near the
    times that dynamic programming selects for networks (``benchmarks/defaults.py``).

    Arguments:
        schedule: The schedule.
        steps: The number of steps.
        center: The half log-SNR c at which the steps are densest.
        scale: The width s of the distribution.
        floor: A half log-SNR :math:`\lambda_f`, at least the schedule's first: the :math:`u_i` are even from
            :math:`S((\lambda_f - c) / s)` on, and only the first time is the schedule's. For schedules that
            start at (almost) pure noise, where nothing happens.
        t_start: The first time.
        t_end: The last time.
        to_zero: Whether one of the steps goes from the last time on to :math:`\sigma = 0`.
        strength: The share of the grid that is run; see :func:`power`.
    """
    if not math.isfinite(center):
        raise ValueError(f"center must be a finite number, got {center!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale!r}")

    if floor is not None and not math.isfinite(floor):
        raise ValueError(f"floor must be a finite number, got {floor!r}")

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        first, last = schedule.lam(start), schedule.lam(end)
        if floor is not None and floor < float(last):
            first = first.clamp_min(floor)
        a, b = (torch.sigmoid((level - center) / scale) for level in (first, last))
        return schedule.time(center + scale * torch.logit(a + u * (b - a)))

    return spaced(
        schedule,
        steps,
        place,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
    )


def explicit(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    times: Sequence[float] | Tensor,
    to_zero: bool = False,
) -> TimeGrid:
    r"""The times that are given, decreasing; a last time equal to the schedule's ``t_zero`` is :math:`\sigma = 0`.

    Arguments:
        schedule: The schedule.
        steps: The number of steps, as a check; left out, ``len(times) - 1``.
        times: The times.
        to_zero: Whether a step to :math:`\sigma = 0` is appended.
    """
    try:
        points = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"times must be a list of numbers, got {times!r:.60}: {error}") from None
    if points.ndim != 1 or not points.numel():
        raise ValueError(f"times must be a list of numbers, got shape {tuple(points.shape)}")
    ends_at_zero = to_zero
    if to_zero:
        points = torch.cat([points, torch.tensor([schedule.t_zero], dtype=torch.float64)])
    elif schedule.is_zero(float(points[-1].detach())):
        ends_at_zero = True
    grid = TimeGrid(schedule, points, ends_at_zero)
    if steps is not None and check_steps(steps) != grid.steps:
        raise ValueError(f"{grid.steps + 1} times are {grid.steps} steps, not {steps}")
    return grid


GRIDS: Registry[Callable[..., TimeGrid]] = Registry(
    "grid",
    {
        "uniform": uniform,
        "quadratic": quadratic,
        "power": power,
        "log-rho": log_rho,
        "lambda": log_rho,
        "exponential": log_rho,
        "karras": karras,
        "polyexponential": polyexponential,
        "logistic": logistic,
        "kl-optimal": kl_optimal,
        "normal": normal,
        "sgm-uniform": sgm_uniform,
        "simple": simple,
        "leading": leading,
        "beta": beta,
        "flow-shift": flow_shift,
        "dynamic-shift": dynamic_shift,
        "linear-quadratic": linear_quadratic,
        "bong-tangent": bong_tangent,
        "ays": ays,
        "explicit": explicit,
    },
    aliases_of("grid"),
    names_without("grid"),
)


def grid(name: str, schedule: NoiseSchedule, steps: int | None, **options: Any) -> TimeGrid:
    """Returns the time grid of that name.

    Cost: no network evaluation.

    Arguments:
        name: One of :data:`GRIDS`.
        schedule: The noise schedule.
        steps: The number of steps.
        options: Its options: of most ``t_start`` or ``strength``, ``t_end``, ``to_zero``; ``fewstep grids NAME``
            has the others.

    Raises:
        ValueError: If the name is unknown, or steps or times are out of range.
        TypeError: If the grid has no such option.

    Example:
        >>> grid = fewstep.grid("karras", fewstep.schedule("edm"), 3, rho=7.0)
        >>> [round(float(t), 3) for t in grid.times]
        [80.0, 9.723, 0.47, 0.002]
    """
    build = GRIDS[name]
    if steps is None and name != "explicit":
        raise ValueError(f"the grid {name!r} needs a number of steps")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {schedule!r:.60}; make one with fewstep.schedule(name)"
        )
    check_options(f"grid {name!r}", build, options, without=("schedule", "steps"))
    check_numbers(f"grid {name!r}", build, options)
    return build(schedule, steps, **options)

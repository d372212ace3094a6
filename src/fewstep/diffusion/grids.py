r"""Time grids: the times that a sampler visits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.base.registry import Registry, check_options
from fewstep.diffusion.scalars import column
from fewstep.diffusion.schedules import NoiseSchedule

CENTER, SCALE = -0.55, 2.2
"""The default center and scale of the grid ``logistic``."""

MOST_STEPS = 100_000
"""The most steps of a grid; more is a typing error, or a hostile file."""

FEW_TIMESTEPS = 50
"""From this number of training timesteps on, a first time of at most 1 is taken for a share by mistake."""


@dataclass(frozen=True, eq=False)
class TimeGrid:
    r"""The times :math:`t_0 > t_1 > \dots > t_K` of a sampler with K steps.

    Attributes:
        schedule: The schedule that gives the times their meaning.
        times: The times, float64 on the CPU, with shape (K + 1), strictly decreasing. They may
            require gradients.
        ends_at_zero: Whether the last point has :math:`\sigma = 0`. It is stored,
            never inferred from numbers: at that point the schedule is not evaluated.
    """

    schedule: NoiseSchedule
    times: Tensor
    ends_at_zero: bool = False

    def __post_init__(self) -> None:
        times = self.times
        if times.ndim != 1 or times.numel() < 2:
            raise ValueError(
                f"a time grid needs at least 2 times in one dimension, got shape {tuple(times.shape)}"
            )
        if times.dtype != torch.float64:
            raise TypeError(f"the times of a grid are float64, got {times.dtype}")
        values = times.tolist()
        for i, (a, b) in enumerate(itertools.pairwise(values)):
            if not b < a:
                raise ValueError(
                    f"times must decrease strictly, got t[{i}] = {a:g} and t[{i + 1}] = {b:g}; "
                    "sampling goes from much noise (large t) to little"
                )
        inner = values[:-1] if self.ends_at_zero else values
        high = self.schedule.t_max
        for i, t in enumerate(inner):
            if not self.schedule.t_zero < t <= high * (1 + 1e-12):
                raise ValueError(
                    f"t[{i}] = {t:g} is outside of the times of {self.schedule.name!r}, "
                    f"{self.schedule.t_min:g} to {high:g}"
                )

    @property
    def steps(self) -> int:
        """The number K of steps."""
        return self.times.numel() - 1

    def is_last_zero(self, i: int) -> bool:
        r"""Returns whether step i, from :math:`t_i` to :math:`t_{i+1}`, lands on :math:`\sigma = 0`."""
        return self.ends_at_zero and i == self.steps - 1

    def _evaluate(self, function: Callable[[Tensor], Tensor], at_zero: float) -> Tensor:
        if not self.ends_at_zero:
            return function(self.times)
        end = torch.tensor([at_zero], dtype=torch.float64)
        return torch.cat([function(self.times[:-1]), end])

    @functools.cached_property
    def alpha(self) -> Tensor:
        r"""The scales :math:`\alpha(t_i)` of the data, shape (K + 1)."""
        return self._evaluate(self.schedule.alpha, 1.0)

    @functools.cached_property
    def sigma(self) -> Tensor:
        r"""The scales :math:`\sigma(t_i)` of the noise, shape (K + 1)."""
        return self._evaluate(self.schedule.sigma, 0.0)

    @functools.cached_property
    def lam(self) -> Tensor:
        r"""The half log-SNR :math:`\lambda(t_i)`, shape (K + 1); infinite at :math:`\sigma = 0`."""
        return self._evaluate(self.schedule.lam, float("inf"))

    @functools.cached_property
    def rho(self) -> Tensor:
        r"""The ratios :math:`\rho(t_i) = \sigma / \alpha`, shape (K + 1)."""
        return self._evaluate(self.schedule.rho, 0.0)

    def numeric(self) -> TimeGrid:
        """Returns the same grid with elements that are numbers instead of tensors without dimensions.

        For the equations of solvers: ``grid.alpha[i]`` is then a number with the methods of a tensor, at a
        hundredth of the cost. Where the times require gradients they stay tensors.
        """
        if self.times.requires_grad:
            return self
        twin = object.__new__(TimeGrid)
        fields = {
            name: column(getattr(self, name)) for name in ("times", "alpha", "sigma", "lam", "rho")
        }
        twin.__dict__.update(schedule=self.schedule, ends_at_zero=self.ends_at_zero, **fields)
        return twin

    def rounded(self) -> TimeGrid:
        """Returns the grid with every time moved to the nearest training timestep (an integer).

        Raises:
            ValueError: If two times fall on one timestep; the message says how many there are.
        """
        if not self.schedule.discrete:
            return self
        times = self.times.round()
        if bool((times.diff() >= 0).any()):
            raise ValueError(
                f"{self.steps} steps on this grid fall on less than {self.steps + 1} of the "
                f"{int(self.schedule.t_max) + 1} training timesteps; use fewer steps, or another grid "
                "(uniform keeps them apart longest)"
            )
        return TimeGrid(self.schedule, times, self.ends_at_zero)


def _ends(
    schedule: NoiseSchedule, t_start: float | None, t_end: float | None
) -> tuple[float, float, bool]:
    start = schedule.t_max if t_start is None else float(t_start)
    end = schedule.t_min if t_end is None else float(t_end)
    if not schedule.t_min < start <= schedule.t_max:
        raise ValueError(
            f"t_start must be in ({schedule.t_min:g}, {schedule.t_max:g}] for {schedule.name!r}, got {start:g}"
        )
    zero = end == schedule.t_zero and end < schedule.t_min
    if not zero and not schedule.t_zero < end < start:
        raise ValueError(
            f"t_end must be between {schedule.t_min:g} and t_start = {start:g} for {schedule.name!r}, "
            f"got {end:g} (for a last step onto the data itself: to_zero=True)"
        )
    return start, end, zero


def _start_of_share(
    place: Callable[[Tensor, Tensor, Tensor], Tensor],
    strength: float,
    t_start: float | None,
    start: float,
    end: float,
) -> float:
    """Returns the first time of a grid of which only the last share is run."""
    check_strength(strength)
    if t_start is not None:
        raise ValueError(
            "strength and t_start are both the first time of the grid; give one of them"
        )
    if strength == 1:
        return start
    ends = (torch.tensor([t], dtype=torch.float64) for t in (start, end))
    share = torch.tensor([1 - strength], dtype=torch.float64)
    return float(place(share, *ends))


def check_strength(strength: object) -> None:
    """Raises unless this is a share: above 0 and at most 1."""
    if (
        isinstance(strength, bool)
        or not isinstance(strength, (int, float))
        or not 0 < strength <= 1
    ):
        raise ValueError(
            "strength is the share of the grid that is run, above 0 and at most 1, "
            f"got {strength!r:.40}"
        )


def check_start(schedule: NoiseSchedule, t_start: object) -> None:
    """Raises unless a user's ``t_start`` is plausible.

    On a table of training timesteps a number up to 1 is most likely a ``strength``: at such a time
    there is hardly any noise, and the sampler would change nothing.

    Raises:
        ValueError: With the range, and the strength that the number would be.
    """
    low, high = schedule.t_min, schedule.t_max
    number = isinstance(t_start, (int, float)) and not isinstance(t_start, bool)
    if not number and not isinstance(t_start, Tensor):
        raise ValueError(
            f"t_start must be a time in ({low:g}, {high:g}] for {schedule.name!r}, got {t_start!r:.40}"
        )
    t = float(t_start)  # type: ignore[arg-type]
    if schedule.discrete and 0 < t <= 1 < high and (t < 1 or high >= FEW_TIMESTEPS):
        raise ValueError(
            f"t_start is a time of {schedule.name!r}, from {low:g} to {high:g}, and t = {t:g} has "
            f"hardly any noise; for a share of the grid give strength={t:g} with an image, or "
            f"t_start={t * high:g}"
        )


def _steps(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps}")
    return steps


def _spaced(
    schedule: NoiseSchedule,
    steps: int,
    place: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    t_start: float | None,
    t_end: float | None,
    to_zero: bool,
    strength: float | None,
) -> TimeGrid:
    """Places points by ``place(u, start, end)``, u from 0 to 1, and pins the two ends exactly."""
    start, end, zero = _ends(schedule, t_start, t_end)
    if zero:
        to_zero, end = True, schedule.t_min
    if strength is not None:
        start = _start_of_share(place, strength, t_start, start, end)
    pieces = _steps(steps) - (1 if to_zero else 0)
    first = torch.tensor([start], dtype=torch.float64)
    last = torch.tensor([end], dtype=torch.float64)
    times = first
    if pieces:
        inner = torch.arange(1, pieces, dtype=torch.float64) / pieces
        times = torch.cat([first, place(inner, first, last), last])
    if to_zero:
        times = torch.cat([times, torch.tensor([schedule.t_zero], dtype=torch.float64)])
    return TimeGrid(schedule, times, to_zero)


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

    return _spaced(
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

    return _spaced(
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

    return _spaced(
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
        t_start: The first time.
        t_end: The last time.
        to_zero: Whether one of the steps goes from the last time on to :math:`\sigma = 0`.
        strength: The share of the grid that is run; see :func:`power`.
    """
    if not math.isfinite(center):
        raise ValueError(f"center must be a finite number, got {center!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale!r}")

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        a, b = (torch.sigmoid((schedule.lam(t) - center) / scale) for t in (start, end))
        return schedule.time(center + scale * torch.logit(a + u * (b - a)))

    return _spaced(
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
    elif float(points[-1].detach()) == schedule.t_zero and schedule.t_zero < schedule.t_min:
        ends_at_zero = True
    grid = TimeGrid(schedule, points, ends_at_zero)
    if steps is not None and _steps(steps) != grid.steps:
        raise ValueError(f"{grid.steps + 1} times are {grid.steps} steps, not {steps}")
    return grid


# k-diffusion, ComfyUI and diffusers call even steps in log sigma "exponential".
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
        "logistic": logistic,
        "explicit": explicit,
    },
)


def grid(name: str, schedule: NoiseSchedule, steps: int | None, **options: Any) -> TimeGrid:
    """Returns the time grid of that name.

    Arguments:
        name: One of :data:`GRIDS`.
        schedule: The noise schedule.
        steps: The number of steps.
        options: Its options: ``t_start`` or ``strength``, ``t_end``, ``to_zero``, ``power``, ``rho``,
            ``center``, ``scale``, ``times``.

    Raises:
        ValueError: If the name is unknown, or steps or times are out of range.
        TypeError: If the grid has no such option.
    """
    build = GRIDS[name]
    if steps is None and name != "explicit":
        raise ValueError(f"the grid {name!r} needs a number of steps")
    check_options(f"grid {name!r}", build, options, without=("schedule", "steps"))
    return build(schedule, steps, **options)

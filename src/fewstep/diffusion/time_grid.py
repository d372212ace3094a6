r"""What a time grid is, and how points are placed between its ends."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.scalars import column
from fewstep.diffusion.schedules import NoiseSchedule

MOST_STEPS = 100_000
"""The most steps of a grid; more is a typing error, or a hostile file."""

FEW_TIMESTEPS = 50
"""From this number of training timesteps on, a first time of at most 1 is taken for a share by mistake."""


@dataclass(frozen=True, eq=False)
class TimeGrid:
    r"""The times :math:`t_0 > t_1 > \dots > t_K` of a sampler with K steps.

    Step i goes from :math:`t_i` to :math:`t_{i+1}`; time is in the units of the schedule.

    Attributes:
        schedule: The schedule that gives the times their meaning.
        times: The times, float64 on the CPU, with shape (K + 1), strictly decreasing. They may
            require gradients.
        ends_at_zero: Whether the last point has :math:`\sigma = 0`. It is stored,
            never inferred from numbers: at that point the schedule is not evaluated.

    Example:
        >>> grid = fewstep.TimeGrid(fewstep.schedule("flow"), torch.tensor([0.9, 0.5, 0.1]).double())
        >>> grid.steps
        2
        >>> [round(float(s), 2) for s in grid.sigma]
        [0.9, 0.5, 0.1]
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
    zero = schedule.is_zero(end)
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


def check_start(schedule: NoiseSchedule, t_start: object, name: str = "t_start") -> None:
    """Raises unless a user's ``t_start``, or the argument of another name, is plausible.

    On a table of training timesteps a number up to 1 is most likely a ``strength``: at such a time
    there is hardly any noise, and the sampler would change nothing.

    Raises:
        ValueError: With the range, and the strength that the number would be.
    """
    low, high = schedule.t_min, schedule.t_max
    number = isinstance(t_start, (int, float)) and not isinstance(t_start, bool)
    if not number and not isinstance(t_start, Tensor):
        raise ValueError(
            f"{name} must be a time in ({low:g}, {high:g}] for {schedule.name!r}, got {t_start!r:.40}"
        )
    t = float(t_start)  # type: ignore[arg-type]
    share = f"for a share of the grid give strength={t:g} with an image, or "
    share = share if name == "t_start" else "for that share of the times give "
    if schedule.discrete and 0 < t <= 1 < high and (t < 1 or high >= FEW_TIMESTEPS):
        raise ValueError(
            f"{name} is a time of {schedule.name!r}, from {low:g} to {high:g}, and t = {t:g} has "
            f"hardly any noise; {share}{name}={t * high:g}"
        )


def check_steps(steps: int) -> int:
    """Returns a number of steps; raises ``ValueError`` unless it is an integer from 1 to :data:`MOST_STEPS`."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps}")
    return steps


def spaced(
    schedule: NoiseSchedule,
    steps: int,
    place: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    t_start: float | None,
    t_end: float | None,
    to_zero: bool,
    strength: float | None,
    drops_last: bool = False,
) -> TimeGrid:
    r"""Places points by ``place(u, start, end)``, u from 0 to 1, and pins the two ends exactly.

    Arguments:
        schedule: The schedule.
        steps: The number of steps.
        place: Returns the times at shares u of the way, strictly decreasing in u.
        t_start: The first time; left out, the schedule's largest.
        t_end: The last time; left out, the schedule's smallest.
        to_zero: Whether the last step lands on :math:`\sigma = 0`.
        strength: The share of the grid that is run.
        drops_last: Whether :math:`\sigma = 0` then takes the place of the last point, instead of coming after it.
    """
    start, end, zero = _ends(schedule, t_start, t_end)
    if zero:
        to_zero, end = True, schedule.t_min
    if strength is not None:
        start = _start_of_share(place, strength, t_start, start, end)
    pieces = check_steps(steps) - (1 if to_zero and not drops_last else 0)
    first = torch.tensor([start], dtype=torch.float64)
    last = torch.tensor([end], dtype=torch.float64)
    times = first
    if pieces:
        inner = torch.arange(1, pieces, dtype=torch.float64) / pieces
        times = torch.cat([first, place(inner, first, last)])
        if not (to_zero and drops_last):
            times = torch.cat([times, last])
    if to_zero:
        times = torch.cat([times, torch.tensor([schedule.t_zero], dtype=torch.float64)])
    return TimeGrid(schedule, times, to_zero)


Place = Callable[..., Tensor]
Grid = Callable[..., TimeGrid]


def placed(*, to_zero: bool = False, drops_last: bool = False) -> Callable[[Place], Grid]:
    """Makes a grid of a rule that places points: ``place(schedule, u, start, end, **options) -> times``.

    The grid has the options of the rule and those of every evenly spaced grid: ``t_start``, ``t_end``,
    ``to_zero`` and ``strength``, as in :func:`fewstep.diffusion.grids.power`.

    Arguments:
        to_zero: The default of ``to_zero``.
        drops_last: See :func:`spaced`.
    """

    def decorate(place: Place) -> Grid:
        own = list(inspect.signature(place).parameters.values())[4:]
        ends = {"t_start": None, "t_end": None, "to_zero": to_zero, "strength": None}

        @functools.wraps(place)
        def grid(schedule: NoiseSchedule, steps: int, **options: Any) -> TimeGrid:
            given = {name: options.pop(name, value) for name, value in ends.items()}
            rule = functools.partial(place, schedule, **options)
            return spaced(schedule, steps, rule, drops_last=drops_last, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        grid.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter("schedule", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                inspect.Parameter("steps", inspect.Parameter.POSITIONAL_OR_KEYWORD),
                *own,
                *(inspect.Parameter(name, keyword, default=v) for name, v in ends.items()),
            ]
        )
        return grid

    return decorate

r"""The time grids of other libraries and of papers, on every schedule.

Where such a grid is defined by the "timesteps" of a network, those are the training timesteps of a table,
the time of a continuous schedule, or :math:`\log\rho` where the time is :math:`\rho` itself. Where it is
defined by the "sigmas" of a network, those are :math:`\sigma / (\alpha + \sigma)` on schedules with a flow
coordinate (of a rectified flow: its time) and :math:`\rho = \sigma / \alpha` on all others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.base.registry import unknown
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.diffusion.time_grid import TimeGrid, check_steps, placed, spaced

Map = Callable[[Tensor], Tensor]


def _timestep(schedule: NoiseSchedule) -> tuple[Map, Map]:
    """Returns the map from times to what networks are conditioned on, and its inverse."""
    return (torch.log, torch.exp) if schedule.time_is_rho else (_same, _same)


def _same(t: Tensor) -> Tensor:
    return t


def _sigma(schedule: NoiseSchedule) -> tuple[Map, Map]:
    """Returns the map from times to what other libraries call sigma, and its inverse."""
    if schedule.flow_coordinate:
        return (
            lambda t: torch.sigmoid(-schedule.lam(t)),
            lambda s: schedule.time(torch.logit(1 - s)),
        )
    return schedule.rho, lambda rho: schedule.time(-rho.log())


@placed(to_zero=True)
def normal(schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor) -> Tensor:
    r"""Evenly spaced in timesteps from the first to the last, then :math:`\sigma = 0`: ComfyUI's ``normal``.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023), table 2, "linspace"
        | https://arxiv.org/abs/2305.08891
    """
    return _normal(schedule, u, start, end)


@placed(to_zero=True, drops_last=True)
def sgm_uniform(schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor) -> Tensor:
    r"""Evenly spaced in timesteps, with :math:`\sigma = 0` in the place of the last: ComfyUI's ``sgm_uniform``.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023)
        | https://arxiv.org/abs/2305.08891
    """
    return _normal(schedule, u, start, end)


def _normal(schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor) -> Tensor:
    there, back = _timestep(schedule)
    a, b = there(start), there(end)
    return back(a + u * (b - a))


@placed(to_zero=True, drops_last=True)
def simple(schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor) -> Tensor:
    r"""Every N/K-th training timestep from the noisiest on, then :math:`\sigma = 0`: ComfyUI's ``simple``.

    .. math:: t_i = T - \lfloor i (T + 1) / K \rfloor \text{ on a table}, \qquad
        t_i = T (1 - i / K) \text{ in continuous time}

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023), table 2, "trailing"
        | https://arxiv.org/abs/2305.08891
    """
    if schedule.discrete:
        # The quotient may lie a rounding below an integer.
        return start - (u * (start + 1) + 1e-9).floor()
    if schedule.time_is_rho or schedule.t_zero != 0:
        return _normal(schedule, u, start, end)
    return start * (1 - u)


def leading(
    schedule: NoiseSchedule, steps: int, *, offset: int = 1, to_zero: bool = True
) -> TimeGrid:
    r"""Every N/K-th training timestep from the cleanest on, then :math:`\sigma = 0`: diffusers' "leading".

    .. math:: t_i = o + (K - 1 - i) \lfloor N / K \rfloor

    The first step is far from the noisiest timestep: the published fault of this spacing.

    Arguments:
        schedule: A table of N training timesteps.
        steps: The number of steps K.
        offset: The first timestep o, from the cleanest; 1 in ComfyUI's ``ddim_uniform`` and Stable Diffusion.
        to_zero: Whether the last step lands on :math:`\sigma = 0`; else there is one point more.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2023), table 2, "leading"
        | https://arxiv.org/abs/2305.08891
    """
    if not schedule.discrete:
        raise ValueError(
            f"the grid 'leading' counts training timesteps, of which {schedule.name!r} has none; take 'simple'"
        )
    levels = int(schedule.t_max) + 1
    points = check_steps(steps) + (0 if to_zero else 1)
    gap = levels // points
    if not isinstance(offset, int) or not 0 <= offset < max(gap, 1):
        raise ValueError(f"offset must be an integer from 0 to {max(gap, 1) - 1}, got {offset!r}")
    if not gap:
        raise ValueError(f"the grid 'leading' has at most {levels} points, got {points}")
    times = offset + gap * torch.arange(points - 1, -1, -1, dtype=torch.float64)
    if to_zero:
        times = torch.cat([times, torch.tensor([schedule.t_zero], dtype=torch.float64)])
    return TimeGrid(schedule, times, to_zero)


@placed(to_zero=True, drops_last=True)
def beta(  # noqa: D417 (the decorator takes the places of the others)
    schedule: NoiseSchedule,
    u: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
) -> Tensor:
    r"""At the quantiles of a beta distribution of the timestep, then :math:`\sigma = 0`.

    .. math:: t_i = t_{end} + (t_{start} - t_{end}) \, I^{-1}_{\alpha, \beta}(1 - i / K)

    with the inverse of the regularised incomplete beta function; rounded to training timesteps where
    there are. Below 1 both ends get more steps than the middle.

    References:
        | Beta Sampling is All You Need (Lee et al., 2024)
        | https://arxiv.org/abs/2407.12173

    Arguments:
        alpha: The first exponent of the distribution; 0.6, as in ComfyUI.
        beta: The second; ``beta57`` has 0.5 and 0.7.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0.05 <= value <= 50
        ):
            raise ValueError(f"{name} must be a number between 0.05 and 50, got {value!r:.40}")
    there, back = _timestep(schedule)
    shares = torch.tensor(
        [beta_quantile(1 - float(share), alpha, beta) for share in u], dtype=torch.float64
    )
    times = back(there(end) + shares * (there(start) - there(end)))
    if not schedule.discrete:
        return times
    times = times.round()
    if bool((torch.cat([start, times]).diff() >= 0).any()):
        raise ValueError(
            f"{len(u) + 1} quantiles of this beta distribution fall on fewer of the "
            f"{int(schedule.t_max) + 1} training timesteps; take fewer steps or exponents nearer to 1"
        )
    return times


def beta_quantile(share: float, a: float, b: float) -> float:
    """Returns the quantile of a beta distribution, to some 1e-13, by bisection and Newton's method."""
    if share <= 0 or share >= 1:
        return min(max(share, 0.0), 1.0)
    low, high, x = 0.0, 1.0, 0.5
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(200):
        gap = _incomplete_beta(x, a, b, scale) - share
        low, high = (low, x) if gap > 0 else (x, high)
        density = math.exp(scale + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x))
        new = x - gap / density if density > 0 else low
        if not low < new < high:
            new = (low + high) / 2
        if abs(new - x) <= 1e-15 * x or high - low < 1e-300:
            return new
        x = new
    return x


def _incomplete_beta(x: float, a: float, b: float, scale: float) -> float:
    """The regularised incomplete beta function by its continued fraction (Lentz's method)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a, scale)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 300):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + term * d), 1 + term / c
            value *= d * c
        if abs(d * c - 1) < 1e-16:
            break
    return math.exp(scale + a * math.log(x) + b * math.log1p(-x)) * value / a


@placed()
def polyexponential(  # noqa: D417 (the decorator takes the places of the others)
    schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor, *, rho: float = 1.0
) -> Tensor:
    r"""Powers of an even ramp in :math:`\log\rho`: k-diffusion's ``polyexponential``.

    .. math:: \log\rho_i = \log\rho_K + (1 - i / K)^r (\log\rho_0 - \log\rho_K)

    Arguments:
        rho: The exponent r; 1 is the grid ``log-rho`` (k-diffusion's ``exponential``).

    References:
        | k-diffusion (Crowson, 2022)
        | https://github.com/crowsonkb/k-diffusion
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho!r}")
    a, b = schedule.lam(start), schedule.lam(end)
    return schedule.time(b + (1 - u) ** rho * (a - b))


@placed()
def kl_optimal(schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor) -> Tensor:
    r"""Evenly spaced in :math:`\arctan\rho`: optimal in KL divergence for Gaussian data of unit variance.

    References:
        | Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024), theorem 3.1
        | https://arxiv.org/abs/2404.14507
    """
    a, b = (schedule.rho(t).atan() for t in (start, end))
    return schedule.time(-torch.log(torch.tan(a + u * (b - a))))


def _check_shift(shift: float) -> None:
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, got {shift!r:.40}")


@placed(to_zero=True, drops_last=True)
def flow_shift(  # noqa: D417 (the decorator takes the places of the others)
    schedule: NoiseSchedule, u: Tensor, start: Tensor, end: Tensor, *, shift: float = 3.0
) -> Tensor:
    r"""Even steps of a rectified flow whose noise levels are shifted for the resolution, as in Stable Diffusion 3.

    .. math:: s_i = \frac{m u_i}{1 + (m - 1) u_i}, \qquad u_i = u_0 (1 - i / K), \qquad s = \sigma / (\alpha + \sigma)

    which is :math:`\rho_i = m \, u_i / (1 - u_i)`. On a rectified flow s is the time; it is defined on every schedule.

    Arguments:
        shift: The shift m; 1 is none, 3 that of Stable Diffusion 3.

    References:
        | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. (23)
        | https://arxiv.org/abs/2403.03206
    """
    _check_shift(shift)
    del end
    # u of the first point; the steps go on to u = 0, which is sigma = 0.
    first = torch.sigmoid(-schedule.lam(start) - math.log(shift))
    even = first * (1 - u)
    return schedule.time(torch.log1p(-even) - even.log() - math.log(shift))


@placed(to_zero=True, drops_last=True)
def dynamic_shift(  # noqa: D417 (the decorator takes the places of the others)
    schedule: NoiseSchedule,
    u: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Tensor:
    r"""The grid ``flow-shift`` with the shift of the image's size, as in Flux.

    .. math:: m = e^\mu, \qquad \mu = \mu_{256} + \frac{n - 256}{4096 - 256} (\mu_{4096} - \mu_{256})

    Arguments:
        tokens: The number n of tokens of the image: height times width in pixels / 256 for Flux; 4096
            for 1024 x 1024.
        base_shift: :math:`\mu` at 256 tokens.
        max_shift: :math:`\mu` at 4096 tokens.

    References:
        | FLUX.1 (Black Forest Labs, 2024), sampling
        | https://github.com/black-forest-labs/flux
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {tokens!r:.40}")
    mu = base_shift + (tokens - 256) / (4096 - 256) * (max_shift - base_shift)
    return _flow_shift(schedule, u, start, end, shift=math.exp(mu))


_flow_shift: Callable[..., Tensor] = flow_shift.__wrapped__  # type: ignore[attr-defined]


def _by_shares(
    schedule: NoiseSchedule,
    shares: Sequence[float],
    *,
    t_start: float | None,
    t_end: float | None,
    to_zero: bool,
    strength: float | None,
) -> TimeGrid:
    """Places the points at shares of the first "sigma", from 1 to 0; without ``to_zero`` between both ends."""
    there, back = _sigma(schedule)
    table = torch.tensor(shares, dtype=torch.float64)

    def place(u: Tensor, start: Tensor, end: Tensor) -> Tensor:
        last = torch.zeros_like(start) if to_zero else there(end)
        at = u * (len(table) - 1)
        low = at.floor().long().clamp(0, len(table) - 2)
        share = table[low] + (at - low) * (table[low + 1] - table[low])
        return back(last + share * (there(start) - last))

    return spaced(
        schedule,
        len(shares) - 1,
        place,
        t_start=t_start,
        t_end=t_end,
        to_zero=to_zero,
        strength=strength,
        drops_last=True,
    )


def linear_quadratic(
    schedule: NoiseSchedule,
    steps: int,
    *,
    threshold: float = 0.025,
    linear_steps: int | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = True,
    strength: float | None = None,
) -> TimeGrid:
    r"""First many small even steps, then a parabola that joins them smoothly: for flows of video.

    .. math:: 1 - s_i / s_0 = \frac{\theta}{L} i \ (i \le L), \qquad
        \theta + \frac{\theta}{L} (i - L) + q (i - L)^2 \ (i > L)

    with q such that the last is 1.

    References:
        | Movie Gen: A Cast of Media Foundation Models (Polyak et al., 2024)
        | https://arxiv.org/abs/2410.13720

    Arguments:
        schedule: The schedule.
        steps: The number of steps.
        threshold: The share :math:`\theta` of the noise that the even steps remove.
        linear_steps: The number L of even steps; left out, half of all.
        t_start: The first time.
        t_end: The last time, without ``to_zero``.
        to_zero: Whether the last point is :math:`\sigma = 0`.
        strength: The share of the grid that is run.
    """
    check_steps(steps)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}")
    even = steps // 2 if linear_steps is None else linear_steps
    if not isinstance(even, int) or not (1 <= even < steps or steps == 1):
        raise ValueError(f"linear_steps must be an integer from 1 to {steps - 1}, got {even!r}")
    if steps == 1:
        shares = [1.0, 0.0]
    else:
        slope, rest = threshold / even, steps - even
        bend = (1 - threshold - slope * rest) / rest**2
        removed = [slope * i + bend * max(i - even, 0) ** 2 for i in range(steps)]
        shares = [*(1 - x for x in removed), 0.0]
        if any(b >= a for a, b in itertools.pairwise(shares)):
            raise ValueError(
                f"threshold = {threshold:g} in {even} of {steps} steps leaves too little for the others; "
                "take a smaller threshold or more linear_steps"
            )
    return _by_shares(
        schedule, shares, t_start=t_start, t_end=t_end, to_zero=to_zero, strength=strength
    )


def bong_tangent(
    schedule: NoiseSchedule,
    steps: int,
    *,
    pivot: float = 0.6,
    slope: float = 0.2,
    t_start: float | None = None,
    t_end: float | None = None,
    to_zero: bool = True,
    strength: float | None = None,
) -> TimeGrid:
    r"""Two arcs of an arctangent, from the first "sigma" to its half and from there to 0: RES4LYF's ``bong_tangent``.

    .. math:: s_i = \text{affine in } \arctan\left(-\frac{40 m}{K + 2} (i - p)\right), \qquad p = \lfloor (K + 2) P \rfloor

    on each of the arcs of p points and of the others.

    References:
        | RES4LYF (ClownsharkBatwing, 2025), sigmas
        | https://github.com/ClownsharkBatwing/RES4LYF

    Arguments:
        schedule: The schedule.
        steps: The number of steps, 2 or more.
        pivot: The share P at which the arcs meet.
        slope: The slope m of the arctangent.
        t_start: The first time.
        t_end: The last time, without ``to_zero``.
        to_zero: Whether the last point is :math:`\sigma = 0`.
        strength: The share of the grid that is run.
    """
    if check_steps(steps) < 2:
        raise ValueError("the grid 'bong-tangent' has two arcs and needs at least 2 steps, got 1")
    for name, value in (("pivot", pivot), ("slope", slope)):
        if not isinstance(value, (int, float)) or not 0 < value < 10:
            raise ValueError(f"{name} must be a positive number, got {value!r:.40}")
    points = steps + 2
    middle = int(points * pivot)
    if not 2 <= middle <= points - 2:
        raise ValueError(
            f"pivot = {pivot:g} leaves one of the arcs of {steps} steps with less than two points"
        )
    steep = slope * 40 / points

    def arc(length: int, centre: int, high: float, low: float) -> list[float]:
        curve = [-math.atan(steep * (i - centre)) for i in range(length)]
        return [low + (high - low) * (v - curve[-1]) / (curve[0] - curve[-1]) for v in curve]

    shares = [*arc(middle, middle, 1.0, 0.5)[:-1], *arc(points - middle, 0, 0.5, 0.0)]
    return _by_shares(
        schedule, shares, t_start=t_start, t_end=t_end, to_zero=to_zero, strength=strength
    )


AYS_TABLES: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
r"""The noise levels :math:`\rho` that Align Your Steps published for Stable Diffusion 1.5, XL and Stable Video Diffusion."""


def ays(
    schedule: NoiseSchedule, steps: int, *, table: str = "sd15", to_zero: bool = True
) -> TimeGrid:
    r"""The published tables of Align Your Steps, interpolated in :math:`\log\rho` to the number of steps.

    At 10 steps the first ten levels are the table's and :math:`\sigma = 0` takes the place of the last.

    References:
        | Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024)
        | https://arxiv.org/abs/2404.14507
        | Align Your Steps, quick-start guide: the tables (Sabour et al., 2024)
        | https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html

    Arguments:
        schedule: The schedule; its noisiest level must be that of the table.
        steps: The number of steps.
        table: ``"sd15"``, ``"sdxl"`` or ``"svd"``.
        to_zero: Whether :math:`\sigma = 0` takes the place of the last level.
    """
    if table not in AYS_TABLES:
        raise ValueError(unknown("table of Align Your Steps", table, list(AYS_TABLES)))
    levels = torch.tensor(AYS_TABLES[table], dtype=torch.float64).log()
    most = float(schedule.rho(torch.tensor(schedule.t_max, dtype=torch.float64)))
    if not abs(math.log(most) - float(levels[0])) < 0.1:
        raise ValueError(
            f"the table {table!r} of Align Your Steps begins at sigma / alpha = {AYS_TABLES[table][0]:g}, "
            f"{schedule.name!r} at {most:.4g}; measure a grid for this model with fewstep.fit"
        )
    at = torch.arange(check_steps(steps) + 1, dtype=torch.float64) / steps * (len(levels) - 1)
    low = at.floor().long().clamp(max=len(levels) - 2)
    logs = levels[low] + (at - low) * (levels[low + 1] - levels[low])
    # The table is rounded to three digits: its ends are those of the schedule.
    times = schedule.time(-logs).clamp(schedule.t_min, schedule.t_max)
    times[0] = schedule.t_max
    if to_zero:
        times[-1] = schedule.t_zero
    return TimeGrid(schedule, times, to_zero)

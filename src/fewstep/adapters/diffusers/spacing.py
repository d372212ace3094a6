"""Where a scheduler of diffusers would step: its spacings of timesteps and sigmas, as time grids.

A grid comes about in two parts: the points where steps begin (from a count, or given as sigmas or as
timesteps), and the options of the configuration, which hold however the points are given:
shift, terminal level, and Karras, exponential or beta spacing between their first and last level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid, explicit, karras, log_rho
from fewstep.diffusion.schedules import Flow, NoiseSchedule, Tabulated
from fewstep.solvers import Solver

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas")
"""The options that space levels between the first and the last, at most one of them on."""


def shift(sigmas: Tensor, factor: float) -> Tensor:
    r"""Returns the shifted flow levels :math:`a \sigma / (1 + (a - 1) \sigma)`."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def shift_factor(config: Mapping[str, Any], mu: float | None) -> float:
    """Returns the factor of the shift: from ``mu`` if shifting is dynamic, else the configured one."""
    if not config["use_dynamic_shifting"]:
        return float(config["shift"]) * float(config["flow_shift"])
    if mu is None:
        raise ValueError("use_dynamic_shifting needs mu: set_timesteps(..., mu=...)")
    factor = mu
    if config["time_shift_type"] == "exponential":
        factor = math.exp(mu) if mu < 700 else math.inf
    if not 0 < factor < math.inf:
        raise ValueError(
            f"mu={mu:g} with time_shift_type={config['time_shift_type']!r} is no shift of levels"
        )
    return factor


def is_spaced(config: Mapping[str, Any]) -> bool:
    """Returns whether one of the spacings is on."""
    return any(config[key] for key in SPACINGS)


def between(config: Mapping[str, Any], high: Tensor, low: Tensor, count: int) -> Tensor:
    r"""Returns levels from ``high`` to ``low`` in the configured spacing, shape (count).

    Karras: evenly in :math:`\sigma^{1/7}`; exponential (and Lu): evenly in :math:`\ln \sigma`; beta: by
    quantiles of the distribution Beta(0.6, 0.6). One level is the highest.
    """
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    if config["use_karras_sigmas"]:
        a, b = high ** (1 / 7), low ** (1 / 7)
        levels = (a + u * (b - a)) ** 7
    elif config["use_beta_sigmas"]:
        levels = low + _beta_quantiles(count) * (high - low)
    else:
        levels = (high.log() + u * (low.log() - high.log())).exp()
    levels[0] = high
    if count > 1:
        levels[-1] = low
    return levels


def _beta_quantiles(count: int) -> Tensor:
    try:
        from scipy.stats import beta
    except ImportError:
        raise ValueError("use_beta_sigmas needs scipy: pip install scipy") from None
    places = 1 - torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.from_numpy(beta.ppf(places.numpy(), 0.6, 0.6))


# Flow models.


def flow_points(config: Mapping[str, Any], solver: Solver, steps: int, factor: float) -> Tensor:
    """Returns the levels at which so many steps begin, before shifting, float64, shape (steps)."""
    trained = config["num_train_timesteps"]
    if config["use_flow_sigmas"] and solver.starts_flows_at_noise:
        # Its twin starts at pure noise, the others at the last training timestep.
        return torch.linspace(1, 1 / trained, steps + 1, dtype=torch.float64)[:-1]
    if config["use_flow_sigmas"]:
        even = 1 - torch.linspace(1, 1 / trained, steps + 1, dtype=torch.float64)
        return even.flip(0)[:-1]
    # As FlowMatchEulerDiscreteScheduler: unless dynamic, its lowest level is shifted twice.
    low = torch.tensor(1 / trained, dtype=torch.float64)
    low = low if config["use_dynamic_shifting"] else shift(low, factor)
    return torch.linspace(1, float(low), steps, dtype=torch.float64)


def flow_levels(config: Mapping[str, Any], points: Tensor, factor: float) -> Tensor:
    """Returns the levels that the options make of the points of steps, shape (K): shift, stretch, space."""
    sigmas = shift(points, factor)
    terminal = config["shift_terminal"]
    if (
        terminal and float(sigmas[-1]) < 1
    ):  # a single step starts at noise; nothing is to be stretched
        rest = 1 - sigmas
        sigmas = 1 - rest * ((1 - terminal) / rest[-1])
    return between(config, sigmas[0], sigmas[-1], len(sigmas)) if is_spaced(config) else sigmas


def flow_grid(
    schedule: Flow,
    config: Mapping[str, Any],
    solver: Solver | None,
    *,
    steps: int | None,
    points: Sequence[float] | None,
    mu: float | None,
) -> TimeGrid:
    """Returns the grid of so many steps, or of given points; it ends at the data."""
    factor = shift_factor(config, mu)
    if points is None:
        assert steps is not None
        assert solver is not None
        at_starts = flow_points(config, solver, steps, factor)
    else:
        at_starts = _levels_of(points)
        if float(at_starts[0]) > 1 + 1e-6:
            raise ValueError(
                f"sigmas of a flow model are at most 1, got {float(at_starts[0]):.6g}"
            )
    return from_sigmas(schedule, flow_levels(config, at_starts, factor), to_zero=True)


# Models of other schedules.


def spaced(
    schedule: NoiseSchedule,
    config: Mapping[str, Any],
    solver: Solver,
    steps: int,
    alphas_cumprod: Tensor,
    to_zero: bool,
) -> TimeGrid:
    """Returns the grid of so many steps that the configuration asks for."""
    low, high = _range(schedule, config) if is_spaced(config) else (None, None)
    whole = low is None and high is None
    if whole and is_spaced(config) and solver.name == "heun" and isinstance(schedule, Tabulated):
        # Its twin spaces between the first and the last of its timesteps, others between all levels.
        times = _timesteps(alphas_cumprod, config, solver.spaces_points, steps, exact=True)
        first, last = schedule.rho(torch.tensor([times[0], times[-1]], dtype=torch.float64))
        if len(times) == steps and to_zero:
            return from_sigmas(schedule, between(config, first, last, steps), to_zero=True)
    if whole and config["use_karras_sigmas"]:
        return karras(schedule, steps, to_zero=to_zero)
    if whole and (config["use_exponential_sigmas"] or config["use_lu_lambdas"]):
        return log_rho(schedule, steps, to_zero=to_zero)
    if is_spaced(config):
        ends = schedule.rho(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
        first = ends[0] if high is None else torch.tensor(high, dtype=torch.float64)
        last = ends[1] if low is None else torch.tensor(low, dtype=torch.float64)
        levels = between(config, first, last, steps if to_zero else steps + 1)
        return from_sigmas(schedule, levels, to_zero=to_zero, last_is_end=not to_zero)
    exact = solver.name == "heun" or not isinstance(schedule, Tabulated)
    times = _timesteps(alphas_cumprod, config, solver.spaces_points, steps, exact=exact)
    if isinstance(schedule, Tabulated):
        return from_times(schedule, times, to_zero=to_zero)
    sigmas = Tabulated(alphas_cumprod.double()).rho(torch.tensor(times, dtype=torch.float64))
    return from_sigmas(schedule, sigmas, to_zero=to_zero)


def given_points(
    schedule: NoiseSchedule,
    config: Mapping[str, Any],
    *,
    times: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    to_zero: bool,
) -> TimeGrid:
    """Returns the grid of given timesteps or sigmas, in the configured spacing between their ends."""
    if not is_spaced(config):
        if sigmas is not None:
            return from_sigmas(schedule, sigmas, to_zero=to_zero)
        assert times is not None
        return from_times(schedule, times, to_zero=to_zero)
    if sigmas is None:
        grid = from_times(schedule, times or (), to_zero=to_zero)
        levels = grid.rho[: len(times or ())]
    else:
        levels, to_zero = _levels_of(sigmas), to_zero or float(sigmas[-1]) == 0
    spread = between(config, levels[0], levels[-1], len(levels))
    return from_sigmas(schedule, spread, to_zero=to_zero)


def _range(
    schedule: NoiseSchedule, config: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """Returns ``sigma_min`` and ``sigma_max`` of a spacing, where they are not the schedule's ends."""
    low, high = config["sigma_min"], config["sigma_max"]
    if not isinstance(schedule, Tabulated):
        return None, None  # they are its ends
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    for name, value in (("sigma_min", low), ("sigma_max", high)):
        if value is not None and not float(ends[0]) * 0.99 <= value <= float(ends[1]) * 1.01:
            raise ValueError(
                f"{name}={value!r} is outside of the levels of this model, {float(ends[0]):.6g} to "
                f"{float(ends[1]):.6g}; its network was not trained there"
            )
    return low, high


def _timesteps(
    alphas_cumprod: Tensor, config: Mapping[str, Any], points: bool, steps: int, *, exact: bool
) -> list[float]:
    trained = len(alphas_cumprod)
    spacing, offset = config["timestep_spacing"], int(config["steps_offset"])
    levels = trained - _clipped(alphas_cumprod, config["lambda_min_clipped"])
    if spacing == "trailing":
        times = [round(levels - i * trained / steps) - 1.0 for i in range(steps)]
        return [t for t in times if t >= 0]
    if spacing == "leading":
        first = 0 if points else 1
        stride = levels // (steps + first)
        return [float(i * stride + offset) for i in reversed(range(first, steps + first))]
    pieces = max(steps - 1, 1) if points else steps
    places = torch.linspace(0, levels - 1, pieces + 1, dtype=torch.float64).flip(0)[:steps]
    whole = places.round()
    exact = exact or not bool((whole.diff() < 0).all())  # more steps than levels between
    return places.tolist() if exact else whole.tolist()


def distilled_times(
    config: Mapping[str, Any], given: int | None, strength: float
) -> tuple[float, ...] | None:
    r"""Returns the times at which a network was distilled, falling; ``None`` if it was not.

    Of N training timesteps and n such times they are :math:`k \lfloor N / n \rfloor - 1`, k = 1, ..., n; a
    strength below 1 leaves the first :math:`\lfloor n s \rfloor` of them.

    References:
        | Latent Consistency Models (Luo et al., 2023)
        | https://arxiv.org/abs/2310.04378

    Raises:
        ValueError: If the number or the strength makes no sense.
    """
    count, trained = (
        config["original_inference_steps"] if given is None else given,
        config["num_train_timesteps"],
    )
    if count is None:
        if strength != 1:
            raise ValueError(
                f"strength={strength!r} of set_timesteps needs original_inference_steps; without it, begin at a "
                "later index: set_begin_index"
            )
        return None
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= trained:
        raise ValueError(
            f"original_inference_steps must be a whole number from 1 to {trained}, got {count!r}"
        )
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength!r}")
    stride, used = trained // int(count), int(count * strength)
    if not used:
        raise ValueError(
            f"strength={strength:g} leaves none of {count} original_inference_steps; at least {1 / count:g} does"
        )
    return tuple(float(k * stride - 1) for k in range(used, 0, -1))


def chosen_times(distilled: Sequence[float], steps: int) -> tuple[float, ...]:
    """Returns so many of the times at which a network was distilled, evenly among them from the first on.

    Raises:
        ValueError: If there are fewer.
    """
    if steps > len(distilled):
        raise ValueError(
            f"{steps} steps among {len(distilled)} times at which this network was distilled "
            "(original_inference_steps); make fewer steps, or set original_inference_steps=None to use all times"
        )
    return tuple(distilled[i * len(distilled) // steps] for i in range(steps))


def _clipped(alphas_cumprod: Tensor, least: float | None) -> int:
    """Returns how many of the noisiest levels lie below ``lambda_min_clipped``."""
    if least is None or least == -math.inf:
        return 0
    products = alphas_cumprod.double()
    lam = 0.5 * (products.log() - torch.log1p(-products))
    clipped = int((lam < least).sum())
    if clipped >= len(products) - 1:
        raise ValueError(
            f"lambda_min_clipped={least!r} leaves no level of this model, whose lambda ends at "
            f"{float(lam[0]):.4g}"
        )
    return clipped


# From points to grids.


def from_times(
    schedule: NoiseSchedule, times: Sequence[float] | Tensor, *, to_zero: bool
) -> TimeGrid:
    """Returns the grid through these times, which ends at the lowest level or at sigma = 0.

    A grid that has the lowest level already ends at sigma = 0, as a step from there to itself
    would be wasted.
    """
    points = torch.as_tensor(times, dtype=torch.float64).clamp(max=schedule.t_max)
    if not to_zero and float(points[-1]) > schedule.t_min:
        low = torch.tensor([schedule.t_min], dtype=torch.float64)
        return explicit(schedule, times=torch.cat([points, low]))
    return explicit(schedule, times=points, to_zero=True)


def _levels_of(sigmas: Sequence[float] | Tensor) -> Tensor:
    """Returns given levels without a last zero, checked, float64."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1 or not levels.numel() or not bool(levels.isfinite().all()):
        raise ValueError(f"sigmas must be a list of finite numbers, got {sigmas!r:.80}")
    if float(levels[-1]) == 0:
        levels = levels[:-1]
    if not levels.numel() or float(levels.min()) <= 0:
        raise ValueError("sigmas must be positive, apart from a last 0")
    return levels


def from_sigmas(
    schedule: NoiseSchedule,
    sigmas: Sequence[float] | Tensor,
    *,
    to_zero: bool,
    last_is_end: bool = False,
) -> TimeGrid:
    r"""Returns the grid through these levels: :math:`\sigma / \alpha`, or the times of a flow.

    A last level of zero is the end of the grid; levels slightly above the noisiest are lowered to it.
    ``last_is_end``: no step begins at the last level, as the grid ends there.
    """
    levels = _levels_of(sigmas)
    to_zero = to_zero or len(levels) < len(sigmas)
    flow = isinstance(schedule, Flow)
    top = 1.0 if flow else float(schedule.rho(torch.tensor(schedule.t_max).double()))
    if float(levels[0]) > top * 1.01:
        raise ValueError(
            f"sigmas start at {float(levels[0]):.6g}, above the noisiest level of this model, {top:.6g}"
        )
    times = levels if flow else schedule.time(-levels.log())
    if not flow:
        near = times.round()
        near = torch.where((times - near).abs() < 1e-4, near, times)
        times = (near if schedule.discrete else times).clamp(min=schedule.t_min)
    if last_is_end:
        return explicit(schedule, times=times.clamp(max=schedule.t_max))
    return from_times(schedule, times, to_zero=to_zero)

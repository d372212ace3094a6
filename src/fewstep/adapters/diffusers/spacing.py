"""Where a scheduler of diffusers would step: its spacings of timesteps and sigmas, as time grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid, explicit, karras, log_rho
from fewstep.diffusion.schedules import Flow, NoiseSchedule, Tabulated
from fewstep.solvers import Solver

FLOW_START = 1 - 1e-6
"""The largest time of a flow schedule here; at 1 nothing of the data is left (see PlanScheduler)."""

SMALLEST_ALPHA = 1 - FLOW_START
"""What stands for an alpha of zero, in models with a zero terminal signal-to-noise ratio."""


def betas(config: Mapping[str, Any]) -> Tensor:
    """Returns the trained betas, float32 as diffusers forms them, so that the levels are the model's."""
    trained, kind = config.get("trained_betas"), config["beta_schedule"]
    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if trained is not None:
        found = torch.tensor([float(b) for b in trained], dtype=torch.float32)
    elif kind == "linear":
        found = torch.linspace(start, end, count, dtype=torch.float32)
    elif kind == "scaled_linear":
        found = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif kind == "squaredcos_cap_v2":
        edge = torch.arange(count + 1, dtype=torch.float64) / count
        curve = torch.cos((edge + 0.008) / 1.008 * math.pi / 2).square()
        found = (1 - curve[1:] / curve[:-1]).clamp(max=0.999).float()
    else:
        raise ValueError(
            f"beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got {kind!r}"
        )
    return _zero_terminal(found) if config["rescale_betas_zero_snr"] else found


def _zero_terminal(found: Tensor) -> Tensor:
    """Shifts and stretches the square roots of the products so that the last is zero, the first kept."""
    root = torch.cumprod(1 - found, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    products = root.square()
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def levels(products: Tensor, prediction: str) -> Tensor:
    """Returns the levels with a last one above zero (float64 if there was a zero, else unchanged).

    That of diffusers' DPM-Solver, 2^-24, would lie above the level before it.
    """
    if float(products[-1]) > 0 and bool((products.diff() < 0).all()):
        return products
    made = products.double().clone()
    least = float(made[-2]) / 4
    # An epsilon-prediction is divided by alpha here; the others do not need it.
    made[-1] = least if prediction == "epsilon" else min(SMALLEST_ALPHA**2, least)
    return made


def schedule_of(config: Mapping[str, Any], alphas_cumprod: Tensor) -> NoiseSchedule:
    """Returns the noise schedule of a configuration, and of its table of levels."""
    if config["prediction_type"] == "flow_prediction" or config["use_flow_sigmas"]:
        return Flow(t_max=FLOW_START)
    return Tabulated(alphas_cumprod.double())


def shift(sigmas: Tensor, factor: float) -> Tensor:
    r"""Returns the shifted flow levels :math:`a \sigma / (1 + (a - 1) \sigma)`."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def shift_factor(config: Mapping[str, Any], mu: float | None) -> float:
    """Returns the factor of the shift: from ``mu`` if shifting is dynamic, else the configured one."""
    if not config["use_dynamic_shifting"]:
        return float(config["shift"]) * float(config["flow_shift"])
    if mu is None:
        raise ValueError("use_dynamic_shifting needs mu: set_timesteps(..., mu=...)")
    return math.exp(mu) if config["time_shift_type"] == "exponential" else float(mu)


def spaced(
    schedule: NoiseSchedule,
    config: Mapping[str, Any],
    solver: Solver,
    steps: int,
    mu: float | None,
    to_zero: bool,
) -> TimeGrid:
    """Returns the grid of so many steps that the configuration asks for."""
    if isinstance(schedule, Flow):
        return from_sigmas(schedule, _flow_sigmas(config, solver, steps, mu), to_zero=True)
    assert isinstance(schedule, Tabulated)
    if config["use_karras_sigmas"]:
        return karras(schedule, steps, to_zero=to_zero)
    if config["use_exponential_sigmas"] or config["use_lu_lambdas"]:
        return log_rho(schedule, steps, to_zero=to_zero)
    if config["use_beta_sigmas"]:
        rho = schedule.rho(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
        count = steps if to_zero else steps + 1
        sigmas = rho[1] + _beta_quantiles(count) * (rho[0] - rho[1])
        return from_sigmas(schedule, sigmas, to_zero=to_zero)
    times = _timesteps(
        schedule.levels, config, solver.spaces_points, steps, exact=solver.name == "heun"
    )
    return from_times(schedule, times, to_zero=to_zero)


def _timesteps(
    levels: int, config: Mapping[str, Any], points: bool, steps: int, *, exact: bool
) -> list[float]:
    spacing, offset = config["timestep_spacing"], int(config["steps_offset"])
    if spacing == "trailing":
        return [round(levels - i * levels / steps) - 1.0 for i in range(steps)]
    if spacing == "leading":
        first = 0 if points else 1
        stride = levels // (steps + first)
        return [float(i * stride + offset) for i in reversed(range(first, steps + first))]
    if spacing == "linspace":
        pieces = max(steps - 1, 1) if points else steps
        places = torch.linspace(0, levels - 1, pieces + 1, dtype=torch.float64).flip(0)[:steps]
        whole = places.round()
        exact = exact or not bool((whole.diff() < 0).all())  # more steps than levels between
        return places.tolist() if exact else whole.tolist()
    raise ValueError(
        f"timestep_spacing must be 'linspace', 'leading' or 'trailing', got {spacing!r}"
    )


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


def from_sigmas(
    schedule: NoiseSchedule, sigmas: Sequence[float] | Tensor, *, to_zero: bool
) -> TimeGrid:
    r"""Returns the grid through these levels: :math:`\sigma / \alpha`, or the times of a flow.

    A last level of zero is the end of the grid; levels slightly above the noisiest are lowered to it.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.ndim != 1 or not levels.numel() or not bool(levels.isfinite().all()):
        raise ValueError(f"sigmas must be a list of finite numbers, got {sigmas!r:.80}")
    if float(levels[-1]) == 0:
        levels, to_zero = levels[:-1], True
    if not levels.numel() or float(levels.min()) <= 0:
        raise ValueError("sigmas must be positive, apart from a last 0")
    top = (
        1.0
        if isinstance(schedule, Flow)
        else float(schedule.rho(torch.tensor(schedule.t_max).double()))
    )
    if float(levels[0]) > top * 1.01:
        raise ValueError(
            f"sigmas start at {float(levels[0]):.6g}, above the noisiest level of this model, {top:.6g}"
        )
    times = levels if isinstance(schedule, Flow) else schedule.time(-levels.log())
    if not isinstance(schedule, Flow):
        near = times.round()
        times = torch.where((times - near).abs() < 1e-4, near, times)
        times = times.clamp(min=schedule.t_min)
    return from_times(schedule, times, to_zero=to_zero)


def _flow_sigmas(
    config: Mapping[str, Any], solver: Solver, steps: int, mu: float | None
) -> Tensor:
    levels, factor = config["num_train_timesteps"], shift_factor(config, mu)
    if config["use_flow_sigmas"] and solver.starts_flows_at_noise:
        # Its twin starts at pure noise, the others at the last trained level.
        sigmas = shift(torch.linspace(1, 1 / levels, steps + 1, dtype=torch.float64)[:-1], factor)
    elif config["use_flow_sigmas"]:
        even = 1 - torch.linspace(1, 1 / levels, steps + 1, dtype=torch.float64)
        sigmas = shift(even, factor).flip(0)[:-1]
    else:
        # As FlowMatchEulerDiscreteScheduler: unless dynamic, its lowest level is shifted twice.
        low = torch.tensor(1 / levels, dtype=torch.float64)
        low = low if config["use_dynamic_shifting"] else shift(low, factor)
        sigmas = shift(torch.linspace(1, float(low), steps, dtype=torch.float64), factor)
    if config["shift_terminal"]:
        rest = 1 - sigmas
        sigmas = 1 - rest * ((1 - config["shift_terminal"]) / rest[-1])
    high, low = sigmas[0], sigmas[-1]
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    if config["use_karras_sigmas"]:
        a, b = high ** (1 / 7), low ** (1 / 7)
        return (a + u * (b - a)) ** 7
    if config["use_exponential_sigmas"]:
        return (high.log() + u * (low.log() - high.log())).exp()
    if config["use_beta_sigmas"]:
        return low + _beta_quantiles(steps) * (high - low)
    return sigmas


def _beta_quantiles(count: int) -> Tensor:
    try:
        from scipy.stats import beta
    except ImportError:
        raise ValueError("use_beta_sigmas needs scipy: pip install scipy") from None
    places = 1 - torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.from_numpy(beta.ppf(places.numpy(), 0.6, 0.6))

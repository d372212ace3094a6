"""What the mathematical tests share: all schedules, graded grids, exact references, slopes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.schedules import SCHEDULES, NoiseSchedule, schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import GaussianMixture
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Lin

GRID_KINDS = ("uniform", "quadratic", "log-rho", "karras")
"""The grids that place any number of steps by themselves, without further options."""


@functools.cache
def schedule_of(name: str) -> NoiseSchedule:
    """Every schedule, once; the plain table is a coarse one, whose kinks lie inside the steps."""
    if name == "tabulated":
        levels = schedule("ddpm-linear").alphas_cumprod  # type: ignore[attr-defined]
        return schedule(name, alphas_cumprod=levels[::20].tolist())
    return schedule(name)


SCHEDULE_NAMES = tuple(SCHEDULES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def lam_grid(
    noise: NoiseSchedule, steps: int, start: float, end: float, *, power: float = 1.0
) -> TimeGrid:
    r"""Returns the grid :math:`\lambda_i = a + (b - a) (i / K)^p`.

    With power 2 the first steps are of size :math:`1 / K^2`: the first-order start of a multistep
    method then has an error of order 4 and does not hide the order of the method itself.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    times = noise.time(start + (end - start) * u**power)
    return fewstep.grid("explicit", noise, None, times=times.tolist())


def slope(errors: Sequence[float], steps: Sequence[int]) -> float:
    """Returns the observed order between the last two numbers of steps."""
    return math.log(errors[-2] / errors[-1]) / math.log(steps[-1] / steps[-2])


def run(denoiser: Denoiser, plan: Plan, noise: Tensor, **options: Any) -> Tensor:
    return fewstep.sample(denoiser, plan=plan, noise=noise, batch_size=len(noise), **options)


def network(function: Callable[[Tensor, Tensor], Tensor], noise: NoiseSchedule) -> Denoiser:
    """Returns a denoiser whose eps is any function of (x, t)."""
    return Denoiser.wrap(function, schedule=noise, prediction="eps")


def line(noise: NoiseSchedule) -> GaussianMixture:
    """The mixture on the line for which the accelerated samplers' slopes were measured."""
    return GaussianMixture([[-1.3], [0.35], [1.6]], [0.35, 0.25, 0.45], [0.3, 0.5, 0.2], noise)


def states(plan: Plan) -> list[Tensor]:
    """Returns the coefficients of the rows that define states, in order."""
    return [
        plan.values[row.offset : row.offset + len(row.terms)]
        for row in plan.structure.rows
        if isinstance(row, Lin) and row.state is not None
    ]

"""The samplers of azula, run on a denoiser of ours as azula runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from azula import sample as azula_samplers
from azula.denoise import Denoiser as AzulaDenoiser
from azula.denoise import DiracPosterior
from torch import Tensor, nn

from fewstep.models.denoiser import Denoiser
from fewstep.sampling.protocol import Run, Trajectory

NAMES: dict[str, tuple[str, dict[str, Any], int]] = {
    "azula:ddim": ("DDIMSampler", {}, 1),
    "azula:heun": ("HeunSampler", {}, 2),
    "azula:zab2": ("zABSampler", {"order": 2}, 1),
    "azula:zeab2": ("zEABSampler", {"order": 2}, 1),
    "azula:zeab3": ("zEABSampler", {"order": 3}, 1),
    "azula:xeab2": ("xEABSampler", {"order": 2}, 1),
    "azula:xeab3": ("xEABSampler", {"order": 3}, 1),
    "azula:reab2": ("REABSampler", {"order": 2}, 1),
}
"""For each name the class, its options, and its network evaluations per step."""


class _Schedule(nn.Module):
    """A schedule of ours as one of azula's: its time u in [0, 1] is t, linearly."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.schedule = denoiser.schedule

    def time(self, u: Tensor) -> Tensor:
        low, high = self.schedule.t_min, self.schedule.t_max
        return low + (high - low) * u.to(torch.float64)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        t = self.time(u)
        return self.schedule.alpha(t).to(u.dtype), self.schedule.sigma(t).to(u.dtype)


class _Adapted(AzulaDenoiser):
    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.inner, self.schedule, self.calls = denoiser, _Schedule(denoiser), 0

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> DiracPosterior:
        self.calls += 1
        time = self.schedule.time(t)
        return DiracPosterior(mean=self.inner(x_t, time, prediction="x0", **cond))


@dataclass(frozen=True)
class AzulaSampler:
    """A sampler of azula on its default grid (uniform in time).

    Attributes:
        name: One of :data:`NAMES`.
        denoiser: The model.
        nfe: The number of network evaluations.
    """

    name: str
    denoiser: Denoiser
    nfe: int

    def __post_init__(self) -> None:
        calls = NAMES[self.name][2]
        if self.nfe % calls:
            raise ValueError(
                f"{self.name} makes {calls} evaluations per step; the nearest budgets to {self.nfe} are "
                f"{self.nfe - 1} and {self.nfe + 1}"
            )

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial state that standard normal noise stands for."""
        schedule = self.denoiser.schedule
        return float(schedule.sigma(torch.tensor(schedule.t_max, dtype=torch.float64))) * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples that start at a state."""
        kind, options, calls = NAMES[self.name]
        adapted = _Adapted(self.denoiser)
        build = getattr(azula_samplers, kind)
        sampler = build(
            adapted, steps=self.nfe // calls, silent=True, dtype=torch.float64, **options
        )
        made = sampler(x, **run.cond).to(x.dtype)
        if adapted.calls != self.nfe:
            raise ValueError(f"{self.name} made {adapted.calls} calls, not {self.nfe}")
        end = torch.tensor([self.denoiser.schedule.t_min], dtype=torch.float64)
        return Trajectory(made, end, None, self.nfe)

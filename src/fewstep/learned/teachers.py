r"""The teacher: the same model sampled with many evaluations, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import read_tensors_and_metadata, write_tensors
from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.noise import NoiseSource
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.learned_plan import Base
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.sampling.batches import initial_noise, run_batches
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.residual import Residual
from fewstep.sampling.resolve import resolve_plan
from fewstep.training.parallel import ALONE, Team


def teacher_plan(base: Base, nfe: int, *, through_knots: bool = False) -> Plan:
    """Returns the teacher's plan for a base: from the same first time to the same end.

    Arguments:
        base: The sampler at the start of the search.
        nfe: The approximate number of evaluations of the teacher.
        through_knots: Whether its grid goes through all knots of the base.
    """
    times, zero = base.grid.times.detach(), base.grid.ends_at_zero
    schedule = base.schedule
    if through_knots:
        pieces = max(2, math.ceil(nfe / base.grid.steps))
        inner = times[:-1] if zero else times
        u = torch.arange(pieces, dtype=torch.float64)[None, :] / pieces
        refined = (inner[:-1, None] + u * inner.diff()[:, None]).reshape(-1)
        knots = torch.cat([refined, inner[-1:]])
        if zero and float(knots[-1]) > schedule.t_min:
            # The interval after the base's last evaluation is refined too, where there is room.
            last = torch.linspace(float(knots[-1]), schedule.t_min, pieces + 1).double()
            knots = torch.cat([knots, last[1:].clamp(min=schedule.t_min)])
        if base.integer_times:
            knots = knots.round().unique().flip(0)
        if zero:
            knots = torch.cat([knots, times[-1:]])
        request = SamplerRequest("tab3", options={"times": knots.tolist()})
        plan = resolve_plan(schedule, request).plan
    else:
        ends: dict[str, Any] = {"t_start": float(times[0])}
        ends |= {"to_zero": True} if zero else {"t_end": float(times[-1])}
        request = SamplerRequest(nfe=nfe, options=ends)
        plan = resolve_plan(schedule, request, integer_times=base.integer_times).plan
    return replace(plan, head=base.head)


@dataclass(frozen=True)
class Pairs:
    r"""Numbered initial noises with the teacher's samples from them.

    Attributes:
        seed: The seed of the noises; sample i of it is that of :func:`fewstep.sample`.
        target: The teacher's samples, with shape (n, \*).
        states: The teacher's states at the knots between, shape (S, n, \*), or ``None``.
    """

    seed: int
    target: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Source:
    """The source of initial states: numbered noises, and the sampler's first time.

    Attributes:
        denoiser: The model.
        plan: A plan with the first time and the head of the search.
        shape: The shape of a sample.
        device: The model's device.
        dtype: The type of states.
        conditions: The conditions of numbered samples.
        team: The processes that share the work.
    """

    denoiser: Denoiser
    plan: Plan
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    conditions: ConditionPool
    team: Team = ALONE

    @classmethod
    def of(cls, denoiser: Denoiser, plan: Plan, conditions: ConditionPool) -> Source:
        """Returns the source for a model.

        Raises:
            ValueError: If the model has no ``event_shape``.
        """
        if denoiser.event_shape is None:
            raise ValueError(
                "the shape of a sample is not known; give Denoiser.wrap(..., event_shape=)"
            )
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        floating = [t for t in tensors if t.is_floating_point()]
        device = denoiser.device
        double = bool(floating) and all(t.dtype == torch.float64 for t in floating)
        dtype = torch.float64 if double else torch.float32
        return cls(denoiser, plan, tuple(denoiser.event_shape), device, dtype, conditions)

    def noise(self, seed: int, samples: Sequence[int]) -> Tensor:
        """Returns the initial noise of numbered samples."""
        return initial_noise(self.denoiser, NoiseSource(seed, samples), dtype=self.dtype)

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial states for noises: scaled to the prior, or after a head start."""
        return PlanSampler(self.plan, self.denoiser).start(noise)

    @torch.no_grad()
    def sampled(
        self,
        plan: Plan,
        seed: int,
        n: int,
        *,
        batch_size: int,
        keep: Sequence[float] = (),
        residual: Residual | None = None,
        progress: Progress = SILENT,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns samples 0 to n - 1 of a seed by a plan, and their states at the times in ``keep``.

        With a residual its predictions are corrected.
        Ticks once for each network evaluation of each sample.

        Raises:
            ValueError: If a sample is not finite, with all processes.
        """
        team = self.team
        rows, error = range(n)[team.part(n)], None
        try:
            sampler = PlanSampler(plan, self.denoiser, residual=residual)
            x, states = self._drawn(sampler, seed, rows, batch_size, keep, progress)
        except ValueError as raised:
            if not team.own.several:
                raise
            x, states, error = torch.empty(0), None, raised
        if team.any(error is not None):
            raise error or ValueError("samples of another process are not finite")
        progress.tick((n - len(rows)) * plan.nfe)
        return team.gathered(x, n), None if states is None else team.gathered(states, n, 1)

    def _drawn(
        self,
        sampler: PlanSampler,
        seed: int,
        rows: Sequence[int],
        batch_size: int,
        keep: Sequence[float],
        progress: Progress,
    ) -> tuple[Tensor, Tensor | None]:
        samples, states = list[Tensor](), list[Tensor]()
        for batch, trajectory in run_batches(
            sampler,
            rows,
            seed=seed,
            conditions=self.conditions,
            batch_size=batch_size,
            dtype=self.dtype,
            save=bool(keep),
        ):
            samples.append(trajectory.x.cpu())
            if keep:
                assert trajectory.states is not None
                times = trajectory.times.tolist()
                index = [min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in keep]
                states.append(trajectory.states[index].cpu())
            progress.tick(len(batch) * sampler.plan.nfe)
        return torch.cat(samples), torch.cat(states, 1) if keep else None


def make_pairs(
    source: Source,
    plan: Plan,
    seed: int,
    n: int,
    *,
    batch_size: int,
    keep: Sequence[float] = (),
    file: Path | None = None,
    key: str = "",
    progress: Progress = SILENT,
) -> Pairs:
    """Returns the pairs of a seed: those of the file if it has the key, else sampled and written there.

    Arguments:
        source: The source of initial states.
        plan: The teacher's plan.
        seed: The seed of the noises.
        n: The number of pairs.
        batch_size: The samples drawn at a time.
        keep: The times of further states in the pairs.
        file: The file, or ``None``.
        key: A hash of everything that determines the pairs.
        progress: Ticks once for each evaluation of each sample.
    """
    try:
        stored, metadata = ({}, {}) if file is None else read_tensors_and_metadata(file)
    except ValueError:  # missing or damaged: sampled again
        stored, metadata = {}, {}
    whole = {"target": (n, *source.shape)} | (
        {"states": (len(keep), n, *source.shape)} if keep else {}
    )
    fits = metadata.get("key") == key and {k: tuple(v.shape) for k, v in stored.items()} == whole
    if not source.team.any(not fits):
        progress.tick(len(stored["target"]) * plan.nfe)
        return Pairs(seed, stored["target"], stored.get("states"))
    target, states = source.sampled(
        plan, seed, n, batch_size=batch_size, keep=keep, progress=progress
    )
    if file is not None and source.team.own.first:
        tensors = {"target": target} | ({} if states is None else {"states": states})
        write_tensors(file, tensors, {"key": key})
    return Pairs(seed, target, states)

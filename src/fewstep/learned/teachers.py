r"""The teacher: the same model with many evaluations, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.base.files import read_metadata, read_tensors, write_tensors
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.learned.learned_plan import Base
from fewstep.learned.unrolled import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.planning import choose
from fewstep.sampling.planning import plan as make_plan
from fewstep.sampling.protocol import Run

Tick = Callable[[int], None]


def teacher_plan(base: Base, nfe: int, *, through_knots: bool = False) -> Plan:
    """Returns the teacher of a base: from the same first time to the same end, many calls.

    Arguments:
        base: The sampler to be taught.
        nfe: About how many calls the teacher makes.
        through_knots: Whether its grid goes through all knots of the base.
    """
    times, zero = base.grid.times.detach(), base.grid.ends_at_zero
    schedule = base.schedule
    if through_knots:
        pieces = max(2, math.ceil(nfe / base.grid.steps))
        inner = times[:-1] if zero else times
        u = torch.arange(pieces, dtype=torch.float64)[None, :] / pieces
        fine = (inner[:-1, None] + u * inner.diff()[:, None]).reshape(-1)
        knots = torch.cat([fine, inner[-1:]])
        if zero and float(knots[-1]) > schedule.t_min:
            # The last call of the base is followed by finer ones too, where there is room.
            last = torch.linspace(float(knots[-1]), schedule.t_min, pieces + 1).double()
            knots = torch.cat([knots, last[1:].clamp(min=schedule.t_min)])
        if base.integer_times:
            knots = knots.round().unique().flip(0)
        if zero:
            knots = torch.cat([knots, times[-1:]])
        made = make_plan("tab3", schedule, grid="explicit", times=knots.tolist())
    else:
        choice = choose(schedule, nfe)
        ends = {"t_start": float(times[0])}
        ends |= {"to_zero": True} if zero else {"t_end": float(times[-1])}
        options = {"grid": choice.grid, "integer_times": base.integer_times, **choice.options}
        made = make_plan(choice.solver, schedule, nfe=choice.nfe, **{**options, **ends})
    return replace(made, head=base.head)


@dataclass(frozen=True)
class Pairs:
    r"""Numbered initial noises and what the teacher makes of them.

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
    """Where initial states of numbered samples come from.

    Attributes:
        denoiser: The model.
        plan: A plan with the first time and the head of the search.
        shape: The shape of a sample.
        device: Where the model is.
        dtype: The type of states.
        conditions: The conditions.
    """

    denoiser: Denoiser
    plan: Plan
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    conditions: Conditions

    @classmethod
    def of(cls, denoiser: Denoiser, plan: Plan, conditions: Conditions) -> Source:
        """Returns the source for a model.

        Raises:
            ValueError: If the model does not say the shape of a sample.
        """
        if denoiser.event_shape is None:
            raise ValueError(
                "the shape of a sample is not known; give Denoiser.wrap(..., event_shape=)"
            )
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        floating = [t for t in tensors if t.is_floating_point()]
        device = floating[0].device if floating else torch.device("cpu")
        double = bool(floating) and all(t.dtype == torch.float64 for t in floating)
        dtype = torch.float64 if double else torch.float32
        return cls(denoiser, plan, tuple(denoiser.event_shape), device, dtype, conditions)

    def noise(self, seed: int, samples: Sequence[int]) -> Tensor:
        """Returns the initial noise of numbered samples."""
        source = NoiseSource(seed, samples)
        return source.draw(INITIAL, self.shape, dtype=self.dtype, device=self.device)

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial states that noises stand for."""
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
        tick: Tick | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns samples 0 to n - 1 of a seed by a plan, and the states at the times in ``keep``."""
        made = PlanSampler(plan, self.denoiser)
        parts, kept = list[Tensor](), list[Tensor]()
        for first in range(0, n, batch_size):
            rows = range(first, min(first + batch_size, n))
            cond = self.denoiser.prepare(len(rows), self.conditions.at(rows))
            run = Run(NoiseSource(seed, rows), cond, bool(keep))
            found = made.run(made.start(self.noise(seed, rows)), run)
            parts.append(found.x.cpu())
            if keep:
                assert found.states is not None
                times = found.times.tolist()
                index = [min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in keep]
                kept.append(found.states[index].cpu())
            if tick is not None:
                tick(len(rows) * plan.nfe)
        return torch.cat(parts), torch.cat(kept, 1) if keep else None


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
    tick: Tick | None = None,
) -> Pairs:
    """Returns pairs, from a file if it holds just these, and else made and written there."""
    if file is not None and file.exists() and read_metadata(file).get("key") == key:
        found = read_tensors(file)
        if tick is not None:
            tick(n * plan.nfe)
        return Pairs(seed, found["target"], found.get("states"))
    target, states = source.sampled(plan, seed, n, batch_size=batch_size, keep=keep, tick=tick)
    if file is not None:
        tensors = {"target": target} | ({} if states is None else {"states": states})
        write_tensors(file, tensors, {"key": key})
    return Pairs(seed, target, states)

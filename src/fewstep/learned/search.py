r"""The search: Adam over a sampler's numbers, judged on noise that it does not train on.

Everything random is addressed by the number of the stage and the step, so that a run that was
interrupted goes on to the same result, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.learned.judges import Judge
from fewstep.learned.learned_plan import LearnedPlan
from fewstep.learned.objectives import Batch, Endpoint, Objective, Outcome
from fewstep.learned.search_state import State
from fewstep.learned.settings import Search
from fewstep.learned.stages import Stage
from fewstep.learned.teachers import Pairs, Source
from fewstep.learned.unrolled import Unrolled, backpropagate, joined

MOST_WORSE, LEAST_WORSE = 0.1, 2e-4
"""How much further from real data, as a share and at least, a candidate of a paired stage may be."""


@dataclass(frozen=True)
class Event:
    """What a search tells while it runs.

    Attributes:
        phase: ``"teacher"``, ``"search"`` or ``"scores"``.
        done: How much of the phase is done.
        total: How much there is.
        score: The present score of the average on the held-out noise, once there is one.
        best: The best so far, the start included.
    """

    phase: str
    done: int
    total: int
    score: float | None = None
    best: float | None = None


class Searcher:
    """Runs the stages of a search.

    Arguments:
        learned: The learned plan; after the run it holds the best parameters.
        source: Where initial states come from.
        stages: The stages.
        objectives: The objectives by name.
        pairs: The pairs that are trained on, or ``None``.
        heldout: The pairs that judge, or ``None``: then only the judge does.
        heldout_seed: The seed of the held-out noise.
        judge: The judge of distributions.
        real: Whether its reference are real data, in features that no loss uses: then it watches
            paired stages too.
        settings: The settings.
        sizes: The number of held-out noises.
        seed: The seed of the search.
        folder: The folder of checkpoints, or ``None``.
        tell: Called with events.
    """

    def __init__(
        self,
        learned: LearnedPlan,
        source: Source,
        stages: Sequence[Stage],
        objectives: Mapping[str, Objective],
        *,
        pairs: Pairs | None,
        heldout: Pairs | None,
        heldout_seed: int,
        heldout_size: int,
        judge: Judge,
        real: bool,
        settings: Search,
        seed: int,
        folder: Path | None = None,
        tell: Callable[[Event], None] | None = None,
    ) -> None:
        self.learned, self.source, self.stages = learned, source, tuple(stages)
        self.objectives, self.pairs, self.heldout = objectives, pairs, heldout
        self.heldout_seed, self.heldout_size = heldout_seed, heldout_size
        self.judge, self.real = judge, real
        self.settings, self.seed, self.folder = settings, seed, folder
        self.tell = tell or (lambda event: None)
        self.run_plan = Unrolled(
            source.denoiser,
            learned.structure,
            remat=source.device.type != "cpu" if settings.remat is None else settings.remat,
            gradient=settings.gradient,
            keep_states=any(o.wants_states for o in objectives.values()),
        )
        vector = learned.vector()
        self.state = State(
            {
                "vector": vector,
                "average": vector.clone(),
                "best": vector.clone(),
                "first": torch.zeros_like(vector),
                "second": torch.zeros_like(vector),
            }
        )

    def run(self) -> State:
        """Runs what is left of all stages; leaves the best parameters in the plan."""
        if self.folder is not None and (found := State.load(self.folder)) is not None:
            if found.tensors["vector"].shape != self.state.tensors["vector"].shape:
                raise ValueError(f"the checkpoint in {str(self.folder)!r} is of another family")
            self.state = found
        while self.state.stage < len(self.stages):
            self._stage(self.stages[self.state.stage])
            self._next_stage()
        self.learned.load_vector(self.state.tensors["best"])
        return self.state

    def _next_stage(self) -> None:
        state, tensors = self.state, self.state.tensors
        best = tensors["best"]
        for key in ("vector", "average"):
            tensors[key] = best.clone()
        for key in ("first", "second"):
            tensors[key] = torch.zeros_like(best)
        state.stage, state.step, state.updates, state.stale = state.stage + 1, 0, 0, 0
        state.start, state.best_score = None, math.inf
        self._save()

    def _save(self) -> None:
        if self.folder is not None:
            self.state.save(self.folder)

    def _stage(self, stage: Stage) -> None:
        state, settings = self.state, self.settings
        if state.start is None:
            found = self._judged(stage, state.tensors["best"])
            state.start, state.best_score = found, found["score"]
            if not state.norms:
                state.norms = self._norms()
            self._note(found, math.nan)
            self._save()
        losses = list[float]()
        while state.step < stage.steps and state.stale < settings.patience:
            loss = self._step(stage)
            losses.append(loss)
            state.step += 1
            if state.step % settings.evaluate_every == 0 or state.step == stage.steps:
                finite = [v for v in losses if math.isfinite(v)]
                self._consider(stage, sum(finite) / len(finite) if finite else math.nan)
                losses.clear()
                self._save()
            self._told(stage)

    def _told(self, stage: Stage) -> None:
        state = self.state
        done = sum(s.steps for s in self.stages[: state.stage]) + state.step
        latest = state.history[-1]["score"] if state.history else None
        total = sum(s.steps for s in self.stages)
        self.tell(Event("search", done, total, latest, state.best_score))

    def _consider(self, stage: Stage, loss: float) -> None:
        """Judges the average; keeps it if it is better, not less diverse, not further from real data."""
        state = self.state
        found = self._judged(stage, state.tensors["average"])
        assert state.start is not None
        least = (1 - self.settings.recall_drop) * state.start["recall"]
        most = state.start["law"] + max(MOST_WORSE * abs(state.start["law"]), LEAST_WORSE)
        better = (
            found["score"] < state.best_score
            and found["recall"] >= least
            and (found["law"] <= most or not stage.paired)
        )
        if better:
            state.best_score, state.stale = found["score"], 0
            state.tensors["best"] = state.tensors["average"].clone()
        else:
            state.stale += 1
        self._note(found, loss, taken=better)

    def _note(self, found: dict[str, float], loss: float, *, taken: bool = True) -> None:
        state = self.state
        state.history.append(
            {
                "stage": state.stage,
                "step": state.step,
                "loss": loss if math.isfinite(loss) else None,
                **{k: v if math.isfinite(v) else None for k, v in found.items()},
                "best": state.best_score if math.isfinite(state.best_score) else None,
                "taken": taken,
                "skipped": state.skipped,
            }
        )

    def _judged(self, stage: Stage, vector: Tensor) -> dict[str, float]:
        """Returns score, precision and recall of parameters on the held-out noise."""
        self.learned.load_vector(vector)
        try:
            plan = self.learned.plan()
            x, _ = self.source.sampled(
                plan,
                self.heldout_seed,
                self.heldout_size,
                batch_size=self.settings.sampling_batch,
            )
        except ValueError:  # not finite, or no sampler at all
            return {"score": math.inf, "law": math.inf, "precision": 0.0, "recall": 0.0}
        finally:
            self.learned.load_vector(self.state.tensors["vector"])
        precision, recall = self.judge.diversity(x)
        law = 0.0 if stage.paired and not self.real else self.judge.score(x)
        score = self._distance(x) if stage.paired else law
        return {"score": score, "law": law, "precision": precision, "recall": recall}

    @torch.no_grad()
    def _distance(self, x: Tensor) -> float:
        assert self.heldout is not None
        objective = next(o for o in self.objectives.values() if isinstance(o, Endpoint))
        device = self.source.device
        parts = [
            objective.each(a.to(device), b.to(device)).cpu()
            for a, b in zip(
                x.split(self.settings.sampling_batch),
                self.heldout.target.split(self.settings.sampling_batch),
                strict=True,
            )
        ]
        return float(torch.cat(parts).double().mean())

    @torch.no_grad()
    def _norms(self) -> dict[str, float]:
        """Returns the value of each objective at the start, which weights are relative to."""
        norms: dict[str, float] = {}
        if all(len(stage.terms) == 1 for stage in self.stages):
            return {name: 1.0 for name in self.objectives}
        for name, objective in self.objectives.items():
            rows = min(len(self.pairs), 128) if self.pairs is not None else 128
            x, cond, draws, batch = self._batch_of(range(rows), 0, -1)
            value = float(objective.loss(self.run_plan(self.learned(), x, draws, cond), batch))
            norms[name] = max(abs(value), 1e-8)
        return norms

    def _rate(self, stage: Stage, step: int) -> float:
        rising = max(1, round(self.settings.warmup * stage.steps))
        falling = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        return stage.learning_rate * min(1.0, (step + 1) / rising) * falling

    def _batch_of(
        self, rows: Sequence[int], fresh: int, step: int
    ) -> tuple[Tensor, dict[str, Any], list[Tensor], Batch]:
        """Returns initial states, conditions, draws and targets: some pairs, then fresh noise."""
        source, address = self.source, (self.seed, self.state.stage, step)
        target: Tensor | None = None
        states: tuple[Tensor, ...] = ()
        if self.pairs is None:
            fresh, rows = fresh + len(rows), ()
        noise = list[Tensor]()
        cond = source.conditions.at(rows) if rows else {}
        if rows:
            assert self.pairs is not None
            noise.append(source.noise(self.pairs.seed, rows))
            target = self.pairs.target[list(rows)].to(source.device)
            if self.pairs.states is not None:
                states = tuple(s[list(rows)].to(source.device) for s in self.pairs.states)
        if fresh:
            noise.append(self._normal(fresh, *address, 0))
            new = source.conditions.drawn(fresh, *address, 1)
            cond = joined(cond, new) if rows else new
        x = source.start(torch.cat(noise))
        draws = [
            self._normal(len(x), *address, 2, k) for k in range(self.learned.structure.n_noise)
        ]
        # A choice of real samples must not repeat from one stage to the next.
        return (
            x,
            cond,
            draws,
            Batch(1_000_000 * self.state.stage + step, len(rows), target, states),
        )

    def _normal(self, n: int, *address: int) -> Tensor:
        generator = generator_at(*address)
        z = torch.randn((n, *self.source.shape), generator=generator)
        return z.to(device=self.source.device, dtype=self.source.dtype)

    def _rows(self, stage: Stage) -> tuple[list[int], int]:
        """Returns the pairs of this step, each once an epoch, and how many fresh noises."""
        paired = any(name in ("endpoint", "trajectory") for name, _ in stage.terms)
        if not paired or self.pairs is None:
            return [], stage.batch_size
        total = len(self.pairs)
        count = stage.batch_size if stage.paired else max(1, stage.batch_size // 4)
        count = min(count, total)
        epoch, place = divmod(self.state.step, max(1, total // count))
        order = torch.randperm(
            total, generator=generator_at(self.seed, self.state.stage, 3, epoch)
        )
        rows = order[place * count : (place + 1) * count].tolist()
        return rows, 0 if stage.paired and len(stage.terms) == 1 else stage.batch_size - len(rows)

    def _loss(self, stage: Stage, outcome: Outcome, batch: Batch) -> Tensor:
        total = outcome.x.new_zeros(())
        for name, weight in stage.terms:
            scale = weight / self.state.norms[name]
            total = total + scale * self.objectives[name].loss(outcome, batch)
        return total

    def _step(self, stage: Stage) -> float:
        """Makes one step; returns its loss, which may not be finite: then nothing was changed."""
        state, settings, tensors = self.state, self.settings, self.state.tensors
        rows, fresh = self._rows(stage)
        x, cond, draws, batch = self._batch_of(rows, fresh, state.step)
        moving = settings.radius is not None and stage.paired and not fresh
        if moving:
            x = self._moved(x, rows).requires_grad_()
        self.learned.load_vector(tensors["vector"])
        self.learned.zero_grad(set_to_none=True)
        loss = backpropagate(
            self.learned,
            self.run_plan,
            x,
            draws,
            cond,
            lambda outcome: self._loss(stage, outcome, batch),
            microbatch=settings.microbatch,
            leaf=x if moving else None,
        )
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
            for p in self.learned.parameters()
        ]
        gradient = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        if not bool(loss.isfinite()) or not bool(gradient.isfinite().all()):
            state.skipped += 1
            return math.inf
        if moving and x.grad is not None:
            self._move(x, rows, draws, cond, batch)
        self._update(stage, gradient)
        return float(loss)

    def _update(self, stage: Stage, gradient: Tensor) -> None:
        """One update of Adam, and of the average."""
        state, settings, tensors = self.state, self.settings, self.state.tensors
        gradient = gradient * min(1.0, settings.clip / max(float(gradient.norm()), 1e-300))
        state.updates += 1
        tensors["first"].lerp_(gradient, 0.1)
        tensors["second"].lerp_(gradient.square(), 0.001)
        first = tensors["first"] / (1 - 0.9**state.updates)
        second = tensors["second"] / (1 - 0.999**state.updates)
        rate = self._rate(stage, state.step)
        tensors["vector"] = tensors["vector"] - rate * first / (second.sqrt() + 1e-8)
        decay = min(settings.ema, (1 + state.updates) / (10 + state.updates))
        tensors["average"] = torch.lerp(tensors["vector"], tensors["average"], decay)

    def _moved(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        if "moved" not in self.state.tensors:
            assert self.pairs is not None
            self.state.tensors["moved"] = torch.zeros_like(self.pairs.target)
        return (x + self.state.tensors["moved"][list(rows)].to(x)).detach()

    @torch.no_grad()
    def _move(
        self,
        x: Tensor,
        rows: Sequence[int],
        draws: Sequence[Tensor],
        cond: Mapping[str, Any],
        batch: Batch,
    ) -> None:
        """Moves training noises downhill within their ball, each only if its distance falls.

        References:
            | Learning to Discretize Denoising Diffusion ODEs (Tong et al., 2024)
            | https://arxiv.org/abs/2405.15506
        """
        radius, moved = self.settings.radius, self.state.tensors["moved"]
        assert radius is not None
        assert x.grad is not None
        assert batch.target is not None
        objective = next(o for o in self.objectives.values() if isinstance(o, Endpoint))
        before = moved[list(rows)].to(x)
        # The loss is a mean: times the batch it is each sample's own.
        after = before - 12 / self.learned.structure.nfe * len(x) * x.grad
        length = after.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        after = after * (radius / length.clamp(min=radius))
        numbers = self.learned()
        old = objective.each(self.run_plan(numbers, x, draws, cond).x, batch.target)
        new = objective.each(
            self.run_plan(numbers, x - before + after, draws, cond).x, batch.target
        )
        falls = (new < old).reshape(-1, *[1] * (x.ndim - 1))
        moved[list(rows)] = torch.where(falls, after, before).to(moved)

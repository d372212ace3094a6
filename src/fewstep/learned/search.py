r"""The search: Adam over a sampler's parameters, judged on noise that it does not train on.

Everything random has a tagged address with the stage and the step, so that an interrupted run
resumes to the same result, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.interrupts import unbroken
from fewstep.base.memory import Halving, MicroBatches
from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.noise import generator_at
from fewstep.learned.evolution import Evolution
from fewstep.learned.judges import Judge, discrepancy_change
from fewstep.learned.learned_plan import LearnedPlan
from fewstep.learned.objectives import Batch, Objective, Outcome
from fewstep.learned.search_state import STATE, State
from fewstep.learned.settings import Search
from fewstep.learned.stages import Stage
from fewstep.learned.teachers import Pairs, Source
from fewstep.learned.unrolled import Unrolled, backpropagate
from fewstep.models.conditions import joined, select
from fewstep.sampling.residual import Residual

MOST_WORSE, LEAST_WORSE = 0.1, 2e-4
"""The tolerated increase of the distance to real data in a paired stage: a share, and a minimum."""
MOST_STEPS = 10**9
STANDARD_ERROR = 0.683
"""The level of the interval of one standard error."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""The shares of the way from the start to the best candidate that are checked, the first harmless one taken."""
MOST_RISE = 3.0
"""How many times its size the loss may rise by in a first step of the learning rate: Adam comes back from that, and slow
parameters need its rate."""
MOST_HALVINGS = 10
"""The most times that the learning rate is halved for that."""
NORM_ROWS = 128
"""The samples from which the value of each objective at the start is estimated."""


class Searcher:
    """Runs the stages of a search.

    Arguments:
        learned: The learned plan; after the run it has the best parameters.
        source: The source of initial states.
        stages: The stages.
        objectives: The objectives by name.
        pairs: The pairs for training, or ``None``.
        heldout: The pairs on which candidates are judged, or ``None``: then only the judge decides.
        heldout_seed: The seed of the held-out noise.
        heldout_size: The number of held-out noises.
        judge: The judge of distributions.
        guards: The judges by which the result must not be worse than the start: that of the candidates, and
            that of the features of the loss where there are real data.
        check_size: The number of noises on which the result is compared with the start by them.
        real: Whether its reference are real data, in features that no loss uses: then it limits
            paired stages too.
        settings: The settings.
        seed: The seed of the search.
        folder: The folder of checkpoints, or ``None``.
        progress: Has a stage for each stage of the search, whose units are steps.
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
        guards: Sequence[Judge] = (),
        check_size: int = 0,
        real: bool,
        settings: Search,
        seed: int,
        folder: Path | None = None,
        identity: str = "",
        progress: Progress = SILENT,
    ) -> None:
        self.learned, self.source, self.stages = learned, source, tuple(stages)
        self.objectives, self.pairs, self.heldout = objectives, pairs, heldout
        self.heldout_seed, self.heldout_size = heldout_seed, heldout_size
        self.judge, self.real = judge, real
        self.guards, self.check_size = tuple(guards), max(check_size, heldout_size)
        self.share = 1.0
        self.settings, self.seed = settings, seed
        self.folder, self.identity = folder, identity
        self.progress = progress
        self.run_plan = Unrolled(
            source.denoiser,
            learned.structure,
            remat=source.device.type != "cpu" if settings.remat is None else settings.remat,
            gradient=settings.gradient,
            keep_states=any(o.wants_states for o in objectives.values()),
            residual=learned.residual,
        )
        vector = learned.vector()
        self.state = State({"average": vector, "best": vector.clone()})
        self.optimizer = torch.optim.Adam(learned.parameters())
        self._evolution: Evolution | None = None
        self._micro, self._halving = MicroBatches(), Halving()
        self._halving.most = settings.microbatch
        self._unsaved: State | None = None
        self._best_features: Tensor | None = None
        self._latest_features: Tensor | None = None
        self._first_features: Tensor | None = None

    def run(self) -> State:
        """Runs the remaining steps of all stages; the plan has the best parameters afterwards.

        Interrupted, it saves the last complete step.

        Raises:
            ValueError: If the checkpoint in the folder is damaged or of another family.
        """
        if (
            self.folder is not None
            and (stored := State.load(self.folder, self.identity)) is not None
        ):
            self._restore(stored)
        position = self.state.stage * MOST_STEPS + self.state.step
        self.source.team.check_step(position, self.source.team.device)
        try:
            while self.state.stage < len(self.stages):
                self._stage(self.stages[self.state.stage])
                self._next_stage()
        except (KeyboardInterrupt, RuntimeError) as error:
            # Without the other processes the next step fails, and the last one is whole.
            if isinstance(error, RuntimeError) and not self.source.team.own.several:
                raise
            if self.folder is not None and self._unsaved is not None:
                with unbroken():  # schedulers send SIGTERM more than once
                    self._unsaved.save(self.folder, self.identity)
            raise
        self.share = self._harmless()
        self.learned.load_vector(self.share * self.state.tensors["best"])
        return self.state

    # The result beside the start

    def _harmless(self) -> float:
        """Returns the share of the way from the start to the best candidate that the result goes.

        The whole way, unless a guard sees the result further from the data than the start, by more than one
        standard error of the paired change; then the largest of :data:`SHARES` at which none does, or 0. The teacher
        may be worse than the start in some features, and least squares are met by blur: nearness to it shows neither.
        """
        best = self.state.tensors["best"]
        if not self.guards or not bool(best.any()):
            return 1.0
        self.progress.stage("check")
        n = self.check_size
        start = self._heldout(torch.zeros_like(best), n)
        before = [judge.features(start) / judge.scale for judge in self.guards]
        harmless = 0.0
        for share in SHARES:
            self.progress.tick()
            harm = 0.0
            try:
                x = self._heldout(share * best, n)
                for judge, old in zip(self.guards, before, strict=True):
                    new = judge.features(x) / judge.scale
                    change = discrepancy_change(judge, new, old, level=STANDARD_ERROR)
                    harm = max(harm, change.low)
            except ValueError:  # samples that are not finite
                harm = math.inf
            known = torch.tensor([harm], dtype=torch.float64)
            if not float(self.source.team.of_first(known)) > 0:
                harmless = share
                break
        return harmless

    # The state on disk

    def _save(self) -> None:
        if self.folder is None or not self.source.team.own.first:
            return
        self._collect()
        self.state.save(self.folder, self.identity)
        self._unsaved = None

    def _collect(self) -> None:
        """Puts all tensors of the search into the state."""
        others = ("adam.", "objective.")
        tensors = {k: v for k, v in self.state.tensors.items() if not k.startswith(others)}
        for name, objective in self.objectives.items():
            tensors |= {f"objective.{name}.{k}": v for k, v in objective.state().items()}
        tensors["vector"] = self.learned.vector()
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        self.state.tensors = tensors

    def _keep(self) -> None:
        """Keeps a copy of the state after a step, for an interruption within the next one."""
        if self.folder is None or not self.source.team.own.first:
            return
        self._collect()
        state = self.state
        self._unsaved = replace(
            state,
            tensors={k: torch.as_tensor(v).clone() for k, v in state.tensors.items()},
            history=list(state.history),
            losses=list(state.losses),
        )

    def _restore(self, stored: State) -> None:
        assert self.folder is not None
        if stored.tensors["vector"].shape != self.state.tensors["best"].shape:
            raise ValueError(f"the checkpoint {str(self.folder / STATE)!r} is of another family")
        try:
            self._load(stored)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint {str(self.folder / STATE)!r} is damaged: {error}; give overwrite "
                "(--overwrite) to begin again"
            ) from None

    def _load(self, stored: State) -> None:
        self.state = stored
        self.learned.load_vector(stored.tensors["vector"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in stored.tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for name, objective in self.objectives.items():
            own = f"objective.{name}."
            objective.restore(
                {k.removeprefix(own): v for k, v in stored.tensors.items() if k.startswith(own)}
            )

    def _next_stage(self) -> None:
        state = self.state
        self.learned.load_vector(state.tensors["best"])
        state.tensors["average"] = state.tensors["best"].clone()
        self.optimizer = torch.optim.Adam(self.learned.parameters())
        state.tensors.pop("values", None)
        self._evolution = None
        state.stage, state.step, state.updates, state.stale = state.stage + 1, 0, 0, 0
        state.start, state.best_score = None, math.inf
        self._best_features = self._first_features = None
        self._save()

    # A stage

    def _stage(self, stage: Stage) -> None:
        state, settings = self.state, self.settings
        more = f" {state.stage + 1} of {len(self.stages)}" if len(self.stages) > 1 else ""
        self.progress.stage(f"search{more}", stage.steps, done=state.step)
        if state.start is None:
            state.tensors["first"] = state.tensors["best"].clone()
            if not state.norms:
                state.norms = self._norms()
                state.slower = self._slower(stage)
            judgement = self._judgement(stage, state.tensors["best"])
            del judgement["above"], judgement["harm"]
            state.start, state.best_score = judgement, judgement["score"]
            self._note(judgement, math.nan)
            self._save()
        self._judge(stage)  # if it was interrupted there
        while state.step < stage.steps and state.stale < settings.patience:
            state.losses.append(self._step(stage))
            state.step += 1
            self._keep()
            self._judge(stage)
            latest = state.history[-1]["score"]
            note = "" if latest is None else f"held out {latest:.4g}, best {state.best_score:.4g}"
            self.progress.tick(1, note)

    def _judge(self, stage: Stage) -> None:
        """Evaluates the average, at the steps where that is due, and saves."""
        state = self.state
        due = state.step % self.settings.evaluate_every == 0 or state.step == stage.steps
        if not state.losses or not due:
            return
        finite = [v for v in state.losses if math.isfinite(v)]
        self._consider(stage, sum(finite) / len(finite) if finite else math.nan)
        state.losses.clear()
        self._save()

    def _consider(self, stage: Stage, loss: float) -> None:
        """Evaluates the average; accepts it if better, not less diverse and not further from real data.

        Better by the law is better beyond one standard error of the paired change: the best of many noisy
        values is not the best candidate. Further from real data is further by a tenth and beyond the interval of the
        change: near the data a tenth of the discrepancy is less than its noise.
        """
        state = self.state
        judgement = self._judgement(stage, state.tensors["average"])
        above, harm = judgement.pop("above"), judgement.pop("harm")
        assert state.start is not None
        least = (1 - self.settings.recall_drop) * state.start["recall"]
        most = state.start["law"] + max(MOST_WORSE * abs(state.start["law"]), LEAST_WORSE)
        better = (
            judgement["score"] < state.best_score
            and judgement["recall"] >= least
            and (judgement["law"] <= most or harm <= 0 or not (stage.paired or stage.scored))
            and above < 0
        )
        if better:
            self._best_features = self._latest_features
            state.best_score, state.stale = judgement["score"], 0
            state.tensors["best"] = state.tensors["average"].clone()
        else:
            state.stale += 1
        self._note(judgement, loss, taken=better)

    def _note(self, judgement: dict[str, float], loss: float, *, taken: bool = True) -> None:
        state = self.state
        state.history.append(
            {
                "stage": state.stage,
                "step": state.step,
                "loss": loss if math.isfinite(loss) else None,
                **{k: v if math.isfinite(v) else None for k, v in judgement.items()},
                "best": state.best_score if math.isfinite(state.best_score) else None,
                "taken": taken,
                "skipped": state.skipped,
            }
        )

    def _judgement(self, stage: Stage, vector: Tensor) -> dict[str, float]:
        """Returns score, law, precision, recall, ``above`` and ``harm`` of parameters on the held-out noise.

        ``score`` is the distance from the teacher in a paired stage, the objective's own score if it has
        one, and else ``law``, the discrepancy from the judge's reference. ``above`` is how much larger than that of
        the best so far the law may be, by one standard error, in a stage that the law decides; elsewhere
        minus infinity. ``harm`` is how much larger than that of the start it is at least, in a stage that the law
        does not decide.
        """
        try:
            x = self._heldout(vector)
        except (
            ValueError
        ):  # samples that are not finite, or coefficients that are not a valid plan
            worst = {"score": math.inf, "law": math.inf, "precision": 0.0, "recall": 0.0}
            return {**worst, "above": math.inf, "harm": math.inf}
        precision, recall = self.judge.diversity(x)
        law = 0.0 if stage.paired and not self.real else self.judge.score(x)
        score = law
        if stage.paired:
            score = self._distance(stage, x)
        elif stage.scored:
            objective = self.objectives[stage.names[0]]
            with torch.no_grad():
                parts = x.to(self.source.device).split(self.settings.sampling_batch)
                score = float(torch.cat([objective.score(part) for part in parts]).double().mean())
        decides = not (stage.paired or stage.scored)
        above = self._above(x, vector) if decides else -math.inf
        limits = stage.scored or (stage.paired and self.real)
        harm = self._harm(x) if limits else 0.0
        values = torch.tensor([score, law, precision, recall, above, harm], dtype=torch.float64)
        names = ("score", "law", "precision", "recall", "above", "harm")
        return dict(zip(names, self.source.team.of_first(values).tolist(), strict=True))

    def _heldout(self, vector: Tensor, n: int | None = None) -> Tensor:
        """Returns n samples of parameters from the held-out noise, by default as many as judge candidates."""
        present = self.learned.vector()
        self.learned.load_vector(vector)
        try:
            x, _ = self.source.sampled(
                self.learned.plan(),
                self.heldout_seed,
                self.heldout_size if n is None else n,
                batch_size=self.settings.sampling_batch,
                residual=_detached(self.learned),
            )
            return x
        finally:
            self.learned.load_vector(present)

    def _harm(self, x: Tensor) -> float:
        """Returns the lower end of the change of the discrepancy from that of the stage's start, paired, 95 %.

        Only clear harm vetoes a candidate: what the law of a few samples sees near the data is mostly noise, and the
        result as a whole is checked on more of them.
        """
        judge, features = self.judge, self.judge.features(x) / self.judge.scale
        if self._first_features is None:
            if self.state.start is None:  # these are the start's samples
                self._first_features = features
                return 0.0
            first = self._heldout(self.state.tensors["first"])  # resumed within the stage
            self._first_features = judge.features(first) / judge.scale
        return discrepancy_change(judge, features, self._first_features).low

    def _above(self, x: Tensor, vector: Tensor) -> float:
        """Returns the upper end of the change of the discrepancy from that of the best so far, paired."""
        judge, best = self.judge, self.state.tensors["best"]
        self._latest_features = features = judge.features(x) / judge.scale
        if vector is best:
            self._best_features = features
            return -math.inf
        if self._best_features is None:  # resumed within the stage
            self._best_features = judge.features(self._heldout(best)) / judge.scale
        return discrepancy_change(judge, features, self._best_features, level=STANDARD_ERROR).high

    @torch.no_grad()
    def _distance(self, stage: Stage, x: Tensor) -> float:
        assert self.heldout is not None
        size = self.settings.sampling_batch
        device = self.source.device
        parts = [
            self._distances(stage, a.to(device), b.to(device)).cpu()
            for a, b in zip(x.split(size), self.heldout.target.split(size), strict=True)
        ]
        return float(torch.cat(parts).double().mean())

    def _distances(self, stage: Stage, x: Tensor, target: Tensor) -> Tensor:
        """Returns the distance of each sample from the teacher's; of several paired terms their weighted sum."""
        paired = [(name, weight) for name, weight in stage.terms if self.objectives[name].paired]
        if len(paired) == 1:
            return self.objectives[paired[0][0]].distances(x, target)
        total = x.new_zeros(len(x))
        for name, weight in paired:
            scale = weight / self.state.norms[name]
            total = total + scale * self.objectives[name].distances(x, target)
        return total

    @torch.no_grad()
    def _norms(self) -> dict[str, float]:
        """Returns the value of each objective at the start, to which weights are relative."""
        if all(len(stage.terms) == 1 for stage in self.stages):
            return {name: 1.0 for name in self.objectives}
        norms: dict[str, float] = {}
        for name, objective in self.objectives.items():
            rows = min(len(self.pairs), NORM_ROWS) if self.pairs is not None else NORM_ROWS
            x, cond, draws, batch = self._batch(range(rows), 0, step=-1)
            outcome = self.run_plan(self.learned(), x, draws, cond)
            value = float(objective.loss(outcome, batch))
            norms[name] = objective.typical(value, outcome.x)
        return norms

    # A step

    def _rate(self, stage: Stage, step: int) -> float:
        rising = max(1, round(self.settings.warmup * stage.steps))
        falling = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        return self.state.slower * stage.learning_rate * min(1.0, (step + 1) / rising) * falling

    def _slower(self, stage: Stage) -> float:
        r"""Returns the factor of the learning rate: halved until a first step does not leave the start's surroundings.

        Adam's first step has the size of the rate in every parameter, whatever the gradient. What that does to the samples
        grows with the number of parameters, and what it may do falls with the distance left to the teacher: with the same
        rate the loss of one model rises to 1.4 times at 4 evaluations, to 56 times at 10. A rate that was given is kept.
        """
        if self.settings.learning_rate is not None or self.settings.optimizer != "adam":
            return 1.0
        rows = range(min(len(self.pairs), stage.batch_size) if self.pairs is not None else 0)
        x, cond, draws, batch = self._batch(rows, stage.batch_size - len(rows), step=-2)
        value = backpropagate(
            self.learned,
            self.run_plan,
            x,
            draws,
            cond,
            lambda outcome: self._loss(stage, outcome, batch),
            microbatch=self.settings.microbatch,
            team=self.source.team,
            micro=self._micro,
        )
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned.parameters()
        ]
        direction = torch.cat([part.flatten() for part in parts]).sign().to(self.learned.vector())
        self.learned.zero_grad()
        start = self.learned.vector()
        with torch.no_grad():
            whole = self._outcome(x, draws, cond)
            size = sum(
                weight / self.state.norms[name]
                * self.objectives[name].typical(
                    float(self.objectives[name].loss(whole, batch)), whole.x
                )
                for name, weight in stage.terms
            )  # fmt: skip
            factor = 1.0
            for _ in range(MOST_HALVINGS):
                self.learned.load_vector(start - factor * stage.learning_rate * direction)
                try:
                    new = float(self._loss(stage, self._outcome(x, draws, cond), batch))
                except ValueError:  # coefficients that are not a valid plan
                    new = math.inf
                known = torch.tensor([new], dtype=torch.float64)
                new = float(self.source.team.of_first(known))
                if new <= float(value) + MOST_RISE * size:
                    break
                factor /= 2
        self.learned.load_vector(start)
        return factor

    @torch.no_grad()
    def _outcome(self, x: Tensor, draws: Sequence[Tensor], cond: Mapping[str, Any]) -> Outcome:
        """Returns the samples of the present parameters, in as many parts as memory needs."""
        numbers = self.learned()

        def run(rows: range) -> Outcome:
            some = slice(rows.start, rows.stop)
            return self.run_plan(numbers, x[some], [z[some] for z in draws], select(cond, rows))

        outcomes = self._halving(run, len(x))
        states = zip(*(o.states for o in outcomes), strict=True)
        return Outcome(
            torch.cat([o.x for o in outcomes]), tuple(torch.cat(parts) for parts in states)
        )

    def _batch(
        self, rows: Sequence[int], fresh: int, *, step: int
    ) -> tuple[Tensor, dict[str, Any], list[Tensor], Batch]:
        """Returns initial states, conditions, draws and targets: the pairs of rows, then fresh noise."""
        source, address = self.source, (self.state.stage, step)
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
            noise.append(self._normal(fresh, "fresh noise", *address))
            new = source.conditions.drawn(fresh, "search", "conditions", self.seed, *address)
            cond = joined(cond, new) if rows else new
        x = source.start(torch.cat(noise))
        draws = [
            self._normal(len(x), "draws", *address, k)
            for k in range(self.learned.structure.n_noise)
        ]
        return x, cond, draws, Batch(address, len(rows), target, states)

    def _normal(self, n: int, tag: str, *address: int) -> Tensor:
        generator = generator_at("search", tag, self.seed, *address)
        z = torch.randn((n, *self.source.shape), generator=generator)
        return z.to(device=self.source.device, dtype=self.source.dtype)

    def _rows(self, stage: Stage) -> tuple[list[int], int]:
        """Returns the pairs of this step, each once an epoch, and the number of fresh noises."""
        if not stage.needs_pairs or self.pairs is None:
            return [], stage.batch_size
        total = len(self.pairs)
        count = stage.batch_size if stage.all_pairs else max(1, stage.batch_size // 4)
        count = min(count, total)
        epoch, place = divmod(self.state.step, max(1, total // count))
        generator = generator_at("search", "pairs", self.seed, self.state.stage, epoch)
        order = torch.randperm(total, generator=generator)
        rows = order[place * count : (place + 1) * count].tolist()
        return rows, 0 if stage.all_pairs and len(stage.terms) == 1 else stage.batch_size - len(
            rows
        )

    def _loss(
        self, stage: Stage, outcome: Outcome, batch: Batch, *, learn: bool = False
    ) -> Tensor:
        total = outcome.x.new_zeros(())
        for name, weight in stage.terms:
            if learn:
                self.objectives[name].learn(outcome, batch)
            scale = weight / self.state.norms[name]
            total = total + scale * self.objectives[name].loss(outcome, batch)
        return total

    @torch.no_grad()
    def _generation(self, stage: Stage) -> float:
        """Does one generation without gradients; returns the mean loss of its candidates."""
        state = self.state
        if self._evolution is None:
            seed = generator_at("search", "evolution", self.seed, state.stage).initial_seed()
            self._evolution = Evolution(
                state.tensors["first"],
                spread=self.settings.spread,
                seed=seed,
                given=state.tensors.get("values"),
            )
        rows, fresh = self._rows(stage)
        x, cond, draws, batch = self._batch(rows, fresh, step=state.step)
        values = list[float]()
        for candidate in self._evolution.candidates():
            self.learned.load_vector(candidate)
            whole = self._outcome(x, draws, cond)
            values.append(float(self._loss(stage, whole, batch)))
        self._evolution.tell(values)
        state.tensors["values"] = self._evolution.given
        state.tensors["average"] = self._evolution.mean
        self.learned.load_vector(self._evolution.mean)
        finite = [v for v in values if math.isfinite(v)]
        state.skipped += not finite
        return sum(finite) / len(finite) if finite else math.inf

    def _step(self, stage: Stage) -> float:
        """Does one step; returns its loss. A step that is not finite changes nothing."""
        if self.settings.optimizer == "cmaes":
            return self._generation(stage)
        state, settings = self.state, self.settings
        rows, fresh = self._rows(stage)
        x, cond, draws, batch = self._batch(rows, fresh, step=state.step)
        moving = settings.radius is not None and stage.paired and not fresh
        if moving:
            x = self._moved(x, rows).requires_grad_()
        learned = False

        def loss_of(outcome: Outcome) -> Tensor:
            nonlocal learned
            value = self._loss(stage, outcome, batch, learn=not learned)
            learned = True  # not again, if the step is begun again out of memory
            return value

        loss = backpropagate(
            self.learned,
            self.run_plan,
            x,
            draws,
            cond,
            loss_of,
            microbatch=settings.microbatch,
            leaf=x if moving else None,
            team=self.source.team,
            micro=self._micro,
        )
        norm = nn.utils.clip_grad_norm_(self.learned.parameters(), settings.clip)
        if not bool(loss.isfinite() and norm.isfinite()):
            state.skipped += 1
            return math.inf
        if moving and x.grad is not None:
            self._move(stage, x, rows, draws, cond, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(stage, state.step)
        self.optimizer.step()
        state.updates += 1
        decay = min(settings.ema, (1 + state.updates) / (10 + state.updates))
        average = state.tensors["average"]
        state.tensors["average"] = torch.lerp(self.learned.vector(), average, decay)
        return float(loss)

    # Training noises that move

    def _moved(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        if "moved" not in self.state.tensors:
            assert self.pairs is not None
            self.state.tensors["moved"] = torch.zeros_like(self.pairs.target)
        return (x + self.state.tensors["moved"][list(rows)].to(x)).detach()

    @torch.no_grad()
    def _move(
        self,
        stage: Stage,
        x: Tensor,
        rows: Sequence[int],
        draws: Sequence[Tensor],
        cond: Mapping[str, Any],
        batch: Batch,
    ) -> None:
        """Moves training noises along the negative gradient within their ball, each only if its distance falls.

        References:
            | Learning to Discretize Denoising Diffusion ODEs (Tong et al., 2024)
            | https://arxiv.org/abs/2405.15506
        """
        radius, moved = self.settings.radius, self.state.tensors["moved"]
        assert radius is not None
        assert x.grad is not None
        assert batch.target is not None
        objective = self.objectives[stage.names[0]]
        before = moved[list(rows)].to(x)
        # The loss is a mean: times the batch size it is the gradient of each sample.
        after = before - 12 / self.learned.structure.nfe * len(x) * x.grad
        length = after.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        after = after * (radius / length.clamp(min=radius))
        numbers = self.learned()
        old = objective.distances(self.run_plan(numbers, x, draws, cond).x, batch.target)
        new = objective.distances(
            self.run_plan(numbers, x - before + after, draws, cond).x, batch.target
        )
        falls = (new < old).reshape(-1, *[1] * (x.ndim - 1))
        moved[list(rows)] = self.source.team.of_first(torch.where(falls, after, before)).to(moved)


def _detached(learned: LearnedPlan) -> Residual | None:
    residual = learned.residual()
    return None if residual is None else residual.detached()

r"""A validated search, and its run: pairs, search, scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.base.callables import callable_digest
from fewstep.base.files import sweep
from fewstep.base.paths import check_path
from fewstep.base.progress import SILENT, Progress
from fewstep.base.tables import Column, Table
from fewstep.diffusion.grids import TimeGrid
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.evolution import check_evolution
from fewstep.learned.families import FAMILIES, family
from fewstep.learned.judges import IMAGE, Judge, random_features
from fewstep.learned.learned_plan import Base, LearnedPlan
from fewstep.learned.objectives import OBJECTIVES, Given, Objective
from fewstep.learned.real_data import RealData, loss_features, real_data
from fewstep.learned.search import Searcher
from fewstep.learned.search_state import State
from fewstep.learned.settings import Search
from fewstep.learned.stages import Stage, stages_of
from fewstep.learned.starts import start_of
from fewstep.learned.teachers import Pairs, Source, make_pairs, teacher_plan
from fewstep.learned.unseen import Space, final_scores, unseen_extractors
from fewstep.learned.verdict import (
    SELECTED,
    START,
    TRAINED,
    UNSEEN,
    Score,
    Verdict,
    records,
    verdict_of,
)
from fewstep.metrics.features import FeatureMap, extractor, identity, name_of
from fewstep.metrics.reference import check_data_range
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import GaussianMixture
from fewstep.models.wrappers import Guided
from fewstep.plans.plan import Plan
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.residual import Residual
from fewstep.sampling.resolve import own_profile
from fewstep.solvers import Solver

SMALL = 64
"""The largest number of elements of a cheap sample."""
TRAIN, HELDOUT, TEST = 10_000_019, 20_000_003, 30_000_001
"""Offsets added to the seed: the three sets of noise share no seed with each other or a small user seed."""


@dataclass(frozen=True)
class TunedSampler:
    """The result of :func:`fewstep.tune`: a sampler of K evaluations, with its scores.

    ``fewstep.sample(denoiser, n, recipe=tuned.recipe)`` uses it; each sample costs
    ``tuned.plan.nfe`` evaluations (twice as many with guidance).

    Attributes:
        recipe: The sampler as a recipe: for :func:`fewstep.sample`, the command line, diffusers.
            ``recipe.about`` has all inputs of the search, the scores and the verdict.
        plan: Its plan; coefficients and conditioning timesteps are float64. A spatial residual is no part of it,
            but of the recipe.
        history: The judgements of the search, one record each: stage, step, mean training loss,
            score (the distance to the teacher or the squared discrepancy from the reference), law,
            precision, recall, the best score so far, whether the candidate was accepted.
        scores: Scores ``"before"`` (of the start) and ``"after"``, by name, on seeds that the search
            did not use; each has value, low and high of a 95 % interval. The RMS to the teacher is in
            the units of a sample, FID, KID and MMD² in those of the features named.
        verdict: Whether the result is better than the start, and why.
    """

    recipe: SamplerRecipe
    plan: Plan
    history: list[dict[str, Any]]
    scores: Mapping[str, Any]
    verdict: Verdict

    @property
    def improved(self) -> bool:
        """Whether the result is better than the start, on seeds that the search did not use."""
        return self.verdict.better

    def table(self) -> Table:
        """Returns the scores on unused seeds, before and after, with 95 % intervals."""
        before, after = self.scores["before"], self.scores["after"]
        return Table(
            [{"score": name, "before": before[name], "after": after[name]} for name in before],
            [
                Column("score", "score on unused seeds", left=True),
                Column("before", show=_interval),
                Column("after", show=_interval),
            ],
            title=self.recipe.name,
        )

    def __str__(self) -> str:
        return f"{self.table()}\n{self.verdict.sentence}"

    def _repr_html_(self) -> str:
        return f"{self.table()._repr_html_()}<p>{escape(self.verdict.sentence)}</p>"

    def save(self, path: str | Path) -> Path:
        """Writes the recipe, whatever the verdict; returns the path.

        Raises:
            OSError: If the file cannot be written.
        """
        check_path(path, "path")
        sweep(Path(path).parent, of=Path(path).name)  # of a killed process
        return self.recipe.save(path)


def _interval(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.4g} ({score['low']:.4g} to {score['high']:.4g})"


@dataclass(frozen=True)
class Problem:
    """A validated search: everything that is known before the first network evaluation."""

    model: Denoiser
    base: Base
    learned: LearnedPlan
    stages: tuple[Stage, ...]
    objectives: Mapping[str, Objective]
    real: RealData | None
    features: Callable[[Tensor], Tensor]
    unseen: Sequence[Callable[[Tensor], Tensor]]
    source: Source
    settings: Search
    seed: int
    guidance: float | None
    names: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        *,
        nfe: int,
        family_name: str,
        objective: str,
        data: Any,
        features: FeatureMap,
        unseen: Sequence[FeatureMap] = (),
        solver: str | Solver | None,
        grid: str | TimeGrid | None,
        head_start: float | None,
        options: Mapping[str, Any],
        family_options: Mapping[str, Any],
        guidance: float | None,
        search: Search,
        seed: int,
        cond: Mapping[str, Any],
    ) -> Problem:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"a Denoiser is needed, got {type(denoiser).__name__}; make one with "
                "fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        FAMILIES[family_name]
        guided = denoiser if guidance in (None, 1) else Guided(denoiser, guidance)  # type: ignore[arg-type]
        conditions = ConditionPool.of(guided, cond)
        integer = denoiser.integer_times
        request = SamplerRequest(
            solver, nfe=nfe, grid=grid, head_start=head_start, options=dict(options)
        )
        start = start_of(
            family_name,
            denoiser.schedule,
            nfe,
            solver=solver,
            grid=grid,
            head_start=head_start,
            integer_times=integer,
            options=options,
            profile=own_profile(denoiser, request, guidance, nfe),
            family_options=family_options,
        )
        base = replace(start, shape=denoiser.event_shape)
        learned = family(family_name, base, **family_options)
        if not learned.count:
            raise ValueError(
                f"the family {family_name!r} has no parameters with these options at nfe={nfe}; use "
                "another family, or omit its options"
            )
        source = Source.of(guided, base.plan(), conditions)
        small = math.prod(source.shape) <= SMALL
        if data is None and isinstance(denoiser, GaussianMixture):
            data = denoiser.draw(20_000, seed=seed + TEST)
        if objective == "auto":
            # Features tell what least squares do not; the coordinates of vectors are no features.
            objective = "endpoint,mmd" if small else "endpoint+perceptual"
            objective = "endpoint" if data is None else objective
        stages = stages_of(
            objective,
            small=small,
            steps=search.steps,
            batch_size=search.batch_size,
            learning_rate=search.learning_rate,
        )
        kinds = {name: OBJECTIVES[name] for stage in stages for name in stage.names}
        for name, kind in kinds.items():
            if kind.needs_data and data is None:
                raise ValueError(
                    f"the objective {name} compares with real data; give data= (--data): an embedded "
                    "name, a folder of images, an idx or npz file, or a tensor"
                )
        if search.radius is not None and not any(kind.paired for kind in kinds.values()):
            raise ValueError(f"radius moves the noises of pairs; {objective} has none")
        if isinstance(data, (str, Path)) or len(getattr(data, "event_shape", None) or ()) == IMAGE:
            check_data_range(denoiser)
        real = real_data(data, features, source.shape)
        reference = None if real is None else real.loss
        more = [extractor(f) for f in unseen]
        extract = extractor(
            loss_features(features, source.shape) if reference is None else reference.extractor
        )
        given = Given(learned, search, reference, extract, source.dtype, seed)
        objectives = {name: kinds[name].build(given) for name in sorted(kinds)}
        if search.optimizer == "cmaes":
            check_evolution(learned.count)
            if learns := [
                n for n, o in objectives.items() if type(o).learn is not Objective.learn
            ]:
                raise ValueError(
                    f"{learns[0]} learns from step to step, and the optimizer cmaes compares candidates of one "
                    "step; use adam"
                )
            if search.radius is not None:
                raise ValueError(
                    "radius moves noises along gradients; the optimizer cmaes has none"
                )
        names = {
            "family": family_name,
            "family_options": dict(family_options),
            "objective": objective,
            "nfe": nfe,
            "conditions": conditions.record(),
            "dtype": str(source.dtype).removeprefix("torch."),
        }
        return cls(
            denoiser, base, learned, stages, objectives, real, extract, more, source, search, seed,
            guidance, names,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Returns everything that determines the search, as JSON values."""
        reference = None if self.real is None else self.real.loss
        return {
            **self.names,
            "base": self.base.to_record(),
            "model": self.model.fingerprint(),
            "schedule": self.model.schedule.name,
            "guidance": self.guidance,
            "data": None
            if reference is None
            else {
                "name": reference.name,
                "sha256": reference.sha256,
                "features": reference.features_name,
            },
            **({"features": name_of(self.features)} if self._trained else {}),
            "unseen": [name_of(extract) for extract in self.unseen],
            "seed": self.seed,
            "search": self.settings.to_record(),
            "versions": {"fewstep": __version__, "torch": torch.__version__.split("+")[0]},
        }

    def inputs(self) -> dict[str, Any]:
        """Returns the record with what the names in it stand for: plan, features, files, callables, by their digests."""
        record, real = self.record(), self.real
        of = None if real is None else real.loss
        if of is not None:
            files = None if of.files is None else {"files": of.files}
            record["data"] = {"sha256": of.sha256, **(files or {})}
        if of is not None or self._trained:
            record["features"] = _digest_of(self.features)
        given = {key: getattr(self.settings, key) for key in ("reward", "distance", "kernel")}
        return {
            **record,
            **{key: callable_digest(value) for key, value in given.items() if callable(value)},
            "plan": _digest(self.base.plan().to_json()),
            "unseen": [_digest_of(extract) for extract in self.unseen],
        }

    @property
    def _trained(self) -> bool:
        """Whether an objective lowers a distance in the features of the loss."""
        return any(objective.features for objective in self.objectives.values())

    def _identity(self) -> list[Any]:
        """Returns the inputs of the teacher's samples other than its plan and their numbers."""
        names = [self.names[key] for key in ("conditions", "dtype")]
        return [self.model.fingerprint(), self.guidance, *names]

    def solve(self, folder: Path | None, progress: Progress = SILENT) -> TunedSampler:
        """Samples the pairs, searches, and scores start and result.

        Arguments:
            folder: The folder of checkpoints, or ``None``.
            progress: Has the stages ``teacher`` and ``scores``, whose units are evaluations of a
                sample, and between them those of :class:`Searcher`.
        """
        settings, source = self.settings, self.source
        small = math.prod(source.shape) <= SMALL
        count, heldout_count, test_count = settings.sizes(small=small)
        train, heldout, test = self._pairs(folder, (count, heldout_count, test_count), progress)
        judge = self._judge(train)
        searcher = Searcher(
            self.learned,
            source,
            self.stages,
            self.objectives,
            pairs=train if self._paired else None,
            heldout=heldout,
            heldout_seed=self.seed + HELDOUT,
            heldout_size=heldout_count,
            judge=judge,
            guards=self._guards(judge),
            check_size=test_count,
            # A judge in the features of the loss is not independent of it, so it cannot overrule the teacher.
            real=self.real is not None and self.real.independent,
            settings=settings,
            seed=self.seed,
            folder=folder,
            identity=_digest(self.inputs()),
            progress=progress,
        )
        state = searcher.run()
        moved = bool(self.learned.vector().any())
        plan = self.learned.plan(f"{self.names['family']}-{self.base.plan().nfe}")
        if not moved:
            plan = replace(self.base.plan(), name=plan.name)
        residual = self.learned.residual() if moved else None
        residual = None if residual is None else residual.detached()
        plans = [(self.base.plan(), None), (plan, residual)] if moved else [(plan, None)]
        spaces = self._spaces(judge, heldout)
        scores = self._scores(plans, test, test_count, spaces, progress)
        before, after = scores[0], scores[-1]
        verdict = Verdict(START)
        if moved:
            verdict = verdict_of(
                before,
                after,
                data=self.real is not None or "reward" in self.objectives,
                recall_drop=settings.recall_drop,
            )
        scores_by_time = {"before": before, "after": after}
        return self._result(plan, residual, state, searcher.share, scores_by_time, verdict)

    def _result(
        self,
        plan: Plan,
        residual: Residual | None,
        state: State,
        share: float,
        scores: Mapping[str, list[Score]],
        verdict: Verdict,
    ) -> TunedSampler:
        values = {when: records(each) for when, each in scores.items()}
        about = {
            **self.record(),
            "by": "fewstep tune",
            "learned": self.learned.count,
            "improved": verdict.better,
            "verdict": verdict.sentence,
            "skipped": state.skipped,
            "share": share,
            "learning_rates": [state.slower * stage.learning_rate for stage in self.stages],
            "seeds": {"train": self.seed + TRAIN, "heldout": self.seed + HELDOUT, "test": self.seed + TEST},
            "scores": values,
        }  # fmt: skip
        recipe = SamplerRecipe(
            kind="plan",
            name=plan.name,
            plan=plan,
            schedule=self.model.schedule.to_record(),
            guidance=self.guidance,
            model=self.model.fingerprint(),
            about=json.loads(json.dumps(about)),
            residual=residual,
        )
        return TunedSampler(recipe, plan, state.history, values, verdict)

    @property
    def _paired(self) -> bool:
        return any(o.paired or o.wants_pairs for o in self.objectives.values())

    def _pairs(
        self, folder: Path | None, sizes: tuple[int, int, int], progress: Progress
    ) -> tuple[Pairs | None, Pairs | None, Pairs | None]:
        """Returns the pairs for training, for judgements and for scores, as far as needed."""
        through = any(objective.wants_states for objective in self.objectives.values())
        if not self._paired and self.real is not None:
            return None, None, None
        nfe = self.settings.teacher_nfe
        evaluations = self.learned.structure.nfe
        if nfe is None:
            nfe = max(100 if math.prod(self.source.shape) <= SMALL else 20, 3 * evaluations)
        plan = teacher_plan(self.base, nfe, through_knots=through)
        keep = self.base.grid.times.detach().tolist()[1:evaluations] if through else []
        train, heldout, test = sizes
        wanted = [("train", TRAIN, train)]
        if self._paired or self.real is None:
            wanted += [("heldout", HELDOUT, heldout), ("test", TEST, min(heldout, test))]
        progress.stage("teacher", plan.nfe * sum(n for _, _, n in wanted))
        pairs = list[Pairs | None]()
        for name, offset, n in wanted:
            seed = self.seed + offset
            file = None if folder is None else folder / f"teacher-{name}.safetensors"
            pairs.append(
                make_pairs(
                    self.source,
                    plan,
                    seed,
                    n,
                    batch_size=self.settings.sampling_batch,
                    keep=keep,
                    file=file,
                    key=_digest(*self._identity(), plan.to_json(), seed, n, keep),
                    progress=progress,
                )
            )
        train_pairs, heldout_pairs, test_pairs = (*pairs, None, None)[:3]
        return train_pairs, heldout_pairs, test_pairs

    def _judge(self, train: Pairs | None) -> Judge:
        """Returns the judge: against real data where there are any, else against the teacher."""
        if self.real is not None:
            real = self.real.judge
            return Judge.of(real.heldout[self.real.selection], extractor(real.extractor))
        assert train is not None
        extract = random_features(self.source.shape)
        with torch.no_grad():
            return Judge.of(extract(train.target).flatten(1), extract)

    def _guards(self, judge: Judge) -> list[Judge]:
        """Returns the judges by which the result is compared with the start: in all features but the unseen ones."""
        real = self.real
        if real is None or not real.independent:
            return [judge]
        own = extractor(real.loss.extractor)
        if identity(own) == identity(judge.extract) and identity(own):
            return [judge]
        return [judge, Judge.of(real.loss.heldout[real.selection], own)]

    def _scores(
        self,
        plans: Sequence[tuple[Plan, Residual | None]],
        test: Pairs | None,
        n: int,
        spaces: Sequence[Space],
        progress: Progress,
    ) -> list[list[Score]]:
        """Returns the scores of each plan on the test noise; the first is the start."""
        progress.stage("scores", n * sum(plan.nfe for plan, _ in plans))
        scores, start = list[list[Score]](), None
        role = TRAINED if self._paired else UNSEEN
        for plan, residual in plans:
            x, _ = self.source.sampled(
                plan,
                self.seed + TEST,
                n,
                batch_size=self.settings.sampling_batch,
                residual=residual,
                progress=progress,
            )
            target = None if test is None else test.target
            scores.append(
                final_scores(
                    x,
                    start=start,
                    target=target,
                    target_role=role,
                    spaces=spaces,
                    groups=self.source.conditions.groups(n),
                    reward=self.settings.reward if "reward" in self.objectives else None,
                )
            )
            start = x if start is None else start
        return scores

    def _spaces(self, judge: Judge, heldout: Pairs | None) -> list[Space]:
        """Returns the feature spaces of the final scores, each with its role in the search."""
        real = self.real
        if real is None:
            assert heldout is not None
            used: list[tuple[Callable[[Tensor], Tensor], str]] = [(judge.extract, SELECTED)]
            if self._trained and identity(self.features) == identity(judge.extract) != "":
                used = [(self.features, TRAINED)]
            elif self._trained:
                used.insert(0, (self.features, TRAINED))
            others = unseen_extractors(self.source.shape, [e for e, _ in used], self.unseen)
            with torch.no_grad():
                return [
                    Space(e, e(heldout.target).flatten(1).cpu(), role)
                    for e, role in (*used, *((e, UNSEEN) for e in others))
                ]
        own, other = extractor(real.loss.extractor), judge.extract
        trained = self._trained
        # The result is compared with the start in them too, to choose its share of the way.
        spaces = [Space(own, real.loss.heldout[real.final], TRAINED if trained else SELECTED)]
        # Of one kind of features for both the role is that of the loss.
        if real.independent and identity(own) != identity(other):
            spaces.append(Space(other, real.judge.heldout[real.final], SELECTED))
        if real.samples is not None:
            with torch.no_grad():
                spaces += [
                    Space(e, e(real.samples.to(self.source.device)).flatten(1).cpu())
                    for e in unseen_extractors(self.source.shape, [own, other], self.unseen)
                ]
        return spaces


def _digest_of(extract: Callable[[Tensor], Tensor]) -> str:
    """Returns the checksum of a feature extractor, or the digest of a callable without one."""
    return identity(extract) or callable_digest(extract)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

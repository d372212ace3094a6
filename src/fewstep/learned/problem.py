r"""A search that was checked, and how it is solved: pairs, search, scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.diffusion.grids import TimeGrid
from fewstep.learned.families import FAMILIES, family
from fewstep.learned.judges import Judge, final_scores, random_features
from fewstep.learned.learned_plan import Base, LearnedPlan
from fewstep.learned.objectives import MMD, Endpoint, Objective, Trajectory
from fewstep.learned.real_data import references
from fewstep.learned.search import Event, Searcher
from fewstep.learned.settings import Search
from fewstep.learned.stages import Stage, stages_of
from fewstep.learned.starts import start_of
from fewstep.learned.teachers import Pairs, Source, make_pairs, teacher_plan
from fewstep.learned.unrolled import Conditions
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.reference import Reference
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import GaussianMixture
from fewstep.models.wrappers import Guided
from fewstep.plans.plan import Plan
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.solvers import Solver

SMALL = 64
"""Samples of at most so many numbers are cheap."""
TRAIN, HELDOUT, TEST = 10_000_019, 20_000_003, 30_000_001
"""Added to the seed: the three sets of noise have no seed in common, nor with a user's small one."""


@dataclass(frozen=True)
class TunedSampler:
    """What :func:`tune` returns.

    Attributes:
        recipe: The sampler as a recipe: for :func:`fewstep.sample`, the command line, diffusers.
        plan: Its plan.
        history: The judgements of the search.
        scores: Scores ``"before"`` and ``"after"`` on seeds that the search never used.
        improved: Whether anything better than the start was found; if not, it is the start.
    """

    recipe: SamplerRecipe
    plan: Plan
    history: list[dict[str, Any]]
    scores: Mapping[str, Any]
    improved: bool

    def save(self, path: str | Path) -> Path:
        """Writes the recipe; returns the path."""
        return self.recipe.save(path)


@dataclass(frozen=True)
class Problem:
    """A search that was checked: everything that is known before the first network call."""

    model: Denoiser
    guided: Denoiser
    base: Base
    learned: LearnedPlan
    stages: tuple[Stage, ...]
    reference: Reference | None
    judged: Reference | None
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
        conditions = Conditions.of(denoiser, cond)
        guided = denoiser if guidance in (None, 1) else Guided(denoiser, guidance)  # type: ignore[arg-type]
        guided.prepare(2, conditions.at(range(2)))
        integer = getattr(denoiser, "integer_times", False)
        base = start_of(
            family_name,
            denoiser.schedule,
            nfe,
            solver=solver,
            grid=grid,
            head_start=head_start,
            integer_times=integer,
            options=options,
        )
        learned = family(family_name, base, **family_options)
        source = Source.of(guided, base.plan(), conditions)
        small = math.prod(source.shape) <= SMALL
        if data is None and isinstance(denoiser, GaussianMixture):
            data = denoiser.draw(20_000, seed=seed + TEST)
        if objective == "auto":
            objective = "endpoint" if data is None else "endpoint,mmd"
        stages = stages_of(
            objective,
            small=small,
            steps=search.steps,
            batch_size=search.batch_size,
            learning_rate=search.learning_rate,
        )
        named = {name for stage in stages for name, _ in stage.terms}
        if "mmd" in named and data is None:
            raise ValueError(
                "the objective mmd compares with real data; give data= (--data): an embedded name, "
                "a folder of images, an idx or npz file, or a tensor"
            )
        if "trajectory" in named and (learned.learns_times or base.plan().nfe != base.grid.steps):
            raise ValueError(
                "the objective trajectory needs states at common times: a family that does not move "
                "them (ggdm, ggdm+pred, vars, ddim-sigma; gs with times=False), one call a step"
            )
        if named == {"mmd"} and search.radius is not None:
            raise ValueError("radius moves the noises of pairs; mmd alone has none")
        reference, judged = references(data, features, source.shape)
        names = {
            "family": family_name,
            "family_options": dict(family_options),
            "objective": objective,
            "nfe": nfe,
            "conditions": {k: _describe(v) for k, v in conditions.values.items()},
            "dtype": str(source.dtype).removeprefix("torch."),
        }
        return cls(
            denoiser, guided, base, learned, stages, reference, judged, source, search, seed,
            guidance, names,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Returns what determines the search, as JSON values."""
        reference = self.reference
        return {
            **self.names,
            "base": {
                "solver": self.base.solver.name,
                "knots": self.base.grid.times.tolist(),
                "head": self.base.head,
            },
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
            "seed": self.seed,
            "search": self.settings.to_json(),
            "versions": {"fewstep": __version__, "torch": torch.__version__.split("+")[0]},
        }

    def _identity(self) -> list[Any]:
        """Returns what the teacher's samples depend on beside its plan and their numbers."""
        names = [self.names[key] for key in ("conditions", "dtype")]
        return [self.model.fingerprint(), self.guidance, *names]

    def solve(self, folder: Path | None, tell: Callable[[Event], None]) -> TunedSampler:
        """Makes the pairs, searches, and scores start and end."""
        settings, source = self.settings, self.source
        small = math.prod(source.shape) <= SMALL
        count, heldout_count, test_count = settings.sizes(small=small)
        train, heldout, test = self._pairs(folder, (count, heldout_count, test_count), tell)
        judge = self._judge(train)
        searcher = Searcher(
            self.learned,
            source,
            self.stages,
            self._objectives(),
            pairs=train if self._named & {"endpoint", "trajectory"} else None,
            heldout=heldout,
            heldout_seed=self.seed + HELDOUT,
            heldout_size=heldout_count,
            judge=judge,
            # In the features of the loss itself a judge has no say over the teacher.
            real=self.judged is not None and self.judged is not self.reference,
            settings=settings,
            seed=self.seed,
            folder=folder,
            tell=tell,
        )
        state = searcher.run()
        improved = bool(self.learned.vector().any())
        plan = self.learned.plan(f"{self.names['family']}-{self.base.plan().nfe}")
        if not improved:
            plan = replace(self.base.plan(), name=plan.name)
        scores = self._scores(plan, test, test_count, judge, tell, improved=improved)
        about = {
            **self.about(),
            "by": "fewstep tune",
            "learned": self.learned.count,
            "improved": improved,
            "skipped": state.skipped,
            "seeds": {"train": self.seed + TRAIN, "heldout": self.seed + HELDOUT, "test": self.seed + TEST},
            "scores": scores,
        }  # fmt: skip
        recipe = SamplerRecipe(
            kind="plan",
            name=plan.name,
            plan=plan,
            schedule=self.model.schedule.to_record(),
            guidance=self.guidance,
            model=self.model.fingerprint(),
            about=json.loads(json.dumps(about)),
        )
        return TunedSampler(recipe, plan, state.history, scores, improved)

    @property
    def _named(self) -> set[str]:
        return {name for stage in self.stages for name, _ in stage.terms}

    def _pairs(
        self, folder: Path | None, sizes: tuple[int, int, int], tell: Callable[[Event], None]
    ) -> tuple[Pairs | None, Pairs | None, Pairs | None]:
        """Returns the pairs to train on, to judge with and to score with, as far as needed."""
        through = "trajectory" in self._named
        paired = bool(self._named & {"endpoint", "trajectory"})
        if not paired and self.judged is not None:
            return None, None, None
        nfe = self.settings.teacher_nfe
        calls = self.learned.structure.nfe
        if nfe is None:
            nfe = max(100 if math.prod(self.source.shape) <= SMALL else 20, 3 * calls)
        plan = teacher_plan(self.base, nfe, through_knots=through)
        keep = self.base.grid.times.detach().tolist()[1:calls] if through else []
        train, heldout, test = sizes
        wanted = [("train", TRAIN, train)]
        if paired:
            wanted += [("heldout", HELDOUT, heldout), ("test", TEST, min(heldout, test))]
        progress = _Events("teacher", plan.nfe * sum(n for _, _, n in wanted), tell)

        found = list[Pairs | None]()
        for name, offset, n in wanted:
            key = _digest(*self._identity(), plan.to_json(), self.seed + offset, n, keep)
            found.append(
                make_pairs(
                    self.source,
                    plan,
                    self.seed + offset,
                    n,
                    batch_size=self.settings.sampling_batch,
                    keep=keep,
                    file=None if folder is None else folder / f"teacher-{name}.safetensors",
                    key=key,
                    progress=progress,
                )
            )
        train_pairs, heldout_pairs, test_pairs = (*found, None, None)[:3]
        return train_pairs, heldout_pairs, test_pairs

    def _judge(self, train: Pairs | None) -> Judge:
        """Returns the judge: against real data where there is any, and else the teacher."""
        if self.judged is not None:
            look = extractor(self.judged.extractor)
            return Judge.of(self.judged.heldout[:2000], look)
        assert train is not None
        look = random_features(self.source.shape)
        with torch.no_grad():
            return Judge.of(look(train.target).flatten(1), look)

    def _objectives(self) -> dict[str, Objective]:
        made: dict[str, Objective] = {}
        features = None if self.reference is None else self.reference.extractor
        for name in sorted(self._named):
            if name == "mmd":
                assert self.reference is not None
                made[name] = MMD(
                    self.reference.features.to(self.source.dtype),
                    extractor(features),
                    kernel=self.settings.kernel,
                    real_batch=self.settings.real_batch,
                    seed=self.seed,
                )
            else:
                kind = Trajectory if name == "trajectory" else Endpoint
                made[name] = kind(self.settings.distance, features=features)
        return made

    def _scores(
        self,
        plan: Plan,
        test: Pairs | None,
        n: int,
        judge: Judge,
        tell: Callable[[Event], None],
        *,
        improved: bool,
    ) -> dict[str, Any]:
        """Returns the scores before and after on the test noise."""
        plans = {"before": self.base.plan(), "after": plan}
        progress = _Events("scores", 2 * n * plan.nfe, tell)

        scores: dict[str, Any] = {}
        for when, one in plans.items():
            if when == "after" and not improved:
                scores[when] = scores["before"]
                continue
            x, _ = self.source.sampled(
                one,
                self.seed + TEST,
                n,
                batch_size=self.settings.sampling_batch,
                progress=progress,
            )
            scores[when] = final_scores(
                x,
                target=None if test is None else test.target,
                reference=self.reference,
                judge=judge,
            )
        return scores


class _Events:
    """Progress of one phase as events."""

    def __init__(self, phase: str, total: int, tell: Callable[[Event], None]) -> None:
        self.phase, self.total, self.done, self.tell = phase, total, 0, tell

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Does nothing: the phase is known."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Reports the units that are done."""
        self.done += amount
        self.tell(Event(self.phase, self.done, self.total))


def _describe(values: Any) -> Any:
    """Returns the values of a condition for a file: themselves if simple, and else a digest."""
    values = [v.tolist() if isinstance(v, Tensor) and v.numel() == 1 else v for v in values]
    if all(isinstance(v, (int, float, str)) for v in values) and len(values) <= 1000:
        return values
    digest = hashlib.sha256()
    for value in values:
        digest.update(
            value.detach().cpu().contiguous().numpy().tobytes()
            if isinstance(value, Tensor)
            else repr(value).encode()
        )
    return {"values": len(values), "sha256": digest.hexdigest()}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

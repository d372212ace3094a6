r"""``tune``: from a model and a budget to a sampler that was searched for it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.denoiser import Denoiser, Guided
from fewstep.exact import GaussianMixture
from fewstep.files import read_json, write_json
from fewstep.grids import TimeGrid, grid
from fewstep.learned.families import FAMILIES, STARTS, family
from fewstep.learned.judges import Judge, final_scores, random_features
from fewstep.learned.learned_plan import Base, LearnedPlan
from fewstep.learned.objectives import MMD, Endpoint, Objective, Stage, Trajectory, stages_of
from fewstep.learned.search import Event, Searcher
from fewstep.learned.settings import Search
from fewstep.learned.teachers import Pairs, Source, make_pairs, teacher_plan
from fewstep.learned.unrolled import Conditions, frozen
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.reference import EMBEDDED as EMBEDDED_DATA
from fewstep.metrics.reference import Reference
from fewstep.planning import choose
from fewstep.plans import Plan
from fewstep.recipe import SamplerRecipe
from fewstep.schedules import NoiseSchedule
from fewstep.solvers import Solver

logger = logging.getLogger("fewstep")

SETTINGS = "search.json"
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


def tune(
    denoiser: Denoiser,
    *,
    nfe: int,
    family: str = "gs",
    objective: str = "auto",
    data: str | Path | Tensor | Reference | None = None,
    features: FeatureMap = None,
    solver: str | Solver | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    options: Mapping[str, Any] | None = None,
    family_options: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    search: Search | Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
    **cond: Any,
) -> TunedSampler:
    r"""Searches a sampler of ``nfe`` network calls for this model; the model itself stays as it is.

    Arguments:
        denoiser: The model.
        nfe: The number of network calls of the sampler.
        family: Which numbers are learned, a name in :data:`fewstep.learned.FAMILIES`.
        objective: ``"endpoint"``, ``"trajectory"``, ``"mmd"``, weighted sums (``"mmd+0.1*endpoint"``)
            and stages (``"endpoint,mmd"``); ``"auto"`` is ``"endpoint,mmd"`` with data and
            ``"endpoint"`` without.
        data: Real data, needed by ``mmd``: an embedded name (``"fashion"``), a folder of images, an
            idx or npz file, a tensor of samples, or a :class:`~fewstep.metrics.Reference`. Exact
            mixtures bring their own.
        features: The features of ``mmd``; left out, those of the embedded classifier for images
            of its shape, a random network's for other images, and the samples themselves else.
        solver: The solver to start from; left out, the best training-free one for this kind of
            schedule (``ddim`` or ``ddpm`` for the families over GGDM).
        grid: The grid to start from, as of :func:`fewstep.plan`.
        head_start: The time of an analytic head start.
        options: Options of solver and grid.
        family_options: Options of the family, e.g. ``{"coordinate": "lambda"}``.
        guidance: The scale of classifier-free guidance; it becomes part of the recipe.
        search: Settings of the search, see :class:`~fewstep.learned.settings.Search`.
        seed: The seed of everything random.
        out: The file of the recipe. Beside it, in a folder, are the checkpoints: the same call
            goes on where an interrupted one stopped, with the same result.
        overwrite: Whether to start anew and replace what is there.
        on_event: Called with progress.
        cond: Conditions; of a list each sample takes one value. A model with classes that
            fewstep trained takes all its classes if none are given.

    Raises:
        ValueError, TypeError: Before the first network call, if anything does not fit.
    """
    problem = _Problem.of(
        denoiser,
        nfe=nfe,
        family_name=family,
        objective=objective,
        data=data,
        features=features,
        solver=solver,
        grid=grid,
        head_start=head_start,
        options=options or {},
        family_options=family_options or {},
        guidance=guidance,
        search=Search.of(search),
        seed=seed,
        cond=cond,
    )
    file = None if out is None else Path(out)
    folder = None if file is None else _folder(file, problem, overwrite=overwrite)
    with frozen(denoiser):
        made = problem.solve(folder, on_event or (lambda event: None))
    if file is not None:
        made.save(file)
    return made


def checkpoint_folder(file: Path) -> Path:
    """Returns the folder of the checkpoints of a recipe's file."""
    return file.with_suffix(".search")


def _folder(file: Path, problem: _Problem, *, overwrite: bool) -> Path:
    folder = checkpoint_folder(file)
    if overwrite:
        file.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    if file.exists():
        raise ValueError(f"{str(file)!r} exists; give overwrite (--overwrite) or another file")
    # Through JSON, as it will come back.
    about = json.loads(json.dumps(problem.about()))
    if (folder / SETTINGS).exists():
        if read_json(folder / SETTINGS, what="the settings of a search") != about:
            raise ValueError(
                f"{str(folder)!r} has the checkpoints of another search; give the same call to go "
                "on, overwrite (--overwrite), or another file"
            )
    else:
        write_json(folder / SETTINGS, about)
    return folder


@dataclass(frozen=True)
class _Problem:
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
    ) -> _Problem:
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
        if "trajectory" in named and (learned.moves_times or base.plan().nfe != base.grid.steps):
            raise ValueError(
                "the objective trajectory needs states at common times: a family that does not move "
                "them (ggdm, ggdm+pred, vars, ddim-sigma; gs with times=False), one call a step"
            )
        if named == {"mmd"} and search.radius is not None:
            raise ValueError("radius moves the noises of pairs; mmd alone has none")
        reference, judged = _references(data, features, source.shape)
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
            schedule=self.model.schedule.to_config(),
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
        total, done = plan.nfe * sum(n for _, _, n in wanted), 0

        def tick(calls: int) -> None:
            nonlocal done
            done += calls
            tell(Event("teacher", done, total))

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
                    tick=tick,
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
                    self.reference.features.to(self.source.device, self.source.dtype),
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
        total, done = 2 * n * plan.nfe, 0

        def tick(calls: int) -> None:
            nonlocal done
            done += calls
            tell(Event("scores", done, total))

        scores: dict[str, Any] = {}
        for when, one in plans.items():
            if when == "after" and not improved:
                scores[when] = scores["before"]
                continue
            x, _ = self.source.sampled(
                one, self.seed + TEST, n, batch_size=self.settings.sampling_batch, tick=tick
            )
            scores[when] = final_scores(
                x,
                target=None if test is None else test.target,
                reference=self.reference,
                judge=judge,
            )
        return scores


def start_of(
    name: str,
    schedule: NoiseSchedule,
    nfe: int,
    *,
    solver: str | Solver | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    integer_times: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Base:
    r"""Returns the sampler from which a family starts: what is given, and else what suits it.

    The families over a solver start from what ``auto`` chooses; those over GGDM from ``ddim`` or
    ``ddpm`` on the same kind of grid, with a last step onto :math:`\sigma = 0`, as the paper has it.
    """
    options = dict(options or {})
    own = next((s for prefix, s in STARTS.items() if name.startswith(prefix)), None)
    common: dict[str, Any] = {"nfe": nfe, "integer_times": integer_times}
    if own is None and solver is None and grid is None:
        choice = choose(schedule, nfe)
        options = {**choice.options, **options}
        start = choice.head_start if head_start is None else head_start
        return Base.of(
            choice.solver, schedule, grid=choice.grid, head_start=start, **common, **options
        )
    if own is not None and grid is None and not options and head_start is None:
        options = {"times": _onto_zero(schedule, nfe, rounded=integer_times)}
        grid = "explicit"
    return Base.of(
        solver or own or choose(schedule, nfe).solver,
        schedule,
        grid=grid,
        head_start=head_start,
        **common,
        **options,
    )


def _onto_zero(schedule: NoiseSchedule, nfe: int, *, rounded: bool) -> list[float]:
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    made = grid("power", schedule, nfe, power=1.5 if schedule.discrete else 2.0)
    times = (made.rounded() if rounded else made).times.tolist()
    return [*times[:-1], schedule.t_zero]


def _references(
    data: Any, features: FeatureMap, shape: tuple[int, ...]
) -> tuple[Reference | None, Reference | None]:
    """Returns the reference of the loss, and one for the judge if the samples themselves are known."""
    if data is None:
        return None, None
    look = random_features(shape)
    if isinstance(data, Reference):
        return data, None
    if isinstance(data, Tensor):
        if tuple(data.shape[1:]) != shape or len(data) < 40:
            raise ValueError(
                f"data must have shape (n, {', '.join(map(str, shape))}) with n of at least 40, got "
                f"{tuple(data.shape)}"
            )
        half = len(data) // 2
        parts = (data[:half], data[half:])
        own = _features(features, shape)
        return Reference.of(*parts, features=own), Reference.of(*parts, features=look)
    if not isinstance(data, (str, Path)):
        raise TypeError(f"data is a name, a path, a tensor or a Reference, got {data!r:.60}")
    if len(shape) != 3:
        raise ValueError(f"{str(data)!r} holds images, the model's samples have shape {shape}")
    size = shape[1] if shape[1] == shape[2] else None
    embedded = str(data) in EMBEDDED_DATA
    reference = Reference.load(data, _features(features, shape), size=None if embedded else size)
    if reference.event_shape is not None and tuple(reference.event_shape) != shape:
        raise ValueError(
            f"the images of {str(data)!r} have shape {tuple(reference.event_shape)}, the model's "
            f"samples {shape}"
        )
    return reference, None if embedded else Reference.load(data, look, size=size)


def _features(features: FeatureMap, shape: tuple[int, ...]) -> FeatureMap:
    if features is not None or len(shape) != 3:
        return features
    if shape == (1, 28, 28):
        return "fashion"
    logger.info("no features were given: those of a random network are compared")
    return random_features(shape, seed=1)


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

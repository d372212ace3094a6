"""The engine of the studio, without a page: a request in, events out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.base.options import budgets_of, parse_labels
from fewstep.comparison.entries import read_entry
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction, convert
from fewstep.models.conditions import Conditions, classes_in_turn
from fewstep.models.wrappers import Guided
from fewstep.reporting.figures import Series
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.batches import run_batch
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.profile import Profile
from fewstep.sampling.protocol import Sampler, Trajectory
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import Resolved, resolve
from fewstep.sampling.resolve import plan as make_plan
from fewstep.studies.fit import fit
from fewstep.studies.reference import NODES, SUBSTEPS, draw_noise, follow, mean_squares
from fewstep.studio.drawing import errors_svg, plans_svg, tiles
from fewstep.studio.events import (
    Event,
    Failed,
    Frame,
    Measured,
    ModelLoaded,
    Planned,
    PlansDrawn,
    Progressed,
    Referenced,
    Sampled,
    Stage,
)
from fewstep.studio.models import Cancelled, LoadedModel, Models, Observed
from fewstep.studio.reproducing import fit_reproduction, sample_reproduction
from fewstep.studio.settings import FitRequest, Reproduction, SampleRequest, SamplerSettings

MOST_FRAMES = 200
"""The most evaluations of a sampler that are shown, besides its sample."""

CHECKED = 8
"""The noises, unseen by the measurement, on which it is compared with its peers."""

PEERS: Mapping[str, tuple[str, str]] = {
    "DDIM": ("diffusers:DDIM", "ddim"),
    "DPM-Solver++ 2M": ("diffusers:DPMSolverMultistep", "dpmpp-2m"),
    "UniPC": ("diffusers:UniPCMultistep", "unipc2"),
}
"""The peers of a measured sampler: the scheduler of diffusers at its defaults, and the solver here that stands for it if
diffusers is not installed."""

LETTERS = "ABCD"
"""The names of the samplers, by their numbers."""

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Context:
    """What a run needs besides its request.

    Attributes:
        models: The models in memory.
        emit: Takes the events.
        cancelled: Whether the user has cancelled the run.
        profile: The profile measured in this session, with how it was measured; or ``None``.
        references: References of earlier runs of this session, by what determines them.
        draws_plans: Whether the plans are drawn at the end of a run.
    """

    models: Models
    emit: Emit
    cancelled: Callable[[], bool] = lambda: False
    profile: tuple[Profile, Reproduction] | None = None
    references: dict[tuple[Any, ...], tuple[Tensor, int]] | None = None
    draws_plans: bool = True


class Ticks:
    """A :class:`fewstep.base.progress.Progress` that emits events, and raises when the run was cancelled."""

    def __init__(self, context: Context) -> None:
        self._context, self._done, self._shown, self._total = context, 0, 0, 0

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Begins a stage."""
        self._done, self._shown, self._total = done, done, total or 0
        self._context.emit(Stage(name, total))

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Counts units; at most 200 events a stage are emitted.

        Raises:
            Cancelled: If the run was cancelled.
        """
        if self._context.cancelled():
            raise Cancelled
        self._done += amount
        if self._done - self._shown >= self._total // 200 or self._done >= self._total:
            self._shown = self._done
            self._context.emit(Progressed(self._done))


def load_model(source: str, device: str, context: Context) -> None:
    """Loads a model: emits :class:`ModelLoaded`.

    Raises:
        ValueError: If there is no such model.
    """
    context.emit(ModelLoaded(context.models.get(source, device).info))


@dataclass(frozen=True)
class _Prepared:
    """A sampler that is ready to run."""

    index: int
    n: int
    settings: SamplerSettings
    model: LoadedModel
    resolved: Resolved
    conditions: Mapping[str, Any]
    labels: tuple[int, ...] | None
    guidance: float | None


class InvalidSampler(ValueError):
    """The settings of one sampler do not fit.

    Attributes:
        index: Its number.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def run_samples(request: SampleRequest, context: Context) -> None:
    """Runs the samplers of a request one after another from the same noise.

    Everything is checked before the first network evaluation. Emits for each sampler :class:`Planned`, then, if asked for,
    :class:`Referenced` for each kind of conditions, then :class:`Frame` for each evaluation and :class:`Sampled`.

    Cost: the evaluations of the samplers for n samples, and 97 for each reference that is not cached.

    Raises:
        InvalidSampler: If the settings of one sampler do not fit, with the library's message.
        ValueError: If the model cannot be loaded.
        Cancelled: If the run was cancelled.
    """
    model = context.models.get(request.model, request.device)
    context.emit(ModelLoaded(model.info))
    prepared = []
    for index, settings in enumerate(request.samplers):
        try:
            prepared.append(_prepare(request, index, settings, model, context))
        except (ValueError, TypeError, OSError) as error:
            raise InvalidSampler(index, str(error)) from error
    for one in prepared:
        context.emit(_planned(request, one, context))
    ticks = Ticks(context)
    references: dict[int, Tensor] = {}
    if request.reference and model.denoiser.built_in_sampler() is None:
        references = _references(request, prepared, model, context, ticks)
    for one in prepared:
        try:
            _run(request, one, references.get(one.index), context, ticks)
        except ValueError as error:  # NaN, or an adaptive solver without an end: the others go on
            context.emit(Failed(str(error), one.index))
    samplers = {f"{LETTERS[one.index]} {_name(one)}": one.resolved.sampler for one in prepared}
    plans = {name: s.plan for name, s in samplers.items() if isinstance(s, PlanSampler)}
    if context.draws_plans and plans:
        context.emit(PlansDrawn(plans_svg(plans, prefix="plans")))


def _prepare(
    request: SampleRequest,
    index: int,
    settings: SamplerSettings,
    model: LoadedModel,
    context: Context,
) -> _Prepared:
    base = model
    if settings.kind == "student":
        model = context.models.get(settings.source, request.device)
        if model.denoiser.built_in_sampler() is None:
            raise ValueError(
                f"{settings.source!r} is not a student: it has no built-in sampler; choose it as the model"
            )
        if model.denoiser.event_shape != base.denoiser.event_shape:
            raise ValueError(
                f"the samples of the student {settings.source!r} have shape {model.denoiser.event_shape}, those of "
                f"the model {base.denoiser.event_shape}"
            )
    denoiser = model.denoiser
    if denoiser.event_shape is None:
        raise ValueError("this model has no event_shape; sample it from Python, with noise=")
    measured = None if context.profile is None else context.profile[0]
    resolved = resolve(denoiser, settings.request(measured), guidance=settings.guidance)
    labels = parse_labels(settings.class_labels or None, denoiser, request.n)
    given: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    if settings.prompt:
        given["prompt"] = [settings.prompt] * request.n
    guidance = settings.guidance
    if isinstance(resolved.sampler.denoiser, Guided):
        guidance = resolved.sampler.denoiser.scale
    if settings.kind == "student":
        # What its teacher did, with the guidance that its trajectories were recorded with.
        training = getattr(denoiser, "about", {}).get("training", {})
        guidance = training.get("guidance") if given else None
    conditions = resolved.sampler.denoiser.prepare(request.n, given)
    place = None if labels is None else tuple(labels)
    return _Prepared(index, request.n, settings, model, resolved, conditions, place, guidance)


def _planned(request: SampleRequest, one: _Prepared, context: Context) -> Planned:
    sampler, recipe = one.resolved.sampler, one.resolved.recipe
    measured = None if context.profile is None else context.profile[1]
    labels = None if one.labels is None else list(one.labels)
    plan = sampler.plan if isinstance(sampler, PlanSampler) else None
    about = {
        **recipe.about,
        "model": one.model.source,
        "n": request.n,
        "seed": request.seed,
        "class_labels": one.settings.class_labels or None,
        "prompt": one.settings.prompt or None,
        "fewstep": __version__,
    }
    about = {key: value for key, value in about.items() if value is not None}
    return Planned(
        one.index,
        _title(one),
        sampler.nfe,
        one.resolved.chosen,
        plan,
        json.dumps(replace(recipe, about=about).to_record(), indent=1, allow_nan=False),
        sample_reproduction(request, one.settings, labels, measured),
        plan is not None and plan.stochastic,
    )


def _title(one: _Prepared) -> str:
    sampler = one.resolved.sampler
    guided = f" · guidance {one.settings.guidance:g}" if one.settings.guidance is not None else ""
    count = "" if sampler.nfe is None else f" · NFE {sampler.nfe}"
    return f"{_name(one)}{count}{guided}"


def _name(one: _Prepared) -> str:
    """Returns the name of a sampler, with its grid if that was chosen."""
    settings, recipe = one.settings, one.resolved.recipe
    if settings.kind == "student":
        return Path(settings.source).name
    if settings.kind == "recipe":
        return Path(settings.source).stem
    name = recipe.name or "plan"
    if settings.kind == "profile":
        return f"profile: {name}"
    if settings.solver in ("", "auto") and recipe.kind != "operator":
        name = f"auto: {name}"
    return f"{name} @ {settings.grid}" if settings.grid else name


def _references(
    request: SampleRequest,
    prepared: Sequence[_Prepared],
    model: LoadedModel,
    context: Context,
    ticks: Ticks,
) -> dict[int, Tensor]:
    """Returns for each sampler the samples of the model's many-step solution under its conditions."""
    cache = {} if context.references is None else context.references
    groups: dict[tuple[Any, ...], list[_Prepared]] = {}
    for one in prepared:
        scale = None if one.guidance in (None, 1) else one.guidance
        key = (id(model.denoiser), request.n, request.seed, scale, one.labels, one.settings.prompt)
        groups.setdefault(key, []).append(one)
    result: dict[int, Tensor] = {}
    for key, group in groups.items():
        if key not in cache:
            denoiser = model.denoiser
            if key[3] is not None:
                denoiser = Guided(denoiser, key[3])
            observed = Observed(denoiser, model.turns, context.cancelled)
            ticks.stage("the reference: the model's own solution", NODES * SUBSTEPS)
            noise = draw_noise(denoiser, request.n, request.seed)
            # A student has prepared its conditions for itself; these are the same.
            path = follow(observed, noise, group[0].conditions, progress=ticks)
            while len(cache) >= 8:
                cache.pop(next(iter(cache)))
            cache[key] = path.end.float().cpu(), path.nfe
        samples, nfe = cache[key]
        indices = tuple(one.index for one in group)
        context.emit(Referenced(indices, samples, tiles(samples, model.denoiser), nfe))
        result |= dict.fromkeys(indices, samples)
    return result


def _run(
    request: SampleRequest,
    one: _Prepared,
    reference: Tensor | None,
    context: Context,
    ticks: Ticks,
) -> None:
    """Runs one sampler: emits its frames and samples."""
    sampler = one.resolved.sampler
    ticks.stage(_title(one), sampler.nfe)
    source = NoiseSource(request.seed, range(request.n))
    view = _Frames(one, reference, context)
    if isinstance(sampler, (PlanSampler, AdaptiveSampler)):
        observed = Observed(sampler.denoiser, one.model.turns, context.cancelled, view.evaluated)
        sampler = replace(sampler, denoiser=observed)
        view.observed = observed
        path = run_batch(sampler, source, one.conditions, on_evaluation=ticks.tick)
    else:  # its evaluations are inside, and it may keep state in its modules
        with one.model.turns.turn():
            began = time.perf_counter()
            path = run_batch(sampler, source, one.conditions, save=True, on_evaluation=ticks.tick)
            view.seconds = time.perf_counter() - began
        view.path(path)
    samples = path.x.float().cpu()
    view.sample(samples, float(path.times[-1]), path.nfe)
    context.emit(Sampled(one.index, samples, path.nfe))


class _Frames:
    """The frames of one sampler."""

    def __init__(self, one: _Prepared, reference: Tensor | None, context: Context) -> None:
        self.observed: Observed | None = None
        self.seconds = 0.0
        self._one, self._reference, self._emit = one, reference, context.emit
        self._model = one.model.denoiser
        self._number = 0

    def evaluated(self, x: Tensor, t: Tensor, output: Tensor) -> None:
        """Shows an evaluation: the state, and the data that the network predicts there."""
        self._number += 1
        if self._number > MOST_FRAMES or len(x) != self._one.n:
            return  # the others of an adaptive solver are at the end already
        schedule, times = self._model.schedule, t.detach().double().cpu()
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        assert self.observed is not None
        predicted = convert(
            output, x, alpha=alpha, sigma=sigma, source=self.observed.native, target=Prediction.X0
        )
        data = predicted.float().cpu()
        self._emit(
            Frame(
                self._one.index,
                self._number,
                float(times.max()),
                self.observed.seconds,
                self._distance(data),
                self._picture(x, times, decode=False),
                tiles(data, self._model, beside=self._reference),
            )
        )

    def path(self, path: Trajectory) -> None:
        """Shows the states of a built-in sampler, without the last."""
        assert path.states is not None
        times = path.times.tolist()
        self._number = max(1, round(path.nfe))
        for t, state in zip(times[:-1], path.states, strict=False):
            at = torch.full((len(state),), t, dtype=torch.float64)
            shown = self._picture(state, at, decode=False)
            self._emit(Frame(self._one.index, self._number, t, self.seconds, None, shown, None))

    def sample(self, samples: Tensor, t: float, nfe: float) -> None:
        """Shows the sample."""
        seconds = self.seconds if self.observed is None else self.observed.seconds
        shown = tiles(samples, self._model, beside=self._reference)
        distance = self._distance(samples)
        number = max(self._number, math.ceil(nfe))
        self._emit(Frame(self._one.index, number, t, seconds, distance, shown, shown, last=True))

    def _distance(self, samples: Tensor) -> float | None:
        if self._reference is None:
            return None
        return float(mean_squares(samples - self._reference).mean().sqrt())

    def _picture(self, x: Tensor, times: Tensor, *, decode: bool) -> bytes:
        schedule = self._model.schedule
        size = torch.hypot(schedule.alpha(times), schedule.sigma(times)).float()
        scaled = x.float().cpu() / size.reshape(-1, *[1] * (x.ndim - 1))
        return tiles(scaled, self._model, decode=decode, beside=self._reference)


def run_fit(request: FitRequest, context: Context) -> None:
    """Measures a model, and compares it with its peers on noise that the measurement has not seen.

    Emits the progress of :func:`fewstep.fit` and :class:`Measured`.

    Cost: that of :func:`fewstep.fit`, and for 8 samples a reference (97 evaluations), the measured sampler, the static
    default and three peers at each budget.

    Raises:
        ValueError: Before the first evaluation, if anything does not fit.
        Cancelled: If the run was cancelled.
    """
    model = context.models.get(request.model, request.device)
    context.emit(ModelLoaded(model.info))
    denoiser = model.denoiser
    budgets = budgets_of(request.nfe)
    total = request.n + CHECKED
    labels = parse_labels(request.class_labels or None, denoiser, total)
    if denoiser.built_in_sampler() is not None:
        fit(denoiser, budgets, n=request.n)  # raises: there is nothing to measure
    given: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    if request.prompt:
        given["prompt"] = [request.prompt] * total
    given = classes_in_turn(denoiser, total, given)
    ticks = Ticks(context)
    profile = fit(
        Observed(denoiser, model.turns, context.cancelled),
        budgets,
        n=request.n,
        seed=request.seed,
        guidance=request.guidance,
        progress=ticks,
        **{name: values[: request.n] for name, values in given.items()},
    )
    guided = denoiser
    if request.guidance not in (None, 1):
        guided = Guided(denoiser, request.guidance)  # type: ignore[arg-type]
    observed = Observed(guided, model.turns, context.cancelled)
    conditions = Conditions.of(guided, total, given).at(range(request.n, total))
    rows, skipped = _errors(profile, observed, budgets, conditions, request, ticks)
    figure = errors_svg(_series(rows), prefix="errors")
    stored = None if labels is None else labels[: request.n]
    made = fit_reproduction(request, budgets, stored)
    context.emit(Measured(profile, tuple(rows), figure, tuple(skipped), made))


def _errors(
    profile: Profile,
    model: Observed,
    budgets: Sequence[int],
    conditions: Mapping[str, Any],
    request: FitRequest,
    ticks: Ticks,
) -> tuple[list[tuple[str, int, float]], list[str]]:
    """Returns the RMS distances of the measured sampler, the static default and the peers, and who was skipped."""
    installed = find_spec("diffusers") is not None
    peers = {name: theirs if installed else ours for name, (theirs, ours) in PEERS.items()}
    rows, skipped = list[tuple[str, int, float]](), list[str]()
    noise = draw_noise(model, CHECKED, request.seed, first=request.n)
    count = NODES * SUBSTEPS + sum(budgets) * (2 + len(peers))
    ticks.stage("comparing with peers: evaluations", count)
    target = follow(model, noise, conditions, progress=ticks).end
    source = NoiseSource(request.seed, range(request.n, request.n + CHECKED))

    def measured(nfe: int) -> Sampler:
        return resolve(model, SamplerRequest(profile=profile, nfe=nfe), force=True).sampler

    def static(nfe: int) -> Sampler:
        integer = model.integer_times
        return PlanSampler(
            make_plan("auto", model.schedule, nfe=nfe, integer_times=integer), model
        )

    builds: dict[str, Callable[[int], Sampler]] = {"measured": measured, "static default": static}
    for name, text in peers.items():
        entry = read_entry(text)
        shown = f"{name} (diffusers)" if text.startswith("diffusers:") else name
        builds[shown] = lambda nfe, entry=entry: entry.build(model, nfe)
    for name, build in builds.items():
        for nfe in budgets:
            try:
                sampler = build(nfe)
                x = run_batch(sampler, source, conditions, on_evaluation=ticks.tick).x
            except ValueError as error:
                skipped.append(f"{name} at NFE {nfe}: {error}")
                continue
            rows.append((name, nfe, float(mean_squares(x - target).mean().sqrt())))
    return rows, skipped


def _series(rows: Sequence[tuple[str, int, float]]) -> list[Series]:
    names = list(dict.fromkeys(name for name, _, _ in rows))
    lines = {name: [(nfe, error) for other, nfe, error in rows if other == name] for name in names}
    return [
        Series(name, [nfe for nfe, _ in line], [error for _, error in line])
        for name, line in lines.items()
    ]

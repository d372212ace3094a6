r"""``fewstep.fit``: the best sampler for a model, measured on the model at the cost of a few images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import check_writable
from fewstep.base.options import MOST_MEASURED
from fewstep.base.paths import check_path
from fewstep.base.processes import Processes, processes
from fewstep.base.progress import SILENT, Progress, progress_of
from fewstep.base.runs import RunFolder
from fewstep.base.sharing import Sharing
from fewstep.models.conditions import Conditions, classes_in_turn, select
from fewstep.models.denoiser import Denoiser
from fewstep.models.kept import KeptEvaluations
from fewstep.models.splitting import split_evaluations
from fewstep.models.wrappers import Guided
from fewstep.plans.plan import Plan
from fewstep.sampling.batches import batches_of
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.sampling.resolve import plan as make_plan
from fewstep.solvers import Solver
from fewstep.solvers import solver as make_solver
from fewstep.solvers.multistep import Multistep
from fewstep.studies.dynamic import BestGrid
from fewstep.studies.local_errors import (
    Path,
    evaluations_from,
    gain_evaluations,
    gain_places,
    interpolate_gain,
    log_gain_at,
    path_of,
    step_errors,
)
from fewstep.studies.multistep import fit_on, fitting_grids
from fewstep.studies.polishing import robust_mean
from fewstep.studies.reference import (
    BLOCK,
    Reference,
    digest_input,
    draw_noise,
    follow,
    grid_of,
    mean_squares,
    run_plan,
)
from fewstep.studies.statistics import measure_statistics

logger = logging.getLogger("fewstep")

BUDGETS = (4, 5, 6, 8, 10, 15, 20)
"""The default numbers of evaluations."""

INTERVALS = 40
"""The least number of intervals between the nodes of the reference."""

SUBSTEPS = 3
"""The steps of the reference in each interval."""

PLACES, GAIN_SAMPLES = 4, 8
"""The number of places, and of samples, at which the gain of errors is measured."""

FITTED_SHARE = 5 / 8
"""The share of the trajectories to fit to; the others are held out for the selection."""

STATISTICS = "statistics"
"""The name of the part with the statistics of DPM-Solver-v3."""

SOLVERS = ("tab2", "tab3", "unipc2", "unipc3", "ipndm", "dpmpp-2m", "ddim")
"""The named solvers of which the best is stored too: for starts in mid-schedule, and other budgets."""


@dataclass(frozen=True)
class Candidate:
    r"""A solver on explicit times, and how far it is from the reference.

    Attributes:
        solver: The solver.
        times: The times, float64, shape (K + 1).
        head: Whether it begins with an analytic head start.
        fitted: The mean square distance of each fitted sample, shape (B), or ``None``.
        held_out: That of each held-out sample, shape (C).
    """

    solver: Solver
    times: Tensor
    head: bool
    fitted: Tensor | None
    held_out: Tensor

    @property
    def all(self) -> Tensor:
        """The mean square distances of all samples that were run."""
        return self.held_out if self.fitted is None else torch.cat([self.fitted, self.held_out])

    @property
    def error(self) -> float:
        """The root mean square distance on the held-out samples."""
        return float(self.held_out.mean().sqrt())


def evaluations(nfe: Sequence[int] = BUDGETS, n: int = 16) -> int:
    """Returns how many evaluations of one image :func:`fit` makes at most."""
    fitted, intervals = _split(n), _intervals(nfe)
    reference = n * (SUBSTEPS * intervals + 1)
    statistics = fitted * (intervals + 1)
    gain = 2 * min(GAIN_SAMPLES, fitted) * gain_evaluations(intervals + 1, PLACES)
    grids = 2
    return reference + statistics + gain + sum(nfe) * (grids * n + 2 * (n - fitted))


def fit(
    denoiser: Denoiser,
    nfe: Sequence[int] = BUDGETS,
    *,
    n: int = 16,
    seed: int = 0,
    guidance: float | None = None,
    folder: str | FilePath | None = None,
    out: str | FilePath | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = False,
    **cond: Any,
) -> Profile:
    r"""Measures which sampler suits a model, without training and without data.

    From n noises the probability-flow ODE is solved with many steps. Along these trajectories

    1. local errors of all steps between all pairs of times, weighted by how much of an error remains at
       the end, give the best times for each budget by dynamic programming;
    2. on these times the weights of a linear multistep method are fitted by least squares
       (:func:`fewstep.studies.multistep.fit_multistep`), step after step;
    3. that method, the best of the named solvers on these times and the static default are run on
       held-out noises, and the nearest is recommended.

    The statistics of DPM-Solver-v3 are measured too (:func:`fewstep.studies.statistics.measure_statistics`): the solver
    ``dpm-solver-v3`` takes them from the model's profile at any number of steps.

    The distance is the root mean square difference to the model's own many-step solution from the
    same noise. Only a few numbers per step are fitted, so n = 16 is enough for any model.

    Cost: at most 6,138 evaluations of one image for the seven budgets and n = 16
    (:func:`evaluations`); the log shows it beforehand, in evaluations and seconds.

    Arguments:
        denoiser: The model; under guidance either a :class:`fewstep.Guided` or with ``guidance``.
        nfe: The numbers of evaluations to measure for.
        n: The number of trajectories; five of eight are fitted to, the others are held out.
        seed: The seed of their noise.
        guidance: The scale of classifier-free guidance; 1 is none.
        folder: Where finished parts are kept, so that an interrupted measurement is resumed by the
            same call; it is empty again when the measurement is done. With it and ``out`` the processes
            of one launch (``torchrun``, ``srun``) share the parts, and each returns the same profile.
        out: The file of the profile; left out, it is only returned.
        overwrite: Whether an existing file is replaced, and parts of another measurement in the folder are
            thrown away.
        progress: ``True`` for a bar, or a :class:`fewstep.base.progress.Progress`.
        cond: The conditions, e.g. ``class_labels``, one for all or n. A class-conditional model
            without given classes gets its classes in turn.

    Returns:
        The profile: ``sample(denoiser, profile=PROFILE)`` uses it.

    Raises:
        ValueError: Before the first evaluation, if anything does not fit.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> profile = fewstep.fit(denoiser, nfe=(4,), n=4)
        >>> fewstep.sample(denoiser, 8, nfe=4, profile=profile).shape
        torch.Size([8, 2])
    """
    check_path(folder, "folder")
    check_path(out, "out")
    budgets = _checked(denoiser, nfe, n)
    if out is not None:
        check_writable(out)
        if FilePath(out).exists() and not overwrite and not processes().several:
            raise ValueError(f"{str(out)!r} exists; give overwrite (--overwrite) or another file")
    cond = classes_in_turn(denoiser, n, cond)
    if guidance is not None and guidance != 1:
        denoiser = Guided(denoiser, guidance)
    conditions = Conditions.of(denoiser, n, cond)
    noise = draw_noise(denoiser, n, seed)
    began, total = time.monotonic(), evaluations(budgets, n)
    base = denoiser.inner if isinstance(denoiser, Guided) else denoiser
    scale = denoiser.scale if isinstance(denoiser, Guided) else 1.0

    def profile(run: RunFolder | None, shown: Progress) -> Profile:
        meter = _Meter(shown, total)
        work = _Work(denoiser, noise, conditions, budgets, meter, run, seed)
        with work.kept.of(denoiser):
            entries, recommended = work.entries()
            statistics = work.statistics()
        measured = Profile(
            denoiser.schedule,
            base.fingerprint(),
            tuple(entries),
            recommended,
            scale,
            statistics=statistics,
            about={
                "evaluations": meter.count,
                "seconds": round(time.monotonic() - began, 1),
                "n": n,
                "seed": seed,
                "conditions": {name: _described(value) for name, value in cond.items()},
            },
        )
        if out is not None:
            measured.save(out)
        return measured

    with progress_of(progress) as shown, split_evaluations(denoiser):
        if folder is None:
            return profile(None, shown)
        run, team = RunFolder(folder, "measurement of a model", outputs=()), processes()
        inputs = {
            "model": base.fingerprint(),
            "schedule": denoiser.schedule.to_record(),
            "guidance": scale,
            "conditions": {k: digest_input(v) for k, v in sorted(conditions.values.items())},
            "trajectories": n,
            "seed": seed,
            "intervals": _intervals(budgets),
            "block": BLOCK,
        }
        if out is None or not team.several:
            with run.running(inputs, overwrite=overwrite, progress=shown):
                measured = profile(run, shown)
                run.finish()
            return measured
        run.join(inputs, finished=lambda _: False, progress=shown)
        meter = _Meter(shown, total, resumes=False)
        work = _Work(denoiser, noise, conditions, budgets, meter, run, seed)
        with work.kept.of(denoiser):
            work.share(team)
        with run.finishing(progress=shown) as left:
            measured = profile(run, SILENT) if left else Profile.load(out)
            if left:
                run.finish()
        return measured


class _Meter:
    """Counts evaluations of one image, and logs after the first how long all will take."""

    def __init__(self, shown: Progress, total: int, *, resumes: bool = True) -> None:
        self.shown, self.total, self.count = shown, total, 0
        self._resumes = resumes
        self._began = time.monotonic()
        shown.stage("measuring: evaluations of one image", total)

    def add(self, evaluations: int, images: int) -> None:
        """Counts evaluations of a batch of this many images."""
        first = not self.count
        self.count += evaluations * images
        if first:
            seconds = (time.monotonic() - self._began) * self.total / self.count
            logger.info(
                "measuring takes up to %d evaluations of one image, about %.0f s",
                self.total,
                seconds,
            )
        self.shown.tick(evaluations * images)

    def resume(self, count: int) -> None:
        """Counts evaluations that an interrupted run has made, unless they are those of other processes."""
        if not self._resumes:
            return
        self.count += count
        self.shown.tick(count)

    def of(self, images: int) -> Progress:
        """Returns a progress that counts the evaluations of a batch of this many images."""
        return _Batches(self, images)


@dataclass(frozen=True)
class _Batches:
    """Each tick is an evaluation of a batch."""

    meter: _Meter
    images: int

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Does nothing: the measurement is one stage."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        self.meter.add(amount, self.images)


class _Work:
    """The measurement of one model."""

    def __init__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        conditions: Conditions,
        budgets: Sequence[int],
        meter: _Meter,
        run: RunFolder | None,
        seed: int,
    ) -> None:
        self.seed = seed
        self.denoiser, self.noise, self.meter, self.run = denoiser, noise, meter, run
        self.kept = KeptEvaluations(run)
        self.budgets, self.intervals = budgets, _intervals(budgets)
        fitted = _split(len(noise))
        self.fitted, self.held_out = range(fitted), range(fitted, len(noise))
        self.cond = conditions.at(range(len(noise)))
        self.blocks = batches_of(range(len(noise)), BLOCK)
        self._whole: Reference | None = None
        self._path: Path | None = None
        self._grids: list[dict[int, BestGrid]] = []

    def share(self, team: Processes) -> None:
        """Computes parts together with the other processes of a launch, until all are in the folder."""
        run = self.run
        assert run is not None
        blocks = {f"reference-{rows.start}": partial(self._block, rows) for rows in self.blocks}
        gains: dict[str, Callable[[], object]]
        gains = {f"gain-{k}": partial(self._gain_at, k) for k in range(PLACES)}
        gains[STATISTICS] = self.statistics
        budgets = {f"budget-{nfe}": partial(self._records, nfe) for nfe in self.budgets}
        stages = [blocks, gains, budgets]
        tasks: dict[str, Callable[[], object]] = {**blocks, **gains, **budgets}

        def file(name: str) -> FilePath:
            return run.tensors_file(name) if name in blocks else run.record_file(name)

        def ready(name: str) -> bool:
            before = stages[: next(i for i, stage in enumerate(stages) if name in stage)]
            return all(file(one).exists() for stage in before for one in stage)

        order = [name for stage in stages for name in team.own_first(list(stage))]
        shown = self.meter.shown
        with Sharing(order, file, ready=ready, over=run.is_over, progress=shown) as work:
            while work.unfinished():
                for name in work.claimed():
                    tasks[name]()

    def entries(self) -> tuple[list[ProfileEntry], dict[int, str]]:
        """Returns the entries of all budgets, and the solver that is recommended for each."""
        entries, recommended = list[ProfileEntry](), dict[int, str]()
        for nfe in self.budgets:
            stored = [ProfileEntry.from_record(record) for record in self._records(nfe)]
            recommended[nfe] = stored[0].solver
            entries += stored
        return entries, recommended

    def statistics(self) -> Sequence[Sequence[float]]:
        """Returns the statistics of DPM-Solver-v3."""

        def measure() -> list[list[float]]:
            shown = self.meter.of(len(self.fitted))
            rows = measure_statistics(
                self.denoiser, self._reference(), seed=self.seed, progress=shown
            )
            return [list(row) for row in rows]

        return self._record(STATISTICS, measure)

    def _records(self, nfe: int) -> Any:
        """Returns the entries of a budget as records, the recommended one first."""
        reference, path = self._reference(), self._measured_path()

        def measure() -> Any:
            if not self._grids:
                self._grids.extend(fitting_grids(path, max(self.budgets)))
            candidates = self._budget(nfe, reference, self._grids)
            return [entry.to_record() for entry in candidates]

        return self._record(f"budget-{nfe}", measure)

    def _budget(
        self, nfe: int, reference: Reference, grids: list[dict[int, BestGrid]]
    ) -> list[ProfileEntry]:
        """Returns the entries of a budget, the recommended one first."""
        default = self._default(nfe)
        named = self._named(nfe, reference, grids)
        measured = self._measured(nfe, reference, grids)
        best = nearest(measured, named, default)
        ranked = sorted((measured, named, default), key=lambda c: c is not best)
        entries: dict[str, ProfileEntry] = {}
        for candidate in ranked:
            entries.setdefault(candidate.solver.name, _entry(candidate, default.error))
        return list(entries.values())

    def _record(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a part, from the folder if it is there, and counts the evaluations that it took."""
        if self.run is None:
            return make()
        cached = self.run.read_record(name)
        if cached is None:
            before = self.meter.count
            with self.kept.part(name):
                cached = {"value": make()}
                cached["evaluations"] = self.meter.count - before
                self.run.write_record(name, cached)
        else:
            self.meter.resume(cached["evaluations"])
        return cached["value"]

    def _reference(self) -> Reference:
        """Returns the reference trajectories to fit to; :attr:`target` has the ends of the others."""
        if self._whole is None:
            parts = [self._block(rows) for rows in self.blocks]
            x, eps = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("x", "eps"))
            self._whole = replace(parts[0], x=x, eps=eps, noise=self.noise, cond=self.cond)
            if max(self.budgets) >= len(parts[0].times):
                raise ValueError(
                    f"the model has {len(parts[0].times)} timesteps, too few for "
                    f"{max(self.budgets)} evaluations"
                )
        whole, rows = self._whole, len(self.fitted)
        return replace(
            whole,
            x=whole.x[:, :rows],
            eps=whole.eps[:, :rows],
            noise=whole.noise[:rows],
            cond=select(whole.cond, self.fitted),
        )

    def _target(self) -> Tensor:
        """Returns the ends of the held-out trajectories."""
        assert self._whole is not None
        return self._whole.end[self.held_out.start :]

    def _block(self, rows: range) -> Reference:
        """Returns the reference trajectories of a block of samples."""
        name, device = f"reference-{rows.start}", self.noise.device
        noise = self.noise[rows.start : rows.stop]
        cond = select(self.cond, rows)
        cached = None if self.run is None else self.run.read_tensors(name)
        if cached is not None:
            nfe = SUBSTEPS * self.intervals + 1
            self.meter.resume(nfe * len(rows))
            x, eps = (cached[key].to(device) for key in ("x", "eps"))
            return Reference(self.denoiser.schedule, cached["times"], x, eps, noise, cond, nfe)
        with self.kept.part(name):
            part = follow(
                self.denoiser,
                noise,
                cond,
                intervals=self.intervals,
                substeps=SUBSTEPS,
                progress=self.meter.of(len(rows)),
            )
            self.meter.add(1, len(rows))  # the last node's
            if self.run is not None:
                self.run.write_tensors(name, part.tensors())
        return part

    def _measured_path(self) -> Path:
        """Returns the reference, with how much of an error at each node remains at the end."""
        if self._path is None:
            reference = self._reference()
            nodes = len(reference.times)
            picked = gain_places(nodes, PLACES)
            logs = [self._gain_at(number) for number in range(len(picked))]
            gain = interpolate_gain(nodes, picked, logs)
            self._path = path_of(reference, self.denoiser, gain)
        return self._path

    def _gain_at(self, number: int) -> float:
        """Returns the logarithm of the gain at one of the places; 0 if there are fewer."""

        def measure() -> float:
            reference = self._reference()
            nodes = len(reference.times)
            picked = gain_places(nodes, PLACES)
            if number >= len(picked):
                return 0.0
            few, place = min(GAIN_SAMPLES, len(self.fitted)), picked[number]
            gain = log_gain_at(self.denoiser, reference, place, samples=few)
            self.meter.add(evaluations_from(nodes, place), 2 * few)
            return gain

        return self._record(f"gain-{number}", measure)

    def _measured(
        self, nfe: int, reference: Reference, grids: list[dict[int, BestGrid]]
    ) -> Candidate:
        ticks = self.meter.of(len(self.fitted))
        candidates = [
            self._held_out(fitted.solver, times, fitted=mean_squares(fitted.end - reference.end))
            for times, fitted in fit_on(self.denoiser, reference, grids, nfe, progress=ticks)
        ]
        return min(candidates, key=lambda c: robust_mean(c.all))

    def _named(
        self, nfe: int, reference: Reference, grids: list[dict[int, BestGrid]]
    ) -> Candidate:
        """Returns the named solver with the least predicted error on these times, run."""
        predicted: list[tuple[float, Solver, Tensor]] = []
        for by_steps in grids:
            times = by_steps[nfe].times
            for name in SOLVERS:
                solver = make_solver(name)
                plan = solver.plan(grid_of(reference.schedule, times))
                predicted.append(
                    (step_errors(plan, self._measured_path()).predicted, solver, times)
                )
        _, solver, times = min(predicted, key=lambda item: item[0])
        return self._held_out(solver, times)

    def _default(self, nfe: int) -> Candidate:
        integer = getattr(self.denoiser, "integer_times", False)
        plan = make_plan("auto", self.denoiser.schedule, nfe=nfe, integer_times=integer)
        return self._run(make_solver(plan.name), plan, None)

    def _held_out(
        self, solver: Solver, times: Tensor, *, fitted: Tensor | None = None
    ) -> Candidate:
        plan = solver.plan(grid_of(self.denoiser.schedule, times))
        return self._run(solver, plan, fitted)

    def _run(self, solver: Solver, plan: Plan, fitted: Tensor | None) -> Candidate:
        rows = self.held_out
        cond = select(self.cond, rows)
        x = run_plan(self.denoiser, plan, self.noise[rows.start :], cond)
        self.meter.add(plan.nfe, len(rows))
        return Candidate(
            solver, plan.knots.detach(), plan.head, fitted, mean_squares(x - self._target())
        )


def nearest(measured: Candidate, *others: Candidate) -> Candidate:
    """Returns the measured candidate, or another that is nearer on the held-out samples.

    It has to be nearer by the robust mean and, sample by sample, by the geometric mean of the ratios:
    a sample whose trajectory ends in another basin of attraction decides neither alone.
    """
    best = measured
    for other in others:
        ratios = other.held_out.clamp_min(1e-24) / best.held_out.clamp_min(1e-24)
        if (
            robust_mean(other.held_out) < robust_mean(best.held_out)
            and float(ratios.log().mean()) < 0
        ):
            best = other
    return best


def _entry(candidate: Candidate, default_error: float) -> ProfileEntry:
    solver = candidate.solver
    return ProfileEntry(
        solver.name,
        tuple(candidate.times.tolist()),
        candidate.head,
        candidate.error,
        default_error,
        weights=solver.weights if isinstance(solver, Multistep) else (),
    )


def _split(n: int) -> int:
    return round(n * FITTED_SHARE)


def _intervals(nfe: Sequence[int]) -> int:
    return max(INTERVALS, 2 * max(nfe))


def _checked(denoiser: object, nfe: Sequence[int], n: object) -> list[int]:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"a Denoiser is needed, got {type(denoiser).__name__}; "
            "make one with fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
        )
    if denoiser.built_in_sampler() is not None:
        raise ValueError(
            "this model has a built-in sampler, so there is nothing to measure; fit the model "
            "that it was distilled from"
        )
    budgets = [nfe] if isinstance(nfe, int) else list(nfe) if isinstance(nfe, Iterable) else []
    if not budgets or any(type(k) is not int or k < 1 for k in budgets):
        raise ValueError(f"nfe must be positive integers, got {nfe!r:.60}")
    if max(budgets) > MOST_MEASURED:
        raise ValueError(
            f"nfe must be at most {MOST_MEASURED} to be measured, got {max(budgets)}; for more evaluations "
            "take a solver by its name"
        )
    if type(n) is not int or n < 4:
        raise ValueError(f"n must be an integer of at least 4, got {n!r}")
    return sorted(set(budgets))


def _described(value: Any) -> Any:
    """Returns a condition as a JSON value, for readers."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 64 else f"a tensor {tuple(value.shape)}"
    return value if isinstance(value, (int, float, str, list)) else str(type(value).__name__)

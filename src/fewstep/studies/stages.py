"""The whole study of a model in parts, each of which is written to a folder and not repeated.

Several processes of a launch share the parts; what follows from them is computed without evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from fewstep.base.processes import Processes
from fewstep.base.progress import SILENT, Progress, progress_of
from fewstep.base.runs import PARTS, RunFolder
from fewstep.base.sharing import Sharing
from fewstep.models.conditions import Conditions, select
from fewstep.models.denoiser import Denoiser
from fewstep.models.kept import KeptEvaluations
from fewstep.models.splitting import split_evaluations
from fewstep.sampling.batches import batches_of
from fewstep.studies.checking import model_check
from fewstep.studies.curves import anatomy
from fewstep.studies.dynamic import BestGrid
from fewstep.studies.fitting import fitting_error
from fewstep.studies.local_errors import Path as Route
from fewstep.studies.local_errors import gain_places, interpolate_gain, log_gain_at, path_of
from fewstep.studies.multistep import fit_on, fitting_grids
from fewstep.studies.recommend import (
    SOLVERS,
    Advice,
    Batch,
    Front,
    Tried,
    advice_of,
    dynamic_grids,
    enough_nfe,
    polish_one,
    polished_count,
    run_front,
)
from fewstep.studies.reference import (
    BLOCK,
    Reference,
    digest_input,
    draw_noise,
    follow,
)
from fewstep.studies.spectrum import time_spectrum

FORMAT, VERSION = "fewstep.analysis", 2
EVEN = 129
"""The number of evenly spaced times of the spectrum."""

PLACES = 7
"""The number of places at which the gain of errors is measured."""


@dataclass(frozen=True)
class Subject:
    r"""The model to study, with its data and conditions.

    Attributes:
        denoiser: The model, with its guidance.
        data: Real data in the model's range, with shape (N, \*), or ``None``.
        labels: Their classes, or ``None``.
        cond: The conditions of the trajectories and of the held-out samples, 2 n together.
        settings: The settings as a JSON object, for the results.
    """

    denoiser: Denoiser
    data: Tensor | None
    labels: Tensor | None
    cond: Mapping[str, Any]
    settings: Mapping[str, Any]


def study(
    subject: Subject,
    folder: FilePath | RunFolder,
    *,
    nfe: Sequence[int],
    n: int = 32,
    seed: int = 0,
    minutes: float = 15.0,
    solvers: Sequence[str] = SOLVERS,
    progress: Progress | bool | None = None,
) -> tuple[dict[str, Any], list[Advice]]:
    """Studies a model; returns all numbers as a JSON object, and the advice.

    Finished parts in the folder are read from there. They belong to one model (its weights,
    schedule and guidance), data, conditions, number of trajectories and seed.

    Cost: some 500 network evaluations for each of 2 n trajectories, most of them for the gain of errors and the
    polishing of grids.

    Arguments:
        subject: The model with its data and conditions.
        folder: The folder for the parts; or the running folder of a caller that has more
            inputs and finishes it.
        nfe: The numbers of evaluations to give advice for.
        n: The number of trajectories to study, and of others for the selection.
        seed: The seed of their noise.
        minutes: After this many minutes of advice no more grids are polished.
        solvers: The solvers to try.
        progress: Follows the stages: ``True`` for a bar, or an object that is called.

    Raises:
        ValueError: Before the first evaluation, if the folder has parts of another study; the message
            names the difference.

    Example:
        >>> from pathlib import Path
        >>> from fewstep.studies.stages import Subject, study
        >>> subject = Subject(fewstep.load("mixture-smooth"), None, None, {}, {})
        >>> results, advice = study(subject, Path("study"), nfe=[4], n=4, solvers=["ddim"], minutes=0)
        >>> advice[0].nfe
        4
    """
    plan = nfe, minutes, solvers
    with progress_of(progress) as shown:
        if isinstance(folder, RunFolder):
            return _Work(subject, folder, n, seed, shown, *plan).results()
        run = RunFolder(folder, "study", outputs=(), state=f"{PARTS}/identity.json")
        with run.running(_identity(subject, n, seed, solvers), progress=shown):
            return _Work(subject, run, n, seed, shown, *plan).results()


def share_study(
    subject: Subject,
    run: RunFolder,
    team: Processes,
    *,
    nfe: Sequence[int],
    n: int = 32,
    seed: int = 0,
    minutes: float = 15.0,
    solvers: Sequence[str] = SOLVERS,
    progress: Progress = SILENT,
) -> None:
    """Computes the parts of :func:`study` together with the other processes of a launch, until all are there."""
    _Work(subject, run, n, seed, progress, nfe, minutes, solvers).share(team)


def _identity(subject: Subject, n: int, seed: int, solvers: Sequence[str]) -> dict[str, Any]:
    """Returns all inputs of the stages, as a JSON object."""
    denoiser = subject.denoiser
    conditions = Conditions.of(denoiser, 2 * n, subject.cond).values
    return {
        "model": denoiser.fingerprint(),
        "schedule": denoiser.schedule.to_record(),
        "guidance": getattr(denoiser, "scale", None),
        "data": digest_input(subject.data),
        "labels": digest_input(subject.labels),
        "conditions": {name: digest_input(v) for name, v in sorted(conditions.items())},
        "n": n,
        "seed": seed,
        "solvers": list(solvers),
    }


class _Work:
    """The parts of a study: each is read from the folder, or computed and written."""

    def __init__(
        self,
        subject: Subject,
        run: RunFolder,
        n: int,
        seed: int,
        progress: Progress,
        nfe: Sequence[int],
        minutes: float,
        solvers: Sequence[str],
    ) -> None:
        self.subject, self.denoiser = subject, subject.denoiser
        self.run, self.n, self.seed, self.progress = run, n, seed, progress
        self.budgets, self.solvers = sorted(set(nfe)), solvers
        self.kept, self.minutes, self.began = KeptEvaluations(run), minutes, time.monotonic()
        self.conditions = Conditions.of(self.denoiser, 2 * n, subject.cond)
        self.noise = draw_noise(self.denoiser, 2 * n, seed)
        halves = (range(n), range(n, 2 * n))
        self.blocks = [rows for half in halves for rows in batches_of(half, BLOCK)]

    def share(self, team: Processes) -> None:
        """Computes parts together with the other processes, until all are in the folder."""
        blocks = {_block(rows): partial(self._write_block, rows) for rows in self.blocks}
        first = {"check": self.check, **blocks}
        gains = {f"gain-{k}": partial(self._gain_at, k) for k in range(PLACES)}
        costly = self.budgets[::-1]  # so that none of the long ones begins last
        fronts = {f"front-{nfe}": partial(self._front, nfe) for nfe in costly}
        polished = {
            f"polished-{nfe}-{k}": partial(self._polished, nfe, k)
            for nfe in costly
            for k in range(polished_count(nfe))
        }
        advice = {f"advice-{nfe}": partial(self._advice, nfe) for nfe in costly}
        stages: list[Mapping[str, Callable[[], object]]] = [first, gains, fronts, polished, advice]
        if self.subject.data is not None:
            stages.append({"fitting": self.fitting})
        tasks = {name: task for stage in stages for name, task in stage.items()}
        needs = dict.fromkeys(first, frozenset[str]())
        needs |= dict.fromkeys(gains, frozenset(blocks))
        needs |= dict.fromkeys(fronts, frozenset([*blocks, *gains]))
        for name in (*polished, *advice):
            nfe = name.split("-")[1]
            own = {p for p in polished if name in advice and p.startswith(f"polished-{nfe}-")}
            needs[name] = frozenset({f"front-{nfe}", *own})
        needs["fitting"] = frozenset({f"advice-{self._shown()}"})

        def file(name: str) -> FilePath:
            tensors = name in blocks
            return self.run.tensors_file(name) if tensors else self.run.record_file(name)

        def ready(name: str) -> bool:
            return all(file(one).exists() for one in needs[name])

        # The gain needs all blocks, so each process has its own first; of the rest the longest comes first.
        order = [*team.own_first(list(first)), *(n for stage in stages[1:] for n in stage)]
        sharing = Sharing(order, file, ready=ready, over=self.run.is_over, progress=self.progress)
        with self._evaluating(), sharing as work:
            while work.unfinished():
                for name in work.claimed():
                    tasks[name]()

    def results(self) -> tuple[dict[str, Any], list[Advice]]:
        """Returns all numbers as a JSON object, and the advice."""
        subject, check = self.subject, self.check()
        with self._evaluating():
            reference, path = self.reference, self.path
            advice = [self._advice(nfe) for nfe in self.budgets]
            shown = next(item for item in advice if item.nfe == self._shown())
            fitting = None if subject.data is None else self.fitting()
        deviation = float(reference.end.cpu().double().std())
        results = {
            "format": FORMAT,
            "version": VERSION,
            "settings": dict(subject.settings),
            "deviation": deviation,
            "reference": {"nfe": reference.nfe, "times": reference.times.tolist()},
            "check": check,
            "anatomy": self.anatomy(path, shown),
            "spectrum": self.spectrum(path),
            "fitting": fitting,
            "advice": [item.to_record() for item in advice],
            "enough": enough_nfe(advice, deviation),
            "shown": shown.nfe,
            "seconds": time.monotonic() - self.began,
        }
        return results, advice

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with split_evaluations(self.denoiser), self.kept.of(self.denoiser):
            yield

    def _shown(self) -> int:
        """Returns the budget nearest to 10, of which the figures are."""
        return min(self.budgets, key=lambda nfe: abs(nfe - 10))

    def _record(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a part of JSON, from the folder or computed."""
        value = self.run.read_record(name)
        if value is None:
            with self.kept.part(name):
                value = make()
                self.run.write_record(name, value)
        return value

    def check(self) -> dict[str, Any]:
        """Returns the check of the model's description."""
        return self._record("check", self._checked)

    def _checked(self) -> dict[str, Any]:
        self.progress.stage("checking the model")
        data, labels = self.subject.data, self.subject.labels
        cond: dict[str, Any] = {}
        size = 8
        if data is not None:
            size = min(64, len(data))
            rows = torch.linspace(0, len(data) - 1, size).round().long()
            data = data[rows]
            null = self.denoiser.null_condition.get("class_labels")
            if labels is not None and isinstance(null, int) and int(labels.max()) < null:
                cond = {"class_labels": labels[rows]}
        small = self.denoiser.event_shape is not None and len(self.denoiser.event_shape) == 1
        n = None if small and not cond else min(size, 16)
        if cond and n is not None:
            cond = select(cond, range(n))
        # It evaluates the network itself, with other times, and splits on its own.
        return model_check(
            self.denoiser, data, n=n, seed=self.seed, cond=cond, kept=self.kept
        ).to_record()

    def _write_block(self, rows: range) -> dict[str, Tensor]:
        """Returns the reference trajectories of a block, of held-out samples the ends alone."""
        name = _block(rows)
        tensors = self.run.read_tensors(name)
        if tensors is None:
            self.progress.stage(
                f"reference trajectories {rows.start} to {rows.stop - 1} of {2 * self.n}", 97
            )
            with self.kept.part(name):
                noise = self.noise[rows.start : rows.stop]
                cond = self.conditions.at(rows)
                block = follow(self.denoiser, noise, cond, progress=self.progress)
                tensors = block.tensors() if rows.start < self.n else {"end": block.end}
                self.run.write_tensors(name, tensors)
        return tensors

    @cached_property
    def reference(self) -> Reference:
        """The trajectories to study."""
        rows = [rows for rows in self.blocks if rows.start < self.n]
        parts = [self._write_block(one) for one in rows]
        device, times = self.noise.device, parts[0]["times"]
        x, eps = (torch.cat([p[key] for p in parts], 1).to(device) for key in ("x", "eps"))
        cond, nfe = self.conditions.at(range(self.n)), 2 * (len(times) - 1) + 1
        return Reference(self.denoiser.schedule, times, x, eps, self.noise[: self.n], cond, nfe)

    @cached_property
    def held_out(self) -> Batch:
        """Other samples, for the selection."""
        rows = [rows for rows in self.blocks if rows.start >= self.n]
        end = torch.cat([self._write_block(one)["end"] for one in rows]).to(self.noise.device)
        return Batch(self.noise[self.n :], end, self.conditions.at(range(self.n, 2 * self.n)))

    @cached_property
    def fit(self) -> Batch:
        """The samples that grids are fitted to."""
        return Batch(self.reference.noise, self.reference.end, self.reference.cond)

    @cached_property
    def path(self) -> Route:
        """The reference, with how much of an error at each node remains at the end."""
        nodes = len(self.reference.times)
        picked = gain_places(nodes, PLACES)
        logs = [self._gain_at(k) for k in range(len(picked))]
        return path_of(self.reference, self.denoiser, interpolate_gain(nodes, picked, logs))

    def _gain_at(self, number: int) -> float:
        """Returns the logarithm of the gain at one of the places; 0 if there are fewer."""

        def measure() -> float:
            self.progress.stage(f"gain of errors, place {number + 1} of {PLACES}")
            picked = gain_places(len(self.reference.times), PLACES)
            if number >= len(picked):
                return 0.0
            return log_gain_at(self.denoiser, self.reference, picked[number])

        return self._record(f"gain-{number}", measure)

    @cached_property
    def _grids(self) -> tuple[dict[str, Any], list[dict[int, BestGrid]]]:
        """The grids of dynamic programming, without evaluations: for named solvers, and for fitted weights."""
        self.progress.stage("grids by dynamic programming")
        most = min(max(self.budgets), len(self.path.times) - 1)
        return dynamic_grids(self.path, most), list(fitting_grids(self.path, most))

    def _front(self, nfe: int) -> Front:
        def make() -> dict[str, Any]:
            dynamic = self._grids[0]
            self.progress.stage(f"solvers, {nfe} evaluations", (len(self.solvers) + 7) * nfe)
            return run_front(
                self.denoiser,
                self.path,
                nfe,
                self.fit,
                self.held_out,
                dynamic,
                solvers=self.solvers,
                progress=self.progress,
            ).to_record()

        return Front.from_record(self._record(f"front-{nfe}", make))

    def _polished(self, nfe: int, number: int) -> list[Tried] | None:
        """Returns one of the front with polished times; ``None`` if there was no time for that."""

        def make() -> dict[str, Any]:
            front, rounds = self._front(nfe), 3 if nfe <= 10 else 2
            if number >= len(front.order):
                return {"in_time": True, "items": []}
            self.progress.stage(
                f"times of solver {number + 1}, {nfe} evaluations",
                rounds * (nfe**2 // 2 + 3 * nfe),
            )
            items = polish_one(
                self.denoiser,
                self.path,
                nfe,
                front,
                front.order[number],
                self.fit,
                self.held_out,
                deadline=self.began + 60 * self.minutes,
                progress=self.progress,
            )
            records = [item.to_record() for item in items or ()]
            return {"in_time": items is not None, "items": records}

        record = self._record(f"polished-{nfe}-{number}", make)
        items = [Tried.from_record(item) for item in record["items"]]
        return items if record["in_time"] else None

    def _advice(self, nfe: int) -> Advice:
        def make() -> dict[str, Any]:
            front = self._front(nfe)
            polished = [self._polished(nfe, k) for k in range(polished_count(nfe))]
            self.progress.stage(f"fitted weights, {nfe} evaluations", 4 * nfe)
            return advice_of(
                self.denoiser,
                self.path,
                nfe,
                front,
                polished,
                self.held_out,
                fitted=self.fitted(nfe),
                progress=self.progress,
            ).to_record()

        return Advice.from_record(self._record(f"advice-{nfe}", make))

    def fitted(self, nfe: int) -> list[Tried]:
        """Returns the methods whose weights are fitted to the reference, as :func:`fewstep.fit` does."""
        reference = self.reference
        if nfe >= len(reference.times):
            return []
        fits = fit_on(self.denoiser, reference, self._grids[1], nfe, progress=self.progress)
        return [
            Tried(
                fitted.solver.name,
                label,
                tuple(times.tolist()),
                measured=float((fitted.end - reference.end).cpu().double().square().mean().sqrt()),
                weights=fitted.solver.weights,
            )
            for label, (times, fitted) in zip(("fitted", "fitted 2"), fits, strict=False)
        ]

    def fitting(self) -> dict[str, Any]:
        """Returns the fitting error."""

        def make() -> dict[str, Any]:
            assert self.subject.data is not None
            shown = self._advice(self._shown())
            self.progress.stage("fitting error", 25)
            return fitting_error(
                self.denoiser,
                self.reference,
                self.path,
                self.subject.data,
                self.subject.labels,
                plan=shown.best.candidate.plan(self.denoiser),
                seed=self.seed,
                progress=self.progress,
            )

        return self._record("fitting", make)

    def anatomy(self, path: Route, shown: Advice) -> dict[str, Any]:
        plans = {}
        for label, item in (("recommended", shown.best), ("default", shown.default)):
            name = f"{label}: {item.solver}, {item.grid}"
            plans[name] = item.candidate.plan(self.denoiser)
        return anatomy(path, self.denoiser.schedule, plans)

    def spectrum(self, path: Route) -> dict[str, Any]:
        ends = float(path.times[0]), float(path.times[-1])
        even = torch.linspace(*ends, EVEN, dtype=torch.float64)
        spectrum = time_spectrum(path.at(even)[0][None], even, schedule=self.denoiser.schedule)
        return replace(spectrum, trajectories=self.n).to_record()


def _block(rows: range) -> str:
    return f"reference-{rows.start}"

"""The whole study of a model, stage by stage; each stage is written to a folder and not repeated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import Progress, progress_of
from fewstep.base.runs import PARTS, RunFolder
from fewstep.models.conditions import Conditions, select
from fewstep.models.denoiser import Denoiser
from fewstep.models.splitting import split_evaluations
from fewstep.studies.checking import model_check
from fewstep.studies.curves import anatomy
from fewstep.studies.dynamic import BestGrid
from fewstep.studies.fitting import fitting_error
from fewstep.studies.local_errors import Path as Route
from fewstep.studies.local_errors import measure_gain, path_of
from fewstep.studies.multistep import fit_on, fitting_grids
from fewstep.studies.recommend import (
    SOLVERS,
    Advice,
    Batch,
    Tried,
    advise,
    dynamic_grids,
    enough_nfe,
)
from fewstep.studies.reference import Reference, digest_input, draw_noise, follow
from fewstep.studies.spectrum import time_spectrum

FORMAT, VERSION = "fewstep.analysis", 2
EVEN = 129
"""The number of evenly spaced times of the spectrum."""


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
    folder: Path | RunFolder,
    *,
    nfe: Sequence[int],
    n: int = 32,
    seed: int = 0,
    minutes: float = 15.0,
    solvers: Sequence[str] = SOLVERS,
    progress: Progress | bool | None = None,
) -> tuple[dict[str, Any], list[Advice]]:
    """Studies a model; returns all numbers as a JSON object, and the advice.

    Finished stages in the folder are read from there. They belong to one model (its weights,
    schedule and guidance), data, conditions, number of trajectories and seed.

    Cost: some 500 network evaluations for each of 2 n trajectories, most of them for the gain of errors and the
    polishing of grids.

    Arguments:
        subject: The model with its data and conditions.
        folder: The folder for the stages; or the running folder of a caller that has more
            inputs and finishes it.
        nfe: The numbers of evaluations to give advice for.
        n: The number of trajectories to study, and of others for the selection.
        seed: The seed of their noise.
        minutes: After this many minutes of advice no more grids are polished.
        solvers: The solvers to try.
        progress: Follows the stages: ``True`` for a bar, or an object that is called.

    Raises:
        ValueError: Before the first evaluation, if the folder has stages of another study; the message
            names the difference.

    Example:
        >>> from pathlib import Path
        >>> from fewstep.studies.stages import Subject, study
        >>> subject = Subject(fewstep.load("mixture-smooth"), None, None, {}, {})
        >>> results, advice = study(subject, Path("study"), nfe=[4], n=4, solvers=["ddim"], minutes=0)
        >>> advice[0].nfe
        4
    """
    with progress_of(progress) as shown:
        if isinstance(folder, RunFolder):
            return _study(_Work(subject, folder, n, seed, shown), nfe, minutes, solvers)
        run = RunFolder(folder, "study", outputs=(), state=f"{PARTS}/identity.json")
        with run.running(_identity(subject, n, seed, solvers), progress=shown):
            return _study(_Work(subject, run, n, seed, shown), nfe, minutes, solvers)


def _study(
    work: _Work, nfe: Sequence[int], minutes: float, solvers: Sequence[str]
) -> tuple[dict[str, Any], list[Advice]]:
    subject = work.subject
    began = time.monotonic()
    check = work.run.record("check", work.check)
    with split_evaluations(subject.denoiser):
        return _stages(work, check, began, nfe, minutes, solvers)


def _stages(
    work: _Work,
    check: dict[str, Any],
    began: float,
    nfe: Sequence[int],
    minutes: float,
    solvers: Sequence[str],
) -> tuple[dict[str, Any], list[Advice]]:
    subject = work.subject
    reference, held_out = work.references()
    path = work.path(reference)
    budgets = sorted(set(nfe))
    deadline = time.monotonic() + 60 * minutes
    advice = work.advice(path, reference, held_out, budgets, solvers, deadline)
    shown = advice[min(range(len(advice)), key=lambda k: abs(budgets[k] - 10))]
    fitting = None
    if subject.data is not None:
        fitting = work.run.record("fitting", lambda: work.fitting(reference, path, shown))
    deviation = float(reference.end.cpu().double().std())
    results = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(subject.settings),
        "deviation": deviation,
        "reference": {"nfe": reference.nfe, "times": reference.times.tolist()},
        "check": check,
        "anatomy": work.anatomy(path, shown),
        "spectrum": work.spectrum(path),
        "fitting": fitting,
        "advice": [item.to_record() for item in advice],
        "enough": enough_nfe(advice, deviation),
        "shown": shown.nfe,
        "seconds": time.monotonic() - began,
    }
    return results, advice


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
    def __init__(
        self, subject: Subject, run: RunFolder, n: int, seed: int, progress: Progress
    ) -> None:
        self.subject, self.denoiser = subject, subject.denoiser
        self.run, self.n, self.seed, self.progress = run, n, seed, progress

    def check(self) -> dict[str, Any]:
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
        return model_check(self.denoiser, data, n=n, seed=self.seed, cond=cond).to_record()

    def references(self) -> tuple[Reference, Batch]:
        """Returns the trajectories to study, and held-out samples."""
        conditions = Conditions.of(self.denoiser, 2 * self.n, self.subject.cond)
        first, second = (conditions.at(range(k, k + self.n)) for k in (0, self.n))
        noise = draw_noise(self.denoiser, 2 * self.n, self.seed)
        schedule = self.denoiser.schedule
        cached = self.run.read_tensors("reference")
        if cached is None:
            self.progress.stage("reference trajectories", 2 * 97)
            reference = follow(self.denoiser, noise[: self.n], first, progress=self.progress)
            other = follow(self.denoiser, noise[self.n :], second, progress=self.progress)
            cached = {**reference.tensors(), "held_out": other.end}
            self.run.write_tensors("reference", cached)
        device = noise.device
        times, x, eps = cached["times"], cached["x"].to(device), cached["eps"].to(device)
        nfe = 2 * (len(times) - 1) + 1
        reference = Reference(schedule, times, x, eps, noise[: self.n], first, nfe)
        return reference, Batch(noise[self.n :], cached["held_out"].to(device), second)

    def path(self, reference: Reference) -> Route:
        def gain() -> list[float]:
            self.progress.stage("gain of errors", 7)
            return measure_gain(self.denoiser, reference, progress=self.progress).tolist()

        values = torch.tensor(self.run.record("gain", gain), dtype=torch.float64)
        return path_of(reference, self.denoiser, values)

    def advice(
        self,
        path: Route,
        reference: Reference,
        held_out: Batch,
        budgets: Sequence[int],
        solvers: Sequence[str],
        deadline: float,
    ) -> list[Advice]:
        fit = Batch(reference.noise, reference.end, reference.cond)
        dynamic: dict[str, Any] = {}
        fitting: list[dict[int, BestGrid]] = []
        advice = []
        for nfe in budgets:

            def make(nfe: int = nfe) -> dict[str, Any]:
                if not dynamic:
                    self.progress.stage("grids by dynamic programming")
                    most = min(max(budgets), len(path.times) - 1)
                    dynamic.update(dynamic_grids(path, most))
                    fitting.extend(fitting_grids(path, most))
                rounds = 3 if nfe <= 10 else 2
                polished = 2 if nfe <= 10 else 1
                total = (len(solvers) + 10) * nfe + polished * rounds * (nfe**2 // 2 + 3 * nfe)
                self.progress.stage(f"solver and grid, {nfe} evaluations", total)
                return advise(
                    self.denoiser,
                    path,
                    nfe,
                    fit,
                    held_out,
                    dynamic,
                    solvers=solvers,
                    fitted=self.fitted(reference, fitting, nfe),
                    deadline=deadline,
                    progress=self.progress,
                ).to_record()

            advice.append(Advice.from_record(self.run.record(f"advice-{nfe}", make)))
        return advice

    def fitted(
        self, reference: Reference, grids: Sequence[Mapping[int, BestGrid]], nfe: int
    ) -> list[Tried]:
        """Returns the methods whose weights are fitted to the reference, as :func:`fewstep.fit` does."""
        if nfe >= len(reference.times):
            return []
        fits = fit_on(self.denoiser, reference, grids, nfe, progress=self.progress)
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

    def fitting(self, reference: Reference, path: Route, shown: Advice) -> dict[str, Any]:
        assert self.subject.data is not None
        self.progress.stage("fitting error", 25)
        return fitting_error(
            self.denoiser,
            reference,
            path,
            self.subject.data,
            self.subject.labels,
            plan=shown.best.candidate.plan(self.denoiser),
            seed=self.seed,
            progress=self.progress,
        )

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

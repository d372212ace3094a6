"""The whole study of a model, stage by stage; each stage is kept in a folder and not repeated."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import read_json, read_tensors, write_json, write_tensors
from fewstep.models.denoiser import Denoiser
from fewstep.studies.checking import model_check
from fewstep.studies.curves import anatomy
from fewstep.studies.fitting import fitting_error
from fewstep.studies.local_errors import Path as Route
from fewstep.studies.local_errors import measure_gain, path_of
from fewstep.studies.recommend import SOLVERS, Advice, Batch, advise, dynamic_grids, enough_calls
from fewstep.studies.reference import Reference, draw_noise, follow
from fewstep.studies.spectrum import time_spectrum

FORMAT, VERSION = "fewstep.analysis", 1
STATE, PARTS = "unfinished.json", "parts"
EVEN = 129
"""The even times at which the spectrum is taken."""

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Subject:
    r"""What is studied.

    Attributes:
        denoiser: The model, with its guidance.
        data: Real data in the model's range, with shape (N, \*), or ``None``.
        labels: Their classes, or ``None``.
        cond: Returns the conditions of n samples, ready.
        settings: What determines the result, as JSON has it; a folder with others is not gone on with.
    """

    denoiser: Denoiser
    data: Tensor | None
    labels: Tensor | None
    cond: Callable[[int], dict[str, Any]]
    settings: Mapping[str, Any]


@dataclass
class Watcher:
    """Told of the stages; the default tells nobody."""

    begin: Callable[[str, int], None] = field(default=lambda stage, calls: None)
    tick: Tick = field(default=lambda calls: None)


def study(
    subject: Subject,
    folder: Path,
    *,
    nfe: Sequence[int],
    n: int = 32,
    seed: int = 0,
    minutes: float = 15.0,
    solvers: Sequence[str] = SOLVERS,
    watcher: Watcher | None = None,
) -> tuple[dict[str, Any], list[Advice]]:
    """Studies a model; returns all numbers as JSON has them, and the advice.

    What was done before in this folder with the same settings is not done again.

    Arguments:
        subject: What is studied.
        folder: Where stages are kept; see :func:`prepare_folder`.
        nfe: The numbers of calls that advice is given for.
        n: How many trajectories are studied, and how many others advice is chosen by.
        seed: The seed of their noise.
        minutes: After so many minutes of advice nothing is polished any more.
        solvers: The solvers that are tried.
        watcher: Told of the stages.
    """
    work = _Work(subject, folder / PARTS, n, seed, watcher or Watcher())
    began = time.monotonic()
    check = work.kept("check", work.check)
    reference, held_out = work.references()
    path = work.path(reference)
    budgets = sorted(set(nfe))
    deadline = time.monotonic() + 60 * minutes
    advice = work.advice(path, reference, held_out, budgets, solvers, deadline)
    shown = advice[min(range(len(advice)), key=lambda k: abs(budgets[k] - 10))]
    fitting = None
    if subject.data is not None:
        fitting = work.kept("fitting", lambda: work.fitting(reference, path, shown))
    deviation = float(reference.end.double().std())
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
        "enough": enough_calls(advice, deviation),
        "shown": shown.nfe,
        "seconds": time.monotonic() - began,
    }
    return results, advice


def prepare_folder(
    folder: Path, settings: Mapping[str, Any], outputs: Sequence[str], *, overwrite: bool
) -> None:
    """Leaves a folder in which a study starts or goes on.

    Raises:
        ValueError: If there are results, or an unfinished study with other settings.
    """
    state = folder / STATE
    if state.exists():
        try:
            before = read_json(state, what="the state of an unfinished study")
        except ValueError:
            before = None
        if before == settings:
            return
        if not overwrite:
            different = [k for k in settings if not before or before.get(k) != settings[k]]
            raise ValueError(
                f"{str(folder)!r} has an unfinished study with another {different[0] if different else 'model'}; "
                "give its command again, --overwrite or another --out"
            )
    elif any((folder / name).exists() for name in outputs) and not overwrite:
        raise ValueError(f"{str(folder)!r} exists; give --overwrite or another --out")
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for name in outputs:
        (folder / name).unlink(missing_ok=True)
    write_json(state, dict(settings))


def finish_folder(folder: Path) -> None:
    """Removes the stages: the study is finished."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


class _Work:
    def __init__(self, subject: Subject, parts: Path, n: int, seed: int, watcher: Watcher) -> None:
        self.subject, self.denoiser = subject, subject.denoiser
        self.parts, self.n, self.seed, self.watcher = parts, n, seed, watcher

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what a stage made, from its file if it was made before."""
        path = self.parts / f"{name}.json"
        if path.exists():
            try:
                return read_json(path, what="a stage")
            except ValueError:
                pass  # damaged: made again
        made = make()
        write_json(path, made)
        return made

    def check(self) -> dict[str, Any]:
        self.watcher.begin("is the model what it says", 0)
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
            cond = {k: v[:n] for k, v in cond.items()}
        return model_check(self.denoiser, data, n=n, seed=self.seed, cond=cond).to_record()

    def references(self) -> tuple[Reference, Batch]:
        """Returns the trajectories that are studied, and held-out samples."""
        cond = self.subject.cond(2 * self.n)
        first, second = _halves(cond, self.n)
        noise = draw_noise(self.denoiser, 2 * self.n, self.seed)
        schedule = self.denoiser.schedule
        file = self.parts / "reference.safetensors"
        try:
            kept = read_tensors(file) if file.exists() else {}
        except ValueError:
            kept = {}
        if not kept:
            self.watcher.begin("reference trajectories", 2 * 97)
            tick = _each(self.watcher)
            made = follow(self.denoiser, noise[: self.n], first, tick=tick)
            other = follow(self.denoiser, noise[self.n :], second, tick=tick)
            kept = {**made.tensors(), "held_out": other.end}
            write_tensors(file, kept, {"nfe": str(made.nfe)})
        device = noise.device
        times, x, eps = kept["times"], kept["x"].to(device), kept["eps"].to(device)
        calls = 2 * (len(times) - 1) + 1
        reference = Reference(schedule, times, x, eps, noise[: self.n], first, calls)
        return reference, Batch(noise[self.n :], kept["held_out"].to(device), second)

    def path(self, reference: Reference) -> Route:
        def gain() -> list[float]:
            self.watcher.begin("what is left of errors", 7)
            tick = _each(self.watcher)
            return measure_gain(self.denoiser, reference, tick=tick).tolist()

        values = torch.tensor(self.kept("gain", gain), dtype=torch.float64)
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
        found = []
        for nfe in budgets:

            def make(nfe: int = nfe) -> dict[str, Any]:
                if not dynamic:
                    self.watcher.begin("grids by dynamic programming", 0)
                    most = min(max(budgets), len(path.times) - 1)
                    dynamic.update(dynamic_grids(path, most))
                rounds = 3 if nfe <= 10 else 2
                polished = 2 if nfe <= 10 else 1
                total = (len(solvers) + 6) * nfe + polished * rounds * (nfe**2 // 2 + 3 * nfe)
                self.watcher.begin(f"solver and grid, {nfe} calls", total)
                return advise(
                    self.denoiser,
                    path,
                    nfe,
                    fit,
                    held_out,
                    dynamic,
                    solvers=solvers,
                    deadline=deadline,
                    tick=self.watcher.tick,
                ).to_record()

            found.append(Advice.from_record(self.kept(f"advice-{nfe}", make)))
        return found

    def fitting(self, reference: Reference, path: Route, shown: Advice) -> dict[str, Any]:
        assert self.subject.data is not None
        self.watcher.begin("fitting error", 25)
        return fitting_error(
            self.denoiser,
            reference,
            path,
            self.subject.data,
            self.subject.labels,
            plan=shown.best.candidate.plan(self.denoiser),
            seed=self.seed,
            tick=_each(self.watcher),
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
        found = time_spectrum(path.at(even)[0][None], even, schedule=self.denoiser.schedule)
        return replace(found, trajectories=self.n).to_record()


def _each(watcher: Watcher) -> Callable[[], None]:
    return lambda: watcher.tick(1)


def _halves(cond: Mapping[str, Any], n: int) -> tuple[dict[str, Any], dict[str, Any]]:
    one: dict[str, Any] = {}
    two: dict[str, Any] = {}
    for name, value in cond.items():
        many = isinstance(value, (Tensor, list)) and len(value) == 2 * n
        one[name], two[name] = (value[:n], value[n:]) if many else (value, value)
    return one, two

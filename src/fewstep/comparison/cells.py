"""Runs the cells of a comparison, batch by batch, and stores the inputs of the metrics.

Processes of one launch share the batches: a batch of a cell needs that of the reference, a cell its batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.memory import in_parts
from fewstep.base.processes import Processes
from fewstep.base.progress import Progress
from fewstep.base.sharing import Sharing
from fewstep.comparison.entries import Entry
from fewstep.comparison.scores import RMS, denoised, root, same_place, score
from fewstep.comparison.store import REFERENCE, Cell, Store, joined
from fewstep.diffusion.noise import NoiseSource
from fewstep.metrics import Reference
from fewstep.metrics.features import extractor
from fewstep.models.conditions import Conditions, select
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.batches import batches_of, initial_noise, run_batch
from fewstep.sampling.protocol import Sampler

ENDS = ("lowest level", "sigma = 0")
POINTS = 1000
"""The most points of a plane that are stored for pictures."""


@dataclass(frozen=True)
class Job:
    """A cell to run: an entry at a budget, its sampler and the sampler's checksum."""

    entry: Entry
    nfe: int
    sampler: Sampler
    identity: str


@dataclass(frozen=True)
class Setting:
    """The settings that all cells share.

    Attributes:
        denoiser: The model, with guidance if there is any.
        n: The number of samples.
        seed: The seed; all samplers start from the same noise.
        conditions: The conditions of the n samples.
        data: The real data, or ``None``.
        batch_size: The samples in one network evaluation.
        shown: The number of images that are stored for pictures.
    """

    denoiser: Denoiser
    n: int
    seed: int
    conditions: Conditions
    data: Reference | None
    batch_size: int
    shown: int

    def batches(self) -> list[range]:
        """Returns the numbers of the samples of each batch."""
        return batches_of(range(self.n), self.batch_size)


@dataclass(frozen=True)
class Task:
    """A batch of a cell to draw, or, without a number, the cell to put together from its batches."""

    job: Job
    name: str
    number: int | None = None

    @property
    def is_reference(self) -> bool:
        """Whether it is of the reference."""
        return self.name == REFERENCE


class Runner:
    """Runs cells against one reference.

    Arguments:
        setting: The settings of all cells.
        store: The folder.
        metrics: The names of the metrics.
        target: The sampler of the reference.
        progress: Ticks once for each network evaluation of a batch.
    """

    def __init__(
        self,
        setting: Setting,
        store: Store,
        metrics: Sequence[str],
        target: Job,
        progress: Progress,
    ) -> None:
        self.setting, self.store, self.metrics = setting, store, metrics
        self.target, self.progress = target, progress

    def run(self, jobs: Sequence[Job], team: Processes) -> None:
        """Draws what is missing of the reference and the cells, shared with the processes of a launch."""
        numbers = range(len(self.setting.batches()))
        first = [Task(self.target, REFERENCE, number) for number in numbers]
        for task in first[team.rank :: team.count]:
            if self._stored(task) is None:  # damaged: it is drawn again
                self._file(task).unlink(missing_ok=True)
        if self.store.find(REFERENCE, self.target.nfe, self.target.identity) is None:
            first.append(Task(self.target, REFERENCE))
        then = []
        for job in jobs:
            name = job.entry.name
            if self.store.find(name, job.nfe, job.identity) is None:
                then += [*(Task(job, name, number) for number in numbers), Task(job, name)]
            else:
                self.progress.tick(len(numbers) * job.nfe, f"{name}, {job.nfe}: stored")
        for task in (*first, *then):
            if task.number is not None and self._is_done(task):
                self.progress.tick(task.job.nfe)
        with Sharing(
            [*team.own_first(first), *team.own_first(then)],
            self._file,
            done=self._is_done,
            ready=self._is_ready,
            progress=self.progress,
        ) as work:
            while work.unfinished():
                for task in work.claimed():
                    self._do(task)

    def cell(self, job: Job, name: str | None = None) -> Cell:
        """Returns a cell that has been run, with the metrics of this run."""
        name = job.entry.name if name is None else name
        stored = self.store.find(name, job.nfe, job.identity)
        if stored is None:  # damaged since it was written
            self._do(Task(job, name))
            stored = self.store.find(name, job.nfe, job.identity)
        assert stored is not None
        return self._measured(stored, self.store.tensors(stored))

    def reference(self) -> Cell:
        """Returns the reference, once it has been run."""
        return self.cell(self.target, REFERENCE)

    def _file(self, task: Task) -> Path:
        job = task.job
        if task.number is None:
            return self.store.file(task.name, job.nfe, ".json")
        start = self.setting.batches()[task.number].start
        return self.store.part(task.name, job.nfe, job.identity, start)

    def _is_done(self, task: Task) -> bool:
        if self._file(task).exists():
            return True
        # A written cell has no batches any more, except the reference, whose samples the others need.
        return (
            task.number is not None
            and not task.is_reference
            and self._file(replace(task, number=None)).exists()
        )

    def _is_ready(self, task: Task) -> bool:
        if task.number is None:
            tasks = [replace(task, number=n) for n in range(len(self.setting.batches()))]
            return all(self._is_done(one) for one in tasks)
        return task.is_reference or self._is_done(Task(self.target, REFERENCE, task.number))

    def _do(self, task: Task) -> None:
        if task.number is not None:
            self.store.write_part(self._file(task), self._batch(task, task.number))
            return
        self.progress.tick(0, f"{task.name}, {task.job.nfe}")
        cell, tensors = self._joined(task)
        cell = self._scored(cell, tensors)
        self.store.write(cell, tensors, keep_parts=task.is_reference)

    def _stored(self, task: Task) -> dict[str, Tensor] | None:
        """Returns a batch, or ``None`` if it is missing or damaged."""
        keys = ("seconds", "draws", *(("x", "zero") if task.is_reference else ("squares",)))
        assert task.number is not None
        rows = len(self.setting.batches()[task.number])
        return self.store.read_part(self._file(task), rows, keys)

    def _part(self, task: Task, number: int) -> dict[str, Tensor]:
        """Returns a batch; a missing or damaged one is drawn again."""
        task = replace(task, number=number)
        part = self._stored(task)
        if part is None:
            part = self._batch(task, number)
            self.store.write_part(self._file(task), part)
        return part

    def _joined(self, task: Task) -> tuple[Cell, dict[str, Tensor]]:
        """Puts a cell together from its batches."""
        job, batches = task.job, self.setting.batches()
        parts = [
            {k: v for k, v in self._part(task, number).items() if k not in ("x", "zero")}
            for number in range(len(batches))
        ]
        tensors = joined(parts)
        seconds, draws = tensors.pop("seconds").tolist(), tensors.pop("draws")
        end = 0
        if not task.is_reference:
            end = int(tensors["squares"].mean(0).argmin())
            tensors["squares"] = tensors["squares"][:, end].contiguous()
        tensors["shown"] = tensors["shown"][: self._shown_count()].contiguous()
        times = [seconds[rows.start] for rows in batches]
        cell = Cell(
            name=task.name,
            nfe=job.nfe,
            identity=job.identity,
            passes=job.nfe * job.sampler.denoiser.passes,
            seconds=(min(times), statistics.median(times), max(times)),
            stochastic=bool(draws.any()),
            end=ENDS[end],
            scores={},
            about=_about(job),
        )
        return cell, tensors

    def _batch(self, task: Task, number: int) -> dict[str, Tensor]:
        """Draws one batch; returns the tensors to store."""
        job, rows = task.job, self.setting.batches()[number]
        model = job.sampler.denoiser
        self.progress.tick(0, f"{task.name}, {job.nfe}")
        source = Counting(self.setting.seed, rows)
        cond = self.setting.conditions.at(rows)
        noise = initial_noise(model, source)
        source.drawn = False
        _wait(model.device)
        start = time.perf_counter()
        x = run_batch(job.sampler, source, cond, noise=noise, on_evaluation=self.progress.tick).x
        _wait(model.device)
        spent = (time.perf_counter() - start) / len(rows)
        part = {
            "seconds": torch.full((len(rows),), spent, dtype=torch.float64),
            "draws": torch.full((len(rows),), source.drawn),
            "shown": self._shown(x, rows),
        }
        if self.setting.data is not None:
            part["features"] = _features(self.setting.data, x)
        if task.is_reference:
            zero = in_parts(
                lambda some: denoised(model, x[some.start : some.stop], select(cond, some)), len(x)
            )
            return {**part, "x": x.cpu(), "zero": zero.cpu()}
        reference = self._part(Task(self.target, REFERENCE), number)
        distances = [same_place(x, reference[key].to(x.dtype)) for key in ("x", "zero")]
        return {**part, "squares": torch.stack(distances, 1)}

    def _shown_count(self) -> int:
        shape = self.setting.denoiser.event_shape or ()
        return min(self.setting.n, POINTS if len(shape) == 1 else self.setting.shown)

    def _shown(self, x: Tensor, rows: range) -> Tensor:
        """Returns the samples of a batch for pictures, decoded if the model is of latents."""
        first = x[: max(0, self._shown_count() - rows.start)]
        inner = getattr(self.setting.denoiser, "inner", self.setting.denoiser)
        decode = getattr(inner, "decode", None)
        images = decode(first) if decode is not None and len(first) else first
        return images.float().cpu().clone()  # safetensors does not write tensors that share memory

    def _measured(self, cell: Cell, tensors: Mapping[str, Tensor]) -> Cell:
        """Adds the metrics of this run that the cell lacks."""
        asked = set(self.metrics) if self.setting.data is not None else set[str]()
        had = {*cell.scores, *cell.failed}
        if "precision" in had:
            had.add("precision-recall")
        if asked <= had:
            return cell
        scored = self._scored(cell, tensors)
        self.store.write(scored, keep_parts=True)
        return scored

    def _scored(self, cell: Cell, tensors: Mapping[str, Tensor]) -> Cell:
        scores, failed = dict(cell.scores), dict(cell.failed)
        if "squares" in tensors:
            scores[RMS] = root(tensors["squares"])
        if self.setting.data is not None:
            missing = [name for name in self.metrics if name not in scores]
            estimates, reasons = score(tensors["features"], self.setting.data, missing)
            scores.update(estimates)
            failed.update(reasons)
        return replace(cell, scores=scores, failed=failed)


class Counting(NoiseSource):
    """Records whether anything but the initial noise was drawn."""

    drawn = False
    whole: Counting | None = None

    def draw(self, index: int, shape: Sequence[int], **kwargs: Any) -> Tensor:
        (self.whole or self).drawn = True
        return super().draw(index, shape, **kwargs)

    def part(self, rows: range) -> Counting:
        source = Counting(self.seed, self.samples[rows.start : rows.stop])
        source.whole = self.whole or self
        return source


def _about(job: Job) -> dict[str, Any]:
    plan = getattr(job.sampler, "plan", None)
    scheduler = getattr(job.sampler, "scheduler", None)
    about: dict[str, Any] = {"kind": type(job.sampler).__name__, "spec": job.entry.name}
    if plan is not None:
        about["solver"] = plan.name
        about["times"] = [round(t, 6) for t in plan.times.tolist()]
    if scheduler is not None:
        about["solver"] = type(scheduler).__name__
        about["steps"] = job.sampler.steps  # type: ignore[attr-defined]
    return about


def _features(data: Reference, x: Tensor) -> Tensor:
    extract = extractor(data.extractor)
    with torch.no_grad():
        return in_parts(
            lambda rows: extract(x[rows.start : rows.stop].float()).flatten(1).float().cpu(),
            len(x),
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Runs the cells of a comparison, batch by batch, and stores the inputs of the metrics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import write_tensors
from fewstep.base.progress import Progress
from fewstep.comparison.entries import Entry
from fewstep.comparison.scores import RMS, denoised, root, same_place, score
from fewstep.comparison.store import REFERENCE, Cell, Store, joined
from fewstep.diffusion.noise import NoiseSource
from fewstep.metrics import Reference
from fewstep.metrics.features import extractor
from fewstep.models.conditions import Conditions
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


class Runner:
    """Runs cells, one after another, against one reference."""

    def __init__(
        self,
        setting: Setting,
        store: Store,
        metrics: Sequence[str],
        progress: Progress,
    ) -> None:
        self.setting, self.store, self.metrics = setting, store, metrics
        self.progress = progress
        self.ends: list[Path] = []

    def reference(self, job: Job) -> Cell:
        """Runs the reference; its samples are stored, batch by batch, for the other cells."""
        self.ends = [
            self.store.part(REFERENCE, job.nfe, job.identity, rows.start)
            for rows in self.setting.batches()
        ]
        whole = all(
            self.store.read_part(path, len(rows), ("x",)) is not None
            for path, rows in zip(self.ends, self.setting.batches(), strict=True)
        )
        cached = self.store.find(REFERENCE, job.nfe, job.identity) if whole else None
        return self._finished(cached, job, REFERENCE)

    def cell(self, job: Job) -> Cell:
        """Runs a cell, unless it is stored."""
        cached = self.store.find(job.entry.name, job.nfe, job.identity)
        return self._finished(cached, job, job.entry.name)

    def _finished(self, cached: Cell | None, job: Job, name: str) -> Cell:
        if cached is not None:
            self.progress.tick(len(self.setting.batches()) * job.nfe, f"{name}, {job.nfe}: stored")
            return self._measured(cached, self.store.tensors(cached))
        self.progress.tick(0, f"{name}, {job.nfe}")
        cell, tensors = self._run(job, name)
        # The batches of the reference hold its samples, which the other cells need.
        cell = self._scored(cell, tensors)
        self.store.write(cell, tensors, keep_parts=name == REFERENCE)
        return cell

    def _run(self, job: Job, name: str) -> tuple[Cell, dict[str, Tensor]]:
        is_reference = name == REFERENCE
        keys = ("seconds", "draws", *(("x", "zero") if is_reference else ("squares",)))
        parts = []
        for number, rows in enumerate(self.setting.batches()):
            path = self.store.part(name, job.nfe, job.identity, rows.start)
            part = self.store.read_part(path, len(rows), keys)
            if part is None:
                part = self._batch(job, rows, None if is_reference else self.ends[number])
                write_tensors(path, part)
            else:
                self.progress.tick(job.nfe)
            parts.append({k: v for k, v in part.items() if k not in ("x", "zero")})
        every = joined(parts)
        seconds, draws = every.pop("seconds").tolist(), every.pop("draws")
        end = 0
        if not is_reference:
            end = int(every["squares"].mean(0).argmin())
            every["squares"] = every["squares"][:, end].contiguous()
        every["shown"] = every["shown"][: self._shown_count()].contiguous()
        starts = [rows.start for rows in self.setting.batches()]
        times = [seconds[start] for start in starts]
        cell = Cell(
            name=name,
            nfe=job.nfe,
            identity=job.identity,
            passes=job.nfe * job.sampler.denoiser.passes,
            seconds=(min(times), statistics.median(times), max(times)),
            stochastic=bool(draws.any()),
            end=ENDS[end],
            scores={},
            about=_about(job),
        )
        return cell, every

    def _batch(self, job: Job, rows: range, end: Path | None) -> dict[str, Tensor]:
        """Draws one batch; returns the tensors to store."""
        model = job.sampler.denoiser
        source = Counting(self.setting.seed, rows)
        cond = self.setting.conditions.at(rows)
        noise = initial_noise(model, source)
        source.drawn = False
        _wait(model.device)
        begun = time.perf_counter()
        x = run_batch(job.sampler, source, cond, noise=noise, on_evaluation=self.progress.tick).x
        _wait(model.device)
        spent = (time.perf_counter() - begun) / len(rows)
        part = {
            "seconds": torch.full((len(rows),), spent, dtype=torch.float64),
            "draws": torch.full((len(rows),), source.drawn),
            "shown": self._shown(x, rows),
        }
        if self.setting.data is not None:
            part["features"] = _features(self.setting.data, x)
        if end is None:
            return {**part, "x": x.cpu(), "zero": denoised(model, x, cond).cpu()}
        reference = self.store.read_part(end, len(rows), ("x", "zero"))
        assert reference is not None  # the reference has just been run or checked
        both = [same_place(x, reference[key].to(x.dtype)) for key in ("x", "zero")]
        return {**part, "squares": torch.stack(both, 1)}

    def _shown_count(self) -> int:
        shape = self.setting.denoiser.event_shape or ()
        return min(self.setting.n, POINTS if len(shape) == 1 else self.setting.shown)

    def _shown(self, x: Tensor, rows: range) -> Tensor:
        """Returns the samples of a batch for pictures, decoded if the model is of latents."""
        some = x[: max(0, self._shown_count() - rows.start)]
        inner = getattr(self.setting.denoiser, "inner", self.setting.denoiser)
        decode = getattr(inner, "decode", None)
        images = decode(some) if decode is not None and len(some) else some
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

    def draw(self, index: int, shape: Sequence[int], **kwargs: Any) -> Tensor:
        self.drawn = True
        return super().draw(index, shape, **kwargs)


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
    with torch.no_grad():
        return extractor(data.extractor)(x.float()).flatten(1).float().cpu()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

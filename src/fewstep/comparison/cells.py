"""Runs the cells of a comparison, batch by batch, and keeps what metrics need of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import write_tensors
from fewstep.comparison.entries import Entry
from fewstep.comparison.scores import RMS, denoised, root, same_place, score
from fewstep.comparison.store import REFERENCE, Cell, Store, joined
from fewstep.diffusion.noise import NoiseSource
from fewstep.metrics import Reference
from fewstep.metrics.features import extractor
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.batches import initial_noise, run_batch
from fewstep.sampling.protocol import Sampler

ENDS = ("lowest level", "sigma = 0")
POINTS = 1000
"""The most points of a plane that are kept for pictures."""


class Watcher:
    """Is told how a comparison goes on; this one says nothing."""

    def begin(self, calls: int) -> None:
        """There will be so many network calls, of a batch each."""

    def cell(self, name: str, nfe: int, state: str) -> None:
        """A cell (a sampler, its budget) is ``"begun"``, ``"done"``, or ``"kept"`` from before."""

    def call(self, times: int = 1) -> None:
        """So many of the calls are made."""


@dataclass(frozen=True)
class Job:
    """A cell that is to be run."""

    entry: Entry
    nfe: int
    made: Sampler
    identity: str


@dataclass(frozen=True)
class Setting:
    """What all cells have in common.

    Attributes:
        denoiser: The model, guided if that was asked for.
        n: The number of samples.
        seed: The seed; all samplers start from the same noise.
        cond: The conditions, ready for all n samples.
        data: The real data, or ``None``.
        batch_size: How many samples go through the network at a time.
        shown: How many images are kept for pictures.
    """

    denoiser: Denoiser
    n: int
    seed: int
    cond: Mapping[str, Any]
    data: Reference | None
    batch_size: int
    shown: int

    def batches(self) -> Iterator[range]:
        """Gives the numbers of the samples of each batch."""
        for start in range(0, self.n, self.batch_size):
            yield range(start, min(start + self.batch_size, self.n))

    def part(self, rows: range) -> dict[str, Any]:
        """Returns the conditions of a batch."""
        return select(self.cond, rows)


class Runner:
    """Runs cells, one after another, against one reference."""

    def __init__(
        self,
        setting: Setting,
        store: Store,
        metrics: Sequence[str],
        watcher: Watcher,
    ) -> None:
        self.setting, self.store, self.metrics = setting, store, metrics
        self.watcher = watcher
        self.batches = sum(1 for _ in setting.batches())
        self.ends: list[Path] = []

    def reference(self, job: Job) -> Cell:
        """Runs the reference; its samples are kept, batch by batch, for the others."""
        self.ends = [
            self.store.part(REFERENCE, job.nfe, job.identity, rows.start)
            for rows in self.setting.batches()
        ]
        whole = all(
            self.store.read_part(path, len(rows), ("x",)) is not None
            for path, rows in zip(self.ends, self.setting.batches(), strict=True)
        )
        found = self.store.find(REFERENCE, job.nfe, job.identity) if whole else None
        return self._finished(found, job, REFERENCE)

    def cell(self, job: Job) -> Cell:
        """Runs a cell, unless it is there."""
        found = self.store.find(job.entry.name, job.nfe, job.identity)
        return self._finished(found, job, job.entry.name)

    def _finished(self, found: Cell | None, job: Job, name: str) -> Cell:
        if found is not None:
            self.watcher.cell(name, job.nfe, "kept")
            self.watcher.call(self.batches * job.nfe)
            return self._measured(found, self.store.tensors(found))
        self.watcher.cell(name, job.nfe, "begun")
        cell, tensors = self._run(job, name)
        # The reference keeps its batches, which hold the samples.
        cell = self._scored(cell, tensors)
        self.store.write(cell, tensors, keep_parts=name == REFERENCE)
        self.watcher.cell(name, job.nfe, "done")
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
                self.watcher.call(job.nfe)
            parts.append({k: v for k, v in part.items() if k not in ("x", "zero")})
        every = joined(parts)
        seconds, draws = every.pop("seconds").tolist(), every.pop("draws")
        end = 0
        if not is_reference:
            end = int(every["squares"].mean(0).argmin())
            every["squares"] = every["squares"][:, end].contiguous()
        every["shown"] = every["shown"][: self._kept()].contiguous()
        starts = [rows.start for rows in self.setting.batches()]
        times = [seconds[start] for start in starts]
        cell = Cell(
            name=name,
            nfe=job.nfe,
            identity=job.identity,
            calls=job.nfe * job.made.denoiser.calls,
            seconds=(min(times), statistics.median(times), max(times)),
            stochastic=bool(draws.any()),
            end=ENDS[end],
            scores={},
            about=_about(job),
        )
        return cell, every

    def _batch(self, job: Job, rows: range, end: Path | None) -> dict[str, Tensor]:
        """Draws one batch; returns what is kept of it."""
        model = job.made.denoiser
        source = Counting(self.setting.seed, rows)
        cond = model.prepare(len(rows), self.setting.part(rows))
        device = model.device
        noise = initial_noise(model, source)
        source.drawn = False
        _wait(device)
        begun = time.perf_counter()
        x = run_batch(job.made, source, cond, noise=noise, on_call=self.watcher.call).x
        _wait(device)
        spent = (time.perf_counter() - begun) / len(rows)
        part = {
            "seconds": torch.full((len(rows),), spent, dtype=torch.float64),
            "draws": torch.full((len(rows),), source.drawn),
            "shown": self._shown(x, rows),
        }
        if self.setting.data is not None:
            part["features"] = _look(self.setting.data, x)
        if end is None:
            return {**part, "x": x.cpu(), "zero": denoised(model, x, cond).cpu()}
        kept = self.store.read_part(end, len(rows), ("x", "zero"))
        assert kept is not None  # the reference has just been run or checked
        both = [same_place(x.cpu(), kept[key].to(x.dtype)) for key in ("x", "zero")]
        return {**part, "squares": torch.stack(both, 1)}

    def _kept(self) -> int:
        shape = self.setting.denoiser.event_shape or ()
        return min(self.setting.n, POINTS if len(shape) == 1 else self.setting.shown)

    def _shown(self, x: Tensor, rows: range) -> Tensor:
        """Returns the samples of a batch that pictures show, decoded if the model is of latents."""
        some = x[: max(0, self._kept() - rows.start)]
        inner = getattr(self.setting.denoiser, "inner", self.setting.denoiser)
        decode = getattr(inner, "decode", None)
        made = decode(some) if decode is not None and len(some) else some
        return made.float().cpu().clone()  # what shares memory is not written

    def _measured(self, cell: Cell, tensors: Mapping[str, Tensor]) -> Cell:
        """Adds metrics that are asked for now and were not then."""
        asked = set(self.metrics) if self.setting.data is not None else set[str]()
        had = {*cell.scores, *cell.failed}
        if "precision" in had:
            had.add("precision-recall")
        if asked <= had:
            return cell
        made = self._scored(cell, tensors)
        self.store.write(made, keep_parts=True)
        return made

    def _scored(self, cell: Cell, tensors: Mapping[str, Tensor]) -> Cell:
        scores, failed = dict(cell.scores), dict(cell.failed)
        if "squares" in tensors:
            scores[RMS] = root(tensors["squares"])
        if self.setting.data is not None:
            missing = [name for name in self.metrics if name not in scores]
            found, reasons = score(tensors["features"], self.setting.data, missing)
            scores.update(found)
            failed.update(reasons)
        return replace(cell, scores=scores, failed=failed)


class Counting(NoiseSource):
    """Notes whether anything but the initial noise was drawn."""

    drawn = False

    def draw(self, index: int, shape: Sequence[int], **kwargs: Any) -> Tensor:
        self.drawn = True
        return super().draw(index, shape, **kwargs)


def _about(job: Job) -> dict[str, Any]:
    plan = getattr(job.made, "plan", None)
    scheduler = getattr(job.made, "scheduler", None)
    about: dict[str, Any] = {"kind": type(job.made).__name__, "spec": job.entry.name}
    if plan is not None:
        about["solver"] = plan.name
        about["times"] = [round(t, 6) for t in plan.times.tolist()]
    if scheduler is not None:
        about["solver"] = type(scheduler).__name__
        about["steps"] = job.made.steps  # type: ignore[attr-defined]
    return about


def _look(data: Reference, x: Tensor) -> Tensor:
    with torch.no_grad():
        return extractor(data.extractor)(x.float()).flatten(1).float().cpu()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

r"""The writer of a store: computes the missing shards, concurrently with other writers."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.interrupts import unbroken
from fewstep.base.locks import PATIENCE, Lock
from fewstep.base.processes import processes
from fewstep.base.progress import SILENT, Progress
from fewstep.base.staging import remote_of
from fewstep.base.temporary import LITTER, PATTERN, target_of
from fewstep.base.urls import Remote
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Clipped, Guided, Thresholded
from fewstep.sampling.batches import ConditionsAt, run_batches
from fewstep.sampling.protocol import Sampler
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.trajectories.claims import FOLDER as CLAIMS
from fewstep.trajectories.claims import Claim
from fewstep.trajectories.conditions import Condition, from_record
from fewstep.trajectories.manifest import DTYPES, MANIFEST, Manifest, shard_count, shard_rows
from fewstep.trajectories.shards import (
    check_shard,
    partial_file,
    read_partial,
    shard_file,
    write_partial,
    write_shard,
)
from fewstep.trajectories.store import missing_shards

POLL = 0.2
"""Seconds between checks of shards that other writers compute."""

SOON = 5.0
"""Seconds after which a waiting writer shows which process it waits for."""


class _Count:
    """Ticks up to a count, since other writers complete shards too."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._count = progress, 0
        self._begun = False

    @property
    def last(self) -> int:
        """The count so far."""
        return self._count

    def set(self, count: int) -> int:
        if self._begun:
            self._progress.tick(count - self._count)
        self._count, self._begun = count, True
        return count


@dataclass(frozen=True)
class Writer:
    """Computes and writes the shards of a store.

    Attributes:
        folder: The folder of the store.
        manifest: Its manifest.
        sampler: The sampler that the manifest describes.
        rules: The conditions that the manifest describes; ``None`` for values that were given to
            :func:`record` and are not available now.
    """

    folder: Path
    manifest: Manifest
    sampler: Sampler
    rules: Mapping[str, Condition | None]
    _seen: dict[Path, tuple[object, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def run(self, progress: Progress = SILENT) -> None:
        """Computes all missing or damaged shards, concurrently with other writers."""
        team = processes()
        complete = sorted(self._complete())
        if team.several:  # each checks its share of the shards: all of them are read
            complete = complete[team.rank :: team.count]
        if complete:
            progress.stage("checking shards", len(complete))
        for shard in complete:
            # Damaged before this run; shards that appear during it were just written atomically.
            # Of a remote store only those that are here: the others were copied whole.
            if self._remote is not None and not shard_file(self.folder, shard).exists():
                continue
            if check_shard(self.folder, self.manifest, shard) is not None:
                shard_file(self.folder, shard).unlink(missing_ok=True)
            progress.tick()
        self._sweep()
        count = _Count(progress)
        progress.stage("recording", self.manifest.n, done=count.set(self._recorded()))
        idle, notified = 0.0, False
        while missing := missing_shards(self.folder, self.manifest):
            count.set(self._recorded())
            # Each writer has its own order, so that two rarely start the same shard.
            if team.several:
                missing = team.own_first(missing)
            else:
                random.Random(f"{os.getpid()} {time.time_ns()}").shuffle(missing)
            if any([self._take(shard, count) for shard in missing]):
                idle = 0.0
                continue
            # Other writers are computing all missing shards.
            time.sleep(POLL)
            idle += POLL
            if idle > SOON and not notified:
                notified = True
                owner = Claim(self.folder, missing[0]).owner()
                who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "a writer"
                name = f"waiting for {who}, which records shard {missing[0]}"
                progress.stage(name, self.manifest.n, done=self._recorded())
        count.set(self.manifest.n)
        self._sweep()

    @property
    def _remote(self) -> Remote | None:
        return remote_of(self.folder)

    def _exists(self, shard: int) -> bool:
        file = shard_file(self.folder, shard)
        return file.exists() or (self._remote is not None and self._remote.exists(file.name))

    def _complete(self) -> set[int]:
        every = set(range(shard_count(self.manifest)))
        return every - set(missing_shards(self.folder, self.manifest))

    def _recorded(self) -> int:
        """Returns the number of trajectories in existing shards, of any writer."""
        return sum(len(shard_rows(self.manifest, shard)) for shard in self._complete())

    def _take(self, shard: int, count: _Count) -> bool:
        """Computes a shard unless it exists or is claimed; returns whether it did."""
        if self._exists(shard):
            return False
        claim = Claim(self.folder, shard)
        if not claim.take():
            return False
        with claim.held():
            if not self._exists(shard):
                before = count.last  # others' shards are counted when the folder is listed again
                self.make(shard, lambda rows: count.set(before + rows))
        return True

    def make(self, shard: int, on_batch: Callable[[int], object] = lambda rows: None) -> Path:
        """Integrates the trajectories of a shard and writes it, also over an existing one.

        Interrupted, it writes the batches that are complete beside the shards, and begins there the next time.

        Arguments:
            shard: Its number.
            on_batch: Called after each batch, with the number of trajectories so far.
        """
        rows = shard_rows(self.manifest, shard)
        values = self.conditions(rows)
        size = self.manifest.batch_size
        parts = read_partial(self.folder, self.manifest, shard)
        try:
            states = self.follow(rows, values, batch_size=size, on_batch=on_batch, parts=parts)
        except KeyboardInterrupt:
            if parts:
                with unbroken():  # schedulers send SIGTERM more than once
                    write_partial(self.folder, self.manifest, shard, torch.cat(parts))
            raise
        tensors = {"states": states, "index": torch.tensor(rows, dtype=torch.int64)}
        tensors |= {f"condition.{name}": value for name, value in values.items()}
        written = write_shard(self.folder, self.manifest, shard, tensors)
        partial_file(self.folder, shard).unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.put(written, written.name)
            written.unlink()
        return written

    def conditions(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Returns the conditions of some trajectories, by their rules."""
        values = {}
        for name, rule in self.rules.items():
            if rule is None:
                raise ValueError(
                    f"the values of the condition {name!r} are not in the manifest; give them to "
                    "fewstep.record once more"
                )
            values[name] = rule.at(rows, seed=self.manifest.seed, name=name)
        return values

    def follow(
        self,
        rows: Sequence[int],
        values: Mapping[str, Tensor],
        *,
        batch_size: int | None = None,
        on_batch: Callable[[int], object] = lambda rows: None,
        parts: list[Tensor] | None = None,
    ) -> Tensor:
        r"""Integrates some trajectories under given conditions.

        Arguments:
            rows: Their numbers.
            values: Their conditions, a row for each.
            batch_size: The trajectories in one network evaluation; left out, all.
            on_batch: Called after each batch, with the number of trajectories so far.
            parts: The states of the first of them, which are known; the others are added, batch by batch.

        Returns:
            The states, (B, S, \*), in the store's type, on the CPU.
        """
        dtype = DTYPES[self.manifest.dtype]
        place = {row: index for index, row in enumerate(rows)}

        def rounded(start: Tensor, batch: Sequence[int]) -> Tensor:
            # The stored trajectory is that of the rounded start.
            start = start.to(dtype).float()
            self._check(start[None], batch)
            return start

        parts = [] if parts is None else parts
        left = rows[sum(map(len, parts)) :]
        for batch, trajectory in run_batches(
            self.sampler,
            left,
            seed=self.manifest.seed,
            conditions=ConditionsAt(lambda batch: select(values, [place[row] for row in batch])),
            batch_size=batch_size or max(1, len(left)),
            adjust=rounded,
            save=True,
            times=self.manifest.times,
        ):
            assert trajectory.states is not None
            states = trajectory.states.to(dtype)
            self._check(states, batch)
            parts.append(states.transpose(0, 1).cpu().contiguous())
            on_batch(sum(map(len, parts)))
        return torch.cat(parts)

    def _check(self, states: Tensor, rows: Sequence[int]) -> None:
        finite = states.isfinite().flatten(2).all(2)
        if not bool(finite.all()):
            frame, place = (~finite).nonzero()[0].tolist()
            dtype = self.manifest.dtype
            most = torch.finfo(DTYPES[dtype]).max
            raise ValueError(
                f"state {frame} of trajectory {rows[place]} does not fit into {dtype}, whose "
                f"largest number is {most:g}; record with dtype float32"
            )

    def _sweep(self) -> None:
        """Removes leftovers of killed writers; others may be writing now."""
        claims = self.folder / CLAIMS
        for path in claims.glob("*"):
            if path.name.isdigit():
                Claim(self.folder, int(path.name)).sweep()
        # Without a claim nobody writes a shard; a manifest may be written by one who begins.
        alone = not any(path.name.isdigit() for path in claims.glob("*"))
        for path in [*self.folder.glob(PATTERN), *claims.glob(PATTERN)]:
            if not LITTER.fullmatch(path.name):
                continue
            dead = path.parent == claims and Lock(path).is_alive() is False
            safe = path.parent == self.folder and target_of(path.name) != MANIFEST
            if dead or (alone and safe) or self._is_old(path):
                path.unlink(missing_ok=True)
        for shard in self._complete():
            partial_file(self.folder, shard).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            claims.rmdir()  # if there are no claims

    def _is_old(self, path: Path) -> bool:
        """Returns whether a file has not changed for long, by this machine's monotonic clock."""
        try:
            about = path.stat()
        except OSError:
            return False  # another writer was faster
        state = about.st_mtime_ns, about.st_size
        before, since = self._seen.get(path, (None, 0.0))
        if before != state:
            self._seen[path] = state, time.monotonic()
            return False
        return time.monotonic() - since > PATIENCE


def writer_of(denoiser: Denoiser, folder: Path, manifest: Manifest) -> Writer:
    """Returns the writer that a manifest describes.

    Raises:
        ValueError: If it was begun with another model, or its conditions are not in the manifest.
    """
    denoiser, _ = unguided(denoiser, manifest.guidance)
    if denoiser.fingerprint() != manifest.fingerprint:
        raise ValueError(
            f"{str(folder)!r} was recorded with another model (its fingerprint differs)"
        )
    if wrappers(denoiser) != manifest.wrappers:
        raise ValueError(
            f"{str(folder)!r} was recorded with {manifest.wrappers} around the model, now there "
            f"is {wrappers(denoiser)}"
        )
    recipe = SamplerRecipe.from_record(manifest.sampler)
    rules = {name: from_record(rule) for name, rule in manifest.conditions.items()}
    return Writer(folder, manifest, recipe.build(denoiser), rules)


def unguided(denoiser: Denoiser, guidance: float | None) -> tuple[Denoiser, float | None]:
    """Returns the model without the guidance around it, and its scale: a canonical form.

    Raises:
        ValueError: If the model is guided already, with another scale.
    """
    if not isinstance(denoiser, Guided):
        return denoiser, None if guidance == 1 else guidance
    if guidance not in (None, denoiser.scale):
        raise ValueError(
            f"the model is guided with scale {denoiser.scale:g}, the trajectories with {guidance:g}"
        )
    return denoiser.inner, denoiser.scale


def wrappers(denoiser: Denoiser) -> list[dict[str, Any]]:
    """Returns the wrappers around the model, from the outside in: they are not in its fingerprint."""
    result: list[dict[str, Any]] = []
    while isinstance(denoiser, (Clipped, Thresholded, Guided)):
        options = {
            key: value
            for key in ("scale", "low", "high", "quantile", "limit")
            if (value := getattr(denoiser, key, None)) is not None
        }
        result.append({"kind": type(denoiser).__name__.lower(), **options})
        denoiser = denoiser.inner
    return result

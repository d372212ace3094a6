r"""Verification of a store: checksums, structure, and some trajectories integrated again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.base.paths import check_path
from fewstep.base.staging import opened
from fewstep.base.urls import is_remote
from fewstep.models.denoiser import Denoiser
from fewstep.trajectories.manifest import DTYPES, Manifest, read_manifest, shard_count, shard_rows
from fewstep.trajectories.shards import check_shard, local_shard
from fewstep.trajectories.store import TrajectoryStore, missing_shards
from fewstep.trajectories.writing import writer_of

NETWORK_ERROR = 1e-4
"""The tolerated relative error of a network's rounding, in another batch or on another device."""


@dataclass(frozen=True)
class Verification:
    r"""The result of :func:`verify`.

    Attributes:
        shards: The number of shards of a complete store.
        missing: The missing shards.
        damaged: The damaged shards, each with the reason.
        integrated: The trajectories integrated again.
        error: The largest relative root mean square difference of one of their states to the stored
            one, or ``None``.
        allowed: The tolerance: 4 units of the type, and 1e-4 for the network.
    """

    shards: int
    missing: tuple[int, ...]
    damaged: Mapping[int, str]
    integrated: tuple[int, ...]
    error: float | None
    allowed: float

    @property
    def sound(self) -> bool:
        """Whether nothing is missing, damaged or different."""
        same = self.error is None or self.error <= self.allowed
        return not self.missing and not self.damaged and same


def verify(
    folder: str | Path, denoiser: Denoiser | None = None, *, n: int = 4, seed: int = 0
) -> Verification:
    """Checks a store: reads every shard, and integrates some trajectories again.

    Arguments:
        folder: The folder of the store.
        denoiser: The model that recorded it; left out, nothing is integrated.
        n: The number of trajectories to integrate again.
        seed: The seed of their choice.

    Raises:
        ValueError: If there is no store, or it was recorded with another model.
    """
    check_path(folder, "folder")
    folder = opened(folder) if is_remote(folder) else Path(folder)
    manifest = read_manifest(folder)
    writer = None if denoiser is None else writer_of(denoiser, folder, manifest)
    missing = missing_shards(folder, manifest)
    damaged = {}
    for shard in sorted(set(range(shard_count(manifest))) - set(missing)):
        local_shard(folder, shard)
        problem = check_shard(folder, manifest, shard)
        if problem is not None:
            damaged[shard] = problem
    allowed = 4 * torch.finfo(DTYPES[manifest.dtype]).eps + NETWORK_ERROR
    bad = {*missing, *damaged}
    rows = [] if writer is None else _rows_to_check(manifest, bad, n, seed)
    error = None
    if writer is not None and rows:
        stored = TrajectoryStore(folder, manifest).read(rows)
        integrated = writer.follow(rows, stored.conditions).float()
        error = _largest(integrated, stored.states)
    return Verification(
        shard_count(manifest), tuple(missing), damaged, tuple(rows), error, allowed
    )


def _rows_to_check(manifest: Manifest, bad: set[int], n: int, seed: int) -> list[int]:
    """Returns random trajectories of intact shards."""
    good = [shard for shard in range(shard_count(manifest)) if shard not in bad]
    if not good:
        return []
    chance = random.Random(seed)
    rows = {chance.choice(shard_rows(manifest, chance.choice(good))) for _ in range(n)}
    return sorted(rows)


def _largest(a: Tensor, b: Tensor) -> float:
    error = (a - b).flatten(2).double().square().mean(2).sqrt()
    size = b.flatten(2).double().square().mean(2).sqrt()
    return float((error / size.clamp_min(1e-12)).max())

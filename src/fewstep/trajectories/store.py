r"""Reading a store of trajectories: memory-mapped, in any order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fewstep.base.paths import check_path
from fewstep.base.staging import opened, remote_of
from fewstep.base.urls import is_remote
from fewstep.diffusion.noise import generator_at
from fewstep.trajectories.conditions import TYPES
from fewstep.trajectories.manifest import DTYPES, Manifest, read_manifest, settings, shard_count
from fewstep.trajectories.shards import Shard, check_shard, local_shard, open_shard, shard_file


@dataclass(frozen=True)
class Batch:
    r"""Some trajectories.

    Attributes:
        states: The states, with shape (B, S, \*), float32; state 0 is :math:`x_T`.
        conditions: The conditions by name, each with shape (B, \*).
    """

    states: Tensor
    conditions: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TrajectoryStore:
    """Trajectories on disk, written by :func:`fewstep.record`; open one with :meth:`open`.

    Attributes:
        folder: Its folder.
        manifest: Its settings: model, sampler, times, seed, type, conditions.
    """

    folder: Path
    manifest: Manifest
    _shards: dict[int, Shard] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> TrajectoryStore:
        """Opens a store.

        Arguments:
            folder: The folder, or its URL (``s3://bucket/store``): shards are then copied when they are first read.

        Raises:
            ValueError: If there is none, its manifest is damaged, or shards are missing.
        """
        check_path(folder, "folder")
        folder = opened(folder) if is_remote(folder) else Path(folder)
        manifest = read_manifest(folder)
        missing = missing_shards(folder, manifest)
        if missing:
            raise ValueError(
                f"the store {str(folder)!r} is not finished: {len(missing)} of "
                f"{shard_count(manifest)} shards are missing, the first is {missing[0]}; "
                "give the command that began it again"
            )
        return cls(folder, manifest)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the trajectories, as a JSON object."""
        return settings(self.manifest)

    def __len__(self) -> int:
        return self.manifest.n

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path | str]]:
        # Another process maps the files itself; pickled maps would be copies.
        remote = remote_of(self.folder)
        return TrajectoryStore.open, (self.folder if remote is None else remote.url,)

    @property
    def times(self) -> Tensor:
        """The times of the states, float64, with shape (S), decreasing."""
        return torch.tensor(self.manifest.times, dtype=torch.float64)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one state."""
        return tuple(self.manifest.event_shape)

    def read(
        self, indices: Sequence[int] | Tensor, *, frames: Sequence[int] | None = None
    ) -> Batch:
        r"""Returns some trajectories, in the given order.

        Arguments:
            indices: The numbers of the trajectories, with shape (B).
            frames: The indices of the states to return; left out, all S.

        Raises:
            IndexError: If there is no such trajectory or state.
            ValueError: If a shard is damaged; its checksum is verified when it is first read.
        """
        numbers = torch.as_tensor(indices).tolist()
        if not all(type(i) is int and 0 <= i < len(self) for i in numbers):
            raise IndexError(f"the trajectories have the numbers 0 to {len(self) - 1}")
        dtype, places = DTYPES[self.manifest.dtype], len(self.manifest.times)
        size = int(numpy.prod(self.event_shape, dtype=numpy.int64)) * dtype.itemsize
        chosen = list(range(places)) if frames is None else list(frames)
        if not all(0 <= k < places for k in chosen):
            raise IndexError(f"the states have the numbers 0 to {places - 1}, got {chosen}")
        per_shard = self.manifest.shard_size
        buffer = torch.empty(len(numbers) * len(chosen) * size, dtype=torch.uint8)
        states = buffer.numpy().reshape(len(numbers), len(chosen) * size)
        rows = [(self._shard(i // per_shard), i % per_shard) for i in numbers]
        for place, (shard, row) in enumerate(rows):
            if frames is None:
                states[place] = shard.states[row]
            else:
                states[place] = shard.states[row].reshape(places, size)[chosen].reshape(-1)
        conditions = {
            name: _gather(rows, name, about) for name, about in self.manifest.conditions.items()
        }
        shape = (len(numbers), len(chosen), *self.event_shape)
        return Batch(buffer.view(dtype).reshape(shape).float(), conditions)

    def order(self, *, seed: int, epoch: int, window: int = 8) -> Tensor:
        r"""Returns all numbers in the order of an epoch, int64, with shape (n).

        The shards are permuted, and the trajectories inside of windows of shards: so a disk reads
        large pieces, and few shards are in use at a time. It depends on (seed, epoch) alone.

        Arguments:
            seed: The seed.
            epoch: The number of the epoch.
            window: The number of shards in a window.
        """
        generator = generator_at(seed, epoch, "order")
        size, n = self.manifest.shard_size, len(self)
        shards = torch.randperm(shard_count(self.manifest), generator=generator)
        pieces = []
        for some in shards.split(window):
            rows = (some[:, None] * size + torch.arange(size)).flatten()
            rows = rows[rows < n]
            pieces.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(pieces)

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            # Once per file and process: reading all of it also fills the page cache.
            local_shard(self.folder, number)
            problem = check_shard(self.folder, self.manifest, number)
            if problem is not None:
                path = shard_file(self.folder, number)
                raise ValueError(
                    f"{str(path)!r} is damaged ({problem}); give the command that recorded it again"
                )
            self._shards[number] = open_shard(self.folder, self.manifest, number)
        return self._shards[number]


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Returns the numbers of the missing shards."""
    # One listing: with 10^5 shards on a network file system a look at each is minutes.
    names = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set[str]()
    if (remote := remote_of(folder)) is not None:
        names |= remote.sizes().keys()
    return [s for s in range(shard_count(manifest)) if shard_file(folder, s).name not in names]


def store_bytes(folder: Path, manifest: Manifest) -> int:
    """Returns the size of all shards, in bytes."""
    files = [shard_file(folder, shard) for shard in range(shard_count(manifest))]
    remote = remote_of(folder)
    if remote is None:
        return sum(file.stat().st_size for file in files)
    sizes = remote.sizes()
    return sum(sizes[file.name] for file in files)


def _gather(rows: Sequence[tuple[Shard, int]], name: str, about: Mapping[str, Any]) -> Tensor:
    dtype, shape = TYPES[about["dtype"]], tuple(about["shape"])
    size = int(numpy.prod(shape, dtype=numpy.int64)) * dtype.itemsize
    buffer = torch.empty(len(rows) * size, dtype=torch.uint8)
    values = buffer.numpy().reshape(len(rows), size)
    for place, (shard, row) in enumerate(rows):
        values[place] = shard.conditions[name][row]
    return buffer.view(dtype).reshape(len(rows), *shape)

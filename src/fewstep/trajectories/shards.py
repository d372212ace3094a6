"""One shard of a store: a safetensors file with its checksum inside, written atomically, memory-mapped.

It holds ``states`` [n, S, *] in the store's type (x_T is state 0), ``index`` [n] (the numbers of the
trajectories) and a tensor ``condition.NAME`` [n, *] for each condition. Its metadata name the shard,
the settings of the store, and the SHA-256 of the tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from fewstep.base.files import loads_json, read_tensors_and_metadata, write_tensors
from fewstep.base.staging import remote_of
from fewstep.trajectories.conditions import TYPES
from fewstep.trajectories.manifest import DTYPES, Manifest, settings_hash, shard_rows

METADATA = "fewstep"
MOST_HEADER = 1 << 20
"""The longest header of a shard, in bytes; a guard against hostile files."""

_CODES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}
_BLOCK = 1 << 22


class Part(NamedTuple):
    """The type and shape of one tensor of a shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """The tensors of a shard as bytes mapped to memory.

    Attributes:
        states: The states, with shape (n, bytes of one trajectory).
        conditions: For each condition its values, with shape (n, bytes of one value).
    """

    states: numpy.ndarray
    conditions: Mapping[str, numpy.ndarray]


def shard_file(folder: Path, shard: int) -> Path:
    """Returns the path of a shard: formed from its number, never read from a file."""
    return folder / f"shard-{shard:05d}.safetensors"


def local_shard(folder: Path, shard: int) -> Path:
    """Returns the path of a shard; that of a store with a URL is copied here when it is first needed."""
    file, remote = shard_file(folder, shard), remote_of(folder)
    if remote is not None and not file.exists() and remote.exists(file.name):
        remote.get(file.name, file)
    return file


def parts(manifest: Manifest, shard: int) -> dict[str, Part]:
    """Returns the tensors of a shard, in order of the names."""
    n = len(shard_rows(manifest, shard))
    states = (n, len(manifest.times), *manifest.event_shape)
    result = {"states": Part(DTYPES[manifest.dtype], states), "index": Part(torch.int64, (n,))}
    for name, about in manifest.conditions.items():
        result[f"condition.{name}"] = Part(TYPES[about["dtype"]], (n, *about["shape"]))
    return dict(sorted(result.items()))


def write_shard(
    folder: Path, manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]
) -> Path:
    """Writes a shard atomically; the bytes depend on the tensors and the settings alone."""
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    for name, part in parts(manifest, shard).items():
        if (contiguous[name].dtype, tuple(contiguous[name].shape)) != part:
            raise ValueError(
                f"{name} must be {part}, got {contiguous[name].dtype}, {contiguous[name].shape}"
            )
    digest = hashlib.sha256()
    for tensor in contiguous.values():
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    about = json.dumps(_about(manifest, shard, digest.hexdigest()), sort_keys=True)
    return write_tensors(shard_file(folder, shard), contiguous, {METADATA: about}, checksum=False)


def partial_file(folder: Path, shard: int) -> Path:
    """Returns the path of the first trajectories of a shard whose writer was interrupted."""
    return folder / f"partial-{shard:05d}.safetensors"


def write_partial(folder: Path, manifest: Manifest, shard: int, states: Tensor) -> Path:
    """Writes the states of the first trajectories of a shard, with a checksum."""
    about = {"settings": settings_hash(manifest), "shard": str(shard)}
    return write_tensors(partial_file(folder, shard), {"states": states}, about)


def read_partial(folder: Path, manifest: Manifest, shard: int) -> list[Tensor]:
    """Returns the states of the first trajectories of a shard; none if they are missing or do not fit."""
    if not partial_file(folder, shard).exists():
        return []
    try:
        tensors, about = read_tensors_and_metadata(partial_file(folder, shard), checksum=True)
    except ValueError:
        return []
    states, whole = tensors.get("states"), parts(manifest, shard)["states"]
    if about != {"settings": settings_hash(manifest), "shard": str(shard)} or states is None:
        return []
    fits = states.dtype == whole.dtype and tuple(states.shape[1:]) == whole.shape[1:]
    return [states] if fits and 0 < len(states) <= whole.shape[0] else []


def open_shard(folder: Path, manifest: Manifest, shard: int) -> Shard:
    """Maps a shard to memory, after a check of its header and its size.

    Raises:
        ValueError: If it is missing or does not fit the manifest.
    """
    path = shard_file(folder, shard)
    places, _ = _places(path, manifest, shard)
    whole = numpy.asarray(numpy.memmap(path, dtype=numpy.uint8, mode="r"))
    n = len(shard_rows(manifest, shard))
    arrays = {name: whole[a:b].reshape(n, -1) for name, (a, b) in places.items()}
    conditions = {
        name.removeprefix("condition."): array
        for name, array in arrays.items()
        if name.startswith("condition.")
    }
    return Shard(arrays["states"], conditions)


def check_shard(folder: Path, manifest: Manifest, shard: int) -> str | None:
    """Returns the defect of a shard, or ``None``; reads all of it, for the checksum."""
    path = shard_file(folder, shard)
    try:
        places, about = _places(path, manifest, shard)
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            for name, (start, end) in places.items():
                stream.seek(start)
                content = hashlib.sha256()
                while start < end and (block := stream.read(min(_BLOCK, end - start))):
                    digest.update(block)
                    content.update(block)
                    start += len(block)
                if name == "index":
                    rows = numpy.array(shard_rows(manifest, shard), dtype="<i8")
                    if content.digest() != hashlib.sha256(rows.data).digest():
                        return "it has the trajectories of another shard"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if digest.hexdigest() == about["sha256"] else "its checksum does not match"


def _about(manifest: Manifest, shard: int, sha256: str) -> dict[str, Any]:
    return {"shard": shard, "settings": settings_hash(manifest), "sha256": sha256}


def _places(
    path: Path, manifest: Manifest, shard: int
) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """Returns the span of each tensor in the file, and the metadata, all checked."""
    wanted = parts(manifest, shard)
    name = f"shard {path.name!r}"
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER, size - 8):
                raise ValueError(f"{name} is not a safetensors file")
            header = loads_json(stream.read(length), what=f"the header of {name}")
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    start = 8 + length
    if size != start + sum(part.bytes for part in wanted.values()):
        raise ValueError(f"{name} has {size} bytes, which does not match the manifest")
    about = _metadata(header, name)
    if {**about, "sha256": ""} != _about(manifest, shard, ""):
        raise ValueError(f"{name} belongs to another place or another store")
    if set(header) != {"__metadata__", *wanted}:
        raise ValueError(f"{name} has other tensors than the manifest")
    places = {}
    for key, part in wanted.items():
        entry = header[key]
        span = _span(entry, part.bytes, size - start)
        ours = {"dtype": _CODES[part.dtype], "shape": list(part.shape), "data_offsets": list(span)}
        if entry != ours:
            raise ValueError(f"{name}: its tensor {key!r} is not {part.dtype} {part.shape}")
        places[key] = (start + span[0], start + span[1])
    ordered = sorted(places.values())
    if any(a[1] != b[0] for a, b in itertools.pairwise(ordered)):
        raise ValueError(f"{name}: its tensors overlap")
    return places, about


def _metadata(header: Any, name: str) -> dict[str, Any]:
    entry = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(entry, dict) or set(entry) != {METADATA}:
        raise ValueError(f"{name} was not written by fewstep")
    about = loads_json(str(entry[METADATA]), what=f"the metadata of {name}")
    if not isinstance(about, dict) or not isinstance(about.get("sha256"), str):
        raise ValueError(f"{name} has no checksum")
    return about


def _span(entry: Any, length: int, most: int) -> tuple[int, int]:
    """Returns the span of a tensor if it has that length, or else one that never fits."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in offsets)
        and 0 <= offsets[0] <= offsets[1] <= most
        and offsets[1] - offsets[0] == length
    ):
        return offsets[0], offsets[1]
    return -1, -1

"""The manifest of a store of trajectories: everything that determines them, written once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch

from fewstep.base.records import MOST, Check, Digest, Positive, Record
from fewstep.trajectories.conditions import check_condition

MANIFEST = "manifest.json"

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""The types in which states can be stored."""

MOST_SHARDS = 1_000_000
"""The most files that a store may have; each is looked up by name."""

FREE = ("about",)
"""The informative fields of the manifest; the others determine the trajectories."""


Sizes = Annotated[
    list[Positive], Check(lambda value: math.prod(value) <= MOST, "a list of positive integers")
]
Times = Annotated[list[float], Check(lambda value: len(value) >= 2, "a list of numbers")]
DTypeName = Annotated[str, Check(lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}")]


class Manifest(Record, name="fewstep.trajectories", version=1, what="manifest"):
    """Everything that determines the trajectories of a store.

    Attributes:
        n: The number of trajectories.
        seed: The seed of their noise.
        dtype: The type of the stored states.
        shard_size: The number of trajectories of a file.
        batch_size: The number of trajectories in one network evaluation.
        guidance: The scale of guidance, or ``None``.
        conditions: The rules for conditions, by name.
        fingerprint: The fingerprint of the model.
        wrappers: The wrappers around the model.
        prediction: The network's prediction.
        schedule: The schedule of the model.
        event_shape: The shape of a state.
        sampler: The recipe of the sampler.
        times: The times of the stored states, decreasing.
        alpha: The scale of the data at these times.
        sigma: The deviation of the noise at these times.
        knots: Their indices among the knots of the plan, or ``None``.
        about: Informative only; the trajectories do not depend on it.
    """

    # In this order: the first field that differs is named.
    n: Positive
    seed: int
    dtype: DTypeName
    shard_size: Positive
    batch_size: Positive
    guidance: float | None
    conditions: dict[str, Any]
    fingerprint: Digest
    wrappers: list[Any]
    prediction: str
    schedule: dict[str, Any]
    event_shape: Sizes
    sampler: dict[str, Any]
    times: Times
    alpha: Times
    sigma: Times
    knots: list[Any] | None
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if any(b >= a for a, b in itertools.pairwise(self.times)):
            raise ValueError("its times must decrease strictly")
        for name in ("alpha", "sigma"):
            if (count := len(getattr(self, name))) != len(self.times):
                raise ValueError(f"it has {len(self.times)} times, but {count} values {name}")
        if shard_count(self) > MOST_SHARDS:
            raise ValueError(
                f"n = {self.n} in files of {self.shard_size} makes more than {MOST_SHARDS} files; "
                "use a larger shard_size"
            )
        for name, condition in self.conditions.items():
            check_condition(name, condition)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest of a new store, or checks that the existing one is the same.

    Returns the manifest of the store. Of several writers that begin together one writes it.

    Raises:
        ValueError: If the store was begun with other settings; the message names them.
    """
    path = folder / MANIFEST
    if not path.exists():
        try:
            manifest.save(path, new=True)
        except FileExistsError:
            pass
    stored = read_manifest(folder)
    different = difference(stored, manifest)
    if different is not None:
        raise ValueError(
            f"{str(folder)!r} was begun with other settings: {different}; give those, --overwrite "
            "(overwrite=True) to begin again, or another folder"
        )
    return stored


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        ValueError: If there is none, or it does not describe a store; the message has the reason.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a store of trajectories: it has no {MANIFEST}")
    return Manifest.load(path)


def settings(manifest: Manifest) -> dict[str, Any]:
    """Returns the settings that determine the trajectories, as a JSON object."""
    return {key: value for key, value in manifest.to_record().items() if key not in FREE}


def settings_hash(manifest: Manifest) -> str:
    """Returns a SHA-256 of the settings that determine the trajectories; every shard has it."""
    return hashlib.sha256(json.dumps(settings(manifest), sort_keys=True).encode()).hexdigest()


def shard_count(manifest: Manifest) -> int:
    """Returns the number of shards."""
    return -(-manifest.n // manifest.shard_size)


def shard_rows(manifest: Manifest, shard: int) -> range:
    """Returns the numbers of the trajectories of a shard."""
    size = manifest.shard_size
    return range(shard * size, min((shard + 1) * size, manifest.n))


def difference(before: Manifest, after: Manifest) -> str | None:
    """Returns in words the first setting in which two manifests differ, or ``None``."""
    stored, plain = (json.loads(json.dumps(one.to_record())) for one in (before, after))
    for key, new in plain.items():
        old = stored[key]
        if key in FREE or old == new:
            continue
        if key == "fingerprint":
            return "another model (its fingerprint differs)"
        if key == "sampler":
            return f"{_sampler(old)}, now {_sampler(new)}"
        if key == "conditions":
            return _condition_difference(old, new)
        return f"{key} {_short(old)}, now {_short(new)}"
    return None


def _condition_difference(old: Any, new: Any) -> str:
    name = next(k for k in sorted({*old, *new}) if old.get(k) != new.get(k))
    return f"condition {name} {_short(old.get(name))}, now {_short(new.get(name))}"


def _sampler(recipe: Any) -> str:
    if not isinstance(recipe, dict):
        return "another sampler"
    rows = recipe.get("plan", {}).get("rows", ())
    nfe = sum("eval" in row for row in rows)
    options = f" with {recipe['options']}" if recipe.get("options") else ""
    return f"{recipe.get('name')}{f' of {nfe} evaluations' if nfe else ''}{options}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The manifest of a store of trajectories: everything that determines them, written once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.base.files import read_json, write_json
from fewstep.trajectories.conditions import check_condition

FORMAT, VERSION = "fewstep.trajectories", 1
MANIFEST = "manifest.json"

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""The types in which states can be kept."""

MOST = 10**12
"""The largest count that a manifest may name; a guard against hostile files."""

MOST_SHARDS = 1_000_000
"""The most files that a store may have; their names are looked up one by one."""

FREE = ("about",)
"""What the manifest says for readers only; the rest determines the trajectories."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a new store, or checks that the one that is there is the same.

    Returns the manifest of the store. Of many writers that begin together one writes it.

    Raises:
        ValueError: If the store was begun with other settings; the message names them.
    """
    path = folder / MANIFEST
    if not path.exists():
        try:
            write_json(path, manifest, new=True)
        except FileExistsError:
            pass
    found = read_manifest(folder)
    different = difference(found, manifest)
    if different is not None:
        raise ValueError(
            f"{str(folder)!r} was begun with other settings: {different}; give those, --overwrite "
            "(overwrite=True) to begin anew, or another folder"
        )
    return found


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads and checks a manifest.

    Raises:
        ValueError: If there is none, or it does not describe a store; the message says why.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no store of trajectories: it has no {MANIFEST}")
    content = read_json(path, what="manifest")
    try:
        _check(content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"manifest {str(path)!r}: {error}") from None
    return content


def settings_hash(manifest: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of what determines the trajectories; every shard bears it."""
    content = {key: value for key, value in manifest.items() if key not in FREE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shard_count(manifest: Mapping[str, Any]) -> int:
    """Returns the number of shards."""
    return -(-manifest["n"] // manifest["shard_size"])


def shard_rows(manifest: Mapping[str, Any], shard: int) -> range:
    """Returns the numbers of the trajectories of a shard."""
    size = manifest["shard_size"]
    return range(shard * size, min((shard + 1) * size, manifest["n"]))


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Returns in words the first setting in which two manifests differ, or ``None``."""
    plain = json.loads(json.dumps(after))
    for key in KEYS:
        old, new = before.get(key), plain.get(key)
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
    calls = sum("eval" in row for row in rows)
    options = f" with {recipe['options']}" if recipe.get("options") else ""
    return f"{recipe.get('name')}{f' of {calls} calls' if calls else ''}{options}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _floats(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(_finite(v) for v in value)


def _hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _shape(value: Any) -> bool:
    return isinstance(value, list) and all(_count(v) for v in value) and math.prod(value) <= MOST


KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: v == FORMAT, repr(FORMAT)),
    "version": (lambda v: v == VERSION, f"{VERSION}, which this fewstep reads"),
    "n": (_count, "a positive integer"),
    "seed": (_whole, "an integer"),
    "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "shard_size": (_count, "a positive integer"),
    "batch_size": (_count, "a positive integer"),
    "guidance": (lambda v: v is None or _finite(v), "a number or null"),
    "conditions": (lambda v: isinstance(v, dict), "an object"),
    "fingerprint": (_hash, "64 hexadecimal digits"),
    "wrappers": (lambda v: isinstance(v, list), "a list"),
    "prediction": (lambda v: isinstance(v, str), "a text"),
    "schedule": (lambda v: isinstance(v, dict), "an object"),
    "event_shape": (_shape, "a list of positive integers"),
    "sampler": (lambda v: isinstance(v, dict), "a recipe"),
    "times": (_floats, "a list of numbers"),
    "alpha": (_floats, "a list of numbers"),
    "sigma": (_floats, "a list of numbers"),
    "knots": (lambda v: v is None or isinstance(v, list), "a list or null"),
    "about": (lambda v: isinstance(v, dict), "an object"),
}
"""What a manifest says, the first to be compared first; and how it is checked."""


def _check(content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"it must be a JSON object, got {type(content).__name__}")
    for key, (fits, wanted) in KEYS.items():
        if key not in content:
            raise ValueError(f"it has no {key!r}")
        if not fits(content[key]):
            raise ValueError(f"{key!r} must be {wanted}, got {content[key]!r:.60}")
    if unknown := sorted(set(content) - set(KEYS)):
        raise ValueError(f"it has an unknown key {unknown[0]!r:.60}")
    times = content["times"]
    if any(b >= a for a, b in itertools.pairwise(times)):
        raise ValueError("its times must decrease strictly")
    for key in ("alpha", "sigma"):
        if len(content[key]) != len(times):
            raise ValueError(f"it has {len(times)} times, but {len(content[key])} values {key}")
    if shard_count(content) > MOST_SHARDS:
        raise ValueError(
            f"n = {content['n']} in files of {content['shard_size']} makes more than {MOST_SHARDS} "
            "files; take a larger shard_size"
        )
    for name, condition in content["conditions"].items():
        check_condition(name, condition)

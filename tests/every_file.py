"""One of every kind of file that fewstep writes, how each is read again, and damages of it."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load

import fewstep
from fewstep.base.files import CHECKSUM, write_json, write_tensors
from fewstep.base.progress import Silent
from fewstep.base.runs import RunFolder
from fewstep.comparison import compare
from fewstep.metrics.features import Features, write_features
from fewstep.metrics.reference import Reference
from fewstep.models.folder import read_model
from fewstep.models.networks.classifier import SmallClassifier
from fewstep.operators.folder import read_operator
from fewstep.plans.plan import Plan
from fewstep.sampling.profile import GRIDS_FORMAT, Profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.trajectories import TrajectoryStore
from tiny_models import write_tiny
from tiny_training import RECIPE, images

SEARCH = {
    "pairs": 4,
    "heldout": 4,
    "test": 4,
    "teacher_nfe": 4,
    "steps": 2,
    "batch_size": 2,
    "evaluate_every": 1,
}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Its name.
        make: Writes files of it, among others, into an empty folder.
        files: The files to damage, relative to the folder.
        read: Uses the files as fewstep does; returns a digest of all that was used.
        again: Whether what is damaged is computed again; else reading it is an error.
    """

    name: str
    make: Callable[[Path], object]
    files: Sequence[str]
    read: Callable[[Path], str]
    again: bool = False


def digest(value: Any) -> str:
    """Returns a digest of tensors, arrays, or JSON values, nested."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, dict):
            for key in sorted(part):
                found.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for one in part:
                add(one)
        else:
            found.update(json.dumps(part, sort_keys=True, default=str).encode())

    add(value)
    return found.hexdigest()


class Stop(Silent):
    """Interrupts work after some ticks."""

    def __init__(self, ticks: int) -> None:
        self.left = ticks

    def tick(self, amount: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@functools.cache
def mixture() -> Any:
    return fewstep.load("mixture-smooth")


# --- samplers -----------------------------------------------------------------------------------


def _plan(folder: Path) -> None:
    fewstep.plan("tab2", fewstep.schedule("vp-linear"), nfe=4).save(folder / "plan.json")


def _recipe(folder: Path) -> None:
    resolved = fewstep.resolve(mixture(), fewstep.SamplerRequest("unipc2", nfe=4))
    resolved.recipe.save(folder / "recipe.json")


def _profile(folder: Path) -> None:
    fewstep.fit(mixture(), nfe=(3, 4), n=4).save(folder / "profile.json")


def _grids(folder: Path) -> None:
    """The format of early versions, without a checksum of its own until it is written here."""
    content = fewstep.fit(mixture(), nfe=(3,), n=4).to_record()
    grids = [
        {k: v for k, v in e.items() if k in ("solver", "steps", "times")}
        for e in content["entries"]
    ]
    plain = {k: content[k] for k in ("schedule", "fingerprint", "recommended")}
    write_json(
        folder / "grid.json", {"format": GRIDS_FORMAT, "version": 1, **plain, "grids": grids}
    )


# --- runs ---------------------------------------------------------------------------------------


def _run(folder: Path) -> RunFolder:
    return RunFolder(folder, "run of fewstep sample", outputs=["samples.safetensors"])


def _begun(folder: Path) -> None:
    run = _run(folder)
    with run.running({"seed": 0, "model": "m"}):
        run.write_tensors("000", {"samples": torch.arange(12.0).reshape(3, 4)})
        run.write_record("advice", {"nfe": [4, 5], "error": 0.25})


def _resumed(folder: Path) -> str:
    run = _run(folder)
    with run.running({"seed": 0, "model": "m"}):
        tensors = run.read_tensors("000")
        if tensors is None:
            tensors = {"samples": torch.arange(12.0).reshape(3, 4)}
        return digest([tensors, run.record("advice", lambda: {"nfe": [4, 5], "error": 0.25})])


# --- comparison ---------------------------------------------------------------------------------


def _compare(folder: Path, **options: Any) -> Any:
    settings = {"nfe": [2], "folder": folder / "out", "n": 4, "reference_nfe": 3, "shown": 2}
    return compare(mixture(), "ddim,tab1", **(settings | options))


def _compared(folder: Path) -> str:
    result = _compare(folder, extend=True)
    cells = [cell.to_record() | {"seconds_per_image": 0} for cell in result.cells]
    tensors = [result.store.tensors(cell) for cell in result.cells]
    return digest([cells, tensors])


def _half_compared(folder: Path) -> None:
    try:
        _compare(folder, progress=Stop(4))
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


# --- search -------------------------------------------------------------------------------------


def _tune(folder: Path, progress: Any = None) -> Any:
    return fewstep.tune(
        mixture(),
        nfe=2,
        objective="endpoint",
        search=SEARCH,
        out=folder / "tuned.json",
        keep_worse=True,
        progress=progress,
    )


class StopSearch(Stop):
    """Interrupts the search itself, after its first step."""

    def __init__(self) -> None:
        super().__init__(10**9)

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        if name.startswith("search"):
            self.left = 1


def _half_tuned(folder: Path) -> None:
    try:
        _tune(folder, StopSearch())
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def _tuned(folder: Path) -> str:
    return digest(_tune(folder).recipe.to_record())


def _whole_tuned(folder: Path) -> None:
    _tune(folder)
    shutil.rmtree(folder / "tuned.search")


# --- trajectories and operators -----------------------------------------------------------------


def _record(folder: Path) -> None:
    model = fewstep.load(str(write_tiny(folder / "model")), device="cpu")
    fewstep.record(
        model, folder / "store", n=12, shard_size=4, solver="ddim", nfe=4, keep=2, class_labels=1
    )


def _read_store(folder: Path) -> str:
    store = TrajectoryStore.open(folder / "store")
    batch = store.read(range(len(store)))
    return digest([batch.states, dict(batch.conditions)])


def _distill(folder: Path, progress: Any = None) -> Any:
    model = fewstep.load(str(folder / "model"), device="cpu")
    return fewstep.distill(
        model,
        folder / "store",
        folder / "operator",
        mode="endpoint",
        steps=4,
        batch_size=2,
        checkpoint_every=2,
        progress=progress,
    )


def _half_distilled(folder: Path) -> None:
    _record(folder)
    try:
        _distill(folder, Stop(2))
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def _distilled(folder: Path) -> str:
    model = _distill(folder)
    log = [json.loads(row) for row in (folder / "operator" / "log.jsonl").read_text().splitlines()]
    return digest([model.operator.state_dict(), log])


def _operator(folder: Path) -> None:
    _record(folder)
    _distill(folder)


def _read_operator(folder: Path) -> str:
    model = read_operator(folder / "operator")
    about = dict(model.about)
    return digest([about, model.operator.state_dict()])


# --- training -----------------------------------------------------------------------------------


def _train(folder: Path, progress: Any = None) -> Any:
    return fewstep.train(images(), folder / "run", RECIPE, checkpoint_every=2, progress=progress)


def _half_trained(folder: Path) -> None:
    try:
        _train(folder, Stop(3))
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def _trained(folder: Path) -> str:
    _train(folder)
    return _read_model(folder / "run")


def _read_model(folder: Path) -> str:
    model = read_model(folder, torch.float32)
    return digest([dict(model.about), model.state_dict(), model.data_range])


# --- metrics ------------------------------------------------------------------------------------


def _data(folder: Path) -> Path:
    file = folder / "data.npz"
    if not file.exists():
        pixels = numpy.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=numpy.uint8)
        numpy.savez(file, images=pixels)
    return file


def _reference(folder: Path) -> str:
    found = Reference.load(_data(folder), "pixels", cache=folder / "cache")
    return digest([found.features, found.heldout, list(found.statistics), found.sha256])


def _features(folder: Path) -> None:
    torch.manual_seed(0)
    write_features(folder / "features", SmallClassifier(width=2, num_classes=3), {})


def _read_features(folder: Path) -> str:
    module = Features.load(folder / "features").module
    assert module is not None
    return digest(dict(module.state_dict()))


KINDS = [
    Kind("plan", _plan, ["plan.json"], lambda f: digest(Plan.load(f / "plan.json").to_record())),
    Kind(
        "recipe",
        _recipe,
        ["recipe.json"],
        lambda f: digest(SamplerRecipe.load(f / "recipe.json").to_record()),
    ),
    Kind(
        "profile",
        _profile,
        ["profile.json"],
        lambda f: digest(Profile.load(f / "profile.json").to_record()),
    ),
    Kind(
        "grids", _grids, ["grid.json"], lambda f: digest(Profile.load(f / "grid.json").to_record())
    ),
    Kind("run", _begun, ["unfinished.json"], _resumed),
    Kind("parts", _begun, ["parts/000.safetensors", "parts/advice.json"], _resumed, again=True),
    Kind("comparison", _compare, ["out/comparison.json"], _compared),
    Kind(
        "cells", _compare, ["out/cells/*.json", "out/cells/*.safetensors"], _compared, again=True
    ),
    Kind("batches", _half_compared, ["out/cells/*.parts/*"], _compared, again=True),
    Kind(
        "tuned recipe",
        _whole_tuned,
        ["tuned.json"],
        lambda f: digest(SamplerRecipe.load(f / "tuned.json").to_record()),
    ),
    Kind(
        "search",
        _half_tuned,
        ["tuned.search/search.json", "tuned.search/state.safetensors"],
        _tuned,
    ),
    Kind("teacher", _half_tuned, ["tuned.search/teacher-*"], _tuned, again=True),
    Kind("store", _record, ["store/manifest.json", "store/shard-00001.safetensors"], _read_store),
    Kind("model", lambda f: write_tiny(f), ["model.json", "model.safetensors"], _read_model),
    Kind(
        "training", _half_trained, ["run/checkpoint.json", "run/checkpoint.safetensors"], _trained
    ),
    Kind(
        "distilling",
        _half_distilled,
        ["operator/checkpoint.json", "operator/checkpoint.safetensors"],
        _distilled,
    ),
    Kind("log", _half_distilled, ["operator/log.jsonl"], _distilled, again=True),
    Kind(
        "operator",
        _operator,
        ["operator/operator.json", "operator/operator.safetensors"],
        _read_operator,
    ),
    Kind("reference", _reference, ["cache/*/*"], _reference, again=True),
    Kind("features", _features, ["features/*"], _read_features),
]


# --- damages ------------------------------------------------------------------------------------


def damages(
    content: bytes, name: str, *, bits: int, seed: int = 0
) -> Iterator[tuple[str, bytes | None]]:
    """Yields damaged contents of a file with their names; ``None`` is a missing file."""
    chance = random.Random(f"{seed} {name}")
    for _ in range(bits):
        place = chance.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        yield f"bit {place}", bytes(flipped)
    for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
        yield f"cut to {length}", content[:length]
    yield "garbage", b"\x80\x04\x95garbage" * 40
    yield "zeros", bytes(len(content))
    yield "missing", None
    if name.endswith(".json"):
        value = json.loads(content)
        for key in value:
            if key != CHECKSUM:
                rest = {k: v for k, v in value.items() if k != key}
                yield f"without {key}", json.dumps(rest).encode()
        for edited in ("null", "[]", "{}", "3", '"text"'):
            yield edited, edited.encode()
    if name.endswith(".safetensors"):
        yield from _fewer_tensors(content)


def _fewer_tensors(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields files without some tensors, whose checksum is right: written so, not damaged."""
    import tempfile

    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    metadata.pop(CHECKSUM, None)
    groups = sorted({key.split(".")[0] for key in tensors})
    if len(groups) < len(tensors):
        groups += [sorted(tensors)[0], sorted(tensors)[-1]]
    with tempfile.TemporaryDirectory() as temporary:
        for group in groups:
            rest = {k: v for k, v in tensors.items() if k != group and k.split(".")[0] != group}
            file = write_tensors(Path(temporary) / "t.safetensors", rest, metadata)
            yield f"no tensor {group}", file.read_bytes()
        file = write_tensors(Path(temporary) / "t.safetensors", tensors, {})
        yield "no metadata", file.read_bytes()
        other = {k: v.flatten()[:-1] if v.numel() > 1 else v for k, v in tensors.items()}
        file = write_tensors(Path(temporary) / "t.safetensors", other, metadata)
        yield "other shapes", file.read_bytes()

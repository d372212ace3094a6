"""One of every kind of file that fewstep writes, how each is read again, and damages of it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from PIL import Image
from safetensors.torch import load

import fewstep
from fewstep.base.files import write_atomic, write_json, write_tensors
from fewstep.base.runs import RunFolder
from fewstep.base.sealing import CHECKSUM
from fewstep.base.verifying import verify_file
from fewstep.cli import run
from fewstep.comparison import compare
from fewstep.metrics.features import Features, write_features
from fewstep.metrics.reference import Reference
from fewstep.models.folder import read_model
from fewstep.models.networks.classifier import SmallClassifier
from fewstep.operators.folder import read_operator
from fewstep.plans.plan import Plan
from fewstep.reporting.page import Page
from fewstep.sampling.profile import GRIDS_FORMAT, Profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.trajectories import TrajectoryStore
from stopping import Stopping
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


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of file.

    Attributes:
        name: Its name.
        make: Writes files of it, among others, into an empty folder.
        files: The files to damage, relative to the folder.
        read: Uses the files as fewstep does; returns a digest of all that was used.
        again: Whether what is damaged is computed again; else reading it is an error.
        costly: Whether reading takes a tenth of a second or more.
        other: Writes the same files with other inputs: of another run, from which nothing may be taken.
    """

    name: str
    make: Callable[[Path], object]
    files: Sequence[str]
    read: Callable[[Path], str]
    again: bool = False
    costly: bool = False
    other: Callable[[Path], object] | None = None

    def made(self, folder: Path) -> list[Path]:
        """Makes the files; returns those to damage, relative to the folder."""
        folder.mkdir()
        self.make(folder)
        found = sorted({p.relative_to(folder) for name in self.files for p in folder.glob(name)})
        assert found, f"there is no file of {self.name}"
        return found


def digest(value: Any) -> str:
    """Returns a digest of tensors, arrays, or JSON values, nested."""
    result = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            result.update(f"{part.dtype}{tuple(part.shape)}".encode())
            result.update(
                part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        elif isinstance(part, dict):
            for key in sorted(part):
                result.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for one in part:
                add(one)
        else:
            result.update(json.dumps(part, sort_keys=True, default=str).encode())

    add(value)
    return result.hexdigest()


@functools.cache
def mixture() -> Any:
    return fewstep.load("mixture-smooth")


# --- pictures and pages -------------------------------------------------------------------------


def _picture(folder: Path, colour: int = 0) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), colour).save(buffer, "PNG")
    write_atomic(folder / "grid.png", buffer.getvalue())


def _page(folder: Path) -> None:
    page = Page("A page")
    page.paragraph("Its text.")
    page.write(folder / "report.html")


def _verified(name: str) -> Callable[[Path], str]:
    """Nothing of ours reads these, so they are verified; edited ones without a checksum are not used here."""

    def read(folder: Path) -> str:
        verdict = verify_file(folder / name, {})
        if verdict.state != "ok":
            raise ValueError(f"{str(folder / name)!r} is {verdict.state}: {verdict.reason}")
        return digest((folder / name).read_bytes().hex())

    return read


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


def _sample(folder: Path, seed: int = 0) -> None:
    fixed = ["-n", "6", "--batch-size", "2", "--nfe", "2", "--device", "cpu", "--quiet"]
    out = ["--out", str(folder / "out"), "--seed", str(seed)]
    with mock.patch.dict(os.environ, {"FEWSTEP_TRACEBACK": "1"}):
        run(["sample", "mixture-smooth", *fixed, *out])


def _half_sampled(folder: Path, seed: int = 0) -> None:
    with mock.patch.object(RunFolder, "finish", side_effect=KeyboardInterrupt):
        _sample(folder, seed)


def _sampled(folder: Path) -> str:
    _sample(folder)
    names = ("samples.safetensors", "recipe.json", "grid.png")
    return digest([(folder / "out" / name).read_bytes().hex() for name in names])


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
        _compare(folder, progress=Stopping(5, error=KeyboardInterrupt))
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


# --- search -------------------------------------------------------------------------------------


def _tune(folder: Path, progress: Any = None, seed: int = 0) -> Any:
    return fewstep.tune(
        mixture(),
        nfe=2,
        objective="endpoint",
        search=SEARCH,
        out=folder / "tuned.json",
        keep_worse=True,
        seed=seed,
        progress=progress,
    )


def _half_tuned(folder: Path, seed: int = 0) -> None:
    try:
        _tune(folder, Stopping(2, stage="search", error=KeyboardInterrupt), seed)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def _tuned(folder: Path) -> str:
    return digest(_tune(folder).recipe.to_record())


def _whole_tuned(folder: Path) -> None:
    _tune(folder)
    shutil.rmtree(folder / "tuned.search")


# --- trajectories and operators -----------------------------------------------------------------


def _record(folder: Path, seed: int = 0) -> None:
    model = fewstep.load(str(write_tiny(folder / "model", seed=seed)), device="cpu")
    settings = {"n": 12, "shard_size": 4, "solver": "ddim", "nfe": 4, "keep": 2, "class_labels": 1}
    fewstep.record(model, folder / "store", seed=seed, **settings)


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


def _half_distilled(folder: Path, seed: int = 0) -> None:
    _record(folder, seed)
    try:
        _distill(folder, Stopping(3, error=KeyboardInterrupt))
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def _distilled(folder: Path) -> str:
    model = _distill(folder)
    log = [json.loads(row) for row in (folder / "operator" / "log.jsonl").read_text().splitlines()]
    return digest([model.operator.state_dict(), log])


def _operator(folder: Path, seed: int = 0) -> None:
    _record(folder, seed)
    _distill(folder)


def _read_operator(folder: Path) -> str:
    model = read_operator(folder / "operator")
    about = dict(model.about)
    return digest([about, model.operator.state_dict()])


# --- training -----------------------------------------------------------------------------------


def _train(folder: Path, progress: Any = None, n: int = 12) -> Any:
    return fewstep.train(
        images(n=n), folder / "run", RECIPE, checkpoint_every=2, progress=progress
    )


def _half_trained(folder: Path, n: int = 12) -> None:
    try:
        _train(folder, Stopping(4, error=KeyboardInterrupt), n)
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
    result = Reference.load(_data(folder), "pixels", cache=folder / "cache")
    return digest([result.features, result.heldout, list(result.statistics), result.sha256])


def _features(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    write_features(folder / "features", SmallClassifier(width=2, num_classes=3), {})


def _read_features(folder: Path) -> str:
    module = Features.load(folder / "features").module
    assert module is not None
    return digest(dict(module.state_dict()))


def _loaded(cls: Any, name: str) -> Callable[[Path], str]:
    return lambda folder: digest(cls.load(folder / name).to_record())


def _seed_1(make: Callable[..., object], **options: Any) -> Callable[[Path], object]:
    return lambda folder: make(folder, **(options or {"seed": 1}))


SEARCH_FILES = ["tuned.search/search.json", "tuned.search/state.safetensors"]
CHECKPOINT = ["checkpoint.json", "checkpoint.safetensors"]

KINDS = [
    Kind("picture", _picture, ["grid.png"], _verified("grid.png")),
    Kind("page", _page, ["report.html"], _verified("report.html")),
    Kind("plan", _plan, ["plan.json"], _loaded(Plan, "plan.json")),
    Kind("recipe", _recipe, ["recipe.json"], _loaded(SamplerRecipe, "recipe.json")),
    Kind("profile", _profile, ["profile.json"], _loaded(Profile, "profile.json")),
    Kind("grids", _grids, ["grid.json"], _loaded(Profile, "grid.json")),
    Kind("run", _half_sampled, ["out/unfinished.json"], _sampled, costly=True),
    Kind(
        "parts",
        _half_sampled,
        ["out/parts/*"],
        _sampled,
        again=True,
        other=_seed_1(_half_sampled),
        costly=True,
    ),
    Kind("comparison", _compare, ["out/comparison.json"], _compared),
    Kind(
        "cells",
        _compare,
        ["out/cells/*.json", "out/cells/*.safetensors"],
        _compared,
        again=True,
        other=_seed_1(_compare),
        costly=True,
    ),
    Kind("batches", _half_compared, ["out/cells/*.parts/*"], _compared, again=True, costly=True),
    Kind("tuned recipe", _whole_tuned, ["tuned.json"], _loaded(SamplerRecipe, "tuned.json")),
    Kind("search", _half_tuned, SEARCH_FILES, _tuned, costly=True, other=_seed_1(_half_tuned)),
    Kind(
        "teacher",
        _half_tuned,
        ["tuned.search/teacher-*"],
        _tuned,
        again=True,
        costly=True,
        other=_seed_1(_half_tuned),
    ),
    Kind(
        "store",
        _record,
        ["store/manifest.json", "store/shard-*"],
        _read_store,
        other=_seed_1(_record),
    ),
    Kind("model", write_tiny, ["model.*"], _read_model, other=_seed_1(write_tiny)),
    Kind(
        "training",
        _half_trained,
        [f"run/{name}" for name in CHECKPOINT],
        _trained,
        costly=True,
        other=_seed_1(_half_trained, n=14),
    ),
    Kind(
        "distilling",
        _half_distilled,
        [f"operator/{name}" for name in CHECKPOINT],
        _distilled,
        costly=True,
        other=_seed_1(_half_distilled),
    ),
    Kind("log", _half_distilled, ["operator/log.jsonl"], _distilled, again=True, costly=True),
    Kind("operator", _operator, ["operator/operator.*"], _read_operator, other=_seed_1(_operator)),
    Kind("reference", _reference, ["cache/*/*"], _reference, again=True),
    Kind("features", _features, ["features/*"], _read_features, other=_seed_1(_features)),
]
"""Of every kind of file one that is read again."""


# --- damages ------------------------------------------------------------------------------------


def damages(
    content: bytes, name: str, *, bits: int, kind: Kind, seed: int = 0
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
    # Parts with a right checksum and the digest of their inputs were not written without some tensors.
    if name.endswith(".safetensors") and not kind.again:
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

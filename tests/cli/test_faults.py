"""Every command that can be resumed: a signal, a full disk, and then the result of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from fewstep.base.interrupts import Terminated
from fewstep.cli import run
from tiny_models import write_tiny

SETTINGS = ("pairs=8", "heldout=8", "test=8", "teacher_nfe=8", "batch_size=4", "evaluate_every=2")
SMALL = ["--objective", "endpoint", *(part for one in SETTINGS for part in ("--setting", one))]
MIXTURE = "mixture-smooth"

# The command, and the files of its result that must not depend on the faults.
COMMANDS = {
    "sample": (
        ["sample", MIXTURE, "-n", "6", "--batch-size", "2", "--nfe", "3"],
        ["OUT/samples.safetensors"],
    ),
    "compare": (
        [
            "compare",
            MIXTURE,
            "--solvers",
            "ddim",
            "--nfe",
            "3,4",
            "-n",
            "6",
            "--reference-nfe",
            "8",
        ],
        ["OUT/cells/*.safetensors"],
    ),
    "record": (
        ["record", MIXTURE, "-n", "6", "--shard-size", "2", "--nfe", "4"],
        ["OUT/*"],
    ),
    "fit": (["fit", MIXTURE, "--nfe", "4", "-n", "4"], ["OUT.json"]),
    "tune": (
        ["tune", MIXTURE, "--nfe", "2", "--steps", "4", "--keep-worse", *SMALL],
        ["OUT.json"],
    ),
    "train": (
        ["train", "images", "--recipe", "recipe.json", "--checkpoint-every", "2"],
        ["OUT/model.safetensors"],
    ),
    "distill": (
        ["distill", "model", "trajectories", "--steps", "4", "--checkpoint-every", "2"],
        ["OUT/operator.safetensors", "OUT/log.jsonl"],
    ),
    "analyze": (
        ["analyze", MIXTURE, "--nfe", "4", "-n", "4", "--budget", "0"],
        ["OUT/grid.json", "OUT/recipe-4.json"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a training recipe, a model and its trajectories."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "images").mkdir()
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    for number, value in enumerate(values):
        Image.fromarray(value).save(folder / "images" / f"{number}.bmp")
    network = {"channels": [8, 8], "blocks": [1, 1], "attention": [1]}
    recipe = {"network": network, "steps": 4, "batch_size": 4, "precision": "float32"}
    (folder / "recipe.json").write_text(json.dumps({**recipe, "schedule": {"name": "vp-linear"}}))
    write_tiny(folder / "model", classes=None)
    arguments = ["record", folder / "model", "--out", folder / "trajectories", "-n", "6"]
    assert run([*map(str, arguments), "--nfe", "4", "--keep", "2", "--device", "cpu"]) == 0
    return folder


class Disk:
    """Counts the files that are written; a fault happens after one of them."""

    def __init__(self, fault, at):
        self.fault, self.at, self.count = fault, at, 0
        self.replace = os.replace

    def __call__(self, temporary, path):
        self.count += 1
        if self.count == self.at and self.fault is OSError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.replace(temporary, path)
        if self.count == self.at:
            raise self.fault


def leftovers(folder, out):
    """Locks, claims and temporary files that a process has left."""
    found = [path for top in folder.glob(f"{out}*") for path in (top, *top.rglob("*"))]
    return [
        path
        for path in found
        if path.suffix in (".tmp", ".lock", ".claim") or path.parent.name == "claims"
    ]


def result(folder, out, patterns):
    def content(path):
        if path.suffix != ".json":
            return path.read_bytes()
        value = json.loads(path.read_text())
        value.pop("content_sha256", None)
        value["about"] = {k: v for k, v in value.get("about", {}).items() if k != "seconds"}
        return value

    paths = [p for pattern in patterns for p in sorted(folder.glob(pattern.replace("OUT", out)))]
    assert paths
    return {path.name.replace(out, "OUT"): content(path) for path in paths}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("tune", "analyze") else n for n in COMMANDS],
)
@pytest.mark.usefixtures("few_real_samples", "undrawn", "few_hypotheses", "coarse_references")
def test_a_signal_and_a_full_disk_change_no_result(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
    given, patterns = COMMANDS[name]

    def command(out, disk):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", disk)
            code = run(
                [
                    *given,
                    "--out",
                    patterns[0].replace("OUT", out).partition("/")[0],
                    "--device",
                    "cpu",
                ]
            )
        return code, " ".join(capsys.readouterr().err.split())

    whole, parts = f"{name}-whole", f"{name}-parts"
    assert command(whole, Disk(None, 0))[0] == 0
    # The signal comes after the second file; then the first one that is written does not fit.
    code, said = command(parts, Disk(Terminated, 2))
    assert code == 143, said
    assert "stopped: interrupted" in said
    assert f"fewstep {given[0]} {given[1]}" in said
    assert not leftovers(folder, parts)
    code, said = command(parts, Disk(OSError, 1))
    assert code == 2, said
    assert "no space left" in said.lower()
    assert not leftovers(folder, parts)
    code, said = command(parts, Disk(None, 0))
    assert code == 0, said
    assert result(folder, parts, patterns) == result(folder, whole, patterns)

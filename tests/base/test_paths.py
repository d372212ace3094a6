"""Empty paths are refused at every door, before an evaluation and before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.base.files import check_writable, read_json, write_atomic, write_json
from fewstep.base.paths import check_path
from fewstep.cli._remote import local_arguments
from fewstep.metrics import Features, Reference
from fewstep.plans.plan import Plan
from fewstep.sampling.profile import Profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.training.data import read_images
from fewstep.training.train import export_checkpoint, train
from fewstep.trajectories import TrajectoryStore, resume, verify

UNUSED: Any = None


def test_what_is_a_path():
    for path in (None, ".", "name", Path(), "s3://bucket/run"):
        check_path(path, "out")
    for path in ("", " ", "\t\n"):
        with pytest.raises(
            ValueError, match=r"^out must be a path, got '.*'.*'\.' is the current"
        ):
            check_path(path, "out")
    for path in (5, b"name", ["a"]):
        with pytest.raises(TypeError, match=r"^out must be a path, got (int|bytes|list)$"):
            check_path(path, "out")


def model() -> fewstep.Denoiser:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an evaluation")

    return fewstep.Denoiser.wrap(
        network, schedule=fewstep.schedule("flow"), prediction="x0", event_shape=(1, 8, 8)
    )


DOORS: dict[str, Callable[[], Any]] = {
    "analyze": lambda: fewstep.analyze(model(), out=""),
    "analyze data": lambda: fewstep.analyze(model(), data=""),
    "compare": lambda: fewstep.compare(model(), out=""),
    "compare data": lambda: fewstep.compare(model(), data=""),
    "distill": lambda: fewstep.distill(model(), UNUSED, ""),
    "distill folder": lambda: fewstep.distill(model(), "", "out"),
    "fit": lambda: fewstep.fit(model(), out=""),
    "fit folder": lambda: fewstep.fit(model(), folder=""),
    "load": lambda: fewstep.load(""),
    "record": lambda: fewstep.record(model(), "", n=2),
    "resume": lambda: resume(model(), ""),
    "store": lambda: TrajectoryStore.open(""),
    "verify": lambda: verify(""),
    "train": lambda: fewstep.train(UNUSED, out=""),
    "train data": lambda: fewstep.train("", out="out"),
    "train in a folder": lambda: train(UNUSED, ""),
    "export": lambda: export_checkpoint(UNUSED, "run", ""),
    "tune": lambda: fewstep.tune(model(), nfe=3, out=""),
    "tune data": lambda: fewstep.tune(model(), nfe=3, objective="mmd", data=""),
    "sample recipe": lambda: fewstep.sample(model(), 2, recipe=""),
    "sample profile": lambda: fewstep.sample(model(), 2, profile=""),
    "images": lambda: read_images(""),
    "features": lambda: Features.load(""),
    "reference": lambda: Reference.load(""),
    "plan": lambda: fewstep.plan("ddim", fewstep.schedule("flow"), nfe=2).save(""),
    "read plan": lambda: Plan.load(""),
    "read recipe": lambda: SamplerRecipe.load(""),
    "read profile": lambda: Profile.load(""),
    "write": lambda: write_atomic("", b""),
    "write json": lambda: write_json("", {}),
    "read json": lambda: read_json(""),
    "writable": lambda: check_writable(""),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_path_is_refused_and_nothing_is_written(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a path, got ''"):
        DOORS[door]()
    assert not list(tmp_path.iterdir())


def test_every_function_of_the_package_that_takes_a_path_is_a_door():
    names = {"out", "folder", "data", "path", "file", "source"}
    takers = {
        name
        for name in fewstep.__all__
        if inspect.isfunction(value := getattr(fewstep, name))
        and names & set(inspect.signature(value).parameters)
    }
    assert takers
    assert takers <= {door.split()[0] for door in DOORS}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("sample", "mixture-smooth", "--out", ""), "--out"),
        (("sample", "mixture-smooth", "--out="), "--out"),
        (("record", "mixture-smooth", "-n", "2", "--out", " "), "--out"),
        (("analyze", "mixture-smooth", "--out", "out", "--data", ""), "--data"),
        (("train", "", "--out", "out"), "an argument"),
    ],
)
def test_an_empty_argument_of_a_command_is_refused(words, name, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert f"error: {name} is empty; is a variable not set?" in command(*words, code=2)
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_a_prompt():
    words = ["sample", "model", "--prompt", "", "--prompt=", "--out", "out"]
    with local_arguments(words) as local:
        assert local == words

"""``fewstep fit``: a profile in the model's folder, which ``auto`` then takes."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

import fewstep
from next_lines import carry_out
from tiny_models import write_tiny


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A tiny model with its profile."""
    folder = write_tiny(tmp_path_factory.mktemp("model"))
    profile = fewstep.fit(fewstep.load(folder), (2, 4), n=4)
    profile.save(folder / "profile.json")
    return folder


def test_the_command_writes_into_the_models_folder(tmp_path, command, monkeypatch, capsys):
    folder = write_tiny(tmp_path / "model")
    text = command("fit", folder, "--nfe", "2,3", "-n", 4)
    assert f"wrote {folder / 'profile.json'}" in text
    line = next(line for line in text.splitlines() if line.startswith("next: "))
    assert line == f"next: fewstep sample {folder} --nfe 3 --out samples"
    monkeypatch.chdir(tmp_path)
    carry_out(line.removeprefix("next: "))
    capsys.readouterr()
    profile = fewstep.Profile.load(folder / "profile.json")
    assert [row["nfe"] for row in profile.table()] == [2, 3]
    assert "exists" in command("fit", folder, code=2)


def test_auto_takes_what_was_measured(fitted, tmp_path, command):
    model = fewstep.load(fitted)
    name = model.profile.solver_for(4)
    result = fewstep.resolve(model, fewstep.SamplerRequest(nfe=4))
    assert (result.recipe.name, result.recipe.grid) == (name, "explicit")
    assert result.chosen == f"{name} at the times of the profile with 4 evaluations"
    command("sample", fitted, "--nfe", 4, "-n", 2, "--out", tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert stored["name"] == name
    assert stored["options"]["times"] == list(result.sampler.plan.knots.tolist())


@pytest.mark.parametrize("request_", [{"nfe": 20}, {"nfe": 4, "grid": "karras"}])
def test_the_static_default_is_taken_beyond_it(fitted, request_):
    result = fewstep.resolve(fewstep.load(fitted), fewstep.SamplerRequest(**request_))
    assert result.recipe.name == "unipc2"


def test_another_guidance_takes_the_static_default_and_says_so(fitted, caplog):
    with caplog.at_level(logging.INFO, "fewstep"):
        result = fewstep.resolve(fewstep.load(fitted), fewstep.SamplerRequest(nfe=4), guidance=2.0)
    assert result.recipe.name == "unipc2"
    assert "measured with guidance 1, this run has 2" in caplog.text


def test_a_profile_of_other_weights_is_not_taken(fitted, tmp_path, caplog):
    folder = write_tiny(tmp_path / "model", seed=1)
    shutil.copy(fitted / "profile.json", folder)
    with caplog.at_level(logging.WARNING, "fewstep"):
        model = fewstep.load(folder)
    assert model.profile is None
    assert "measured on other weights" in caplog.text


def test_what_it_refuses(command, tmp_path):
    assert "give --out FILE" in command("fit", "mixture-smooth", code=2)
    out = tmp_path / "p.json"
    assert "integers from 2 to 40" in command(
        "fit", "mixture-smooth", "--nfe", "x", "--out", out, code=2
    )
    assert "built-in sampler" in command("fit", "fashion-1step", "--out", out, code=2)
    assert not out.exists()


def test_a_late_process_of_a_launch_finds_the_profile(tmp_path, command, monkeypatch):
    base = ["fit", "mixture-smooth", "--nfe", "4", "-n", "4", "--out", str(tmp_path / "out.json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    command(*base)
    written = (tmp_path / "out.json").read_bytes()
    monkeypatch.setenv("RANK", "0")
    command(*base)
    assert (tmp_path / "out.json").read_bytes() == written
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert "exists" in command(*base, "--seed", "1", code=2)
    assert "remove the file first" in command(*base, "--overwrite", code=2)

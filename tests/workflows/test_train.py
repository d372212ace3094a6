"""``fewstep.train``: a model in memory or in a folder, as the command writes it."""

from __future__ import annotations

import gc
import json
import tempfile

import numpy
import pytest
import torch

import fewstep
from fewstep.cli import run
from tiny_training import RECIPE, images


@pytest.fixture(scope="module")
def trained():
    return fewstep.train(images(), recipe=RECIPE, steps=2, device="cpu")


def test_the_model_samples_and_has_a_table(trained):
    shape = images().event_shape
    assert trained.denoiser.event_shape == shape
    rows = {row["what"]: row["value"] for row in trained.table()}
    assert rows["steps"] == "2"
    assert rows["loss"] == f"{trained.loss:.4f}"
    assert rows["images"].startswith(str(len(images())))
    assert "prediction" in str(trained)
    assert trained._repr_html_().startswith("<table>")


def test_it_is_saved_as_the_command_writes_it(trained, tmp_path):
    pytest.importorskip("matplotlib")
    data = images()
    labels = {} if data.labels is None else {"labels": data.labels.numpy()}
    numpy.savez(tmp_path / "data.npz", images=data.images.permute(0, 2, 3, 1).numpy(), **labels)
    recipe = RECIPE.to_record()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    words = ["train", tmp_path / "data.npz", "--recipe", tmp_path / "recipe.json", "--steps", "2"]
    assert run([*map(str, words), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    saved = trained.save(tmp_path / "saved")
    names = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("saved", "out")]
    assert names[0] == names[1]
    first, second = (fewstep.load(tmp_path / where, device="cpu") for where in ("saved", "out"))
    assert first.fingerprint() == second.fingerprint() == trained.denoiser.fingerprint()
    with pytest.raises(ValueError, match="exists"):
        trained.save(saved)
    # The folder is that of a run: more steps resume it.
    longer = fewstep.train(data, saved, RECIPE, steps=3, device="cpu")
    assert longer.recipe.steps == 3


def test_images_in_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pixels = images().images
    made = fewstep.train(pixels.numpy(), recipe=RECIPE, unconditional=True, steps=1, device="cpu")
    assert made.classes is None
    assert len(list(tmp_path.iterdir())) == 1
    del made
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (torch.zeros(4, 1, 8, 8), {}, "images must be uint8"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), {"size": 4}, "not resized"),
        ("nowhere", {}, "there is no folder or file"),
        ("nowhere", {"labels": torch.zeros(2)}, "labels belong to images in a tensor"),
        (3, {}, "data is a path"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), {"steps": 0}, "steps must be a positive"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), {"options": {"a": 1}}, "give schedule too"),
    ],
)
def test_mistakes_are_errors_beforehand(data, given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises((ValueError, TypeError), match=message):
        fewstep.train(data, **given)
    assert not list(tmp_path.iterdir())

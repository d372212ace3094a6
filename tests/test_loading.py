"""Loading: names and folders, devices, and the hints about a folder without a model."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.loading import EMBEDDED
from tiny_models import write_tiny


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_models_go_to_the_device(tmp_path, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = fewstep.load(write_tiny(tmp_path / "model"), device=device)
    assert model.device == torch.device("cpu")
    assert not any(module.training for module in model.network.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_exact_models_need_double_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert fewstep.load("mixture-smooth").device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_have_the_type_and_samples_are_single(tmp_path, dtype):
    model = fewstep.load(write_tiny(tmp_path / "model"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert fewstep.sample(model, 1, nfe=2, class_labels=1).dtype == torch.float32


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_have_the_type_too(name):
    for dtype in (torch.bfloat16, torch.float64):
        model = fewstep.load(name, device="cpu", dtype=dtype)
        assert {w.dtype for w in (*model.parameters(), *model.buffers())} == {dtype}
        labels = {} if "mixture" in name else {"class_labels": 1}
        assert fewstep.sample(model, 1, nfe=1, **labels).dtype == torch.float32
    exact = fewstep.load(name, device="cpu")
    kind = torch.float64 if "mixture" in name else torch.float32
    assert {w.dtype for w in (*exact.parameters(), *exact.buffers())} == {kind}


def test_a_model_of_another_type_keeps_its_profile(caplog):
    """So do its recipes, which name the model that they are for."""
    single, half = (fewstep.load("fashion", device="cpu", dtype=t) for t in (None, torch.float16))
    assert single.profile is not None
    assert half.profile is not None
    assert not caplog.text
    recipes = [m.profile.recipe(4) for m in (single, half) if m.profile]
    assert recipes[0].model == single.fingerprint() != half.fingerprint() == recipes[1].model
    assert recipes[0].options == recipes[1].options
    assert recipes[1].build(half).plan.nfe == 4


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "is not a model: there is no model.json or operator.json"),
        (["checkpoint.json"], "unfinished training, give the same command again"),
        (["scheduler_config.json"], "the scheduler of a pipeline, give the folder above"),
        (["sd/model_index.json"], "a model is in '.*sd'"),
        (["last.ckpt"], "'last.ckpt' alone does not say which network"),
    ],
)
def test_a_folder_without_a_model_is_told_what_it_is(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=reason):
        fewstep.load(tmp_path)


def test_other_sources_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        fewstep.load(file)
    with pytest.raises(ValueError, match="Did you mean 'fashion'"):
        fewstep.load("fashon")
    with pytest.raises(ValueError, match=r"floating type, got torch\.int8"):
        fewstep.load(next(iter(EMBEDDED)), dtype=torch.int8)

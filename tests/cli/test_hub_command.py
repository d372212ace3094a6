"""``fewstep sample`` with a model of the hub in the local cache, with types and steps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import fewstep

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub with one pipeline, "owner/tiny"."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from tiny_pipelines import unet2d

    root = tmp_path / "cache"
    model = root / "models--owner--tiny"
    DDPMPipeline(unet2d(), DDPMScheduler()).save_pretrained(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(root))
    asked = []
    original = hub.snapshot_download

    def watched(*arguments, **options):
        asked.append(options["local_files_only"])
        return original(*arguments, **{**options, "local_files_only": True})

    monkeypatch.setattr(hub, "snapshot_download", watched)
    return model / "snapshots" / COMMIT, asked


def test_a_model_in_the_cache_is_that_of_its_folder(cache, tmp_path, command):
    folder, asked = cache
    common = ("-n", 2, "--solver", "ddim", "--steps", 3, "--device", "cpu")
    text = command("sample", "owner/tiny", *common, "--out", tmp_path / "a")
    assert "next: fewstep sample owner/tiny" in text
    command("sample", folder, *common, "--out", tmp_path / "b")
    first, second = (load_file(tmp_path / k / "samples.safetensors")["samples"] for k in "ab")
    assert torch.equal(first, second)
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["nfe"] == 3
    assert asked == [True, True]  # to load it, and for the identity of the run
    assert fewstep.load(f"owner/tiny@{COMMIT}").event_shape == fewstep.load(folder).event_shape


def test_nothing_is_downloaded_unless_asked(cache, tmp_path, command):
    _, asked = cache
    text = command("sample", "owner/other", "--out", tmp_path / "a", code=2)
    assert "no model of that id in the cache of the Hugging Face hub; give --download" in text
    assert asked == [True]
    text = command("sample", "owner/other", "--download", "--out", tmp_path / "a", code=2)
    assert "the model 'owner/other' cannot be downloaded" in text
    assert asked == [True, False]
    for name in ("owner/other/more", "fashon", "./owner", "owner/../other"):
        with pytest.raises(ValueError, match="Unknown model"):
            fewstep.load(name)
    assert len(asked) == 2


def test_types_of_weights(cache, tmp_path, command):
    out = tmp_path / "a"
    common = ("sample", "owner/tiny", "-n", 2, "--nfe", 2, "--solver", "ddim", "--device", "cpu")
    text = command(*common, "--dtype", "bfloat16", "--out", out)
    assert "--dtype bfloat16" in text
    assert load_file(out / "samples.safetensors")["samples"].dtype == torch.float32
    assert json.loads((out / "recipe.json").read_text())["about"]["dtype"] == "bfloat16"
    half = fewstep.load("owner/tiny", device="cpu", dtype=torch.bfloat16)
    own = fewstep.sample(half, 2, solver="ddim", nfe=2)
    assert torch.equal(load_file(out / "samples.safetensors")["samples"], own)
    assert "Unknown --dtype 'half'" in command(*common, "--dtype", "half", "--out", out, code=2)


def test_steps_of_a_method_with_stages(tmp_path, command):
    common = ("sample", "mixture-smooth", "-n", 2, "--solver", "heun", "--steps", 3)
    command(*common, "--out", tmp_path / "a")
    own = fewstep.resolve(
        fewstep.load("mixture-smooth"), fewstep.SamplerRequest("heun", steps=3)
    ).sampler
    assert json.loads((tmp_path / "a" / "recipe.json").read_text())["nfe"] == own.nfe == 5
    text = command(*common, "--nfe", 5, "--out", tmp_path / "b", code=2)
    assert "give nfe or steps, not both" in text

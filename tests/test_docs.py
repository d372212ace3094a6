"""Every block of Python in docs/diffusers.md runs, in order, over tiny pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")

pytestmark = tiny.MARKS

PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"


def test_the_page_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diffusers.DDPMPipeline(
        tiny.unet2d(), diffusers.DDPMScheduler(clip_sample=False)
    ).save_pretrained("my-pipeline")
    words = tiny.tokenizer(tmp_path / "words")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **tiny.LATENT)
    tiny.stable_diffusion(scheduler, tokenizer=words).save_pretrained("my-text-pipeline")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["again"].scheduler.config.recipe == names["pipe"].scheduler.config.recipe
    assert len(names["images"]) == 1
    assert names["pictures"].shape == (2, 3, 16, 16)
    assert names["samples"].shape == (2, 3, 8, 8)
    assert Path("what-it-does.json").is_file()
    assert float(names["plan"].flat().B[-1, -1].abs()) < 1e-6
    assert bool(torch.isfinite(names["samples"]).all())


def test_the_command_of_the_page(tmp_path, capsys):
    from fewstep.cli import run

    text = PAGE.read_text(encoding="utf-8")
    (line,) = re.findall(r"```console\nfewstep (.*?)\n```", text)
    folder = tmp_path / "my-pipeline"
    diffusers.DDPMPipeline(
        tiny.unet2d(), diffusers.DDPMScheduler(clip_sample=False)
    ).save_pretrained(folder)
    words = [str(folder) if word == "my-pipeline" else word for word in line.split()]
    assert run(words) == 1  # they differ
    assert "the plans differ" in capsys.readouterr().out

"""The engine of the studio with a text-to-image pipeline of diffusers: prompts, latents, guidance."""

from __future__ import annotations

import pytest
import torch

import tiny_pipelines as tiny
from fewstep.studio.engine import Context, run_samples
from fewstep.studio.events import Frame, ModelLoaded, Planned, Sampled
from fewstep.studio.models import Models
from fewstep.studio.settings import SampleRequest, SamplerSettings

diffusers = pytest.importorskip("diffusers")

pytestmark = tiny.MARKS


def test_a_prompt_is_sampled_and_its_latents_are_shown_decoded(tmp_path):
    words = tiny.tokenizer(tmp_path / "words")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **tiny.LATENT)
    folder = str(tmp_path / "pipeline")
    tiny.stable_diffusion(scheduler, tokenizer=words).save_pretrained(folder)
    settings = SamplerSettings(solver="tab3", nfe=2, prompt="a shoe", guidance=3.0)
    request = SampleRequest(folder, (settings,), n=2, device="cpu", reference=False)
    events = []
    run_samples(request, Context(Models(), events.append, draws_plans=False))

    def of(kind):
        return [event for event in events if isinstance(event, kind)]

    assert of(ModelLoaded)[0].info.prompt
    names = {}
    exec(compile(of(Planned)[0].reproduction.python, "shown", "exec"), names)
    assert torch.equal(names["samples"], of(Sampled)[0].samples)
    first, _, last = of(Frame)
    assert len(first.predicted) > len(first.state)  # a decoded picture is larger than its latents
    assert last.state == last.predicted

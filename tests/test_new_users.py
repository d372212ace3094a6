"""Ten lines of a new user from diffusers and k-diffusion; those of ComfyUI are in adapters/test_comfyui.py."""

from __future__ import annotations

import pytest
import torch

import fewstep

DIFFUSERS = """
import fewstep
from diffusers import DDIMPipeline
from fewstep.adapters.diffusers import PlanScheduler
pipe = DDIMPipeline.from_pretrained("pipe")
model = fewstep.load("pipe")
profile = fewstep.fit(model, [2], n=4)
profile.save("pipe/profile.json")
result = fewstep.compare(model, ["DDIMScheduler", "UniPCMultistepScheduler", profile], nfe=[2], n=4, reference_nfe=6)
pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, profile="pipe/profile.json")
images = pipe(num_inference_steps=2, batch_size=2).images
"""

KDIFFUSION = """
import fewstep
from fewstep.adapters import kdiffusion as K
sigmas = fewstep.grid("karras", fewstep.schedule("edm", sigma_min=0.03, sigma_max=14.6), 6, to_zero=True).rho
x = torch.randn(16, 2) * sigmas[0]
theirs = K.sampler(model, x, sigmas, solver="sample_dpmpp_2m", disable=True)
noisy = K.sampler(model, x, sigmas, solver="euler_ancestral", eta=0.5, extra_args={}, callback=seen.append)
ours = K.sampler(model, x, sigmas)
handed = K.named("sample_heun")(model, x, sigmas)
"""


def run(script, **names):
    assert len(script.strip().splitlines()) <= 10
    exec(compile(script, "script", "exec"), names)
    return names


@pytest.mark.slow
def test_from_diffusers(tmp_path, monkeypatch, quiet_diffusers):
    diffusers = pytest.importorskip("diffusers")
    from tiny_pipelines import unet2d

    monkeypatch.chdir(tmp_path)
    diffusers.DDIMPipeline(unet2d(), diffusers.DDIMScheduler()).save_pretrained("pipe")
    names = run(DIFFUSERS)
    assert len(names["images"]) == 2
    assert names["pipe"].scheduler.plan.nfe == 2
    assert {cell.name for cell in names["result"].cells} == {
        "DDIMScheduler",
        "UniPCMultistepScheduler",
        "profile",
    }
    assert fewstep.load("pipe").profile is not None  # it is in the folder of the model


def test_from_k_diffusion():
    mixture = fewstep.load("mixture-smooth")

    def model(x, sigma):
        t = mixture.schedule.time(-sigma.double().log())
        scale = mixture.schedule.alpha(t).to(x)[:, None]
        return mixture(x * scale, t, prediction="x0")

    seen = []
    names = run(KDIFFUSION, model=model, torch=torch, seen=seen)
    for name in ("theirs", "noisy", "ours", "handed"):
        assert names[name].shape == (16, 2)
        assert bool(names[name].isfinite().all())
    assert [entry["i"] for entry in seen] == list(range(6))

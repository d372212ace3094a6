"""fewstep.load on what diffusers saved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fewstep
import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, *tiny.MARKS]
LATENT = tiny.LATENT
noise = tiny.normal


def test_a_network_alone(tmp_path):
    network = tiny.unet2d()
    network.save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.event_shape == (3, 8, 8)
    assert model.native.value == "eps"
    assert model.schedule.levels == 1000
    x = noise((2, 3, 8, 8))
    want = network(x, 500).sample
    assert torch.allclose(model(x, 500.0), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_pixel_pipelines(tmp_path, kind):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        clip_sample=False, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
    )
    pipe = getattr(diffusers, f"{kind}Pipeline")(tiny.unet2d(), scheduler)
    pipe.save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.native.value == "v"
    assert torch.allclose(model.schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)
    # The same samples as the pipeline's own loop.
    z = noise((2, 3, 8, 8))
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(5)
    x = z
    for t in ddim.timesteps:
        x = ddim.step(tiny.unet2d()(x, t).sample, t, x).prev_sample.detach()
    options = {"times": [*map(float, ddim.timesteps), -1.0]}
    # diffusers starts with unit variance at any level, fewstep with the level's own.
    z = z / model.schedule.prior_std(float(ddim.timesteps[0]))
    got = fewstep.sample(model, noise=z, solver="ddim", nfe=5, grid="explicit", options=options)
    assert float((got - x).abs().max() / x.abs().max()) < 1e-3


def test_dit(tmp_path):
    pipe = diffusers.DiTPipeline(
        tiny.dit(), tiny.vae(), diffusers.DDIMScheduler(clip_sample=False)
    )
    pipe.save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.event_shape == (4, 8, 8)
    x, labels = noise((2, 4, 8, 8)), torch.tensor([3, 8])
    t = torch.tensor([400, 400])
    want = tiny.dit()(x, timestep=t, class_labels=labels).sample[:, :4]
    assert torch.allclose(model(x, 400.0, class_labels=labels), want, atol=1e-5)
    one = fewstep.sample(model, 2, nfe=4, class_labels=labels, guidance=3.0)
    other = fewstep.sample(model, 2, nfe=4, class_labels=labels)
    assert not torch.allclose(one, other, atol=1e-3)
    picture = model.decode(one)
    want = tiny.vae().decode(one / tiny.vae().config.scaling_factor).sample
    assert torch.allclose(picture, want, atol=1e-5)


def text_pipeline(tmp_path: Path) -> Any:
    words = tiny.tokenizer(tmp_path / "words")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **LATENT)
    return tiny.stable_diffusion(scheduler, tokenizer=words)


def test_stable_diffusion_with_prompt_and_guidance(tmp_path):
    pipe = text_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "sd")
    model = fewstep.load(tmp_path / "sd")
    assert model.event_shape == (4, 8, 8)
    z = noise((1, 4, 8, 8))
    want = pipe(
        "a b", num_inference_steps=5, guidance_scale=4.0, latents=z, output_type="latent"
    ).images
    pipe.scheduler.set_timesteps(5)
    options = {"times": [*map(float, pipe.scheduler.timesteps), -1.0]}
    got = fewstep.sample(
        model,
        noise=z / model.schedule.prior_std(float(pipe.scheduler.timesteps[0])),
        solver="ddim",
        grid="explicit",
        nfe=5,
        options=options,
        prompt="a b",
        guidance=4.0,
    )
    assert float((got - want).abs().max() / want.abs().max()) < 2e-3
    assert model.decode(got).shape == (1, 3, 16, 16)
    plain = fewstep.sample(model, noise=z, nfe=5, prompt="a b")
    assert not torch.allclose(
        plain, fewstep.sample(model, noise=z, nfe=5, prompt="c d"), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["DDPM", "DiT", "StableDiffusion"])
def test_the_command_line_samples_pipelines(tmp_path, kind, capsys):
    """The samples are those of fewstep.sample; the picture of latents is decoded."""
    from fewstep.base.files import read_tensors
    from fewstep.cli import run

    arguments: dict[str, Any] = {}
    if kind == "DDPM":
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        pipe = diffusers.DDPMPipeline(tiny.unet2d(), scheduler)
    elif kind == "DiT":
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        pipe = diffusers.DiTPipeline(tiny.dit(), tiny.vae(), scheduler)
        arguments = {"class_labels": 3, "guidance": 2.0}
    else:
        pipe = text_pipeline(tmp_path)
        arguments = {"prompt": "a b", "guidance": 3.0}
    pipe.save_pretrained(tmp_path / "pipe")
    given = [part for k, v in arguments.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    out = tmp_path / "out"
    code = run(
        ["sample", str(tmp_path / "pipe"), "-n", "2", "--nfe", "3", "--out", str(out), *given]
    )
    assert code == 0, capsys.readouterr()
    result = read_tensors(out / "samples.safetensors")["samples"]
    model = fewstep.load(tmp_path / "pipe")
    assert torch.allclose(result, fewstep.sample(model, 2, nfe=3, **arguments), atol=1e-4)
    with Image.open(out / "grid.png") as picture:
        assert picture.width >= 2 * model.decode(result).shape[-1]


COMPARE = ("compare", ["--solvers", "ddim,tab2", "--nfe", "3", "--reference-nfe", "6"])
ANALYZE = ("analyze", ["--nfe", "3", "--budget", "0.02"])


@pytest.mark.parametrize(
    ("kind", "command", "options"),
    [
        ("DDPM", *COMPARE),
        ("StableDiffusion", *COMPARE),
        pytest.param("StableDiffusion", *ANALYZE, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("few_hypotheses", "coarse_references", "undrawn")
def test_the_other_commands_take_pipelines(tmp_path, capsys, kind, command, options):
    from fewstep.base.files import read_json
    from fewstep.cli import run

    if kind == "DDPM":
        scheduler = diffusers.DDPMScheduler(clip_sample=False)
        pipe = diffusers.DDPMPipeline(tiny.unet2d(), scheduler)
    else:
        pipe = text_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "out"
    code = run([command, str(tmp_path / "pipe"), "--out", str(out), "-n", "4", *options])
    assert code == 0, capsys.readouterr()
    assert "report.html" in capsys.readouterr().out
    assert read_json(out / "results.json", what="results")
    budget = "3"
    recipe = next(iter(out.glob(f"*-{budget}.json")))
    chosen = fewstep.SamplerRecipe.load(recipe)
    assert chosen.build(fewstep.load(tmp_path / "pipe")).nfe == int(budget)


def test_a_flow_transformer(tmp_path):
    network = tiny.sd3_transformer()
    network.save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.native.value == "flow"
    assert model.schedule.name == "flow"
    text = {
        "encoder_hidden_states": noise((2, 8, 16), 1),
        "pooled_projections": noise((2, 16), 2),
    }
    x = noise((2, 4, 8, 8))
    want = network(x, timestep=torch.tensor([300.0, 300.0]), **text).sample
    assert torch.allclose(model(x, 0.3, prediction="flow", **text), want, atol=1e-4)
    # Euler by hand, from where the schedule starts: at pure noise eps has no information.
    times = [model.schedule.t_max, 0.8, 0.6, 0.4, 0.2, 0.0]
    y = x
    for t, s in itertools.pairwise(times):
        velocity = network(y, timestep=torch.full((2,), 1000 * t), **text).sample.detach()
        y = y + (s - t) * velocity
    got = fewstep.sample(
        model,
        noise=x / model.schedule.prior_std(times[0]),
        solver="ddim",
        nfe=5,
        grid="explicit",
        options={"times": times},
        **text,
    )
    assert float((got - y).abs().max() / y.abs().max()) < 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_pipeline_in_edm_preconditioning(tmp_path, prediction):
    """Euler's method on the loaded model equals EDMEulerScheduler with the raw network."""
    edm = diffusers.EDMEulerScheduler(
        sigma_max=20.0, sigma_data=1.0, num_train_timesteps=1000, prediction_type=prediction
    )
    pipe = tiny.stable_diffusion(edm)
    pipe.save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.schedule == fewstep.schedule("edm", sigma_min=0.002, sigma_max=20.0)
    assert model.native.value == "x0"
    states = noise((2, 8, 16), 1)
    z = noise((2, 4, 8, 8))
    edm.set_timesteps(6)
    x = z * float(edm.sigmas[0])
    for t in edm.timesteps:
        y = edm.scale_model_input(x, t)
        f = tiny.unet_text()(y, t, encoder_hidden_states=states).sample.detach()
        x = edm.step(f, t, x).prev_sample
    times = edm.sigmas.double().clamp(max=20.0)
    got = fewstep.sample(
        model,
        noise=z,
        solver="ddim",
        grid="explicit",
        nfe=6,
        options={"times": times[:-1].tolist(), "to_zero": True},
        encoder_hidden_states=states,
    )
    assert tiny.relative(got, x) < 1e-4
    from fewstep.adapters.diffusers import PlanScheduler

    with pytest.raises(ValueError, match="sigma_data"):
        PlanScheduler.from_config(edm.config)


def test_only_safetensors_and_known_networks(tmp_path):
    tiny.unet2d().save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(ValueError, match="safetensors"):
        fewstep.load(tmp_path / "bin")
    tiny.vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="autoencoder"):
        fewstep.load(tmp_path / "vae")
    tiny.unet1d().save_pretrained(tmp_path / "audio")
    with pytest.raises(ValueError, match="UNet1DModel"):
        fewstep.load(tmp_path / "audio")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "PlanScheduler"])
def test_a_scheduler_saved_with_an_infinite_number_is_read(tmp_path, name):
    """DPM-Solver's own files hold lambda_min_clipped = -Infinity, which JSON proper has not."""
    from fewstep.adapters.diffusers import PlanScheduler

    kind = PlanScheduler if name == "PlanScheduler" else getattr(diffusers, name)
    diffusers.DDPMPipeline(tiny.unet2d(), kind()).save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    schedule, want = fewstep.load(tmp_path, device="cpu").schedule, fewstep.schedule("ddpm-linear")
    times = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
    assert torch.allclose(schedule.lam(times), want.lam(times), atol=1e-3)


@pytest.mark.usefixtures("coarse_references")
def test_a_saved_pipeline_is_measured_with_a_prompt_and_guidance(tmp_path, capsys):
    """One command for the folder: its profile is taken by load, and by the scheduler of the pipeline."""
    from fewstep.adapters.diffusers import PlanScheduler
    from fewstep.cli import run

    folder = tmp_path / "sd"
    text_pipeline(tmp_path).save_pretrained(folder)
    command = ["fit", str(folder), "--nfe", "4", "-n", "4", "--prompt", "a b", "--guidance", "3"]
    assert run([*command, "--quiet"]) == 0
    capsys.readouterr()
    model = fewstep.load(folder)
    assert model.profile.guidance == 3
    assert model.profile.about["conditions"] == {"prompt": "a b"}
    cond: dict[str, Any] = {"prompt": "a b", "guidance": 3.0}
    z = noise((1, 4, 8, 8))
    measured = fewstep.sample(model, noise=z, nfe=4, **cond)
    named = fewstep.sample(model, noise=z, nfe=4, profile=folder / "profile.json", **cond)
    assert torch.equal(measured, named)
    pipe = text_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    profile = str(folder / "profile.json")
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, profile=profile)
    start = z * model.schedule.prior_std(float(pipe.scheduler.schedule.t_max))
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    piped = pipe("a b", latents=start, **arguments).images
    assert tiny.relative(piped, measured) < 2e-3


def test_a_saved_pipeline_is_tuned_for_prompts_and_guidance(tmp_path, capsys):
    """One command for the folder: latents, texts from a file, guidance; the recipe runs here and in the pipeline."""
    from fewstep.adapters.diffusers import PlanScheduler
    from fewstep.cli import run

    folder, out, texts = tmp_path / "sd", tmp_path / "tuned.json", tmp_path / "texts.txt"
    text_pipeline(tmp_path).save_pretrained(folder)
    texts.write_text("a b\n\nb a a\n")
    command = ["tune", str(folder), "--nfe", "2", "--prompts", str(texts), "--guidance", "3"]
    command += ["--steps", "3", "--out", str(out), "--keep-worse"]
    for name, value in (
        ("pairs", 4),
        ("heldout", 4),
        ("test", 4),
        ("teacher_nfe", 6),
        ("batch_size", 2),
    ):
        command += ["--setting", f"{name}={value}"]
    command += ["--setting", "evaluate_every=1", "--family-option", "residual=true"]
    assert run(command) == 0
    assert "--prompt 'a b'" in capsys.readouterr().out
    recipe = fewstep.SamplerRecipe.load(out)
    assert recipe.guidance == 3
    assert recipe.about["conditions"] == {"prompt": ["a b", "b a a"]}
    assert recipe.residual is not None
    assert recipe.residual.channels == 4
    z = noise((1, 4, 8, 8))
    mine = fewstep.sample(fewstep.load(folder), noise=z, recipe=out, prompt="a b")
    pipe = text_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, recipe=str(out))
    start = z * fewstep.load(folder).schedule.prior_std(float(pipe.scheduler.schedule.t_max))
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    piped = pipe("a b", latents=start, **arguments).images
    assert tiny.relative(piped, mine) < 2e-3


def test_texts_of_a_tuning_are_read_before_anything_else(tmp_path, capsys):
    from fewstep.cli import run

    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    base = ["tune", "mixture-smooth", "--nfe", "2", "--out", str(tmp_path / "x.json")]
    for extra, message in (
        (["--prompts", str(empty)], "has no texts"),
        (["--prompts", str(tmp_path / "none.txt")], "cannot be read"),
        (["--prompts", str(empty), "--prompt", "a"], "give one of them"),
        (["--prompt", "a"], "prompt"),
    ):
        assert run([*base, *extra]) == 2
        assert message in capsys.readouterr().err

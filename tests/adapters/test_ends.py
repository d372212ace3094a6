"""Where runs begin and end, and what is clipped, as a model's files mean it; against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import PlanScheduler, plan_from_scheduler  # noqa: E402

pytestmark = tiny.MARKS
relative = tiny.relative

ROUNDING = 2e-5

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""The ``scheduler_config.json`` of Stable Diffusion 1.5."""


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """A smooth nonlinear network that mixes pixels and knows its time."""
    u = float(t) / 1000
    return torch.tanh(x * (1.3 - u) + u * x.roll(1, -1)) * 0.8 + 0.1 * x.sin()


def loop(scheduler: Any, steps: int = 10, **arguments: Any) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = tiny.normal((2, 3, 4, 4)) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(y, t), t, x, return_dict=False, **arguments)[0]
    return x


@pytest.mark.parametrize(
    ("solver", "twin"),
    [
        ("dpmpp-2m", "DPMSolverMultistepScheduler"),
        ("unipc2", "UniPCMultistepScheduler"),
        ("logrhoab1", "DEISMultistepScheduler"),
        ("ddim", "DDIMScheduler"),
    ],
)
def test_the_file_of_stable_diffusion_means_what_it_means_in_diffusers(solver, twin):
    """``set_alpha_to_one`` is a word of DDIM and PNDM: DPM-Solver++ and UniPC do not read it."""
    theirs = getattr(diffusers, twin).from_config(STABLE_DIFFUSION)
    ours = PlanScheduler.from_config(STABLE_DIFFUSION, solver=solver)
    assert ours.timesteps is not None
    assert relative(loop(ours), loop(theirs)) < ROUNDING
    assert ours.config.set_alpha_to_one is False
    back = diffusers.DDIMScheduler.from_config(ours.config)
    assert back.config.set_alpha_to_one is False


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(
    ("solver", "twin"), [("ddim", "DDIMScheduler"), ("pndm", "PNDMScheduler")]
)
def test_the_solvers_that_read_set_alpha_to_one(solver, twin, to_one):
    options: dict[str, Any] = {"clip_sample": False} if solver == "ddim" else {}
    options["steps_offset"] = 1  # else the last step would go from the lowest level to itself
    theirs = getattr(diffusers, twin)(set_alpha_to_one=to_one, **options)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    assert relative(loop(ours), loop(theirs)) < ROUNDING


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"clip_sample": True, "prediction_type": "v_prediction"},
        {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
    ],
)
def test_ddim_clips_as_its_twin(options, eta, clipped):
    """The noise follows from the clipped data with ``use_clipped_model_output`` only."""
    theirs = diffusers.DDIMScheduler(**options)
    arguments: dict[str, Any] = {"eta": eta, "use_clipped_model_output": clipped}
    result = []
    for scheduler in (PlanScheduler.from_config(theirs.config, solver="ddim"), theirs):
        result.append(loop(scheduler, generator=tiny.seeded(1), **arguments))
    assert relative(result[0], result[1]) < ROUNDING
    off = PlanScheduler.from_config(
        theirs.config, solver="ddim", clip_sample=False, thresholding=False
    )
    assert relative(loop(off, generator=tiny.seeded(1), eta=eta), result[1]) > 1e-3


@pytest.mark.parametrize("solver", ["ddpm", "tab3", "dpmpp-2m", "heun"])
def test_other_solvers_know_the_clipped_data_only(solver):
    ours = PlanScheduler(solver=solver, clip_sample=True, final_sigmas_type="zero")
    result = [
        loop(ours, generator=tiny.seeded(1), use_clipped_model_output=c) for c in (True, False)
    ]
    assert torch.equal(*result)
    assert float(result[0].abs().max()) <= 1 + 1e-5  # the last step ends at the clipped data


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
    ],
)
def test_a_plan_of_a_scheduler_starts_where_the_scheduler_does(name, spacing):
    """At sigma of its first level for those whose state is x / alpha, at variance 1 for the others."""
    theirs = getattr(diffusers, name)(timestep_spacing=spacing, **tiny.LATENT)
    plan = plan_from_scheduler(theirs, 10)
    ours = PlanScheduler.from_config(theirs.config, recipe=plan.to_json())
    assert relative(loop(ours, plan.nfe), loop(theirs)) < ROUNDING
    theirs.set_timesteps(10)
    x = tiny.normal((1, 3, 4, 4)) * float(theirs.init_noise_sigma)
    scale = (
        theirs.scale_model_input(x, theirs.timesteps[0]).std() / tiny.normal((1, 3, 4, 4)).std()
    )
    assert ours.init_noise_sigma == pytest.approx(float(scale), rel=2e-6)


@pytest.mark.parametrize("solver", ["euler", "euler-maruyama"])
def test_euler_in_time_runs_at_its_defaults_and_says_what_to_do_elsewhere(solver):
    ours = PlanScheduler(solver=solver)
    result = loop(ours, generator=tiny.seeded())
    assert len(ours.timesteps) == 10
    assert bool(result.isfinite().all())
    ours = PlanScheduler(solver=solver, final_sigmas_type="zero")
    with pytest.raises(ValueError, match="final_sigmas_type='sigma_min'"):
        ours.set_timesteps(10)
    PlanScheduler.from_config(ours.config, final_sigmas_type="sigma_min").set_timesteps(10)
    with pytest.raises(ValueError, match="leave timestep 0 out"):
        PlanScheduler(solver=solver).set_timesteps(timesteps=[999, 500, 0])
    PlanScheduler(solver=solver).set_timesteps(timesteps=[999, 500])


def test_euler_in_time_is_eulers_method_on_the_ode():
    """Fine steps of it and of DDIM agree; the network is smooth in time."""
    euler = PlanScheduler(solver="euler")
    ddim = PlanScheduler(solver="ddim", timestep_spacing="linspace", final_sigmas_type="sigma_min")
    assert relative(loop(euler, 500), loop(ddim, 500)) < 0.05


def test_a_configuration_of_ours_gives_others_the_models_values():
    """Heun's own defaults are the betas of Stable Diffusion."""
    ours = PlanScheduler(solver="tab3")
    heun = diffusers.HeunDiscreteScheduler.from_config(ours.config)
    assert torch.allclose(heun.alphas_cumprod, ours.alphas_cumprod)
    ddim = diffusers.DDIMScheduler.from_config(ours.config)
    assert ddim.config.clip_sample is False

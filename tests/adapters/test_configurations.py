"""Every key of every scheduler of diffusers: understood, without effect, or refused by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
import diffusers.schedulers as home  # noqa: E402

from fewstep.adapters.diffusers import PlanScheduler, plan_from_scheduler  # noqa: E402
from fewstep.adapters.diffusers.configurations import (  # noqa: E402
    class_of,
    conventions_of,
    family_of,
)
from fewstep.adapters.diffusers.keys import CLASSES, KEYS, MODEL_KEYS, table  # noqa: E402

pytestmark = tiny.MARKS

INSTALLED = {
    name: kind
    for name in dir(home)
    if isinstance(kind := getattr(home, name, None), type)
    and issubclass(kind, diffusers.SchedulerMixin)
    and kind is not diffusers.SchedulerMixin
}
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 7},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {
        "noise_mode": "a",
        "schedule_mode": "b",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
}
"""What some schedulers cannot be made without."""


def in_memory(name: str, **options: Any) -> dict[str, Any]:
    """The configuration as ``scheduler.config`` has it: without the name of its class."""
    try:
        return dict(INSTALLED[name](**REQUIRED.get(name, {}), **options).config)
    except (TypeError, ValueError):  # a class that cannot be made here
        known = inspect.signature(INSTALLED[name].__init__).parameters
        return {k: p.default for k, p in known.items() if k not in ("self", "kwargs")} | options


def on_disk(name: str, **options: Any) -> dict[str, Any]:
    """The configuration as a file has it: all values, and the name of the class."""
    config = {k: v for k, v in in_memory(name, **options).items() if not k.startswith("_")}
    return {**config, "_class_name": name}


def test_the_tables_name_every_class_and_key_of_the_installed_diffusers():
    assert set(CLASSES) == set(INSTALLED)
    installed = {
        k for kind in INSTALLED.values() for k in inspect.signature(kind.__init__).parameters
    }
    installed -= {"self", "kwargs"}
    assert installed <= set(KEYS), "a new key: add its meaning to keys.py"
    assert set(KEYS) - installed == {"predict_epsilon", "tensor_format", "timestep_values"}
    ours = set(inspect.signature(PlanScheduler.__init__).parameters)
    understood = {k for k, meaning in KEYS.items() if meaning.status == "understood"}
    assert understood - ours == {"sigma_data"}
    assert set(MODEL_KEYS) <= ours
    assert {meaning.status for meaning in KEYS.values()} == {"understood", "no effect", "refused"}
    assert all(meaning.why for meaning in KEYS.values())


def test_the_page_prints_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    assert table() in page


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_is_understood_or_refused_with_a_reason_at_every_door(name):
    meaning = CLASSES[name]
    for config in (in_memory(name), on_disk(name)):
        ambiguous = name == "FlowMapEulerDiscreteScheduler" and "_class_name" not in config
        if ambiguous:  # FlowMatchHeun's has the same keys, and the same levels
            assert class_of(config) == "FlowMatchHeunDiscreteScheduler"
        elif meaning.family == "refused":
            assert class_of(config) == name
            with pytest.raises(ValueError, match=name):
                PlanScheduler.from_config(config)
            with pytest.raises(ValueError, match=name):
                conventions_of(config)
        elif meaning.family == "edm":
            with pytest.raises(ValueError, match="sigma_data"):
                PlanScheduler.from_config(config)
        else:
            ours = PlanScheduler.from_config(config, solver="ddim")
            assert (ours.schedule.name == "flow") == (meaning.family == "flow")
            assert family_of(config) == meaning.family
            assert conventions_of(config)[0].name == ours.schedule.name


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_scheduler_is_a_plan_or_refused_with_a_reason(name):
    if name in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
        pytest.importorskip("torchsde")
    options: dict[str, Any] = dict(REQUIRED.get(name, {}))
    known = inspect.signature(INSTALLED[name].__init__).parameters
    options |= {k: False for k in ("clip_sample", "thresholding", "clip_denoised") if k in known}
    try:
        scheduler = INSTALLED[name](**options)
    except (TypeError, ValueError):
        pytest.skip("cannot be made here")
    if CLASSES[name].family == "refused":
        with pytest.raises(ValueError, match=name):
            plan_from_scheduler(scheduler, 6)
        return
    if name == "CogVideoXDPMScheduler":  # its step needs arguments of its own
        with pytest.raises(ValueError, match=name):
            plan_from_scheduler(scheduler, 6)
        return
    assert plan_from_scheduler(scheduler, 6).nfe >= 6


REFUSED = [
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling"),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
    ("FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0]}, "scale_factors"),
]


@pytest.mark.parametrize(("name", "options", "key"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refused_keys_are_named_at_every_door(tmp_path, name, options, key):
    for config in (in_memory(name, **options), on_disk(name, **options)):
        with pytest.raises(ValueError, match=key):
            PlanScheduler.from_config(config)
        # The way out that the message names.
        PlanScheduler.from_config(config, **{key: KEYS[key].neutral[0]})
    pipe = diffusers.DDPMPipeline(tiny.unet2d(), diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(on_disk(name, **options)))
    with pytest.raises(ValueError, match=key):
        fewstep.load(tmp_path)


@pytest.mark.parametrize("key", ["sigma_shift", "beta_curve"])
def test_a_key_that_nobody_knows_is_refused(key):
    with pytest.raises(ValueError, match=key):
        PlanScheduler.from_config({**on_disk("DDIMScheduler"), key: 2.0})
    PlanScheduler.from_config({**on_disk("DDIMScheduler"), key: None})


def test_wrong_arguments_of_from_config():
    config = in_memory("DDIMScheduler")
    with pytest.raises(TypeError, match="solver"):
        PlanScheduler.from_config(config, solvr="tab3")
    with pytest.raises(TypeError, match="configuration"):
        PlanScheduler.from_config("folder")
    with pytest.raises(ValueError, match="trigflow"):
        PlanScheduler(prediction_type="trigflow")


# Levels, by formula.


def scaled_linear(start: float = 0.00085, end: float = 0.012) -> torch.Tensor:
    root = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64)
    return (1 - root.square()).cumprod(0)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_the_shift_of_the_signal_to_noise_ratio(name, scale):
    """CogVideoX divides the ratio of all levels by 3, by default."""
    products = scaled_linear()
    want = products / (scale + (1 - scale) * products)
    if scale == 3:
        assert float(want[500]) == pytest.approx(0.113, abs=1e-3)
    options = {} if scale == 3 else {"snr_shift_scale": scale}
    for config in (in_memory(name, **options), on_disk(name, **options)):
        ours = PlanScheduler.from_config(config, solver="ddim", clip_sample=False)
        assert torch.allclose(ours.alphas_cumprod.double(), want, rtol=1e-4)
        table = conventions_of(config)[0].options()["alphas_cumprod"]
        assert torch.allclose(torch.tensor(table, dtype=torch.float64), want, rtol=1e-4)
    theirs = INSTALLED[name](rescale_betas_zero_snr=True, **options)
    zero = PlanScheduler.from_config(theirs.config, prediction_type="v_prediction")
    assert torch.allclose(
        zero.alphas_cumprod[:-1].double(), theirs.alphas_cumprod[:-1].double(), rtol=1e-4
    )


SVD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
"""The scheduler of Stable Video Diffusion."""


def svd_levels(n: int) -> torch.Tensor:
    u = torch.arange(n, dtype=torch.float64) / (n - 1)
    return (700 ** (1 / 7) + u * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7


@pytest.mark.parametrize("solver", ["ddim", "unipc2", "heun"])
def test_continuous_timesteps_of_stable_video_diffusion(solver):
    """The network is conditioned on ln(sigma) / 4 from 1.64 to -1.55, sigma starts at 700."""
    config = dict(diffusers.EulerDiscreteScheduler(**SVD).config)
    ours = PlanScheduler.from_config(config, solver=solver)
    ours.set_timesteps(25)
    levels = svd_levels(25)
    assert torch.allclose(ours.sigmas[: -1 : ours.order][:25].double(), levels, rtol=1e-5)
    assert torch.allclose(ours.timesteps[:: ours.order][:25].double(), levels.log() / 4, atol=1e-5)
    assert float(ours.timesteps[0]) == pytest.approx(1.638, abs=1e-3)
    assert float(ours.timesteps.min()) == pytest.approx(-1.554, abs=1e-3)
    with pytest.raises(ValueError, match="give sigmas"):
        ours.set_timesteps(timesteps=[1.6, 0.2])


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.tanh(x * (0.8 + 0.2 * float(t))) + 0.2 * x.roll(1, -1)


def loop(scheduler: Any, n: int) -> torch.Tensor:
    scheduler.set_timesteps(n)
    x = tiny.normal((2, 3, 4, 4)) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(y, t), t, x, return_dict=False)[0]
    return x


def test_continuous_timesteps_equal_euler_of_diffusers():
    """DDIM is Euler's method in sigma; the factor: diffusers' leading spacing starts at sigma^2 + 1."""
    theirs = diffusers.EulerDiscreteScheduler(**{**SVD, "timestep_spacing": "linspace"})
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    assert tiny.relative(loop(ours, 10), loop(theirs, 10)) < 2e-5
    plan = plan_from_scheduler(theirs, 10)
    assert plan.schedule.name == "vp-sigma"
    assert torch.allclose(plan.times[:10], svd_levels(10), rtol=1e-4)
    assert (
        tiny.relative(
            loop(PlanScheduler.from_config(theirs.config, recipe=plan.to_json()), 10),
            loop(theirs, 10),
        )
        < 2e-5
    )


def test_a_model_with_continuous_timesteps_is_loaded(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(**SVD)
    tiny.stable_diffusion(scheduler).save_pretrained(tmp_path)
    model = fewstep.load(tmp_path)
    assert model.schedule == fewstep.schedule("vp-sigma", sigma_min=0.002, sigma_max=700.0)
    assert model.native.value == "v"
    x, states = tiny.normal((2, 4, 8, 8)), tiny.normal((2, 8, 16), 1)
    t = torch.tensor(0.25).mul(torch.tensor(3.0).log())
    want = tiny.unet_text()(x, t, encoder_hidden_states=states).sample
    got = model(x, 3.0, prediction="v", encoder_hidden_states=states)
    assert torch.allclose(got, want, atol=1e-5)


def test_with_another_prediction_continuous_changes_nothing_as_in_diffusers():
    config = {**SVD, "prediction_type": "epsilon", "use_karras_sigmas": False}
    theirs = diffusers.EulerDiscreteScheduler(**config)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("twin", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(
    "spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
)
@pytest.mark.parametrize("ends", [{"sigma_max": 10.0}, {"sigma_min": 0.1, "sigma_max": 10.0}])
def test_the_ends_of_a_spacing(twin, spacing, ends):
    if spacing == "use_beta_sigmas":
        pytest.importorskip("scipy")
    theirs = INSTALLED[twin](**{spacing: True}, **ends, **tiny.LATENT)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    assert float(ours.sigmas[0]) == pytest.approx(10.0, rel=1e-5)
    if "sigma_min" in ends or twin == "UniPCMultistepScheduler":
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-4)
    with pytest.raises(ValueError, match="sigma_max=700"):
        PlanScheduler.from_config(theirs.config, solver="ddim", sigma_max=700.0).set_timesteps(5)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_lambda_min_clipped(spacing):
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing=spacing
    )
    ours = PlanScheduler.from_config(theirs.config, solver="dpmpp-2m")
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert float(ours.timesteps[0]) < 999 or spacing == "leading"
    with pytest.raises(ValueError, match="lambda_min_clipped"):
        PlanScheduler.from_config(
            theirs.config, solver="ddim", lambda_min_clipped=50.0
        ).set_timesteps(4)


@pytest.mark.parametrize(
    "name", ["LTXEulerAncestralRFScheduler", "FlowMatchHeunDiscreteScheduler"]
)
def test_flows_are_no_linear_beta_models(name):
    for config in (in_memory(name), on_disk(name)):
        ours = PlanScheduler.from_config(config, solver="ddim")
        assert ours.schedule.name == "flow"
        assert ours.config.prediction_type == "flow_prediction"
        schedule, prediction, _ = conventions_of(config)
        assert (schedule.name, prediction.value) == ("flow", "flow")


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("LCMScheduler", {"original_inference_steps": None}, 4),
        ("LCMScheduler", {"original_inference_steps": 2000}, 4),
        ("LCMScheduler", {"original_inference_steps": 2}, 4),
        ("UnCLIPScheduler", {"clip_sample": False}, 1),
        ("CogVideoXDPMScheduler", {"clip_sample": False}, 4),
    ],
)
def test_what_a_scheduler_stumbles_over_is_a_refusal_with_its_name(name, options, steps):
    with pytest.raises(ValueError, match=name):
        plan_from_scheduler(INSTALLED[name](**options), steps)


def test_clipping_is_kept_from_memory_as_from_disk():
    for name in ("DDPMScheduler", "DDIMScheduler"):
        memory = PlanScheduler.from_config(in_memory(name), solver="ddim")
        disk = PlanScheduler.from_config(on_disk(name), solver="ddim")
        assert memory.config.clip_sample is True
        assert disk.config.clip_sample is True
        off = PlanScheduler.from_config(in_memory(name, clip_sample=False), solver="ddim")
        assert off.config.clip_sample is False


@pytest.mark.parametrize("solver", ["auto", "tab3", "ddim", "unipc3"])
def test_a_round_trip_keeps_which_values_are_defaults(solver):
    ours = PlanScheduler() if solver == "auto" else PlanScheduler(solver=solver)
    assert "trained_betas" in ours.config["_use_default_values"]
    for other in ours.compatibles:
        if other.__name__ == "DPMSolverSDEScheduler":
            pytest.importorskip("torchsde")
        back = PlanScheduler.from_config(other.from_config(ours.config).config)
        assert {k: v for k, v in back.config.items() if k in ours.config} == dict(ours.config), (
            other
        )

"""Every scheduler of diffusers that has a twin here, with every key changed by itself: the same samples as its own."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch

import fewstep
import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402
from fewstep.adapters.diffusers.configurations import conventions_of  # noqa: E402
from fewstep.adapters.diffusers.keys import KEYS, NUMBERS, OWN_KEYS, SWITCHES  # noqa: E402

pytestmark = [pytest.mark.slow, *tiny.MARKS]

STEPS = 5
"""Divides the training timesteps: diffusers' DDIM takes the level 1000 // n below each of its times."""

TWINS = {
    "CogVideoXDDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp",
    "FlowMatchEulerDiscreteScheduler": "ddim",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "pndm",
    "UnCLIPScheduler": "ddpm",
    "UniPCMultistepScheduler": "unipc",
}

CHANGES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.001,),
    "beta_end": (0.03,),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (torch.linspace(1e-4, 0.01, 1000).tolist(),),
    "prediction_type": ("sample", "v_prediction"),
    "snr_shift_scale": (1.0, 2.0),
    "shift": (3.0, 0.5),
    "flow_shift": (3.0,),
    "use_dynamic_shifting": (True,),
    "time_shift_type": ("linear",),
    "shift_terminal": (0.1,),
    "clip_sample": (True, False),
    "clip_sample_range": (0.5,),
    "thresholding": (True,),
    "dynamic_thresholding_ratio": (0.9,),
    "sample_max_value": (2.0,),
    "variance_type": ("fixed_large", "fixed_small_log"),
    "lambda_min_clipped": (-3.0,),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "steps_offset": (1,),
    "use_karras_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "final_sigmas_type": ("zero",),
    "set_alpha_to_one": (True,),
    "solver_order": (1, 2, 3),
    "base_shift": (0.7,),
    "max_shift": (2.0,),
    "euler_at_final": (True,),
}
"""Values that are no defaults; the other keys have tests of their own."""

DIFFERENT = {
    # Its DDIM takes the level 200 below each time, but linspace's times are 249.75 apart.
    ("DDIM", "timestep_spacing", "linspace"),
    # UnCLIP refuses what it has not.
    ("UnCLIP", "prediction_type", "v_prediction"),
    ("UnCLIP", "variance_type", "fixed_large"),
    ("UnCLIP", "beta_schedule", "linear"),
    # Only of flows: see below.
    ("UniPC", "shift_terminal", ""),
    # PNDM refuses predictions of the data, and mixes velocities of different levels, where ours mixes noises.
    ("PNDM", "prediction_type", ""),
    # Its times between training timesteps are rounded differently.
    ("PNDM", "timestep_spacing", "linspace"),
    # Refused: there is no corrector of first order here.
    ("UniPC", "solver_order", "1"),
    # Refused: a first step that divides sigma / alpha by 8,000.
    ("Heun", "beta_schedule", "squaredcos_cap_v2"),
}
"""(part of the class, key, part of the value) where our samples are not diffusers', and why."""

FIXED = {
    # Offsets, so that no step is of no length; ends where both can.
    "PNDMScheduler": {"set_alpha_to_one": True},
}


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.tanh(0.8 * x + 1e-4 * float(t)) + 0.1 * x.roll(1, -1)


def loop(scheduler: Any, **setting: Any) -> torch.Tensor:
    scheduler.set_timesteps(STEPS, **setting)
    generator = tiny.seeded()
    x = torch.randn(2, 3, 4, 4, generator=generator)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    known, times = inspect.signature(scheduler.step).parameters, scheduler.timesteps
    for i, t in enumerate(times):
        options: dict[str, Any] = {"generator": generator} if "generator" in known else {}
        if "prev_timestep" in known:
            options["prev_timestep"] = times[i + 1] if i + 1 < len(times) else None
        y = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(y, t), t, x, return_dict=False, **options)[0]
    return x


def is_different(name: str, key: str, value: Any) -> bool:
    return any(p in name and key == k and str(v) in str(value) for p, k, v in DIFFERENT)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_every_key_means_what_it_means_in_diffusers(name):
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    cases: list[dict[str, Any]] = [{}]
    cases += [{key: value} for key in known for value in CHANGES.get(key, ())]
    for case in cases:
        if any(is_different(name, key, value) for key, value in case.items()):
            continue
        options = {**FIXED.get(name, {}), **case}
        theirs = kind(**options)
        config = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        ours = PlanScheduler.from_config({**config, "_class_name": name}, solver=TWINS[name])
        setting = {"mu": 0.8} if case.get("use_dynamic_shifting") else {}
        got, want = loop(ours, **setting), loop(theirs, **setting)
        assert bool(torch.isfinite(want).all()), case
        # unCLIP divides by an alpha of 5e-5 in float32.
        bound = 2e-3 if name == "UnCLIPScheduler" else 2e-4
        assert tiny.relative(got, want) < bound, (name, case)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flow_shift": 3.0},
        {"flow_shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ],
)
def test_flow_levels_of_unipc(options):
    """The levels of Wan; its own times are those cut to integers, which the next test shows to be the difference."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    theirs = diffusers.UniPCMultistepScheduler(**flow, **options)
    ours = PlanScheduler.from_config(theirs.config, solver="unipc")
    setting = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    # One step cannot be stretched: theirs divides by zero.
    for steps in (4,) if "shift_terminal" in options else (1, 4):
        ours.set_timesteps(steps, **setting)
        theirs.set_timesteps(steps, **setting)
        assert torch.allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
        cut = ours.timesteps - theirs.timesteps
        assert -2e-3 < float(cut.min()) <= float(cut.max()) < 1.002


def run_at(scheduler: Any, steps: int, network: Any) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = tiny.normal((1, 3, 4, 4))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, return_dict=False)[0]
    return x


def test_wan_differs_by_the_integer_times_of_its_own_scheduler():
    """A network that sees whole times sees the same in both; one that sees all of the time does not."""
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    ours = PlanScheduler.from_config(theirs.config, solver="unipc")

    def whole(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x + min(int(t + 2e-3), 999))

    def fine(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x + t)

    assert tiny.relative(run_at(ours, 6, whole), run_at(theirs, 6, whole)) < 1e-4
    assert tiny.relative(run_at(ours, 6, fine), run_at(theirs, 6, fine)) > 1e-2


@pytest.mark.parametrize(("steps", "same"), [(5, True), (6, False)])
def test_cogvideox_differs_where_its_steps_do_not_divide_the_training_timesteps(steps, same):
    r"""Its DDIM ends each step at the level of t - floor(1000 / n), and not at that of the next timestep.

    With :math:`a = \sqrt{(1 - \bar\alpha_s) / (1 - \bar\alpha_t)}` the step is
    :math:`a x + (\sqrt{\bar\alpha_s} - \sqrt{\bar\alpha_t} a) x_0`, here in float64 with both rules for s.
    """
    theirs = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    products = theirs.alphas_cumprod.double()

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(x + 1e-3 * t)

    def formula(next_timestep: bool) -> torch.Tensor:
        x = tiny.normal((1, 3, 4, 4)).double()
        times = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        for i, t in enumerate(times):
            s = t - 1000 // steps
            if next_timestep:
                s = times[i + 1] if i + 1 < steps else -1
            now, then = products[t], products[s] if s >= 0 else torch.tensor(1.0).double()
            data = now.sqrt() * x - (1 - now).sqrt() * network(x, t)
            a = ((1 - then) / (1 - now)).sqrt()
            x = a * x + (then.sqrt() - now.sqrt() * a) * data
        return x

    got, want = run_at(ours, steps, network), run_at(theirs, steps, network)
    assert tiny.relative(got.double(), formula(True)) < 2e-5
    assert tiny.relative(want.double(), formula(False)) < 2e-5
    assert (tiny.relative(got, want) < 2e-5) == same


# Defaults of the classes, which files of older versions leave out.


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("CogVideoXDDIMScheduler", "snr_shift_scale"),
        ("CogVideoXDPMScheduler", "beta_schedule"),
        ("DDIMScheduler", "clip_sample"),
        ("DDPMScheduler", "clip_sample"),
        ("HeunDiscreteScheduler", "beta_end"),
        ("LCMScheduler", "original_inference_steps"),
        ("TCDScheduler", "beta_schedule"),
    ],
)
def test_a_file_that_leaves_keys_out_means_the_defaults_of_its_class(name, key):
    ours = PlanScheduler.from_config({"_class_name": name}, solver="ddim")
    theirs = getattr(diffusers, name)()
    want = False if key == "clip_sample" and "CogVideoX" in name else theirs.config[key]
    assert ours.config[key] == want
    assert torch.allclose(ours.alphas_cumprod.double(), theirs.alphas_cumprod.double(), rtol=1e-4)
    schedule = conventions_of({"_class_name": name})[0]
    table = torch.tensor(schedule.options()["alphas_cumprod"])
    assert torch.allclose(table.double(), theirs.alphas_cumprod.double(), rtol=1e-4)


def test_the_levels_of_unclip_are_cosines():
    """Its configuration has no betas: they are always those of squaredcos_cap_v2."""
    theirs = diffusers.UnCLIPScheduler()
    edge = torch.arange(1001, dtype=torch.float64) / 1000
    curve = torch.cos((edge + 0.008) / 1.008 * torch.pi / 2).square()
    want = (1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999)).cumprod(0)
    for config in (theirs.config, {"_class_name": "UnCLIPScheduler"}):
        ours = PlanScheduler.from_config(config, solver="ddpm")
        assert torch.allclose(ours.alphas_cumprod.double(), want, rtol=1e-3)
        assert ours.config.clip_sample is True
        ours.set_timesteps(7)
        theirs.set_timesteps(7)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "TCDScheduler"])
def test_a_class_that_never_clips_does_not_begin_to(name):
    theirs = getattr(diffusers, name)(clip_sample=True)
    config = {**theirs.config, "_class_name": name}
    assert PlanScheduler.from_config(config, solver="ddim").config.clip_sample is False


def test_a_key_that_another_class_left_behind():
    """A DDIM scheduler made from that of a latent consistency model has all training timesteps."""
    config = diffusers.DDIMScheduler.from_config(
        {
            **diffusers.LCMScheduler(original_inference_steps=40).config,
            "_class_name": "LCMScheduler",
        }
    ).config
    ours = PlanScheduler.from_config({**config, "_class_name": "DDIMScheduler"}, solver="ddim")
    assert ours.config.original_inference_steps is None


# Values that make no sense.

BAD: tuple[Any, ...] = (None, -1, 0, 1e9, "abc", [], [1.0], {}, float("nan"), float("inf"))


@pytest.mark.parametrize("family", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "UniPC"])
def test_no_value_of_a_key_ends_in_anything_but_a_refusal(family):
    """Each key x ten values: it runs, or raises a ValueError, in the pipeline and in fewstep.load."""
    options = {"use_karras_sigmas": True} if family == "UniPC" else {}
    name = "UniPCMultistepScheduler" if family == "UniPC" else family
    config = {k: v for k, v in getattr(diffusers, name)(**options).config.items() if k[0] != "_"}
    keys = sorted({*config, *inspect.signature(PlanScheduler.__init__).parameters} - {"self"})
    ran = refused = 0
    for key in keys:
        for value in BAD:
            if (key, value) == ("num_train_timesteps", 1e9):
                continue  # gigabytes
            changed = {"solver": "ddim", **config, key: value, "_class_name": name}
            try:
                ours = PlanScheduler.from_config(changed)
                ours.set_timesteps(3, mu=0.5)
                x = torch.ones(1, 1, 2, 2)
                for t in ours.timesteps:
                    x = ours.step(0.1 * x, t, x).prev_sample
                ran += 1
            except ValueError:
                refused += 1
            if key not in OWN_KEYS:
                with contextlib.suppress(ValueError):
                    conventions_of(changed)
    assert ran > 20
    assert refused > 200


@pytest.mark.parametrize("key", [*NUMBERS, *SWITCHES, "variance_type"])
def test_a_value_that_a_key_cannot_have_is_refused_by_name_at_every_door(key):
    assert KEYS[key].status == "understood"
    config = {"_class_name": "DDIMScheduler", key: "often"}
    with pytest.raises(ValueError, match=key):
        PlanScheduler.from_config(config)
    with pytest.raises(ValueError, match=key):
        conventions_of(config)


# Arguments of set_timesteps and step that other schedulers take.


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize(("steps", "distilled"), [(1, 50), (3, 50), (4, 100), (8, 37)])
def test_steps_are_among_the_times_of_the_distillation(kind, steps, distilled):
    theirs = getattr(diffusers, kind)(original_inference_steps=distilled)
    ours = PlanScheduler.from_config(theirs.config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    stride = 1000 // distilled
    of = [k * stride - 1 for k in range(distilled, 0, -1)]
    want = [of[int(i * distilled / steps)] for i in range(steps)]
    assert ours.timesteps.tolist() == want == theirs.timesteps.tolist()


def test_arguments_of_latent_consistency_pipelines():
    ours = PlanScheduler(solver="tab2", beta_schedule="scaled_linear")
    ours.set_timesteps(2, original_inference_steps=4, strength=0.5)
    assert ours.timesteps.tolist() == [499, 249]
    with pytest.raises(ValueError, match="5 steps among 4 times"):
        ours.set_timesteps(5, original_inference_steps=4)
    for value in (0, 2000, "a", 2.5):
        with pytest.raises(ValueError, match="original_inference_steps must be"):
            ours.set_timesteps(2, original_inference_steps=value)
    for value in (0, 1.5, "a"):
        with pytest.raises(ValueError, match="strength must be"):
            ours.set_timesteps(2, original_inference_steps=4, strength=value)
    with pytest.raises(ValueError, match="set_begin_index"):
        ours.set_timesteps(2, strength=0.5)
    # The second of the tuple is the predicted data, by the formula of an epsilon-prediction.
    ours.set_timesteps(2, original_inference_steps=4)
    x, noise, t = tiny.normal((1, 2, 3, 3)), tiny.normal((1, 2, 3, 3), 1), ours.timesteps[0]
    level = ours.alphas_cumprod[int(t)]
    _, data = ours.step(noise, t, x, return_dict=False)
    assert torch.allclose(data, (x - (1 - level).sqrt() * noise) / level.sqrt(), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("s_churn", 5.0),
        ("per_token_timesteps", torch.ones(3)),
        ("r_timestep", 400.0),
        ("pred_original_sample", torch.ones(3)),
        ("temperature", 1.0),
    ],
)
def test_arguments_of_other_schedulers_are_refused_by_name(name, value):
    ours, x = PlanScheduler(solver="ddim"), tiny.normal((1, 2, 3, 3))
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match=name):
        ours.step(x, ours.timesteps[0], x, **{name: value})
    ours.step(x, ours.timesteps[0], x, **{name: None})
    with pytest.raises(ValueError, match=name):
        ours.set_timesteps(3, **{name: value})


def test_the_next_timestep_that_unclip_says_is_checked():
    ours, x = PlanScheduler(solver="ddpm"), tiny.normal((1, 2, 3, 3))
    ours.set_timesteps(3)
    times = ours.timesteps
    ours.step(x, times[0], x, prev_timestep=times[1], generator=tiny.seeded())
    with pytest.raises(ValueError, match="prev_timestep=5"):
        ours.step(x, times[1], x, prev_timestep=5)


def test_the_shift_that_is_none():
    ours = PlanScheduler(
        solver="ddim", prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    for value in (1e4, "a", [1], float("nan")):
        with pytest.raises(ValueError, match="mu"):
            ours.set_timesteps(4, mu=value)


@pytest.mark.parametrize(("family", "first"), [("dpmpp", "dpmpp-2m"), ("unipc", "unipc2")])
def test_a_family_steps_at_the_same_times_for_every_order(family, first):
    want = PlanScheduler(solver=first)
    want.set_timesteps(5)
    for order in (1, 2, 3):
        if (family, order) == ("unipc", 1):
            with pytest.raises(ValueError, match="'ddim' is the predictor"):
                PlanScheduler(solver=family, solver_order=order)
            continue
        ours = PlanScheduler(solver=family, solver_order=order)
        ours.set_timesteps(5)
        assert ours.timesteps.tolist() == want.timesteps.tolist()


def test_a_spacing_that_ends_above_zero_has_as_many_steps_as_asked():
    pytest.importorskip("scipy")
    for option in ("use_beta_sigmas", "use_karras_sigmas"):
        ours = PlanScheduler(
            solver="tab2", final_sigmas_type="sigma_min", sigma_max=100.0, **{option: True}
        )
        ours.set_timesteps(5)
        lowest = float(((1 - ours.alphas_cumprod[0]) / ours.alphas_cumprod[0]).sqrt())
        assert len(ours.timesteps) == 5
        assert float(ours.sigmas[-1]) == pytest.approx(lowest, rel=1e-4)


# What a configuration of an earlier PlanScheduler leaves behind.


def test_a_new_solver_replaces_an_earlier_recipe_and_the_other_way_round():
    recipe = fewstep.SamplerRecipe(name="tab2", nfe=6, grid="quadratic").to_json()
    first = PlanScheduler(recipe=recipe)
    second = PlanScheduler.from_config(first.config, solver="unipc3")
    assert second.config.recipe is None
    second.set_timesteps(4)
    assert second.plan.name == "unipc3"
    third = PlanScheduler.from_config(second.config, recipe=recipe)
    assert third.config.solver == "auto"
    third.set_timesteps(6)
    assert third.plan.name == "tab2"
    with pytest.raises(ValueError, match="a recipe has its solver"):
        PlanScheduler(solver="tab3", recipe=recipe)
    with pytest.raises(ValueError, match="a recipe has its solver"):
        PlanScheduler.from_config(first.config, grid="karras")

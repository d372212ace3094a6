"""PlanScheduler under the contract of diffusers' schedulers and in its pipelines; its schedulers as plans."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
import tiny_pipelines as tiny
from fewstep.plans.execute import execute

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from fewstep.adapters.diffusers import PlanScheduler, plan_from_scheduler  # noqa: E402
from fewstep.adapters.diffusers.probing import Runner  # noqa: E402

pytestmark = tiny.MARKS
relative = tiny.relative

ROUNDING = 2e-5
"""Of float32, through ten steps of a network that amplifies differences."""


def network(x: Tensor, t: Any) -> Tensor:
    """A smooth nonlinear network that mixes pixels and knows its time."""
    u = float(t) / 1000
    return torch.tanh(x * (1.3 - u) + u * x.roll(1, -1)) * 0.8 + 0.1 * x.sin()


def loop(scheduler: Any, steps: int | None = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
    """Samples as a pipeline does."""
    generator = torch.Generator().manual_seed(seed)
    setting = {k: arguments.pop(k) for k in ("timesteps", "sigmas", "mu") if k in arguments}
    scheduler.set_timesteps(num_inference_steps=steps, **setting) if steps else (
        scheduler.set_timesteps(**setting)
    )
    x = torch.randn(2, 3, 4, 4, generator=generator)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(y, t), t, x, return_dict=False, **arguments)[0]
    return x


# The same method as diffusers' own scheduler, from the same configuration.

SAME = [
    ("ddim", "DDIMScheduler", {"clip_sample": False}, {}),
    ("ddim", "DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
    ("ddpm", "DDPMScheduler", {"clip_sample": False}, {}),
    ("ddpm", "DDPMScheduler", {"clip_sample": True}, {}),
    ("ddpm", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, {}),
    ("pndm", "PNDMScheduler", {"steps_offset": 1}, {}),
    ("logrhoab1", "DEISMultistepScheduler", {}, {}),
    ("logrhoab", "DEISMultistepScheduler", {"solver_order": 3}, {}),
    ("dpmpp-2m", "DPMSolverMultistepScheduler", {}, {}),
    (
        "dpmpp-2m",
        "DPMSolverMultistepScheduler",
        {"thresholding": True, "sample_max_value": 1.5},
        {},
    ),
    (
        "dpmpp-2m",
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
        {},
    ),
    ("dpmpp-2m", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    ("dpmpp", "DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    ("dpmpp-2m-sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("unipc2", "UniPCMultistepScheduler", {}, {}),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, {}),
    ("heun", "HeunDiscreteScheduler", {}, {}),
    ("ddim", "FlowMatchEulerDiscreteScheduler", {}, {}),
    ("ddim", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("ddim", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"mu": 0.8}),
    ("ddim", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}, {}),
]


@pytest.mark.parametrize(
    ("solver", "twin", "config", "arguments"),
    SAME,
    ids=[f"{n}-{s[0]}" for n, s in enumerate(SAME)],
)
def test_equals_the_twin(solver, twin, config, arguments):
    theirs = getattr(diffusers, twin)(**config)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    want, got = loop(theirs, **dict(arguments)), loop(ours, **dict(arguments))
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    assert relative(got, want) < ROUNDING


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize(
    ("solver", "twin"),
    [
        ("ddim", "DDIMScheduler"),
        ("logrhoab2", "DEISMultistepScheduler"),
        ("dpmpp-2m", "DPMSolverMultistepScheduler"),
        ("unipc3", "UniPCMultistepScheduler"),
    ],
)
def test_predictions(solver, twin, prediction):
    config = {"prediction_type": prediction, "solver_order": 3 if solver != "dpmpp-2m" else 2}
    if twin == "DDIMScheduler":
        config = {"prediction_type": prediction, "clip_sample": False}
    theirs = getattr(diffusers, twin)(**config)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    assert relative(loop(ours), loop(theirs)) < ROUNDING


def test_zero_terminal_snr_equals_ddim():
    theirs = diffusers.DDIMScheduler(
        clip_sample=False,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    assert ours.timesteps is not None
    assert relative(loop(ours), loop(theirs)) < ROUNDING
    # Higher orders, in float32, from a state without any data in it.
    tab = PlanScheduler.from_config(theirs.config, solver="tab2", final_sigmas_type="zero")
    fine = PlanScheduler.from_config(theirs.config, solver="ddim")
    assert relative(loop(tab, 50), loop(fine, 500)) < 0.1


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("solver", "twin", "order"),
    [
        ("dpmpp-2m", "DPMSolverMultistepScheduler", 2),
        ("dpmpp-3m", "DPMSolverMultistepScheduler", 3),
        ("unipc2", "UniPCMultistepScheduler", 2),
        ("ddpm", "DDPMScheduler", None),
    ],
)
def test_zero_terminal_snr_equals_the_twin(solver, twin, order, prediction):
    """Up to what stands for alpha = 0: 2^-12 in diffusers' multistep methods, 1e-6 here."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": prediction}
    config |= {"clip_sample": False} if order is None else {"solver_order": order}
    theirs = getattr(diffusers, twin)(timestep_spacing="trailing", **config)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    assert relative(loop(ours), loop(theirs)) < (2e-5 if order is None else 1e-3)


@pytest.mark.parametrize(
    ("solver", "twin"),
    [("dpmpp-2m", "DPMSolverMultistepScheduler"), ("unipc2", "UniPCMultistepScheduler")],
)
def test_flow_sigmas_equal_the_twin(solver, twin):
    """diffusers truncates the conditioning timesteps to integers; ours are exact."""
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    theirs = getattr(diffusers, twin)(**config)
    ours = PlanScheduler.from_config(theirs.config, solver=solver)
    want, got = loop(theirs), loop(ours)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
    assert torch.allclose(ours.timesteps, 1000 * theirs.sigmas[:-1], atol=2e-3)
    assert 0 <= float((ours.timesteps - theirs.timesteps).min())
    assert float((ours.timesteps - theirs.timesteps).max()) <= 1
    assert relative(got, want) < 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift": 3.0, "shift_terminal": 0.02},
    ],
)
def test_flow_levels_equal_the_twin(config):
    """The first is 1 - 1e-6 here, and 1 for the network, as in diffusers."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    assert relative(loop(ours, 20), loop(theirs, 20)) < ROUNDING
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
    assert float(ours.timesteps[0]) == float(theirs.timesteps[0]) == 1000


def test_solvers_agree_on_a_fine_grid():
    """Any solver from one configuration converges to one sample."""
    config = diffusers.DDIMScheduler(clip_sample=False).config
    reference = loop(PlanScheduler.from_config(config, solver="dpmpp-2m"), 200)
    for solver in ("tab2", "rhoab2", "logrhoab1", "ipndm", "heun", "rho-kutta3", "unipc2"):
        ours = PlanScheduler.from_config(
            config, solver=solver, timestep_spacing="linspace", final_sigmas_type="zero"
        )
        assert relative(loop(ours, 100), reference) < 0.03, solver


# The contract.


def test_signatures():
    step = inspect.signature(PlanScheduler.step).parameters
    assert list(step)[:4] == ["self", "model_output", "timestep", "sample"]
    assert {
        "eta",
        "generator",
        "use_clipped_model_output",
        "variance_noise",
        "return_dict",
    } <= set(step)
    setting = inspect.signature(PlanScheduler.set_timesteps).parameters
    assert list(setting)[1:3] == ["num_inference_steps", "device"]
    assert {"timesteps", "sigmas", "mu"} <= set(setting)
    for parameter in inspect.signature(PlanScheduler.__init__).parameters.values():
        if parameter.name != "self":
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            json.dumps(parameter.default)


def test_config_round_trips(tmp_path):
    ours = PlanScheduler(
        solver="edm-stochastic", solver_options={"s_churn": 3.0}, grid="karras", steps_offset=1
    )
    ours.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    want = {k: v for k, v in ours.config.items() if not k.startswith("_")}
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == want
    assert torch.equal(loop(again), loop(ours))


def test_every_compatible_scheduler_keeps_our_options():
    ours = PlanScheduler(
        solver="tab3", grid="quadratic", beta_start=0.001, beta_end=0.02, beta_schedule="linear"
    )
    names = {c.__name__ for c in ours.compatibles}
    assert {"DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"} <= names
    for other in ours.compatibles:
        if other.__name__ == "DPMSolverSDEScheduler":
            pytest.importorskip("torchsde")
        back = PlanScheduler.from_config(other.from_config(ours.config).config)
        assert {k: back.config[k] for k in ours.config if k[0] != "_"} == {
            k: v for k, v in ours.config.items() if k[0] != "_"
        }, other


def test_noise_levels_come_from_the_model_even_if_they_are_defaults():
    """Heun's defaults are those of Stable Diffusion, ours those of DDPM."""
    theirs = diffusers.HeunDiscreteScheduler()
    ours = PlanScheduler.from_config(theirs.config, solver="tab3")
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_output_is_a_tuple_or_an_object():
    ours = PlanScheduler(solver="tab2")
    ours.set_timesteps(5)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = ours.step(network(x, 999), ours.timesteps[0], x).prev_sample
    ours.set_timesteps(5)
    (second,) = ours.step(network(x, 999), ours.timesteps[0], x, return_dict=False)
    assert torch.equal(first, second)
    assert ours.scale_model_input(x, 0.0) is x
    assert len(ours) == 1000
    assert ours.init_noise_sigma == 1.0


def test_order_and_stages():
    heun = PlanScheduler(solver="heun")
    heun.set_timesteps(5)
    assert heun.order == 2
    assert len(heun.timesteps) == 9  # one call in the step onto zero, as in diffusers
    for solver, order in (("tab3", 1), ("rho-heun", 2), ("rho-kutta3", 3), ("rho-rk4", 4)):
        ours = PlanScheduler(solver=solver, final_sigmas_type="sigma_min")
        ours.set_timesteps(5)
        assert ours.order == order
        assert len(ours.timesteps) == 5 * order
    budget = PlanScheduler(solver="rho-rk4", count="calls", final_sigmas_type="sigma_min")
    budget.set_timesteps(10)
    assert len(budget.timesteps) == 8


def test_fractional_and_integer_times():
    ours = PlanScheduler(solver="tab3", use_karras_sigmas=True)
    ours.set_timesteps(7)
    assert ours.timesteps.dtype == torch.float32
    assert ours.timesteps.tolist() == pytest.approx(ours.plan.times.tolist(), abs=1e-3)
    whole = PlanScheduler(solver="tab3", use_karras_sigmas=True, integer_times=True)
    whole.set_timesteps(7)
    assert whole.timesteps.dtype == torch.int64
    # The levels are those of the rounded times, not of the others.
    rho = ((1 - whole.alphas_cumprod) / whole.alphas_cumprod).sqrt()
    assert torch.allclose(whole.sigmas[:-1], rho[whole.timesteps], rtol=1e-5)


def test_custom_timesteps_and_sigmas():
    ours = PlanScheduler(solver="dpmpp-2m")
    times = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    ours.set_timesteps(timesteps=times)
    assert ours.timesteps.tolist() == times
    by_times = loop(ours, None, timesteps=times)
    levels = ((1 - ours.alphas_cumprod) / ours.alphas_cumprod).sqrt()[times].tolist()
    assert relative(loop(ours, None, sigmas=[*levels, 0.0]), by_times) < ROUNDING
    with pytest.raises(ValueError, match="decrease strictly"):
        ours.set_timesteps(timesteps=[10, 20])
    with pytest.raises(ValueError, match="noisiest level"):
        ours.set_timesteps(sigmas=[1000.0, 1.0])


def test_flow_with_sigmas_and_mu():
    config = {"use_dynamic_shifting": True}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    sigmas = torch.linspace(1, 1 / 6, 6).tolist()
    want = loop(theirs, None, sigmas=sigmas, mu=1.15)
    assert relative(loop(ours, None, sigmas=sigmas, mu=1.15), want) < ROUNDING
    assert float(ours.timesteps[0]) == 1000
    assert float(ours.sigmas[-1]) == 0
    with pytest.raises(ValueError, match="needs mu"):
        ours.set_timesteps(5)


def test_add_noise_before_after_and_off_the_grid():
    ours = PlanScheduler(solver="tab3")
    theirs = diffusers.DDPMScheduler()
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(3, 3, 4, 4, generator=generator) for _ in range(2))
    for t in (torch.tensor([0, 417, 999]), torch.tensor([3])):
        want = theirs.add_noise(x, z, t)
        assert torch.allclose(ours.add_noise(x, z, t), want, atol=1e-6)
        ours.set_timesteps(10)
        assert torch.allclose(ours.add_noise(x, z, t), want, atol=1e-6)
        assert torch.allclose(ours.add_noise(x, z, t.float()), want, atol=1e-5)
        assert torch.allclose(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t), atol=1e-6)
    flow = PlanScheduler(solver="tab3", prediction_type="flow_prediction")
    t = torch.tensor([250.0])
    assert torch.allclose(flow.scale_noise(x, t, z), 0.75 * x + 0.25 * z)


@pytest.mark.parametrize("solver", ["tab3", "dpmpp-2m", "unipc3", "heun", "ddpm"])
def test_midway_start_is_a_new_plan_on_the_rest(solver):
    ours = PlanScheduler(solver=solver)
    ours.set_timesteps(8)
    begin = 3 * ours.order
    x0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))

    def run(scheduler, timesteps):
        generator = torch.Generator().manual_seed(1)
        x = x0
        for t in timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)[0]
        return x

    ours.set_begin_index(begin)
    assert ours.begin_index == begin
    by_index = run(ours, ours.timesteps[begin:])
    assert ours.step_index == len(ours.timesteps)
    ours.set_timesteps(8)
    assert ours.begin_index is None
    assert torch.equal(run(ours, ours.timesteps[begin:]), by_index)
    ours.set_timesteps(8)
    assert torch.equal(run(ours, ours.timesteps.tolist()[begin:]), by_index)
    # The plan knows nothing of the steps before.
    rest = PlanScheduler(solver=solver, lower_order_final=True)
    starts = list(dict.fromkeys(ours.timesteps.tolist()[begin:]))
    rest.set_timesteps(timesteps=starts)
    assert relative(run(rest, rest.timesteps), by_index) < 1e-6


def test_a_start_between_two_timesteps():
    ours = PlanScheduler(solver="ddim", timestep_spacing="linspace")
    ours.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    got = ours.step(network(x, 400), 400, x).prev_sample
    assert ours.plan.times.tolist() == [400, *[t for t in ours.timesteps.tolist() if t < 400]]
    alpha, after = ours.alphas_cumprod[400], ours.alphas_cumprod[int(ours.plan.times[1])]
    eps = network(x, 400)
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    assert torch.allclose(got, after.sqrt() * x0 + (1 - after).sqrt() * eps, atol=1e-5)


def test_wrong_order_of_steps_is_refused():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(6)
    x = torch.randn(1, 3, 4, 4)
    x = ours.step(network(x, 999), ours.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="call set_timesteps before each run"):
        ours.step(x, ours.timesteps[3], x)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        PlanScheduler(solver="tab3").step(x, 999, x)
    pndm = PlanScheduler(solver="pndm")
    pndm.set_timesteps(10)
    with pytest.raises(ValueError, match="pndm cannot begin at index 2"):
        pndm.set_begin_index(2)
    with pytest.raises(ValueError, match="pndm cannot begin at index 2"):
        pndm.step(x, pndm.timesteps[2], x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "tb3"}, "tab3"),
        ({"solver": "ddim", "solver_options": {"etta": 1}}, "etta"),
        ({"grid": "karas"}, "karras"),
        ({"prediction_type": "eps"}, "epsilon"),
        ({"timestep_spacing": "even"}, "linspace"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"solver": "tab", "solver_order": 7}, "solver_order"),
        ({"recipe": "/nowhere.json"}, "cannot be read"),
    ],
)
def test_bad_configurations_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PlanScheduler(**arguments)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_bad_counts(steps):
    with pytest.raises(ValueError, match="positive integer"):
        PlanScheduler(solver="tab3").set_timesteps(steps)


def test_eta_belongs_to_ddim():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="option of the solver 'ddim'"):
        ours.step(x, ours.timesteps[0], x, eta=0.5)


def test_edited_states_are_taken_up():
    """Inpainting edits the state between steps: a replaced state equals one edited in place."""
    ours = PlanScheduler(solver="tab2")

    def run(edit):
        ours.set_timesteps(6)
        x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in ours.timesteps:
            x = edit(ours.step(network(x, t), t, x).prev_sample)
        return x

    halved = run(lambda x: x * 0.5)
    assert torch.equal(halved, run(lambda x: x.mul_(0.5)))
    assert relative(halved, run(lambda x: x)) > 0.1


def test_what_a_pipeline_keeps_is_never_overwritten():
    ours = PlanScheduler(solver="unipc3")
    ours.set_timesteps(8)
    x = torch.randn(1, 3, 4, 4)
    stored: list[tuple[Tensor, Tensor]] = [(x, x.clone())]
    for t in ours.timesteps:
        x = ours.step(network(x, t), t, x).prev_sample
        stored.append((x, x.clone()))
    assert all(torch.equal(a, b) for a, b in stored)


def test_half_precision_keeps_its_type_and_accumulates_above_it():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 4, 4, generator=generator).half()
    y = x.float()
    half = []
    for t in ours.timesteps:
        x = ours.step(torch.full_like(x, 0.25), t, x).prev_sample
        half.append(x)
    ours.set_timesteps(20)
    for t in ours.timesteps:
        y = ours.step(torch.full_like(y, 0.25), t, y).prev_sample
    assert half[-1].dtype == torch.float16
    # Rounded once at the end, not at each step.
    assert torch.equal(half[-1], y.half())


def test_generators_one_or_one_a_sample():
    ours = PlanScheduler(solver="dpmpp-2m-sde")

    def run(x, generator):
        ours.set_timesteps(5)
        for t in ours.timesteps:
            x = ours.step(network(x, t), t, x, generator=generator).prev_sample
        return x

    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    many = run(x, [torch.Generator().manual_seed(s) for s in (7, 8, 9)])
    alone = run(x[1:2], torch.Generator().manual_seed(8))
    assert torch.allclose(many[1:2], alone, atol=1e-6)
    other = run(x, [torch.Generator().manual_seed(s) for s in (7, 1, 9)])
    assert torch.equal(other[0], many[0])
    assert not torch.allclose(other[1], many[1], atol=1e-2)


# Recipes and plans.


def test_a_recipe_goes_with_the_scheduler(tmp_path):
    schedule = fewstep.schedule(
        "tabulated", alphas_cumprod=PlanScheduler().alphas_cumprod.double()
    )
    plan = fewstep.plan("tab3", schedule, nfe=6, grid="quadratic")
    file = plan.save(tmp_path / "plan.json")
    ours = PlanScheduler(recipe=str(file))
    file.unlink()
    ours.save_pretrained(tmp_path / "s")
    again = PlanScheduler.from_pretrained(tmp_path / "s")
    want = loop(PlanScheduler(solver="tab3", grid="quadratic", final_sigmas_type="sigma_min"), 6)
    assert relative(loop(again, 6), want) < 1e-6
    with pytest.raises(ValueError, match="num_inference_steps=6"):
        again.set_timesteps(7)
    with pytest.raises(ValueError, match="built for"):
        PlanScheduler(recipe=plan.to_json(), beta_schedule="scaled_linear")


def test_a_scheduler_of_theirs_as_a_plan_in_ours():
    """Round trip: UniPC, read off, run by PlanScheduler."""
    theirs = diffusers.UniPCMultistepScheduler(solver_order=3)
    plan = plan_from_scheduler(theirs, 7)
    ours = PlanScheduler(recipe=plan.to_json())
    assert relative(loop(ours, 7), loop(theirs, 7)) < ROUNDING


AFFINE = [
    ("DDIMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.5}),
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("PNDMScheduler", {}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("DEISMultistepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("KDPM2DiscreteScheduler", {}, {}),
    ("KDPM2AncestralDiscreteScheduler", {}, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("EDMEulerScheduler", {}, {}),
    ("EDMDPMSolverMultistepScheduler", {}, {}),
    ("SASolverScheduler", {}, {}),
    ("LCMScheduler", {}, {}),
    ("TCDScheduler", {}, {"eta": 0.3}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("FlowMatchHeunDiscreteScheduler", {}, {}),
    ("DPMSolverSDEScheduler", {}, {}),
    ("DPMSolverSDEScheduler", {"use_karras_sigmas": True}, {}),
    ("CosineDPMSolverMultistepScheduler", {}, {}),
]


@pytest.mark.parametrize(
    ("name", "config", "arguments"), AFFINE, ids=[f"{n}-{a[0]}" for n, a in enumerate(AFFINE)]
)
def test_plan_from_scheduler_reproduces_its_samples(name, config, arguments):
    if "SDE" in name or "Cosine" in name:
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(**config)
    plan = fewstep.Plan.from_json(plan_from_scheduler(scheduler, 8, **arguments).to_json())
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 4)
    z, *draws = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(40))
    times_seen: list[float] = []

    def output(x: Tensor, k: int, t: float) -> Tensor:
        times_seen.append(t)
        return network(x, t)

    runner = Runner(scheduler, 8, None, arguments)
    want = runner.run(z, output, lambda i, shape: draws[i])
    times = iter(times_seen)
    start = plan.schedule.prior_std(float(plan.knots[0])) * z
    got = execute(plan, lambda x, t: network(x, next(times)), start, draw=draws.__getitem__)
    assert plan.nfe == len(want.inputs)
    assert relative(got, want.output) < 2e-6  # their coefficients are float32


def test_the_brownian_motion_of_sde_is_that_of_diffusers():
    """The scheduler with its own tree of torchsde; the plan with the increments of that tree."""
    pytest.importorskip("torchsde")
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    scheduler = diffusers.DPMSolverSDEScheduler(noise_sampler_seed=3)
    plan = plan_from_scheduler(scheduler, 5)
    scheduler.set_timesteps(5)
    z = tiny.normal((1, 3, 4, 4))
    levels = scheduler.sigmas[::2].tolist()  # the others are repeated, for the two stages
    x = z * float(scheduler.init_noise_sigma)
    low, high = levels[-1], levels[0]
    tree = BrownianTreeNoiseSampler(x, low, high, 3)
    draws = []
    for a, b in itertools.pairwise(levels):
        middle = (a * b) ** 0.5
        draws += [tree(a, middle), tree(middle, b)]
    times_seen: list[float] = []
    for t in scheduler.timesteps:
        y = scheduler.scale_model_input(x, t)
        times_seen.append(float(t))
        x = scheduler.step(network(y, t), t, x).prev_sample
    times = iter(times_seen)
    start = plan.schedule.prior_std(float(plan.knots[0])) * z
    got = execute(plan, lambda x, t: network(x, next(times)), start, draw=draws.__getitem__)
    assert plan.n_noise == len(draws)
    assert relative(got, x) < 1e-3  # float32 states of size 150, and a tree to a tolerance


@pytest.mark.parametrize(
    ("name", "config", "option"),
    [
        ("DDIMScheduler", {}, "clip_sample"),
        (
            "DDPMScheduler",
            {"clip_sample": False, "variance_type": "learned_range"},
            "variance_type",
        ),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
    ],
)
def test_what_is_not_affine_is_refused_by_name(name, config, option):
    with pytest.raises(ValueError, match=option):
        plan_from_scheduler(getattr(diffusers, name)(**config), 5)


def test_deis_wastes_its_last_karras_step():
    """With Karras levels DEIS repeats the last one, so its last evaluation changes nothing; ours does not."""
    plan = plan_from_scheduler(diffusers.DEISMultistepScheduler(use_karras_sigmas=True), 8)
    assert float(plan.flat().B[-1, -1].abs()) < 1e-6
    ours = PlanScheduler(solver="logrhoab1", use_karras_sigmas=True)
    ours.set_timesteps(8)
    assert float(ours.plan.flat().B[-1, -1].abs()) > 1e-3


# Threads, compilation, cost.


def test_copies_go_on_where_the_original_is():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(5)
    x = torch.randn(1, 3, 4, 4)
    x = ours.step(network(x, 999), ours.timesteps[0], x).prev_sample
    other = copy.deepcopy(ours)
    t = ours.timesteps[1]
    assert torch.equal(
        ours.step(network(x, t), t, x).prev_sample, other.step(network(x, t), t, x).prev_sample
    )


OLD_COMPILER = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


@pytest.mark.parametrize(
    ("solver", "backend"),
    [
        ("tab2", "eager"),
        ("unipc3", "eager"),
        ("dpmpp-2m", "eager"),
        # Backward functions and the removal of writes in place.
        ("tab2", "aot_eager"),
        # Code in C++, equal to rounding; some 12 s of a core for the compiler, once.
        pytest.param(
            "tab2",
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
                ),
            ],
        ),
    ],
)
def test_compiles_with_the_network_without_a_graph_break(solver, backend):
    if OLD_COMPILER:
        torch._dynamo.reset()  # it takes the integers of a second plan for symbols, and then stops
    linear = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    ours = PlanScheduler(solver=solver)

    def sample(x: Tensor) -> Tensor:
        for i in range(4):
            t = ours.timesteps[i]
            x = ours.step(linear(x) * 0.1, t, x, return_dict=False)[0]
        return x

    x = torch.randn(2, 3, 4, 4)
    ours.set_timesteps(4)
    ours.set_begin_index(0)
    want = sample(x)
    ours.set_timesteps(4)
    ours.set_begin_index(0)
    got = torch.compile(sample, fullgraph=True, backend=backend)(x)
    assert relative(got, want) < ROUNDING


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        ("ddim", 2),
        ("dpmpp-2m", 4),
        ("tab3", 5),
        ("logrhoab2", 4),
        ("dpmpp-3m", 5),
        ("unipc2", 5),
        ("unipc3", 6),
    ],
)
def test_tensor_operations_are_counted(solver, most):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    ours = PlanScheduler(solver=solver)
    ours.set_timesteps(20)
    timesteps = list(ours.timesteps)
    x = torch.randn(1, 3, 32, 32)
    f = x * 0.1
    with torch.no_grad(), Count() as count:
        count.calls = []
        for t in timesteps:
            x = ours.step(f, t, x, return_dict=False)[0]
    assert len(count.calls) <= most * 20
    assert not any("item" in c or "local_scalar" in c or "nonzero" in c for c in count.calls)


@pytest.mark.parametrize("grid", ["quadratic", "uniform", "log-rho"])
def test_auto_on_another_grid(grid):
    chosen = PlanScheduler(solver="auto", grid=grid)
    chosen.set_timesteps(6)
    named = PlanScheduler(solver="unipc2", grid=grid)  # the choice of auto below 10 evaluations
    named.set_timesteps(6)
    assert torch.equal(chosen.timesteps, named.timesteps)
    assert chosen.plan.to_json() == named.plan.to_json()

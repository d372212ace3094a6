"""What every scheduler of diffusers promises, held by PlanScheduler; the published values of DEIS."""

from __future__ import annotations

import inspect
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402

pytestmark = tiny.MARKS

SOLVERS = ["ddim", "tab3", "logrhoab1", "dpmpp-2m-sde", "unipc3", "heun", "ipndm", "ddpm", "auto"]
SHAPE = (4, 3, 8, 8)


def ramp(*, falling: bool = False) -> Tensor:
    """Even values from 0 to 1 along channels, rows, columns and then samples: (4, 3, 8, 8)."""
    values = torch.arange(4 * 3 * 8 * 8)
    values = values.flip(-1) if falling else values
    return (values.reshape(3, 8, 8, 4) / len(values)).permute(3, 0, 1, 2)


def model(x: Tensor, t: Any) -> Tensor:
    """The network of the published values: the state, times t / (t + 1)."""
    return x * t / (t + 1)


def loop(scheduler: Any, x: Tensor, steps: int = 10, start: int = 0) -> Tensor:
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    if start:
        x = scheduler.add_noise(x, ramp(falling=True), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(model(x, t), t, x, generator=tiny.seeded()).prev_sample
    return x


# The figures are those of diffusers' own test of DEISMultistepScheduler (huggingface/diffusers,
# tests/schedulers/test_scheduler_deis.py: mean 0.23916, with v-prediction 0.091, from the noised
# ramp at the ninth of ten steps sum 315.3016 and mean 0.41054), with its tolerance of 1e-3.


@pytest.mark.parametrize(("prediction", "mean"), [("epsilon", 0.23916), ("v_prediction", 0.091)])
def test_published_values_of_deis(prediction, mean):
    ours = PlanScheduler(solver="logrhoab", solver_order=2, prediction_type=prediction)
    assert abs(float(loop(ours, ramp()).abs().mean()) - mean) < 1e-3
    theirs = diffusers.DEISMultistepScheduler(solver_order=2, prediction_type=prediction)
    same = PlanScheduler.from_config(theirs.config, solver="logrhoab")
    assert abs(float(loop(same, ramp()).abs().mean()) - mean) < 1e-3


def test_published_value_of_deis_from_noise():
    ours = PlanScheduler(solver="logrhoab", solver_order=2)
    result = loop(ours, ramp(), start=8).abs()
    assert abs(float(result.sum()) - 315.3016) < 1e-2
    assert abs(float(result.mean()) - 0.41054) < 1e-3


def test_published_value_survives_other_classes():
    """Through the configurations of three other schedulers and back."""
    scheduler: Any = PlanScheduler(solver="logrhoab", solver_order=2)
    for name in ("DPMSolverSinglestep", "DPMSolverMultistep", "UniPCMultistep"):
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(scheduler.config)
    back = PlanScheduler.from_config(scheduler.config)
    assert abs(float(loop(back, ramp()).abs().mean()) - 0.23916) < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_saved_and_loaded_it_steps_alike(tmp_path, solver):
    ours = PlanScheduler(solver=solver, beta_schedule="scaled_linear", beta_start=0.001)
    ours.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert dict(again.config) == {
        k: v for k, v in ours.config.items() if k != "_use_default_values"
    }
    assert again.init_noise_sigma == ours.init_noise_sigma
    assert again.order == ours.order
    result = [loop(s, tiny.normal(SHAPE)) for s in (ours, again)]
    assert torch.equal(*result)
    assert not torch.allclose(result[0], tiny.normal(SHAPE), atol=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tuple_and_object_are_the_same(solver):
    ours, x = PlanScheduler(solver=solver), tiny.normal(SHAPE)
    result = []
    for as_object in (True, False):
        ours.set_timesteps(50)
        t = ours.timesteps[0]
        result.append(ours.step(0.1 * x, t, x, generator=tiny.seeded(), return_dict=as_object))
    assert torch.equal(result[0].prev_sample, result[1][0])
    assert result[0]["prev_sample"] is result[0].prev_sample
    assert result[0].prev_sample.shape == x.shape


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_keep_their_type(solver, dtype):
    result = loop(PlanScheduler(solver=solver), ramp().to(dtype))
    assert result.dtype == dtype
    if solver in ("dpmpp-2m-sde", "ddpm"):
        return  # generators draw other numbers in other types
    exact = loop(PlanScheduler(solver=solver), ramp().double())
    # bfloat16 has three digits in each output, and there are ten.
    assert tiny.relative(result.double(), exact) < {8: 1e-5, 4: 1e-3, 2: 0.2}[dtype.itemsize]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 1000])
@pytest.mark.parametrize("solver", ["ddim", "logrhoab1", "unipc3"])
def test_any_number_of_steps(solver, steps):
    ours = PlanScheduler(solver=solver)
    ours.set_timesteps(steps)
    assert len(ours.timesteps) == ours.num_inference_steps == steps
    assert bool((ours.timesteps.diff() < 0).all())
    assert len(ours.sigmas) == steps + 1
    x = ramp()
    first = ours.step(0.1 * x, ours.timesteps[0], x).prev_sample
    assert not torch.equal(first, x)
    assert bool(first.isfinite().all())


@pytest.mark.parametrize("levels", [25, 50, 100, 999, 1000])
def test_any_number_of_trained_levels(levels):
    theirs = diffusers.DDIMScheduler(num_train_timesteps=levels, clip_sample=False)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    assert len(ours) == levels
    got, want = ([s.set_timesteps(20), s.timesteps.tolist()][1] for s in (ours, theirs))
    assert got == want


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_are_those_of_diffusers(kind):
    theirs = diffusers.DDIMScheduler(beta_schedule=kind)
    ours = PlanScheduler(beta_schedule=kind)
    assert torch.allclose(ours.betas, theirs.betas, rtol=1e-5)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)


def test_trained_betas_are_saved(tmp_path):
    ours = PlanScheduler(trained_betas=numpy.array([0.1, 0.3]))
    ours.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert again.betas.tolist() == ours.betas.tolist() == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("solver", SOLVERS)
def test_noising_at_an_entry_of_timesteps(solver):
    ours, theirs = PlanScheduler(solver=solver), diffusers.DDPMScheduler()
    ours.set_timesteps(100)
    x, z = ramp(), tiny.normal(SHAPE, 1)
    t = ours.timesteps[5][None]
    want = theirs.add_noise(x, z, t.round().long())
    assert tiny.relative(ours.add_noise(x, z, t), want) < 0.02  # fractional times lie between
    assert torch.equal(ours.scale_model_input(x, 0.0), x)
    for dtype in (torch.float16, torch.float64):
        noised = ours.add_noise(x.to(dtype), z.to(dtype), t)
        assert noised.dtype == dtype
        assert tiny.relative(noised.float(), ours.add_noise(x, z, t)) < 2e-3


def test_the_public_names():
    ours = PlanScheduler()
    for name in ("init_noise_sigma", "order", "timesteps", "sigmas", "betas", "alphas_cumprod"):
        assert getattr(ours, name) is not None
    parameters = inspect.signature(PlanScheduler.__init__).parameters
    assert "kwargs" not in parameters
    assert not PlanScheduler._deprecated_kwargs
    assert all(kind is not None for kind in ours.compatibles)
    with pytest.raises(AttributeError, match="does_not_exist"):
        ours.does_not_exist  # noqa: B018
    with pytest.raises(ValueError, match="steps, timesteps or sigmas"):
        ours.set_timesteps()


def test_a_single_call_at_any_time():
    """As in diffusers' tests: calls in any order, plain integers as times."""
    ours, x = PlanScheduler(solver="ddim", clip_sample=False), ramp()
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    for t in (1, 0):
        result = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(1000)
            result.append(scheduler.step(0.1 * x, t, x).prev_sample)
        assert torch.allclose(*result, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.9, 0.995])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
def test_thresholding_equals_theirs(prediction, bound, ratio):
    theirs = diffusers.DEISMultistepScheduler(
        solver_order=3,
        thresholding=True,
        sample_max_value=bound,
        prediction_type=prediction,
        dynamic_thresholding_ratio=ratio,
    )
    ours = PlanScheduler.from_config(theirs.config, solver="logrhoab")
    x = tiny.normal(SHAPE)

    def theirs_loop() -> Tensor:
        theirs.set_timesteps(10)
        y = x
        for t in theirs.timesteps:
            y = theirs.step(model(y, t), t, y).prev_sample
        return y

    assert tiny.relative(loop(ours, x), theirs_loop()) < 1e-4


def test_midway_starts_that_cannot_be_are_refused_with_the_fix():
    import fewstep

    x = ramp()
    pndm = PlanScheduler(solver="pndm")
    pndm.set_timesteps(10)
    with pytest.raises(ValueError, match="'ipndm', 'tab3' or 'heun'"):
        pndm.set_begin_index(14)
    with pytest.raises(ValueError, match="'ipndm', 'tab3' or 'heun'"):
        pndm.step(x, pndm.timesteps[14], x)
    plan = fewstep.plan("tab2", pndm.schedule, nfe=6)
    stored = PlanScheduler(recipe=plan.to_json())
    stored.set_timesteps(6)
    with pytest.raises(ValueError, match="recipe=None, solver='tab3'"):
        stored.set_begin_index(2)
    with pytest.raises(ValueError, match="recipe=None, solver='tab3'"):
        stored.step(x, stored.timesteps[2], x)
    # The fix in the message works.
    repaired = PlanScheduler.from_config(stored.config, recipe=None, solver="tab3")
    assert not torch.equal(loop(repaired, x, start=4), x)

"""Pipelines that step in their own way: learned variance, views, copies, growing batches, runs in two parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402

pytestmark = tiny.MARKS
relative = tiny.relative
seeded = tiny.seeded

SHAPE = (2, 3, 4, 4)
STOCHASTIC = ["ddpm", "dpmpp-2m-sde", "gddim", "euler-maruyama"]


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    u = float(t) / 1000
    return torch.tanh(x * (1.3 - u) + u * x.roll(1, -1)) * 0.8 + 0.1 * x.sin()


def run(scheduler: Any, x: torch.Tensor, timesteps: Any, **arguments: Any) -> torch.Tensor:
    for t in timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **arguments)[0]
    return x


# Learned variance: the network returns 2C channels.


@pytest.mark.parametrize("solver", [*STOCHASTIC, "tab3"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_learned_variance_is_dropped_and_draws_have_the_shape_of_the_state(solver, clip):
    result = []
    for doubled in (True, False):
        ours = PlanScheduler(solver=solver, clip_sample=clip, variance_type="learned_range")
        ours.set_timesteps(5)
        x, generator = tiny.normal(SHAPE), seeded(1)
        for t in ours.timesteps:
            y = network(x, t)
            y = torch.cat([y, torch.ones_like(y)], 1) if doubled else y
            x = ours.step(y, t, x, generator=generator).prev_sample
        result.append(x)
    assert result[0].shape == SHAPE
    assert torch.equal(*result)


def test_a_learned_variance_with_a_generator_for_each_sample():
    ours = PlanScheduler(solver="ddpm")
    ours.set_timesteps(3)
    x = tiny.normal(SHAPE)
    for t in ours.timesteps:
        y = torch.cat([network(x, t)] * 2, 1)
        x = ours.step(y, t, x, generator=[seeded(1), seeded(2)]).prev_sample
    assert x.shape == SHAPE


# Panorama pipelines: the scheduler's state is put back for each view.


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("solver", ["tab3", "unipc3", "dpmpp-2m-sde", "heun"])
def test_views_one_a_batch_equal_runs_of_their_own(solver, times):
    """As StableDiffusionPanoramaPipeline does: all views start from one and the same copied state."""
    ours = PlanScheduler(solver=solver)
    views = [tiny.normal((1, 3, 4, 4), seed) for seed in (1, 2, 3)]
    for _ in range(times):
        ours.set_timesteps(5)
        status = [copy.deepcopy(ours.__dict__)] * 3
        states = [v.clone() for v in views]
        generators = [seeded(seed) for seed in (4, 5, 6)]
        for t in ours.timesteps:
            for j in range(3):
                ours.__dict__.update(status[j])
                y = network(states[j], t)
                states[j] = ours.step(y, t, states[j], generator=generators[j]).prev_sample
                status[j] = copy.deepcopy(ours.__dict__)
    for j, view in enumerate(views):
        ours = PlanScheduler(solver=solver)
        ours.set_timesteps(5)
        alone = run(ours, view, ours.timesteps, generator=seeded((4, 5, 6)[j]))
        assert relative(states[j], alone) < 1e-6


def test_a_panorama():
    pipe_class = diffusers.StableDiffusionPanoramaPipeline
    base = tiny.stable_diffusion(
        diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **tiny.LATENT)
    )
    parts = {**base.components, "feature_extractor": None, "image_encoder": None}
    result = []
    for solver in ("ddim", "tab2"):
        pipe = pipe_class(**parts, requires_safety_checker=False)
        pipe.scheduler = PlanScheduler.from_config(base.scheduler.config, solver=solver)
        pipe.set_progress_bar_config(disable=True)
        arguments = {
            "prompt_embeds": tiny.normal((1, 8, 16), 1),
            "negative_prompt_embeds": tiny.normal((1, 8, 16), 2),
            "height": 128,
            "width": 288,
            "num_inference_steps": 2,
            "output_type": "latent",
        }
        for size in (1, 4):
            torch.manual_seed(0)
            result.append(pipe(view_batch_size=size, generator=seeded(), **arguments).images)
    assert torch.allclose(result[0], result[1], atol=1e-4)
    assert torch.allclose(result[2], result[3], atol=1e-4)


# Copies.


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("solver", ["tab3", "ddpm"])
def test_a_copy_has_a_run_of_its_own(copied, solver):
    ours = PlanScheduler(solver=solver)
    ours.set_timesteps(6)
    x = tiny.normal(SHAPE)
    generator = seeded(3)
    x = run(ours, x, ours.timesteps[:2], generator=generator)
    other = copied(ours)
    want = run(ours, x, ours.timesteps[2:], generator=seeded(1))
    assert torch.equal(run(other, x, other.timesteps[2:], generator=seeded(1)), want)
    other.set_timesteps(3)
    assert len(ours.timesteps) == 6
    assert ours.step_index == 6


# Batches that grow.


@pytest.mark.parametrize("solver", ["tab3", "unipc3", "dpmpp-2m", "heun", "ddim"])
def test_a_batch_of_one_grows_in_the_middle_of_a_run(solver):
    """As if the run had begun with the repeated state."""
    ours = PlanScheduler(solver=solver)

    def sample(grow_at: int) -> torch.Tensor:
        ours.set_timesteps(6)
        x = tiny.normal((1, 3, 4, 4))
        for i, t in enumerate(list(ours.timesteps)):
            if i == grow_at:
                x = x.repeat(3, 1, 1, 1)
            x = ours.step(network(x, t), t, x).prev_sample
        return x

    assert relative(sample(3), sample(0)) < 1e-6


def test_a_larger_batch_cannot_grow_where_earlier_predictions_are_read():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(6)
    x = run(ours, tiny.normal(SHAPE), ours.timesteps[:3])
    bigger = torch.cat([x, x])
    t = ours.timesteps[3]
    with pytest.raises(ValueError, match="A batch of one may grow"):
        ours.step(network(bigger, t), t, bigger)
    plain = PlanScheduler(solver="ddim")  # nothing earlier is read
    plain.set_timesteps(6)
    x = run(plain, tiny.normal(SHAPE), plain.timesteps[:3])
    assert run(plain, torch.cat([x, x]), plain.timesteps[3:]).shape == (4, 3, 4, 4)


# A run in two parts, as SDXL with denoising_end and denoising_start.


def first_part(scheduler: Any, cutoff: float) -> Any:
    """As StableDiffusionXLPipeline."""
    timesteps = scheduler.timesteps
    return timesteps[: len(list(filter(lambda ts: ts >= cutoff, timesteps)))]


def second_part(scheduler: Any, cutoff: float) -> Any:
    """As StableDiffusionXLImg2ImgPipeline."""
    count = int((scheduler.timesteps < cutoff).sum())
    if scheduler.order == 2 and count % 2 == 0:
        count += 1
    start = len(scheduler.timesteps) - count
    timesteps = scheduler.timesteps[start:]
    scheduler.set_begin_index(start)
    return timesteps


@pytest.mark.parametrize("cutoff", [200, 450, 500, 700])
@pytest.mark.parametrize("solver", ["heun", "ddim", "tab0"])
def test_a_run_in_two_parts_is_cut_between_steps(solver, cutoff):
    options = {"final_sigmas_type": "zero", "timestep_spacing": "linspace"}
    whole = PlanScheduler(solver=solver, **options)
    whole.set_timesteps(8)
    x = tiny.normal(SHAPE)
    want = run(whole, x, whole.timesteps)
    base, refiner = (PlanScheduler(solver=solver, **options) for _ in range(2))
    for scheduler in (base, refiner):
        scheduler.set_timesteps(8)
    rest = second_part(refiner, cutoff)
    half = run(base, x, first_part(base, cutoff))
    assert relative(run(refiner, half, rest), want) < 1e-5


def test_a_start_inside_a_step_is_refused_before_any_evaluation():
    ours = PlanScheduler(solver="heun")
    ours.set_timesteps(5)
    with pytest.raises(ValueError, match="inside of a step of heun"):
        ours.set_begin_index(1)
    ours.set_begin_index(2)
    assert ours.timesteps[:1].tolist() == [999.0]
    assert ours.timesteps[2:].tolist() == ours.timesteps.tolist()[2:]
    assert [len(ours.timesteps[:n]) for n in (2, 3, 4, 5)] == [2, 2, 4, 4]
    # A last step of two evaluations: diffusers' rule for the second part meets the middle of a step.
    for solver in ("rho-heun", "rho-midpoint"):
        ours = PlanScheduler(solver=solver)
        ours.set_timesteps(8)
        with pytest.raises(ValueError, match="inside of a step"):
            second_part(ours, 450)


@pytest.mark.parametrize("solver", ["heun", "rho-heun", "rho-kutta3"])
def test_a_first_part_that_ends_inside_the_first_step_is_refused_before_any_evaluation(solver):
    ours = PlanScheduler(solver=solver)
    ours.set_timesteps(5)
    part = first_part(ours, float(ours.timesteps[0]) - 1)
    assert len(part) == 1
    assert part.repeat(2).tolist() == [999.0] * 2  # what image to image reads of it
    with pytest.raises(ValueError, match=r"inside of a step .*denoising_end"):
        run(ours, tiny.normal(SHAPE), part)


def test_a_second_part_with_nothing_left_says_so():
    ours = PlanScheduler(solver="tab3")
    ours.set_timesteps(5)
    with pytest.raises(ValueError, match="nothing left to run"):
        ours.set_begin_index(5)


# Noise without a generator.


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_of_pipelines_that_pass_no_generator(solver):
    """As Flux: ``noise_seed`` seeds each run; without it torch's global generator draws."""

    def sample(scheduler: Any, seed: int, **arguments: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        scheduler.set_timesteps(5)
        return run(scheduler, tiny.normal(SHAPE), scheduler.timesteps, **arguments)

    seeded_one = PlanScheduler(solver=solver, noise_seed=7)
    assert torch.equal(sample(seeded_one, 0), sample(seeded_one, 1))
    assert torch.equal(
        sample(seeded_one, 0), sample(PlanScheduler(solver=solver), 1, generator=seeded(7))
    )
    other = PlanScheduler(solver=solver, noise_seed=8)
    assert not torch.allclose(sample(seeded_one, 0), sample(other, 0), atol=1e-3)
    unseeded = PlanScheduler(solver=solver)
    assert torch.equal(sample(unseeded, 0), sample(unseeded, 0))
    assert not torch.allclose(sample(unseeded, 0), sample(unseeded, 1), atol=1e-3)
    # A caller's generator comes first.
    assert torch.equal(
        sample(seeded_one, 0, generator=seeded(3)), sample(other, 0, generator=seeded(3))
    )

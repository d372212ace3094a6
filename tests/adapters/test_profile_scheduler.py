"""A measured profile in a pipeline: the same samples as ``fewstep.sample`` with it."""

from __future__ import annotations

import json

import pytest
import torch

import fewstep
from fewstep.models import exact
from fewstep.studies.reference import draw_noise

diffusers = pytest.importorskip("diffusers")

from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402

DDPM = fewstep.schedule("ddpm-linear")
MODEL = exact.smooth(DDPM)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    profile = fewstep.fit(MODEL, (5, 8), n=8)
    assert profile.solver_for(5) == "multistep"
    return str(profile.save(tmp_path_factory.mktemp("profile") / "profile.json"))


def run(scheduler, x):
    for t in scheduler.timesteps:
        output = MODEL(x, float(t), prediction="eps")
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("nfe", [5, 7, 8])
def test_a_run_is_that_of_sample(file, nfe):
    noise = draw_noise(MODEL, 6, 3, dtype=torch.float64)
    scheduler = PlanScheduler(profile=file)
    scheduler.set_timesteps(nfe)
    assert len(scheduler.timesteps) == nfe
    result = run(scheduler, noise * scheduler.init_noise_sigma)
    # A pipeline starts from unit noise; our runs from the prior's sigma, 0.99998.
    want = fewstep.sample(MODEL, noise=noise / DDPM.prior_std(), nfe=nfe, profile=file)
    assert torch.allclose(result, want, atol=1e-6)


def test_a_start_in_mid_schedule_takes_another_solver_on_the_measured_times(file):
    scheduler = PlanScheduler(profile=file)
    scheduler.set_timesteps(8)
    times = scheduler.timesteps.clone()
    scheduler.set_begin_index(3)
    x = torch.zeros(4, 2, dtype=torch.float64)
    for t in times[3:]:
        x = scheduler.step(MODEL(x, float(t), prediction="eps"), t, x).prev_sample
    grid = fewstep.Profile.load(file).fit("multistep", 8)[0]
    plan = fewstep.plan("unipc3", DDPM, grid="explicit", times=grid.times[3:].tolist())
    want = fewstep.sample(MODEL, noise=torch.zeros(4, 2, dtype=torch.float64), plan=plan)
    assert torch.allclose(x, want, atol=1e-4)


def test_it_comes_back_with_its_configuration(file):
    scheduler = PlanScheduler.from_config(PlanScheduler(profile=file).config)
    scheduler.set_timesteps(5)
    assert scheduler.config["profile"] == file
    assert len(scheduler.timesteps) == 5


def test_a_profile_with_a_solver_is_refused(file):
    with pytest.raises(
        ValueError, match="a profile has its solver, times and options already, got solver"
    ):
        PlanScheduler(profile=file, solver="tab3")


def test_statistics_of_a_profile_are_stored_in_the_configuration(file):
    scheduler = PlanScheduler(
        solver="dpm-solver-v3", solver_options={"statistics": file}, grid="logistic"
    )
    scheduler = PlanScheduler.from_config(json.loads(json.dumps(dict(scheduler.config))))
    scheduler.set_timesteps(6)
    noise = draw_noise(MODEL, 4, 3, dtype=torch.float64)
    result = run(scheduler, noise * scheduler.init_noise_sigma)
    want = fewstep.sample(
        MODEL,
        noise=noise / DDPM.prior_std(),
        solver="dpm-solver-v3",
        nfe=6,
        grid="logistic",
        options={"statistics": file},
    )
    # Their table of levels is in float32, so the times of the grid differ by 0.003 of 1000.
    assert torch.allclose(result, want, atol=1e-4)

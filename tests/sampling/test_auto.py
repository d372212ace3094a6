"""``auto`` chooses by the range of noise levels: never steps that are spent where nothing happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep
from fewstep.models import exact
from fewstep.sampling.auto import choose


def cosine(levels: int, beta_max: float = 0.999):
    """The cosine table of so many levels."""
    t = np.arange(levels + 1) / levels
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], beta_max)
    return fewstep.schedule("tabulated", alphas_cumprod=np.cumprod(1 - betas).tolist())


SCHEDULES = {
    "vp-linear": fewstep.schedule("vp-linear"),
    "scaled-linear": fewstep.schedule("ddpm-scaled-linear"),
    "cosine, 300 levels": cosine(300),
    "cosine, 1000 levels": fewstep.schedule("ddpm-cosine"),
    "ve": fewstep.schedule("ve"),
    "edm": fewstep.schedule("edm"),
    "sub-vp": fewstep.schedule("sub-vp"),
    "vp-sigma": fewstep.schedule("vp-sigma"),
    "flow": fewstep.schedule("flow"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("nfe", [4, 10, 20, 50])
def test_steps_are_where_data_and_noise_mix(name, nfe):
    """Most steps lie where neither data nor noise is below a part in 100, one at most in 400."""
    schedule = SCHEDULES[name]
    plan = fewstep.plan("auto", schedule, nfe=nfe)
    lam = schedule.lam(plan.times.detach())
    assert plan.nfe == nfe
    assert int((lam < -6.5).sum()) <= 1
    assert int((lam.abs() < 4.7).sum()) >= 0.7 * nfe


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_near_the_exact_solution_on_every_schedule(name):
    """Gaussians in the plane, 20 evaluations: a fifth of the error of the first-order method, or less."""
    schedule = SCHEDULES[name]
    model = exact.smooth(schedule)
    noise = torch.randn((256, 2), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def sampled(solver: str, nfe: int, grid: str | None = None):
        return fewstep.sample(model, noise=noise, solver=solver, nfe=nfe, grid=grid)

    fine = sampled("tab3", 300, "log-rho")
    error, first_order = (
        float((sampled(solver, 20) - fine).square().mean().sqrt()) for solver in ("auto", "ddim")
    )
    assert error < 0.25 * first_order


def test_a_start_of_the_caller_replaces_its_own():
    schedule = SCHEDULES["cosine, 300 levels"]
    assert "t_start" in choose(schedule, 8).options
    plan = fewstep.plan("auto", schedule, nfe=8, t_start=299.0)
    assert float(plan.knots[0]) == 299.0
    half = fewstep.plan("auto", schedule, nfe=8, strength=0.5)
    assert float(half.knots[0]) < 250


def test_its_own_start_is_none_for_an_image():
    model = exact.smooth(SCHEDULES["cosine, 300 levels"])
    image = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="an image needs a start"):
        fewstep.sample(model, 2, image=image, nfe=5)
    assert fewstep.sample(model, 2, image=image, nfe=5, strength=0.4).shape == (2, 2)


def test_the_first_time_stays_above_a_floor():
    schedule = SCHEDULES["flow"]
    grid = fewstep.grid("logistic", schedule, 6, center=0.0, scale=1.0, floor=-3.0)
    u = torch.linspace(0, 1, 7, dtype=torch.float64)[1:-1]
    first, last = torch.sigmoid(torch.tensor([-3.0, float(schedule.lam(grid.times[-1]))]))
    wanted = schedule.time(torch.logit(first + u * (last - first)))
    torch.testing.assert_close(grid.times[1:-1], wanted, rtol=1e-6, atol=1e-9)
    assert float(grid.times[0]) == schedule.t_max
    with pytest.raises(ValueError, match="floor must be a finite number"):
        fewstep.grid("logistic", schedule, 6, floor=float("nan"))


@pytest.mark.diffusers
def test_a_pipeline_of_a_shifted_flow_keeps_its_shift():
    pytest.importorskip("diffusers")
    from fewstep.adapters.diffusers import PlanScheduler

    plain, shifted = (PlanScheduler(prediction_type="flow_prediction", shift=s) for s in (1, 3))
    for scheduler in (plain, shifted):
        scheduler.set_timesteps(8)
    # sigma' = 3 sigma / (1 + 2 sigma) is the same as sigma' / (1 - sigma') = 3 sigma / (1 - sigma).
    odds = [s.sigmas[1:7].double() / (1 - s.sigmas[1:7].double()) for s in (plain, shifted)]
    middle = (odds[1] / odds[0])[2:5]
    torch.testing.assert_close(middle, torch.full_like(middle, 3.0), rtol=0.25, atol=0)

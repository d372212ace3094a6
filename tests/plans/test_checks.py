"""What a plan does, exactly: each analysis against a computation by another way."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.exact import GaussianMixture
from fewstep.plans.checks import gaussian_moments, point_mass_defect, table_difference
from fewstep.plans.rewriting import convert_plan
from fewstep.solvers import SOLVERS
from reference import SCHEDULE_NAMES, normal, run, schedule_of

MEAN, STD = -0.8, 0.45


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_the_moments_of_ddim_by_its_own_recursion(where: str) -> None:
    """On N(m, s^2) a step is x' = psi x + c sigma (x - alpha m) / v: two scalars, by hand."""
    noise = schedule_of(where)
    for to_zero in (False, True):
        grid = fewstep.grid("log-rho", noise, 6, to_zero=to_zero)
        a, s = grid.alpha, grid.sigma
        mean = a[0] * MEAN
        variance = (a[0] * STD).square() + s[0].square()
        for i in range(6):
            psi = a[i + 1] / a[i]
            slope = (s[i + 1] - psi * s[i]) * s[i] / ((a[i] * STD).square() + s[i].square())
            mean = psi * mean + slope * (mean - a[i] * MEAN)
            variance = (psi + slope).square() * variance
        got = gaussian_moments(SOLVERS["ddim"]().plan(grid), MEAN, STD)
        assert float(got.mean) == pytest.approx(float(mean), rel=1e-10, abs=1e-12)
        assert float(got.variance) == pytest.approx(float(variance), rel=1e-10)


@pytest.mark.parametrize(
    "name", ["tab3", "unipc3", "heun", "rho-rk4", "dpmpp-3m", "accelerated-ddim"]
)
def test_the_moments_of_deterministic_solvers_by_running_them(
    name: str, vp: NoiseSchedule
) -> None:
    """The sampler is affine in its start on such data: two runs give its slope and its offset."""
    exact = GaussianMixture([[MEAN]], [STD], [1.0], vp)
    plan = fewstep.plan(name, vp, steps=6, grid="log-rho")
    sigma, alpha = (float(f(plan.knots[:1])) for f in (vp.sigma, vp.alpha))
    law = (alpha**2 * STD**2 + sigma**2) ** 0.5
    starts = torch.tensor([[alpha * MEAN], [alpha * MEAN + law]], dtype=torch.float64) / sigma
    centre, other = run(exact, plan, starts)[:, 0].tolist()
    got = gaussian_moments(plan, MEAN, STD)
    assert float(got.mean) == pytest.approx(centre, rel=1e-9)
    assert float(got.variance) == pytest.approx((other - centre) ** 2, rel=1e-8)


def test_many_steps_reach_the_truth(vp: NoiseSchedule) -> None:
    grid = fewstep.grid("log-rho", vp, 200)
    got = gaussian_moments(SOLVERS["rho-rk4"]().plan(grid), MEAN, STD)
    a, s = grid.alpha[-1], grid.sigma[-1]
    assert float(got.mean) == pytest.approx(float(a * MEAN), abs=1e-6)
    assert float(got.variance) == pytest.approx(float((a * STD).square() + s.square()), abs=1e-6)


def test_the_moments_are_differentiable_in_values_and_times(vp: NoiseSchedule) -> None:
    plan = fewstep.plan("ddim", vp, steps=3, grid="log-rho", eta=0.5)

    def moments(values: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        got = gaussian_moments(plan.with_values(values, times), MEAN, STD)
        return got.mean, got.variance

    values = plan.values.clone().requires_grad_()
    times = plan.times.clone()
    times[0] -= 1e-3  # inside, so that finite differences stay inside
    assert torch.autograd.gradcheck(moments, (values, times.requires_grad_()), atol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, build in SOLVERS.items() if build().exact and not build().adaptive]
)
def test_the_audit_finds_any_wrong_coefficient(name: str, vp: NoiseSchedule) -> None:
    """Each coefficient off by 1e-4 in turn: the defect shows, for all of them."""
    grid = fewstep.grid("log-rho", vp, 4)
    plan = SOLVERS[name]().plan(grid)
    end = grid.alpha[-1], grid.sigma[-1]
    assert point_mass_defect(plan, *end) < 1e-9
    for i in range(len(plan.values)):
        wrong = plan.values.clone()
        wrong[i] *= 1 + 1e-4
        if float(plan.values[i].abs()) > 1e-3:
            assert point_mass_defect(plan.with_values(wrong), *end) > 1e-9, i


def test_a_solver_that_lies_about_exactness_is_caught(
    vp: NoiseSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = fewstep.grid("uniform", vp, 3)
    euler = type(SOLVERS["euler"]())
    euler().plan(grid)
    monkeypatch.setattr(euler, "exact", True)
    with pytest.raises(AssertionError, match="euler claims to be exact on a point mass"):
        euler().plan(grid)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_conversion_goes_there_and_back(where: str) -> None:
    noise = schedule_of(where)
    lam = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    times = noise.time(lam).clamp(noise.t_min, noise.t_max).tolist()
    grid = fewstep.grid("explicit", noise, None, times=times)
    for name, kind in itertools.product(("tab2", "unipc2", "ddpm"), Prediction):
        plan = SOLVERS[name]().plan(grid)
        there = convert_plan(plan, kind)
        assert there.prediction is kind
        assert (there is plan) == (kind is plan.prediction)
        assert torch.equal(there.times, plan.times)
        assert table_difference(convert_plan(there, plan.prediction), plan) < 1e-11
        one, two = (gaussian_moments(p, MEAN, STD) for p in (plan, there))
        assert float(one.mean) == pytest.approx(float(two.mean), rel=1e-9)
        assert float(one.variance) == pytest.approx(float(two.variance), rel=1e-9)


def test_ddim_in_eps_and_first_order_in_data_are_one_method(vp: NoiseSchedule) -> None:
    """DPM-Solver++(1) is DDIM: equal tables once both are written for the same prediction."""
    grid = fewstep.grid("log-rho", vp, 1)
    data = SOLVERS["dpmpp-2m"]().plan(grid)
    ddim = SOLVERS["ddim"]().plan(grid)
    assert table_difference(convert_plan(data, "eps"), ddim) < 1e-13


def test_tables_that_do_not_correspond_are_refused(vp: NoiseSchedule) -> None:
    three, four = (fewstep.plan("ddim", vp, steps=k) for k in (3, 4))
    with pytest.raises(ValueError, match="do not correspond"):
        table_difference(three, four)
    with pytest.raises(ValueError, match="do not correspond"):
        table_difference(three, convert_plan(three, "x0"))
    with pytest.raises(ValueError, match="do not correspond"):
        table_difference(three, fewstep.plan("ddpm", vp, steps=3))


def test_the_difference_of_tables_is_the_largest_one(vp: NoiseSchedule) -> None:
    plan = fewstep.plan("ddim", vp, steps=2)
    other = plan.values.clone()
    other[-1] += 0.25
    flat = plan.flat()
    size = max(1.0, float(flat.B.abs().max()))
    got = table_difference(plan.with_values(other), plan)
    assert got == pytest.approx(0.25 / size, rel=1e-9)
    assert table_difference(plan, plan) == 0.0


def test_flat_and_rows_are_the_same_map(vp: NoiseSchedule) -> None:
    """Y = a x_T + B F + C Z with the outputs of a run put in by hand."""
    plan = fewstep.plan("accelerated-ddpm", vp, steps=4)
    exact = GaussianMixture([[0.3], [-1.0]], [0.2, 0.5], [1.0, 2.0], vp)
    a, b, c = plan.flat()
    start = normal(5, 1)
    draws = normal(plan.n_noise, 5, 1, seed=1)
    outputs: list[Tensor] = []
    for k in range(plan.nfe + 1):
        y = a[k] * start
        for j, f in enumerate(outputs):
            y = y + b[k, j] * f
        for j in range(plan.n_noise):
            y = y + c[k, j] * draws[j]
        if k < plan.nfe:
            outputs.append(exact(y, plan.times[k]))
    from fewstep.plans.execute import execute

    got = execute(plan, lambda x, t: exact(x, t), start, draw=lambda index: draws[index])
    assert torch.allclose(got, y, rtol=1e-10, atol=1e-12)

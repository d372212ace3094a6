"""DPM-Solver-v3: its limits, and the formula of the paper evaluated directly."""

from __future__ import annotations

import functools
import math

import numpy
import pytest
import torch
from scipy.integrate import trapezoid
from torch import Tensor

import fewstep
from fewstep.diffusion.grids import TimeGrid
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.plans.plan import Plan
from fewstep.solvers import solver
from fewstep.solvers.dpm_v3 import DPMSolverV3, Statistics, check_statistics
from fewstep.solvers.exponential import RESMultistep
from reference import lam_grid, normal, rms, run, schedule_of, slope

DATA = ((-1.0, 1.0, 0.0), (0.5, 1.0, 0.0))
NOISE = ((-1.0, 0.0, -1.0),)
CURVED = ((-2.0, 0.9, -0.1), (-1.0, 0.6, 0.3), (-0.3, 0.4, -0.5), (0.4, 0.1, -0.9))
"""Any functions: the method converges with them to the same solution."""


def flat(plan: Plan) -> Tensor:
    """Returns the coefficients of the inputs and the sample in initial state and outputs."""
    return torch.cat([part.reshape(-1) for part in plan.flat()[:2]])


@pytest.mark.parametrize("where", ["vp-linear", "edm", "flow"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_its_limits_are_the_exponential_multistep_methods(where: str, outputs: int) -> None:
    grid = fewstep.grid("log-rho", schedule_of(where), 5, to_zero=outputs == 2)
    res = RESMultistep(outputs).plan(grid)
    bare = DPMSolverV3(outputs, corrector=False).plan(grid)
    assert bare.structure == res.structure
    assert torch.equal(bare.values, res.values)
    measured = DPMSolverV3(outputs, DATA, corrector=False).plan(grid)
    assert torch.allclose(flat(measured), flat(res), rtol=1e-11, atol=1e-11)
    in_noise = solver(f"logrhoab{outputs - 1}", lower_final=True)
    measured = DPMSolverV3(outputs, NOISE, corrector=False).plan(grid)
    exact = smooth(grid.schedule)
    difference = run(exact, measured, normal(3, 2)) - run(exact, in_noise.plan(grid), normal(3, 2))
    assert rms(difference) < 1e-9


def test_statistics_of_data_prediction_are_none_at_all() -> None:
    grid = fewstep.grid("uniform", schedule_of("vp-linear"), 6)
    assert torch.allclose(
        flat(DPMSolverV3(3, DATA).plan(grid)), flat(DPMSolverV3(3).plan(grid)), atol=1e-11
    )


def directly(
    exact: GaussianMixture, grid: TimeGrid, noise: Tensor, outputs: int, *, corrector: bool
) -> Tensor:
    """Returns samples by formulas (8) and (10) of the paper with sums over 10,000 points a step."""
    statistics = Statistics(CURVED)
    lam, alpha, sigma = (getattr(grid, name).tolist() for name in ("lam", "alpha", "sigma"))

    def l_at(u):
        return statistics.at(torch.as_tensor(u).reshape(-1))[0].numpy()

    def s_at(u):
        return statistics.at(torch.as_tensor(u).reshape(-1))[1].numpy()

    fine = numpy.linspace(lam[0], lam[-1], 100_001)

    def cumulative(values):
        steps = numpy.diff(fine) * (values[1:] + values[:-1]) / 2
        return numpy.concatenate([[0.0], numpy.cumsum(steps)])

    big_l, big_s = cumulative(l_at(fine)), cumulative(s_at(fine))

    def integral(table, u):
        return numpy.interp(u, fine, table)

    def step(x, i, places, fs):
        inside = numpy.linspace(lam[i], lam[i + 1], 10_001)
        in_l = integral(big_l, inside) - integral(big_l, lam[i])
        in_s = integral(big_s, inside) - integral(big_s, lam[i])
        g = [math.exp(integral(big_s, lam[i]) - integral(big_s, lam[k])) * f for k, f in zip(places, fs, strict=True)]  # fmt: skip
        total = 0.0
        for j, value in enumerate(g):
            basis = numpy.ones_like(inside)
            for k in range(len(g)):
                if k != j:
                    basis *= (inside - lam[places[k]]) / (lam[places[j]] - lam[places[k]])
            total = total + float(trapezoid(numpy.exp(in_l + in_s) * basis, inside)) * value
        return alpha[i + 1] * math.exp(-in_l[-1]) * (x / alpha[i] - total)

    x = noise * exact.schedule.prior_std(float(grid.times[0]))
    fs, corrected, count = [], None, 1
    for i in range(grid.steps):
        eps = exact(x, float(grid.times[i]), prediction="eps")
        fs.append((sigma[i] * eps - float(l_at(lam[i])[0]) * x) / alpha[i])
        start = x
        if corrector and count > 1:
            places = [i - 1, i, *range(i - 2, i - count, -1)]
            start = step(corrected, i - 1, places, [fs[k] for k in places])
        count = min(outputs, i + 1, grid.steps - i)
        if i == grid.steps - 1:  # of data prediction, so that no noise is left
            data = (x - sigma[i] * eps) / alpha[i]
            ratio = sigma[i + 1] / sigma[i]
            return ratio * start + (alpha[i + 1] - ratio * alpha[i]) * data
        places = list(range(i, i - count, -1))
        x, corrected = step(start, i, places, [fs[k] for k in places]), start
    return x


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_equals_the_formula_of_the_paper(outputs: int, corrector: bool) -> None:
    exact = smooth(schedule_of("vp-linear"))
    grid = lam_grid(exact.schedule, 7, -1.6, 0.9)
    noise = normal(4, 2)
    ours = run(exact, DPMSolverV3(outputs, CURVED, corrector=corrector).plan(grid), noise)
    theirs = directly(exact, grid, noise, outputs, corrector=corrector)
    assert rms(ours - theirs) < 1e-7


def test_statistics_are_monotone_cubics_with_exact_integrals() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    levels, statistics = numpy.array(CURVED)[:, 0], Statistics(CURVED)
    inner = torch.linspace(
        -1.0, -0.3, 9, dtype=torch.float64
    )  # at the ends the slopes are other ones
    points = torch.tensor([-3.0, -2.0, -1.3, 0.1, 0.4, 1.0], dtype=torch.float64)
    for column in (0, 1):
        theirs = interpolate.PchipInterpolator(levels, numpy.array(CURVED)[:, column + 1])
        values = statistics.at(inner)[column]
        assert values.numpy() == pytest.approx(theirs(inner.numpy()), abs=1e-13)
        for u, area in zip(points, statistics.integrals(points)[column].tolist(), strict=True):
            fine = torch.linspace(-2.0, float(u), 2_001, dtype=torch.float64)
            expected = torch.trapezoid(statistics.at(fine)[column], fine)
            assert area == pytest.approx(float(expected), abs=1e-6)
    assert [float(v[0]) for v in Statistics(((0.0, 0.5, -0.5),)).at(points)] == [0.5, -0.5]


@functools.cache
def _truth() -> tuple[GaussianMixture, Tensor, Tensor]:
    exact, draw = smooth(schedule_of("vp-linear")), normal(32, 2)
    grid = lam_grid(exact.schedule, 200, -1.2, 0.2, power=2)
    return exact, draw, run(exact, solver("rho-rk4").plan(grid), draw)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_the_order_does_not_depend_on_the_statistics(outputs: int, corrector: bool) -> None:
    exact, draw, truth = _truth()
    method = DPMSolverV3(outputs, CURVED, corrector=corrector, lower_final=False)
    steps = (32, 64) if outputs != 2 else (64, 128)
    errors = [
        rms(run(exact, method.plan(lam_grid(exact.schedule, k, -1.2, 0.2, power=2)), draw) - truth)
        for k in steps
    ]
    assert slope(errors, steps) >= outputs - 0.25, errors


def test_plans_and_recipes_carry_the_statistics(tmp_path) -> None:
    denoiser = fewstep.load("mixture-smooth")
    options = {"statistics": CURVED, "outputs": 2}
    samples = fewstep.sample(denoiser, 4, solver="dpm-solver-v3", nfe=5, options=options)
    bare = fewstep.sample(denoiser, 4, solver="dpm-solver-v3", nfe=5, options={"outputs": 2})
    assert not torch.equal(samples, bare)
    request = fewstep.SamplerRequest("dpm-solver-v3", nfe=5, options=options)
    resolved = fewstep.resolve(denoiser, request)
    recipe = fewstep.SamplerRecipe.load(resolved.recipe.save(tmp_path / "recipe.json"))
    assert torch.equal(fewstep.sample(denoiser, 4, recipe=recipe), samples)
    made = fewstep.plan("dpm-solver-v3", denoiser.schedule, nfe=5, **options)
    made.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert torch.equal(fewstep.sample(denoiser, 4, plan=back), samples)


def test_times_have_gradients() -> None:
    noise = schedule_of("vp-linear")
    times = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=torch.float64, requires_grad=True)

    def values(t: Tensor) -> Tensor:
        return DPMSolverV3(3, CURVED, lower_final=False).plan(TimeGrid(noise, t)).values

    weights, move = normal(len(values(times))), 1e-5 * normal(4, seed=1)
    (gradient,) = torch.autograd.grad((values(times) * weights).sum(), times)
    ahead, back = values(times.detach() + move), values(times.detach() - move)
    assert float(gradient @ move) == pytest.approx(float((ahead - back) @ weights) / 2, rel=1e-6)
    assert torch.allclose(values(times), values(times.detach()), rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("stats.json", "rows"),
        (3, "rows"),
        ([[0.0, 1.0]], "three finite numbers"),
        ([[0.0, 1.0, math.nan]], "three finite numbers"),
        ([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], "ascend"),
        ([[0.0, 1.0, 0.0]] * 10_001, "at most"),
    ],
)
def test_wrong_statistics_are_refused(value, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_statistics(value)

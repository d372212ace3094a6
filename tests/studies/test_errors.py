"""Reference paths, local errors, grids by dynamic programming: against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fewstep
from fewstep.diffusion.grids import TimeGrid
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.studies import anatomy, follow, measure_gain, path_of, step_errors
from fewstep.studies.curves import extrapolation, freezing, relative_change
from fewstep.studies.dynamic import StepCosts, best_grids
from fewstep.studies.reference import draw_noise, place_nodes, run_plan

VP = fewstep.schedule("vp-linear")
STD = 0.5
GAUSS = GaussianMixture([(1.0, -2.0)], [STD], [1.0], VP)


def of(schedule, t):
    time = torch.as_tensor(t, dtype=torch.float64)
    return schedule.alpha(time), schedule.sigma(time)


def flow(x, t, s):
    """The exact solution of the ODE of the Gaussian from t to s."""
    (a, b), (c, d) = of(VP, t), of(VP, s)
    ratio = ((c**2 * STD**2 + d**2) / (a**2 * STD**2 + b**2)).sqrt()
    return c * GAUSS.data_mean + ratio * (x - a * GAUSS.data_mean)


def reference(model, n=6, seed=3, **options):
    return follow(model, draw_noise(model, n, seed, dtype=torch.float64), {}, **options)


@pytest.fixture(scope="module")
def gauss():
    return reference(GAUSS)


@pytest.fixture(scope="module")
def path(gauss):
    return path_of(gauss, GAUSS)


@pytest.fixture(scope="module")
def mixture():
    model = smooth(VP)
    found = reference(model, 24)
    return model, found, path_of(found, model, measure_gain(model, found))


@pytest.mark.parametrize("name", ["vp-linear", "ddpm-linear", "flow", "edm", "ve", "vp-cosine"])
def test_nodes_are_dense_by_both_measures(name):
    s = fewstep.schedule(name)
    nodes = place_nodes(s, 48)
    assert (float(nodes[0]), float(nodes[-1])) == (s.t_max, s.t_min)
    assert bool((nodes.diff() < 0).all())
    lam = s.lam(nodes)
    # A grid that is even in one measure alone has steps of 1/48; half of the nodes give 1/24 each.
    assert float(-nodes.pow(2 / 3).diff().min()) < 0.06 * s.t_max ** (2 / 3)
    assert float(lam.diff().max() / (lam[-1] - lam[0])) < 0.05


def test_nodes_of_whole_indices():
    nodes = place_nodes(fewstep.schedule("ddpm-linear"), 96, integer=True)
    assert torch.equal(nodes, nodes.round())
    assert 60 < len(nodes) <= 97


def test_the_reference_is_the_exact_flow(gauss):
    exact = flow(gauss.x[0], VP.t_max, gauss.times[-1])
    assert float((gauss.end - exact).abs().max()) < 2e-5
    middle = len(gauss.times) // 2
    assert float((gauss.x[middle] - flow(gauss.x[0], 1.0, gauss.times[middle])).abs().max()) < 2e-5
    expected = GAUSS(gauss.x[middle], gauss.times[middle], prediction="eps")
    assert torch.allclose(gauss.eps[middle], expected, atol=1e-12)
    assert len(gauss.times) == 49
    assert gauss.nfe == 97


def test_a_path_keeps_all_inner_products(gauss, path):
    combined = 0.3 * gauss.x[4] - 2 * gauss.eps[30] + gauss.x[-1]
    short = 0.3 * path.x[4] - 2 * path.eps[30] + path.x[-1]
    assert float(short.norm()) == pytest.approx(float(combined.square().mean().sqrt()), rel=1e-9)
    between = torch.tensor([0.5 * (gauss.times[20] + gauss.times[21]).item()]).double()
    exact = flow(gauss.x[0], 1.0, between)
    assert float(path.at(between)[0].norm()) == pytest.approx(
        float(exact.square().mean().sqrt()), rel=1e-5
    )


def test_the_gain_of_a_gaussian_is_that_of_its_flow(gauss):
    found = measure_gain(GAUSS, gauss, places=9)
    for k in (1, 17, 33, 48):
        a, b = of(VP, gauss.times[k])
        c, d = of(VP, gauss.times[-1])
        exact = ((c**2 * STD**2 + d**2) / (a**2 * STD**2 + b**2)).sqrt()
        assert float(found[k]) == pytest.approx(float(exact), rel=0.12)
    assert float(found[-1]) == 1


def test_local_errors_of_ddim_are_those_of_single_steps(gauss, path):
    plan = fewstep.plan("ddim", VP, nfe=6, grid="quadratic")
    found = step_errors(plan, path)
    for k, (t, s) in enumerate(itertools.pairwise(plan.knots.tolist())):
        x = flow(gauss.x[0], 1.0, t)
        single = fewstep.plan("ddim", VP, grid=TimeGrid(VP, torch.tensor([t, s]).double()))
        start = float(of(VP, t)[1])
        lost = run_plan(GAUSS, single, x / start, {}) - flow(x, t, s)
        assert float(found.local[k]) == pytest.approx(float(lost.square().mean().sqrt()), rel=1e-3)
    assert found.start == 0
    assert found.predicted == pytest.approx(float(found.left.square().sum().sqrt()))


@pytest.mark.parametrize("solver", ["tab1", "tab2", "unipc2", "logrhoab2", "dpmpp-2m"])
def test_predictions_are_near_what_happens(solver, mixture):
    model, found, path = mixture
    plan = fewstep.plan(solver, VP, nfe=12, grid="quadratic")
    real = float((run_plan(model, plan, found.noise, {}) - found.end).square().mean().sqrt())
    assert 0.3 < step_errors(plan, path).predicted / real < 3


def test_local_errors_fall_with_the_order(path):
    def worst(solver, steps):
        return float(
            step_errors(fewstep.plan(solver, VP, nfe=steps, grid="quadratic"), path)
            .local[4:]
            .max()
        )

    for solver, order in (("tab0", 2), ("tab1", 3)):
        assert worst(solver, 12) / worst(solver, 24) == pytest.approx(2**order, rel=0.35)


def test_a_head_start_and_an_early_end_are_counted(gauss, path):
    from dataclasses import replace

    assert path.head is not None
    # One Gaussian: the analytic start is exact, up to the mean that the prior leaves out.
    left_out = float(VP.alpha(gauss.times[0])) * float(GAUSS.data_mean.square().mean().sqrt())
    assert float(path.head.max()) < 1.05 * left_out
    times = gauss.times[[10, 20, 30, 44]]
    plan = replace(fewstep.plan("tab2", VP, grid=TimeGrid(VP, times)), head=True)
    found = step_errors(plan, path)
    end = float((path.x[44] - path.x[-1]).norm())
    total = math.sqrt(float(found.left.square().sum()) + found.start**2 + end**2)
    assert found.predicted == pytest.approx(total)
    assert 0 < found.start < 1.05 * left_out
    with pytest.raises(ValueError, match="draws noise"):
        step_errors(fewstep.plan("ddpm", VP, nfe=4), path)


def few(mixture, count=9):
    model, found, path = mixture
    from dataclasses import replace

    kept = torch.linspace(0, len(found.times) - 1, count).round().long()
    assert path.head is not None
    return model, replace(
        path,
        times=path.times[kept],
        x=path.x[kept],
        eps=path.eps[kept],
        gain=path.gain[kept],
        head=path.head[kept],
    )


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize(("head", "free_end"), [(False, False), (True, True)])
def test_dynamic_programming_is_brute_force(mixture, degree, head, free_end):
    from dataclasses import replace

    _, path = few(mixture, 7)
    found = best_grids(StepCosts(path, degree), 4, head=head, free_end=free_end)
    size = len(path.times)
    for steps in (1, 2, 4):
        best = math.inf
        for nodes in itertools.combinations(range(size), steps + 1):
            if (nodes[0] != 0 and not head) or (nodes[-1] != size - 1 and not free_end):
                continue
            grid = TimeGrid(VP, path.times[list(nodes)])
            plan = replace(fewstep.plan(f"tab{degree}", VP, grid=grid), head=nodes[0] != 0)
            # Exact outputs at the nodes, and the plan's own coefficients: nothing is shared.
            best = min(best, step_errors(plan, path).predicted)
        assert found[steps].cost == pytest.approx(best, rel=1e-6)
        assert len(found[steps].times) == steps + 1
        assert found[steps].head == (float(found[steps].times[0]) < 1)


def test_more_steps_cost_less(mixture):
    found = best_grids(StepCosts(mixture[2], 2), 12)
    costs = [found[k].cost for k in range(1, 13)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 4 * costs[9]
    fine = step_errors(
        fewstep.plan("tab2", VP, grid=TimeGrid(VP, found[10].times)), mixture[2]
    ).predicted
    for name in ("uniform", "quadratic", "log-rho"):
        other = fewstep.plan("tab2", VP, nfe=10, grid=name)
        assert fine < step_errors(other, mixture[2]).predicted


def test_impossible_grids_are_refused(path):
    with pytest.raises(ValueError, match="degree"):
        StepCosts(path, 3)
    with pytest.raises(ValueError, match="not 49"):
        best_grids(StepCosts(path, 0), 49)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_extrapolation_errors_have_their_order(path, degree):
    def worst(steps):
        times = torch.linspace(0.6, 0.2, steps + 1, dtype=torch.float64)
        return float(extrapolation(path, times, degree)[4:].max())

    assert worst(12) / worst(24) == pytest.approx(2 ** (degree + 1), rel=0.3)


def test_extrapolation_of_degree_zero_is_the_change(gauss, path):
    times = gauss.times[::8]
    found = extrapolation(path, times, 0)
    for k in range(len(found)):
        difference = gauss.eps[8 * k + 8] - gauss.eps[8 * k]
        assert float(found[k]) == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-6)


def test_curves_of_a_gaussian(path):
    at, change = relative_change(path)
    times, score, eps = freezing(path)
    delta = 0.01 * (1 - VP.t_min)
    k = 20
    x = flow(torch.zeros(1, 2).double() + 0.7, 1.0, float(times[k]))
    later = flow(x, float(times[k]), float(times[k]) - delta)
    one = GAUSS(x, times[k], prediction="eps")
    two = GAUSS(later, times[k] - delta, prediction="eps")
    # Along the flow of an isotropic Gaussian all differences are one vector, of any length.
    ratio = float((two - one).norm() / two.norm())
    assert float(change[k]) == pytest.approx(ratio, rel=1e-3)
    assert float(at[k]) == pytest.approx(float(times[k]) - delta)
    s_one, s_two = (float(VP.sigma(t)) for t in (times[k], times[k] - delta))
    frozen = float((two / s_two - one / s_one).norm() / ((two - one) / s_two).norm())
    assert float(score[k] / eps[k]) == pytest.approx(frozen, rel=1e-3)


def test_all_curves_are_json(mixture):
    import json

    model, _, path = mixture
    plans = {"a": fewstep.plan("tab3", VP, nfe=6), "b": fewstep.plan("unipc3", VP, nfe=6)}
    found = anatomy(path, model.schedule, plans)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert [item["plan"] for item in again["steps"]] == ["a", "b"]
    quadratic = next(
        e for e in again["extrapolation"] if (e["grid"], e["steps"]) == ("quadratic", 20)
    )
    assert quadratic["means"][0] > 2 * quadratic["means"][2]
    assert len(quadratic["errors"]) == 4

"""What every registered solver must hold, on every schedule, for every prediction, unasked."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch

import fewstep
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.plans.checks import Moments, gaussian_moments, point_mass_defect
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan
from fewstep.plans.structure import reads
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers.base import NO_PLAN
from reference import (
    GRID_KINDS,
    SCHEDULE_NAMES,
    lam_grid,
    network,
    normal,
    rms,
    run,
    schedule_of,
    slope,
)

STEPS = (1, 2, 3, 5, 20)
EULER = ("euler", "euler-maruyama")
WITH_PLANS = [name for name, build in SOLVERS.items() if not build().adaptive]
DETERMINISTIC = [name for name in WITH_PLANS if not SOLVERS[name]().stochastic]
STOCHASTIC = [name for name in WITH_PLANS if SOLVERS[name]().stochastic]
EXACT = [name for name in WITH_PLANS if SOLVERS[name]().exact]
EXACT_ODE = [name for name in DETERMINISTIC if SOLVERS[name]().exact]


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in WITH_PLANS])
def test_an_adaptive_solver_refuses_to_make_a_plan(name: str, vp: NoiseSchedule) -> None:
    solver = SOLVERS[name]()
    refused = NO_PLAN.format(name)
    for request in ({"nfe": 10}, {}):  # the resolver's message names what to leave out
        with pytest.raises(ValueError, match="no plan beforehand"):
            fewstep.plan(name, vp, **request)
    for make in (
        lambda: solver.plan(fewstep.grid("uniform", vp, 5)),
        lambda: solver.steps_for(10),
    ):
        with pytest.raises(ValueError, match="no plan beforehand") as raised:
            make()
        assert str(raised.value) == refused


def _refused(name: str, noise: NoiseSchedule, to_zero: bool) -> bool:
    """Whether a solver documents that it is not defined there.

    Euler, where no time has sigma = 0; PNDM on flows, where its first steps amplify errors.
    """
    return (name in EULER and to_zero and noise.t_zero != 0.0) or (
        name == "pndm" and noise.flow_coordinate
    )


@functools.cache
def _grid(where: str, kind: str, steps: int, to_zero: bool) -> TimeGrid:
    return fewstep.grid(kind, schedule_of(where), steps, to_zero=to_zero)


def _grids(place: int) -> list[tuple[str, int, bool]]:
    """Every kind of grid, and every number of steps at the kind whose last steps are the smallest.

    To zero and not, in turns: each kind and each number has both ends, on half of the schedules each.
    """
    points = [(kind, 3) for kind in GRID_KINDS] + [("karras", k) for k in STEPS if k != 3]
    return [(kind, k, (place + i) % 2 == 0) for i, (kind, k) in enumerate(points)]


@pytest.mark.parametrize("name", WITH_PLANS)
def test_builds_on_every_grid_with_the_declared_cost(name: str) -> None:
    """Building audits causality, finiteness and, where declared, exactness on a point mass."""
    solver = SOLVERS[name]()
    points = [(where, *grid) for i, where in enumerate(SCHEDULE_NAMES) for grid in _grids(i)]
    for where, kind, steps, to_zero in points:
        noise, grid = schedule_of(where), _grid(where, kind, steps, to_zero)
        if _refused(name, noise, to_zero):
            with pytest.raises(ValueError, match=r"no time with sigma = 0|use ipndm"):
                solver.plan(grid)
            continue
        plan = solver.plan(grid)
        assert plan.nfe == solver.nfe(steps, ends_at_zero=to_zero), (where, kind, steps)
        assert plan.stochastic <= solver.stochastic
        assert torch.equal(plan.knots, grid.times)
        assert float(plan.times.max()) <= noise.t_max * (1 + 1e-12)


@pytest.mark.parametrize("name", WITH_PLANS)
def test_plans_are_causal_and_come_back_from_json_bit_for_bit(name: str) -> None:
    solver = SOLVERS[name]()
    for where, steps in itertools.product(SCHEDULE_NAMES, (1, 5)):
        noise, to_zero = schedule_of(where), steps == 5
        if _refused(name, noise, to_zero):
            to_zero = False
        if _refused(name, noise, to_zero):
            continue
        plan = solver.plan(_grid(where, "karras", steps, to_zero))
        for i, row in enumerate(plan.structure.rows, start=1):
            assert all(r < i for r in reads(row)), where
        a, b, _ = plan.flat()
        assert not bool(b.triu().any()), "an input depends on its own output or on a later one"
        assert bool(a[0] != 0)
        back = Plan.from_json(plan.to_json())
        assert back.structure == plan.structure
        for field in ("values", "times", "knots", "scales"):
            assert torch.equal(getattr(back, field), getattr(plan, field)), field
        assert (back.schedule, back.name, back.head) == (plan.schedule, plan.name, plan.head)


@pytest.mark.parametrize("name", WITH_PLANS)
def test_a_budget_is_met_exactly_or_refused_with_the_nearest(name: str) -> None:
    solver = SOLVERS[name]()
    for to_zero, nfe in itertools.product((False, True), range(1, 24)):
        reachable = {solver.nfe(k, ends_at_zero=to_zero) for k in range(1, 30)}
        if nfe in reachable:
            steps = solver.steps_for(nfe, ends_at_zero=to_zero)
            assert solver.nfe(steps, ends_at_zero=to_zero) == nfe
            continue
        below = [c for c in reachable if c < nfe]
        above = min(c for c in reachable if c > nfe)
        near = f"{max(below)} or {above}" if below else f"{above}"
        with pytest.raises(ValueError, match=f"nearest budgets are {near}$"):
            solver.steps_for(nfe, ends_at_zero=to_zero)


def _start(noise: NoiseSchedule) -> float:
    """A start with rho at most 150: where rho is 2e4 (ddpm-cosine) large steps amplify rounding."""
    return min(noise.t_max, float(noise.time(torch.tensor(-5.0, dtype=torch.float64))))


@functools.cache
def _mixtures(where: str) -> tuple[GaussianMixture, dict[Prediction, Denoiser]]:
    """An exact network, and five callables that return its five predictions."""
    exact = smooth(schedule_of(where))

    def returning(kind: Prediction) -> Denoiser:
        return Denoiser.wrap(
            lambda x, t: exact(x, t, prediction=kind),
            schedule=exact.schedule,
            prediction=kind,
            event_shape=(2,),
        )

    return exact, {kind: returning(kind) for kind in Prediction}


def _schedules_for(name: str) -> tuple[str, ...]:
    """Every schedule for the first solver; for the others one of each kind of coordinates.

    A rewriting depends on the schedule through alpha and sigma at the plan's times alone.
    """
    return SCHEDULE_NAMES if name == WITH_PLANS[0] else ("vp-linear", "edm", "flow")


@pytest.mark.parametrize("name", WITH_PLANS)
def test_the_samples_do_not_depend_on_what_the_network_predicts(name: str) -> None:
    for where in _schedules_for(name):
        exact, networks = _mixtures(where)
        if _refused(name, exact.schedule, False):
            continue
        grid = fewstep.grid("log-rho", exact.schedule, 4, t_start=_start(exact.schedule))
        plan = SOLVERS[name]().plan(grid)
        noise = normal(3, 2, seed=1)
        expected = run(exact, plan, noise)
        for kind, denoiser in networks.items():
            assert denoiser.native is kind
            error = float((run(denoiser, plan, noise) - expected).abs().max())
            assert error <= 1e-9 * float(expected.abs().max()), (where, kind, error)


@pytest.mark.parametrize("name", WITH_PLANS)
def test_a_plan_rewritten_for_another_prediction_is_the_same_sampler(
    name: str, vp: NoiseSchedule
) -> None:
    exact, noise = smooth(vp), normal(3, 2, seed=1)
    plan = SOLVERS[name]().plan(fewstep.grid("log-rho", vp, 4))
    expected = run(exact, plan, noise)
    for kind in Prediction:
        other = convert_plan(plan, kind)
        assert other.prediction is kind
        assert (other.nfe, other.n_noise) == (plan.nfe, plan.n_noise)
        error = float((run(exact, other, noise) - expected).abs().max())
        assert error <= 1e-9 * float(expected.abs().max()), kind


# Order of convergence. The interval in lam lies inside: it has neither the end of the data, where
# eps is singular, nor the flat region near the prior. See reference.lam_grid for the grading.
START, END = -1.2, 0.2


def _order_steps(order: int) -> tuple[int, int]:
    """Numbers of steps at which methods of an order are in their asymptotic range."""
    return {3: (48, 96), 4: (96, 192)}.get(order, (32, 64))


@functools.cache
def _truth(where: str) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    noise = schedule_of(where)
    exact, draw = smooth(noise), normal(32, 2)
    fine = [
        run(exact, SOLVERS["rho-rk4"]().plan(lam_grid(noise, k, START, END, power=2)), draw)
        for k in (320, 640)
    ]
    # Of order 4: the reference is converged to 1e-12; the smallest error measured against it is 5e-11.
    assert rms(fine[1] - fine[0]) < 1.2e-11
    return exact, draw, fine[1]


def _observed_order(solver: Solver, where: str = "vp-linear") -> float:
    exact, draw, truth = _truth(where)
    errors, steps = [], _order_steps(solver.order)
    for k in steps:
        plan = solver.plan(lam_grid(exact.schedule, k, START, END, power=2))
        errors.append(rms(run(exact, plan, draw) - truth))
    return slope(errors, steps)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_declared_order_is_observed(name: str) -> None:
    solver = SOLVERS[name]()
    observed = _observed_order(solver)
    assert observed >= solver.order - 0.2, observed


def _full(name: str) -> Solver:
    """The solver with the options that raise its order: no concessions to few steps or to peers."""
    parameters = inspect.signature(SOLVERS[name]).parameters
    best = {"lower_final": False, "consistent": True}
    return SOLVERS[name](**{key: best[key] for key in best if key in parameters})


@pytest.mark.parametrize(
    "name", [name for name in DETERMINISTIC if _full(name).order != SOLVERS[name]().order]
)
def test_options_that_raise_the_declared_order_raise_the_observed_one(name: str) -> None:
    solver = _full(name)
    assert _observed_order(solver) >= solver.order - 0.2


def _order_on_gaussian_data(solver: Solver, where: str) -> float:
    r"""The order on even steps from t = 0.9 to 0.2, against the closed form.

    The ODE of data N(m, s^2) is linear: :math:`(x - \alpha m) / \sqrt{\alpha^2 s^2 + \sigma^2}` is constant.
    """
    schedule, m, s, steps = schedule_of(where), 0.4, 1.6, (48, 96)
    exact, errors = GaussianMixture([[m]], [s], [1.0], schedule), []
    for k in steps:
        plan = solver.plan(fewstep.grid("uniform", schedule, k, t_start=0.9, t_end=0.2))
        ends = plan.knots[[0, -1]]
        alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
        spread = (alpha.square() * s * s + sigma.square()).sqrt()
        start = sigma[0] * torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
        right = alpha[1] * m + (start - alpha[0] * m) * spread[1] / spread[0]
        errors.append(rms(run(exact, plan, start / sigma[0]) - right))
    return slope(errors, steps)


ABOVE_2 = [name for name in DETERMINISTIC if _full(name).order > 2]


@pytest.mark.parametrize("where", ["flow", "vp-cosine"])
def test_orders_above_2_are_asymptotic_unless_the_first_step_is_of_first_order(where: str) -> None:
    """One error of order 2 in the length of a step, made at the start, carries to the end."""
    observed = {name: _order_on_gaussian_data(_full(name), where) for name in ABOVE_2}
    capped = {name for name in ABOVE_2 if _full(name).asymptotic_order == 2}
    assert {"tab2", "tab3", "rhoab2", "rhoab3", "dpmpp-3m", "res-4m"} <= capped
    for name, order in observed.items():
        limit = _full(name).asymptotic_order
        assert order > limit - 0.3, observed
        assert name not in capped or order < limit + 0.5, observed


@pytest.mark.parametrize(("predictor", "corrector"), list(itertools.product((1, 2, 3), range(4))))
def test_the_order_of_sa_solver_without_noise(predictor: int, corrector: int) -> None:
    solver = SOLVERS["sa-solver"](
        predictor=predictor, corrector=corrector, tau=0.0, lower_final=False
    )
    assert _order_on_gaussian_data(solver, "flow") == pytest.approx(
        solver.asymptotic_order, abs=0.2
    )
    assert solver.order == (min(corrector, predictor + 1) if corrector else predictor)


def test_tables_name_both_orders() -> None:
    shown = {name: SOLVERS[name]().order_text for name in ("tab3", "rhoab1", "rho-rk4", "lcm")}
    assert shown == {"tab3": "4 (2)", "rhoab1": "2", "rho-rk4": "4", "lcm": "0"}
    assert _full("logrhoab3").order_text == "4 (2)"
    assert _full("unipc3").order_text == "3"


# Stochastic solvers: mean and variance on Gaussian data, in closed form.
MEAN, STD = 0.7, 0.6


def moment_error(plan: Plan, grid: TimeGrid) -> tuple[float, float]:
    """Returns the errors of mean and variance at the grid's end, data N(MEAN, STD^2)."""
    got: Moments = gaussian_moments(plan, MEAN, STD)
    a, s = grid.alpha[-1], grid.sigma[-1]
    variance = (a * STD).square() + s.square()
    return float((got.mean - a * MEAN).abs()), float((got.variance - variance).abs())


# Steps for distilled networks (order 0) take the network for a map to the data: they do not converge.
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if SOLVERS[name]().order])
def test_the_moments_on_gaussian_data_converge_with_the_declared_order(
    name: str, vp: NoiseSchedule
) -> None:
    """In closed form; the start has the exact law."""
    solver = SOLVERS[name]()
    errors: list[float] = []
    steps = (128, 256)
    for k in steps:
        grid = lam_grid(vp, k, START, END, power=2)
        errors.append(sum(moment_error(solver.plan(grid), grid)))
    assert slope(errors, steps) >= solver.order - 0.2, errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solver_has_the_law_that_the_moments_say(
    name: str, vp: NoiseSchedule
) -> None:
    """The closed form and the executor agree: 40,000 coordinates, 5 standard errors."""
    grid = lam_grid(vp, 6, START, END)
    plan = SOLVERS[name]().plan(grid)
    size = 10_000
    exact = GaussianMixture([[MEAN] * size], [STD], [1.0], vp)
    a, s = float(grid.alpha[0]), float(grid.sigma[0])
    law = (a * a * STD * STD + s * s) ** 0.5
    start = (a * MEAN + law * normal(4, size, seed=3)) / s
    samples = run(exact, plan, start, seed=5)
    moments = gaussian_moments(plan, MEAN, STD)
    count, variance = samples.numel(), float(moments.variance)
    assert abs(float(samples.mean() - moments.mean)) < 5 * (variance / count) ** 0.5
    assert abs(float(samples.var()) - variance) < 5 * variance * (2 / count) ** 0.5


def _schedules_in_turns(name: str) -> list[tuple[str, tuple[str, int]]]:
    """Every schedule, with one of two grids; the next solver has the other grid there."""
    grids, place = (("uniform", 3), ("karras", 6)), EXACT.index(name)
    return [(where, grids[(place + i) % 2]) for i, where in enumerate(SCHEDULE_NAMES)]


# Exactness on a point, by running the sampler on a network that knows the point.
@pytest.mark.parametrize("name", EXACT)
def test_exact_on_a_point(name: str) -> None:
    solver = SOLVERS[name]()
    size, point = (2000 if solver.stochastic else 3), 1.5
    for where, (kind, steps) in _schedules_in_turns(name):
        noise = schedule_of(where)
        if _refused(name, noise, False):
            continue
        exact = GaussianMixture([[point] * size], [0.0], [1.0], noise)
        grid = fewstep.grid(kind, noise, steps, t_start=_at(noise, 10.0), t_end=_at(noise, 0.1))
        plan = solver.plan(grid)
        z = normal(2, size, seed=2)
        image = torch.full((2, size), point, dtype=torch.float64)
        samples = run(exact, plan, z, image=image, seed=4)
        a, s = grid.alpha[-1], grid.sigma[-1]
        residual = (samples - a * point) / s
        if solver.stochastic and plan.n_noise:
            # A standard normal; 4000 values, 5 standard errors.
            assert abs(float(residual.mean())) < 5 / 4000**0.5, where
            assert abs(float(residual.var()) - 1) < 5 * (2 / 4000) ** 0.5, where
        else:
            # The outputs amplify rounding, most where steps are large: not bit for bit.
            assert float((residual - z).abs().max()) < 1e-7, (where, kind, steps)


def _at(noise: NoiseSchedule, rho: float) -> float:
    """The time where sigma = rho alpha; over a wide range of rho the sharp network amplifies rounding."""
    # An image needs a start below the largest time.
    highest = 0.999 * noise.t_max
    return min(highest, float(noise.time(torch.tensor(rho, dtype=torch.float64).log().neg())))


@pytest.mark.parametrize("name", [n for n in WITH_PLANS if n not in EXACT])
def test_what_does_not_declare_exactness_does_not_have_it(name: str, vp: NoiseSchedule) -> None:
    """Otherwise the declaration is forgotten, and the audit with it."""
    grid = fewstep.grid("uniform", vp, 3)
    plan = SOLVERS[name]().plan(grid)
    assert point_mass_defect(plan, grid.alpha[-1], grid.sigma[-1]) > 1e-6


# The value for VP-linear, quadratic grid of 10 steps, x_T = eps = 1, by hand:
# alpha(t0) / alpha(1) + alpha(t0) (rho(t0) - rho(1)).
CONSTANT = 0.013771064425


@pytest.mark.parametrize("name", EXACT_ODE)
def test_constant_eps_is_integrated_exactly(name: str, vp: NoiseSchedule) -> None:
    grid = fewstep.grid("quadratic", vp, 10)
    constant = network(lambda x, t: torch.ones_like(x), vp)
    start = torch.full((1, 1), 1 / float(grid.sigma[0]), dtype=torch.float64)
    sample = float(run(constant, SOLVERS[name]().plan(grid), start))
    assert sample == pytest.approx(CONSTANT, abs=2e-11)


@pytest.mark.parametrize(("name", "nodes", "weights"), [
    ("rho-midpoint", [[0.5]], [0.0, 1.0]),
    ("rho-heun", [[1.0]], [0.5, 0.5]),
    ("rho-kutta3", [[0.5], [-1.0, 2.0]], [1 / 6, 4 / 6, 1 / 6]),
    ("rho-rk4", [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 2 / 6, 2 / 6, 1 / 6]),
])  # fmt: skip
def test_on_a_flow_the_methods_of_stages_step_in_its_time(
    name: str, nodes: list[list[float]], weights: list[float]
) -> None:
    """The textbook method for dx / dt = v(x, t), as flow matching uses it."""
    exact = smooth(schedule_of("flow"))
    times = [0.9, 0.6, 0.4, 0.1]
    plan = fewstep.plan(name, exact.schedule, times=times)
    noise = normal(3, 2)
    x = noise * exact.schedule.prior_std(0.9)
    for t, end in itertools.pairwise(times):
        h, slopes = end - t, [exact(x, t, prediction="flow")]
        for row in nodes:
            moved = sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(exact(x + h * moved, t + sum(row) * h, prediction="flow"))
        x = x + h * sum(w * k for w, k in zip(weights, slopes, strict=True))
    assert rms(run(exact, plan, noise) - x) < 1e-12

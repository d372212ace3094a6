"""Every solver on every schedule, at its default grid, against textbook solvers at the same budget."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import fewstep
from fewstep.diffusion.prediction import Prediction
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.plans.checks import gaussian_moments
from fewstep.solvers import SOLVERS
from reference import SCHEDULE_NAMES, normal, rms, run, schedule_of

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

WITH_PLANS = [n for n, build in SOLVERS.items() if n != "multistep" and not build().adaptive]
DETERMINISTIC = [n for n in WITH_PLANS if not SOLVERS[n]().stochastic]
STOCHASTIC = [n for n in WITH_PLANS if SOLVERS[n]().stochastic and SOLVERS[n]().order]
LADDER = ("ei-score", "ddim-theory", "accelerated-ddim-theory", "accelerated-ddim-lagged")
"""Solvers that their docstrings advise against at few evaluations."""


ANCESTRAL = ("gddim", "ddpm", "euler-ancestral", "dpm2-ancestral", "dpmpp-2s-ancestral", "repaint")
"""First-order rules with the noise of DDPM, which have :func:`_floor`."""

DATA = (0.1, 0.3, 0.6, 1.0, 1.5)
"""Standard deviations of Gaussian data, so that no solver is judged where its error changes sign."""


def _heun_in_time(exact: GaussianMixture, nfe: int, draw: torch.Tensor) -> torch.Tensor:
    noise = exact.schedule
    times = torch.linspace(noise.t_max, noise.t_min, nfe // 2 + 1, dtype=torch.float64)
    drift, g2, sigma = noise.drift(times), noise.diffusion(times), noise.sigma(times)
    x = sigma[0] * draw

    def slope_at(y: torch.Tensor, i: int) -> torch.Tensor:
        eps = exact(y, float(times[i]), prediction="eps")
        return drift[i] * y + g2[i] / (2 * sigma[i]) * eps

    for i in range(nfe // 2):
        h = times[i + 1] - times[i]
        first = slope_at(x, i)
        x = x + h / 2 * (first + slope_at(x + h * first, i + 1))
    return x


@functools.cache
def _truth(where: str) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    noise = schedule_of(where)
    exact, draw = smooth(noise), normal(32, 2)
    grid = fewstep.grid("log-rho", noise, 300)
    return exact, draw, run(exact, SOLVERS["tab3"]().plan(grid), draw)


@functools.cache
def _textbook(where: str, nfe: int) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor, float]:
    """The best of Euler in t, DDIM (evenly in t and in log rho) and Heun in t."""
    noise = schedule_of(where)
    exact, draw, truth = _truth(where)
    samples = [_heun_in_time(exact, nfe, draw)]
    for name, kind in itertools.product(("euler", "ddim"), ("uniform", "log-rho")):
        samples.append(run(exact, fewstep.plan(name, noise, nfe=nfe, grid=kind), draw))
    return exact, draw, truth, min(rms(x - truth) for x in samples)


def _budget(name: str, least: int) -> int:
    """The smallest budget from ``least`` on that a solver meets at its default grid."""
    solver = SOLVERS[name]()
    to_zero = bool(solver.default_grid[1].get("to_zero", False))
    costs = {solver.nfe(k, ends_at_zero=to_zero) for k in range(1, least + 4)}
    return min(cost for cost in costs if cost >= least)


def _refuses(name: str, where: str) -> bool:
    return name == "pndm" and schedule_of(where).flow_coordinate


def _ratio(name: str, where: str) -> float:
    nfe = _budget(name, 9)
    exact, draw, truth, best = _textbook(where, nfe)
    return rms(run(exact, fewstep.plan(name, exact.schedule, nfe=nfe), draw) - truth) / best


@functools.cache
def _law_error(name: str, where: str, nfe: int, grid: str | None = None) -> float:
    """RMS error of mean and standard deviations on Gaussian data N(0.7, s^2), in closed form."""
    plan = fewstep.plan(name, schedule_of(where), nfe=nfe, grid=grid)
    a, sigma = float(plan.grid.alpha[-1]), float(plan.grid.sigma[-1])
    errors = [float(gaussian_moments(plan, 0.7, 1.0).mean) - 0.7 * a]
    for s in DATA:
        wanted = ((a * s) ** 2 + sigma**2) ** 0.5
        errors.append(float(gaussian_moments(plan, 0.7, s).variance) ** 0.5 - wanted)
    return (sum(e**2 for e in errors) / len(errors)) ** 0.5


def _floor(steps: int) -> float:
    """The RMS error that DDPM has on any grid, to leading order in 1 / steps.

    On data N(m, s^2) a step changes the variance of x / alpha by -(1 - q^2)^2 s^2 rho^2 / (s^2 + rho^2)
    too much (q: ratio of the levels), and what follows shrinks that by (s^2 / (s^2 + rho^2))^2. With K
    steps of density n in log rho, sum -> (4 s^2 / K) int (rho / s)^2 (1 + rho^2 / s^2)^-3 / n d log rho,
    which by Cauchy-Schwarz is least for n ~ u (1 + u^2)^(-3/2), u = rho / s: 4 s^2 / K, i.e. 2 s / K in s.
    With the large variance of ``ddpm-theory`` it is (1 - q^2)^2 rho^4 / (s^2 + rho^2), and 2 s / K again.
    """
    return 2 / steps * (sum(s**2 for s in DATA) / (len(DATA) + 1)) ** 0.5


def _law_bound(name: str, where: str) -> float:
    """3 of the best of ancestral sampling and Euler-Maruyama on two grids, for first-order methods.

    Euler-Maruyama is of second order on Gaussian data of a flow, which ancestral rules cannot be: they
    have to be within 2 of what they have on their best grid; with the large variance, which needs small
    steps at the noisy end as well, within 3. Heun with noise has two evaluations in each of 10 steps: 10.
    """
    nfe = _budget(name, 19)
    if name in ANCESTRAL:
        return 2 * _floor(fewstep.plan(name, schedule_of(where), nfe=nfe).grid.steps)
    if name == "ddpm-theory":
        return 3 * _floor(nfe)
    textbook = [
        _law_error(n, where, nfe, g)
        for n in ("ddpm", "euler-maruyama")
        for g in ("uniform", "log-rho")
    ]
    return (10 if name == "edm-stochastic" else 3) * min(textbook)


def _bound(name: str, where: str) -> float:
    """How far the default may be from the best textbook solver, by what the theory says.

    Multistep methods: 2. First-order ones: 3 of the best, which may be of second order. Methods of
    several stages have 2 to 5 steps at 9 evaluations, over noise levels of 4 orders of magnitude: 10.
    Euler in the time of ve ignores that x stays in place there, while DDIM is the exponential method: 7.
    """
    solver = SOLVERS[name]()
    if solver.nfe(4) > 4:
        return 10.0
    if name == "euler":
        return 7.0 if where == "ve" else 3.0
    return 2.0 if solver.order > 1 else 3.0


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in LADDER])
def test_the_default_is_no_worse_than_the_textbook(name: str) -> None:
    above = {}
    for where in SCHEDULE_NAMES:
        if _refuses(name, where):
            with pytest.raises(ValueError, match="use ipndm"):
                fewstep.plan(name, schedule_of(where), nfe=_budget(name, 9))
        elif (ratio := _ratio(name, where)) > _bound(name, where):
            above[where] = ratio
    assert not above


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_law_at_the_default_is_no_worse_than_the_textbook(name: str) -> None:
    """Means and standard deviations of Gaussian data, in closed form."""
    errors = {where: _law_error(name, where, _budget(name, 19)) for where in SCHEDULE_NAMES}
    assert not {w: e for w, e in errors.items() if e > _law_bound(name, w)}


@pytest.mark.parametrize("name", ["ddpm", "ddpm-theory"])
def test_the_floor_of_ancestral_sampling(name: str) -> None:
    """With 400 steps at the derived density the error in the standard deviation is 2 s / K."""
    noise, s, steps = fewstep.schedule("flow"), 0.6, 400
    log_u = torch.linspace(6.5, -6.3, 4001, dtype=torch.float64)
    power = 1 if name == "ddpm" else 2
    density = torch.exp(power * log_u) * (1 + torch.exp(2 * log_u)) ** -1.5
    share = torch.cumulative_trapezoid(density, dim=0)
    places = torch.linspace(0, float(share[-1]), steps + 1, dtype=torch.float64)
    at = log_u[1:][torch.searchsorted(share, places).clamp(max=len(share) - 1)].unique().flip(0)
    lam = -(at + torch.tensor(s, dtype=torch.float64).log())
    times = noise.time(lam)
    plan = fewstep.plan(name, noise, steps=len(times) - 1, grid="explicit", times=times.tolist())
    a, sigma = float(plan.grid.alpha[-1]), float(plan.grid.sigma[-1])
    got = float(gaussian_moments(plan, 0.0, s).variance) ** 0.5
    error = abs(got - ((a * s) ** 2 + sigma**2) ** 0.5)
    assert error == pytest.approx(2 * s / (len(times) - 1), rel=0.1)


def test_heun_on_a_flow_is_heun_in_time() -> None:
    """By hand: dx/dt = eps - x0, evenly in t, at 10 evaluations."""
    exact, draw, _, _ = _textbook("flow", 10)
    plan = fewstep.plan("heun", exact.schedule, steps=5, to_zero=False)
    assert plan.prediction is Prediction.FLOW
    assert rms(run(exact, plan, draw) - _heun_in_time(exact, 10, draw)) < 1e-12

"""The lambda family: one law for all its members; A-DDIM's variance; local consistency."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.exact import smooth
from fewstep.plans.checks import gaussian_moments, table_difference
from fewstep.plans.execute import execute
from fewstep.plans.plan import Plan
from fewstep.solvers import SOLVERS
from reference import SCHEDULE_NAMES, lam_grid, line, normal, schedule_of, slope, states

FAMILY: list[tuple[str, dict[str, Any]]] = [
    *(("gddim", {"lam": lam}) for lam in (0.0, 0.5, 1.0, 1.5)),
    *(("euler-maruyama", {"lam": lam}) for lam in (0.0, 0.5, 1.0, 1.5)),
    *(("ddim", {"eta": eta}) for eta in (0.0, 0.5, 1.0)),
]


def _label(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v:g}" for k, v in value.items())
    return str(value)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_three_names_for_one_table(where: str) -> None:
    """gDDIM at lambda = 1, DDIM at eta = 1, and DDPM with the small variance."""
    for to_zero, kind in itertools.product((False, True), ("uniform", "karras")):
        grid = fewstep.grid(kind, schedule_of(where), 6, to_zero=to_zero)
        reference = SOLVERS["ddpm"]().plan(grid)
        for name, options in (("gddim", {"lam": 1.0}), ("ddim", {"eta": 1.0})):
            assert table_difference(SOLVERS[name](**options).plan(grid), reference) < 1e-12


def test_the_large_variance_of_ddpm_is_that_of_unit_data(vp: NoiseSchedule) -> None:
    """For data of unit variance, VP keeps unit variance, and so does DDPM with sigma_t^2 - ..."""
    grid = fewstep.grid("uniform", vp, 7)
    large = states(SOLVERS["ddpm"](variance="large").plan(grid))
    small = states(SOLVERS["ddpm"]().plan(grid))
    for i in range(7):
        beta = 1 - float((grid.alpha[i] / grid.alpha[i + 1]).square())
        assert float(large[i][2]) == pytest.approx(beta**0.5, rel=1e-10)
        posterior = beta * float((grid.sigma[i + 1] / grid.sigma[i]).square())
        assert float(small[i][2]) == pytest.approx(posterior**0.5, rel=1e-10)
        assert torch.equal(large[i][:2], small[i][:2])


@pytest.mark.parametrize(
    ("step", "variance", "drift"),
    [
        (1e-1, 0.47168, 0.84687),
        (1e-2, 0.93025, 0.97999),
        (1e-3, 0.99280, 0.99794),
        (1e-4, 0.99928, 0.99979),
    ],
)
def test_stochastic_ddim_is_a_solver_of_the_reverse_equation(
    step: float, variance: float, drift: float, vp: NoiseSchedule
) -> None:
    r"""At t = 0.4: noise variance over :math:`\lambda^2 \beta \Delta t`, and the weight of eps over
    :math:`(1 + \lambda^2)` times DDIM's, with :math:`\lambda = \eta = 0.7`; both tend to 1."""
    eta = 0.7
    grid = fewstep.grid("explicit", vp, None, times=[0.4, 0.4 - step])
    row = states(SOLVERS["ddim"](eta=eta).plan(grid))[0]
    ode = states(SOLVERS["ddim"]().plan(grid))[0]
    beta = 0.1 + 19.9 * 0.4
    assert float(row[2].square()) / (eta**2 * beta * step) == pytest.approx(variance, abs=1.1e-5)
    assert float(row[1]) / ((1 + eta**2) * float(ode[1])) == pytest.approx(drift, abs=1.1e-5)


@pytest.mark.parametrize(("name", "options"), FAMILY, ids=_label)
def test_all_members_reach_the_law_of_gaussian_data(
    name: str, options: dict[str, Any], vp: NoiseSchedule
) -> None:
    """Mean and variance in closed form: the error falls as 1 / K, to the same limit for all."""
    mean, std = 0.7, 0.6
    errors = []
    for steps in (100, 200):
        grid = lam_grid(vp, steps, -1.5, 1.5)
        got = gaussian_moments(SOLVERS[name](**options).plan(grid), mean, std)
        a, s = grid.alpha[-1], grid.sigma[-1]
        gap = (got.mean - a * mean).abs() + (got.variance - (a * std).square() - s.square()).abs()
        errors.append(float(gap))
    assert errors[1] < 0.02
    # Not slower than first order; some members cross zero and are faster here.
    assert slope(errors, (100, 200)) > 0.9


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _sampled(plan: Plan, grid: TimeGrid, count: int, seed: int) -> Tensor:
    exact = line(grid.schedule)
    generator = torch.Generator().manual_seed(seed)

    def draw(index: int) -> Tensor:
        del index
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    start = exact.draw(count, t=float(grid.times[0]), seed=seed)
    return execute(plan, lambda x, t: exact(x, t, prediction=plan.prediction), start, draw=draw)


@pytest.mark.parametrize(("name", "options"), FAMILY, ids=_label)
def test_all_members_reach_the_law_of_a_mixture(
    name: str, options: dict[str, Any], vp: NoiseSchedule
) -> None:
    """Mean, variance and the share of each mode, 10,000 draws: 5 standard errors and the bias of 80 steps.

    The bias is of first order: half of what 80 steps leave is what 160 would; 0.015 bounds it for
    every member (0.01 in total variation was measured for the worst at this step size).
    """
    grid = lam_grid(vp, 80, -2.3, 1.7)
    count = 10_000
    x = _sampled(SOLVERS[name](**options).plan(grid), grid, count, seed=11)[:, 0]
    exact = line(vp)
    a, s = float(grid.alpha[-1]), float(grid.sigma[-1])
    means = (a * exact.means[:, 0]).tolist()
    stds = ((a * exact.stds).square() + s * s).sqrt().tolist()
    weights = exact.weights.tolist()
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    variance = sum(w * (d * d + m * m) for w, d, m in zip(weights, stds, means, strict=True))
    variance -= mean**2
    assert abs(float(x.mean()) - mean) < 5 * (variance / count) ** 0.5 + 0.015
    assert abs(float(x.var()) - variance) < 5 * variance * (2 / count) ** 0.5 + 0.03
    for low, high in ((-9.0, -0.5), (-0.5, 1.0), (1.0, 9.0)):
        share = sum(
            w * (_normal_cdf((high - m) / d) - _normal_cdf((low - m) / d))
            for w, m, d in zip(weights, means, stds, strict=True)
        )
        got = float(((x > low) & (x <= high)).double().mean())
        assert abs(got - share) < 5 * (share * (1 - share) / count) ** 0.5 + 0.015, (low, high)


def test_the_best_variance_of_ddim(vp: NoiseSchedule) -> None:
    """A-DDIM from t = 0.4 to 0.25 on the smooth toy: 0.1139 by the formula, the same by Monte Carlo.

    The formula has Gamma, the mean square of the score; the other side is the mean square of what
    the deterministic step misses when the noise of the pair (x0, x_t) is kept. 200,000 draws.
    """
    exact, count = smooth(vp), 200_000
    grid = fewstep.grid("explicit", vp, None, times=[0.4, 0.25])
    x0 = exact.draw(count, seed=5)
    noise = normal(count, 2, seed=6)
    a, s = grid.alpha, grid.sigma
    x = a[0] * x0 + s[0] * noise
    eps = exact(x, grid.times[0])
    gamma = float((eps / s[0]).square().mean())
    plan = SOLVERS["analytic-ddim"](gamma=[gamma]).plan(grid)
    row = states(plan)[0]
    variance = float(row[2].square())
    missed = a[1] * x0 + s[1] * noise - (row[0] * x + row[1] * eps)
    assert variance == pytest.approx(0.1139, abs=1.2e-3)
    # Unbiased on both sides; the difference has a standard error of some 3e-4.
    assert float(missed.square().mean()) == pytest.approx(variance, abs=1.5e-3)


def test_analytic_ddim_is_right_on_gaussian_data(vp: NoiseSchedule) -> None:
    """With the data's own variance the steps keep the variance exactly, at any number of steps."""
    for steps, std in itertools.product((2, 5, 9), (0.3, 1.2)):
        grid = fewstep.grid("uniform", vp, steps)
        plan = SOLVERS["analytic-ddim"](data_std=std).plan(grid)
        got = gaussian_moments(plan, 0.5, std)
        a, s = grid.alpha[-1], grid.sigma[-1]
        assert float(got.variance) == pytest.approx(
            float((a * std).square() + s.square()), rel=1e-10
        )
        assert float(got.mean) == pytest.approx(float(a * 0.5), rel=1e-10)


def test_too_much_noise_is_refused_with_the_most_there_is(vp: NoiseSchedule) -> None:
    grid = fewstep.grid("uniform", vp, 5)
    with pytest.raises(ValueError, match=r"eta = 3 adds more noise .* \(step 1 of 5\); at most 1"):
        SOLVERS["ddim"](eta=3.0).plan(grid)
    with pytest.raises(ValueError, match="eta must be a number at least 0, got -1"):
        SOLVERS["ddim"](eta=-1)
    with pytest.raises(ValueError, match="variance must be 'small' or 'large'"):
        SOLVERS["ddpm"](variance="learned")
    with pytest.raises(
        ValueError, match="gamma must have one value for each of the 5 steps, got 2"
    ):
        SOLVERS["analytic-ddim"](gamma=[1.0, 1.0]).plan(grid)


def test_edm_churn_keeps_the_law(vp: NoiseSchedule) -> None:
    """Adding noise exactly and removing it by Heun: with no churn Heun's table, with churn its law."""
    grid = fewstep.grid("karras", vp, 6, to_zero=True)
    heun = SOLVERS["heun"]().plan(grid)
    assert table_difference(SOLVERS["edm-stochastic"](s_churn=0.0).plan(grid), heun) < 1e-14
    errors = []
    for steps in (40, 80):
        grid = lam_grid(vp, steps, -1.5, 1.5)
        plan = SOLVERS["edm-stochastic"](s_churn=4.0, s_min=0.0).plan(grid)
        assert plan.n_noise == steps
        got = gaussian_moments(plan, 0.0, 0.6)
        a, s = grid.alpha[-1], grid.sigma[-1]
        errors.append(abs(float(got.variance - (a * 0.6).square() - s.square())))
    assert errors[1] < 2e-3
    assert slope(errors, (40, 80)) > 0.8


def test_the_noise_of_2m_sde_interpolates_to_2m(vp: NoiseSchedule) -> None:
    grid = fewstep.grid("log-rho", vp, 6)
    without = SOLVERS["dpmpp-2m-sde"](eta=0.0).plan(grid)
    assert not without.stochastic
    assert table_difference(without, SOLVERS["dpmpp-2m"]().plan(grid)) < 1e-14
    # eta = 1, first step: the same law as DDPM's, whose eps form it is in data prediction.
    sde = states(SOLVERS["dpmpp-2m-sde"]().plan(grid))[0]
    ddpm = states(SOLVERS["ddpm"]().plan(grid))[0]
    assert float(sde[2]) == pytest.approx(float(ddpm[2]), rel=1e-12)


def test_the_langevin_corrector_reaches_its_stationary_law(vp: NoiseSchedule) -> None:
    r"""On Gaussian data of variance V at a level a step is x - d / V (x - m) + sqrt(2 d) z, with d = 2 r^2 sigma^2.

    Many such steps have the variance :math:`V / (1 - d / 2V)` for V, whatever the predictor left.
    """
    std, snr = 0.5, 0.3
    grid = lam_grid(vp, 3, -1.0, 0.5)
    plan = SOLVERS["langevin-corrected"](corrections=100, snr=snr).plan(grid)
    a, s = float(grid.alpha[-1]), float(grid.sigma[-1])
    variance = (a * std) ** 2 + s**2
    step = 2 * (snr * s) ** 2
    got = gaussian_moments(plan, 0.7, std)
    assert float(got.variance) == pytest.approx(variance / (1 - step / (2 * variance)), rel=1e-9)
    assert float(got.mean) == pytest.approx(a * 0.7, rel=1e-9)
    none = SOLVERS["langevin-corrected"](corrections=0).plan(grid)
    assert table_difference(none, SOLVERS["ddpm"]().plan(grid)) < 1e-12

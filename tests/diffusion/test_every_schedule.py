"""What every registered schedule must hold, unasked, and the closed forms of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.diffusion.schedules import SCHEDULES, NoiseSchedule, schedule, schedule_from_record
from fewstep.models.exact import GaussianMixture
from reference import SCHEDULE_NAMES, schedule_of


def _times(noise: NoiseSchedule, count: int = 101) -> Tensor:
    return torch.linspace(noise.t_min, noise.t_max, count, dtype=torch.float64)


def _smooth_times(noise: NoiseSchedule) -> Tensor:
    """Times away from the ends and from the kinks of a table."""
    inner = _times(noise, 41)[1:-1]
    return inner.floor() + 0.4 if noise.discrete else inner


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_time_is_the_inverse_of_lam(where: str) -> None:
    noise = schedule_of(where)
    times = _times(noise)
    # dt = dlam / |lam'|, and lam is known to 1e-16 times its size.
    assert torch.allclose(noise.time(noise.lam(times)), times, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_noise_grows_with_time(where: str) -> None:
    noise = schedule_of(where)
    times = _times(noise, 1000)
    assert bool((noise.lam(times).diff() < 0).all())
    assert bool((noise.sigma(times).diff() > 0).all())
    assert bool((noise.alpha(times).diff() <= 0).all())


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_rho_and_lam_are_the_ratio_of_the_scales(where: str) -> None:
    noise = schedule_of(where)
    times = _times(noise)
    ratio = noise.sigma(times) / noise.alpha(times)
    assert torch.allclose(noise.rho(times), ratio, rtol=1e-12)
    assert torch.allclose(noise.lam(times), -ratio.log(), rtol=0, atol=1e-11)


def _central(values: Tensor, step: float) -> Tensor:
    """The fourth-order central difference of values at t - 2h, t - h, t + h, t + 2h."""
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_drift_and_diffusion_are_those_of_the_forward_equation(where: str) -> None:
    r"""By finite differences: f = alpha' / alpha, and g^2 from (sigma^2)' = 2 f sigma^2 + g^2."""
    noise = schedule_of(where)
    times = _smooth_times(noise)
    step = 1e-3 * (0.1 if noise.discrete else float(times.min()))
    stencil = torch.stack([times + k * step for k in (-2, -1, 1, 2)])
    drift = _central(noise.alpha(stencil), step) / noise.alpha(times)
    variance = noise.sigma(times).square()
    growth = _central(noise.sigma(stencil).square(), step) - 2 * drift * variance
    assert torch.allclose(noise.drift(times), drift, rtol=1e-6, atol=1e-8)
    assert torch.allclose(noise.diffusion(times), growth, rtol=1e-6, atol=1e-9)
    # The identity that makes all scalar schedules one equation: d rho / dt = g^2 / (2 alpha sigma).
    slope = _central(noise.rho(stencil), step)
    scale = 2 * noise.alpha(times) * noise.sigma(times)
    assert torch.allclose(slope, noise.diffusion(times) / scale, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_gradients_reach_the_times(where: str) -> None:
    noise = schedule_of(where)
    times = _smooth_times(noise)[5:8].requires_grad_()
    for function in (noise.log_alpha, noise.log_sigma, noise.lam):
        assert torch.autograd.gradcheck(function, (times,), atol=1e-4)
    lam = noise.lam(times).detach().requires_grad_()
    assert torch.autograd.gradcheck(noise.time, (lam,), atol=1e-4)
    # Also through the derivatives, which Euler's method has as coefficients.
    assert torch.autograd.gradcheck(noise.diffusion, (times,), atol=1e-4)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_a_schedule_comes_back_from_its_config(where: str) -> None:
    noise = schedule_of(where)
    back = schedule_from_record(noise.to_record())
    assert back == noise
    assert hash(back) == hash(noise)
    times = _times(noise)
    assert torch.equal(back.lam(times), noise.lam(times))
    assert all(back != schedule_of(other) for other in SCHEDULE_NAMES if other != where)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_types_of_the_times_are_kept(where: str) -> None:
    noise = schedule_of(where)
    times = _times(noise)[10:20]
    for function in (noise.alpha, noise.sigma, noise.lam, noise.rho):
        single = function(times.float())
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), function(times), rtol=2e-4)


def test_vp_linear() -> None:
    """Values of the continuous schedule: alpha^2(1) = exp(-10.05) and the two ends of rho."""
    noise = schedule("vp-linear")
    t = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    expected = torch.tensor([-0.5 * 19.9 * 1e-6 - 1e-4, -10.05], dtype=torch.float64)
    assert torch.allclose(2 * noise.log_alpha(t), expected, rtol=1e-14)
    assert float(noise.rho(t)[1]) == pytest.approx(152.17, abs=5e-3)
    assert float(noise.rho(t)[0]) == pytest.approx(0.010486, abs=5e-7)
    assert float(noise.sigma(t)[0]) == pytest.approx(0.010485, abs=5e-7)
    beta = 0.1 + 19.9 * t
    assert torch.allclose(noise.diffusion(t), beta, rtol=1e-10)
    assert torch.allclose(noise.drift(t), -beta / 2, rtol=1e-12)
    # Down to 1e-6 the inverse does not cancel (the naive root loses 19 % there in float32).
    small = torch.tensor([1e-6, 1e-5, 1e-4], dtype=torch.float64)
    assert torch.allclose(noise.time(noise.lam(small)), small, rtol=1e-9)


def test_vp_cosine() -> None:
    noise = schedule("vp-cosine")
    t = _times(noise)
    angle = (t + 0.008) / 1.008 * math.pi / 2
    assert torch.allclose(noise.rho(t), torch.tan(angle), rtol=1e-12)
    assert torch.allclose(noise.alpha(t).square() + noise.sigma(t).square(), torch.ones_like(t))
    assert noise.t_max == 0.9946


def test_sub_vp() -> None:
    """The mean of VP, sigma = 1 - alpha^2, g^2 = beta (1 - alpha^4)."""
    noise, vp = schedule("sub-vp"), schedule("vp-linear")
    t = _times(noise)
    assert torch.equal(noise.alpha(t), vp.alpha(t))
    assert torch.allclose(noise.sigma(t), vp.sigma(t).square(), rtol=1e-12)
    beta = 0.1 + 19.9 * t
    growth = beta * (1 - noise.alpha(t) ** 4)
    assert torch.allclose(noise.diffusion(t), growth, rtol=1e-8)


def test_ve() -> None:
    noise = schedule("ve")
    t = _times(noise)
    assert torch.equal(noise.alpha(t), torch.ones_like(t))
    assert torch.allclose(noise.sigma(t), 0.01 * 5000.0**t, rtol=1e-13)
    assert noise.prior_std() == pytest.approx(50.0, rel=1e-13)
    growth = 2 * math.log(5000.0) * noise.sigma(t).square()
    assert torch.allclose(noise.diffusion(t), growth, rtol=1e-12)


def test_edm() -> None:
    noise = schedule("edm")
    t = _times(noise)
    assert torch.equal(noise.alpha(t), torch.ones_like(t))
    assert torch.allclose(noise.sigma(t), t, rtol=1e-15)
    assert torch.allclose(noise.diffusion(t), 2 * t, rtol=1e-12)
    assert (noise.t_min, noise.t_max, noise.prior_std()) == (0.002, 80.0, pytest.approx(80.0))


def test_flow() -> None:
    noise = schedule("flow")
    t = _times(noise)
    assert torch.allclose(noise.alpha(t) + noise.sigma(t), torch.ones_like(t), rtol=1e-14)
    assert torch.allclose(noise.sigma(t), t, rtol=1e-15)
    assert torch.allclose(noise.diffusion(t), 2 * t / (1 - t), rtol=1e-10)


def test_ddpm_linear() -> None:
    """The two ends of DDPM's table, and its levels by another way than in the code."""
    noise = schedule("ddpm-linear")
    ends = torch.tensor([0.0, 999.0], dtype=torch.float64)
    assert float(noise.alpha(ends)[0] ** 2) == pytest.approx(0.9999, abs=1e-12)
    assert float(noise.alpha(ends)[1] ** 2) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(noise.rho(ends)[0]) == pytest.approx(0.010000500, abs=5e-10)
    assert float(noise.rho(ends)[1]) == pytest.approx(157.407281, abs=5e-7)
    product, level = 1.0, []
    for n in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * n / 999)
        level.append(product)
    index = torch.arange(1000, dtype=torch.float64)
    expected = torch.tensor(level, dtype=torch.float64)
    assert torch.allclose(noise.alpha(index).square(), expected, rtol=1e-11)


def test_ddpm_scaled_linear_and_cosine() -> None:
    index = torch.tensor([0.0, 499.0, 999.0], dtype=torch.float64)
    scaled = schedule("ddpm-scaled-linear")
    root = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * n / 999 for n in range(1000)]
    logs = [math.fsum(math.log1p(-(r * r)) for r in root[: n + 1]) for n in (0, 499, 999)]
    expected = torch.tensor(logs, dtype=torch.float64)
    assert torch.allclose(2 * scaled.log_alpha(index), expected, rtol=1e-11)

    cosine = schedule("ddpm-cosine")

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    # The cap on beta is reached at the very end only: up to 499 the product telescopes.
    expected = torch.tensor([bar(0.001) / bar(0), bar(0.5) / bar(0)], dtype=torch.float64)
    assert torch.allclose(cosine.alpha(index[:2]).square(), expected, rtol=1e-10)
    last = cosine.alpha(torch.tensor([998.0, 999.0], dtype=torch.float64)).square()
    assert float(last[1] / last[0]) == pytest.approx(1e-3, rel=1e-9)


def test_a_table_is_met_at_its_levels_and_linear_in_lam_between() -> None:
    table = [0.99, 0.7, 0.2, 0.01]
    noise = schedule("tabulated", alphas_cumprod=table)
    index = torch.arange(4, dtype=torch.float64)
    expected = torch.tensor(table, dtype=torch.float64)
    assert torch.allclose(noise.alpha(index).square(), expected, rtol=1e-14)
    between = noise.lam(torch.tensor([1.25], dtype=torch.float64))
    ends = noise.lam(index[1:3])
    assert torch.allclose(between, 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vp-linear", {"beta_min": 0.0}, "0 < beta_min <= beta_max"),
        ("vp-linear", {"beta_min": 3.0, "beta_max": 2.0}, "0 < beta_min <= beta_max"),
        ("sub-vp", {"beta_max": math.inf}, "0 < beta_min <= beta_max"),
        ("vp-cosine", {"s": -0.1}, "s must be in"),
        ("ve", {"sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max"),
        ("edm", {"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ("ddpm-linear", {"beta_end": 1.0}, "beta_start <= beta_end < 1"),
        ("ddpm-scaled-linear", {"levels": 1}, "levels must be"),
        ("ddpm-cosine", {"max_beta": 1.0}, "max_beta must be in"),
        ("tabulated", {"alphas_cumprod": [0.5, 0.5]}, "decrease strictly"),
        ("tabulated", {"alphas_cumprod": [0.5, 0.7]}, "decrease strictly"),
        ("tabulated", {"alphas_cumprod": [1.0, 0.7]}, "strictly between 0 and 1"),
        ("tabulated", {"alphas_cumprod": [0.9, math.nan]}, "strictly between 0 and 1"),
        ("tabulated", {"alphas_cumprod": [0.9]}, "at least 2 levels"),
        ("vp-liner", {}, "Did you mean 'vp-linear'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(name, **options)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="beta_mx"):
        schedule("vp-linear", beta_mx=20.0)
    with pytest.raises(ValueError, match="beta_mx"):
        schedule_from_record({"name": "vp-linear", "beta_mx": 20.0})
    with pytest.raises(ValueError, match="'name'"):
        schedule_from_record({"beta_max": 20.0})


def test_the_registry_is_the_public_one() -> None:
    assert fewstep.SCHEDULES is SCHEDULES
    assert set(SCHEDULE_NAMES) >= {
        *("vp-linear", "vp-cosine", "sub-vp", "ve", "edm", "flow"),
        *("ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine", "tabulated"),
    }


def test_betas_give_the_same_levels_as_their_products() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    given = schedule("tabulated", betas=betas.tolist())
    products = schedule("tabulated", alphas_cumprod=torch.cumprod(1 - betas, 0).tolist())
    assert given == products
    t = torch.tensor([0.0, 17.5, 999.0], dtype=torch.float64)
    assert torch.equal(given.alpha(t), schedule("ddpm-linear").alpha(t))
    for options, message in (
        ({}, "neither"),
        ({"betas": [0.1, 0.2], "alphas_cumprod": [0.9, 0.7]}, "both"),
        ({"betas": [0.1, 1.5]}, "betas must lie strictly between 0 and 1; got values from 0.1 to"),
        ({"betas": [0.1]}, "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule("tabulated", **options)


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'beta_maxx'.*beta_min, beta_max.*mean 'beta_max'"):
        schedule("vp-linear", beta_maxx=20.0)


@pytest.mark.parametrize("name", ["vp-linear", "flow", "ddpm-linear"])
def test_derivatives_are_those_of_inference_mode_too(name: str) -> None:
    """Nothing is differentiated there, so a derivative would be 0: Euler's method has its drift from one."""
    expected = fewstep.plan("euler", fewstep.schedule(name), nfe=5).values
    with torch.inference_mode():
        schedule = fewstep.schedule(name)
        got = fewstep.plan("euler", schedule, nfe=5).values
    assert torch.equal(got, expected)
    assert torch.equal(fewstep.plan("euler", schedule, nfe=5).values, expected)


class Squares(NoiseSchedule):
    """A user's own: rho = t^2, variance preserving."""

    name = "squares"
    t_min, t_max = 0.05, 9.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log1p(t**4)

    def log_sigma(self, t: Tensor) -> Tensor:
        return 2 * t.log() - 0.5 * torch.log1p(t**4)

    def time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam / 2)


@pytest.mark.parametrize(
    ("solver", "nfe"), [("tab3", 41), ("unipc3", 41), ("heun", 41), ("res-2s", 42)]
)
def test_a_schedule_of_ones_own(solver: str, nfe: int) -> None:
    """Two functions and an inverse are enough: samples of a Gaussian have its mean and deviation."""
    exact = GaussianMixture([[0.5]], [0.4], [1.0], Squares())
    samples = fewstep.sample(exact, 2000, solver=solver, nfe=nfe, seed=1)
    assert float(samples.mean()) == pytest.approx(0.5, abs=5 * 0.4 / 2000**0.5 + 0.01)
    assert float(samples.std()) == pytest.approx(0.4, abs=5 * 0.4 / 4000**0.5 + 0.01)

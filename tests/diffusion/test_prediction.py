"""The maps between the five predictions, for every pair."""

from __future__ import annotations

import itertools

import pytest
import torch

from fewstep.diffusion.prediction import Prediction, coefficients, convert, mixture
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.exact import GaussianMixture
from reference import SCHEDULE_NAMES, normal, schedule_of

PAIRS = list(itertools.product(Prediction, Prediction))
MEAN, STD = 0.4, 0.7


def _closed_form(
    kind: Prediction, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The optimal prediction for data N(MEAN, STD^2), each from its own definition."""
    variance = alpha.square() * STD**2 + sigma.square()
    score = -(x - alpha * MEAN) / variance
    posterior_mean = (x + sigma.square() * score) / alpha  # Tweedie
    eps = -sigma * score
    return {
        Prediction.X0: posterior_mean,
        Prediction.EPS: eps,
        Prediction.V: alpha * eps - sigma * posterior_mean,
        Prediction.SCORE: score,
        Prediction.FLOW: eps - posterior_mean,
    }[kind]


def _inside(noise: NoiseSchedule) -> torch.Tensor:
    """Ten times with alpha and sigma both above 1e-2, where no map is singular."""
    lam = torch.linspace(-3.0, 3.0, 10, dtype=torch.float64)
    return noise.time(lam).clamp(noise.t_min, noise.t_max)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_every_pair_agrees_with_the_closed_form(where: str) -> None:
    noise = schedule_of(where)
    t, x = _inside(noise), normal(10, 3)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    a, s = alpha[:, None], sigma[:, None]
    for source, target in PAIRS:
        value, wanted = (_closed_form(kind, x, a, s) for kind in (source, target))
        got = convert(value, x, alpha=alpha, sigma=sigma, source=source, target=target)
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-10), (source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: p.value)
def test_there_and_back(source: Prediction, target: Prediction, vp: NoiseSchedule) -> None:
    t, x, value = _inside(vp), normal(10, 2, 2), normal(10, 2, 2, seed=1)
    scales = {"alpha": vp.alpha(t), "sigma": vp.sigma(t)}
    there = convert(value, x, source=source, target=target, **scales)
    back = convert(there, x, source=target, target=source, **scales)
    assert torch.allclose(back, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", Prediction)
def test_the_combination_of_data_and_noise(kind: Prediction) -> None:
    """A network that knows x0 and eps predicts p x0 + q eps; converted, it gives both back."""
    x0, eps = normal(4, 5), normal(4, 5, seed=1)
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    p, q = mixture(kind, alpha, sigma)
    for target, truth in ((Prediction.X0, x0), (Prediction.EPS, eps)):
        got = convert(p * x0 + q * eps, x, alpha=alpha, sigma=sigma, source=kind, target=target)
        assert torch.allclose(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", Prediction)
def test_the_exact_denoiser_in_every_convention(kind: Prediction, vp: NoiseSchedule) -> None:
    exact = GaussianMixture([[MEAN, MEAN]], [STD], [1.0], vp)
    t, x = _inside(vp), normal(10, 2)
    a, s = vp.alpha(t)[:, None], vp.sigma(t)[:, None]
    got = exact(x, t, prediction=kind.value)
    assert torch.allclose(got, _closed_form(kind, x, a, s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda p: p.value)
def test_the_ends(source: Prediction, target: Prediction) -> None:
    """At pure data nothing but eps and score is lost, at pure noise nothing but x0.

    Where information is missing the map is infinite or NaN; where it is not, it is exact.
    """
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x0, eps = 0.3, -1.2
    for alpha, sigma in ((one, zero), (zero, one)):
        x = alpha * x0 + sigma * eps
        p, q = mixture(source, alpha, sigma)
        p_wanted, q_wanted = mixture(target, alpha, sigma)
        known = alpha * q - sigma * p
        if source is target:
            assert coefficients(source, target, alpha=alpha, sigma=sigma) == (zero, one)
            continue
        if not (p.isfinite() & q.isfinite() & q_wanted.isfinite()):
            continue  # the score is infinite where there is no noise
        a, b = coefficients(source, target, alpha=alpha, sigma=sigma)
        if float(known) == 0.0:
            assert not bool(b.isfinite() & a.isfinite()), "information out of nothing"
        else:
            got = a * x + b * (p * x0 + q * eps)
            assert float(got) == pytest.approx(float(p_wanted * x0 + q_wanted * eps), rel=1e-14)


def test_near_an_end_the_regular_maps_lose_nothing() -> None:
    """v to x0 and to eps is well conditioned at both ends, unlike x0 to eps at sigma = 1e-9."""
    x0, eps = normal(50), normal(50, seed=1)
    for tiny, flip in itertools.product((1e-3, 1e-9), (False, True)):
        large = (1 - tiny**2) ** 0.5
        a, s = (large, tiny) if flip else (tiny, large)
        alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (a, s))
        x, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
        for target, truth in ((Prediction.X0, x0), (Prediction.EPS, eps)):
            got = convert(v, x, alpha=alpha, sigma=sigma, source="v", target=target)
            assert torch.allclose(got, truth, rtol=1e-12, atol=1e-12)


def test_scales_of_a_batch_spread_over_the_event(vp: NoiseSchedule) -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x, value = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    scales = vp.alpha(t), vp.sigma(t)
    batch = convert(value, x, alpha=scales[0], sigma=scales[1], source="eps", target="x0")
    for i in range(2):
        alone = convert(
            value[i], x[i], alpha=scales[0][i], sigma=scales[1][i], source="eps", target="x0"
        )
        assert torch.allclose(batch[i], alone, rtol=1e-14, atol=1e-14)


def test_names() -> None:
    assert Prediction.of("v") is Prediction.V
    assert Prediction.of(Prediction.FLOW) is Prediction.FLOW
    with pytest.raises(ValueError, match=r"Unknown prediction 'epss'.*Did you mean 'eps'"):
        Prediction.of("epss")

"""The closed-form denoisers against autograd of their own log density, and against brute force."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.exact import DataSet, GaussianMixture, sharp, smooth
from reference import SCHEDULE_NAMES, normal, schedule_of


def _times(noise: NoiseSchedule, count: int) -> torch.Tensor:
    lam = torch.linspace(-4.0, 3.5, count, dtype=torch.float64)
    return noise.time(lam).clamp(noise.t_min, noise.t_max)


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
@pytest.mark.parametrize("build", [smooth, sharp])
def test_the_score_is_the_gradient_of_the_log_density(build: object, where: str) -> None:
    noise = schedule_of(where)
    exact = build(noise)  # type: ignore[operator]
    t = _times(noise, 12)
    x = (normal(12, 2) * (noise.sigma(t) + noise.alpha(t))[:, None]).requires_grad_()
    density = torch.stack([exact.log_prob(x[i : i + 1], t[i])[0] for i in range(12)])
    (gradient,) = torch.autograd.grad(density.sum(), x)
    score = exact(x.detach(), t, prediction="score")
    assert torch.allclose(score, gradient, rtol=1e-8, atol=1e-8)


def test_the_log_density_is_normalised_and_right(vp: NoiseSchedule) -> None:
    """In one dimension: the integral is 1, and at a point it is the sum of normal densities."""
    means, stds, weights = [-1.0, 0.5], [0.3, 0.2], [0.25, 0.75]
    exact = GaussianMixture([[m] for m in means], stds, weights, vp)
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    for t in (0.05, 0.4, 1.0):
        total = float(exact.log_prob(x, t).exp().sum() * (x[1] - x[0]))
        assert total == pytest.approx(1.0, abs=1e-9)
    a = float(vp.alpha(torch.tensor(0.4, dtype=torch.float64)))
    s = float(vp.sigma(torch.tensor(0.4, dtype=torch.float64)))
    expected = 0.0
    for m, d, w in zip(means, stds, weights, strict=True):
        var = (a * d) ** 2 + s * s
        expected += w * math.exp(-((0.1 - a * m) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
    point = torch.tensor([[0.1]], dtype=torch.float64)
    assert float(exact.log_prob(point, 0.4)) == pytest.approx(math.log(expected), rel=1e-12)


def test_weights_are_normalised_and_moments_known(vp: NoiseSchedule) -> None:
    one = GaussianMixture([[0.0, 1.0], [2.0, -1.0]], [0.5, 0.1], [1.0, 3.0], vp)
    assert one.weights.tolist() == [0.25, 0.75]
    assert one.data_mean.tolist() == pytest.approx([1.5, -0.5])  # type: ignore[union-attr]
    # E s^2 + Var of the means: 0.25 .25 + 0.75 .01 + 0.25 0.75 2^2.
    variance = 0.25 * 0.25 + 0.75 * 0.01 + 0.25 * 0.75 * 4
    assert one.data_std.square().tolist() == pytest.approx([variance] * 2)  # type: ignore[union-attr]


def test_draws_have_the_law_of_the_mixture(vp: NoiseSchedule) -> None:
    """Weights, means and variances of 20,000 draws, within 5 standard errors; noised draws too."""
    exact = smooth(vp)
    n = 20_000
    x = exact.draw(n, seed=3)
    nearest = torch.cdist(x, exact.means).argmin(1)
    sharp_model = sharp(vp)
    y = sharp_model.draw(n, seed=3)
    mode = torch.cdist(y, sharp_model.means).argmin(1)
    for k, w in enumerate(sharp_model.weights.tolist()):
        assert abs(float((mode == k).double().mean()) - w) < 5 * (w * (1 - w) / n) ** 0.5
        inside = y[mode == k] - sharp_model.means[k]
        assert float(inside.std()) == pytest.approx(0.01, rel=5 / (2 * inside.numel()) ** 0.5)
    assert nearest.unique().tolist() == [0, 1, 2, 3]
    for t in (None, 0.3):
        x = exact.draw(n, t=t, seed=4)
        a, s = 1.0, 0.0
        if t is not None:
            time = torch.tensor(t, dtype=torch.float64)
            a, s = float(vp.alpha(time)), float(vp.sigma(time))
        std = (a * a * exact.data_std.square() + s * s).sqrt()  # type: ignore[union-attr]
        assert bool(((x.mean(0) - a * exact.data_mean).abs() < 5 * std / n**0.5).all())
        assert bool(((x.std(0) / std - 1).abs() < 5 / n**0.5).all())
    assert torch.equal(exact.draw(10, seed=3), exact.draw(10, seed=3))
    assert not torch.equal(exact.draw(10, seed=3), exact.draw(10, seed=4))


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_data_set_denoiser_is_the_posterior_mean(where: str, chunk: int) -> None:
    """Against brute force: all distances at once, softmax, mean."""
    noise = schedule_of(where)
    points = normal(23, 2, 3)
    exact = DataSet(points, noise, chunk=chunk)
    assert exact.event_shape == (2, 3)
    t = _times(noise, 9)
    z = normal(9, 2, 3, seed=1)
    a, s = noise.alpha(t)[:, None, None], noise.sigma(t)[:, None, None]
    x = a * points[:9] + s * z
    distance = (x[:, None] - a[:, None] * points).square().sum((2, 3))
    share = (-distance / (2 * s[:, :, 0].square())).softmax(1)
    expected = torch.einsum("bn,nij->bij", share, points)
    got = exact(x, t, prediction="x0")
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-9)


def test_a_data_set_is_a_mixture_of_points(vp: NoiseSchedule) -> None:
    points = normal(6, 4)
    exact = DataSet(points, vp)
    mixture = GaussianMixture(points, [0.0] * 6, [1.0] * 6, vp)
    t, x = _times(vp, 10), normal(10, 4, seed=2)
    for kind in ("eps", "x0", "v", "score", "flow"):
        one, two = exact(x, t, prediction=kind), mixture(x, t, prediction=kind)
        assert torch.allclose(one, two, rtol=1e-7, atol=1e-7), kind
    assert torch.allclose(exact.data_mean, mixture.data_mean)  # type: ignore[arg-type]


def test_the_toys_are_the_documented_ones(vp: NoiseSchedule) -> None:
    """Two modes of each by hand: the wavy circle has radius 1.5 (1 + 0.15 cos 3a) at a = 0.1."""
    assert smooth(vp).weights.tolist() == pytest.approx([0.3, 0.25, 0.25, 0.2])
    assert smooth(vp).means[1].tolist() == [-0.75, 1.3]
    toy = sharp(vp)
    assert toy.weights.tolist() == pytest.approx([v / 10.5 for v in (1, 2, 1, 1.5, 1, 1, 2, 1)])
    radius = 1.5 * (1 + 0.15 * math.cos(0.3))
    assert toy.means[0].tolist() == pytest.approx([radius * math.cos(0.1), radius * math.sin(0.1)])
    assert set(toy.stds.tolist()) == {0.01}


def test_bad_models_are_refused(vp: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match=r"shapes \(K, D\), \(K\) and \(K\)"):
        GaussianMixture([[0.0], [1.0]], [1.0], [1.0], vp)
    with pytest.raises(ValueError, match="weights must be positive"):
        GaussianMixture([[0.0]], [1.0], [0.0], vp)
    with pytest.raises(ValueError, match="stds not negative"):
        GaussianMixture([[0.0]], [-1.0], [1.0], vp)
    with pytest.raises(ValueError, match=r"points must be floating"):
        DataSet(torch.zeros(3, 2, dtype=torch.int64), vp)
    with pytest.raises(ValueError, match=r"N >= 1"):
        DataSet(torch.zeros(0, 2), vp)


def test_an_exact_model_refuses_conditions_that_it_would_ignore() -> None:
    points = DataSet(torch.randn(5, 2).double(), fewstep.schedule("vp-linear"))
    for model in (fewstep.load("mixture-smooth"), points):
        with pytest.raises(ValueError, match="takes no conditions, got class_labels; leave"):
            fewstep.sample(model, 2, nfe=3, class_labels=[0, 1])


@pytest.mark.parametrize("t", [math.nan, -0.5, 0.0, 1.5])
def test_times_of_densities_and_draws_are_checked(t):
    model = smooth(fewstep.schedule("vp-linear"))
    for wrong in (lambda: model.log_prob(torch.zeros(1, 2), t), lambda: model.draw(3, t=t)):
        with pytest.raises(
            ValueError, match="t must be a time of 'vp-linear', above 0 and at most 1"
        ):
            wrong()

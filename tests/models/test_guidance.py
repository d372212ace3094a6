"""Guidance beyond one scale, and inpainting: against closed forms, diffusers' functions, and rules by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.models.exact import GaussianMixture
from fewstep.models.guidance import (
    Autoguidance,
    ClassifierGuidance,
    Inpainted,
    ProjectedGuidance,
    Reconstruction,
    ScheduledGuidance,
    cfg_plus_plus,
    per_step,
)
from fewstep.plans.execute import execute
from reference import normal

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

VP = fewstep.schedule("vp-linear")
SHAPE = (3, 2, 2)
MEANS = torch.tensor([1.5, -0.8, 0.1], dtype=torch.float64)  # of labels 0, 1 and of no label
CALLS: list[int] = []


def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
    """Perfect for N(mean of the label, 0.5^2), with a pattern, so that deviations are not all the same."""
    CALLS.append(len(x))
    pattern = torch.linspace(0.5, 1.5, 12, dtype=x.dtype).reshape(SHAPE)
    mean = MEANS.to(x)[class_labels].reshape(-1, 1, 1, 1) * pattern
    alpha, sigma = (f(t.double()).to(x).reshape(-1, 1, 1, 1) for f in (VP.alpha, VP.sigma))
    return sigma * (x - alpha * mean) / (alpha**2 * 0.25 + sigma**2)


MODEL = fewstep.Denoiser.wrap(
    network, schedule=VP, prediction="eps", event_shape=SHAPE, null_condition={"class_labels": 2}
)
X, LABELS = normal(4, *SHAPE, seed=1), torch.tensor([0, 1, 1, 0])


def predictions(t: float, kind: str) -> tuple[Tensor, Tensor]:
    labels = {"class_labels": LABELS}
    null = {"class_labels": torch.full((4,), 2)}
    return MODEL(X, t, prediction=kind, **labels), MODEL(X, t, prediction=kind, **null)


def test_a_constant_scale_is_guidance() -> None:
    one = ScheduledGuidance(MODEL, 3.0)(X, 0.4, class_labels=LABELS)
    two = fewstep.Guided(MODEL, 3.0)(X, 0.4, class_labels=LABELS)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_a_scale_that_depends_on_time_or_the_step() -> None:
    linear = ScheduledGuidance(MODEL, lambda t: 1 + 4 * t)
    conditional, null = predictions(0.25, "eps")
    expected = null + 2.0 * (conditional - null)
    got = linear(X, 0.25, class_labels=LABELS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grid = fewstep.grid("uniform", VP, 4)
    scale = per_step([1.0, 2.0, 3.0, 4.0], grid)
    times = torch.cat(
        [grid.times[:-1], grid.times[:-1].float().double(), (grid.times[:-1] + grid.times[1:]) / 2]
    )
    assert scale(times).tolist() == [1.0, 2.0, 3.0, 4.0] * 3
    with pytest.raises(ValueError, match="2 scales for a grid of 4 steps"):
        per_step([1.0, 2.0], grid)


def test_an_interval_runs_the_network_once_outside() -> None:
    guided = ScheduledGuidance(MODEL, 3.0, interval=(0.3, 5.0))
    for rho, inside in ((0.1, False), (1.0, True), (20.0, False)):
        t = float(VP.time(torch.tensor(rho, dtype=torch.float64).log().neg()))
        CALLS.clear()
        got = guided(X, t, class_labels=LABELS)
        assert CALLS == [8 if inside else 4]
        conditional, null = predictions(t, "eps")
        expected = null + 3 * (conditional - null) if inside else conditional
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.diffusers
def test_rescaling_is_that_of_diffusers() -> None:
    utils = pytest.importorskip("diffusers.guiders.guider_utils")
    conditional, null = predictions(0.5, "eps")
    guided = null + 6 * (conditional - null)
    expected = utils.rescale_noise_cfg(guided, conditional, 0.7)
    got = ScheduledGuidance(MODEL, 6.0, rescale=0.7)(X, 0.5, class_labels=LABELS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.diffusers
@pytest.mark.parametrize("options", [{}, {"eta": 0.3, "norm": 1.5}, {"eta": 1.0}, {"norm": 0.5}])
def test_projected_guidance_is_that_of_diffusers(options: dict[str, float]) -> None:
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    conditional, null = predictions(0.5, "x0")
    expected = theirs.normalized_guidance(
        conditional,
        null,
        4.0,  # they add the scale to the conditional prediction: w - 1
        None,
        options.get("eta", 0.0),
        options.get("norm", 0.0),
        use_original_formulation=True,
    )
    guided = ProjectedGuidance(MODEL, 5.0, **options)
    got = guided(X, 0.5, prediction="x0", class_labels=LABELS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.diffusers
def test_momentum_is_that_of_diffusers_and_ends_with_the_run() -> None:
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    guided = ProjectedGuidance(MODEL, 5.0, momentum=-0.5)
    for _ in range(2):  # the second run begins without the memory of the first
        buffer = theirs.MomentumBuffer(-0.5)
        for t in (0.9, 0.6, 0.2):
            pair = predictions(t, "x0")
            expected = theirs.normalized_guidance(
                *pair, 4.0, buffer, 0.0, 0.0, use_original_formulation=True
            )
            got = guided(X, t, prediction="x0", class_labels=LABELS)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_cfg_plus_plus_guides_the_data_and_not_the_noise() -> None:
    """The rule by hand: x_s = alpha_s (D0 + 0.6 (D - D0)) + sigma_s eps0."""
    grid = fewstep.grid("uniform", VP, 5, to_zero=True)
    guided = ScheduledGuidance(MODEL, cfg_plus_plus(0.6, grid))
    noise = normal(4, *SHAPE, seed=2)
    got = fewstep.sample(guided, noise=noise, solver="ddim", grid=grid, class_labels=LABELS)
    x = float(grid.sigma[0]) * noise
    for i in range(5):
        t = float(grid.times[i])
        data, data0 = (
            MODEL(x, t, prediction="x0", class_labels=labels)
            for labels in (LABELS, torch.full((4,), 2))
        )
        eps0 = MODEL(x, t, class_labels=torch.full((4,), 2))
        x = grid.alpha[i + 1] * (data0 + 0.6 * (data - data0)) + grid.sigma[i + 1] * eps0
    torch.testing.assert_close(got, x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="between 0 and 1, got 7"):
        cfg_plus_plus(7, grid)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_autoguidance_contrasts_two_models(kind: str) -> None:
    inner = GaussianMixture([[1.0, -0.5]], [0.5], [1.0], VP)
    worse = GaussianMixture([[0.4, 0.3]], [0.9], [1.0], VP)
    guide = fewstep.Denoiser.wrap(
        lambda x, t: worse(x, t, prediction=kind), schedule=VP, prediction=kind, event_shape=(2,)
    )
    x = normal(3, 2)
    got = Autoguidance(inner, guide, 2.0)(x, 0.4)
    expected = worse(x, 0.4) + 2 * (inner(x, 0.4) - worse(x, 0.4))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    other = GaussianMixture([[1.0, -0.5]], [0.5], [1.0], fewstep.schedule("flow"))
    with pytest.raises(
        ValueError, match="the guide has the schedule 'flow', the model 'vp-linear'"
    ):
        Autoguidance(inner, other, 2.0)


def test_classifier_guidance_samples_the_posterior() -> None:
    """Data N(0.5, 0.8^2) and a label y = x0 + 0.6 z: the posterior is Gaussian, in closed form."""
    mean, std, noise, y = 0.5, 0.8, 0.6, 1.4
    inner = GaussianMixture([[mean, mean]], [std], [1.0], VP)

    def log_prob(x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        alpha, sigma = (f(t.double())[:, None] for f in (VP.alpha, VP.sigma))
        variance = alpha**2 * std**2 + sigma**2
        data = mean + alpha * std**2 / variance * (x - alpha * mean)
        spread = sigma**2 * std**2 / variance + noise**2
        return (-((target[:, None] - data) ** 2) / (2 * spread)).sum(1)

    guided = ClassifierGuidance(inner, log_prob, names=["target"])
    gain = std**2 / (std**2 + noise**2)
    exact = GaussianMixture(
        [[mean + gain * (y - mean)] * 2], [std * math.sqrt(1 - gain)], [1.0], VP
    )
    x = normal(4, 2, seed=3)
    target = torch.full((4,), y, dtype=torch.float64)
    for t in (0.9, 0.4, 0.05):
        got = guided(x, t, target=target)
        torch.testing.assert_close(got, exact(x, t), rtol=0, atol=1e-10)
    one = fewstep.sample(guided, noise=x, nfe=6, solver="tab2", target=target)
    torch.testing.assert_close(one, fewstep.sample(exact, noise=x, nfe=6, solver="tab2"))
    with pytest.raises(ValueError, match="one number for each sample"):
        ClassifierGuidance(inner, lambda x, t: x)(x, 0.5)


@pytest.mark.parametrize("solver", ["ddim", "unipc3", "dpmpp-2m-sde", "heun", "res-3s"])
def test_inpainting_is_exact_on_a_gaussian(solver: str) -> None:
    """Independent coordinates: the rest is as without a mask, the image is met, its noise is a standard normal."""
    model = GaussianMixture([[0.3, -0.6, 0.9, 0.0]], [0.5], [1.0], VP)
    image = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 0])
    noise = normal(50, 4, seed=4)
    grid = fewstep.grid("uniform", VP, 8, to_zero=True)
    options = {"solver": solver, "grid": grid, "noise": noise}
    masked = fewstep.sample(Inpainted(model, image, mask), **options)
    free = fewstep.sample(model, **options)
    new, old = mask.bool(), ~mask.bool()
    torch.testing.assert_close(masked[:, new], free[:, new], rtol=0, atol=1e-9)
    met = image[old].expand(50, -1)
    torch.testing.assert_close(masked[:, old], met, rtol=0, atol=1e-9)
    above = fewstep.grid("uniform", VP, 8, t_end=0.2)
    states = fewstep.sample(
        Inpainted(model, image, mask), solver=solver, grid=above, noise=normal(4000, 4, seed=5)
    )
    residual = (states[:, old] - above.alpha[-1] * image[old]) / above.sigma[-1]
    assert abs(float(residual.var()) - 1) < 5 * (2 / 8000) ** 0.5
    assert abs(float(residual.mean())) < 5 / 8000**0.5 + 0.02


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ScheduledGuidance(GaussianMixture([[0.0]], [1.0], [1.0], VP), 2.0), "null condition"),
        (lambda: ScheduledGuidance(MODEL, "2"), "finite number or a function"),
        (lambda: ScheduledGuidance(MODEL, 2.0, interval=(5.0, 1.0)), "a lower and a higher noise level"),
        (lambda: ScheduledGuidance(MODEL, 2.0, rescale=2), "rescale must be between 0 and 1"),
        (lambda: ProjectedGuidance(MODEL, 2.0, norm=0), "norm must be positive"),
        (lambda: Autoguidance(MODEL, network, 2.0), "guide must be a Denoiser"),
        (lambda: ClassifierGuidance(MODEL, 3), "log_prob must be callable"),
        (lambda: Inpainted(MODEL, X[0], X[0]), "mask must be between 0 and 1"),
        (lambda: Inpainted(MODEL, X[0], torch.ones(5)), r"mask must broadcast to a sample, \(3, 2, 2\)"),
        (lambda: Inpainted(MODEL, X[0][0], torch.ones(1)), "image must have shape"),
        (lambda: Inpainted(MODEL, X[:2], torch.ones(1))(X, 0.5, class_labels=LABELS), "set batch_size=2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(make: Any, reason: str) -> None:
    with pytest.raises((ValueError, TypeError), match=reason):
        make()


def test_settings_are_part_of_the_fingerprint() -> None:
    fingerprints = [
        MODEL,
        ScheduledGuidance(MODEL, 2.0),
        ScheduledGuidance(MODEL, lambda t: 2 * t),
        ScheduledGuidance(MODEL, 2.0, rescale=0.5),
        ProjectedGuidance(MODEL, 2.0),
        ProjectedGuidance(MODEL, 2.0, norm=3.0),
        Autoguidance(MODEL, MODEL, 2.0),
        Inpainted(MODEL, X[0], torch.zeros(1)),
        Inpainted(MODEL, X[1], torch.zeros(1)),
    ]
    assert len({model.fingerprint() for model in fingerprints}) == len(fingerprints)
    assert ScheduledGuidance(MODEL, 2.0).fingerprint() == fingerprints[1].fingerprint()


@pytest.mark.parametrize(
    ("solver", "options", "kind", "steps", "follows"),
    [
        ("ddim", {}, "uniform", 100, 0.43),
        ("ddim", {"eta": 1.0}, "uniform", 100, 0.62),
        ("repaint", {"passes": 5}, "log-rho", 50, 0.905),
        ("repaint", {"passes": 20}, "log-rho", 50, 0.97),
    ],
)
def test_on_correlated_data_the_rest_follows_the_image_as_documented(
    solver: str, options: dict[str, float], kind: str, steps: int, follows: float
) -> None:
    """Two coordinates of correlation 0.8, one known to be k: the mean of the other should be 0.8 k, its variance 0.36."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)

    def linear(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = VP.alpha(t[0]), VP.sigma(t[0])
        total = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return sigma * torch.linalg.solve(total, x.T).T

    inner = fewstep.Denoiser.wrap(linear, schedule=VP, prediction="eps", event_shape=(2,))
    image = torch.tensor([0.0, 1.5], dtype=torch.float64)
    masked = Inpainted(inner, image, torch.tensor([1, 0]))
    grid = fewstep.grid(kind, VP, steps, to_zero=True)
    plan = fewstep.plan(solver, VP, grid=grid, **options)
    generator = torch.Generator().manual_seed(6)

    def draw(index: int) -> Tensor:
        del index
        return torch.randn(4000, 2, generator=generator, dtype=torch.float64)

    start = float(grid.sigma[0]) * draw(0)
    samples = execute(plan, lambda x, t: masked(x, t, prediction="eps"), start, draw=draw)
    # 5 standard errors of 4000 draws of a deviation of at most 0.8, as a share of 1.2.
    assert float(samples[:, 0].mean()) / 1.2 == pytest.approx(follows, abs=0.055)
    if options.get("passes") == 20:
        assert float(samples[:, 0].var()) == pytest.approx(0.31, abs=5 * 0.31 * (2 / 4000) ** 0.5)


@pytest.mark.parametrize("noise", [0.3, 0.05])
def test_reconstruction_samples_the_posterior_of_gaussian_data(noise: float) -> None:
    """Three independent coordinates, the mean of two times sqrt 2 measured: score and samples in closed form."""
    mean, std, y = torch.tensor([0.5, -0.2, 0.9], dtype=torch.float64), 0.8, 1.4
    row = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    inner = GaussianMixture([mean.tolist()], [std], [1.0], VP)
    guided = Reconstruction(
        inner,
        lambda x: x @ row.to(x)[:, None],
        torch.tensor([y], dtype=torch.float64),
        noise=noise,
        data_std=std,
    )
    gain = std**2 / (std**2 + noise**2)
    centre = mean + gain * (y - mean @ row) * row
    covariance = std**2 * (torch.eye(3, dtype=torch.float64) - gain * torch.outer(row, row))
    x = normal(4, 3, seed=8)
    for t in (0.9, 0.4, 0.05):
        alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (VP.alpha, VP.sigma))
        total = alpha**2 * covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
        expected = sigma * torch.linalg.solve(total, (x - alpha * centre).T).T
        torch.testing.assert_close(guided(x, t), expected, rtol=0, atol=1e-9)
    if noise < 0.1:
        return  # the law of a sharp measurement needs more steps
    samples = fewstep.sample(
        guided, noise=normal(2000, 3, seed=9), solver="unipc2", nfe=20, batch_size=2000
    )
    spread = (std**2 * (1 - gain)) ** 0.5
    along = samples @ row
    assert float(along.mean()) == pytest.approx(
        float(centre @ row), abs=5 * spread / 2000**0.5 + 0.01
    )
    assert float(along.std()) == pytest.approx((spread**2 + 1e-4) ** 0.5, rel=0.15)
    with pytest.raises(ValueError, match="which y of shape"):
        Reconstruction(inner, lambda x: x, torch.ones(5))(x, 0.5)

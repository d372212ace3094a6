"""Data to noise and back: in closed form on a Gaussian, and the round trip of each solver, measured."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.models.exact import GaussianMixture, smooth
from reference import normal, rms, schedule_of

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

VP = fewstep.schedule("vp-linear")


@pytest.mark.parametrize("where", ["vp-linear", "edm", "flow", "ddpm-linear", "ve"])
def test_the_noise_of_gaussian_data_is_in_closed_form(where: str) -> None:
    """The ODE maps quantiles to quantiles: x = alpha m + sqrt(alpha^2 s^2 + sigma^2) q at each time."""
    schedule = schedule_of(where)
    model = GaussianMixture([[0.4, -0.3]], [0.6], [1.0], schedule)
    times = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    mean, spread = torch.tensor([0.4, -0.3]).double(), (alpha**2 * 0.36 + sigma**2).sqrt()
    q = normal(5, 2, seed=1)
    x = alpha[0] * mean + spread[0] * q
    expected = (alpha[1] * mean + spread[1] * q) / sigma[1]
    got = fewstep.invert(model, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "nfe", "error"),
    [("dopri5", None, 1e-4), ("unipc3", 10, 0.1), ("tab3", 10, 0.05), ("ddim", 10, 0.3)],
)
def test_the_round_trip_of_each_solver(solver: str, nfe: int | None, error: float) -> None:
    """Root mean square, for data of about unit size; that of few steps is the solver's own error."""
    model = smooth(VP)
    x = model.draw(64, t=VP.t_min, seed=2)
    noise = fewstep.invert(model, x, rtol=1e-6, atol=1e-6)
    back = fewstep.sample(model, noise=noise, solver=solver, nfe=nfe)
    assert rms(back - x) < error
    parts = fewstep.invert(model, x, batch_size=7, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts, noise, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_said() -> None:
    model = smooth(VP)
    with pytest.raises(TypeError, match="x must be"):
        fewstep.invert(model, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rtol and atol cannot both be 0"):
        fewstep.invert(model, normal(2, 2), rtol=0, atol=0)


Pair = tuple[GaussianMixture, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def inverted() -> Pair:
    """A model, data, and the noise that the data come from."""
    model = smooth(VP)
    x = model.draw(64, t=VP.t_min, seed=2)
    return model, x, fewstep.invert(model, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "solver",
    [
        name
        for name, build in fewstep.SOLVERS.items()
        if not (build().adaptive or build().stochastic or name == "multistep")
    ],
)
def test_every_deterministic_solver_comes_back_to_the_data(solver: str, inverted: Pair) -> None:
    """Four times the steps leave at most 1 / 1.5 of the error: it is the solver's, not the inversion's."""
    model, x, noise = inverted
    few, many = (
        float(rms(fewstep.sample(model, noise=noise, solver=solver, steps=k) - x))
        for k in (12, 48)
    )
    assert many < 0.3
    assert many < few / 1.5

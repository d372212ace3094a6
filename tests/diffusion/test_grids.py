"""Time grids: where the points lie, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep
from fewstep.diffusion.grids import MOST_STEPS, TimeGrid
from fewstep.diffusion.schedules import NoiseSchedule

VP = fewstep.schedule("vp-linear")
DDPM = fewstep.schedule("ddpm-linear")


def coordinate(name, grid):
    """The coordinate in which the grid of that name is even, from the formula in its docstring."""
    return {
        "uniform": grid.times,
        "quadratic": grid.times.sqrt(),
        "power": grid.times ** (1 / 3),
        "log-rho": grid.rho.log(),
        "lambda": grid.lam,
        "karras": grid.rho ** (1 / 7),
    }[name]


@pytest.mark.parametrize("schedule", list(fewstep.SCHEDULES))
@pytest.mark.parametrize("name", ["uniform", "quadratic", "power", "log-rho", "lambda", "karras"])
def test_even_in_its_coordinate(name, schedule):
    options = {"alphas_cumprod": [0.99, 0.9, 0.5, 0.1]} if schedule == "tabulated" else {}
    on = fewstep.schedule(schedule, **options)
    grid = fewstep.grid(name, on, 7, **({"power": 3.0} if name == "power" else {}))
    assert grid.steps == 7
    assert (grid.times[0], grid.times[-1]) == (on.t_max, on.t_min)
    gaps = coordinate(name, grid).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(7), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["uniform", "log-rho", "karras"])
def test_to_zero_takes_one_of_the_steps(name):
    grid = fewstep.grid(name, VP, 5, to_zero=True)
    assert (grid.steps, grid.ends_at_zero) == (5, True)
    assert [grid.is_last_zero(i) for i in range(5)] == [False] * 4 + [True]
    assert (grid.times[-2], grid.times[-1]) == (VP.t_min, VP.t_zero)
    assert (grid.alpha[-1], grid.sigma[-1], grid.rho[-1]) == (1.0, 0.0, 0.0)
    assert math.isinf(grid.lam[-1])
    assert bool(grid.lam[:-1].isfinite().all())


def test_explicit_keeps_gradients_and_the_last_zero():
    times = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    grid = fewstep.grid("explicit", VP, None, times=times)
    assert grid.ends_at_zero
    (gradient,) = torch.autograd.grad(grid.alpha.sum(), times)
    assert bool((gradient[:2] != 0).all())
    assert gradient[2] == 0
    with pytest.raises(ValueError, match="3 times are 2 steps, not 4"):
        fewstep.grid("explicit", VP, 4, times=times)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5", None, MOST_STEPS + 1, 10**12])
def test_steps_are_positive_integers(steps):
    with pytest.raises(ValueError, match="steps"):
        fewstep.grid("uniform", VP, steps)


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([0.5, 0.9], r"decrease strictly, got t\[0\] = 0.5 and t\[1\] = 0.9"),
        ([0.5, 0.5], "decrease strictly"),
        ([0.5, math.nan], "decrease strictly"),
        ([1.5, 0.5], r"t\[0\] = 1.5 is outside"),
        ([math.inf, 0.5], "outside"),
        ([0.5, -0.1], "outside"),
        ([0.5], "at least 2 times"),
        ([], "list of numbers"),
        ([[0.9, 0.5]], "list of numbers"),
        (["a", "b"], "list of numbers"),
        ({"a": 1}, "list of numbers"),
    ],
)
def test_times_out_of_order_or_range(times, reason):
    with pytest.raises(ValueError, match=reason):
        fewstep.grid("explicit", VP, None, times=times)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"t_start": 1.5}, "t_start must be in"),
        ({"t_start": math.nan}, "t_start must be in"),
        ({"t_end": 2.0}, "t_end must be between"),
        ({"t_start": 0.4, "t_end": 0.5}, "t_end must be between"),
        ({"t_end": -1.0}, "t_end must be between"),
        ({"power": 0.0}, "power must be positive"),
        ({"power": math.nan}, "power must be positive"),
    ],
)
def test_ends_and_powers_out_of_range(options, reason):
    with pytest.raises(ValueError, match=reason):
        fewstep.grid("power", VP, 5, **options)


def test_unknown_grid_and_option():
    with pytest.raises(ValueError, match=r"Unknown grid 'karas'. Did you mean 'karras'"):
        fewstep.grid("karas", VP, 5)
    with pytest.raises(TypeError, match=r"'uniform'.*rho"):
        fewstep.grid("uniform", VP, 5, rho=7)


def test_rounding_to_trained_levels():
    grid = fewstep.grid("uniform", DDPM, 10)
    rounded = grid.rounded()
    assert torch.equal(rounded.times, rounded.times.round())
    assert float((rounded.times - grid.times).abs().max()) <= 0.5
    assert fewstep.grid("uniform", VP, 10).rounded().times[3] == pytest.approx(0.7003)


def test_rounding_refuses_duplicates():
    with pytest.raises(ValueError, match="1000 training timesteps; use fewer steps"):
        fewstep.grid("uniform", DDPM, 1500).rounded()


def test_the_type_of_times_is_float64():
    with pytest.raises(TypeError, match=r"float64, got torch.float32"):
        TimeGrid(VP, torch.tensor([0.9, 0.1]))


def test_exponential_is_the_name_of_others_for_even_steps_in_log_rho(vp: NoiseSchedule) -> None:
    """k-diffusion: exp(linspace(log sigma_max, log sigma_min, n))."""
    grid = fewstep.grid("exponential", vp, 7)
    ends = grid.rho[[0, -1]].log()
    expected = torch.linspace(float(ends[0]), float(ends[1]), 8, dtype=torch.float64).exp()
    assert torch.allclose(grid.rho, expected, rtol=1e-12)


def test_grids_of_numbers_are_the_same_grids(vp: NoiseSchedule) -> None:
    grid = fewstep.grid("quadratic", vp, 5, to_zero=True)
    numbers = grid.numeric()
    assert isinstance(numbers.alpha[1], float)
    for name in ("times", "alpha", "sigma", "lam", "rho"):
        assert torch.equal(getattr(numbers, name) + 0, getattr(grid, name))
    assert numbers.is_last_zero(4)
    learned = fewstep.grid("explicit", vp, None, times=grid.times[:-1].clone().requires_grad_())
    assert learned.numeric() is learned

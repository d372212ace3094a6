"""Numbers that stand for tensors: the same results, and the tensor where there is no shortcut."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.diffusion.scalars import FUNCTIONS, Scalar, column, vector
from fewstep.diffusion.schedules import NoiseSchedule
from reference import SCHEDULE_NAMES, schedule_of

VALUES = (-800.0, -2.5, -0.3, 0.0, 1e-9, 0.7, 3.0, 800.0, math.inf)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_agree_with_those_of_tensors(function) -> None:
    values = VALUES[:-1] if function in (torch.sin, torch.cos) else VALUES
    for value in values:
        expected = float(function(torch.tensor(value, dtype=torch.float64)))
        got = function(Scalar(value))
        assert isinstance(got, Scalar)
        assert got == pytest.approx(expected, rel=1e-14, nan_ok=True), value


def test_arithmetic_stays_a_number_and_divides_by_zero_as_tensors_do() -> None:
    a, b = Scalar(3.0), Scalar(-2.0)
    for value in (a + b, 1 + a, a - b, 1 - a, a * 2, 2.0 * a, a / b, 1 / a, -a, abs(b), a**2):
        assert isinstance(value, Scalar)
    assert (1 / Scalar(0.0), -1 / Scalar(0.0)) == (math.inf, -math.inf)
    assert math.isnan(Scalar(0.0) / Scalar(0.0))
    assert b.clamp(min=0) == 0
    assert a.clamp(0, 1) == 1


def test_what_has_no_shortcut_is_answered_by_the_tensor() -> None:
    a = Scalar(0.5)
    assert torch.equal(torch.stack([a, a]), torch.full((2,), 0.5, dtype=torch.float64))
    assert a.erf() == torch.tensor(0.5, dtype=torch.float64).erf()
    assert torch.equal(a * torch.ones(2), torch.full((2,), 0.5))
    assert torch.equal(vector([a, torch.tensor(1.0)]), torch.tensor([0.5, 1.0]).double())


@pytest.mark.parametrize("where", SCHEDULE_NAMES)
def test_schedules_take_numbers(where: str) -> None:
    noise: NoiseSchedule = schedule_of(where)
    times = torch.linspace(noise.t_min, noise.t_max, 5, dtype=torch.float64)[1:]
    for name in ("alpha", "sigma", "lam", "rho"):
        expected = getattr(noise, name)(times)
        for t, value in zip(column(times).tolist(), expected.tolist(), strict=True):
            assert float(getattr(noise, name)(Scalar(t))) == pytest.approx(value, rel=1e-12)
    lam = noise.lam(times)
    for value, t in zip(lam.tolist(), times.tolist(), strict=True):
        assert float(noise.time(Scalar(value))) == pytest.approx(t, rel=1e-9)

"""The power spectrum of trajectories over time, against closed forms and scipy."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.studies import time_spectrum
from fewstep.studies.spline import spline_matrix


def even(size):
    return torch.linspace(1, 0, size, dtype=torch.float64)


def some(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [16, 17])
def test_energies_are_those_of_scipy(size):
    from scipy.fft import dct, rfft

    states = some((3, size, 2, 5)).cumsum(1)
    found = time_spectrum(states, even(size))
    one = abs(rfft(states.numpy(), axis=1)) ** 2
    one[:, 1 : (size + 1) // 2] *= 2
    raw = torch.from_numpy(one).sum((0, 2, 3))
    two = torch.from_numpy(dct(states.numpy(), type=2, norm="ortho", axis=1)).square()
    assert torch.allclose(found.dft.energy, raw / raw.sum(), atol=1e-12)
    assert torch.allclose(found.dct.energy, two.sum((0, 2, 3)) / two.sum(), atol=1e-12)
    assert not found.resampled


def test_a_cosine_is_one_mode_of_each_basis():
    n = torch.arange(64, dtype=torch.float64)
    periodic = torch.cos(2 * math.pi * 3 * n / 64)[None, :, None]
    half = torch.cos(math.pi * 5 * (n + 0.5) / 64)[None, :, None]
    first, second = time_spectrum(periodic, even(64)), time_spectrum(half, even(64))
    assert float(first.dft.energy[3]) == pytest.approx(1)
    assert first.dft.modes == first.dft.modes_99 == 4
    assert float(second.dct.energy[5]) == pytest.approx(1)
    assert second.dct.modes == 6
    assert second.dct.frames >= 12
    assert second.dft.modes > 10  # it is not periodic, so the plain transform smears it


def test_white_noise_is_spread_evenly():
    found = time_spectrum(some((400, 32, 4)), even(32))
    # 1 / 32 for each real function, hence 2 / 32 for a mode of cosine and sine.
    assert torch.allclose(found.dct.energy, torch.full((32,), 1 / 32).double(), atol=0.004)
    assert torch.allclose(found.dft.energy[1:16], torch.full((15,), 1 / 16).double(), atol=0.006)
    assert found.spline_frames is None


def test_the_jump_of_the_plain_transform_decays_as_one_over_k_squared():
    found = time_spectrum(even(512)[None, :, None], even(512))
    ratio = float(found.dft.energy[4] / found.dft.energy[8])
    assert ratio == pytest.approx(4, rel=0.01)
    assert float(found.dct.energy[1] / found.dct.energy[3]) == pytest.approx(81, rel=0.01)


def test_quarter_waves_are_the_schedule_basis(vp):
    times = torch.linspace(1, 1e-3, 129, dtype=torch.float64)
    a, b = some((20, 1, 6), 1), some((20, 1, 6), 2)
    alpha, sigma = (f(times)[None, :, None] for f in (vp.alpha, vp.sigma))
    found = time_spectrum(alpha * a + sigma * b, times, schedule=vp)
    assert found.schedule_residual is not None
    assert found.schedule_residual < 1e-13
    assert time_spectrum(alpha * a + sigma * b, times).schedule_residual is None
    other = time_spectrum(some((20, 129, 6)), times, schedule=vp)
    # Two of 129 directions fit; the rest of white noise is left.
    assert other.schedule_residual == pytest.approx(127 / 129, abs=0.01)


def test_the_spline_of_few_frames():
    times = even(97)
    cubic = (2 * times**3 - times)[None, :, None].expand(2, -1, 3)
    found = time_spectrum(cubic, times)
    assert found.spline[3] < 1e-13  # a not-a-knot spline reproduces cubics from four states on
    assert found.spline[1] > 1e-3
    wave = torch.sin(9 * times)[None, :, None]
    several = time_spectrum(wave, times)
    assert several.spline_frames == next(m for m, e in several.spline.items() if e <= 1e-3)
    assert (
        several.spline[8] / several.spline[16] > 2**6
    )  # fourth order in amplitude, eighth in energy


def test_uneven_states_are_put_in_even_places():
    uneven = even(200).square()
    states = torch.cos(3 * uneven)[None, :, None]
    straight = torch.cos(3 * even(200))[None, :, None]
    found, expected = time_spectrum(states, uneven), time_spectrum(straight, even(200))
    assert found.resampled
    assert torch.allclose(found.dct.energy, expected.dct.energy, atol=1e-6)
    root = time_spectrum(states, uneven, variable="sqrt")
    assert not root.resampled
    assert root.variable == "sqrt"


def test_chunks_change_nothing():
    states = some((70, 16, 3))
    whole = time_spectrum(states, even(16))
    flat = time_spectrum(states.transpose(1, 2).reshape(1, 210, 16).transpose(1, 2), even(16))
    assert torch.allclose(whole.dct.energy, flat.dct.energy, atol=1e-12)
    assert set(whole.to_record()) >= {"dft", "dct", "spline", "spline_frames", "variable"}


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
def test_the_spline_is_that_of_scipy(n):
    from scipy.interpolate import CubicSpline

    knots = some((n,), 3).abs().cumsum(0)
    values = some((n,), 4)
    points = torch.linspace(float(knots[0]), float(knots[-1]), 23, dtype=torch.float64)
    expected = torch.from_numpy(CubicSpline(knots.numpy(), values.numpy())(points.numpy()))
    assert torch.allclose(spline_matrix(knots, points) @ values, expected, atol=1e-9)
    flipped = spline_matrix(knots.flip(0), points) @ values.flip(0)
    assert torch.allclose(flipped, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("states", "times", "options", "message"),
    [
        (torch.ones(2, 5, 1), even(4), {}, "shape"),
        (torch.ones(2, 5), even(5), {}, "shape"),
        (torch.ones(2, 3, 1), even(3), {}, "at least 4"),
        (torch.zeros(2, 5, 1), even(5), {}, "no spectrum"),
        (torch.ones(2, 5, 1), even(5), {"variable": "log"}, "'sqrt'"),
        (torch.ones(2, 5, 1), torch.tensor([1, 0.5, 0.7, 0.2, 0]), {}, "strictly"),
    ],
)
def test_what_has_no_spectrum(states, times, options, message):
    with pytest.raises(ValueError, match=message):
        time_spectrum(states, times, **options)

"""Draws of one Brownian motion: independent increments, and the same path at any number of steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fewstep
from fewstep.diffusion.brownian import BrownianSource
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models.exact import smooth
from fewstep.plans.intervals import draw_intervals
from fewstep.solvers import SOLVERS
from reference import lam_grid, normal, rms, schedule_of

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

STOCHASTIC = [n for n, b in SOLVERS.items() if not b().adaptive and b().stochastic]


def test_increments_are_independent_standard_normals():
    edges = [-3.0, -2.5, -1.0, -0.999, 0.7, 4.0]
    intervals = list(itertools.pairwise(edges))
    source = BrownianSource(3, [0], intervals)
    draws = torch.stack([source.draw(k, (20_000,))[0] for k in range(5)]).double()
    covariance = draws @ draws.T / draws.shape[1]
    # 5 standard errors of a covariance of unit normals, sqrt(2 / n) on the diagonal.
    assert float((covariance - torch.eye(5)).abs().max()) < 5 * math.sqrt(2 / 20_000)


def test_coarse_increments_are_sums_of_fine_ones():
    edges = [-2.0, -1.3, 0.1, 1.0]
    fine = BrownianSource(1, [4, 9], list(itertools.pairwise(edges)))
    coarse = BrownianSource(1, [4, 9], [(edges[0], edges[-1])])
    widths = [b - a for a, b in itertools.pairwise(edges)]
    total = sum(w**0.5 * fine.draw(k, (5,)) for k, w in enumerate(widths)) / sum(widths) ** 0.5
    # The ends are rounded to the lattice of the path, 8e-6 apart.
    torch.testing.assert_close(coarse.draw(0, (5,)), total, rtol=0, atol=2e-3)


def test_a_sample_depends_on_its_number_alone():
    both = BrownianSource(7, [0, 1], [(-1.0, 0.5)]).draw(0, (3,))
    one = BrownianSource(7, [1], [(-1.0, 0.5)]).draw(0, (3,))
    assert torch.equal(both[1:], one)
    numbered = NoiseSource(7, [1])
    assert torch.equal(
        BrownianSource(7, [1], []).draw(INITIAL, (3,)), numbered.draw(INITIAL, (3,))
    )
    for interval in (None, (0.5, 0.5 + 1e-9)):
        source = BrownianSource(7, [1], [interval])
        assert torch.equal(source.draw(0, (3,)), numbered.draw(0, (3,)))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_draws_of_every_solver_have_disjoint_intervals(name: str):
    for to_zero in (False, True):
        grid = fewstep.grid("karras", schedule_of("edm"), 4, to_zero=to_zero)
        plan = SOLVERS[name]().plan(grid)
        intervals = draw_intervals(plan)
        assert len(intervals) == plan.n_noise
        given = [i for i in intervals if i is not None]
        assert all(a < b and math.isfinite(b) for a, b in given)
        assert all(one[1] <= two[0] for one, two in itertools.pairwise(given))
        if name not in ("edm-stochastic", "accelerated-ddpm", "repaint", "langevin-corrected"):
            assert None not in intervals


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m-sde", "dpmpp-sde"])
def test_samples_of_one_path_converge(name: str):
    """Strong convergence: halving the steps halves the change of each sample, of numbered draws not."""
    noise = schedule_of("vp-linear")
    exact, start = smooth(noise), normal(6, 2)
    options = {"eta": 1.0} if name == "ddim" else {}

    def changes(brownian: bool) -> float:
        runs = [
            fewstep.sample(
                exact,
                noise=start,
                plan=SOLVERS[name](**options).plan(lam_grid(noise, k, -1.2, 0.2)),
                brownian=brownian,
            )
            for k in (6, 12, 48, 96)
        ]
        return rms(runs[3] - runs[2]) / rms(runs[1] - runs[0])

    assert changes(True) < 0.45  # 1 / 8 at order 1, 1 / sqrt 8 = 0.35 at order 1 / 2
    assert changes(False) > 0.7

"""Normal draws: addressed by (seed, sample, draw) and by nothing else."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.noise import INITIAL, NoiseSource


def test_a_sample_does_not_know_its_batch():
    whole = NoiseSource(5, range(8)).draw(2, (3, 4))
    for rows in ([0], [7], [3, 1], range(4, 8)):
        assert torch.equal(NoiseSource(5, rows).draw(2, (3, 4)), whole[list(rows)])


def test_every_address_is_another_draw():
    drawn = [
        NoiseSource(seed, [sample]).draw(index, (16,))
        for seed in (0, 1, -1, 2**70)
        for sample in (0, 1)
        for index in (INITIAL, 0, 1)
    ]
    distances = torch.pdist(torch.cat(drawn))
    assert float(distances.min()) > 1.0


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    NoiseSource(0, range(4)).draw(0, (5,))
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_standard_normal():
    """100 000 draws: the mean and the variance within four standard errors."""
    z = NoiseSource(0, range(10)).draw(0, (10_000,)).double()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5


def test_types_and_devices_share_the_numbers():
    source = NoiseSource(0, range(3))
    single = source.draw(0, (7,))
    double = source.draw(0, (7,), dtype=torch.float64, device=torch.device("cpu"))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(single.double(), double)
    assert source.draw(0, (7,), device="meta").shape == (3, 7)


def test_scalar_events():
    drawn = NoiseSource(0, range(3)).draw(0, ())
    assert drawn.shape == (3,)
    assert len(set(drawn.tolist())) == 3


@pytest.mark.parametrize("seed", [0.0, "0", True, None])
def test_seeds_are_integers(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        NoiseSource(seed, range(2))

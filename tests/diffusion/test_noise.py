"""Normal draws: addressed by (seed, sample, draw) and by nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fewstep.diffusion import noise
from fewstep.diffusion.noise import INITIAL, NoiseSource
from forks import FORKS, in_fork


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


@pytest.mark.filterwarnings(FORKS)
def test_the_same_in_another_process():
    here = NoiseSource(3, [4]).draw(1, (5,))

    def there() -> None:
        from fewstep.diffusion.noise import NoiseSource

        torch.manual_seed(99)
        assert torch.equal(NoiseSource(3, [4]).draw(1, (5,)), here)

    in_fork(there)


@pytest.mark.parametrize("seed", [0.0, "0", True, None])
def test_seeds_are_integers(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        NoiseSource(seed, range(2))


@pytest.mark.parametrize(
    ("seed", "samples", "index", "shape", "dtype", "digest"),
    [
        (0, range(4), INITIAL, (3, 8, 8), torch.float32, "458896541fb2dc4c"),
        (5, [7, 1, 2**40], 2, (16,), torch.float32, "404ba475bcb4a17e"),
        (-1, range(3), 0, (5,), torch.float32, "5713b1271bd433bf"),
        (2**70, range(2), 1, (), torch.float64, "8c75b1812ddc35eb"),
        (0, range(3), 1, (4100,), torch.float16, "a4aab0d4cc5ef316"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_the_numbers_of_a_seed_are_a_promise(
    monkeypatch, ahead, seed, samples, index, shape, dtype, digest
):
    """Digests of the draws of version 0.1, also of draws that threads made ahead."""
    monkeypatch.setattr(noise, "WORTHWHILE", 0.0)
    monkeypatch.setattr(noise, "spare_cores", lambda: 3)
    source = NoiseSource(seed, samples)
    if ahead:
        source.prepare(index, shape)
    drawn = source.draw(index, shape, dtype=dtype)
    data = drawn.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_small_draws_and_busy_cores_take_no_thread(monkeypatch):
    monkeypatch.setattr(noise, "threads", lambda: pytest.fail("a thread was asked for"))
    NoiseSource(0, range(8)).prepare(0, (4,))
    monkeypatch.setattr(noise, "spare_cores", lambda: 0)
    NoiseSource(0, range(64)).prepare(0, (4096,))

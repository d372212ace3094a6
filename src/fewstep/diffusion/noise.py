"""Normal draws addressed by (seed, sample, draw): the same on any device, batch split or restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL = -1
"""The index of the initial draw; the draws of a stochastic sampler are 0, 1, 2, ..."""


class NoiseSource:
    r"""Standard normal draws for a batch of samples.

    Each sample of each draw has a generator of its own on the CPU, seeded by a hash of its
    address, so that nothing depends on the other samples of the batch.

    Arguments:
        seed: The seed of the run.
        samples: The numbers of the samples in this batch.
    """

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.seed = seed
        self.samples = list(samples)

    def draw(
        self,
        index: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        r"""Returns the draw of that index, with shape (B, \*), in float32 precision.

        Arguments:
            index: Which draw of the run.
            shape: The shape of one sample.
            dtype: The type of the result; the numbers are the same in any.
            device: The device of the result.
        """
        batch = torch.empty((len(self.samples), *shape), dtype=torch.float32)
        for row, sample in enumerate(self.samples):
            generator = generator_at(self.seed, sample, index)
            torch.randn(tuple(shape), generator=generator, out=batch[row])
        return batch.to(device=device, dtype=dtype)


def generator_at(*address: int | str) -> torch.Generator:
    """Returns a generator on the CPU that depends on the address alone."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

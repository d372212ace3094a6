r"""Brownian motion over :math:`\lambda`: the noise of an SDE, the same path at any number of steps.

Draws that are numbered by the step (:class:`~fewstep.diffusion.noise.NoiseSource`) are other noise for every
number of steps. Increments of one path are not: as the steps become small, a solver of the SDE converges to
one sample for each seed and number of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion.noise import NoiseSource, generator_at

SPAN = 32.0
r"""The path is defined for :math:`|\lambda| \le` 32, beyond any noise level of a network."""

DEPTH = 23
r"""The path is resolved to intervals of :math:`2 \cdot 32 / 2^{23} \approx 8 \cdot 10^{-6}` in :math:`\lambda`."""

Interval = tuple[float, float]


class BrownianSource(NoiseSource):
    r"""Draws that are normalised increments of one Brownian motion in :math:`\lambda` for each sample.

    .. math:: z_k = \frac{W(\lambda_{k+1}) - W(\lambda_k)}{\sqrt{\lambda_{k+1} - \lambda_k}}

    The path is bisected from a fixed interval, each midpoint with a generator of its own that depends on
    the seed, the sample and the place alone. Increments over disjoint intervals are independent standard
    normals, so the law of the samples is that of numbered draws. The initial draw is numbered as ever.

    A draw costs some 2 x 23 normals of the size of a sample.

    Arguments:
        seed: The seed of the run.
        samples: The numbers of the samples in this batch.
        intervals: The interval in :math:`\lambda` of each draw, disjoint; ``None`` where a draw belongs to no
            interval: it is a numbered one.
    """

    def __init__(
        self, seed: int, samples: Sequence[int], intervals: Sequence[Interval | None]
    ) -> None:
        super().__init__(seed, samples)
        self._intervals = [None if i is None else _lattice(*i) for i in intervals]
        self._last: tuple[int, Tensor] | None = None

    def draw(
        self,
        index: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        interval = self._intervals[index] if 0 <= index < len(self._intervals) else None
        if interval is None:
            return super().draw(index, shape, dtype=dtype, device=device)
        start, end = interval
        shape = tuple(shape)
        before = self._at(start, shape)
        after = self._at(end, shape)
        self._last = (end, after)
        length = (end - start) * (2 * SPAN / 2**DEPTH)
        # In float32 precision, as numbered draws.
        increment = ((after - before) / math.sqrt(length)).float()
        return increment.to(device=device, dtype=dtype)

    def prepare(
        self, index: int, shape: Sequence[int], *, device: str | torch.device = "cpu"
    ) -> None:
        """Does nothing: an increment is computed from the one before it, when it is asked for."""

    def _at(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """Returns the path at a place of the lattice, (B, *), float64."""
        if self._last is not None and self._last[0] == place and self._last[1].shape[1:] == shape:
            return self._last[1]
        return torch.stack([self._walk(sample, place, shape) for sample in self.samples])

    def _walk(self, sample: int, place: int, shape: tuple[int, ...]) -> Tensor:
        low, high = 0, 2**DEPTH
        left = torch.zeros(shape, dtype=torch.float64)
        right = math.sqrt(2 * SPAN) * self._normal(sample, -1, shape)
        length = 2 * SPAN
        while place not in (low, high):
            middle = (low + high) // 2
            bend = math.sqrt(length) / 2 * self._normal(sample, middle, shape)
            value = (left + right) / 2 + bend
            length /= 2
            if place < middle:
                high, right = middle, value
            else:
                low, left = middle, value
        return left if place == low else right

    def _normal(self, sample: int, place: int, shape: tuple[int, ...]) -> Tensor:
        generator = generator_at("brownian", self.seed, sample, place)
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()


def _lattice(start: float, end: float) -> tuple[int, int] | None:
    """Returns the ends of an interval on the lattice; ``None`` if nothing lies between them."""
    places = [
        round((min(max(lam, -SPAN), SPAN) + SPAN) / (2 * SPAN) * 2**DEPTH) for lam in (start, end)
    ]
    return (places[0], places[1]) if places[0] < places[1] else None

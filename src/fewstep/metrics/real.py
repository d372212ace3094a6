"""Real data in two parts: one for training and search, one held out for final scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.training.data import ImageData, read_images

MOST_HELD_OUT = 5000
LEAST = 20
"""The fewest images of a data set."""


@dataclass(frozen=True)
class RealData:
    """Real samples.

    Attributes:
        data: Returns the samples (n, *) of n indices, in the model's range.
        n: Their number.
        heldout: The same of the samples held out.
        m: The number of those.
        event_shape: The shape of one sample.
        sha256: The checksum of all.
    """

    data: Callable[[Tensor], Tensor]
    n: int
    heldout: Callable[[Tensor], Tensor]
    m: int
    event_shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, data: Tensor, heldout: Tensor) -> RealData:
        """Returns samples that are in memory."""
        shape = tuple(data.shape[1:])
        return cls(
            lambda i: data[i], len(data), lambda i: heldout[i], len(heldout), shape,
            _digest(data, heldout),
        )  # fmt: skip

    @classmethod
    def read(cls, source: str | Path, *, size: int | None = None) -> RealData:
        """Reads a user's images and splits them, see :meth:`fewstep.metrics.Reference.load`.

        Raises:
            ValueError: If there are none, or fewer than 20.
        """
        data, heldout = _parts(read_images(source, size=size), Path(source), size)
        digest = _digest(data.images, heldout.images)
        return cls(data.floats, len(data), heldout.floats, len(heldout), data.event_shape, digest)


def order(n: int) -> Tensor:
    """Returns the numbers below n in a fixed random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _parts(data: ImageData, source: Path, size: int | None) -> tuple[ImageData, ImageData]:
    if len(data) < LEAST:
        raise ValueError(
            f"{str(source)!r} has {len(data)} images; a reference needs at least {LEAST}"
        )
    for suffix in ("", ".gz"):
        test = source / f"t10k-images-idx3-ubyte{suffix}"
        if (source / f"train-images-idx3-ubyte{suffix}").exists() and test.exists():
            return data, read_images(test, size=size)
    mixed = order(len(data))
    out = min(MOST_HELD_OUT, len(data) // 5)
    return ImageData(data.images[mixed[out:]]), ImageData(data.images[mixed[:out]])


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

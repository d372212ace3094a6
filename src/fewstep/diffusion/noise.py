"""Normal draws addressed by (seed, sample, draw): the same on any device, batch split or restart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

INITIAL = -1
"""The index of the initial draw; the draws of a stochastic sampler are 0, 1, 2, ..."""

WORTHWHILE = 5e-4
"""The seconds that a draw must take for a thread to be worth it: handing it over costs about 1e-4."""

SECONDS_PER_SAMPLE, SECONDS_PER_NUMBER = 3e-6, 2.5e-9
"""The approximate cost of a draw on one core: seeding a generator, and the numbers from it."""

MOST_THREADS = 8

PINNED = ("cuda",)
"""The devices to which copies from pinned memory are asynchronous."""


class NoiseSource:
    r"""Standard normal draws for a batch of samples.

    Each sample of each draw has a generator of its own on the CPU, seeded by a hash of its
    address, so that nothing depends on who else is in the batch.

    A draw that is announced (:meth:`prepare`) is made by threads while the network computes. For a CUDA
    device it is made in pinned memory, from which the copy waits for nothing.

    Arguments:
        seed: The seed of the run.
        samples: The numbers of the samples in this batch.
    """

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.seed = seed
        self.samples = list(samples)
        self._prepared: dict[tuple[int, tuple[int, ...]], tuple[Tensor, list[Future[None]]]] = {}

    def draw(
        self,
        index: int,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        r"""Returns the draw of that index, with shape (B, \*), in float32 precision.

        On CUDA the copy is asynchronous: the host does not wait for the device.

        Arguments:
            index: Which draw of the run.
            shape: The shape of one sample.
            dtype: The type of the result; the numbers are the same in any.
            device: The device of the result.
        """
        device = torch.device(device)
        prepared = self._prepared.pop((index, tuple(shape)), None)
        if prepared is None:
            batch = self._empty(shape, device)
            self._fill(batch, index, range(len(self.samples)))
        else:
            batch, parts = prepared
            for part in parts:
                part.result()
        # The type is changed on the device, so that only float32 is ever copied.
        return batch.to(device, non_blocking=device.type in PINNED).to(dtype)

    def prepare(
        self, index: int, shape: Sequence[int], *, device: str | torch.device = "cpu"
    ) -> None:
        """Announces a draw: threads make it meanwhile, if it is worth a thread.

        The numbers are those of :meth:`draw` without it. A prepared draw that is never asked for is
        dropped with this object.

        Arguments:
            index: Which draw of the run.
            shape: The shape of one sample.
            device: The device on which it will be needed.
        """
        device, key = torch.device(device), (index, tuple(shape))
        free = spare_cores() if device.type == "cpu" else available_cores()
        if key in self._prepared or free < 1 or self.seconds(shape) < WORTHWHILE:
            return
        count = len(self.samples)
        # Short rows are mostly Python, which threads do not speed up.
        long = torch.Size(shape).numel() >= 2048
        size = -(-count // min(MOST_THREADS, free)) if long else count
        batch = self._empty(shape, device)
        self._prepared[key] = (
            batch,
            [
                threads().submit(self._fill, batch, index, range(first, min(first + size, count)))
                for first in range(0, count, size)
            ],
        )

    def part(self, rows: range) -> NoiseSource:
        """Returns the source of some rows of the batch, with the same numbers."""
        return NoiseSource(self.seed, self.samples[rows.start : rows.stop])

    def seconds(self, shape: Sequence[int]) -> float:
        """Returns about how long a draw takes on one core."""
        each = SECONDS_PER_SAMPLE + SECONDS_PER_NUMBER * torch.Size(shape).numel()
        return len(self.samples) * each

    def _empty(self, shape: Sequence[int], device: torch.device) -> Tensor:
        # The allocator keeps pinned memory until copies from it have finished.
        pinned = device.type in PINNED
        return torch.empty(
            (len(self.samples), *shape), dtype=torch.float32, device="cpu", pin_memory=pinned
        )

    def _fill(self, batch: Tensor, index: int, rows: range) -> None:
        """Draws some rows of a batch."""
        # Making a generator costs as much as seeding it, so it is seeded again.
        generator, several = torch.Generator(), batch.unbind()
        with torch.no_grad():
            for row in rows:
                generator.manual_seed(_seed_at((self.seed, self.samples[row], index)))
                several[row].normal_(generator=generator)


def generator_at(*address: int | str) -> torch.Generator:
    """Returns a generator on the CPU that depends on the address alone."""
    return torch.Generator().manual_seed(_seed_at(address))


def _seed_at(address: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def spare_cores() -> int:
    """Returns the number of cores that a network on the CPU leaves free."""
    return available_cores() - torch.get_num_threads()


_threads: ThreadPoolExecutor | None = None


def threads() -> ThreadPoolExecutor:
    """Returns the threads that make draws; they start when the first is needed."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(
            min(MOST_THREADS, available_cores()), thread_name_prefix="fewstep noise"
        )
    return _threads


def _forget_threads() -> None:
    global _threads
    _threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork

"""Out of memory: what it looks like, and work that goes on in smaller parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

logger = logging.getLogger("fewstep")

WORDS = (
    "out of memory",  # CUDA, MPS, XPU, HIP
    "can't allocate memory",  # the allocator of the CPU
    "not enough memory",  # the same on Windows
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)
"""What the messages of torch's allocators have; only CUDA's has a class of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is that of an allocator, of any device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def release_memory() -> None:
    """Gives back the memory that torch keeps for later, so that it may be used in smaller pieces."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


class Halving:
    """Runs a function over the rows of a batch; when out of memory, half as many of them at a time.

    The size that fits is remembered for the next batch.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        """The rows that are tried at once; ``None`` if there is no limit."""

    def __call__(self, function: Callable[[range], T], rows: int) -> list[T]:
        """Returns the values of consecutive ranges of rows, which together are all rows.

        Arguments:
            function: Takes a range of rows.
            rows: The number of rows.

        Raises:
            RuntimeError: The error of the allocator, if one row is too much.
        """
        parts, start = list[T](), 0
        while start < rows or not parts:
            size = rows - start if self.most is None else min(self.most, rows - start)
            done, value = _tried(function, range(start, start + size))
            if done:
                parts.append(value)  # type: ignore[arg-type]
                start += size
            else:
                release_memory()
                self.most = -(-size // 2)
                logger.warning(
                    "out of memory with %d samples in a batch: %d from now on, which changes them by "
                    "rounding only; a smaller batch size avoids the attempt",
                    size,
                    self.most,
                )
        return parts


class MicroBatches:
    """The most rows of a batch whose gradients fit into memory at once; half as many each time they do not.

    A backward pass that is out of memory leaves a part of its gradients, so the step is begun again.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        """The rows that are tried at once; ``None`` if there is no limit."""
        self.is_fixed = False
        """Whether an error is raised instead of trying less: where other processes wait in the middle of a step."""

    def __call__(self, rows: int, step: Callable[[int], T]) -> T:
        """Returns the value of a step.

        Arguments:
            rows: The rows of the batch.
            step: Takes the most rows at once. It clears the gradients first.

        Raises:
            RuntimeError: The error of the allocator, if one row is too much.
        """
        while True:
            done, value = self.tried(rows, step)
            if done:
                return value  # type: ignore[return-value]

    def tried(self, rows: int, step: Callable[[int], T]) -> tuple[bool, T | None]:
        """Returns whether a step did fit, and its value; if it did not, the next one has half as many rows at once."""
        size = rows if self.most is None else min(self.most, rows)
        if self.is_fixed:
            return True, step(size)
        done, value = _tried(lambda some: step(len(some)), range(size))
        if not done:
            release_memory()
            self.most = -(-size // 2)
            logger.warning(
                "out of memory with the gradients of %d samples at once: %d from now on, whose gradients are added, "
                "which changes them by rounding only",
                size,
                self.most,
            )
        return done, value


def parts_of(rows: int, size: int) -> list[slice]:
    """Returns consecutive slices of at most ``size`` rows."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def in_parts(
    function: Callable[[range], Tensor], rows: int, halving: Halving | None = None
) -> Tensor:
    r"""Returns a function of the rows of a batch, computed in parts if it is out of memory.

    Arguments:
        function: Takes a range of rows; returns their values, with shape (B, \*), which must not depend on
            the other rows.
        rows: The number of rows.
        halving: Remembers the size that fits, for the next call.
    """
    import torch

    parts = (halving or Halving())(function, rows)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tried(function: Callable[[range], T], rows: range) -> tuple[bool, T | None]:
    # Returned from here, since an exception that is being handled keeps the tensors of its frames.
    try:
        return True, function(rows)
    except (RuntimeError, MemoryError) as error:
        if len(rows) < 2 or not is_out_of_memory(error):
            raise
        return False, None

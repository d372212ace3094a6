"""Evaluations that are split when a batch does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fewstep.base.memory import Halving, in_parts
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Wrapper


@contextmanager
def split_evaluations(denoiser: Denoiser) -> Iterator[None]:
    """Within the block an evaluation that is out of memory is made of half as many samples at a time.

    For studies, which follow all their samples together. Samplers run a smaller batch from its start
    instead (:func:`fewstep.sampling.batches.run_batch`), which suits guidance with momentum as well.
    """
    place = _place(denoiser)
    raw, halving = place.raw, Halving()

    def split(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return evaluated(raw, x, t, cond, halving)

    place.raw = split  # type: ignore[method-assign]
    try:
        yield
    finally:
        del place.raw


def evaluated(
    raw: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    cond: Mapping[str, Any],
    halving: Halving | None = None,
) -> Tensor:
    r"""Returns the model output at a state (B, \*) and times (B), in parts if it is out of memory.

    Arguments:
        raw: :meth:`Denoiser.raw` of the model.
        x: The state.
        t: The times.
        cond: The conditions, ready for this batch.
        halving: Remembers the size that fits.
    """

    def part(rows: range) -> Tensor:
        if len(rows) == len(x):
            return raw(x, t, **cond)
        some = slice(rows.start, rows.stop)
        return raw(x[some], t[some], **select(cond, rows))

    return in_parts(part, len(x), halving)


def _place(denoiser: Denoiser) -> Denoiser:
    """Returns the model to split: what is inside of guidance with momentum, which needs the whole batch."""
    place = inner = denoiser
    while isinstance(inner, Wrapper):
        inner, momentum = inner.inner, getattr(inner, "momentum", 0.0)
        place = inner if momentum else place
    return place

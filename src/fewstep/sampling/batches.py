r"""Numbered samples in batches: the loop of ``sample``, ``record``, ``compare`` and ``tune``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.base.memory import Halving
from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models.conditions import Conditions, select
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.protocol import DEFAULT_BATCH, Run, Sampler, Trajectory


class ConditionRows(Protocol):
    """The conditions of numbered samples, as :class:`fewstep.models.conditions.Conditions`."""

    def at(self, rows: Sequence[int], /) -> Mapping[str, Any]:
        """Returns the conditions of these samples."""
        ...


@dataclass(frozen=True)
class ConditionsAt:
    """A function of the numbers of samples as :class:`ConditionRows`."""

    function: Callable[[Any], Mapping[str, Any]]

    def at(self, rows: Sequence[int], /) -> Mapping[str, Any]:
        """Returns the conditions of these samples."""
        return self.function(rows)


def run_batches(
    sampler: Sampler,
    rows: int | Sequence[int],
    *,
    seed: int = 0,
    conditions: ConditionRows | None = None,
    batch_size: int | None = None,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    adjust: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    save: bool = False,
    times: Sequence[float] | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Sequence[int], Trajectory]]:
    r"""Draws numbered samples, batch by batch: yields the numbers of a batch and its trajectory.

    Sample i depends on ``(seed, i)`` and its conditions alone, not on the batches. Batches share
    no memory, so the memory needed is that of one batch.

    Arguments:
        sampler: The sampler.
        rows: The numbers of the samples; an integer n means 0 to n - 1.
        seed: The seed.
        conditions: The conditions of numbered samples; left out, there are none.
        batch_size: The samples in one network evaluation; at most
            :data:`~fewstep.sampling.protocol.DEFAULT_BATCH` if left out.
        noise: The initial draws, with shape (n, \*), in the order of ``rows``; left out, those
            of the seed for each number.
        image: Data to start from, with shape (n, \*), in the order of ``rows``.
        dtype: The type of the initial draws, if they are not given.
        adjust: Applied to the initial state of a batch and the numbers of its samples, e.g. rounding
            to the type of a file.
        save: Whether the trajectories have their states.
        times: The times of the states to save; left out, all that the sampler has.
        progress: Ticks once for each network evaluation of a batch.
    """
    numbers = range(rows) if isinstance(rows, int) else rows
    return run_each(
        sampler,
        batches_of(numbers, batch_size),
        seed=seed,
        conditions=conditions,
        noise=None if noise is None else _in_order(noise),
        image=None if image is None else _in_order(image),
        dtype=dtype,
        adjust=adjust,
        save=save,
        times=times,
        progress=progress,
    )


Rows = TypeVar("Rows", range, Sequence[int])


def batches_of(rows: Rows, size: int | None = None) -> list[Rows]:
    """Returns the numbers of the samples of each batch; of a range these are ranges.

    Arguments:
        rows: The numbers of all samples.
        size: The samples in a batch; at most :data:`~fewstep.sampling.protocol.DEFAULT_BATCH` if left out.
    """
    size = min(len(rows), DEFAULT_BATCH) if size is None else size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def run_each(
    sampler: Sampler,
    batches: Iterable[Sequence[int]],
    *,
    seed: int = 0,
    conditions: ConditionRows | None = None,
    noise: Callable[[Sequence[int]], Tensor] | None = None,
    image: Callable[[Sequence[int]], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    adjust: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    save: bool = False,
    times: Sequence[float] | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Sequence[int], Trajectory]]:
    r"""Draws batches of numbered samples, as :func:`run_batches` does, from an iterable of batches.

    The next batch is taken while the present one runs, so that its initial draw is ready in time.

    Arguments:
        sampler: The sampler.
        batches: The numbers of the samples of each batch.
        seed: The seed.
        conditions: What has the conditions of numbered samples; left out, there are none.
        noise: Returns the initial draws of a batch, instead of those of the seed.
        image: Returns the data that a batch starts from.
        dtype: The type of the initial draws, if they are not given.
        adjust: Applied to the initial state of a batch and the numbers of its samples.
        save: Whether the trajectories have their states.
        times: The times of the states to keep; left out, all that the sampler has.
        progress: Ticks once for each network evaluation of a batch.
    """
    model = sampler.denoiser
    on_evaluation = None if progress is SILENT else progress.tick
    upcoming = iter(batches)

    def following() -> tuple[Sequence[int], NoiseSource] | None:
        batch = next(upcoming, None)
        if batch is None:
            return None
        source = NoiseSource(seed, batch)
        if noise is None and model.event_shape is not None:
            source.prepare(INITIAL, model.event_shape, device=model.device)
        return batch, source

    waiting = following()
    while waiting is not None:
        batch, source = waiting
        waiting = following()
        cond = {} if conditions is None else conditions.at(batch)
        if not isinstance(conditions, Conditions):
            cond = model.prepare(len(batch), cond)
        yield (
            batch,
            run_batch(
                sampler,
                source,
                cond,
                noise=None if noise is None else noise(batch),
                image=None if image is None else image(batch),
                dtype=dtype,
                adjust=adjust,
                save=save,
                times=times,
                on_evaluation=on_evaluation,
            ),
        )


def _in_order(rows: Tensor) -> Callable[[Sequence[int]], Tensor]:
    """Returns what hands out the rows of a tensor, batch after batch."""
    position = 0

    def part(batch: Sequence[int]) -> Tensor:
        nonlocal position
        position += len(batch)
        return rows[position - len(batch) : position]

    return part


def run_batch(
    sampler: Sampler,
    source: NoiseSource,
    cond: Mapping[str, Any],
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    adjust: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
    save: bool = False,
    times: Sequence[float] | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Trajectory:
    """Draws the samples of one batch; the arguments are those of :func:`run_batches`, for this batch.

    When out of memory the batch is run again in halves, with a warning in the log, and so are later batches
    of this model. A sample depends on its number alone, so it is the same up to rounding.

    Arguments:
        sampler: The sampler.
        source: The draws of the batch.
        cond: Its conditions, ready for the network (see :meth:`Denoiser.prepare`).
        noise: Its initial draws.
        image: The data to start from.
        dtype: The type of the initial draws, if they are not given.
        adjust: Applied to the initial state and the numbers of the samples.
        save: Whether the trajectory has its states.
        times: The times of the states to save.
        on_evaluation: Called after each network evaluation.
    """
    ticks = None if on_evaluation is None else _Ticks(on_evaluation)

    def run(rows: range) -> Trajectory:
        part, some = slice(rows.start, rows.stop), source
        ready, z, start_image = cond, noise, image
        if len(rows) < len(source.samples):
            some, ready = source.part(rows), select(cond, rows)
            z = None if noise is None else noise[part]
            start_image = None if image is None else image[part]
        z = initial_noise(sampler.denoiser, some, z, dtype=dtype)
        if z.is_meta and type(z) is Tensor:
            raise ValueError(
                "the network is on the meta device, where tensors have no values; load its weights on another "
                "device first"
            )
        # Samplers without intermediate states cannot start from an image.
        x = sampler.start(z) if start_image is None else sampler.start(z, start_image)  # type: ignore[call-arg]
        if adjust is not None:
            x = adjust(x, some.samples)
        return sampler.run(x, Run(some, ready, save, ticks and ticks.restarted(), times))

    return _joined(_halving(sampler.denoiser)(run, len(source.samples)))


_halvings: weakref.WeakKeyDictionary[Denoiser, Halving] = weakref.WeakKeyDictionary()


def _halving(denoiser: Denoiser) -> Halving:
    """Returns what remembers the size of a batch that fits, for the model."""
    return _halvings.setdefault(denoiser, Halving())


class _Ticks:
    """Counts the evaluations of a batch once, although parts of it are run again or one after another."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick, self._most, self._now = tick, 0, 0

    def restarted(self) -> Callable[[], None]:
        self._now = 0
        return self._one

    def _one(self) -> None:
        self._now += 1
        if self._now > self._most:
            self._most = self._now
            self._tick()


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    """Returns the trajectory of a whole batch."""
    if len(parts) == 1:
        return parts[0]
    states = [part.states for part in parts if part.states is not None]
    x = torch.cat([part.x for part in parts])
    evaluations = sum(part.nfe * len(part.x) for part in parts) / len(x)
    return Trajectory(x, parts[0].times, torch.cat(states, 1) if states else None, evaluations)


def initial_noise(
    denoiser: Denoiser,
    source: NoiseSource,
    noise: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Returns the initial draws of a batch, or the given ones, (B, \*), on the device of the model.

    Raises:
        ValueError: If the model has no ``event_shape``, and no noise is given.
    """
    device = denoiser.device
    if noise is not None:
        return noise.to(device)
    if denoiser.event_shape is None:
        raise ValueError(
            "the shape of a sample is not known; give noise=, or Denoiser.wrap(..., event_shape=)"
        )
    return source.draw(INITIAL, denoiser.event_shape, dtype=dtype, device=device)

r"""Statistics of a store: the states by time, and the spectrum over time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.schedules import schedule_from_record
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.resolve import plan as make_plan
from fewstep.studies.spectrum import Spectrum, time_spectrum
from fewstep.trajectories.store import TrajectoryStore, store_bytes
from fewstep.trajectories.writing import writer_of

DENSE = 32
"""The least number of stored states for a spectrum without new trajectories."""

CHUNK = 256


@dataclass(frozen=True)
class Statistics:
    """Numbers about the states of a store.

    Attributes:
        trajectories: The number of trajectories read.
        bytes: The size of the store.
        times: The times of the states, float64, with shape (S); so have the next four.
        mean: The mean of all coordinates.
        std: Their standard deviation.
        smallest: The smallest.
        largest: The largest.
    """

    trajectories: int
    bytes: int
    times: Tensor
    mean: Tensor
    std: Tensor
    smallest: Tensor
    largest: Tensor


def statistics(store: TrajectoryStore, *, most: int = 4096) -> Statistics:
    """Returns statistics of the first trajectories of a store, at most ``n`` of them."""
    n = min(len(store), most)
    total = square = torch.zeros(len(store.times), dtype=torch.float64)
    low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    for rows in torch.arange(n).split(CHUNK):
        flat = store.read(rows).states.transpose(0, 1).flatten(1).double()
        total, square = total + flat.sum(1), square + flat.square().sum(1)
        low, high = torch.minimum(low, flat.amin(1)), torch.maximum(high, flat.amax(1))
    count = n * max(1, torch.Size(store.event_shape).numel())
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    size = store_bytes(store.folder, store.manifest)
    return Statistics(n, size, store.times, mean, std, low, high)


def spectrum(
    store: TrajectoryStore, denoiser: Denoiser | None = None, *, n: int = 32, states: int = 128
) -> Spectrum:
    r"""Returns the spectrum over time of the trajectories of a store.

    It is computed in the variable in which the stored times are most evenly spaced, t or its square
    root. A store of few states does not resolve higher modes: then the model integrates n of its
    trajectories again, with the same starts and conditions, through ``states`` states.

    Arguments:
        store: The store.
        denoiser: The model that recorded it; not needed if the store has 32 states or more.
        n: The largest number of trajectories.
        states: The number of states; each but one costs a network evaluation.

    Raises:
        ValueError: If the store has few states and the model is not given, or is another one.
    """
    schedule = schedule_from_record(store.manifest.schedule)
    variable = _variable(store.times)
    rows = range(min(n, len(store)))
    if len(store.times) >= DENSE:
        integrated = store.read(rows).states
        return time_spectrum(integrated, store.times, variable=variable, schedule=schedule)
    if denoiser is None:
        raise ValueError(
            f"the store has {len(store.times)} states of a trajectory, a spectrum needs {DENSE}; "
            "give the model, which then integrates some again, or record with keep='all'"
        )
    stored = store.times
    integer = denoiser.integer_times
    dense = make_plan(
        "tab2",
        schedule,
        steps=states - 1,
        # Integer timesteps are too far apart for the end of a dense quadratic grid.
        grid="quadratic" if variable == "sqrt" and not integer else "uniform",
        t_start=float(stored[0]),
        t_end=max(float(stored[-1]), schedule.t_min),
        integer_times=integer,
    )
    before = SamplerRecipe.from_record(store.manifest.sampler)
    recipe = SamplerRecipe(kind="plan", plan=dense, guidance=before.guidance)
    times = dense.knots
    alpha, sigma = (scale.tolist() for scale in schedule.scales(times))
    manifest = replace(
        store.manifest,
        sampler=recipe.to_record(),
        times=times.tolist(),
        alpha=alpha,
        sigma=sigma,
        knots=None,
        dtype="float32",
    )
    writer = writer_of(denoiser, store.folder, manifest)
    integrated = writer.follow(list(rows), store.read(rows).conditions)
    return time_spectrum(integrated, dense.knots, variable=variable, schedule=schedule)


def _variable(times: Tensor) -> str:
    """Returns the variable in which the times are more evenly spaced, t or its square root."""
    spread = {}
    for name, place in (("t", times), ("sqrt", times.clamp_min(0).sqrt())):
        gaps = place.diff().abs()
        spread[name] = float(gaps.std(correction=0) / gaps.mean())
    return min(spread, key=spread.__getitem__)

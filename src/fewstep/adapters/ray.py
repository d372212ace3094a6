r"""Sampling and recording on a Ray cluster, with the packages of the extra ``ray``.

Work is a map over ranges of seeds, with actors that hold the model. Ray starts a killed actor again and
repeats its range; as sample i depends on ``(seed, i)`` and its batch alone, nothing else changes.

.. code-block:: python

    from functools import partial
    import fewstep
    from fewstep.adapters import ray as cluster

    model = partial(fewstep.load, "fashion", device="cuda")
    samples = cluster.sample(model, 1_000_000, nfe=5, workers=8, num_gpus=1)
    samples.write_parquet("s3://bucket/samples")            # streamed: no node holds all of them
    store = cluster.record(model, "/shared/store", n=1_000_000, workers=8, num_gpus=1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.base.extras import install_hint
from fewstep.base.paths import check_path
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.batches import ConditionsAt, run_each
from fewstep.sampling.sample import sampler as make_sampler
from fewstep.trajectories.recording import record as record_here
from fewstep.trajectories.store import TrajectoryStore

Load = Callable[[], Denoiser]
"""Returns the model; called once in each actor, so it must be picklable: a function of a module, or a partial."""


class Worker:
    """An actor that holds a model and draws batches by their numbers.

    Arguments:
        load: Returns the model.
        n: The number of samples of the whole run.
        seed: The seed.
        first: The number of the first sample.
        batch_size: The samples in a batch.
        conditions: Returns the conditions of some samples.
        options: Those of :func:`fewstep.sample` that describe the sampler.
    """

    def __init__(
        self,
        load: Load,
        n: int,
        seed: int,
        first: int,
        batch_size: int,
        conditions: Callable[[range], Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> None:
        self._sampler = make_sampler(load(), **options)
        self._seed, self._size = seed, batch_size
        self._rows = range(first, first + n)
        self._conditions = None if conditions is None else ConditionsAt(conditions)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the samples of some batches, and their numbers, as arrays of numpy."""
        import numpy

        ranges = [self._rows[k * self._size : (k + 1) * self._size] for k in batch["id"].tolist()]
        drawn = list(run_each(self._sampler, ranges, seed=self._seed, conditions=self._conditions))
        return {
            "index": numpy.concatenate([numpy.asarray(rows) for rows, _ in drawn]),
            "sample": numpy.concatenate([part.x.float().cpu().numpy() for _, part in drawn]),
        }


def sample(
    load: Load,
    n: int,
    *,
    workers: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    first: int = 0,
    conditions: Callable[[range], Mapping[str, Any]] | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> Any:
    r"""Returns a lazy ``ray.data.Dataset`` of samples: columns ``index`` and ``sample``.

    The samples have the bytes of ``fewstep.sample(model, n, batch_size=batch_size, ...)`` on the same kind
    of device, whatever the number of workers. The order of rows is Ray's; ``index`` has the numbers.

    Arguments:
        load: Returns the model; called once in each actor.
        n: The number of samples.
        workers: The number of actors.
        batch_size: The samples in one network evaluation.
        seed: The seed.
        first: The number of the first sample.
        conditions: Returns the conditions of some samples, given their numbers.
        num_cpus: The CPU cores of an actor; left out, Ray's default.
        num_gpus: The GPUs of an actor.
        options: Those of :func:`fewstep.sample` that describe the sampler: ``solver``, ``nfe``, ``plan``,
            ``recipe``, ``profile``, ``grid``, ``guidance``, ...

    Raises:
        ValueError: If a number is not positive, or Ray is not installed.
    """
    ray = _ray("ray.data")
    for name, value in (("n", n), ("workers", workers), ("batch_size", batch_size)):
        _positive(name, value)
    batches = -(-n // batch_size)
    # Not ray.data.range: its tasks need a core of their own, which the actors may have taken.
    numbers = ray.data.from_items(
        [{"id": k} for k in range(batches)], override_num_blocks=min(batches, 16 * workers)
    )
    return numbers.map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, batches)),
        fn_constructor_args=(load, n, seed, first, batch_size, conditions, options),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def record(
    load: Load,
    folder: str | Path,
    *,
    n: int,
    workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> TrajectoryStore:
    """Records trajectories with several actors into one folder, which all nodes must see.

    Each actor computes shards that nobody has (see :func:`fewstep.record`); of a killed one the claim is
    taken over, and Ray starts it again. The shards have the bytes of one process on the same kind of device.

    Arguments:
        load: Returns the model; called once in each actor.
        folder: The folder of the store.
        n: The number of trajectories.
        workers: The number of actors.
        num_cpus: The CPU cores of an actor.
        num_gpus: The GPUs of an actor.
        options: The other arguments of :func:`fewstep.record`, except ``overwrite``.

    Raises:
        ValueError: If a number is not positive, ``overwrite`` is given, or Ray is not installed; and as
            :func:`fewstep.record`.
    """
    ray = _ray("ray")
    _positive("workers", workers)
    if options.pop("overwrite", False):
        raise ValueError("several writers do not overwrite a store; remove the folder first")
    check_path(folder, "folder")
    place = str(Path(folder).resolve())
    # Twenty restarts each: what kills an actor every time ends the run.
    Actor = ray.remote(Recorder)
    actors = [
        Actor.options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=20, max_task_retries=20
        ).remote(load)
        for _ in range(workers)
    ]
    try:
        ray.get([actor.record.remote(place, n, options) for actor in actors])
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    finally:
        for actor in actors:
            ray.kill(actor)
    return TrajectoryStore.open(place)


class Recorder:
    """An actor that holds a model and records shards.

    Arguments:
        load: Returns the model.
    """

    def __init__(self, load: Load) -> None:
        self._model = load()

    def record(self, folder: str, n: int, options: Mapping[str, Any]) -> None:
        """Computes the shards that nobody has, until all are there."""
        record_here(self._model, folder, n=n, **options)


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _ray(module: str) -> Any:
    import importlib

    try:
        importlib.import_module(module)
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"this needs Ray ({error}): {install_hint('ray')}") from None

"""Samples and trajectories of actors on a local Ray cluster of two processes."""

import functools
import importlib.util
import os
import signal
import sys

import numpy
import pytest

import fewstep
from fewstep.adapters import ray as cluster
from fewstep.trajectories.manifest import MANIFEST

LOAD = functools.partial(fewstep.load, "mixture-smooth")


def test_arguments_are_checked_before_anything_starts():
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(ValueError, match=r"this needs Ray .*: pip install"):
            cluster.sample(LOAD, 4)
        return
    with pytest.raises(ValueError, match="workers must be a positive integer"):
        cluster.sample(LOAD, 4, workers=0)
    with pytest.raises(ValueError, match="remove the folder first"):
        cluster.record(LOAD, "x", n=4, overwrite=True)


def test_a_worker_draws_the_samples_of_its_batches():
    worker = cluster.Worker(LOAD, 10, 3, 5, 4, None, {"nfe": 3})
    drawn = worker({"id": numpy.array([2, 0])})
    wanted = fewstep.sample(LOAD(), 10, nfe=3, seed=3, first=5, batch_size=4).numpy()
    assert drawn["index"].tolist() == [13, 14, 5, 6, 7, 8]
    assert numpy.array_equal(drawn["sample"], wanted[[8, 9, 0, 1, 2, 3]])


@pytest.fixture(scope="module")
def local():
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    # The workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


class DiesOnce(cluster.Worker):
    """A worker whose process is killed in its first batch, once."""

    def __call__(self, batch):
        try:
            os.close(os.open(os.environ["FEWSTEP_KILLED"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().__call__(batch)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_actors_draw_the_bytes_of_one_process_and_killed_ones_are_retried(
    local, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "Worker", DiesOnce)
    killed = tmp_path / "killed"
    load = functools.partial(_load_with, str(killed))
    result = cluster.sample(load, 50, workers=2, batch_size=8, nfe=3, seed=1)
    rows = sorted(result.take_all(), key=lambda row: row["index"])
    assert killed.exists()
    assert [row["index"] for row in rows] == list(range(50))
    wanted = fewstep.sample(LOAD(), 50, nfe=3, seed=1, batch_size=8).numpy()
    assert numpy.array_equal(numpy.stack([row["sample"] for row in rows]), wanted)


def _load_with(killed):
    os.environ["FEWSTEP_KILLED"] = killed
    return LOAD()


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_actors_record_the_shards_of_one_process(local, tmp_path):
    settings = {"n": 40, "nfe": 4, "keep": 2, "shard_size": 8, "batch_size": 8}
    one = fewstep.record(LOAD(), tmp_path / "one", **settings)
    two = cluster.record(LOAD, tmp_path / "two", workers=2, **settings)
    assert len(one) == len(two) == 40
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert MANIFEST in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

"""The watch over the other processes of a launch: who is lost, and that nobody waits forever."""

import time

import pytest

from fewstep.base.locks import Lock
from fewstep.base.processes import Processes
from fewstep.training import ranks
from fewstep.training.ranks import LostRank, Ranks
from forks import FORKS, Fork


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(ranks, "LOOK", 0.01)
    monkeypatch.setattr(ranks, "GRACE", 1.0)


def two(folder):
    return [Ranks(folder, Processes(rank, 2)) for rank in (0, 1)]


def dead(folder, rank):
    """Leaves the lock of a killed process."""
    process = Fork(lambda: Lock(folder / ranks.FOLDER / f"rank-{rank}").take_over(), fresh=False)
    process.wait()


def fail(own, error):
    with own.watching():
        own.connected()
        raise error


def test_nobody_is_lost_and_nothing_is_left(tmp_path):
    first, second = two(tmp_path / "out")
    with first.watching(), second.watching():
        for one in (first, second):
            one.connected()
            assert one.lost() is None
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(FORKS)
def test_an_error_because_of_a_killed_process_names_it(tmp_path):
    first, _ = two(tmp_path)
    dead(tmp_path, 1)
    with pytest.raises(LostRank, match=r"rank 1 \(process \d+ on .*\) of 2 is lost"):
        fail(first, RuntimeError("Connection closed by peer"))


def test_an_error_of_another_process_is_repeated(tmp_path):
    first, second = two(tmp_path)
    with pytest.raises(ValueError, match="the loss is nan"):
        fail(second, ValueError("the loss is nan"))
    with pytest.raises(LostRank, match="rank 1 of 2 has ended: the loss is nan"):
        fail(first, RuntimeError("Connection closed by peer"))
    # The next launch begins anew, and leaves nothing.
    first, second = two(tmp_path)
    with first.watching(), second.watching():
        first.connected()
        assert first.lost() is None
    assert not (tmp_path / ranks.FOLDER).exists()


def test_own_errors_stay_what_they_are(tmp_path):
    first, second = two(tmp_path)
    with second.watching(), pytest.raises(RuntimeError, match="own"):
        fail(first, RuntimeError("own"))


def test_one_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "ARRIVAL", 0.0)
    first, _ = two(tmp_path)
    assert "rank 1 of 2 did not come within" in first.lost()


@pytest.mark.filterwarnings(FORKS)
def test_a_process_that_waits_for_a_lost_one_is_ended(tmp_path):
    """As in an exchange of tensors on a GPU, which no exception ends."""

    def wait() -> None:
        first, _ = two(tmp_path)
        with first.watching():
            first.connected()
            time.sleep(600)

    dead(tmp_path, 1)
    assert Fork(wait, fresh=False).wait() == ranks.CODE

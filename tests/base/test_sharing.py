"""Processes that share parts: their launch, their claims, and one that is lost."""

import pytest

from fewstep.base import sharing
from fewstep.base.locks import Lock
from fewstep.base.processes import Processes, processes
from fewstep.base.sharing import Sharing


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Processes(3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, Processes(5, 6, 2)),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            Processes(1, 2, 1),
        ),
    ],
)
def test_a_process_knows_its_launch(variables, expected):
    assert processes(variables) == expected


@pytest.mark.parametrize("rank", ["2", "-1", "x"])
def test_variables_that_do_not_fit_are_refused(rank):
    with pytest.raises(ValueError, match="RANK"):
        processes({"RANK": rank, "WORLD_SIZE": "2"})


def test_each_begins_with_its_own_consecutive_share():
    shares = [Processes(rank, 3).own_first(range(10)) for rank in range(3)]
    assert [share[0] for share in shares] == [0, 3, 6]
    assert all(sorted(share) == list(range(10)) for share in shares)


def sharing_of(folder, items=range(4)):
    return Sharing(list(items), lambda item: folder / f"{item}.part")


def test_two_workers_do_each_part_once(tmp_path):
    with sharing_of(tmp_path) as one, sharing_of(tmp_path) as two:
        assert one.unfinished()
        first, second = one.claimed(), two.claimed()
        # One asks for a part more before it has written the last, as a prefetching loop does.
        assert [next(first), next(first), next(second)] == [0, 1, 2]
        for item in (0, 1, 2):
            (tmp_path / f"{item}.part").touch()
        assert list(second) == [3]
        assert list(first) == []
        (tmp_path / "3.part").touch()
        assert not one.unfinished()
        assert not two.unfinished()
    assert len(list(tmp_path.iterdir())) == 4  # no claim is left


def test_the_part_of_a_lost_process_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "POLL", 0.0)
    lost = Lock(tmp_path / "0.part.claim")
    assert lost.take()
    with sharing_of(tmp_path, [0]) as work:
        assert work.unfinished()
        assert list(work.claimed()) == []
        assert work.unfinished()  # it waits, and asks again
        monkeypatch.setattr(Lock, "is_abandoned", lambda self: True)
        assert list(work.claimed()) == [0]


def test_what_another_process_finished_is_not_begun(tmp_path):
    with Sharing([0], lambda item: tmp_path / "parts" / "0", over=lambda: True) as work:
        assert not work.unfinished()
        assert list(work.claimed()) == []
    assert not (tmp_path / "parts").exists()

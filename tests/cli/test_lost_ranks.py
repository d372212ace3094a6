"""A killed process of two ends the other with a sentence, and the same launch resumes to the same bytes."""

import os
import signal
import socket

import pytest

from forks import FORKS, Fork
from tiny_models import write_tiny

SEARCH = {
    "pairs": 8, "heldout": 4, "test": 4, "teacher_nfe": 4, "steps": 4, "batch_size": 4, "evaluate_every": 2,
}  # fmt: skip


class Killed:
    """A progress that kills its process at a tick."""

    def __init__(self, ticks):
        self.left, self.stages = ticks, 0

    def stage(self, name, total=None, *, done=0):
        self.stages += name.startswith(("training", "distilling", "search"))

    def tick(self, amount=1, note=""):
        self.left -= bool(self.stages)
        if self.stages and self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, out, progress):
    from fewstep.training.train import train
    from tiny_training import RECIPE, images

    train(images(), out, RECIPE, checkpoint_every=2, progress=progress)


def distill(folder, out, progress):
    import fewstep

    model = fewstep.load(folder / "model", device="cpu")
    fewstep.distill(
        model, folder / "store", out, mode="endpoint", steps=6, batch_size=2, checkpoint_every=2,
        device="cpu", progress=progress,
    )  # fmt: skip


def tune(folder, out, progress):
    import fewstep

    out.mkdir(exist_ok=True)
    fewstep.tune(
        fewstep.load("mixture-smooth"), nfe=2, objective="endpoint", search=SEARCH, out=out / "tuned.json",
        keep_worse=True, progress=progress,
    )  # fmt: skip


CASES = {
    "train": (train, "model.safetensors"),
    "distill": (distill, "operator.safetensors"),
    "tune": (tune, "tuned.search/state.safetensors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import fewstep

    folder = tmp_path_factory.mktemp("ranks")
    model = fewstep.load(write_tiny(folder / "model"), device="cpu")
    fewstep.record(
        model, folder / "store", n=12, shard_size=12, solver="ddim", nfe=4, keep=2, class_labels=1
    )
    return folder


def launch(call, killed=None):
    """Runs a call in two processes, the second with a progress; returns what they raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def part(progress):
        if "accelerate" in __import__("sys").modules:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        call(progress)

    forks = [
        Fork(lambda p=progress: part(p), **address, RANK=rank, LOCAL_RANK=rank)
        for rank, progress in (("0", None), ("1", killed))
    ]
    ends = []
    for fork in forks:
        try:
            ends.append(fork.wait())
        except AssertionError as error:
            ends.append(str(error))
    return ends


@pytest.mark.filterwarnings(FORKS, "ignore:Grad strides")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_killed_process_ends_the_other_and_the_launch_is_resumed(name, folder, tmp_path):
    work, file = CASES[name]
    assert launch(lambda p: work(folder, tmp_path / "whole", p)) == [0, 0]
    first, second = launch(lambda p: work(folder, tmp_path / "out", p), Killed(2))
    assert second == -signal.SIGKILL
    assert "LostRank: rank 1 (process" in first
    assert "resumes from the last checkpoint" in first
    assert not (tmp_path / "out" / file).exists() or name == "tune"
    assert launch(lambda p: work(folder, tmp_path / "out", p)) == [0, 0]
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not list((tmp_path / "out").rglob(".ranks"))

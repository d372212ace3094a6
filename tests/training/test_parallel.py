"""Data-parallel training: shares of a batch, and the weights of one process."""

import socket

import pytest
import torch

from fewstep.base.files import read_tensors
from fewstep.base.processes import Processes
from fewstep.training.batches import Batches
from fewstep.training.parallel import Team, team
from fewstep.training.train import build_network, train
from forks import FORKS, Fork
from tiny_training import RECIPE, images


@pytest.mark.parametrize("count", [2, 3, 4])
def test_averaged_gradients_are_those_of_the_whole_batch(count):
    """As the processes compute them: each its own part, then the mean over the processes."""
    batches = Batches(images(), RECIPE)
    network = build_network(images(), RECIPE, batches)
    batch = batches(0)

    def gradients(part, scaled):
        network.zero_grad()
        scaled(part.loss(network(*part.inputs))).backward()
        return torch.cat([p.grad.flatten().double() for p in network.parameters()])

    whole = gradients(batch, lambda loss: loss)
    teams = [Team(Processes(rank, count), RECIPE.batch_size) for rank in range(count)]
    mean = sum(gradients(batch.part(t.rows), t.scaled) for t in teams) / count
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-6)
    assert sum(t.share for t in teams) == pytest.approx(1)


def test_alone_nothing_changes():
    with team(4, torch.device("cpu")) as alone:
        network, loss = torch.nn.Linear(1, 1), torch.ones(())
        assert alone.rows == slice(0, 4)
        assert alone.parallel(network, torch.device("cpu")) is network
        assert alone.scaled(loss) is loss


def test_a_launch_that_cannot_train_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="a batch of 4 cannot be split among 8"), team(4, "cpu"):
        pass
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="needs MASTER_ADDR"), team(8, torch.device("cpu")):
        pass


@pytest.mark.filterwarnings(FORKS)
@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    """They end without gloo's destructor: see ``keep_connected``."""
    train(images(), tmp_path / "one", RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def take_part() -> None:
        from fewstep.training.train import train
        from tiny_training import RECIPE, images

        train(images(), tmp_path / "two", RECIPE, checkpoint_every=2)

    started = [Fork(take_part, **launch, RANK=rank) for rank in "01"]
    assert [process.wait() for process in started] == [0, 0]
    one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=2e-3, atol=2e-3)

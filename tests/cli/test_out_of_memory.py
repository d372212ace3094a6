"""Out of memory in a backward pass of a training or a search: micro-batches, and the same result to rounding."""

import pytest
import torch

import fewstep
from fewstep.base.files import read_tensors
from fewstep.models.networks.unet import SmallUNet
from tiny_models import write_tiny
from tiny_training import RECIPE, images

FEW = 3


class Small(torch.autograd.Function):
    """A backward pass for which more than a few samples are too much."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > FEW:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return gradient


@pytest.fixture
def small_memory(monkeypatch, caplog):
    """Networks whose first layer has no memory for its gradient; all other gradients are there by then."""
    original = SmallUNet.forward

    def forward(self, x, t, *rest, **named):
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            x = Small.apply(x.detach().requires_grad_())
        return original(self, x, t, *rest, **named)

    def use():
        monkeypatch.setattr(SmallUNet, "forward", forward)

    yield use
    assert "out of memory with the gradients of" in caplog.text


def assert_close(one, two):
    one, two = read_tensors(one), read_tensors(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), rtol=2e-3, atol=2e-3)


def test_training(tmp_path, small_memory):
    fewstep.train(images(), tmp_path / "one", RECIPE, checkpoint_every=2, device="cpu")
    small_memory()
    fewstep.train(images(), tmp_path / "two", RECIPE, checkpoint_every=2, device="cpu")
    assert_close(*(tmp_path / name / "model.safetensors" for name in ("one", "two")))


@pytest.mark.parametrize(
    "options", [{"mode": "endpoint"}, {"mode": "flow-map"}, {"accumulate": 2}], ids=str
)
def test_distilling(options, tmp_path, small_memory):
    model = fewstep.load(write_tiny(tmp_path / "model"), device="cpu")
    store = fewstep.record(
        model,
        tmp_path / "store",
        n=24,
        shard_size=24,
        solver="ddim",
        nfe=4,
        keep=3,
        class_labels=[0, 1, 2] * 8,
    )
    settings = {"steps": 2, "batch_size": 7, "checkpoint_every": 2, "device": "cpu", **options}
    fewstep.distill(model, store, tmp_path / "one", **settings)
    small_memory()
    fewstep.distill(model, store, tmp_path / "two", **settings)
    assert_close(*(tmp_path / name / "operator.safetensors" for name in ("one", "two")))

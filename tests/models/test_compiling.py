"""Networks compiled while they sample: what is refused, and that modules stay as they are."""

import pytest
import torch
from torch import nn

import fewstep
from fewstep.models import exact
from fewstep.models.compiling import compiled

# Importing the compiler of torch warns about another part of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.diffusers,
]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.layer(x) * t[:, None]


@pytest.fixture
def model():
    return fewstep.Denoiser.wrap(
        Network(), schedule=fewstep.schedule("vp-linear"), prediction="eps", event_shape=(2,)
    )


def test_samples_come_from_the_compiled_network(model, monkeypatch):
    asked = []

    def compile(function, *, mode):
        def run(*args, **kwargs):
            asked.append(mode)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    plain = fewstep.sample(model, 3, nfe=4)
    for mode, expected in ((True, None), ("reduce-overhead", "reduce-overhead")):
        asked.clear()
        assert torch.equal(fewstep.sample(model, 3, nfe=4, compile=mode), plain)
        assert asked == [expected] * 4
    assert model.network._compiled_call_impl is None
    assert torch.equal(fewstep.sample(model, 3, nfe=4), plain)
    assert len(asked) == 4


def test_what_cannot_be_compiled_is_refused(model):
    with pytest.raises(ValueError, match="compile must be True or one of default"):
        fewstep.sample(model, 1, compile="fast")
    mixture = exact.GaussianMixture([[1.0]], [0.3], [1.0], fewstep.schedule("vp-linear"))
    with pytest.raises(ValueError, match="this model has none"), compiled(mixture):
        pass


@pytest.mark.slow
def test_the_compiler_gives_the_same_samples_to_rounding(model):
    plain = fewstep.sample(model, 3, nfe=4)
    torch.testing.assert_close(fewstep.sample(model, 3, nfe=4, compile=True), plain)

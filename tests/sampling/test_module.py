"""Network and sampler as one graph: exported, it gives the samples of ``sample``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewstep
from fewstep.models.exact import smooth
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.module import SamplerModule, exported
from fewstep.sampling.sample import sampler

VP = fewstep.schedule("vp-linear")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.label = nn.Linear(3, 2), nn.Embedding(4, 2)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        return self.layer(torch.cat([x, t[:, None]], 1)) + self.label(class_labels)


def test_the_graph_gives_the_samples() -> None:
    model = fewstep.Denoiser.wrap(Network(), schedule=VP, prediction="v", event_shape=(2,))
    labels = torch.tensor([0, 1, 3])
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    expected = fewstep.sample(model, noise=noise, solver="unipc3", nfe=5, class_labels=labels)
    built = sampler(model, solver="unipc3", nfe=5)
    graph = exported(built, noise, class_labels=labels)
    with torch.no_grad():
        got = graph.module()(noise, class_labels=labels)
        other = graph.module()(2 * noise, class_labels=labels.flip(0))
    torch.testing.assert_close(got, expected)
    again = fewstep.sample(
        model, noise=2 * noise, solver="unipc3", nfe=5, class_labels=labels.flip(0)
    )
    torch.testing.assert_close(other, again)


def test_what_is_no_graph_is_said() -> None:
    model = smooth(VP)
    with pytest.raises(ValueError, match="ddpm draws noise"):
        SamplerModule(sampler(model, solver="ddpm", nfe=3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got AdaptiveSampler"):
        SamplerModule(AdaptiveSampler(model))  # type: ignore[arg-type]

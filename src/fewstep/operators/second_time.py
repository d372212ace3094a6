r"""The second time of flow maps and of frames: its embedding, added to the network's embedding of the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.models.networks.unet import SmallUNet
from fewstep.operators.insertion import Site, is_known

FREQUENCIES = 64
"""The frequencies of the embedding of each time."""

KNOWN = {"UNet2DModel": "time_embedding", "UNet2DConditionModel": "time_embedding"}
"""The module that embeds the time, by class of the network."""


class SecondTime(nn.Module):
    r"""Adds an embedding of two times to an embedding (B, C) of the first; zero at the start.

    .. math:: u + W_2 \, \mathrm{silu}(W_1 [\gamma(t), \gamma(s)])

    with sinusoids :math:`\gamma`. :math:`W_2` starts at zero, so the network starts as it was.

    Arguments:
        channels: The channels C of the embedding.
    """

    times: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4 * FREQUENCIES, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.times = None

    def forward(self, embedding: Tensor) -> Tensor:
        """Returns the embedding of both times.

        Raises:
            ValueError: If the two times of each row have not been set (``times``, shape (B, 2)).
        """
        if self.times is None or len(self.times) != len(embedding):
            raise ValueError(
                "the two times of the network are not set; evaluate it through its operator"
            )
        rate = torch.arange(FREQUENCIES, device=embedding.device) / FREQUENCIES
        angle = self.times[..., None] * torch.exp(-math.log(10_000.0) * rate)
        features = torch.cat([angle.cos(), angle.sin()], -1).flatten(1)
        return embedding + self.layers(features.to(embedding.dtype)).to(embedding.dtype)


def noise_angle(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns the noise level as an angle, from 0 for data to 1000 for noise."""
    return 1000 * torch.atan2(sigma, alpha) / (math.pi / 2)


def second_times(network: nn.Module) -> tuple[SecondTime, ...]:
    """Returns the blocks of a network; kept by operators, since compilation cannot search for them."""
    return tuple(module for module in network.modules() if isinstance(module, SecondTime))


def time_host(model: nn.Module) -> nn.Module | None:
    """Returns the first module of a model whose time embedding is known (:func:`time_sites`), or ``None``."""
    return next((module for module in model.modules() if is_known(module, time_sites)), None)


def time_sites(network: nn.Module) -> list[Site]:
    """Returns the module of a network that embeds the time, if it is known.

    Raises:
        ValueError: If it is not.
    """
    kind = type(network).__name__
    name = "embed_time" if isinstance(network, SmallUNet) else KNOWN.get(kind)
    if name is None:
        raise ValueError(
            f"the module that embeds the time in a {kind} is not known; name it: sites=[...]; its output "
            "has the shape (batch, channels) (see network.named_modules())"
        )
    layers = [m for m in network.get_submodule(name).modules() if isinstance(m, nn.Linear)]
    return [Site(name, layers[-1].out_features, dims=0)]

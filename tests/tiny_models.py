"""A model folder that is small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.diffusion.schedules import schedule
from fewstep.models.folder import write_model
from fewstep.models.networks.unet import SmallUNet


def write_tiny(folder: Path, *, classes: int | None = 3, size: int = 8, seed: int = 0) -> Path:
    """Writes a model of small grey images, with three classes more (without names) or none; returns its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallUNet(channels=[4, 8], blocks=[1, 1], attention=[1], num_classes=classes)
        for parameter in network.parameters():  # zero-initialised layers must have an effect
            torch.nn.init.normal_(parameter, std=0.1)
    return write_model(
        folder,
        network.state_dict(),
        network={"kind": "small-unet", **network.config},
        schedule=schedule("ddpm-linear"),
        prediction="v",
        event_shape=(1, size, size),
        class_names=["shirt", "shoe", "bag"][:classes] if classes in (1, 2, 3) else None,
    )

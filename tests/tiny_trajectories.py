"""A tiny teacher with a U-Net, and trajectories in memory, for the tests of operators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import fewstep
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.models.folder import FolderModel
from fewstep.models.networks.unet import SmallUNet


def teacher(prediction="v", classes=3, seed=0, schedule="vp-cosine", **network):
    """A class-conditional U-Net of 8x8 images whose every layer has weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"channels": [8, 8], "blocks": [1, 1], "attention": [1], **network}
        unet = SmallUNet(num_classes=classes, time_scale=1000.0, **options)
        for parameter in unet.parameters():
            if not parameter.any():  # layers that are silent at first
                torch.nn.init.normal_(parameter, std=0.1)
    return FolderModel(
        unet.eval().requires_grad_(False),
        schedule=fewstep.schedule(schedule),
        prediction=fewstep.Prediction.of(prediction),
        event_shape=(1, 8, 8),
        null_condition={"class_labels": classes},
    )


@dataclass
class Batch:
    states: torch.Tensor
    conditions: dict


@dataclass
class Memory:
    """Trajectories in memory, read as those of a store are."""

    times: torch.Tensor
    states: torch.Tensor
    conditions: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.states)

    def read(self, indices, *, frames=None):
        index = torch.as_tensor(list(indices))
        states = self.states[index].float()
        chosen = states if frames is None else states[:, list(frames)]
        return Batch(chosen, {k: v[index] for k, v in self.conditions.items()})


def record(model, n=24, steps=8, keep=4, seed=0):
    """Trajectories of DDIM on a uniform grid, every ``steps / keep`` steps."""
    labels = torch.arange(n) % 3
    noise = NoiseSource(seed, range(n)).draw(INITIAL, model.event_shape)
    path = fewstep.sample(
        model,
        noise=noise,
        solver="ddim",
        nfe=steps,
        grid="uniform",
        save="states",
        class_labels=labels,
    )
    stored = slice(0, None, steps // keep)
    settings = {"fingerprint": model.fingerprint()}
    return Memory(
        path.times[stored], path.states[stored].transpose(0, 1), {"class_labels": labels}, settings
    )

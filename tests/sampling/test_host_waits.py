"""The host never waits for the device between the first and the last evaluation of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewstep
from fewstep.diffusion import noise
from other_device import OTHER, Waits, on_other_device, other_device


class Network(nn.Module):
    def __init__(self, waits):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.waits = waits

    def forward(self, x, t):
        self.waits.events.append("network")
        return x * self.scale


@pytest.mark.parametrize("solver", ["ddim", "unipc3", "dpmpp-2m", "ddpm", "dpmpp-2m-sde"])
def test_no_wait_between_the_evaluations_of_a_batch(monkeypatch, solver):
    monkeypatch.setattr(noise, "PINNED", ("cuda", OTHER.type))
    monkeypatch.setattr(noise, "WORTHWHILE", 0.0)
    waits = Waits()
    model = fewstep.Denoiser.wrap(
        on_other_device(Network(waits)),
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="eps",
        event_shape=(3, 4, 4),
    )
    with other_device(), waits:
        fewstep.sample(model, 6, solver=solver, nfe=5, batch_size=2)
    batches = "".join({"network": "n", "read": "r", "write": "w"}[e] for e in waits.events)
    assert batches.count("n") == 15
    # Once a batch its samples are checked for NaN, which reads from the device.
    assert batches.replace("w", "") == "nnnnnr" * 3
    assert batches.count("w") <= 1  # the times of the plan, once
    assert waits.pinned >= 3

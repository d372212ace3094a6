"""The host never waits for the device between the first and the last evaluation of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fewstep
from fewstep.diffusion import noise
from other_device import OTHER, OtherTensor, on_other_device, other_device

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for a CUDA device: reads, and copies from pageable memory."""

    def __init__(self):
        super().__init__()
        self.events, self.pinned = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):  # there is no pinned memory without CUDA
            self.pinned += 1
            kwargs["pin_memory"] = False
        on_device = any(isinstance(a, OtherTensor) for a in tree_flatten((args, kwargs))[0])
        if func is aten._local_scalar_dense.default and on_device:
            self.events.append("read")
        elif func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else kwargs.get("device")
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            if isinstance(source, OtherTensor) and target not in (None, OTHER):
                self.events.append("read")
            elif not isinstance(source, OtherTensor) and target == OTHER and waits:
                self.events.append("write")
        return func(*args, **kwargs)


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

"""Devices by name."""

from __future__ import annotations

import logging

import pytest
import torch

from fewstep.base.devices import find_device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_the_best_that_is_there(monkeypatch, caplog, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    with caplog.at_level(logging.INFO, "fewstep"):
        assert find_device("auto") == torch.device(expected)
    assert caplog.messages == [f"auto chose the device {expected}"]


def test_a_device_of_torch_is_itself():
    assert find_device(torch.device("cpu")) == find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["quantum", "cuda:99", "meta", "", 1.5])
def test_other_devices_are_refused(name):
    with pytest.raises(ValueError, match="'cpu' always works"):
        find_device(name)

"""Shared fixtures: one thread, and the schedules built once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fewstep.schedules import NoiseSchedule, schedule


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, and results should not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vp() -> NoiseSchedule:
    return schedule("vp-linear")


@pytest.fixture(scope="session")
def ddpm() -> NoiseSchedule:
    return schedule("ddpm-linear")


@pytest.fixture
def quiet_diffusers() -> None:
    """Its logger writes advice to the error stream."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()

"""The teacher and its trajectories, once a module."""

from __future__ import annotations

import pytest

from tiny_trajectories import record, teacher


@pytest.fixture(scope="module")
def model():
    return teacher()


@pytest.fixture(scope="module")
def store(model):
    return record(model)

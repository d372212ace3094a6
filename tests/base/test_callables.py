"""What a user's callable is known by."""

import functools

import torch

from fewstep.base.callables import callable_digest

GOAL = torch.zeros(3)


def nearness(x):
    return -(x - GOAL).square().sum(1)


def scaled(scale):
    return lambda x: scale * nearness(x)


class Scaled:
    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def __call__(self, x):
        return self.scale * x


def test_the_same_callable_made_twice_is_the_same():
    for make in (lambda: scaled(2.0), lambda: Scaled(2), lambda: functools.partial(nearness, x=1)):
        assert callable_digest(make()) == callable_digest(make())
    assert callable_digest(torch.relu) == callable_digest(torch.relu)


def test_code_closures_attributes_and_weights_tell_callables_apart(monkeypatch):
    linear, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    different = [
        scaled(1.0), scaled(2.0), Scaled(1), Scaled(2), Scaled(1).__call__, linear, other,
        functools.partial(nearness, x=1), functools.partial(nearness, x=2), nearness,
        lambda x: x + 1, lambda x: x - 1, lambda x, y=1: x + y, lambda x, y=2: x + y, torch.relu, abs,
    ]  # fmt: skip
    assert len({callable_digest(value) for value in different}) == len(different)
    before = callable_digest(scaled(1.0))
    monkeypatch.setitem(globals(), "GOAL", torch.ones(3))  # two functions further in
    assert callable_digest(scaled(1.0)) != before

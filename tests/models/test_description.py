"""What a user says of a network is checked when it is wrapped; what a network does to memory is seen."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import fewstep
from fewstep.models.conditions import ARGUMENTS

SCHEDULE = fewstep.schedule("ddpm-linear")
MULTISTEP = ("tab3", "logrhoab2", "ipndm", "heun", "dpm3", "rho-rk4")


def network(x, t, **conditions):
    return torch.tanh(x) / 2


def wrap(network, **arguments) -> fewstep.Denoiser:
    options: dict[str, Any] = {
        "schedule": SCHEDULE,
        "prediction": "eps",
        "event_shape": (3,),
        **arguments,
    }
    return fewstep.Denoiser.wrap(network, **options)


def draw(network, solver="tab3", **arguments):
    nfe = {"heun": 7, "dpm3": 6, "rho-rk4": 8}.get(solver, 6)
    return fewstep.sample(wrap(network), 4, solver=solver, nfe=nfe, **arguments)


@pytest.mark.parametrize("shape", [3, "abc", (0,), (-1,), (3.0,), (True,), ("3",), (2, None)])
def test_shapes_that_no_sample_has_are_refused(shape):
    with pytest.raises(ValueError, match="event_shape must be a sequence of positive integers"):
        wrap(network, event_shape=shape)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"data_std": -1.0}, "data_std must not be negative, got -1"),
        ({"data_std": torch.tensor([1.0, -2.0, 1.0])}, "got -2"),
        ({"data_std": float("nan")}, "data_std must be finite"),
        ({"data_mean": float("inf")}, "data_mean must be finite"),
        ({"data_mean": torch.zeros(7)}, r"data_mean has the shape \(7,\)"),
        ({"data_std": torch.ones(2, 3)}, r"data_std has the shape \(2, 3\)"),
        ({"data_mean": "0"}, "data_mean must be a number"),
        ({"data_mean": True}, "data_mean must be a number"),
    ],
)
def test_moments_that_no_data_have_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        wrap(network, **moments)


@pytest.mark.parametrize("value", [0, 0.5, torch.zeros(3), torch.zeros(1), [0.0, 0.1, 0.2]])
def test_moments_that_broadcast_are_accepted(value):
    wrap(network, data_mean=value, data_std=value)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (3, TypeError, "must be a function"),
        (lambda t: None, TypeError, "must return a tensor of times, got NoneType"),
        (lambda t: t.tolist(), TypeError, "got list"),
        (lambda t: t[:1], ValueError, r"with shape \(3,\), got \(1,\)"),
        (lambda t: t * float("nan"), ValueError, "must be finite"),
        (torch.log, ValueError, "must be finite"),  # the schedule's last time is 0
    ],
)
def test_maps_of_times_are_tried_before_any_evaluation(function, error, message):
    with pytest.raises(error, match=message):
        wrap(network, to_model_time=function)


@pytest.mark.parametrize("function", [lambda t: t / 1000, lambda t: t.long(), lambda t: t[0]])
def test_times_for_each_sample_or_for_all_are_accepted(function):
    assert draw(lambda x, t: x).shape == (4, 3)
    assert fewstep.sample(wrap(network, to_model_time=function), 2, nfe=4).shape == (2, 3)


class Module(nn.Module):
    def forward(self, x, t):
        return x


def test_classes_are_no_networks():
    with pytest.raises(TypeError, match=r"must be an instance, got the class Module"):
        wrap(Module)


@pytest.mark.parametrize("bad", [lambda: 1, lambda x: x, lambda x, *, time: x])
def test_what_takes_other_arguments_is_told_which(bad):
    with pytest.raises(ValueError, match=r"evaluated as network\(x, t, \*\*conditions\)"):
        draw(bad)


def test_null_conditions_are_names_with_values():
    with pytest.raises(TypeError, match="null_condition must map names"):
        wrap(network, null_condition=5)


def test_one_prediction_under_the_name_of_another_is_refused():
    with pytest.raises(
        ValueError, match=r"returned 'x0' alone.*predicting 'eps'.*prediction='x0'"
    ):
        draw(lambda x, t: {"x0": x})
    same = draw(lambda x, t: {"something": torch.tanh(x) / 2})
    torch.testing.assert_close(same, draw(network), rtol=0, atol=0)


def test_a_network_without_values_is_refused():
    linear = nn.Linear(3, 3, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        draw(lambda x, t: linear(x))


# Memory.


def reusing():
    """A network that returns each output in the same memory, as a CUDA graph does."""
    buffer = torch.empty(4, 3)

    def evaluate(x, t):
        return buffer.copy_(network(x, t))

    return evaluate


@pytest.mark.parametrize("solver", MULTISTEP)
def test_an_output_that_overwrites_one_still_needed_is_refused(solver):
    with pytest.raises(ValueError, match=r"evaluation 2: .* static output buffer .* output.clone"):
        draw(reusing(), solver)


@pytest.mark.parametrize("solver", ["ddim", "dpm2"])
def test_an_output_that_overwrites_one_no_more_needed_is_right(solver):
    torch.testing.assert_close(draw(reusing(), solver), draw(network, solver), rtol=0, atol=0)


def test_adaptive_steps_keep_copies_of_outputs():
    got, right = (
        fewstep.sample(wrap(f), 4, solver="dopri5", options={"rtol": 1e-3, "atol": 1e-3})
        for f in (reusing(), network)
    )
    torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_outputs_in_the_same_memory_that_is_never_written_are_right():
    constant = torch.ones(4, 3)
    same = draw(lambda x, t: constant), draw(lambda x, t: constant.clone())
    torch.testing.assert_close(*same, rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["ddim", "tab3"])
def test_a_network_that_writes_to_its_input_is_refused(solver):
    with pytest.raises(ValueError, match=r"writes to its argument x in place.*x\.clone"):
        draw(lambda x, t: x.tanh_().div_(2), solver)


def test_a_network_may_write_to_a_cast_input_and_to_its_times():
    module = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.eye(3) / 2)
        module.bias.zero_()

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, t):
            t.mul_(0)
            return self.inner(x.tanh_())

    torch.testing.assert_close(draw(Writes()), draw(network), rtol=1e-6, atol=1e-5)


def test_times_given_in_double_precision_are_not_written_to():
    t = torch.tensor(500.0, dtype=torch.float64)
    x = torch.ones(1, 3, dtype=torch.float64)
    right = wrap(network)(x, t, prediction="x0")

    def writes(x, t):
        t.mul_(0)
        return network(x, t)

    torch.testing.assert_close(wrap(writes)(x, t, prediction="x0"), right, rtol=0, atol=0)
    assert t == 500


def test_inference_mode_counts_no_writes_but_copies():
    with torch.inference_mode():
        torch.testing.assert_close(
            draw(lambda x, t: x.tanh_().div_(2)), draw(network), rtol=0, atol=0
        )
        with pytest.raises(ValueError, match="static output buffer"):
            draw(reusing())


# Names.


@pytest.mark.parametrize("name", ["image", "noise", "guidance"])
def test_conditions_with_the_name_of_an_argument_are_refused(name):
    def optional(x, t, image=None, noise=None, guidance=None):
        return x

    given: Any = 2.0 if name == "guidance" else torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=f"'{name}' is a condition in the network's signature and"
    ):
        fewstep.sample(wrap(optional), 2, nfe=4, **{name: given})
    with pytest.raises(
        ValueError, match=f"'{name}' is a condition in the network's signature and"
    ):
        next(fewstep.steps(wrap(optional), 2, nfe=4, **{name: given}))
    assert fewstep.sample(wrap(optional), 2, nfe=4).shape == (2, 3)


def test_a_required_condition_that_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match=r"'image' is a condition .* another name"):
        fewstep.sample(wrap(lambda x, t, image: x), 2, nfe=4)


def test_names_of_arguments_are_those_of_sample():
    own = set(inspect.signature(fewstep.sample).parameters) - {"denoiser", "n", "cond", "guidance"}
    assert own <= ARGUMENTS | {"strength"}

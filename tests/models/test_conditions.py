"""Conditions: whatever a user writes becomes what the network takes, or is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep
from fewstep.models import exact
from fewstep.models.conditions import Conditions, joined, repeat, select

SCHEDULE = fewstep.schedule("vp-linear")


def network(x, t, class_labels=None, *, y=None, mask=None, frames=4, prompt=None, extra=None):
    return x


def denoiser(network=network, null=None, **options):
    return fewstep.Denoiser.wrap(
        network,
        schedule=SCHEDULE,
        prediction="eps",
        event_shape=(2,),
        null_condition=null,
        **options,
    )


def ready(n=3, null=None, num_classes=None, **cond):
    model = denoiser(null=null, num_classes=num_classes)
    return Conditions.of(model, n, cond).at(range(n))


INTEGERS = [
    [0, 1, 2],
    (0, 1, 2),
    range(3),
    np.arange(3),
    np.arange(3, dtype=np.uint8),
    np.arange(3)[::-1][::-1],
    torch.arange(3),
    [torch.tensor(0), torch.tensor(1), torch.tensor(2)],
    [np.int64(0), np.int32(1), 2],
]


@pytest.mark.parametrize("value", INTEGERS)
@pytest.mark.parametrize("name", ["class_labels", "y"])
@pytest.mark.parametrize("null", [None, {"class_labels": 10, "y": 10}])
def test_integers_become_a_tensor_of_labels(value, name, null):
    got = ready(null=null, **{name: value})[name]
    assert got.dtype == torch.int64
    assert got.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.array(3), torch.tensor(3), [3], np.array([3])]
)
@pytest.mark.parametrize("name", ["class_labels", "y"])
def test_one_label_is_for_all_samples(value, name):
    assert ready(**{name: value})[name].tolist() == [3, 3, 3]


def test_what_is_shared_stays_as_it_is():
    got = ready(frames=7, prompt="a cat", mask=None, extra=0.5)
    assert got == {"frames": 7, "prompt": "a cat", "mask": None, "extra": 0.5}


def test_a_text_with_a_null_condition_is_repeated():
    assert ready(null={"prompt": ""}, prompt="a cat")["prompt"] == ["a cat"] * 3
    assert ready(prompt=np.array(["a", "b", "c"]))["prompt"] == ["a", "b", "c"]


def test_none_is_no_condition_where_there_is_a_null_value():
    assert ready(null={"class_labels": 10}, class_labels=None) == {}


def test_floats_of_arrays_are_single_and_of_tensors_their_own():
    assert ready(mask=np.zeros((3, 4)))["mask"].dtype == torch.float32
    assert ready(mask=[0.5, 1, 2])["mask"].dtype == torch.float32
    assert ready(mask=torch.zeros(3, 4, dtype=torch.float64))["mask"].dtype == torch.float64
    assert ready(mask=np.zeros((3, 4), bool))["mask"].dtype == torch.bool


def test_nested_conditions_are_sliced_too():
    model = denoiser()
    extra = {"text": torch.arange(6.0).reshape(3, 2), "sizes": [[1, 2]]}
    got = Conditions.of(model, 3, {"extra": extra}).at([2, 0])["extra"]
    assert got["text"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert got["sizes"].tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize("rows", [range(1, 3), [2, 0], [1]])
def test_rows_are_those_of_the_samples(rows):
    cond = {"y": [5, 6, 7], "prompt": ["a", "b", "c"], "frames": 2}
    got = Conditions.of(denoiser(), 3, cond).at(rows)
    assert got["y"].tolist() == [[5, 6, 7][i] for i in rows]
    assert got["prompt"] == [["a", "b", "c"][i] for i in rows]
    assert got["frames"] == 2


def test_select_repeat_and_join():
    cond = ready(y=[5, 6, 7], prompt=["a", "b", "c"], frames=2)
    assert select(cond, torch.tensor([2, 1]))["y"].tolist() == [7, 6]
    assert repeat(cond, 2)["y"].tolist() == [5, 5, 6, 6, 7, 7]
    assert repeat(cond, 2)["prompt"] == ["a", "a", "b", "b", "c", "c"]
    both = joined(select(cond, range(1)), select(cond, [2]))
    assert (both["y"].tolist(), both["prompt"], both["frames"]) == ([5, 7], ["a", "c"], 2)


@pytest.mark.parametrize(
    ("cond", "error", "reason"),
    [
        (
            {"class_label": 3},
            ValueError,
            "no condition 'class_label'.*Did you mean 'class_labels'",
        ),
        ({"y": [1, 2]}, ValueError, "'y' has 2 values for 3 samples; give 1 or 3"),
        ({"y": []}, ValueError, "'y' has no values"),
        ({"mask": [[1, 2], [3]]}, ValueError, "rows of different shapes"),
        ({"mask": torch.zeros(3, dtype=torch.complex64)}, TypeError, "real numbers"),
        ({"mask": np.zeros(3, dtype=complex)}, TypeError, "real numbers"),
        ({"mask": 1j}, TypeError, "real numbers"),
        ({"y": [True, 1, 2]}, TypeError, "mixes flags and numbers"),
    ],
)
def test_what_does_not_fit_is_refused(cond, error, reason):
    with pytest.raises(error, match=reason):
        ready(**cond)


@pytest.mark.parametrize("name", ["class_labels", "y"])
@pytest.mark.parametrize("null", [{}, {"class_labels": 10, "y": 10}])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (11, "must be from 0 to 9.*got 11"),
        ([0, 1, 12], "must be from 0 to 9.*got 0 to 12"),
        (-1, "must be from 0 to 9.*got -1"),
        (1.0, "must be integers"),
        (True, "must be integers"),
        (np.zeros(3, bool), "must be integers"),
        ("cat", "must be integers"),
    ],
)
def test_labels_are_classes(name, null, value, reason):
    with pytest.raises(ValueError, match=reason):
        ready(null=null, num_classes=10, **{name: value})


def test_the_label_of_no_class_is_a_label():
    assert ready(null={"y": 10}, num_classes=10, y=10)["y"].tolist() == [10] * 3
    with pytest.raises(ValueError, match="from 0 to 9, got 10"):
        ready(num_classes=10, y=10)


def test_one_hot_labels_of_a_network_that_takes_them():
    hot = torch.nn.functional.one_hot(torch.arange(3), 10).float()
    assert torch.equal(ready(num_classes=10, class_labels=hot)["class_labels"], hot)


class Labelled(torch.nn.Module):
    num_classes = 4

    def forward(self, x, t, y):
        return x


def test_the_network_says_its_classes_and_what_it_needs():
    model = denoiser(Labelled())
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        fewstep.sample(model, 2, nfe=2, y=4)
    with pytest.raises(ValueError, match="needs the condition 'y'"):
        fewstep.sample(model, 2, nfe=2)


def test_an_exact_model_takes_none():
    with pytest.raises(ValueError, match="an exact model takes no conditions, got y; leave"):
        Conditions.of(exact.smooth(SCHEDULE), 2, {"y": 1})


def shifted(x, t, y):
    return 0.1 * x + y[:, None]


@pytest.mark.parametrize("value", INTEGERS)
def test_samples_do_not_depend_on_how_labels_are_written(value):
    model = denoiser(shifted, null={"y": 0})
    expected = fewstep.sample(model, 3, nfe=2, y=torch.arange(3), batch_size=2)
    assert torch.equal(fewstep.sample(model, 3, nfe=2, y=value, batch_size=2), expected)
    x = torch.ones(3, 2)
    assert torch.equal(model(x, 0.5, y=value), shifted(x, 0.5, torch.arange(3)))
    guided = fewstep.Guided(model, 2.0)
    assert torch.equal(guided(x, 0.5, y=value), shifted(x, 0.5, 2 * torch.arange(3)))


def test_conditions_go_to_the_device_of_the_model():
    model = denoiser(torch.nn.Linear(2, 2).to("meta"))
    model.accepts = fewstep.models.conditions.AcceptedConditions()
    got = Conditions.of(model, 2, {"y": [1, 2], "extra": {"a": np.zeros((2, 3))}}).at(range(2))
    assert got["y"].device.type == got["extra"]["a"].device.type == "meta"

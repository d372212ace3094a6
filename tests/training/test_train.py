"""Training: goes on bit for bit where it was, learns, and exports what load reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fewstep
from fewstep.base.files import read_json, read_tensors, write_json
from fewstep.diffusion.schedules import schedule_from_record
from fewstep.training.data import ImageData
from fewstep.training.train import TrainRecipe, _batch, train

RECIPE = TrainRecipe(
    network={"channels": [8, 8], "blocks": [1, 1], "attention": [1]},
    schedule={"name": "vp-linear"},
    steps=6,
    batch_size=4,
    warmup=2,
    precision="float32",
)


def images(classes=2, n=12):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % classes if classes else None
    return ImageData(pixels, labels, tuple(f"class {i}" for i in range(classes)) or None)


class Stop(Exception):
    pass


def stop_after(step):
    def told(event):
        if event.step == step:
            raise Stop

    return told


def test_goes_on_bit_for_bit(tmp_path):
    data = images()
    whole = train(data, tmp_path / "whole", RECIPE, checkpoint_every=2)
    with pytest.raises(Stop):
        train(data, tmp_path / "parts", RECIPE, checkpoint_every=2, on_step=stop_after(3))
    seen = []
    parts = train(data, tmp_path / "parts", RECIPE, checkpoint_every=2, on_step=seen.append)
    assert [event.step for event in seen] == [3, 4, 5, 6]
    for name in ("model.safetensors", "checkpoint.safetensors"):
        one, two = read_tensors(whole / name), read_tensors(parts / name)
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert read_json(whole / "model.json") == read_json(parts / "model.json")


def test_stopped_between_the_two_checkpoint_files(tmp_path):
    """The tensors are of step 4, the description still of step 2: the tensors count."""
    data = images()
    whole = train(data, tmp_path / "whole", RECIPE, checkpoint_every=2)
    with pytest.raises(Stop):
        train(data, tmp_path / "parts", RECIPE, checkpoint_every=2, on_step=stop_after(5))
    path = tmp_path / "parts" / "checkpoint.json"
    write_json(path, {**read_json(path), "step": 2})
    parts = train(data, tmp_path / "parts", RECIPE, checkpoint_every=2)
    one, two = (read_tensors(p / "model.safetensors") for p in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_recipe_in_the_folder_is_refused(tmp_path):
    data = images()
    with pytest.raises(Stop):
        train(data, tmp_path, RECIPE, checkpoint_every=1, on_step=stop_after(2))
    for change in ({"learning_rate": 1e-4}, {"seed": 1}, {"prediction": "eps"}):
        with pytest.raises(ValueError, match=r"a run of another recipe, at step [12]"):
            train(data, tmp_path, replace(RECIPE, **change))


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"recipe": 3, "step": 1}', b"\xff"])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    with pytest.raises(Stop):
        train(images(), tmp_path, RECIPE, checkpoint_every=1, on_step=stop_after(2))
    (tmp_path / "checkpoint.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint|training recipe"):
        train(images(), tmp_path, RECIPE)


def test_the_exported_model(tmp_path):
    data = images(classes=3)
    folder = train(data, tmp_path / "model", RECIPE)
    model = fewstep.load(folder)
    assert (model.native.value, model.event_shape) == ("v", (1, 8, 8))
    assert model.schedule == fewstep.schedule("vp-linear")
    assert model.class_names == ("class 0", "class 1", "class 2")
    assert model.null_condition == {"class_labels": 3}
    # Statistics for head starts, kept in half precision.
    pixels = data.floats().double()
    mean = torch.as_tensor(model.data_mean).double()
    std = torch.as_tensor(model.data_std).double()
    torch.testing.assert_close(mean, pixels.mean(0), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(std, pixels.std(0, unbiased=False), rtol=2e-3, atol=1e-3)
    out = fewstep.sample(model, 2, solver="ddim", nfe=2, class_labels=1, guidance=2.0)
    assert out.shape == (2, 1, 8, 8)
    half = fewstep.load(folder, dtype=torch.float64)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        half(x, 0.5), model(x, 0.5), rtol=1e-4, atol=1e-4
    )  # the same weights in another precision


def test_the_caller_s_generator_is_left_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(images(), tmp_path, replace(RECIPE, steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_dropped_at_the_asked_rate():
    data = ImageData(
        torch.zeros(4000, 1, 2, 2, dtype=torch.uint8), torch.zeros(4000, dtype=torch.int64)
    )
    recipe = replace(RECIPE, batch_size=4000, label_dropout=0.25)
    _, _, _, labels = _batch(data, schedule_from_record(recipe.schedule), recipe, 0, null=7)
    assert set(labels.tolist()) == {0, 7}
    rate = float((labels == 7).double().mean())
    assert abs(rate - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    _, _, _, labels = _batch(
        data, schedule_from_record(recipe.schedule), replace(recipe, label_dropout=0.0), 0, null=7
    )
    assert labels.tolist() == [0] * 4000


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_batch_is_the_forward_process(prediction):
    """x_t and the target determine x_0: alpha x - sigma v, and (x - sigma eps) / alpha."""
    data, recipe = images(), replace(RECIPE, prediction=prediction, batch_size=12)
    schedule = schedule_from_record(recipe.schedule)
    x, t, target, _ = _batch(data, schedule, recipe, 3, null=2)
    a, s = (f(t.double()).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x, target = x.double(), target.double()
    x0 = (x - s * target) / a if prediction == "eps" else a * x - s * target
    order = sorted(data.floats().flatten(1).tolist())
    # 1 / alpha is up to 152 at t = 1 and magnifies float32 rounding there.
    torch.testing.assert_close(
        torch.tensor(sorted(x0.flatten(1).tolist())), torch.tensor(order), rtol=1e-3, atol=1e-3
    )
    again = _batch(data, schedule, recipe, 3, null=2)
    assert torch.equal(again[0].double(), x)


@pytest.mark.slow
def test_learns_a_trivial_data_set(tmp_path):
    """One grey image: v is known from x alone, so the loss must fall well below its start."""
    data = ImageData(torch.full((8, 1, 8, 8), 200, dtype=torch.uint8))
    losses = []
    recipe = replace(RECIPE, steps=80, batch_size=8, learning_rate=5e-3, warmup=5, ema=0.9)
    train(data, tmp_path, recipe, on_step=lambda event: losses.append(event.loss))
    # The told loss is a running mean over about 100 steps, so half of it is a large fall.
    assert losses[-1] < 0.75 * losses[0]
    out = fewstep.sample(fewstep.load(tmp_path), 4, solver="ddim", nfe=10)
    assert float((out.mean() - (200 / 127.5 - 1)).abs()) < 0.25


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch_size": True}, "batch_size must be a positive integer"),
        ({"prediction": "x0"}, "prediction must be 'eps' or 'v'"),
        ({"precision": "float16"}, "precision must be"),
        ({"label_dropout": 1.5}, "label_dropout must be between 0 and 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a number that is not negative"),
        ({"learning_rate": "fast"}, "not complete"),
        ({"stepps": 3}, "has no 'stepps'"),
        ({"network": [1]}, "network and schedule"),
    ],
)
def test_recipes_are_checked(change, reason):
    content = {"network": {}, "schedule": {"name": "vp-linear"}, **change}
    with pytest.raises(ValueError, match=reason):
        TrainRecipe.from_json(json.loads(json.dumps(content)))
    with pytest.raises(ValueError, match="JSON object"):
        TrainRecipe.from_json([])


@pytest.mark.parametrize(
    ("network", "classes", "reason"),
    [
        ({"patch": 3}, 2, "patch 3 does not divide"),
        ({"patch": 0}, 2, "patch must be a positive integer"),
        ({"chanels": [8]}, 2, "chanels"),
        ({"channels": []}, 2, "one entry for each level"),
        ({"num_classes": 1}, 2, "1 classes, the images have 2"),
        ({"num_classes": 2}, 0, "2 classes, the images have none"),
        ({"in_channels": 3}, 2, "3 channels, the images have 1"),
    ],
)
def test_recipe_and_data_must_fit(tmp_path, network, classes, reason):
    recipe = replace(RECIPE, network={**RECIPE.network, **network})
    with pytest.raises(ValueError, match=reason):
        train(images(classes), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_cycle_makes_a_finished_run_longer(tmp_path):
    train(images(), tmp_path / "model", RECIPE)
    longer, steps = replace(RECIPE, steps=10, cycles=[6]), []
    told = lambda event: steps.append(event.step)  # noqa: E731
    train(images(), tmp_path / "model", longer, on_step=told)
    assert steps == [7, 8, 9, 10]
    # Another place of the first cycle's end would change the steps that are done.
    with pytest.raises(ValueError, match="another recipe"):
        train(images(), tmp_path / "model", replace(RECIPE, steps=14, cycles=[4]))


@pytest.mark.parametrize("cycles", [[6], [0], [3, 2], ["2"], 4])
def test_cycles_that_do_not_fit_are_refused(cycles):
    with pytest.raises(ValueError, match="cycles must"):
        replace(RECIPE, cycles=cycles)

"""Training: losses and targets are the formulas, runs resume bit for bit, load reads the result."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import fewstep
from fewstep.base.files import (
    read_json,
    read_tensors,
    read_tensors_and_metadata,
    write_json,
    write_tensors,
)
from fewstep.base.runs import locked
from fewstep.diffusion.schedules import schedule_from_record
from fewstep.models.preconditioning import Preconditioned
from fewstep.training.batches import Batches
from fewstep.training.data import ImageData, read_images
from fewstep.training.recipe import TrainRecipe, default_recipe, with_schedule
from fewstep.training.train import build_network, export_checkpoint, train
from stopping import Stopped, Stopping
from tiny_training import RECIPE, images

RECIPES = Path(__file__).parents[2] / "recipes"
EDM = {"schedule": {"name": "edm"}, "prediction": "x0", "preconditioning": "edm"}


def same_tensors(one, two):
    one, two = read_tensors(one), read_tensors(two)
    return set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def interrupted(data, folder, recipe, after):
    with pytest.raises(Stopped):
        train(data, folder, recipe, checkpoint_every=2, progress=Stopping(after, stage="training"))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prediction": "x0", "flip": True, "range": [-0.5, 0.5]},
        EDM,
    ],
    ids=["v", "x0", "edm"],
)
def test_a_resumed_run_is_bit_equal(tmp_path, change):
    data, recipe = images(), replace(RECIPE, **change)
    whole = train(data, tmp_path / "whole", recipe, checkpoint_every=2)
    interrupted(data, tmp_path / "parts", recipe, 3)
    follow = Stopping(stage="training")
    parts = train(data, tmp_path / "parts", recipe, checkpoint_every=2, progress=follow)
    assert follow.steps == [3, 4, 5, 6]
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert same_tensors(whole / name, parts / name)
    assert read_json(whole / "model.json") == read_json(parts / "model.json")


def test_a_run_is_not_resumed_with_other_images(tmp_path):
    data = images()
    interrupted(data, tmp_path, RECIPE, 3)
    pixels = data.images.clone()
    pixels[-1, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match=r"other inputs \(another images\), at step 2"):
        train(replace(data, images=pixels), tmp_path, RECIPE)
    train(data, tmp_path, RECIPE)


def test_two_runs_do_not_train_in_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is being written by another run"):
        train(images(), tmp_path, RECIPE)


def test_a_checkpoint_without_averages_is_refused(tmp_path):
    data = images()
    interrupted(data, tmp_path, RECIPE, 3)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_tensors_and_metadata(path)
    for prefix in ("average.", "optimizer."):
        some = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        write_tensors(path, some, metadata)
        with pytest.raises(ValueError, match=f"damaged: .*{prefix[:-1]}"):
            train(data, tmp_path, RECIPE)


def test_stopped_between_the_two_checkpoint_files(tmp_path):
    """The tensors are of step 4, the description still of step 2: the tensors count."""
    data = images()
    whole = train(data, tmp_path / "whole", RECIPE, checkpoint_every=2)
    interrupted(data, tmp_path / "parts", RECIPE, 5)
    path = tmp_path / "parts" / "checkpoint.json"
    write_json(path, {**read_json(path), "step": 2})
    parts = train(data, tmp_path / "parts", RECIPE, checkpoint_every=2)
    assert same_tensors(whole / "model.safetensors", parts / "model.safetensors")


def test_another_recipe_in_the_folder_is_refused(tmp_path):
    data = images()
    interrupted(data, tmp_path, RECIPE, 2)
    for change in ({"learning_rate": 1e-4}, {"seed": 1}, {"prediction": "eps"}, {"flip": True}):
        with pytest.raises(ValueError, match=r"a run of another recipe, at step 2"):
            train(data, tmp_path, replace(RECIPE, **change))


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"recipe": 3, "step": 1}', b"\xff"])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    interrupted(images(), tmp_path, RECIPE, 2)
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
    # Statistics for head starts, stored in half precision.
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


def batch_of(data, recipe, step=0, null=None):
    return Batches(data, recipe, null_label=null)(step)


def test_labels_are_dropped_at_the_requested_rate():
    data = ImageData(
        torch.zeros(4000, 1, 2, 2, dtype=torch.uint8), torch.zeros(4000, dtype=torch.int64)
    )
    recipe = replace(RECIPE, batch_size=4000, label_dropout=0.25)
    labels = batch_of(data, recipe, null=7).labels
    assert set(labels.tolist()) == {0, 7}
    rate = float((labels == 7).double().mean())
    assert abs(rate - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert batch_of(data, replace(recipe, label_dropout=0.0), null=7).labels.tolist() == [0] * 4000
    assert batch_of(data, recipe).labels is None


SCHEDULES = [{"name": "vp-linear"}, {"name": "ddpm-cosine", "levels": 300}, {"name": "flow"}]


@pytest.mark.parametrize("noise", SCHEDULES, ids=lambda noise: noise["name"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_a_batch_is_the_forward_process(prediction, noise):
    """State and target are two combinations of x_0 and the noise: what they give are the images."""
    data = images()
    recipe = replace(RECIPE, prediction=prediction, schedule=noise, batch_size=12)
    schedule = schedule_from_record(noise)
    batch = batch_of(data, recipe, 3, null=2)
    t = batch.t.double()
    a, s = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x, target = batch.x.double(), batch.target.double()
    x0 = {
        "eps": lambda: (x - s * target) / a,
        "x0": lambda: target,
        "v": lambda: (a * x - s * target) / (a * a + s * s),
        "flow": lambda: (x - s * target) / (a + s),
    }[prediction]()
    # Division by a small alpha magnifies the rounding of float32.
    known = (a > 0.02).flatten()
    expected = data.floats()[Batches(data, recipe)._index(3)].double()
    torch.testing.assert_close(x0[known], expected[known], rtol=1e-3, atol=1e-3)
    weight = (a / s).square().clamp(min=1) if prediction == "x0" else torch.ones_like(a)
    given = torch.ones_like(a) if batch.weight is None else batch.weight.double()
    torch.testing.assert_close(given, weight, rtol=2e-3, atol=0)
    assert torch.equal(batch_of(data, recipe, 3, null=2).x, batch.x)


@pytest.mark.parametrize("name", ["edm", "ve"])
def test_edm_targets_are_what_the_preconditioned_denoiser_needs(name):
    """A raw network that returns the target makes the denoiser return the clean images."""
    data = images()
    recipe = TrainRecipe(
        network={},
        schedule={"name": name},
        prediction="x0",
        preconditioning="edm",
        sigma_data=0.7,
        batch_size=12,
        uniform_times=0.0,
        density="log-normal",
    )
    batch = batch_of(data, recipe)
    sigma = (4 * batch.t.double()).exp()
    x = batch.x.double() * (sigma.square() + 0.7**2).sqrt().reshape(-1, 1, 1, 1)
    denoiser = Preconditioned(lambda x, c: batch.target.double(), sigma_data=0.7)
    expected = data.floats()[Batches(data, recipe)._index(0)].double()
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-3, atol=2e-3)


def test_edm_noise_levels_are_log_normal():
    data = ImageData(torch.zeros(4000, 1, 2, 2, dtype=torch.uint8))
    options = {"schedule": {"name": "edm"}, "density": "log-normal", "uniform_times": 0.0}
    logs = batch_of(data, replace(RECIPE, batch_size=4000, **options)).t.log()
    assert abs(float(logs.mean()) + 1.2) < 0.01
    assert abs(float(logs.std()) - 1.2) < 0.01


@pytest.mark.parametrize(("prediction", "expected"), [("eps", 1.0), ("v", None), ("flow", 1.25)])
def test_the_loss_of_a_network_that_returns_zero(prediction, expected):
    """Data -1/2 or 1/2: E eps^2 = 1; E v^2 = alpha^2 + sigma^2 / 4; E (eps - x_0)^2 = 5/4."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(4000).reshape(2000, 1, 2, 2)
    recipe = replace(RECIPE, prediction=prediction, batch_size=2000, range=[-0.5, 0.5])
    batch = batch_of(ImageData(pixels), recipe)
    if expected is None:
        schedule, t = schedule_from_record(recipe.schedule), batch.t.double()
        expected = float((schedule.alpha(t).square() + schedule.sigma(t).square() / 4).mean())
    loss = float(batch.loss(torch.zeros_like(batch.x)))
    assert abs(loss - expected) < 5 * (2 / 8000) ** 0.5


def test_flips_mirror_half_of_the_images_and_change_nothing_else():
    pixels = torch.zeros(1000, 1, 1, 2, dtype=torch.uint8)
    pixels[..., 0] = 255
    recipe = replace(RECIPE, batch_size=1000, prediction="x0")
    plain, flipped = (batch_of(ImageData(pixels), replace(recipe, flip=f)) for f in (False, True))
    left = flipped.target[:, 0, 0, 0] > 0
    assert abs(float(left.double().mean()) - 0.5) < 4 * 0.5 / 1000**0.5
    assert torch.equal(flipped.target[left], plain.target[left])
    assert torch.equal(flipped.target[~left], plain.target[~left].flip(-1))
    assert torch.equal(flipped.t, plain.t)
    mean, std = Batches(ImageData(pixels), replace(recipe, flip=True)).statistics()
    assert mean.tolist() == [[[0.0, 0.0]]]
    assert std.tolist() == [[[1.0, 1.0]]]


def test_data_range_and_measured_sigma_data(tmp_path):
    data = images(classes=0)
    recipe = replace(RECIPE, range=[-0.5, 0.5], steps=1, **EDM)
    scaled = data.floats().double() / 2
    about = read_json(train(data, tmp_path, recipe) / "model.json")
    measured = about["preconditioning"]["sigma_data"]
    assert measured == pytest.approx(float(scaled.std(unbiased=False)), rel=1e-6)
    model = fewstep.load(tmp_path)
    assert model.data_range == (-0.5, 0.5)
    images_shown = model.decode(data.floats(data_range=model.data_range))
    torch.testing.assert_close(images_shown, data.floats(), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.data_mean.double(), scaled.mean(0), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["edm", "ve"])
def test_a_preconditioned_model_loads_as_its_denoiser(tmp_path, name):
    """What load gives is c_skip x + c_out F(c_in x, c_noise), with the raw network of the folder."""
    recipe = replace(RECIPE, **{**EDM, "schedule": {"name": name}}, sigma_data=0.5, steps=2)
    model = fewstep.load(train(images(3), tmp_path, recipe))
    raw, labels = model.network.network, torch.tensor([0, 2])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    sigma = model.schedule.sigma(t.double()).float().reshape(-1, 1, 1, 1)
    size = (sigma**2 + 0.25).sqrt()
    output = raw(x / size, sigma.flatten().log() / 4, labels)
    expected = 0.25 / size**2 * x + 0.5 * sigma / size * output
    got = model(x, t, prediction="x0", class_labels=labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert model.null_condition == {"class_labels": 3}
    assert fewstep.sample(model, 2, nfe=3, class_labels=1, guidance=2.0).isfinite().all()
    with pytest.raises(ValueError, match="no condition 'prompt'"):
        fewstep.sample(model, 2, nfe=3, prompt="a shoe")


def test_an_unfinished_run_is_exported(tmp_path):
    """The average of its checkpoint; the run itself is left as it is."""
    data = images()
    interrupted(data, tmp_path / "run", RECIPE, 5)
    folder = export_checkpoint(data, tmp_path / "run", tmp_path / "out")
    average = read_tensors(tmp_path / "run" / "checkpoint.safetensors")["average.conv_in.weight"]
    weights = read_tensors(folder / "model.safetensors")["conv_in.weight"]
    assert torch.equal(weights, average.half())
    about = read_json(folder / "model.json")["training"]
    assert (about["step"], about["recipe"]["steps"]) == (4, 6)
    fewstep.load(folder)
    assert not (tmp_path / "run" / "model.json").exists()
    with pytest.raises(ValueError, match="has no checkpoint"):
        export_checkpoint(data, tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="another folder"):
        export_checkpoint(data, tmp_path / "run", tmp_path / "run")


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    recipe = replace(RECIPE, learning_rate=1e30, warmup=0, clip=1e30, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"the loss is \S+ at step \d; lower learning_rate"):
        train(images(), tmp_path, recipe)
    assert not (tmp_path / "model.json").exists()


@pytest.mark.slow
def test_learns_a_trivial_data_set(tmp_path):
    """One grey image: v is known from x alone, so the loss must fall well below its start."""
    data = ImageData(torch.full((8, 1, 8, 8), 200, dtype=torch.uint8))
    follow = Stopping(stage="training")
    recipe = replace(RECIPE, steps=80, batch_size=8, learning_rate=5e-3, warmup=5, ema=0.9)
    train(data, tmp_path, recipe, progress=follow)
    losses = [float(note.removeprefix("loss ")) for note in follow.notes]
    # The reported loss is a running mean over about 100 steps, so a quarter is a large fall.
    assert losses[-1] < 0.75 * losses[0]
    out = fewstep.sample(fewstep.load(tmp_path), 4, solver="ddim", nfe=10)
    assert float((out.mean() - (200 / 127.5 - 1)).abs()) < 0.25


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch_size": True}, "batch_size must be a positive integer"),
        ({"prediction": "score"}, "prediction must be 'eps', 'x0', 'v' or 'flow'"),
        ({"density": "uniform"}, "density must be 'cosine' or 'log-normal'"),
        ({"flip": "yes"}, "flip must be True or False"),
        ({"range": [1, 1]}, "range must be two finite numbers"),
        ({"range": 0.5}, "range must be two finite numbers"),
        ({"sigma_data": 0.5}, "sigma_data belongs to preconditioning"),
        ({"preconditioning": "vp"}, "preconditioning must be None or 'edm'"),
        ({"preconditioning": "edm"}, "predicts 'x0'"),
        ({"preconditioning": "edm", "prediction": "x0"}, "needs the schedule 'edm' or 've'"),
        (
            {**EDM, "sigma_data": 0},
            "sigma_data must be a positive number",
        ),
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
        TrainRecipe.from_record(json.loads(json.dumps(content)))
    with pytest.raises(ValueError, match="JSON object"):
        TrainRecipe.from_record([])


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
    longer, follow = replace(RECIPE, steps=10, cycles=[6]), Stopping(stage="training")
    train(images(), tmp_path / "model", longer, progress=follow)
    assert follow.steps == [7, 8, 9, 10]
    # Another place of the first cycle's end would change the steps that are done.
    with pytest.raises(ValueError, match="another recipe"):
        train(images(), tmp_path / "model", replace(RECIPE, steps=14, cycles=[4]))


@pytest.mark.parametrize("cycles", [[6], [0], [3, 2], ["2"], 4])
def test_cycles_that_do_not_fit_are_refused(cycles):
    with pytest.raises(ValueError, match="cycles must"):
        replace(RECIPE, cycles=cycles)


def test_another_schedule_brings_what_is_usual_for_it():
    edm = with_schedule(RECIPE, {"name": "edm", "sigma_max": 20.0})
    assert (edm.prediction, edm.preconditioning, edm.density) == ("x0", "edm", "log-normal")
    assert edm.uniform_times == 0
    raw = with_schedule(edm, {"name": "edm"}, prediction="eps")
    assert (raw.prediction, raw.preconditioning) == ("eps", None)
    flow = with_schedule(RECIPE, {"name": "flow"})
    assert (flow.prediction, flow.preconditioning, flow.uniform_times) == ("flow", None, 1.0)
    assert with_schedule(RECIPE, {"name": "vp-cosine"}).prediction == "v"
    with pytest.raises(ValueError, match="schedule"):
        with_schedule(RECIPE, {"name": "edn"})


def test_default_recipe_suits_the_images():
    def network(*shape, labels=False):
        pixels = torch.zeros(4, *shape, dtype=torch.uint8)
        data = ImageData(pixels, torch.arange(4) if labels else None)
        return default_recipe(data, device="cpu").network

    fashion = read_json(RECIPES / "fashion.json")["network"]
    assert network(1, 28, 28, labels=True) == {**fashion, "num_classes": 4}
    assert network(3, 27, 27)["patch"] == 1
    assert network(3, 64, 64)["channels"] == [64, 128, 128]
    assert network(3, 64, 64)["num_classes"] is None


def test_every_committed_training_recipe_is_valid():
    for file in (RECIPES / "fashion.json", *RECIPES.glob("zoo-*.json")):
        recipe = TrainRecipe.from_record(read_json(file))
        recipe.noise_schedule()


def test_a_live_run_is_not_deleted_by_another(tmp_path):
    interrupted(images(), tmp_path, RECIPE, 3)
    before = read_json(tmp_path / "checkpoint.json")
    with locked(tmp_path), pytest.raises(ValueError, match="is being written by another run"):
        train(images(), tmp_path, replace(RECIPE, seed=1), overwrite=True)
    assert read_json(tmp_path / "checkpoint.json") == before
    train(images(), tmp_path, replace(RECIPE, seed=1), overwrite=True)
    assert read_json(tmp_path / "checkpoint.json")["recipe"]["seed"] == 1


def test_a_run_that_another_finished_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Its folder is looked at when it is locked, not before."""

    def other_first(*arguments):
        monkeypatch.undo()
        train(images(), tmp_path, replace(RECIPE, seed=1))
        return build_network(*arguments)

    monkeypatch.setattr("fewstep.training.train.build_network", other_first)
    with pytest.raises(ValueError, match=r"another recipe, at step 6 \(seed 1, now 0\)"):
        train(images(), tmp_path, RECIPE)


def test_the_image_that_changed_is_named(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(images().images):
        Image.fromarray(pixels[0].numpy()).save(folder / f"{i}.bmp")
    interrupted(read_images(folder), tmp_path / "run", RECIPE, 3)
    about = (folder / "3.bmp").stat()
    Image.new("L", (8, 8)).save(folder / "3.bmp")
    os.utime(folder / "3.bmp", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (folder / "3.bmp").stat().st_size == about.st_size
    with pytest.raises(ValueError, match=r"\(images: the file '3.bmp' has changed\), at step 2"):
        train(folder, tmp_path / "run", RECIPE)


def test_a_second_signal_does_not_stop_the_last_checkpoint(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        write = os.replace

        def disturbed(*names):
            os.kill(os.getpid(), signal.SIGTERM)
            write(*names)

        class Disturbed(Stopping):
            def tick(self, amount=1, note=""):
                super().tick(amount, note)
                if len(self.steps) == 3:
                    monkeypatch.setattr(os, "replace", disturbed)
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(
                images(),
                tmp_path,
                RECIPE,
                checkpoint_every=100,
                progress=Disturbed(stage="training"),
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert read_json(tmp_path / "checkpoint.json")["step"] == 3
    follow = Stopping(stage="training")
    train(images(), tmp_path, RECIPE, progress=follow)
    assert follow.steps == [4, 5, 6]

"""Training of operators: the loss, that it learns, resumed runs bit for bit, and the files."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.base.files import read_json, read_tensors, write_json
from fewstep.operators import DistillRecipe, flops, loss_weights
from fewstep.operators.distillation import distill
from fewstep.operators.losses import L1, LOSSES, FeatureLoss, Loss, ModelFeatures, loss_of
from fewstep.operators.students import STUDENTS, Student, make_student, select_frames
from stopping import Stopped, Stopping
from tiny_trajectories import Memory, record, teacher

pytest.importorskip("accelerate")

SHORT = {"steps": 6, "batch_size": 4, "warmup": 2, "learning_rate": 1e-3}


def test_weights_of_the_published_schedule():
    """The table of the paper's settings: cosine schedule, quadratic grid of four frames."""
    schedule = fewstep.schedule("vp-cosine", s=0.0)
    result = loss_weights(schedule, [0.5625, 0.25, 0.0625, 0.0])
    torch.testing.assert_close(
        result, torch.tensor([1.0, 2.414, 10.153, 1e4]).double(), rtol=1e-3, atol=0
    )
    result = loss_weights(schedule, [0.75, 0.5, 0.25, 0.0], lambda_max=20.0)
    torch.testing.assert_close(
        result, torch.tensor([1.0, 1.0, 2.414, 20.0]).double(), rtol=1e-3, atol=0
    )
    assert loss_weights(schedule, [0.5, 0.0], "uniform").tolist() == [1, 1]
    assert loss_weights(schedule, [0.5, 0.0], [0.2, 3.0]).tolist() == [0.2, 3.0]


@pytest.mark.parametrize(
    ("weights", "cap", "message"),
    [
        ([1.0], 1e4, "2 frames but 1 weights"),
        ([1.0, -1.0], 1e4, "not negative"),
        ("snr", 0.5, "lambda_max must be at least 1"),
        ("snrr", 1e4, "Did you mean 'snr'"),
    ],
)
def test_weights_that_are_refused(weights, cap, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(fewstep.schedule("vp-cosine"), [0.5, 0.1], weights, lambda_max=cap)


def test_frames_are_the_stored_times():
    stored = [1.0, 0.9, 0.5, 0.3, 0.2, 0.1, 0.0]
    pick = lambda **change: select_frames(stored, DistillRecipe(**change))  # noqa: E731
    assert pick(frames=3) == [2, 4, 6]
    assert pick(frames=6) == [1, 2, 3, 4, 5, 6]
    assert pick(times=[0.9, 0.2, 0.0]) == [1, 4, 6]  # not symmetric about the middle
    assert pick(mode="endpoint") == [6]
    assert pick(mode="endpoint", times=[0.2]) == [4]
    with pytest.raises(ValueError, match=r"0\.4 is not stored; the stored times are 0\.9, 0\.5"):
        pick(times=[0.4, 0.0])
    with pytest.raises(ValueError, match="must decrease"):
        pick(times=[0.0, 0.9])
    with pytest.raises(ValueError, match="7 frames are requested, but 6"):
        pick(frames=7)


def test_the_loss_is_the_weighted_mean_over_frames(model, store, tmp_path):
    """The first row of the log, before the student has moved, against the formula by hand."""
    weights = [1.0, 2.0, 3.0, 6.0]
    distill(
        model, store, tmp_path, mode="folded", weights=weights, loss="l2",
        learning_rate=0.0, steps=1, batch_size=22, heldout=2,
    )  # fmt: skip
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    student = make_student(model, DistillRecipe(mode="folded"), store.times.tolist())
    with torch.no_grad():
        states = student(store.states[:22, 0], class_labels=store.conditions["class_labels"][:22])
    each = (states - store.states[:22, 1:]).square().flatten(2).mean((0, 2))
    torch.testing.assert_close(torch.tensor(row["losses"]), each, rtol=1e-4, atol=1e-6)
    expected = float((each * torch.tensor(weights)).mean() / 3)  # weights of mean 1
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    last = (student_last(student, store, range(22, 24)) - store.states[22:, -1]).square().mean()
    assert row["heldout"][-1] == pytest.approx(float(last) ** 0.5, rel=1e-4)


def student_last(student, store, rows):
    index = torch.as_tensor(list(rows))
    cond = {k: v[index] for k, v in store.conditions.items()}
    with torch.no_grad():
        return student(store.states[index, 0], **cond)[:, -1]


@pytest.mark.parametrize("mode", ["dsno", "folded", "endpoint"])
def test_learns(mode, model, store, tmp_path):
    made = distill(
        model, store, tmp_path, mode=mode, steps=20, batch_size=11, learning_rate=2e-2,
        warmup=2, ema=0.7, lambda_max=10.0, checkpoint_every=20, heldout=2,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    cond = {"class_labels": store.conditions["class_labels"][:8]}
    noise = store.states[:8, 0] / float(model.schedule.prior_std())
    target, before = (
        store.states[:8, -1],
        student_last(
            make_student(model, DistillRecipe(mode=mode), store.times.tolist()), store, range(8)
        ),
    )
    after = fewstep.sample(made, noise=noise, **cond)
    assert float((after - target).square().mean()) < 0.95 * float(
        (before - target).square().mean()
    )


@pytest.mark.parametrize(
    "change",
    [{"mode": "dsno"}, {"mode": "endpoint", "accumulate": 2, "precision": "bfloat16"}],
)
def test_a_run_is_resumed_bit_for_bit(change, model, store, tmp_path):
    settings = {**SHORT, **change, "checkpoint_every": 2}
    distill(model, store, tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        distill(
            model, store, tmp_path / "parts", progress=Stopping(5, stage="distilling"), **settings
        )
    steps = Stopping(stage="distilling")
    distill(model, store, tmp_path / "parts", progress=steps, **settings)
    assert steps.steps == [5, 6]
    for name in ("operator.safetensors", "checkpoint.safetensors"):
        one, two = (read_tensors(tmp_path / part / name) for part in ("whole", "parts"))
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)
    for name in ("operator.json", "log.jsonl", "checkpoint.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()


@pytest.mark.parametrize(
    ("mode", "labels", "expected"),
    [
        ("dsno", "auto", "both"),
        ("folded", "auto", "both"),
        ("dsno", "target", "target"),
        ("endpoint", "auto", "start"),
        ("endpoint", "target", "target"),
        ("flow-map", "auto", "start"),
    ],
)
def test_labels_of_a_student(mode, labels, expected, model, store):
    recipe = DistillRecipe(mode=mode, labels=labels)
    assert make_student(model, recipe, store.times.tolist()).layout.labels == expected


@pytest.mark.parametrize("mode", ["dsno", "folded"])
def test_untrained_frames_are_steps_of_ddim(mode, model, store):
    """With the label of the input every frame starts as one step of DDIM from it."""
    times = store.times.tolist()
    student = make_student(model, DistillRecipe(mode=mode), times)
    x = store.states[:3, 0]
    states = student(x, class_labels=torch.tensor([0, 1, 2]))
    alpha, sigma = model.schedule.scales(store.times)
    label = model.schedule.t_max
    t = torch.full((3,), float(label))
    v = model.raw(x, t, class_labels=torch.tensor([0, 1, 2]))
    data = alpha[0] * x - sigma[0] * v  # a v-network on a variance-preserving schedule
    noise = (x - alpha[0] * data) / sigma[0]
    for k in range(student.frames):
        expected = alpha[k + 1] * data + sigma[k + 1] * noise
        torch.testing.assert_close(states[:, k], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "dsno", "labels": "start"}, "all have the label start are the same"),
        ({"mode": "endpoint", "labels": "both"}, "labels are start or target"),
        ({"mode": "flow-map", "labels": "target"}, "has its own"),
        ({"labels": "targets"}, "Did you mean 'target'"),
    ],
)
def test_labels_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DistillRecipe(**change)


def flow_of_patterns(model, n=192, std=0.5):
    """Trajectories in closed form: a class has a pattern, around which its data are Gaussian."""
    schedule, generator = model.schedule, torch.Generator().manual_seed(0)
    times = torch.linspace(1, 0, 9, dtype=torch.float64) * schedule.t_max
    times[-1] = schedule.t_min
    alpha, sigma = schedule.scales(times)
    labels = torch.arange(n) % 3
    mean = torch.randn(3, 1, 8, 8, generator=generator).double()[labels]
    x = torch.randn(n, 1, 8, 8, generator=generator).double() * sigma[0]
    width = torch.sqrt((alpha * std).square() + sigma.square())
    states = [alpha[k] * mean + width[k] / width[0] * (x - alpha[0] * mean) for k in range(9)]
    settings = {"fingerprint": model.fingerprint()}
    return Memory(times, torch.stack(states, 1).float(), {"class_labels": labels}, settings)


@pytest.mark.slow
def test_drawn_frames_make_the_error_independent_of_their_number(model, tmp_path):
    """Published labels, error of the sample at 2, 4 and 8 frames: within 3 % of each other; with 4 fixed frames it is not."""
    store, worst = flow_of_patterns(model), {}
    for drawn in ("auto", "fixed"):
        student = distill(
            model, store, tmp_path / drawn, mode="dsno", labels="target", drawn=drawn, steps=100,
            batch_size=8, learning_rate=1e-2, warmup=10, ema=0.97, lambda_max=10.0, heldout=16,
            checkpoint_every=100,
        )  # fmt: skip
        rows, found = range(len(store) - 16, len(store)), []
        for frames in (2, 4, 8):
            index = [round(k * 8 / frames) for k in range(1, frames + 1)]
            student.operator.set_times(store.times[index].tolist())
            last = student_last(student.operator, store, rows) - store.states[rows.start :, -1]
            found.append(float(last.square().mean().sqrt()))
        assert max(found) < 0.15  # of a spread of 1.1: it has learned
        worst[drawn] = max(found) / min(found)
    assert worst["auto"] < 1.03 < 1.06 < worst["fixed"]


def test_frames_are_drawn_from_an_address(model, store):
    from fewstep.operators.objectives import FrameObjective

    stored = [1.0 - k / 10 for k in range(10)]
    make = lambda **change: FrameObjective(  # noqa: E731
        make_student(model, DistillRecipe(frames=3, **change), [1.0, 0.9, 0.5, 0.05]),
        DistillRecipe(frames=3, **change), L1(), stored, [3, 6, 9],
    )  # fmt: skip
    drawn_by = lambda objective: [objective.drawn(part) for part in range(200)]  # noqa: E731
    drawn = drawn_by(make())
    assert {len(frames) for frames in drawn} == set(range(1, 5))
    assert all(frames == sorted(set(frames)) and frames[-1] == 9 for frames in drawn)
    assert {k for frames in drawn for k in frames} == set(range(1, 10))
    assert drawn_by(make()) == drawn
    assert drawn_by(make(seed=1)) != drawn
    few = make(drawn=[1, 2])
    assert {len(few.drawn(part)) for part in range(50)} == {1, 2}
    for change in ({"drawn": "fixed"}, {"basis": "dense"}, {"weights": [1.0, 1.0, 2.0]}):
        assert make(**change).drawn(7) == [3, 6, 9]


def test_accumulation_is_a_larger_batch(model, store, tmp_path):
    """20 trajectories, two halves or one batch: the same mean gradient, so the same step."""
    settings = {"mode": "endpoint", "loss": "l2", "steps": 1, "heldout": 4, "clip": 0.0}
    distill(model, store, tmp_path / "one", batch_size=22, **settings)
    distill(model, store, tmp_path / "two", batch_size=11, accumulate=2, **settings)
    one, two = (
        read_tensors(tmp_path / part / "checkpoint.safetensors") for part in ("one", "two")
    )
    moments = [key for key in one if key.endswith("exp_avg")]
    assert moments
    for key in moments:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=5e-8)


def test_checkpointing_changes_no_gradient(model, store, tmp_path):
    settings = {**SHORT, "steps": 1, "clip": 0.0}
    distill(model, store, tmp_path / "plain", **settings)
    distill(model, store, tmp_path / "again", checkpointing=True, **settings)
    one, two = (
        read_tensors(tmp_path / part / "checkpoint.safetensors") for part in ("plain", "again")
    )
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-8)


def test_a_distance_of_one_s_own(model, store, tmp_path):
    seen = []

    def distance(a, b):
        seen.append((tuple(a.shape), float((a - b).detach().abs().mean())))
        return 2 * (a - b).abs().flatten(1).mean(1)

    distill(model, store, tmp_path, mode="endpoint", distance=distance, **SHORT)
    assert [shape for shape, _ in seen] == [(4, 1, 8, 8)] * 6
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    # A run of one frame has weight 1; the row is the mean of the six steps.
    assert row["loss"] == pytest.approx(2 * sum(d for _, d in seen) / 6, rel=1e-4)
    assert read_json(tmp_path / "operator.json")["training"]["recipe"]["loss"] == "custom"
    with pytest.raises(ValueError, match=r"one number per state, shape \(4,\), got \(\)"):
        distill(model, store, tmp_path / "b", mode="endpoint", **SHORT, distance=lambda a, b: a.sum())  # fmt: skip


def test_losses_by_name():
    a, b = torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 3.0]])
    assert float(LOSSES["l1"].build(None, None)(a, b)) == 2.0
    assert float(LOSSES["l2"].build(None, None)(a, b)) == 8.0
    assert float(LOSSES["huber"].build(None, None)(a, b)) == pytest.approx(
        ((16.01**0.5) - 0.1) / 2
    )


def test_the_distance_in_features(model, store, tmp_path):
    stages = ModelFeatures(model)
    distance = FeatureLoss(stages, weight=2.0)
    a, b = store.states[:3, -1], store.states[3:6, -1]
    lam = model.schedule.lam(torch.tensor(stages.time, dtype=torch.float64))
    assert float(lam.exp()) == pytest.approx(10.0)  # a tenth of noise
    t = torch.full((3,), stages.time)
    expected = L1()(a, b)
    with torch.no_grad():
        sides = [model.network.encode(x, t)[2] for x in (a, b)]
    for one, two in zip(*sides, strict=True):
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=1)
        expected = expected + 2 * (2 - 2 * cosine).flatten(1).mean(1)
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-5)
    assert float(distance(a, a).max()) == 0.0
    distill(model, store, tmp_path, mode="endpoint", loss="features", **SHORT)
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ValueError, match="needs a network with encode"):
        ModelFeatures(fewstep.load("mixture-smooth"))


def test_the_distance_in_the_features_of_a_classifier(model, store, tmp_path):
    from fewstep.metrics import Features

    a, b = store.states[:3, -1].requires_grad_(), store.states[3:6, -1]
    extractor = Features.load("fashion-robust")
    stages = extractor.stages(a)
    assert [tuple(s.shape[:2]) for s in stages] == [(3, c) for c in (32, 64, 64, 128, 128)]
    last = extractor.module.body[-3:](stages[-1])  # the layers between the stages and the features
    torch.testing.assert_close(last, extractor(a))
    expected = L1()(a, b)
    for one, two in zip(stages, extractor.stages(b), strict=True):
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=1)
        seen = [(s.abs().sum(1) > 0).float() for s in (one, two)]  # no direction where all is zero
        expected = expected + (seen[0] + seen[1] - 2 * cosine).flatten(1).mean(1)
    distance = loss_of("features", None, model, "fashion-robust")
    result = distance(a, b)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(result.sum(), a)
    assert float(gradient.abs().max()) > 0
    distill(
        model, store, tmp_path, mode="endpoint", loss="features", features="fashion-robust", **SHORT
    )  # fmt: skip
    kept = read_json(tmp_path / "operator.json")["training"]["recipe"]
    assert (kept["loss"], kept["features"]) == ("features", "fashion-robust")
    with pytest.raises(
        ValueError, match="features are for the loss 'features', got the loss 'l1'"
    ):
        DistillRecipe(features="fashion")
    colour = fewstep.Denoiser.wrap(lambda x, t: x, schedule=model.schedule, prediction="eps", event_shape=(3, 8, 8))  # fmt: skip
    with pytest.raises(ValueError, match=r"images of shape \(n, 1, H, W\), got \(1, 3, 8, 8\)"):
        loss_of("features", None, colour, "fashion")
    with pytest.raises(ValueError, match="the features have no gradient"):
        FeatureLoss(lambda x: [x.round().detach()])(a, b)
    flat = FeatureLoss(lambda x: [x.flatten(1)])(a, b)  # vectors, as a TorchScript file gives
    vectors = [torch.nn.functional.normalize(side.flatten(1), dim=1) for side in (a, b)]
    torch.testing.assert_close(flat, L1()(a, b) + (vectors[0] - vectors[1]).square().sum(1))


def test_tensorboard(model, store, tmp_path):
    pytest.importorskip("tensorboard")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard itself
        distill(model, store, tmp_path, tensorboard=True, **SHORT)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        values = [event.value for event in board.Scalars("heldout/frame4")]
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert values == pytest.approx([row["heldout"][3]])


def test_students_of_equal_size_and_cost(model, store):
    stored = store.times.tolist()
    made = {
        mode: make_student(model, DistillRecipe(mode=mode), stored)
        for mode in ("endpoint", "same-parameters", "same-flops")
    }
    for mode in ("dsno", "folded"):  # with the published labels: nothing for a second time
        made[mode] = make_student(model, DistillRecipe(mode=mode, labels="target"), stored)
    sizes = {mode: sum(student.overhead()) for mode, student in made.items()}
    cost = {mode: flops(student) for mode, student in made.items()}
    assert sizes["folded"] == sizes["endpoint"] == sum(p.numel() for p in model.parameters())
    assert sizes["same-parameters"] == pytest.approx(sizes["dsno"], rel=0.02)
    assert cost["folded"] == 4 * cost["endpoint"]
    assert cost["folded"] < cost["dsno"] < 1.2 * cost["folded"]
    assert cost["same-flops"] == pytest.approx(cost["dsno"], rel=0.15)
    # All start as what they are made of: one frame as one step of DDIM, with the label of its input.
    x = store.states[:3, 0]
    plain = made["endpoint"](x, class_labels=torch.tensor([0, 1, 2]))
    for mode in ("same-parameters", "same-flops"):
        assert torch.equal(made[mode](x, class_labels=torch.tensor([0, 1, 2])), plain)


def test_a_teacher_in_half_precision_is_trained_as_one_in_single(store, tmp_path):
    """Steps of 1e-5 of weights of order 0.1 are below the rounding of bfloat16."""
    model = teacher()
    model.network.to(torch.bfloat16)
    paths = Memory(
        store.times, store.states, store.conditions, {"fingerprint": model.fingerprint()}
    )
    change = {
        "mode": "endpoint",
        "steps": 2,
        "batch_size": 2,
        "warmup": 1,
        "decay": 0,
        "ema": 0,
        "learning_rate": 1e-5,
    }
    distill(model, paths, tmp_path, **change)
    trained = read_tensors(tmp_path / "checkpoint.safetensors")
    after = trained["network.embed_time.0.weight"]
    assert after.dtype == torch.float32
    start = model.network.embed_time[0].weight.float()
    assert 0 < float((after - start).abs().max()) <= 2.1e-5
    assert next(model.network.parameters()).dtype == torch.bfloat16  # the teacher is as it was


def test_trajectories_of_another_model_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="recorded with another model"):
        distill(teacher(seed=1), store, tmp_path, **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_loss_or_a_student_is_a_class_and_a_line(model, store, tmp_path, monkeypatch):
    class Cubes(Loss):
        def __call__(self, a, b):
            return (a - b).abs().pow(3).flatten(1).mean(1)

    class Alone(Student):
        about = "endpoint under another name"

        @staticmethod
        def build(blueprint):
            return blueprint.operator()

    monkeypatch.setitem(LOSSES._entries, "cubes", Cubes)
    monkeypatch.setitem(STUDENTS._entries, "alone", Alone)
    student = distill(model, store, tmp_path, mode="alone", loss="cubes", **SHORT)
    assert student.about["training"]["recipe"]["loss"] == "cubes"
    assert student.operator.frames == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "dsnow"}, "Did you mean 'dsno'"),
        ({"stepz": 3}, "no setting 'stepz'"),
        ({"loss": "custom"}, "needs distance="),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"frames": 2, "times": [0.1]}, "times or frames"),
        ({"drawn": [0, 3]}, "drawn is auto, fixed, or the least and the most frames"),
        ({"drawn": [2, 8], "mode": "endpoint"}, "drawn is for students of several frames"),
        ({"drawn": [2, 8], "basis": "dense"}, "dense has a fixed number of frames"),
        ({"drawn": [2, 8], "weights": [1.0] * 4}, "weights are snr or uniform, not one for each"),
        ({"ema": 1.5}, "ema must be between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
    ],
)
def test_settings_that_are_refused(change, message, model, store, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill(model, store, tmp_path, **{**SHORT, **change})
    assert not list(tmp_path.iterdir())


def interrupt(model, store, folder) -> None:
    """Begins a run that stops at its third step, with checkpoints."""
    progress = Stopping(3, stage="distilling")
    with pytest.raises(Stopped):
        distill(model, store, folder, checkpoint_every=1, progress=progress, **SHORT)


def test_another_recipe_in_the_folder_is_refused(model, store, tmp_path):
    interrupt(model, store, tmp_path)
    for change in ({"learning_rate": 1e-4}, {"seed": 1}, {"mode": "folded"}):
        with pytest.raises(ValueError, match=r"a run of another recipe, at step [23]"):
            distill(model, store, tmp_path, **{**SHORT, **change})
    write_json(tmp_path / "checkpoint.json", {"recipe": 3, "step": 1})
    with pytest.raises(ValueError, match=r"checkpoint.json.*has no recipe"):
        distill(model, store, tmp_path, **SHORT)


def test_the_record_has_the_identity_of_teacher_store_and_extractor(model, store, tmp_path):
    made = distill(model, store, tmp_path / "one", mode="endpoint", **SHORT)
    about = made.about["training"]
    assert (about["teacher"], about["extractor"]) == (model.fingerprint(), None)
    other = Memory(store.times, store.states, store.conditions, store.settings | {"seed": 1})
    again = distill(model, other, tmp_path / "two", mode="endpoint", **SHORT).about["training"]
    assert len(about["store"]) == 64
    assert again["store"] != about["store"]


def test_a_run_is_not_resumed_with_another_teacher_or_store(model, store, tmp_path):
    interrupt(model, store, tmp_path)
    settings = store.settings | {"seed": 1}
    other = Memory(store.times, store.states, store.conditions, settings)
    with pytest.raises(ValueError, match=r"other inputs \(another trajectories\), at step [23]"):
        distill(model, other, tmp_path, **SHORT)
    changed = teacher(seed=1)
    settings = store.settings | {"fingerprint": changed.fingerprint()}
    other = Memory(store.times, store.states, store.conditions, settings)
    with pytest.raises(ValueError, match=r"other inputs \(another teacher\)"):
        distill(changed, other, tmp_path, **SHORT)


def test_a_loss_that_is_not_finite_stops_the_run(model, store, tmp_path):
    states = store.states.clone()
    states[:, -1] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan at step"):
        distill(model, Memory(store.times, states, store.conditions), tmp_path, **SHORT)


def test_the_caller_s_generator_is_left_alone(model, store, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    distill(model, store, tmp_path, mode="same-flops", **{**SHORT, "steps": 1})
    assert torch.equal(torch.get_rng_state(), before)


CORRECTED = {
    "mode": "flow-map", "own_states": 0.5, "consistency": 0.5, "corrector": "score-difference",
}  # fmt: skip


def _one_of_two(rank: int, port: int, out: Path, change: dict) -> None:
    """A process of ``torchrun``, forked instead of started: nothing is imported again."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    made = teacher()
    distill(made, record(made), out, steps=2, batch_size=4, warmup=1, checkpoint_every=2, **change)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:Grad strides")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("change", [{}, CORRECTED])
def test_two_processes_do_what_one_does(change, model, store, tmp_path):
    """Two processes with batches of 4 are one with 8, up to the rounding of sums."""
    settings = {"steps": 2, "batch_size": 8, "warmup": 1, "checkpoint_every": 2, **change}
    distill(model, store, tmp_path / "one", **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_one_of_two, args=(rank, port, tmp_path / "two", change))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    one, two = (
        read_tensors(tmp_path / part / "checkpoint.safetensors") for part in ("one", "two")
    )
    for key in one:
        # Adam makes whole steps, here of 2e-4, of gradients that are rounding errors, as of blocks that start at zero.
        atol = 1e-6 if "exp_avg" in key else 1e-4
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=atol)
    rows = [json.loads((tmp_path / part / "log.jsonl").read_text()) for part in ("one", "two")]
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], rel=1e-4)


def test_a_kill_between_the_two_files_of_a_checkpoint_changes_nothing(
    model, store, tmp_path, monkeypatch
):
    """The tensors are then newer than their description, which has the held-out error and the log."""
    from fewstep.training import checkpoints

    class Killed(BaseException):
        pass

    short = {**SHORT, "steps": 4}
    distill(model, store, tmp_path / "whole", checkpoint_every=2, **short)
    write, count = checkpoints.write_json, []

    def killed(*args, **options):
        count.append(1)
        if len(count) == 2:
            raise Killed  # of the fourth step, the last
        return write(*args, **options)

    monkeypatch.setattr(checkpoints, "write_json", killed)
    with pytest.raises(Killed):
        distill(model, store, tmp_path / "killed", checkpoint_every=2, **short)
    distill(model, store, tmp_path / "killed", checkpoint_every=2, **short)
    one, two = tmp_path / "whole", tmp_path / "killed"
    for name in ("operator.json", "operator.safetensors", "log.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()

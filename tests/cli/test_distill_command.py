"""``fewstep distill`` and ``fewstep sample`` of what it wrote, on a tiny model of a folder."""

from __future__ import annotations

import json

import pytest
import torch

import fewstep
from fewstep.base.files import read_tensors
from fewstep.cli import run
from fewstep.models.folder import write_model
from stopping import Stopping
from tiny_trajectories import teacher

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and 40 trajectories of it."""
    root = tmp_path_factory.mktemp("distill")
    model = teacher()
    write_model(
        root / "model",
        model.network.state_dict(),
        network={"kind": "small-unet", **model.network.config},
        schedule=model.schedule,
        prediction="v",
        event_shape=(1, 8, 8),
    )
    loaded = fewstep.load(root / "model")
    fewstep.record(
        loaded, root / "paths", n=40, solver="ddim", nfe=8, class_labels=torch.arange(40) % 3
    )
    return root


def distill(folders, out, *more):
    fixed = ["--steps", "6", "--batch-size", "6", "--checkpoint-every", "3"]
    return run(["distill", str(folders / "model"), str(folders / "paths"), "--out", str(out), *fixed, *more])  # fmt: skip


def test_distill_and_sample(folders, tmp_path, capsys):
    out = tmp_path / "one"
    assert distill(folders, out, "--lambda-max", "20", "--seed", "5") == 0
    command = capsys.readouterr().out
    assert "40 trajectories; dsno, 6 steps on cpu" in command
    assert f"next: fewstep sample {out} --class-labels all --seed 1 --out {out}-samples" in command
    about = json.loads((out / "operator.json").read_text())
    recipe = about["training"]["recipe"]
    assert (recipe["lambda_max"], recipe["seed"], recipe["mode"]) == (20.0, 5, "dsno")
    assert about["training"]["teacher"] == fewstep.load(folders / "model").fingerprint()
    rms = about["training"]["heldout_rms"]
    assert f"RMS to the teacher, held out: {rms:.4f}" in command
    assert (out / "samples.png").is_file()

    drawn = tmp_path / "drawn"
    command = ["sample", str(out), "-n", "5", "--class-labels", "all", "--out", str(drawn)]
    assert run(command) == 0
    samples = read_tensors(drawn / "samples.safetensors")["samples"]
    again = fewstep.sample(fewstep.load(out), 5, class_labels=[0, 1, 2, 0, 1])
    torch.testing.assert_close(samples, again, rtol=1e-5, atol=1e-6)
    stored = json.loads((drawn / "recipe.json").read_text())
    assert (stored["kind"], stored["nfe"]) == ("operator", 1)
    # The recipe that it wrote draws the same.
    other = tmp_path / "other"
    recipe_file = str(drawn / "recipe.json")
    assert run([*command[:-1], str(other), "--recipe", recipe_file]) == 0
    assert torch.equal(read_tensors(other / "samples.safetensors")["samples"], samples)


def test_other_solvers_of_an_operator_are_refused(folders, tmp_path, capsys):
    out = tmp_path / "one"
    assert distill(folders, out, "--mode", "endpoint") == 0
    for more, command in (
        (["--solver", "ddim"], "leave solver out"),
        (["--nfe", "10"], "leave nfe=10 out"),
        (["--guidance", "2"], "leave guidance out"),
    ):
        assert run(["sample", str(out), "--out", str(tmp_path / "x"), *more]) == 2
        assert command in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "x").exists()


def test_a_run_is_resumed_and_nothing_is_overwritten(folders, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert distill(folders, whole) == 0
    capsys.readouterr()
    assert distill(folders, whole) == 2
    assert "exists; give --overwrite" in " ".join(capsys.readouterr().err.split())
    # A run that was stopped after a checkpoint: it has the step that was done since.
    import fewstep.operators.distillation as trainer

    recipe = trainer.DistillRecipe(steps=6, batch_size=6)
    model = fewstep.load(folders / "model")
    with pytest.raises(KeyboardInterrupt):
        trainer.distill(model, folders / "paths", parts, recipe=recipe, checkpoint_every=3, progress=Stopping(4, error=KeyboardInterrupt))  # fmt: skip
    assert distill(folders, parts) == 0
    assert "resumed at step 4" in capsys.readouterr().out
    for name in ("operator.safetensors", "operator.json", "log.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert distill(folders, parts, "--mode", "folded", "--overwrite") == 0
    assert json.loads((parts / "operator.json").read_text())["layout"]["extra"] == "none"


def test_times_and_weights_and_a_recipe(folders, tmp_path):
    store = fewstep.TrajectoryStore.open(folders / "paths")
    times = store.times.tolist()
    (tmp_path / "r.json").write_text(json.dumps({"mode": "folded", "frames": 4, "loss": "l2"}))
    chosen = f"{times[1]!r},{times[4]!r}"
    arguments = ["--recipe", str(tmp_path / "r.json"), "--times", chosen, "--weights", "1,3"]
    assert distill(folders, tmp_path / "out", *arguments) == 0
    about = json.loads((tmp_path / "out" / "operator.json").read_text())
    assert about["layout"]["times"] == [times[1], times[4]]
    recipe = about["training"]["recipe"]
    assert (recipe["mode"], recipe["loss"], recipe["weights"]) == ("folded", "l2", [1.0, 3.0])
    assert distill(folders, tmp_path / "two", "--times", "2") == 0
    about = json.loads((tmp_path / "two" / "operator.json").read_text())
    assert about["layout"]["times"] == [times[2], times[4]]


@pytest.mark.parametrize(
    ("more", "command"),
    [
        (["--mode", "dsnow"], "Did you mean 'dsno'"),
        (["--loss", "features", "--features", "fashon"], "Did you mean 'fashion'"),
        (["--features", "fashion"], "features are for the loss 'features', got the loss 'l1'"),
        (["--times", "0.5,x"], "--times takes numbers with commas"),
        (["--times", "9"], "9 frames are requested, but 4 states are stored"),
        (["--device", "quantum"], "cannot be used"),
        (["--accumulate", "0"], "accumulate must be a positive integer"),
    ],
)
def test_mistakes(more, command, folders, tmp_path, capsys):
    assert distill(folders, tmp_path / "out", *more) == 2
    assert command in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_flow_map_and_a_solver_from_one_of_its_knots(folders, tmp_path, capsys):
    student, teacher = tmp_path / "student", folders / "model"
    more = ("--corrector", "denoised", "--corrector-weight", "0.5", "--own-states", "0.25")
    assert distill(folders, student, "--student", "flow-map", "--budgets", "1,2", *more) == 0
    recipe = json.loads((student / "operator.json").read_text())["training"]["recipe"]
    assert (recipe["corrector"], recipe["corrector_weight"], recipe["own_states"]) == (
        "denoised",
        0.5,
        0.25,
    )
    assert "flow-map, 6 steps on cpu" in capsys.readouterr().out
    sample = ["sample", str(student), "-n", "2", "--class-labels", "1"]
    assert run([*sample, "--nfe", "2", "--out", str(tmp_path / "two")]) == 0
    model = fewstep.load(student)
    expected = fewstep.sample(model, 2, nfe=2, class_labels=1)
    torch.testing.assert_close(drawn(tmp_path / "two"), expected)
    fresh = ["--nfe", "2", "--option", "fresh=true", "--out", str(tmp_path / "fresh")]
    assert run([*sample, *fresh]) == 0
    assert not torch.allclose(drawn(tmp_path / "fresh"), expected, atol=1e-3)
    capsys.readouterr()

    from_frame = [*sample, "--from-frame", "1"]
    whole = [
        "--teacher",
        str(teacher),
        "--solver",
        "ddim",
        "--nfe",
        "3",
        "--out",
        str(tmp_path / "on"),
    ]
    assert run([*from_frame, *whole]) == 0
    said = capsys.readouterr().out
    assert f"--from-frame 1 --teacher {teacher}" in said
    assert "2 of these 2 samples are from noises that the operator was trained on" in said
    continued = fewstep.operators.continued(model, fewstep.load(teacher), 1, solver="ddim")
    expected = fewstep.sample(continued, 2, nfe=3, class_labels=1)
    torch.testing.assert_close(drawn(tmp_path / "on"), expected)
    about = json.loads((tmp_path / "on" / "recipe.json").read_text())["about"]
    assert (about["from_frame"], about["teacher"]) == (1, str(teacher))
    # Its recipe has the solver, which nothing else says.
    recipe = ["--recipe", str(tmp_path / "on" / "recipe.json"), "--out", str(tmp_path / "again")]
    assert run([*from_frame, "--teacher", str(teacher), *recipe]) == 0
    torch.testing.assert_close(drawn(tmp_path / "again"), expected)
    for more, message in (
        ((), "continues with a solver from frame 1 of the operator; give the frame and"),
        (
            ("--from-frame", "1", "--teacher", str(teacher), "--solver", "unipc2"),
            "this sampler has solver 'unipc2', not 'ddim'",
        ),
    ):
        capsys.readouterr()
        assert run([*sample, *more, *recipe[:3], str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
    assert run([*from_frame, "--out", str(tmp_path / "off")]) != 0
    assert "--from-frame and --teacher belong together" in capsys.readouterr().err
    alone = ["sample", str(teacher), "--from-frame", "1", "--teacher", str(teacher)]
    assert run([*alone, "--out", str(tmp_path / "off")]) != 0
    assert "--from-frame is for an operator" in capsys.readouterr().err


def drawn(folder):
    return read_tensors(folder / "samples.safetensors")["samples"]

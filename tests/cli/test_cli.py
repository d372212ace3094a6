from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fewstep
from fewstep.base.files import read_json, read_tensors, sha256, write_json, write_tensors
from fewstep.base.runs import locked
from fewstep.cli import run
from fewstep.sampling import batches
from fewstep.training.batches import Batches
from forks import FORKS, Fork
from next_lines import carry_out, proposed
from tiny_models import write_tiny


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def command(command):
    return functools.partial(command, said=("auto chose", " images of "), logged=True)


# Starting up


STARTUP = """
import sys, json
before = set(sys.modules)
sys.argv = ['fewstep', *sys.argv[1:]]
from fewstep.cli import run
code = run(sys.argv[1:])
loaded = sorted(set(sys.modules) - before)
print(json.dumps(loaded), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["sample", "--help"], ["plan", "diff", "--help"]]
)
def test_help_imports_the_command_line_alone(arguments):
    """What start-up costs, counted in modules: seconds are the machine's, not the command's."""
    done = subprocess.run(
        [sys.executable, "-c", STARTUP, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (fewstep.__version__ if "--version" in arguments else "Usage: fewstep") in done.stdout
    loaded = json.loads(done.stderr.splitlines()[-1])
    heavy = {"torch", "diffusers", "numpy", "PIL", "safetensors", "scipy", "matplotlib"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    own = [name for name in loaded if name.partition(".")[0] == "fewstep"]
    assert len(own) < 24, own
    # The parser of arguments and the console are two thirds of it; the rest must stay small.
    assert len(loaded) < 450, len(loaded)


def test_the_process_has_the_exit_code_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "fewstep.cli", "plan", "check", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "is not a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_there_is_help(command):
    text = command()
    assert all(name in text for name in ("sample", "demo", "train", "plan", "solvers", "models"))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "sample"),
        (["sample", "fashon"], r"(?i)requires an argument|missing|required"),
        (["sample", "mixture-smoth", "--out", "OUT"], "Did you mean 'mixture-smooth'"),
        (["sample", "mixture-smooth", "--solver", "dpmp-2m", "--out", "OUT"], "'dpmpp-2m'"),
        (["sample", "mixture-smooth", "--nfe", "0", "--out", "OUT"], "nfe must be a positive"),
        (["sample", "mixture-smooth", "--nfe", "ten", "--out", "OUT"], "(?i)int"),
        (
            ["sample", "mixture-smooth", "--solver", "heun", "--nfe", "4", "--out", "OUT"],
            "nearest",
        ),
        (["sample", "mixture-smooth", "-n", "0", "--out", "OUT"], "-n must be a positive"),
        (["sample", "mixture-smooth", "--grid", "karas", "--out", "OUT"], "'karras'"),
        (["sample", "mixture-smooth", "--device", "cdua", "--out", "OUT"], "device 'cdua'"),
        (["sample", "mixture-smooth", "--option", "eta", "--out", "OUT"], "key=value"),
        (
            ["sample", "mixture-smooth", "--solver", "ddim", "--option", "eat=1", "--out", "OUT"],
            "eat",
        ),
        (["sample", "mixture-smooth", "--class-labels", "all", "--out", "OUT"], "not known"),
        (["sample", "mixture-smooth", "--guidance", "2", "--out", "OUT"], "null condition"),
        (["sample", "mixture-smooth", "--solver", "dopri5", "--nfe", "9", "--out", "OUT"], "rtol"),
        (["sample", "mixture-smooth", "--recipe", "none.json", "--out", "OUT"], "cannot be read"),
        (["solvers", "dimm"], "Did you mean 'ddim'"),
        (
            ["plan", "make", "ddim", "--schedule", "vp-liner", "--nfe", "5", "--out", "OUT"],
            "'vp-linear'",
        ),
        (["plan", "make", "ddim", "--schedule", "vp-linear", "--out", "OUT"], "give nfe"),
        (["plan", "check"], "at least one FILE"),
        (["train", "no-such-folder", "--out", "OUT"], "no folder or file"),
        (["train", ".", "--steps", "0", "--out", "OUT"], "--steps must be a positive"),
        (["demo", "--model", "mixture-smooth", "--out", "OUT"], "has samples of shape"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(command, tmp_path, arguments, message):
    out = tmp_path / "out"
    err = command(*[str(out) if a == "OUT" else a for a in arguments], code=2)
    assert re.search(message, err)
    assert not out.exists()


def test_a_mistake_is_raised_when_asked_for(monkeypatch):
    monkeypatch.setenv("FEWSTEP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Unknown solver"):
        run(["solvers", "dimm"])


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(batches, "run_batch", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["sample", "mixture-smooth", "--out", str(tmp_path / "out")])


def test_class_labels_are_checked_before_anything_is_written(command, tiny, tmp_path):
    for labels, message in (("7", "from 0 to 2"), ("shrit", "Did you mean 'shirt'"), ("1,", "")):
        err = command("sample", tiny, "--class-labels", labels, "--out", tmp_path / "x", code=2)
        assert message in err
    err = command("sample", tiny, "--guidance", 2, "--out", tmp_path / "x", code=2)
    assert "guidance needs a condition" in err
    assert not (tmp_path / "x").exists()


NESTED = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        NESTED,
        '{"format": "fewstep.recipe", "version": 1, "name": "__import__", "nfe": 5}',
        '{"format": "fewstep.recipe", "version": 1, "nfe": 1e400}',
        '{"format": "fewstep.recipe", "version": 1, "nfe": NaN}',
        '{"format": "fewstep.recipe", "version": 1, "nfe": true}',
        '{"format": "fewstep.recipe", "version": 1, "nfe": 100000000000000000000, "name": "ddim"}',
        '{"format": "fewstep.recipe", "version": 1, "nfe": 5, "options": {"order": "\\ud800\\u001b[2J"}, "name": "ddim"}',
        '{"format": "fewstep.recipe", "version": 9, "nfe": 5}',
        '{"format": "fewstep.plan", "version": 1}',
        '{"format": "fewstep.plan", "version": 1, "prediction": "eps", "schedule": {"name": "vp-linear"},'
        ' "times": [1.0], "scales": [[1, 1]], "rows": [{"eval": [5, 0]}], "result": 1}',
        '["a list"]',
        "\u0000",
    ],
)
def test_hostile_recipes_get_one_line(command, tmp_path, text):
    file = tmp_path / "recipe.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    err = command("sample", "mixture-smooth", "--recipe", file, "--out", tmp_path / "out", code=2)
    assert "\x1b" not in err.replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert not (tmp_path / "out").exists()
    assert run(["plan", "check", str(file)]) == 1


# sample


def test_sample_writes_what_it_says(command, tiny, tmp_path):
    out = tmp_path / "out"
    text = command(
        *("sample", tiny, "--solver", "tab3", "--nfe", 4, "-n", 5, "--class-labels", "0,shoe"),
        *("--guidance", 1.5, "--seed", 3, "--out", out, "--batch-size", 5),
    )
    assert str(out / "grid.png") in text
    assert "next: fewstep" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png",
        "recipe.json",
        "samples.safetensors",
    ]
    stored = load_file(out / "samples.safetensors")
    assert list(stored) == ["samples"]
    samples = stored["samples"]
    assert samples.dtype == torch.float32
    model = fewstep.load(tiny)
    expected = fewstep.sample(
        model, 5, solver="tab3", nfe=4, seed=3, guidance=1.5, class_labels=[0, 1, 0, 1, 0]
    )
    assert torch.equal(samples, expected)
    # 5 images: 3 columns and 2 rows of 72 pixels, gaps of 4 and margins of 16.
    width, height = _size(out / "grid.png")
    assert width >= 2 * 16 + 3 * 72 + 2 * 4
    assert height > 2 * 16 + 2 * 72 + 4  # and a title
    # The recipe alone, with the same noise and labels, gives the same samples.
    recipe = fewstep.SamplerRecipe.load(out / "recipe.json")
    again = fewstep.sample(model, 5, recipe=recipe, seed=3, class_labels=[0, 1, 0, 1, 0])
    assert torch.equal(again, expected)
    assert recipe.about["seed"] == 3
    assert recipe.about["n"] == 5


def test_the_recipe_of_auto_reproduces_what_auto_chose(command, tmp_path):
    text = command("sample", "mixture-smooth", "-n", 6, "--nfe", 6, "--out", tmp_path / "a")
    assert re.search(r"auto chose \S+ .*with 6 evaluations", text)
    recipe = tmp_path / "a" / "recipe.json"
    assert fewstep.SamplerRecipe.load(recipe).name != "auto"
    command("sample", "mixture-smooth", "-n", 6, "--recipe", recipe, "--out", tmp_path / "b")
    files = [(tmp_path / name / "samples.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    samples = load_file(tmp_path / "a" / "samples.safetensors")["samples"]
    assert torch.equal(samples, fewstep.sample(fewstep.load("mixture-smooth"), 6, nfe=6))
    assert samples.shape == (6, 2)
    assert _size(tmp_path / "a" / "grid.png")[1] > 600


def test_a_recipe_or_a_plan_leaves_nothing_to_choose(command, tmp_path):
    file = tmp_path / "plan.json"
    command("plan", "make", "ddim", "--schedule", "vp-linear", "--nfe", 4, "--out", file)
    command("sample", "mixture-smooth", "-n", 3, "--recipe", file, "--out", tmp_path / "a")
    samples = load_file(tmp_path / "a" / "samples.safetensors")["samples"]
    model = fewstep.load("mixture-smooth")
    assert torch.equal(samples, fewstep.sample(model, 3, plan=fewstep.Plan.load(file)))
    err = command(
        *("sample", "mixture-smooth", "--recipe", file, "--nfe", 5, "--out", tmp_path / "b"),
        code=2,
    )
    assert "this recipe makes 4 evaluations, not 5" in err


def test_adaptive_solver_from_the_command_line(command, tmp_path):
    command(
        *("sample", "mixture-smooth", "-n", 2, "--solver", "dopri5", "--option", "rtol=1e-3"),
        *("--option", "atol=1e-3", "--out", tmp_path / "a"),
    )
    recipe = fewstep.SamplerRecipe.load(tmp_path / "a" / "recipe.json")
    assert recipe.kind == "adaptive"
    assert recipe.options == {"rtol": 1e-3, "atol": 1e-3}
    samples = load_file(tmp_path / "a" / "samples.safetensors")["samples"]
    expected = fewstep.sample(
        fewstep.load("mixture-smooth"), 2, solver="dopri5", options=dict(recipe.options)
    )
    assert torch.equal(samples, expected)


def test_results_are_not_overwritten_unasked(command, tmp_path):
    out = tmp_path / "out"
    subcommand = ("sample", "mixture-smooth", "-n", 3, "--nfe", 3, "--out", out)
    command(*subcommand)
    first = (out / "samples.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    err = command(*subcommand, "--seed", 1, code=2)
    assert "exists; give --overwrite or another --out" in err
    assert (out / "samples.safetensors").read_bytes() == first
    command(*subcommand, "--seed", 1, "--overwrite")
    assert (out / "samples.safetensors").read_bytes() != first
    assert (out / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in command("sample", "mixture-smooth", "--out", file, code=2)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    command, tiny, tmp_path, monkeypatch, capsys
):
    # Noise on the way: the draws of a sample, too, must not depend on the interruption.
    subcommand = ["sample", tiny, "--solver", "ddim", "--option", "eta=1", "--nfe", "3", "-n", "7"]
    subcommand += ["--batch-size", "2", "--class-labels", "all", "--out"]
    command(*subcommand, tmp_path / "whole")

    drawn: list[list[int]] = []
    original = batches.run_batch

    def interrupted(made, source, cond, **options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(source.samples)
        return original(made, source, cond, **options)

    out = tmp_path / "out"
    monkeypatch.setattr(batches, "run_batch", interrupted)
    assert run([*subcommand, str(out)]) == 130
    err = capsys.readouterr().err.removeprefix("sampling: 0 of 12\n")
    assert err.startswith("stopped: interrupted")
    assert f"--out {out}" in err
    assert not (out / "samples.safetensors").exists()
    assert "unfinished run with other settings (seed 0, now 1)" in command(
        *subcommand, out, "--seed", 1, code=2
    )
    # A part that was damaged is drawn again.
    parts = sorted((out / "parts").iterdir())
    assert len(parts) == 2
    parts[1].write_bytes(b"cut")
    later: list[list[int]] = []

    def counted(made, source, cond, **options):
        later.append(source.samples)
        return original(made, source, cond, **options)

    monkeypatch.setattr(batches, "run_batch", counted)
    command(*subcommand, out)
    assert (drawn, later) == ([[0, 1], [2, 3]], [[2, 3], [4, 5], [6]])
    for name in ("samples.safetensors", "grid.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png",
        "recipe.json",
        "samples.safetensors",
    ]


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_run_is_not_resumed_with_other_weights(command, tiny, tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    subcommand = ["sample", model, "--nfe", "3", "-n", "2", "--class-labels", "0", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(batches, "run_batch", stop)
        assert run(list(map(str, subcommand))) == 130
    capsys.readouterr()
    tensors = read_tensors(model / "model.safetensors")
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    tensors[name] += 1
    write_tensors(model / "model.safetensors", tensors)
    about = read_json(model / "model.json") | {"sha256": sha256(model / "model.safetensors")}
    write_json(model / "model.json", about)
    assert "other settings (another weights)" in command(*subcommand, code=2)


def test_two_runs_do_not_write_one_folder_at_once(command, tiny, tmp_path):
    subcommand = ["sample", tiny, "--nfe", "3", "-n", "2", "--class-labels", "0", "--seed", "1"]
    with locked(tmp_path / "out"):
        err = command(*subcommand, "--out", tmp_path / "out", code=2)
        assert f"is being written by another run (process {os.getpid()} on " in err
    command(*subcommand, "--out", tmp_path / "out")


def test_a_process_of_several_makes_the_bytes_of_one_also_alone(
    command, tiny, tmp_path, monkeypatch, capsys
):
    """Nobody waits for a rank that never came; one that comes late finds the work done."""
    subcommand = ["sample", tiny, "--nfe", "2", "-n", "5", "--class-labels", "0", "--seed", "1"]
    subcommand += ["--batch-size", "2", "--out"]
    command(*subcommand, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run([*map(str, subcommand), str(tmp_path / "two")]) == 0
    capsys.readouterr()
    for name in ("samples.safetensors", "grid.png", "recipe.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "grid.png",
        "recipe.json",
        "samples.safetensors",
    ]
    assert "remove the folder first" in command(
        *subcommand, tmp_path / "two", "--overwrite", code=2
    )
    subcommand[subcommand.index("--nfe") + 1] = "3"
    assert "exists" in command(*subcommand, tmp_path / "two", code=2)


@pytest.mark.filterwarnings(FORKS)
def test_two_processes_share_a_run_and_one_is_killed(command, tiny, tmp_path):
    subcommand = ["sample", str(tiny), "--nfe", "3", "-n", "40", "--class-labels", "0"]
    subcommand += ["--batch-size", "1", "--out"]
    command(*subcommand, tmp_path / "one")

    def share() -> None:
        from fewstep.cli import run

        assert run([*subcommand, str(tmp_path / "two")]) == 0

    started = [Fork(share, RANK=rank, WORLD_SIZE="2") for rank in "01"]
    parts = tmp_path / "two" / "parts"
    while not list(parts.glob("*.safetensors")):
        assert not started[1].has_ended()
        time.sleep(0.001)
    os.kill(started[1].pid, signal.SIGKILL)
    # Reaped first: an unreaped process counts as alive, and its claim as held.
    assert (started[1].wait(), started[0].wait()) == (-9, 0)
    for name in ("samples.safetensors", "recipe.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


# listing


def test_solvers_and_models_are_listed(command):
    from fewstep.loading import EMBEDDED

    listing = command("solvers")
    for name in fewstep.SOLVERS:
        assert re.search(rf"^{re.escape(name)}\s+\d", listing, re.MULTILINE), name
    heun = next(line for line in listing.splitlines() if line.startswith("heun "))
    assert re.search(
        r"\b(19|20)\b", heun
    )  # two evaluations per step, one for a last step onto zero
    assert "https://arxiv.org" in command("solvers", "tab3")
    listing = command("models")
    assert all(name in listing for name in EMBEDDED)


# plan


@pytest.fixture
def make(command, tmp_path):
    def made(name, solver, *options, nfe=5):
        file = tmp_path / name
        command(
            *("plan", "make", solver, "--schedule", "vp-linear", "--nfe", nfe, "--out", file),
            *options,
        )
        return file

    return made


def test_plan_make_and_show(command, make):
    file = make("p.json", "tab3", "--grid", "quadratic")
    plan = fewstep.Plan.load(file)
    expected = fewstep.plan("tab3", fewstep.schedule("vp-linear"), nfe=5, grid="quadratic")
    assert plan.to_json() == expected.to_json()
    text = command("plan", "show", file)
    assert "tab3: 5 evaluations, 0 noise draws" in text
    assert f"{float(plan.times[2]):.6g}" in text
    assert f"{float(plan.flat().B[1, 0]):+.4g} F0" in text
    assert "on a point mass: off by" in text
    assert len(re.findall(r"on Gaussian data", text)) == 3
    err = command(
        *("plan", "make", "ddim", "--schedule", "vp-linear", "--nfe", 5, "--out", file), code=2
    )
    assert "exists; give --overwrite" in err


def test_plan_check_finds_damage(command, make, tmp_path):
    good = make("good.json", "ddim")
    assert re.search(
        r"good.json: ok: ddim, 5 evaluations, 0 draws, point-mass defect \S+e-1\d",
        command("plan", "check", good),
    )
    content = json.loads(good.read_text())
    content.pop("content_sha256")  # a person edits it
    content["rows"][1]["lin"][0][1] *= 1.001  # a coefficient that only the mathematics can miss
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:-20])
    text = command("plan", "check", good, changed, cut, code=1)
    assert "good.json: ok" in text
    assert re.search(r"changed.json: DAMAGED: ddim is exact on a point mass", text)
    assert re.search(r"cut.json: DAMAGED: .*JSON", text)


def test_plan_diff_says_where(command, make, tmp_path):
    ddim, same = make("ddim.json", "ddim"), make("tab0.json", "tab0", "--grid", "uniform")
    other = make("lagged.json", "tab1", "--grid", "uniform")
    first, second = fewstep.Plan.load(ddim), fewstep.Plan.load(same)
    if torch.equal(first.times, second.times):
        assert "the same sampler" in command("plan", "diff", ddim, same)
    assert "the same sampler" in command("plan", "diff", ddim, ddim)
    text = command("plan", "diff", same, other, code=1)
    # tab1 starts with a step of tab0, so the first two evaluations are the same.
    assert "the plans differ, first at evaluation 2" in text
    longer = make("longer.json", "ddim", nfe=6)
    assert "A makes 5 evaluations and 0 draws, B 6 and 0" in command(
        "plan", "diff", ddim, longer, code=1
    )
    del tmp_path


def test_plan_diff_converts_predictions(command, make, tmp_path):
    from fewstep.plans.rewriting import convert_plan

    file = make("eps.json", "tab2")
    plan = fewstep.Plan.load(file)
    other = tmp_path / "x0.json"
    convert_plan(plan, "x0").save(other)
    text = command("plan", "diff", file, other)
    assert "B is written for x0, A for eps" in text
    assert "the same sampler" in text


def test_plan_diff_names_a_wasted_call(command, make, tmp_path):
    file = make("p.json", "ddim")
    content = json.loads(file.read_text())
    content.pop("content_sha256")  # a person edits it
    # Register 4 is the output of the second evaluation: its weight in the next state becomes zero.
    lin = next(
        r["lin"] for r in content["rows"] if "lin" in r and any(p[0] == 3 for p in r["lin"])
    )
    next(pair for pair in lin if pair[0] == 3)[1] = 0.0
    wasted = tmp_path / "wasted.json"
    wasted.write_text(json.dumps(content))
    text = command("plan", "diff", file, wasted, code=1)
    assert re.search(r"evaluation 1 of B \(t = \S+\) changes nothing", text)
    assert "of A" not in text.split("row", 1)[0]


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plan_diff_of_schedulers(command, tmp_path):
    """By name, by configuration; the wasted step is named; a missing number of steps is an error."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "deis"
    diffusers.DEISMultistepScheduler(use_karras_sigmas=True).save_pretrained(folder)
    file = folder / "scheduler_config.json"
    text = command("plan", "diff", folder, file, "--steps", 6)
    assert "evaluation 5 of A (t = 0) changes nothing" in text
    assert "the same sampler" in text
    text = command(
        "plan", "diff", "diffusers:DDIM", "diffusers:DEISMultistep", "--steps", 6, code=1
    )
    assert re.search(r"evaluation 0\s+830\s+999", text)
    assert "the plans differ, first at evaluation 0" in text
    assert "the same sampler" in command(
        "plan", "diff", "diffusers:Euler", "diffusers:EulerDiscreteScheduler", "--steps", 4
    )
    assert "4 evaluations, 0 noise draws" in command(
        "plan", "show", "diffusers:Euler", "--steps", 4
    )


@pytest.mark.diffusers
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("diffusers:Eular", "Did you mean 'Euler'"),
        ("diffusers:Euler", "needs a number of --steps"),
    ],
)
def test_plan_diff_of_schedulers_refuses(command, source, message):
    pytest.importorskip("diffusers")
    assert message in command("plan", "diff", source, source, code=2)


def test_a_recipe_shows_as_its_plan(command, tmp_path):
    command("sample", "mixture-smooth", "-n", 2, "--nfe", 4, "--out", tmp_path / "a")
    assert "4 evaluations" in command("plan", "show", tmp_path / "a" / "recipe.json")


# train


def _images(folder: Path, n: int = 64) -> Path:
    random = numpy.random.default_rng(0)
    for i in range(n):
        kind = ("bars", "blobs")[i % 2]
        array = random.integers(0, 60, (8, 8), dtype=numpy.uint8)
        array[:, 2:4] += 150 * (kind == "bars")
        array[3:6, 3:6] += 150 * (kind == "blobs")
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    network = {"channels": [8, 8], "blocks": [1, 1], "attention": [], "num_classes": 2}
    recipe = {"network": network, "schedule": {"name": "ddpm-linear"}, "batch_size": 16}
    file.write_text(json.dumps({**recipe, "steps": 6, "warmup": 1, "precision": "float32"}))
    return file


def test_train_resumes_and_its_model_samples(command, tmp_path, small_recipe, monkeypatch, capsys):
    data = _images(tmp_path / "data")
    subcommand = ["train", str(data), "--recipe", str(small_recipe), "--checkpoint-every", "2"]
    text = command(*subcommand, "--out", tmp_path / "whole")
    assert "64 images of 1x8x8, 2 classes; v, ddpm-linear; 6 steps" in text
    (line,) = proposed(text)
    assert "--class-labels all" in line
    carry_out(line)

    original = Batches.__call__

    def interrupted(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    out = tmp_path / "out"
    monkeypatch.setattr(Batches, "__call__", interrupted)
    assert run([*subcommand, "--out", str(out)]) == 130
    err = capsys.readouterr().err
    assert "the checkpoint of step 3 is saved; to resume: fewstep train" in err
    assert not (out / "model.json").exists()
    monkeypatch.setattr(Batches, "__call__", original)
    assert "resumed at step 3" in command(*subcommand, "--out", out)
    for name in ("model.safetensors", "samples.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    before = (out / "model.safetensors").read_bytes()
    assert "exists; give --overwrite" in command(*subcommand, "--out", out, code=2)
    command(*subcommand, "--out", out, "--seed", 5, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    command(
        *("sample", out, "-n", 3, "--nfe", 3, "--class-labels", "bars,blobs"),
        *("--out", tmp_path / "samples"),
    )
    samples = load_file(tmp_path / "samples" / "samples.safetensors")["samples"]
    expected = fewstep.sample(fewstep.load(out), 3, nfe=3, class_labels=[0, 1, 0])
    assert torch.equal(samples, expected)


def test_train_options_replace_what_the_recipe_says(command, tmp_path, small_recipe):
    data, out = _images(tmp_path / "data"), tmp_path / "out"
    text = command(
        *("train", data, "--recipe", small_recipe, "--steps", 1, "--out", out),
        *("--schedule", "edm", "--option", "sigma_max=20", "--range", "-0.5", "0.5"),
        *("--flip", "--unconditional"),
    )
    assert "no classes; x0, edm; 1 steps" in text
    model = fewstep.load(out)
    assert (model.schedule.t_max, model.data_range) == (20.0, (-0.5, 0.5))
    assert model.null_condition == {}
    assert model.about["training"]["recipe"]["flip"] is True
    err = command("train", data, "--option", "levels=9", "--out", tmp_path / "x", code=2)
    assert "give --schedule too" in err
    compare = ("compare", out, "--solvers", "ddim", "--nfe", "2", "--data", data)
    err = command(*compare, "--out", tmp_path / "y", code=2)
    assert "data range from -0.5 to 0.5" in err


def test_a_wrong_training_recipe_is_one_line(command, tmp_path):
    data, recipe = _images(tmp_path / "data", 4), tmp_path / "recipe.json"
    for text, message in (
        ('{"netwrok": {}}', "no 'netwrok'"),
        ("[]", "JSON object"),
        ('{"network": {"channels": "x"}, "schedule": {"name": "ddpm-linear"}}', "channels"),
        ('{"network": {}, "schedule": {"name": "ddpm-liner"}}', "ddpm-linear"),
    ):
        recipe.write_text(text)
        err = command("train", data, "--recipe", recipe, "--out", tmp_path / "out", code=2)
        assert message in err


# demo


def test_demo_makes_table_picture_and_results(command, tiny, tmp_path, monkeypatch, capsys):
    import fewstep.cli.demo as demo

    monkeypatch.setattr(demo, "REFERENCE_NFE", 40)
    out = tmp_path / "demo"
    text = command("demo", "--model", tiny, "--out", out)
    for solver in ("ddim", "tab3", "accelerated-ddim", "dpmpp-2m", "accelerated-ddpm"):
        for nfe in (5, 10):
            assert re.search(rf"^{solver}\s+{nfe}\s+\d\.\d{{4}}\s+\d", text, re.MULTILINE)
    assert str(out / "demo.png") in text
    (line,) = proposed(text)
    monkeypatch.chdir(tmp_path)
    carry_out(line, "--nfe", "2")
    capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    result = {(r["solver"], r["nfe"]): r["rms_distance"] for r in results["results"]}
    model, labels = fewstep.load(tiny), [i % 3 for i in range(16)]
    reference = fewstep.sample(
        model, 16, solver="tab2", grid="log-rho", nfe=40, class_labels=labels
    )
    mine = fewstep.sample(model, 16, solver="tab3", nfe=5, class_labels=labels)
    rms = float((mine - reference).double().square().mean().sqrt())
    assert result["tab3", 5] == pytest.approx(rms, rel=1e-6)
    assert result["ddim", 10] < result["ddim", 5]
    width, height = _size(out / "demo.png")
    assert width > 16 * 72
    assert height > 11 * 72
    assert "exists; give --overwrite" in command("demo", "--model", tiny, "--out", out, code=2)

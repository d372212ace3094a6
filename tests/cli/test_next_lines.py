"""Every command that another command, or a page, proposes is run as it is printed."""

from __future__ import annotations

import ast
import functools
import html
import json
import re
import shlex
from pathlib import Path

import numpy
import pytest

import fewstep
import fewstep.cli
from fewstep.cli import listing, run, sample
from fewstep.diffusion.grids import GRIDS
from fewstep.models import exact
from fewstep.reporting.commands import command
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve
from fewstep.solvers import SOLVERS
from next_lines import carry_out, proposed
from tiny_models import write_tiny

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


pytestmark = pytest.mark.usefixtures("undrawn", "few_hypotheses", "coarse_references")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A folder with a space in its name, in which commands are run."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("a folder")
        patch.chdir(place)
        patch.setenv("FEWSTEP_CACHE", str(place / "cache"))
        write_tiny(place / "my model", size=4)
        pixels = numpy.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=numpy.uint8)
        numpy.savez(place / "my data.npz", images=pixels, labels=numpy.arange(40) % 3)
        yield place


def test_sample_and_plan(capsys):
    assert (
        run(["sample", "my model", "-n", "2", "--nfe", "2", "--class-labels", "0,1", "--out", "s"])
        == 0
    )
    (line,) = proposed(capsys.readouterr().out)
    assert "--class-labels 0,1" in line
    carry_out(line)
    capsys.readouterr()
    lines = [
        "plan",
        "make",
        "tab2",
        "--schedule",
        "ddpm-linear",
        "--nfe",
        "3",
        "--out",
        "my plan.json",
    ]
    assert run(lines) == 0
    (line,) = proposed(capsys.readouterr().out)
    carry_out(line)
    (line,) = proposed(capsys.readouterr().out)
    carry_out(line, MODEL="my model")
    capsys.readouterr()
    table = ["recipe", "import", "14.615,2.5,0.03,0", "--schedule", "ddpm-linear", "--force"]
    assert run([*table, "--out", "my recipe.json"]) == 0
    (line,) = proposed(capsys.readouterr().out)
    carry_out(line, "--overwrite", MODEL="my model")


def test_listings(capsys, monkeypatch):
    """Each solver and each grid has a command that runs, up to the first evaluation."""
    models = {
        "fashion": "ddpm-linear",
        "mixture-smooth": "vp-linear",
        "MODEL": "ddpm-scaled-linear",
    }
    models = {k: exact.smooth(fewstep.schedule(v)) for k, v in models.items()}
    monkeypatch.setattr(sample, "load_model", lambda name, *_, **__: models[name])

    def stop(*given):
        raise ValueError("resolved")

    monkeypatch.setattr(sample, "parse_labels", stop)
    listings = [listing.solvers, listing.grids, listing.models]
    listings += [functools.partial(listing.solvers, name) for name in SOLVERS]
    listings += [functools.partial(listing.grids, name) for name in GRIDS]
    seen = set()
    for show in listings:
        show()
        (line,) = proposed(capsys.readouterr().out)
        for part in re.split(r", or ", line):
            name, *parts = shlex.split(part)
            assert name == "fewstep"
            if "NAME" in parts:
                parts[parts.index("NAME")] = "karras" if "grid" in part else "tab3"
            kind = parts[2] if len(parts) > 3 else ""
            if len(parts) == 6 and kind in seen:  # the same line but for the name
                request = {kind.removeprefix("--"): parts[3]}
                resolve(models[parts[1]], SamplerRequest(**request))
            elif parts[0] == "sample":
                seen.add(kind)
                assert run(parts) == 2
                assert "error: resolved" in capsys.readouterr().err, part
            else:
                assert run(parts) == 0
        capsys.readouterr()


@pytest.mark.slow
def test_compare_its_page_and_analyze(capsys):
    words = [
        "compare",
        "my model",
        "--solvers",
        "ddim",
        "--nfe",
        "2",
        "-n",
        "4",
        "--reference-nfe",
        "3",
    ]
    words += ["--data", "my data.npz", "--features", "pixels", "--metrics", "fid"]
    assert (
        run([*words, "--class-labels", "0,1", "--guidance", "1.5", "--out", "my comparison"]) == 0
    )
    (printed,) = proposed(capsys.readouterr().out)
    page = (
        html.unescape(t)
        for t in re.findall(
            r"<pre[^>]*>(?:<code>)?(.*?)(?:</code>)?</pre>",
            Path("my comparison/report.html").read_text(),
            re.S,
        )
    )
    given, *lines = [text.strip() for text in page]
    assert given.startswith("fewstep compare")
    assert lines[0] == printed
    assert [shlex.split(line)[1] for line in lines] == ["sample", "analyze", "tune"]
    for line in lines:
        assert "--class-labels 0,1" in line
    assert "--guidance 1.5" in lines[1]
    assert "--guidance 1.5" in lines[2]
    for line in lines:
        carry_out(line)
        after = proposed(capsys.readouterr().out)
        assert len(after) == 1
        if shlex.split(line)[1] == "analyze":
            assert "--class-labels 0,1" in after[0]
            carry_out(after[0].replace("-samples", "-more"))
            capsys.readouterr()
    settings = json.loads(Path("my comparison-analysis/results.json").read_text())["settings"]
    assert (settings["guidance"], settings["class_labels"]) == (1.5, "0,1")


def test_record(capsys):
    words = [
        "record",
        "my model",
        "-n",
        "8",
        "--nfe",
        "4",
        "--shard-size",
        "8",
        "--out",
        "my store",
    ]
    assert run(words) == 0
    (line,) = proposed(capsys.readouterr().out)
    assert shlex.split(line)[1:] == [
        "distill",
        "my model",
        "my store",
        "--out",
        "my store-operator",
    ]
    carry_out(line)
    (line,) = proposed(capsys.readouterr().out)
    carry_out(line)


CARRIED_OUT = {
    "sample.sample": "cli/test_next_lines.py::test_sample_and_plan",
    "plan.make": "cli/test_next_lines.py::test_sample_and_plan",
    "plan.show": "cli/test_next_lines.py::test_sample_and_plan",
    "recipe.import_": "cli/test_next_lines.py::test_sample_and_plan",
    "listing.solvers": "cli/test_next_lines.py::test_listings",
    "listing.grids": "cli/test_next_lines.py::test_listings",
    "listing.models": "cli/test_next_lines.py::test_listings",
    "compare.compare": "cli/test_next_lines.py::test_compare_its_page_and_analyze",
    "analyze.analyze": "cli/test_next_lines.py::test_compare_its_page_and_analyze",
    "record._record": "cli/test_next_lines.py::test_record",
    "distill.distill": "cli/test_next_lines.py::test_record",
    "tune.tune": "cli/test_tune_command.py::test_the_command",
    "fit.fit": "cli/test_fit_command.py::test_the_command_writes_into_the_models_folder",
    "train.train": "cli/test_cli.py::test_train_resumes_and_its_model_samples",
    "demo.demo": "cli/test_cli.py::test_demo_makes_table_picture_and_results",
}
"""The function that prints "next:", and the test that runs what it prints."""


def test_every_next_line_is_carried_out_by_a_test():
    """Fails if a command starts to print one; the functions are found in the source."""
    printing = set()
    for file in Path(fewstep.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(part, ast.Constant) and "next: " in str(part.value)
                for statement in node.body[1:]
                for part in ast.walk(statement)
            ):
                printing.add(f"{file.stem}.{node.name}")
    assert printing == set(CARRIED_OUT)
    tests = Path(__file__).parent.parent
    for place in CARRIED_OUT.values():
        file, _, name = place.partition("::")
        tree = ast.parse((tests / file).read_text()).body
        (body,) = (n for n in tree if isinstance(n, ast.FunctionDef) and n.name == name)
        assert any(
            isinstance(n, ast.Name) and n.id in ("carry_out", "resolve") for n in ast.walk(body)
        ), place


def test_single_pictures_and_the_log(capsys):
    words = ["sample", "my model", "-n", "2", "--nfe", "1", "--class-labels", "0", "--singles"]
    assert run(["--verbose", *words, "--out", "alone"]) == 0
    log = capsys.readouterr().err
    assert sorted(file.name for file in Path("alone/images").iterdir()) == [
        "000000.png",
        "000001.png",
    ]
    assert Path("alone/grid.png").is_file()
    assert "the device" in log


def test_commands_are_quoted_and_complete():
    assert command(
        "sample", "m", n=4, force=True, seed=None, guidance=7.50, class_labels="a b"
    ) == ("fewstep sample m -n 4 --force --guidance 7.5 --class-labels 'a b'")
    assert command("plan show", "x y.json", option=["a=1", "b=2"]) == (
        "fewstep plan show 'x y.json' --option a=1 --option b=2"
    )

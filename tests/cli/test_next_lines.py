"""Every command that another command, or a page, proposes is run as it is printed."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import numpy
import pytest

from fewstep.cli import run
from fewstep.reporting.commands import command
from tiny_models import write_tiny

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("undrawn")

CHEAP = {
    # What makes a proposed command small enough for a test; the proposal itself stays as it is.
    "sample": ["-n", "2"],
    "analyze": ["--nfe", "3", "-n", "4", "--budget", "0"],
    "tune": "--steps 1 --setting batch_size=2 --setting pairs=4 --setting heldout=8 --setting test=8 "
    "--setting teacher_nfe=8".split(),
}


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


def proposed(capsys) -> list[str]:
    """Returns the commands after "next:" in what was printed."""
    out = capsys.readouterr().out
    return [line.removeprefix("next: ") for line in out.splitlines() if line.startswith("next: ")]


def carry_out(line: str, **words: str) -> None:
    """Runs a proposed command, cheaply."""
    name, *arguments = shlex.split(line)
    assert name == "fewstep"
    arguments = [words.get(a, a) for a in arguments]
    more = CHEAP.get(arguments[0], [])
    if more[:1] == ["-n"] and "-n" in arguments:
        more = more[2:]  # a small number is carried over
    assert run([*arguments, *more]) == 0, line


def test_sample_and_plan(capsys):
    assert (
        run(["sample", "my model", "-n", "2", "--nfe", "2", "--class-labels", "0,1", "--out", "s"])
        == 0
    )
    (line,) = proposed(capsys)
    assert "--class-labels 0,1" in line
    carry_out(line)
    capsys.readouterr()
    made = [
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
    assert run(made) == 0
    (line,) = proposed(capsys)
    carry_out(line)
    (line,) = proposed(capsys)
    carry_out(line, MODEL="my model")


def test_listings(capsys):
    for words, names in (
        (["solvers"], {"NAME": "tab3"}),
        (["solvers", "tab3"], {}),
        (["models"], {}),
    ):
        assert run(words) == 0
        for line in proposed(capsys):
            for part in re.split(r", or ", line):
                assert part.startswith("fewstep ")
                parts = [names.get(a, a) for a in shlex.split(part)[1:]]
                if parts[0] == "sample":
                    # The embedded model is large; what is proposed is sampled with two evaluations.
                    assert run([*parts, "-n", "1", "--nfe", "2", "--overwrite"]) == 0
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
    (printed,) = proposed(capsys)
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
        after = proposed(capsys)
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
    (line,) = proposed(capsys)
    assert shlex.split(line)[1:] == [
        "distill",
        "my model",
        "my store",
        "--out",
        "my store-operator",
    ]


def test_commands_are_quoted_and_complete():
    assert command(
        "sample", "m", n=4, force=True, seed=None, guidance=7.50, class_labels="a b"
    ) == ("fewstep sample m -n 4 --force --guidance 7.5 --class-labels 'a b'")
    assert command("plan show", "x y.json", option=["a=1", "b=2"]) == (
        "fewstep plan show 'x y.json' --option a=1 --option b=2"
    )

"""``fewstep compare``: the files that it writes, resuming an interrupted run, and its page."""

from __future__ import annotations

import functools
import json
import re

import numpy
import pytest
from PIL import Image

import fewstep
from fewstep.cli import run
from fewstep.comparison.cells import Runner
from pages import Reader, requests
from tiny_models import write_tiny

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

SMALL = ("--nfe", "3,5", "-n", "24", "--batch-size", "10", "--reference-nfe", "12")


@pytest.fixture
def command(command):
    return functools.partial(command, "compare", said=("auto chose",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of points with data, shared by several tests."""
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["compare", "mixture-smooth", "--out", str(out), *SMALL]
    arguments += ["--solvers", "tab1,ddim,heun,ddim+eta=1.0", "--data", "mixture-smooth"]
    assert run([*arguments, "--metrics", "fid,kid", "--seed", "4"]) == 0
    return out


def test_the_files_and_what_is_in_them(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "report.html",
        "results.json",
        "best-3.json",
        "best-5.json",
        "samples-3.png",
        "samples-5.png",
    } <= names
    content = json.loads((finished / "results.json").read_text())
    assert content["format"] == "fewstep.comparison"
    assert content["versions"]["fewstep"] == fewstep.__version__
    assert content["question"]["seed"] == 4
    assert "--metrics fid,kid" in content["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", content["date"])
    cells = {(c["sampler"], c["nfe"]): c for c in content["cells"]}
    assert len(cells) == 8  # Heun makes 3 and 5 evaluations
    assert set(cells["tab1", 5]["scores"]) == {"fid", "kid", "rms"}
    assert cells["ddim+eta=1.0", 3]["stochastic"]
    assert not cells["heun", 3]["stochastic"]
    for verdict in content["verdicts"]:
        best = min(
            (c for c in content["cells"] if c["nfe"] == verdict["nfe"]),
            key=lambda c: c["scores"]["fid"]["value"],
        )
        assert verdict["best"] == best["sampler"]
        assert verdict["behind"][best["sampler"]]["value"] == 0
        for name in verdict["ties"]:
            assert verdict["behind"][name]["low"] <= 0


def test_the_command_in_the_results_gives_the_same_numbers(finished, tmp_path, command):
    import shlex

    content = json.loads((finished / "results.json").read_text())
    arguments = shlex.split(content["command"])[2:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    command(*arguments)
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert [c["scores"] for c in again["cells"]] == [c["scores"] for c in content["cells"]]


def test_the_page_has_every_number_and_names_no_server(finished):
    text = (finished / "report.html").read_text()
    read = Reader(text)
    assert read.open == []
    assert len(set(read.ids)) == len(read.ids)
    assert "http" not in text
    content = json.loads((finished / "results.json").read_text())
    values = {a.get("data-value") for tag, a in read.attributes if tag == "td"}
    for cell in content["cells"]:
        assert {str(score["value"]) for score in cell["scores"].values()} <= values
    assert sum(tag == "img" for tag, _ in read.attributes) == 2
    assert sum(tag == "svg" for tag, _ in read.attributes) == 4  # FID, RMS, seconds, KID
    assert all(a["alt"] for tag, a in read.attributes if tag == "img")


def test_a_browser_sorts_all_numbers(browser, finished):
    list(requests(browser))
    browser.get((finished / "report.html").as_uri())
    (table,) = browser.find_elements("css selector", "table.sortable")
    heads = table.find_elements("css selector", "thead th")
    titles = [" ".join(head.text.split()) for head in heads]
    assert titles[:6] == [
        "sampler",
        "NFE",
        "verdict",
        "FID",
        "behind the best",
        "RMS to the reference",
    ]

    def column(place):
        rows = table.find_elements("css selector", "tbody tr")
        return [
            float(row.find_elements("css selector", "th, td")[place].get_attribute("data-value"))
            for row in rows
        ]

    for place in (3, 5):
        before = column(place)
        assert before != sorted(before)
        heads[place].find_element("tag name", "button").click()
        assert column(place) == sorted(before)
        heads[place].find_element("tag name", "button").click()
        assert column(place) == sorted(before, reverse=True)
    assert browser.get_log("browser") == []
    requested = [
        url for url in requests(browser) if url.startswith(("file:", "http", "ws", "ftp"))
    ]
    assert requested == [(finished / "report.html").as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_the_best_is_a_recipe_that_sample_takes(finished, tmp_path, capsys):
    best = str(finished / "best-3.json")
    out = tmp_path / "drawn"
    assert run(["sample", "mixture-smooth", "--recipe", best, "-n", "4", "--out", str(out)]) == 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["nfe"] == 3
    assert recipe["about"]["compared"] == recipe["name"]


def test_a_finished_comparison_is_kept_extended_or_replaced(tmp_path, command):
    out = tmp_path / "out"
    base = ("mixture-smooth", "--out", out, *SMALL, "--solvers")
    text = command(*base, "ddim")
    assert "wrote" in text
    assert "next: fewstep sample mixture-smooth --recipe" in text
    before = (out / "report.html").read_bytes()
    assert "give --extend to keep its cells" in command(*base, "ddim,tab1", code=2)
    assert (out / "report.html").read_bytes() == before
    command(*base, "ddim,tab1", "--extend")
    content = json.loads((out / "results.json").read_text())
    assert len(content["cells"]) == 4
    assert "other settings" in command(*base, "ddim", "--seed", "9", "--extend", code=2)
    command(*base, "ddim", "--seed", "9", "--overwrite")
    content = json.loads((out / "results.json").read_text())
    assert (len(content["cells"]), content["question"]["seed"]) == (2, 9)


def test_an_interrupted_command_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    base = ["compare", "mixture-smooth", "--out", str(out), *SMALL, "--solvers", "ddim,tab1"]
    original, done = Runner._joined, []

    def stopping(self, task):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((task.name, task.job.nfe))
        return original(self, task)

    monkeypatch.setattr(Runner, "_joined", stopping)
    assert run(base) == 130
    assert "are saved; to resume: fewstep compare" in capsys.readouterr().err
    assert done == [("reference", 12), ("ddim", 3), ("ddim", 5)]
    assert not (out / "report.html").exists()
    done.clear()
    assert run(base) == 0
    assert done == [("tab1", 3), ("tab1", 5)]  # the cells that were there are not run again


def test_any_rank_writes_the_report_once(tmp_path, capsys, monkeypatch):
    base = ["compare", "mixture-smooth", "--out", str(tmp_path / "out"), *SMALL]
    base += ["--solvers", "ddim,tab1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run(base) == 0
        written.append((tmp_path / "out" / "report.html").read_bytes())
    assert written[0] == written[1]
    assert capsys.readouterr().out.count("wrote ") == 1


def test_without_data_samplers_are_ordered_by_their_distance(tmp_path, command):
    out = tmp_path / "out"
    text = command("mixture-smooth", "--out", out, *SMALL, "--solvers", "tab2,ddpm")
    rows = [line.split() for line in text.splitlines() if line.startswith(("  3", "  5"))]
    assert [(row[0], row[1], row[-1]) for row in rows if row[1] == "tab2"] == [
        ("3", "tab2", "best"),
        ("5", "tab2", "best"),
    ]
    content = json.loads((out / "results.json").read_text())
    assert (content["measure"], content["data"]) == ("rms", None)
    assert "No real data were given" in (out / "report.html").read_text()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = numpy.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=numpy.uint8)
    numpy.savez(folder / "data.npz", images=pixels)
    numpy.savez(folder / "wide.npz", images=numpy.zeros((60, 4, 8), numpy.uint8))
    return write_tiny(folder / "model"), folder


def test_images_stand_in_rows_by_sampler(images, tmp_path, command, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    model, folder = images
    out = tmp_path / "out"
    command(
        *(model, "--out", out, "--solvers", "ddim,tab1", "--nfe", "3", "-n", "10"),
        *("--reference-nfe", "4", "--data", folder / "data.npz", "--features", "pixels"),
        *("--class-labels", "all", "--guidance", "1.5", "--metrics", "fid"),
    )
    content = json.loads((out / "results.json").read_text())
    assert [cell["calls_per_image"] for cell in content["cells"]] == [6, 6]
    assert content["notes"] == {"class labels": "all"}
    assert json.loads((out / "best-3.json").read_text())["guidance"] == 1.5
    with Image.open(out / "samples-3.png") as picture:
        height = picture.height
    assert height > 3 * 64  # the reference and two samplers, magnified to 64 pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solvers", "tab9"], "Unknown solver 'tab9'"),
        pytest.param(
            *(["--solvers", "diffusers:Nothing"], "Unknown scheduler of diffusers 'Nothing'"),
            marks=pytest.mark.diffusers,
        ),
        (["--solvers", ","], "at least one sampler"),
        (["--nfe", "ten"], "--nfe is one or more positive integers"),
        (["--nfe", "0"], "--nfe is one or more positive integers"),
        (["-n", "0"], "-n must be a positive integer"),
        (["-n", "1"], "n must be at least 2"),
        (["--metrics", "fidd"], "Did you mean 'fid'"),
        (["--data", "nowhere"], "there is no folder or file 'nowhere'"),
        (["--data", "fashion"], "the data have shape"),
        (["--class-labels", "all"], "not known"),
        (["--guidance", "2"], "null condition"),
        (["--device", "cdua"], "device 'cdua'"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, tmp_path, command):
    out = tmp_path / "out"
    settings = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    settings.update(zip(arguments[::2], arguments[1::2], strict=True))
    given = [part for pair in settings.items() for part in pair]
    error = command("mixture-smooth", "--out", out, *given, code=2)
    assert re.search(message, error)
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert not out.exists()


def test_the_help_says_how_a_sampler_is_written(command):
    text = " ".join(command("--help").replace("│", " ").split())
    assert "NAME[@GRID[:VALUE]][+OPTION=VALUE]" in text
    assert "diffusers:NAME" in text


def test_data_of_another_shape_are_refused(images, tmp_path, command, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    model, folder = images
    arguments = (model, "--out", tmp_path / "out", "--features", "pixels", "--data")
    error = command(*arguments, folder / "wide.npz", code=2)
    assert "shape (1, 4, 8), the model's samples (1, 8, 8)" in error

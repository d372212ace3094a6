"""fewstep analyze: files, resuming an interrupted run, what is refused, and the page."""

from __future__ import annotations

import json
import re

import numpy
import pytest
import torch

import fewstep
from fewstep.cli import run
from fewstep.sampling.profile import Profile
from fewstep.sampling.recipe import SamplerRecipe

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("undrawn", "few_hypotheses", "coarse_references"),
]

SMALL = ["--nfe", "3,4", "-n", "8", "--budget", "0"]


def analyze(out, *more, model="mixture-smooth"):
    return run(["analyze", model, *SMALL, "--out", str(out), *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    assert analyze(out, "--data", "mixture-smooth") == 0
    return out


def test_the_files(done):
    assert sorted(path.name for path in done.iterdir()) == [
        "grid.json",
        "recipe-3.json",
        "recipe-4.json",
        "report.html",
        "results.json",
    ]
    results = json.loads((done / "results.json").read_text())
    assert results["format"] == "fewstep.analysis"
    assert results["check"]["outcome"] == "passed"
    assert [item["nfe"] for item in results["advice"]] == [3, 4]
    for item in results["advice"]:
        assert not item["polished"]
        assert item["best"]["score"] <= item["default"]["score"]
    # The model is exact: what it adds to the optimal denoiser of 4096 draws is little at high noise.
    assert results["fitting"]["trajectories"]["rms"][2] < 0.01
    assert results["fitting"]["points"] == 4096
    assert results["settings"]["fingerprint"] == fewstep.load("mixture-smooth").fingerprint()


def test_recipes_and_grids_are_what_was_measured(done):
    results = json.loads((done / "results.json").read_text())
    model = fewstep.load("mixture-smooth")
    best = results["advice"][1]["best"]
    recipe = SamplerRecipe.load(done / "recipe-4.json")
    assert recipe.about["rms_held_out"] == best["held_out"]
    plan = recipe.plan_for(model.schedule)
    assert plan.knots.tolist() == best["times"]
    # Held-out samples are the second half of those of the seed.
    fine = fewstep.grid("quadratic", model.schedule, 400)
    end = fewstep.sample(model, 8, first=8, solver="tab3", grid=fine)
    ours = fewstep.sample(model, 8, first=8, recipe=recipe)
    assert float((ours - end).square().mean().sqrt()) == pytest.approx(best["held_out"], rel=0.02)
    grids = Profile.load(done / "grid.json")
    assert grids.recommended == {3: results["advice"][0]["best"]["solver"], 4: best["solver"]}
    same = fewstep.sample(model, 8, first=8, nfe=4, grid=f"auto:{done / 'grid.json'}")
    assert torch.equal(same, ours)


def test_the_command_line_takes_the_grid(done, tmp_path):
    words = ["sample", "mixture-smooth", "--grid", f"auto:{done / 'grid.json'}", "-n", "4"]
    assert run([*words, "--nfe", "4", "--out", str(tmp_path / "a")]) == 0
    recipe = SamplerRecipe.load(tmp_path / "a" / "recipe.json")
    assert recipe.grid == "explicit"
    assert recipe.options["times"] == SamplerRecipe.load(done / "recipe-4.json").options["times"]
    assert run([*words, "--nfe", "4", "--solver", "tab2", "--out", str(tmp_path / "b")]) == 0
    assert SamplerRecipe.load(tmp_path / "b" / "recipe.json").name == "tab2"


def test_the_page_is_whole(done):
    text = (done / "report.html").read_text()
    for heading in (
        "Recommendation",
        "Model check",
        "Sources of the error",
        "Fitting and discretisation",
        "Spectrum over time",
    ):
        assert heading in text
    assert text.count("<svg") == 9
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    results = json.loads((done / "results.json").read_text())
    assert f"{results['advice'][0]['best']['held_out']:#.4g}" in text


def test_results_are_not_overwritten(done, capsys):
    before = (done / "results.json").read_text()
    assert analyze(done) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (done / "results.json").read_text() == before


@pytest.mark.slow
def test_an_interrupted_study_goes_on(tmp_path, monkeypatch, capsys):
    from fewstep.studies import stages

    out = tmp_path / "out"

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "advice_of", stop)
        assert analyze(out) == 130
    assert "to resume: fewstep analyze" in capsys.readouterr().err
    assert (out / "unfinished.json").exists()
    assert not (out / "report.html").exists()
    assert analyze(out, "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        # What was done is not done again.
        patch.setattr(stages, "model_check", stop)
        patch.setattr(stages, "log_gain_at", stop)
        patch.setattr(stages, "follow", stop)
        assert analyze(out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "next: fewstep sample mixture-smooth --recipe" in text
    assert not (out / "unfinished.json").exists()
    assert not (out / "parts").exists()
    assert "is omitted" in (out / "report.html").read_text()
    assert json.loads((out / "results.json").read_text())["fitting"] is None


def test_a_study_is_not_resumed_with_other_images(tmp_path, monkeypatch, capsys):
    from PIL import Image

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("one", "two"):
        Image.new("L", (4, 4)).save(images / f"{name}.png")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.workflows.analyzing.study", stop)
    monkeypatch.setattr(
        "fewstep.workflows.analyzing.real_samples", lambda *_: (torch.zeros(2, 2), None)
    )
    assert analyze(out, "--data", str(images)) == 130
    Image.new("L", (4, 4), 255).save(images / "two.png")
    capsys.readouterr()
    assert analyze(out, "--data", str(images)) == 2
    assert "(files: the file 'two.png' has changed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--nfe", "0"], "NFE are integers from 2 to 40"),
        (["--nfe", "5,x"], "NFE are integers"),
        (["-n", "2"], "at least 4"),
        (["--budget", "-1"], "--budget"),
        (["--data", "nowhere"], "makes no images"),
        (["--data", "fashion"], "not the images"),
    ],
)
def test_mistakes_are_errors_beforehand(tmp_path, more, message, capsys):
    out = tmp_path / "out"
    words = ["analyze", "mixture-smooth", "--out", str(out), *more]
    assert run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_data_of_another_shape(tmp_path, capsys):
    images = numpy.zeros((3, 8, 8), numpy.uint8)
    numpy.savez(tmp_path / "d.npz", images=images)
    data = str(tmp_path / "d.npz")
    assert analyze(tmp_path / "out", "--data", data) == 2
    assert "makes no images" in capsys.readouterr().err
    assert analyze(tmp_path / "out", "--data", "mixture-smooth", model="fashion") == 2
    assert "(1, 28, 28)" in capsys.readouterr().err

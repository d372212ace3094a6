"""``fewstep.analyze``: results in memory, and the command's files."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch

import fewstep
from fewstep.cli import run
from small_studies import coarse_references, few_hypotheses

pytestmark = pytest.mark.usefixtures("few_hypotheses", "coarse_references")

MODEL = fewstep.load("mixture-smooth")
SMALL = {"nfe": [3], "n": 4, "budget": 0, "seed": 2}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    """A study in memory; of its temporary folder nothing remains."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        few_hypotheses(patch)
        coarse_references(patch)
        made = fewstep.analyze(MODEL, **SMALL)
    assert not list(folder.iterdir())
    return made


def test_the_result_has_a_table_recipes_and_a_profile(analysis):
    (row,) = analysis.table()
    best = analysis.advice[0].best
    assert (row["nfe"], row["solver"], row["held_out"]) == (3, best.solver, best.held_out)
    assert str(analysis).splitlines()[0].split()[:2] == ["NFE", "solver"]
    assert analysis._repr_html_().startswith("<table>")
    recipe = analysis.recipes[3]
    assert list(recipe.options["times"]) == list(best.times)
    own = fewstep.sample(MODEL, 4, recipe=recipe)
    assert torch.equal(own, fewstep.sample(MODEL, 4, nfe=3, profile=analysis.profile))
    assert analysis.verdict == analysis.results["check"]["verdict"]
    assert analysis.shown == 3


@pytest.mark.slow
def test_it_is_saved_as_the_command_writes_it(analysis, tmp_path, undrawn):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = analysis.save(tmp_path / "saved")
    words = ["analyze", "mixture-smooth", "--nfe", "3", "-n", "4", "--budget", "0", "--seed", "2"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    names = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("saved", "out")]
    assert names[0] == names[1]
    saved, written = (
        json.loads((tmp_path / where / "results.json").read_text())["advice"]
        for where in ("saved", "out")
    )
    assert saved == written
    assert page.name == "report.html"
    with pytest.raises(ValueError, match="exists"):
        analysis.save(tmp_path / "saved")
    analysis.save(tmp_path / "saved", overwrite=True)
    with pytest.raises(ValueError, match="exists"):
        fewstep.analyze(MODEL, **SMALL, out=tmp_path / "saved")


def never(x, t, **cond):
    raise AssertionError("the network was evaluated")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nfe": [1]}, "nfe is integers from 2 to 40"),
        ({"nfe": []}, "nfe is integers"),
        ({"n": 3}, "n must be at least 4"),
        ({"budget": -1}, "number of minutes"),
        ({"seed": "one"}, "seed"),
        ({"data": "nowhere"}, "makes no images"),
        ({"data": torch.zeros(5, 3)}, "must have shape"),
        ({"data": 3}, "a tensor or an array"),
        ({"colour": 3}, "colour"),
        ({"steps": 3}, "steps"),
    ],
)
def test_mistakes_are_errors_beforehand(given, message):
    model = fewstep.Denoiser.wrap(
        never, schedule=MODEL.schedule, prediction="eps", event_shape=(2,)
    )
    if "colour" in given:
        model = MODEL
    with pytest.raises((ValueError, TypeError), match=message):
        fewstep.analyze(model, **{**SMALL, **given})


def test_data_in_a_tensor_are_those_of_the_study(monkeypatch):
    points = MODEL.draw(64, seed=1)

    def stop(subject, *arguments, **options):
        assert torch.equal(subject.data, points.float())
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.workflows.analyzing.study", stop)
    with pytest.raises(KeyboardInterrupt):
        fewstep.analyze(MODEL, **SMALL, data=points)

"""``fewstep.compare``: every kind of sampler, results in memory, and the command's files."""

from __future__ import annotations

import gc
import json
import tempfile

import pytest

import fewstep
from fewstep.base.tables import Column, Table
from fewstep.cli import run
from fewstep.comparison.entries import entry_of, read_entries
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.sampling.sample import sampler
from fewstep.solvers import solver

MODEL = fewstep.load("mixture-smooth")
SCHEDULE = MODEL.schedule
SMALL = {"nfe": [3], "n": 6, "reference_nfe": 6}
PROFILE = Profile(SCHEDULE, "", (ProfileEntry("tab1", (1.0, 0.6, 0.3, 0.01)),), {3: "tab1"})


class Tuned:
    """What ``fewstep.tune`` returns, as far as a comparison reads it."""

    recipe = fewstep.SamplerRecipe(name="tab2", nfe=3)


@pytest.mark.parametrize(
    ("thing", "name", "given"),
    [
        ("tab2@karras+eta=0", "tab2@karras+eta=0", None),
        (("tab2", "karras"), "tab2@karras", {"solver": "tab2", "grid": "karras"}),
        (("auto", "karras"), "auto@karras", {"grid": "karras"}),
        (solver("ddim", eta=0.5), "ddim", {"solver": "ddim", "eta": 0.5}),
        (
            fewstep.SamplerRequest("tab2", options={"t_end": 0.01}),
            "tab2+t_end=0.01",
            {"solver": "tab2", "t_end": 0.01},
        ),
        (("tab2", fewstep.grid("karras", SCHEDULE, 3)), "tab2@times", {"solver": "tab2", "grid": "karras"}),
        (PROFILE, "profile", {"profile": PROFILE}),
        (fewstep.plan("tab1", SCHEDULE, nfe=3), "tab1", {"solver": "tab1"}),
        (fewstep.SamplerRecipe(name="tab1", nfe=3, grid="karras"), "tab1", {"solver": "tab1", "grid": "karras"}),
        (Tuned(), "tab2", {"solver": "tab2"}),
        (sampler(MODEL, solver="ipndm", nfe=3), "ipndm", {"solver": "ipndm"}),
    ],
    # Without addresses: every process has to name the tests alike.
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_each_kind_of_sampler_is_what_sample_runs(thing, name, given):
    entry = entry_of(thing)
    assert entry.name == name
    if given is not None:
        wanted = sampler(MODEL, nfe=3, **given).plan
        assert entry.build(MODEL, 3).plan.to_json() == wanted.to_json()
        assert entry.recipe(MODEL, 3) is not None


def test_what_is_no_sampler_is_refused():
    for wrong in (3, [3], {"a": 3}):
        with pytest.raises(TypeError, match="is a text, a pair"):
            fewstep.compare(MODEL, wrong, **SMALL)
    with pytest.raises(ValueError, match="a mapping gives samplers names"):
        read_entries(["tab1", solver("tab1")])
    with pytest.raises(ValueError, match="adaptive"):
        entry_of(fewstep.SamplerRecipe(kind="adaptive", name="dopri5"))


def test_samplers_of_one_name_are_told_apart():
    plans = [fewstep.plan("ddim", SCHEDULE, nfe=k) for k in (2, 3)]
    assert [entry.name for entry in read_entries(["ddim", *plans])] == [
        "ddim",
        "ddim (2)",
        "ddim (3)",
    ]
    assert [entry.name for entry in read_entries(("tab1", "tab2"))] == ["tab1", "tab2"]
    assert [entry.name for entry in read_entries(("tab1", "karras"))] == ["tab1@karras"]


@pytest.fixture(scope="module")
def result():
    samplers = {
        "<first>": "ddim",
        "own": lambda model, nfe: sampler(model, solver="tab1", nfe=nfe),
    }
    return fewstep.compare(MODEL, samplers, **SMALL, seed=4)


def test_the_result_has_a_table_a_page_and_recipes(result):
    table = result.table()
    assert {row["sampler"] for row in table} == {"<first>", "own"}
    assert table[0]["verdict"] == "best"
    assert str(result) == str(table)
    assert "RMS to the reference" in str(result)
    page = result._repr_html_()
    assert page.startswith("<table>")
    assert "&lt;first&gt;" in page
    assert "<first>" not in page
    assert result.recipes[3].nfe == 3 or result.recipes[3].plan.nfe == 3
    best = result.verdicts[0].best
    assert fewstep.sample(MODEL, 2, recipe=result.recipes[3]).shape == (2, 2)
    assert best.scores["rms"].value == table[0]["rms"].value


def test_it_is_saved_as_the_command_writes_it(result, tmp_path, undrawn):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = result.save(tmp_path / "saved")
    arguments = [
        "compare",
        "mixture-smooth",
        "--nfe",
        "3",
        "-n",
        "6",
        "--reference-nfe",
        "6",
        "--seed",
        "4",
    ]
    assert run([*arguments, "--solvers", "ddim,tab1", "--out", str(tmp_path / "out")]) == 0
    assert page == tmp_path / "saved" / "report.html"
    names = [sorted(p.name for p in (tmp_path / where).iterdir()) for where in ("saved", "out")]
    assert names[0] == names[1]
    saved, written = (
        [
            cell["scores"]
            for cell in json.loads((tmp_path / where / "results.json").read_text())["cells"]
        ]
        for where in ("saved", "out")
    )
    assert saved == written
    with pytest.raises(ValueError, match="exists"):
        result.save(tmp_path / "saved")
    result.save(tmp_path / "saved", overwrite=True)
    # More samplers go into the same folder, from either side.
    more = fewstep.compare(MODEL, "ddim,tab2", **SMALL, seed=4, out=tmp_path / "saved")
    assert {cell.name for cell in more.cells} == {"ddim", "tab2"}
    assert more.paths[0] == page


def test_files_in_memory_go_with_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = fewstep.compare(MODEL, "ddim", **SMALL)
    assert len(list(tmp_path.iterdir())) == 1
    del made
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Unknown solver"):
        fewstep.compare(MODEL, "tab9", **SMALL)
    assert not list(tmp_path.iterdir())


def test_data_in_a_tensor():
    points = MODEL.draw(100, seed=1)
    found = fewstep.compare(MODEL, "ddim", **SMALL, data=points, metrics=["fid"])
    assert set(found.cells[0].scores) == {"fid", "rms"}
    for wrong, message in (
        (points[:5], "n of at least 20"),
        (points[:, :1], "shape"),
        (points.int(), "floats"),
        (points * float("nan"), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fewstep.compare(MODEL, "ddim", **SMALL, data=wrong)
    with pytest.raises(TypeError, match="a tensor or an array"):
        fewstep.compare(MODEL, "ddim", **SMALL, data=3)


def test_a_profile_on_file_is_a_sampler(tmp_path):
    entry = entry_of(PROFILE.save(tmp_path / "mine.json"))
    assert (entry.name, entry.nfe) == ("mine", None)
    assert entry.build(MODEL, 3).plan.name == "tab1"


def test_a_sampler_of_another_model_is_refused():
    other = fewstep.Denoiser.wrap(
        lambda x, t: x, schedule=SCHEDULE, prediction="eps", event_shape=(3,)
    )
    with pytest.raises(ValueError, match=r"shape \(3,\), the model \(2,\)"):
        fewstep.compare(MODEL, sampler(other, solver="ddim", nfe=3), **SMALL)


def test_a_table_is_rows_and_text():
    table = Table(
        [{"a": 1, "b": None}], [Column("a"), Column("b", "<b>", left=True)], title="t & u"
    )
    assert str(table) == repr(table) == "t & u\na  <b>\n1"
    assert table[0]["a"] == 1
    assert "<caption>t &amp; u</caption>" in table._repr_html_()


def test_profiles_and_tuned_samplers_have_tables():
    from fewstep.learned.problem import TunedSampler
    from fewstep.learned.verdict import Verdict

    entry = ProfileEntry("tab1", (1.0, 0.6, 0.3, 0.01), error=0.25, default_error=0.5)
    profile = Profile(SCHEDULE, "", (entry,), {3: "tab1"})
    assert str(profile.table()).split()[-4:] == ["3", "tab1", "0.2500", "0.50"]
    assert "tab1" in profile._repr_html_()
    score = {"value": 0.5, "low": 0.25, "high": 1.0}
    tuned = TunedSampler(
        fewstep.SamplerRecipe(name="<gs>", nfe=3),
        fewstep.plan("tab1", SCHEDULE, nfe=3),
        [],
        {"before": {"RMS": score}, "after": {"RMS": score}},
        Verdict("better"),
    )
    assert "RMS" in str(tuned)
    assert "0.5 (0.25 to 1)" in str(tuned)
    assert "<caption>&lt;gs&gt;</caption>" in tuned._repr_html_()

"""Arguments of the wrong kind are refused before any evaluation, at the doors and in the factories."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fewstep

SCHEDULE = fewstep.schedule("ddpm-linear")
WRONG: Any = 5
TEXT: Any = "vp-linear"


def model(**options: Any) -> tuple[fewstep.Denoiser, list[int]]:
    evaluations: list[int] = []

    def network(x, t, y=None):
        evaluations.append(len(x))
        return x / 2

    wrapped = fewstep.Denoiser.wrap(
        network, schedule=SCHEDULE, prediction="eps", event_shape=(3,), **options
    )
    return wrapped, evaluations


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"profile": 5}, TypeError, "profile must be a Profile or the path of one, got int"),
        ({"profile": {}}, TypeError, "profile must be a Profile or the path of one, got dict"),
        ({"noise": torch.full((2, 3), torch.nan)}, ValueError, "noise must be finite"),
        ({"noise": torch.full((2, 3), torch.inf)}, ValueError, "noise must be finite"),
        ({"head_start": 0.5}, ValueError, r"head_start is a time .* 0 to 999.*head_start=499\.5"),
        ({"head_start": 1.0}, ValueError, "head_start is a time"),
    ],
)
def test_arguments_of_sampling(arguments, error, message):
    wrapped, evaluations = model(data_mean=0.0, data_std=0.5)
    for door in (fewstep.sample, lambda *a, **k: next(fewstep.steps(*a, **k))):
        with pytest.raises(error, match=message):
            door(wrapped, 2, **{"nfe": 4, **arguments})
    assert not evaluations


def test_a_head_start_in_the_units_of_the_schedule_is_taken():
    wrapped, evaluations = model(data_mean=0.0, data_std=0.5)
    fewstep.sample(wrapped, 2, solver="ddim", nfe=4, head_start=300)
    assert len(evaluations) == 4
    fewstep.plan("ddim", fewstep.schedule("vp-linear"), nfe=4, head_start=0.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vp-linear", {"beta_max": "20"}),
        ("edm", {"sigma_max": None}),
        ("ddpm-linear", {"beta_end": [0.02]}),
        ("vp-cosine", {"s": True}),
    ],
)
def test_options_of_schedules_are_numbers(name, options):
    with pytest.raises(TypeError, match=f"of the schedule '{name}' must be a number, got"):
        fewstep.schedule(name, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("power", {"power": "2"}), ("karras", {"rho": None})]
)
def test_options_of_grids_are_numbers(name, options):
    with pytest.raises(TypeError, match=f"of the grid '{name}' must be a number, got"):
        fewstep.grid(name, SCHEDULE, 4, **options)


def test_the_name_of_a_schedule_is_no_schedule():
    with pytest.raises(TypeError, match=r"make one with fewstep\.schedule"):
        fewstep.grid("uniform", "ddpm-linear", 4)  # type: ignore[arg-type]


def test_a_plan_is_read_from_text_only():
    with pytest.raises(TypeError, match="the plan must be a text, got dict"):
        fewstep.Plan.from_json({})  # type: ignore[arg-type]


def test_an_optional_label_may_be_none():
    wrapped, _ = model(num_classes=10)
    unlabelled = fewstep.sample(wrapped, 2, nfe=4)
    torch.testing.assert_close(fewstep.sample(wrapped, 2, nfe=4, y=None), unlabelled)


@pytest.mark.parametrize("nfe", [(1000,), (4, 41), None, "4,5", (2.5,), (True,)])
def test_budgets_that_cannot_be_measured(nfe):
    """A measurement takes memory with the cube of the evaluations: 1,000 filled a machine."""
    wrapped, evaluations = model()
    with pytest.raises(ValueError, match="nfe"):
        fewstep.fit(wrapped, nfe=nfe, n=4)
    with pytest.raises(ValueError, match="nfe is integers from 2 to 40"):
        fewstep.analyze(wrapped, nfe=nfe, n=4)
    assert not evaluations


def test_a_profile_that_cannot_be_written_is_not_measured(tmp_path):
    wrapped, evaluations = model()
    written = tmp_path / "profile.json"
    written.write_text("{}")
    with pytest.raises(IsADirectoryError):
        fewstep.fit(wrapped, nfe=(4,), n=4, out=tmp_path)
    with pytest.raises(ValueError, match="exists; give overwrite"):
        fewstep.fit(wrapped, nfe=(4,), n=4, out=written)
    assert not evaluations
    assert written.read_text() == "{}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fewstep.exact.GaussianMixture([[torch.nan]], [1.0], [1.0], SCHEDULE), "means must be finite"),
        (lambda: fewstep.exact.GaussianMixture(TEXT, [1.0], [1.0], SCHEDULE), "means must be numbers"),
        (lambda: fewstep.exact.GaussianMixture([[0.0]], [1.0], [1.0], TEXT), "make one with"),
        (lambda: fewstep.exact.DataSet(torch.full((3, 2), torch.nan), SCHEDULE), "points must be finite"),
        (lambda: fewstep.exact.DataSet(TEXT, SCHEDULE), "points must be a tensor, got str"),
        (lambda: fewstep.metrics.fid(torch.ones(9, 2) + 0j, torch.ones(9, 2)), "real numbers"),
        (lambda: fewstep.compare(model()[0], ["ddim"], nfe=[4], n=8, metrics=["fid"]), "give data"),
        (lambda: fewstep.compare(model()[0], ["ddim"], nfe=[4], n=8, features="none"), "give data"),
        (lambda: fewstep.tune(model()[0], nfe=4, objective=WRONG), "an objective is a text"),
        (lambda: fewstep.tune(model()[0], nfe=4, search=WRONG), "search must be a Search"),
        (lambda: fewstep.tune(model()[0], nfe=4, family_options=WRONG), "family_options must be"),
        (lambda: fewstep.train(torch.zeros(2, 1, 8, 8), recipe=WRONG), "recipe must be a TrainRecipe"),
        (lambda: fewstep.load(WRONG), "a model is a name or a folder, got int"),
        (lambda: fewstep.load("mixture-smooth", dtype=TEXT), "dtype must be a floating type"),
        (lambda: fewstep.record(model()[0], "unused", n=4, about=WRONG), "about must be a mapping"),
    ],
)  # fmt: skip
def test_arguments_of_other_functions(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()

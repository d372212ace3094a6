"""Tables of noise levels of other tools: read, checked with a broken one of each kind, imported, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.diffusion.published_grids import AYS_TABLES
from fewstep.models.exact import smooth
from fewstep.sampling.tables import (
    Table,
    check_plan,
    check_table,
    export,
    read_table,
    recipe_of_table,
)

SD, FLOW = fewstep.schedule("ddpm-scaled-linear"), fewstep.schedule("flow")
AYS = (*AYS_TABLES["sd15"][:-1], 0.0)


@pytest.mark.parametrize(
    "text",
    ["14.615, 6.475, 0.0", "14.615 6.475 0", "[14.615, 6.475, 0]", "14.615\n6.475\n0\n",
     '{"sigmas": [14.615, 6.475, 0]}', "(14.615; 6.475; 0)"],
)  # fmt: skip
def test_tables_are_read_as_they_are_written(text: str, tmp_path: Path) -> None:
    expected = Table("sigmas", (14.615, 6.475, 0.0))
    assert read_table(text) == expected
    file = tmp_path / "table.txt"
    file.write_text(text, encoding="utf-8")
    assert read_table(file) == expected
    assert read_table("999 500 1", "timesteps") == Table("timesteps", (999.0, 500.0, 1.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("none.json", "neither a file nor a list"),
        ("", "neither a file nor a list"),
        ("1, two, 3", "a list of numbers"),
        ("[1, true]", "number 1 of the table is True"),
        ('{"levels": [1]}', "has 'sigmas', 'timesteps' or 'times'"),
        ('{"sigmas": [1], "timesteps": [1]}', "has 'sigmas', 'timesteps' or 'times'"),
        ("[]", "neither a file nor a list"),
        ("[NaN, 1]", "number 0 of the table is nan"),
        ('{"sigmas": "1"}', "list of 1 to"),
    ],
)
def test_what_is_no_table_is_said(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_table(text)


BROKEN: dict[str, tuple[Table, str, bool]] = {
    "order": (Table("sigmas", (14.615, 3.0, 5.0, 0.0)), "number 1 is 3, number 2 is 5", True),
    "wasted": (Table("sigmas", (14.615, 1.0, 0.5, 0.5)), "step 2 goes from 0.5 to 0.5", True),
    "end": (Table("sigmas", (14.615, 3.0, 0.441)), "the last sigma is 0.441", False),
    "start": (Table("sigmas", (7.0, 3.0, 0.0)), "begins at sigma 7", False),
    "range": (Table("sigmas", (80.0, 3.0, 0.0)), "sigma 0 is 80", True),
}
"""One of each: what users report of others' tables."""


@pytest.mark.parametrize("kind", BROKEN)
def test_each_fault_is_found(kind: str) -> None:
    table, text, fatal = BROKEN[kind]
    findings = check_table(table, SD)
    assert [(f.kind, f.fatal) for f in findings if f.kind == kind] == [(kind, fatal)]
    assert any(text in f.text for f in findings)
    with pytest.raises(ValueError, match=text):
        recipe_of_table(table, SD)
    if not fatal:
        assert recipe_of_table(table, SD, force=True).nfe == len(table.values) - 1


def test_sound_tables_have_no_findings() -> None:
    assert check_table(Table("sigmas", AYS), SD) == []
    assert check_table(Table("timesteps", (999.0, 850.0, 736.0, 24.0)), SD) == []
    assert check_table(Table("sigmas", (0.999, 0.5, 0.0)), FLOW) == []
    assert check_table(Table("timesteps", (999.0, 999.0)), SD)[0].kind == "wasted"
    assert check_table(Table("timesteps", (1200.0, 1.0)), SD)[0].kind == "range"
    assert check_table(Table("sigmas", (14.6,)), SD)[0].fatal


def test_a_published_table_becomes_a_recipe_and_comes_back() -> None:
    recipe = recipe_of_table(Table("sigmas", AYS), SD, "dpmpp_2m")
    assert (recipe.name, recipe.nfe, recipe.options["lower_final"]) == ("dpmpp-2m", 10, False)
    plan = recipe.plan_for(SD)
    expected = fewstep.grid("ays", SD, 10).times
    torch.testing.assert_close(plan.knots, expected, rtol=0, atol=1e-9)
    assert check_plan(plan) == []
    again = read_table(export(plan, "sigmas"))
    assert again.values == pytest.approx(AYS, rel=2e-4)
    timesteps = read_table(export(plan, "timesteps"), "timesteps")
    back = recipe_of_table(timesteps, SD, "dpmpp_2m").plan_for(SD)
    torch.testing.assert_close(back.values, plan.values, rtol=1e-6, atol=1e-8)
    both = json.loads(export(plan, "diffusers"))
    assert (len(both["sigmas"]), len(both["timesteps"])) == (11, 10)
    noise = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    one = fewstep.sample(smooth(SD), noise=noise, recipe=recipe)
    two = fewstep.sample(smooth(SD), noise=noise, solver="dpmpp_2m", nfe=10, grid="ays")
    torch.testing.assert_close(one, two)


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_exported_levels_are_taken_by_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    plan = recipe_of_table(Table("sigmas", AYS), SD).plan_for(SD)
    both = json.loads(export(plan, "diffusers"))
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.EulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=both["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx(both["sigmas"], rel=1e-4)
    flow = fewstep.plan("ddim", FLOW, times=[0.999, 0.5, 0.0])
    both = json.loads(export(flow, "diffusers"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=both["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.5, 0.0], rel=1e-6)


def test_times_of_published_lists() -> None:
    """Shares of the schedule with both ends: on a table of N levels t is the timestep N t - 1."""
    list_of_times = (1.0, 0.86, 0.6, 0.3, 0.001)
    recipe = recipe_of_table(Table("times", list_of_times), SD, "ddim")
    assert recipe.nfe == 4
    assert recipe.options["times"] == pytest.approx([999.0, 859.0, 599.0, 299.0, 0.0], abs=1e-9)
    assert not recipe.plan_for(SD).ends_at_zero
    vp = fewstep.schedule("vp-linear")
    assert recipe_of_table(Table("times", list_of_times), vp).options["times"] == list(
        list_of_times
    )
    edm = Table("times", (80.0, 10.98, 3.88, 1.58, 0.002))  # of EDM the time is sigma
    sigmas = recipe_of_table(Table("sigmas", edm.values), fewstep.schedule("edm"))
    made = recipe_of_table(edm, fewstep.schedule("edm"))
    assert made.options["times"] == pytest.approx(sigmas.options["times"], rel=1e-12)
    findings = {
        (1.0, 0.5, 0.4): "noise left at the end: the last time is 0.4",
        (0.8, 0.5, 0.001): "begins at timestep 799",
        (999.0, 500.0, 0.0): "times are shares of the schedule",
        (1.0,): "one level makes no step",
        (1.0, 0.0): "out of range",
    }
    for values, text in findings.items():
        with pytest.raises(ValueError, match=text):
            recipe_of_table(Table("times", values), SD)
    assert read_table('{"times": [1.0, 0.001]}').kind == "times"


def test_plans_with_faults() -> None:
    left = fewstep.plan("ddim", SD, times=[999.0, 500.0, 200.0])
    assert [f.kind for f in check_plan(left)] == ["end"]
    late = fewstep.plan("ddim", SD, times=[700.0, 200.0, -1.0])
    assert [f.kind for f in check_plan(late)] == ["start"]


def test_the_commands(tmp_path: Path, command: Callable[..., str]) -> None:
    table, out = ",".join(map(str, AYS)), tmp_path / "ays.json"
    common: tuple[Any, ...] = ("--schedule", "ddpm-scaled-linear")
    assert "nothing wrong" in command("recipe", "check", table, *common)
    text = command("recipe", "check", "14.615,3,0.441", *common, code=1)
    assert "noise left at the end" in text
    command("recipe", "import", table, *common, "--solver", "dpmpp_2m", "--out", out)
    assert "10 evaluations" in command("recipe", "show", out)
    assert "nothing wrong" in command("recipe", "check", out)
    assert command("recipe", "export", out).startswith("14.61")
    assert "exists" in command("recipe", "import", table, *common, "--out", out, code=2)
    file = tmp_path / "sigmas.json"
    command("recipe", "export", out, "--form", "diffusers", "--out", file)
    again = tmp_path / "again.json"
    command("recipe", "import", file, *common, "--out", again, "--force", "--timesteps")
    assert "exported as sigmas, timesteps" in command(
        "recipe", "export", out, "--form", "x", code=2
    )

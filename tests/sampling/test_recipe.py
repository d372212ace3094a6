"""Recipes: names and numbers to a sampler, through a file and back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.sampling.recipe import SamplerRecipe

SCHEDULE = fewstep.schedule("vp-linear")
PLAN = fewstep.plan("tab2", SCHEDULE, nfe=4)
FUZZ = settings(
    deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
FULL = SamplerRecipe(
    name="ddim",
    nfe=5,
    options={"eta": 0.5, "t_end": 0.01},
    grid="quadratic",
    head_start=0.8,
    schedule=SCHEDULE.to_record(),
    guidance=2.5,
    about={"fid": 12.5, "model": "fashion"},
)


def test_round_trip(tmp_path):
    path = FULL.save(tmp_path / "recipe.json")
    assert SamplerRecipe.load(path) == FULL
    assert SamplerRecipe.from_json(FULL.to_json()) == FULL


def test_a_recipe_makes_the_plan_that_its_words_make():
    result = FULL.plan_for(SCHEDULE)
    by_hand = fewstep.plan(
        "ddim", SCHEDULE, nfe=5, grid="quadratic", head_start=0.8, eta=0.5, t_end=0.01
    )
    assert result.to_json() == by_hand.to_json()


def test_a_plan_is_a_recipe(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    recipe = SamplerRecipe.load(path)
    assert (recipe.kind, recipe.name) == ("plan", "tab2")
    assert recipe.plan_for(SCHEDULE).to_json() == PLAN.to_json()
    again = SamplerRecipe.from_json(recipe.to_json())
    assert again.plan.to_json() == PLAN.to_json()
    model = fewstep.load("mixture-smooth")
    assert torch.equal(
        fewstep.sample(model, 3, recipe=path), fewstep.sample(model, 3, solver="tab2", nfe=4)
    )


REFUSED = {
    "other format": ({"format": "x"}, "the format 'x', not"),
    "other version": ({"version": 2}, "version 2"),
    "unknown key": ({"command": "rm"}, "unknown key 'command'"),
    "unknown kind": ({"kind": "code"}, "kind of a recipe"),
    "no evaluations": ({"nfe": 0}, "nfe must be a positive integer"),
    "a flag for evaluations": ({"nfe": True}, "'nfe' of the recipe must be an integer"),
    "text for evaluations": ({"nfe": "5"}, "'nfe' of the recipe"),
    "list of options": ({"options": [1]}, "'options' of the recipe"),
    "plan of another kind": ({"plan": json.loads(PLAN.to_json())}, "if and only if"),
    "hostile schedule": ({"schedule": {"name": "ddpm-linear", "levels": 10**12}}, "levels"),
    "a schedule of huge numbers": (
        {"schedule": {"name": "vp-linear", "beta_min": 10**400, "beta_max": 10**401}},
        "cannot be created",
    ),
    "unknown schedule": ({"schedule": {"name": "vp"}}, "Unknown schedule"),
    "huge head start": (
        {"head_start": 10**400},
        "'head_start' of the recipe must be a finite number",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(case):
    entries, reason = REFUSED[case]
    content = {**json.loads(FULL.to_json()), **entries}
    with pytest.raises(ValueError, match=reason):
        SamplerRecipe.from_json(json.dumps(content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.json' cannot be read"):
        SamplerRecipe.load(tmp_path / "nowhere.json")
    (tmp_path / "x.json").write_text('{"format": "fewstep.recipe"')
    with pytest.raises(ValueError, match=r"x.json' is not valid JSON"):
        SamplerRecipe.load(tmp_path / "x.json")


def test_names_and_budgets_are_checked_when_it_is_built():
    model = fewstep.load("mixture-smooth")
    with pytest.raises(ValueError, match="Did you mean 'ddim'"):
        SamplerRecipe(name="dimm", nfe=3).build(model)
    with pytest.raises(ValueError, match="nearest budgets are 4 or 6"):
        SamplerRecipe(name="rho-heun", nfe=5).build(model)
    with pytest.raises(ValueError, match="at most"):
        SamplerRecipe(name="ddim", nfe=10**12).build(model)
    with pytest.raises(TypeError, match="code"):
        SamplerRecipe(name="ddim", nfe=3, options={"code": 1}).build(model)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([10**12, 10**400]),
    st.floats(allow_nan=False),
    st.sampled_from(["", "ddim", "plan", "adaptive", "vp-linear"]),
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "nfe", "plan", "levels", "x"]), inner)
    ),
    max_leaves=6,
)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(json.loads(FULL.to_json()))), JSON, min_size=1))
def test_fuzzed_recipes(entries):
    content = {**json.loads(FULL.to_json()), **entries}
    try:
        recipe = SamplerRecipe.from_json(json.dumps(content))
    except ValueError:
        return
    assert SamplerRecipe.from_json(recipe.to_json()) == recipe

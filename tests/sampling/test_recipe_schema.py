"""docs/recipe.schema.json says what the record of a recipe reads: it is made from it, and recipes fit."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import fewstep

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "object": dict, "null": type(None),
}  # fmt: skip


def fits(content: dict[str, Any]) -> bool:
    """The few rules of JSON schema that this one has."""
    known = SCHEMA["properties"]
    if set(content) - set(known) or set(SCHEMA["required"]) - set(content):
        return False
    for name, value in content.items():
        rule = known[name]
        if "const" in rule and value != rule["const"]:
            return False
        if "enum" in rule and value not in rule["enum"]:
            return False
        if "pattern" in rule and not re.search(rule["pattern"], value):
            return False
        kinds = rule.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(isinstance(value, TYPES[kind]) for kind in kinds):
            return False
    return True


def test_the_schema_is_that_of_the_code() -> None:
    path = ROOT / "scripts" / "recipe_schema.py"
    spec = importlib.util.spec_from_file_location("recipe_schema", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.schema() == SCHEMA, "run scripts/recipe_schema.py"


PLAN = fewstep.plan("ddim", fewstep.schedule("vp-linear"), nfe=2)
RECIPES = [
    fewstep.SamplerRecipe(name="unipc3", nfe=8, grid="logistic", options={"scale": 2.0}),
    fewstep.SamplerRecipe(kind="plan", name="ddim", plan=PLAN, guidance=2.0),
    fewstep.SamplerRecipe(kind="adaptive", name="dopri5", options={"rtol": 1e-3}),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_recipes_fit(recipe: fewstep.SamplerRecipe, tmp_path: Path) -> None:
    content = json.loads(recipe.save(tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert fits(content)
    for change in ({"nfe": "8"}, {"kind": "x"}, {"version": 2}, {"extra": 1}, {"options": []}):
        broken = {**content, **change}
        broken.pop("content_sha256", None)
        assert not fits(broken)
        with pytest.raises(ValueError):  # noqa: PT011 (each has its own message)
            fewstep.SamplerRecipe.from_record(broken)

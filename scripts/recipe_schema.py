"""Writes docs/recipe.schema.json, the JSON schema of a recipe, from the record that reads and writes it."""

from __future__ import annotations

import json
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fewstep.sampling.recipe import KINDS, RecipeRecord

PAGE = Path(__file__).parents[1] / "docs" / "recipe.schema.json"
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

ABOUT = {
    "kind": "solver: by name; plan: with its coefficients; adaptive; operator: built into the model",
    "name": "The solver: a name that `fewstep solvers` lists, or auto.",
    "nfe": "The number of network evaluations.",
    "grid": "The grid: a name that `fewstep grids` lists; explicit with the option times. Left out, the solver's own.",
    "head_start": "The time of an analytic head start.",
    "guidance": "The scale of classifier-free guidance that belongs to it.",
    "model": "The fingerprint of the model that it was made for.",
    "options": "The options of the solver and the grid.",
    "schedule": "The noise schedule: its name and options.",
    "about": "Its origin, for readers.",
    "plan": "The plan, of kind plan.",
    "residual": "A correction of the plan's predictions: the name of a safetensors file beside the recipe (or its data in base64), and its SHA-256.",
}


def _type(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, types.UnionType):
        return [name for part in get_args(hint) for name in _type(part)]
    return ["object"] if get_origin(hint) is dict else [NAMES[hint]]


def schema() -> dict[str, Any]:
    """Returns the schema."""
    hints = get_type_hints(RecipeRecord)
    properties: dict[str, Any] = {
        "format": {"const": RecipeRecord.FORMAT},
        "version": {"const": RecipeRecord.VERSION},
        "content_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    }
    for item in fields(RecipeRecord):
        kinds = _type(hints[item.name])
        properties[item.name] = {
            "description": ABOUT[item.name],
            "type": kinds if len(kinds) > 1 else kinds[0],
        }
    properties["kind"]["enum"] = [*KINDS, None]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fewstep recipe",
        "description": "A sampler as names and numbers. A field that is left out has its default.",
        "type": "object",
        "properties": properties,
        "required": ["format", "version"],
        "additionalProperties": False,
    }


if __name__ == "__main__":
    PAGE.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")

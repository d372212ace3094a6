"""The sampler of a PlanScheduler: families of solvers, recipes, stored plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Structure
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.solvers import SOLVERS

FAMILIES: Mapping[str, Mapping[int, str]] = {
    **{
        family: {k + 1: f"{family}{k}" for k in range(4)}
        for family in ("tab", "rhoab", "logrhoab")
    },
    "dpmpp": {1: "ddim", 2: "dpmpp-2m", 3: "dpmpp-3m"},
    "unipc": {2: "unipc2", 3: "unipc3"},
}
"""Families of solvers: their members by order."""


def spacing_name(solver: str, name: str) -> str:
    """Returns the solver whose twin says where steps begin: of a family, whatever the order, its second."""
    return FAMILIES[solver][2] if solver in FAMILIES else name


def solver_name(solver: str, order: int) -> str:
    """Returns the registered name of a family and an order.

    Raises:
        ValueError: If there is no such solver, or it has no such order.
    """
    if not isinstance(solver, str):
        raise ValueError(f"solver must be the name of a solver, got {solver!r:.60}")
    if solver in FAMILIES:
        members = FAMILIES[solver]
        if isinstance(order, bool) or not isinstance(order, int) or order not in members:
            hint = "; 'ddim' is the predictor of first order" if solver == "unipc" else ""
            raise ValueError(
                f"solver_order of {solver!r} must be from {min(members)} to {max(members)}, got {order!r}{hint}"
            )
        return members[order]
    if solver != "auto":
        SOLVERS[solver]
    return solver


def read_recipe(recipe: str | Path) -> tuple[SamplerRecipe, str]:
    """Returns the recipe of a path or of a text, and that text."""
    if not isinstance(recipe, (str, Path)):
        raise ValueError(f"recipe must be a path or the text of a recipe, got {recipe!r:.60}")
    recipe = str(recipe)
    text = recipe if recipe.lstrip().startswith("{") else None
    if text is None:
        stored = SamplerRecipe.load(recipe)  # for its message, if it cannot be read
        # A residual is in a file of its own; a configuration holds it as text.
        text = (
            Path(recipe).read_text(encoding="utf-8")
            if stored.residual is None
            else stored.to_json()
        )
    result = SamplerRecipe.from_json(text)
    if result.kind == "adaptive":
        raise ValueError("an adaptive recipe has no steps beforehand, which a pipeline needs")
    return result, json.dumps(json.loads(text))


def without_scaling(plan: Plan) -> tuple[Plan, float]:
    """Returns the plan without a first row that only scales the initial state, and what it begins with.

    The second is the factor of a standard normal draw: what pipelines call ``init_noise_sigma``.
    """
    rows = plan.structure.rows
    start = float(plan.schedule.sigma(plan.knots[0].detach()))
    first = rows[0]
    if not (isinstance(first, Lin) and first.terms == (0,)):
        return plan, 1.0
    if any(isinstance(row, Lin) and 0 in row.terms for row in rows[1:]):
        return plan, 1.0
    moved: list[Any] = []
    for row in rows[1:]:
        if isinstance(row, Lin):
            row = row._replace(terms=tuple(r - 1 for r in row.terms), offset=row.offset - 1)
        elif isinstance(row, Eval):
            row = row._replace(of=row.of - 1)
        moved.append(row)
    structure = Structure(plan.prediction, tuple(moved), plan.structure.result - 1)
    scaled = start * float(plan.values[0])
    return replace(plan, structure=structure, values=plan.values[1:]), scaled

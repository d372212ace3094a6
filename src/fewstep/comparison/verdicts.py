"""The verdicts of a comparison: the best at each budget, and its significance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewstep.comparison.running import Comparison
from fewstep.comparison.scores import RMS, less_fid, less_rms
from fewstep.comparison.store import Cell
from fewstep.metrics import Estimate
from fewstep.reporting.page import estimate_texts
from fewstep.sampling.recipe import SamplerRecipe


@dataclass(frozen=True)
class Verdict:
    """The order of the samplers at one budget.

    Attributes:
        nfe: The budget.
        measure: The measure they are ordered by: ``"fid"``, or ``"rms"`` to the reference.
        order: The cells, best first.
        behind: The paired difference of each to the first, from the same noise.
    """

    nfe: int
    measure: str
    order: Sequence[Cell]
    behind: Sequence[Estimate]

    @property
    def best(self) -> Cell:
        """The best cell."""
        return self.order[0]

    @property
    def ties(self) -> list[Cell]:
        """The cells whose difference to the first is not significant: its interval includes zero."""
        return [
            cell
            for cell, more in zip(self.order[1:], self.behind[1:], strict=True)
            if more.low <= 0
        ]

    def sentence(self) -> str:
        """Returns the significance of the first place, in words."""
        if len(self.order) == 1:
            return "no other sampler ran at this budget"
        if not self.ties:
            value, low, high = estimate_texts(self.behind[1])
            return f"clearly: `{self.order[1].name}` is behind by {value} ({low} to {high})"
        if len(self.ties) <= 3:
            return "a tie with " + ", ".join(f"`{cell.name}`" for cell in self.ties)
        return f"a tie with {len(self.ties)} others, `{self.ties[0].name}` first among them"


def measure_of(comparison: Comparison) -> str:
    """Returns the measure that samplers are ordered by: FID if all have one, else the distance to the reference."""
    return "fid" if all("fid" in cell.scores for cell in comparison.cells) else RMS


def judge(comparison: Comparison) -> list[Verdict]:
    """Returns a verdict for each budget, in their order."""
    measure = measure_of(comparison)
    data = comparison.setting.data
    verdicts = []
    for nfe in sorted({cell.nfe for cell in comparison.cells}):
        order = sorted(
            (cell for cell in comparison.cells if cell.nfe == nfe),
            key=lambda cell: cell.scores[measure].value,
        )
        stored = [comparison.store.tensors(cell) for cell in order]
        if measure == RMS or data is None:
            first, *others = (tensors["squares"] for tensors in stored)
            more = [less_rms(other, first) for other in others]
        else:
            first, *others = (tensors["features"] for tensors in stored)
            more = less_fid(others, first, data) if others else []
        behind = [_nothing(order[0].scores[measure]), *more]
        verdicts.append(Verdict(nfe, measure, order, behind))
    return verdicts


def _nothing(estimate: Estimate) -> Estimate:
    return replace(estimate, value=0.0, low=0.0, high=0.0, method="itself")


def pareto(comparison: Comparison, measure: str) -> list[Cell]:
    """Returns the Pareto front in seconds and quality, the fastest first."""
    front: list[Cell] = []
    cells = [cell for cell in comparison.cells if measure in cell.scores]
    for cell in sorted(cells, key=lambda c: (c.seconds[0], c.scores[measure].value)):
        if not front or cell.scores[measure].value < front[-1].scores[measure].value:
            front.append(cell)
    return front


def best_recipe(comparison: Comparison, verdict: Verdict) -> tuple[Cell, SamplerRecipe] | None:
    """Returns the best sampler that can be written as a recipe, and the recipe."""
    by_name = {entry.name: entry for entry in comparison.entries}
    denoiser, question = comparison.setting.denoiser, comparison.question
    for cell in verdict.order:
        recipe = by_name[cell.name].recipe(denoiser, cell.nfe)
        if recipe is None:
            continue
        score = cell.scores[verdict.measure]
        about = {
            "compared": cell.name,
            verdict.measure: [score.value, score.low, score.high],
            "ties": [tie.name for tie in verdict.ties],
            "samples": question["n"],
            "seed": question["seed"],
            "model": question["model"],
        }
        if denoiser.integer_times:
            about["integer_times"] = True
        guidance = question["guidance"] if recipe.guidance is None else recipe.guidance
        return cell, replace(recipe, guidance=guidance, about={**recipe.about, **about})
    return None

r"""The page of a search: verdict, scores before and after, and curves of the judgements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fewstep.learned.problem import TunedSampler
from fewstep.metrics.intervals import Estimate
from fewstep.reporting.figures import Series, line_plot
from fewstep.reporting.page import Page

ORIGINS = {
    "given": "as requested",
    "family": "the start of the family",
    "profile": "from the model's profile",
    "auto": "the choice of auto",
}
COLUMNS = ("stage", "step", "loss", "score", "precision", "recall", "taken", "skipped")


def write_page(tuned: TunedSampler, path: Path) -> Path:
    """Writes the page of a search as one HTML file; returns its path.

    Raises:
        ImportError: If the report extra is not installed.
    """
    about = tuned.recipe.about
    page = Page(
        f"Tuning of {tuned.recipe.name}",
        "The search, evaluated on noise that it did not train on.",
    )
    page.facts(
        [
            ("family", about["family"], f"{about['learned']} parameters"),
            ("objective", about["objective"], ""),
            (
                "start",
                about["base"]["solver"],
                f"{about['nfe']} evaluations, {ORIGINS[about['base']['origin']]}",
            ),
            ("result", tuned.verdict.state, "compared with the start, on unused seeds"),
            ("share", f"{about['share']:.0%}", "of the way from the start to the best candidate"),
        ]
    )
    page.paragraph(tuned.verdict.sentence)
    before, after = tuned.scores["before"], tuned.scores["after"]
    page.table(
        "Scores on seeds and real samples that the search did not use",
        ["score", "before", "after"],
        [[name, _estimate(before[name]), _estimate(after[name])] for name in before],
    )
    for stage in sorted({h["stage"] for h in tuned.history}):
        rows = [h for h in tuned.history if h["stage"] == stage and h["score"] is not None]
        steps = [h["step"] for h in rows]
        for name, key in (("held out", "score"), ("recall", "recall")):
            line = Series(name, steps, [h[key] for h in rows])
            figure = line_plot([line], x_label="step", y_label=name)
            page.figure(figure, f"Stage {stage + 1}: {name}", alt=f"{name} by step")
    rows = [[_shown(h[key]) for key in COLUMNS] for h in tuned.history]
    page.table("Judgements", list(COLUMNS), rows)
    return page.write(path)


def _estimate(score: Mapping[str, Any]) -> Estimate:
    return Estimate(**{field.name: score[field.name] for field in fields(Estimate)})


def _shown(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value

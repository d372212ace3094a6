"""The report of a comparison: one HTML file, the numbers as JSON, pictures, and the best as recipes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import __version__
from fewstep.base.files import write_atomic, write_json
from fewstep.comparison.drawing import NAMES, against_nfe, against_seconds, samples_picture
from fewstep.comparison.results import Invocation, all_numbers, next_commands, versions
from fewstep.comparison.running import Comparison
from fewstep.comparison.scores import BETTER_HIGH, RMS, TITLES
from fewstep.comparison.store import REPORT, RESULTS, Cell
from fewstep.comparison.verdicts import Verdict, best_recipe, judge, measure_of, pareto
from fewstep.reporting.page import Cell as Field
from fewstep.reporting.page import Column, Page, estimate_texts

if TYPE_CHECKING:
    from PIL import Image

MOST_TIMES = 100
"""The most steps whose times are listed."""


def write_report(
    comparison: Comparison, invocation: Invocation, verdicts: Sequence[Verdict] | None = None
) -> list[Path]:
    """Writes report, numbers, pictures and recipes; returns their paths, the report first."""
    verdicts = judge(comparison) if verdicts is None else verdicts
    recipes: dict[int, tuple[Cell, Path]] = {}
    folder = comparison.store.folder
    for verdict in verdicts:
        best = best_recipe(comparison, verdict)
        if best is not None:
            cell, recipe = best
            path = recipe.save(folder / f"best-{verdict.nfe}.json")
            recipes[verdict.nfe] = (cell, path)
    pictures = []
    for verdict in verdicts:
        image = samples_picture(comparison, verdict.nfe)
        if image is not None:
            path = folder / f"samples-{verdict.nfe}.png"
            pictures.append((verdict.nfe, image, write_atomic(path, _png(image))))
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = _page(comparison, verdicts, recipes, [p[:2] for p in pictures], invocation, when)
    numbers = write_json(
        folder / RESULTS, all_numbers(comparison, verdicts, recipes, invocation, when)
    )
    report = page.write(folder / REPORT)
    comparison.store.finish(comparison.question)
    return [report, numbers, *(p for _, p in recipes.values()), *(p[2] for p in pictures)]


def _page(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    pictures: Sequence[tuple[int, Image.Image]],
    invocation: Invocation,
    when: str,
) -> Page:
    question, measure = comparison.question, measure_of(comparison)
    names = len({cell.name for cell in comparison.cells})
    plural = "sampler" if names == 1 else "samplers"
    budgets = ", ".join(str(v.nfe) for v in verdicts)
    page = Page(
        f"Samplers for {invocation.model}",
        f"{names} {plural} at {budgets} network evaluations, {question['n']} samples each from the "
        f"same noise; {when}.",
    )
    _summary(page, comparison, verdicts, recipes, measure)
    _curves(page, comparison, measure)
    if pictures:
        page.heading("Samples")
        flat = len(comparison.setting.denoiser.event_shape or ()) == 1
        page.paragraph(
            "The reference is drawn in the background, the sampler's points on it."
            if flat
            else "All samples of a column start from the same noise; the reference is the first row."
        )
        for nfe, image in pictures:
            page.heading(f"{nfe} evaluations", level=3)
            page.picture(
                image, "", alt=f"Samples of each sampler with {nfe} evaluations", fit=False
            )
    _table(page, comparison, verdicts, measure)
    _settings(page, comparison, invocation, when)
    _next(page, comparison, verdicts, recipes, invocation)
    page.footer = f"Made by fewstep {__version__}, {when}."
    return page


def _summary(
    page: Page,
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    measure: str,
) -> None:
    page.heading("The best at each budget")
    facts = []
    for verdict in verdicts:
        score = verdict.best.scores[measure]
        value = "{} {} ({} to {})".format(TITLES[measure], *estimate_texts(score))
        facts.append(
            (
                f"{verdict.nfe} evaluations",
                verdict.best.name,
                f"{value}; {verdict.sentence()}",
            )
        )
    page.facts(facts)
    page.paragraph(
        f"Samplers are ordered by {NAMES[measure]}. Intervals are 95 %. All samplers start from the "
        "same noise, so two are compared sample by sample: if the interval of their difference "
        "includes zero, it is a tie."
    )
    if measure == "fid":
        page.paragraph(
            f"FID is too high with few samples (here {comparison.question['n']}), by about the same "
            "for all samplers: compare it within this page, not with other sources. The "
            f"reference itself, with {comparison.reference.nfe} evaluations, has "
            f"{comparison.reference.scores['fid'].value:.4g}."
        )
    else:
        page.paragraph(
            "No real data were given (`--data`), so this measures how exactly a sampler follows the "
            "model, not how good the model's samples are. A stochastic sampler "
            "has other samples by design, and is far from the reference whatever its quality."
        )
    other = [
        f"`best-{v.nfe}.json` holds `{recipes[v.nfe][0].name}`: `{v.best.name}` cannot be written "
        "as a recipe"
        for v in verdicts
        if v.nfe in recipes and recipes[v.nfe][0] is not v.best
    ]
    if other:
        page.bullets(other)


def _curves(page: Page, comparison: Comparison, measure: str) -> None:
    page.heading("Quality")
    shown = [measure, *([RMS] if measure != RMS else [])]
    others = [
        name
        for name in TITLES
        if name not in shown and any(name in cell.scores for cell in comparison.cells)
    ]
    budgets = {cell.nfe for cell in comparison.cells}
    if len(budgets) > 1:
        for name in shown:
            page.figure(
                against_nfe(comparison, name),
                f"{_sentence(NAMES[name])} against the number of evaluations; bands are 95 % "
                "intervals. " + _better(name),
                alt=f"Lines of {TITLES[name]} against evaluations, one for each sampler",
            )
    front = pareto(comparison, measure)
    page.figure(
        against_seconds(comparison, measure, front),
        "Quality against the seconds for one sample, on "
        f"{_device(comparison)} in batches of {comparison.question['batch_size']}. The line is the "
        "front: for each of its points no other is both faster and better.",
        alt=f"{TITLES[measure]} of each sampler and budget against seconds, with the Pareto front",
    )
    page.paragraph(
        "The front: " + ", ".join(f"`{cell.name}` with {cell.nfe}" for cell in front) + "."
    )
    if others and len(budgets) > 1:
        with page.details("Other measures"):
            for name in others:
                page.figure(
                    against_nfe(comparison, name),
                    f"{_sentence(NAMES[name])}. {_better(name)}",
                    alt=f"Lines of {TITLES[name]} against evaluations, one for each sampler",
                )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _better(name: str) -> str:
    return "Higher is better." if name in BETTER_HIGH else "Lower is better."


def _table(page: Page, comparison: Comparison, verdicts: Sequence[Verdict], measure: str) -> None:
    page.heading("All numbers")
    names = [n for n in TITLES if any(n in cell.scores for cell in comparison.cells)]
    names = [measure, *(n for n in (RMS, *names) if n != measure)]
    names = list(dict.fromkeys(names))
    behind = {
        cell.key: more
        for verdict in verdicts
        for cell, more in zip(verdict.order, verdict.behind, strict=True)
    }
    columns = [
        "sampler",
        Column("NFE", True),
        Column("verdict", False),
        *(Column(_lines(t), True) for t in (TITLES[measure], "behind the best")),
        *(Column(_lines(TITLES[name]), True) for name in names[1:]),
        Column("ms /\nsample", True),
    ]
    rows, marked = [], []
    for verdict in verdicts:
        ties = {cell.key for cell in verdict.ties}
        for cell in verdict.order:
            best = cell is verdict.best
            word = "best" if best else "tie" if cell.key in ties else ""
            if best:
                marked.append(len(rows))
            milliseconds = 1e3 * cell.seconds[0]
            rows.append(
                [
                    cell.name + (" *" if cell.stochastic else ""),
                    cell.nfe,
                    Field(word, {"best": 0.0, "tie": 1.0}.get(word, 2.0)),
                    cell.scores[measure],
                    Field("0", 0.0) if best else behind[cell.key],
                    *(cell.scores.get(name) for name in names[1:]),
                    Field(f"{milliseconds:.3g}", milliseconds),
                ]
            )
    page.table(
        "Every sampler at every budget. A click on a title sorts; * is stochastic.",
        columns,
        rows,
        marked=marked,
    )
    failed = {(name, reason) for cell in comparison.cells for name, reason in cell.failed.items()}
    if failed:
        page.bullets(f"{name} could not be measured: {reason}" for name, reason in sorted(failed))
    if comparison.refused:
        page.paragraph("Budgets that a sampler cannot meet:")
        page.bullets(f"`{name}` with {nfe}: {reason}" for name, nfe, reason in comparison.refused)


def _lines(title: str) -> str:
    """Returns a title on two lines if it is long."""
    head, _, tail = title.rpartition(" ")
    return f"{head}\n{tail}" if head and len(title) > 9 else title


def _settings(page: Page, comparison: Comparison, invocation: Invocation, when: str) -> None:
    page.heading("Settings")
    question, reference = comparison.question, comparison.reference
    if invocation.command:
        page.code(invocation.command)
    rows: list[tuple[str, Any]] = [
        ("model", f"{invocation.model} (SHA-256 {question['model'][:16]}…)"),
        ("samples", f"{question['n']}, seed {question['seed']}, the same noise for all samplers"),
        ("reference", f"{question['reference']} with {reference.nfe} evaluations"),
        ("guidance", question["guidance"] or "none"),
    ]
    if comparison.setting.data is not None:
        data = comparison.setting.data
        rows += [
            ("data", f"{data.name} (SHA-256 {data.sha256[:16]}…)"),
            ("features", f"{data.features_name} (SHA-256 {data.features_sha256[:16]}…)"),
        ]
    rows += [
        *invocation.notes.items(),
        ("device", f"{_device(comparison)}, batches of {question['batch_size']}"),
        ("date", when),
        *((name, version) for name, version in versions().items()),
    ]
    page.table("Settings", ["what", "value"], rows, sortable=False)
    page.paragraph(
        f"The {NAMES[RMS]} is taken to the reference at the lowest level of the schedule or at "
        "sigma = 0, whichever is nearer, as libraries end at either. Times are those of the fastest "
        "batch, which is least affected by other work on the machine."
    )
    with page.details("The times at which each sampler evaluates the network"):
        listed = [
            (cell.name, cell.nfe, " ".join(f"{t:.4g}" for t in cell.about["times"]))
            for cell in comparison.cells
            if 0 < len(cell.about.get("times", ())) <= MOST_TIMES
        ]
        if listed:
            page.table("Times", ["sampler", "NFE", "times"], listed, sortable=False)
        else:
            page.paragraph("None of these samplers has fixed times.")


def _next(
    page: Page,
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    invocation: Invocation,
) -> None:
    commands = next_commands(comparison, verdicts, recipes, invocation)
    if commands:
        page.heading("Next")
    for text, command in commands:
        page.paragraph(text)
        page.code(command)


def _device(comparison: Comparison) -> str:
    kind = str(comparison.question["device"])
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return {"cpu": "the CPU"}.get(kind, kind)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

"""The first page, the table of the README, and the page that decides: how far ahead, at what cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from result_pages.errors import networks, shares
from result_pages.parts import (
    JUDGED,
    SAMPLED,
    cells_of,
    interval,
    load,
    origin,
    page_of,
    quality_of,
    remade,
    table,
)
from result_pages.students import FILES as STUDENTS
from result_pages.tuning import FILES, unseen_of

from fewstep.studies.fit import evaluations

FEW = (1, 2, 4, 5)
"""The budgets of students on the first page, and the next one."""


def readme() -> str:
    """The table of the README: the error beside that of the best peer."""
    from defaults import mean

    found = networks()
    rows = []
    for who, what in (("profile", "fewstep, measured once"), ("auto", "fewstep, default")):
        row = [what]
        for nfe in (5, 10):
            values = shares(found, who, nfe)
            row.append(f"{mean(list(values.values())):.2f} (worst {max(values.values()):.2f})")
        rows.append(row)
    rows.append(["best of seven samplers of diffusers, for each network and budget", "1", "1"])
    return f"""Error (RMS to the model's own many-step solution, same noise), geometric mean over {len(found)} networks; [all results](docs/results/index.md):

{table(["sampler", "5 evaluations", "10"], rows)}"""


def index(questions: Mapping[str, str]) -> str:
    """How far ahead, of whom, on what, at what cost, and where behind.

    Arguments:
        questions: The question of each of the other pages, by the page's name.
    """
    from defaults import mean

    found = networks()
    rows = []
    for who, what in (
        ("profile", "measured once (`fewstep fit`)"),
        ("auto", "the default, `auto`"),
    ):
        for nfe in JUDGED:
            values = shares(found, who, nfe)
            worst = max(values, key=lambda name: values[name])
            rows.append(
                [
                    what,
                    nfe,
                    f"{mean(list(values.values())):.2f}",
                    f"{values[worst]:.2f} ({worst})",
                    f"{sum(v <= 1 for v in values.values())} of {len(values)}",
                ]
            )
    pages = [[question, f"[{name}]({name}.md)"] for name, question in questions.items()]
    cost = max(entry["evaluations"] for entry in found.values())
    text = f"""# What was measured

**How far ahead.** The distance (RMS) to a model's own many-step solution from the same noise, over that of the best of seven samplers of diffusers
*chosen for each network and budget* (DDIM, DEIS-2/3, DPM++2M, DPM++2M Karras, UniPC-2/3), on {len(found)} networks:

{table(["sampler", "evaluations", "share of the best peer's error, mean", "worst network", "at or below it"], rows)}
The measurement cost {cost:,} evaluations of one image at most, once a model (statistics of DPM-Solver-v3, which are measured since, make it {evaluations():,}). All networks, budgets and the own grids of each solver: [distance](distance.md).

{_quality_summary()}
{_searched()}
{_students()}
{_behind(found)}
{table(["question", "page"], pages)}
Each page is written by `make results` from `benchmarks/results/*.json` and names the command; date, commit and seeds where the file has them. Machines were
noisy, so ratios and counts are what to read. Nothing here was run on a GPU.
"""
    return text


def _quality_summary() -> str:
    parts = []
    for model in SAMPLED:
        result = quality_of(model)
        if result is None:
            continue
        cells = cells_of(result)
        rows = []
        for nfe in JUDGED:
            peers = [row for (name, k), row in cells.items() if k == nfe and ":" in name]
            if not peers or ("profile", nfe) not in cells:
                continue
            best = min(peers, key=lambda row: row["fid"][0])
            rows.append(
                [
                    nfe,
                    *(interval(cells[who, nfe]["fid"]) for who in ("profile", "auto")),
                    f"{interval(best['fid'])} ({best['name'].partition(':')[2]})",
                ]
            )
        top = result["reference"]
        head = f"FID of `{model}` ({result['n']} samples; {top['nfe']} evaluations: {interval(top['fid'])}), see [quality]({page_of(model)}.md):"
        names = ["evaluations", "measured once", "`auto`", "best peer of that row"]
        parts.append(f"{head}\n\n{table(names, rows)}")
    return "\n".join(parts)


def _searched() -> str:
    """What a search of minutes gave, in the features that it did not see."""
    rows = []
    for model, file in FILES.items():
        result = load(file)
        if result is None:
            continue
        unseen = unseen_of(result)
        for name, cell in result["cells"].items():
            if not name.startswith("default "):
                continue
            shown = [
                " / ".join(f"{cell[space][key][0]:.2f}" for space in unseen)
                for key in ("over the peer", "over the best")
            ]
            rows.append([f"[{model}]({page_of(model, 'tuning')}.md)", name.split()[-1], *shown])
    head = [
        "model",
        "evaluations",
        "over the best peer",
        "over the best training-free sampler, ours included",
    ]
    return f"**With minutes** (`fewstep tune`): FID over that of the best sampler, in each of the kinds of features that the search did not see:\n\n{table(head, rows)}"


def _students() -> str:
    """What students gave, beside solvers and tuned samplers of as many evaluations."""
    rows, kinds = [], list[str]()
    for model, file in STUDENTS.items():
        result = load(file)
        if result is None:
            continue
        cells = result["cells"]
        first = next(name for name in cells if name.startswith("student ")).rpartition(",")[0]
        kinds.append(f"{', '.join(next(iter(cells.values()))['fid'])} on `{model}`")
        for nfe in FEW:
            shown = [_fids(cells.get(f"{first}, {nfe}"))]
            shown += [
                _fids(cells.get(f"{who} {nfe}")) for who in ("auto", "profile", "ddim", "tuned")
            ]
            rows.append([model, nfe, *shown])
        many = max(cells, key=lambda name: cells[name]["cost"])
        rows.append(
            [f"{model}, the model itself", many.split()[-1], "", "", "", _fids(cells[many]), ""]
        )
    if not rows:
        return ""
    head = ["model", "evaluations", "student", "`auto`", "measured once", "DDIM or many", "tuned"]
    return f"""**With hours** (`fewstep distill`): FID in four kinds of features ({"; ".join(kinds)}), with intervals and how each was used in [students](students.md):

{table(head, rows)}"""


def _fids(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else " / ".join(f"{fid[0]:.3g}" for fid in cell["fid"].values())


def _behind(found: Mapping[str, Any]) -> str:
    from defaults import BUDGETS

    lines = []
    for who in ("profile", "auto"):
        above = [
            f"{name} at {nfe} ({value:.2f})"
            for nfe in BUDGETS
            for name, value in shares(found, who, nfe).items()
            if value > 1
        ]
        if above:
            lines.append(
                f"- `{who}` has a larger error than the best peer on: {', '.join(above)}."
            )
    for model, nfe in itertools.product(SAMPLED, JUDGED):
        column = {
            name: row["fid"][0]
            for (name, k), row in cells_of(quality_of(model)).items()
            if k == nfe
        }
        peers = {name: value for name, value in column.items() if ":" in name}
        name = min(peers, key=lambda n: peers[n], default=None)
        if name is not None and peers[name] < column.get("profile", 0):
            lines.append(
                f"- FID of `{model}` at {nfe}: {name} {peers[name]:.2f}, the profile {column['profile']:.2f}."
            )
    for model, file in FILES.items():
        result = load(file) or {"cells": {}}
        above = []
        for name, cell in result["cells"].items():
            if name.startswith("default "):
                over = [cell[space]["over the peer"][0] for space in unseen_of(result)]
                if worse := sum(value > 1 for value in over):
                    above.append(
                        f"{name.split()[-1]} evaluations in {worse} of {len(over)} kinds of unseen features"
                    )
        if above:
            lines.append(f"- A search of `{model}` is behind the best peer at {', '.join(above)}.")
    for limit in (load("overhead") or {}).get("limits", []):
        if limit["worst"] > limit["most"]:
            lines.append(
                f"- {limit['name']}: {limit['worst']:.2f} ({limit['solver']}), wanted {limit['most']:g}."
            )
    cifar = remade()
    lines.append(
        "- The papers' tables on CIFAR-10 have not been made again."
        if cifar is None
        else f"- The papers' tables are made again with {cifar['n']} samples of a network that two cores can sample, not 50,000 of theirs: "
        "ratios can be compared, values cannot."
    )
    return "**Where we are behind, or do not know.**\n\n" + "\n".join(lines) + "\n"


def deciding() -> str:
    """Measure, tune or distill: what each costs and what it gave."""
    from defaults import mean

    found = networks()
    counts = [entry["evaluations"] for entry in found.values()]
    seconds = sorted(entry["seconds"] for entry in found.values())

    def error(who: str) -> str:
        return ", ".join(
            f"{mean(list(shares(found, who, nfe).values())):.2f} at {nfe}" for nfe in JUDGED
        )

    searched, students = load("tune"), load("distill")
    gave = "not measured yet: `benchmarks/tune.py`"
    if searched is not None:
        cell, unseen = searched["cells"]["default 5"], unseen_of(searched)
        over = " and ".join(f"{cell[space]['over the peer'][0]:.2f}" for space in unseen)
        gave = (
            f"on `{searched['model']}` at 5 evaluations, from its profile: FID over the best peer's {over} in two kinds of features "
            "that the search did not see"
        )
    rows = [
        ["nothing: `auto`", "0", "0", f"error over the best peer's: {error('auto')}"],
        [
            "measure: `fewstep fit`",
            f"{min(counts):,} to {max(counts):,}, once a model",
            f"{seconds[0]:.0f} to {seconds[-1]:.0f} s on two cores, median {seconds[len(seconds) // 2]:.0f} s",
            f"error over the best peer's: {error('profile')}",
        ],
        [
            "tune: `fewstep tune`",
            "(pairs + held-out + test samples) of the teacher, and 3 × steps × batch × budget",
            "minutes to hours",
            gave,
        ],
    ]
    text = ""
    if students is not None:
        cells = students["cells"]
        one = next(name for name in cells if name.startswith("student"))
        fid = cells[one]["fid"]["fashion"][0]
        worse = [c["cost"] for k, c in cells.items() if k != one and c["fid"]["fashion"][0] > fid]
        rows.append(
            [
                "distill: `fewstep record`, `fewstep distill`",
                "as many as the teacher makes for each of some 10⁵ trajectories, then training",
                "hours",
                f"`{one.removeprefix('student ')}`: FID {fid:.1f} in one evaluation; solvers of up to {max(worse):.0f} evaluations have more",
            ]
        )
        text = f"""
FID of {
            students["about"][
                "n"
            ]:,} samples of `fashion` (features of its own extractor; with 95 % interval), {
            origin(students["about"])
        }:

{
            table(
                [
                    "sampler",
                    "evaluations",
                    "FID",
                    "of the class asked for",
                    "distance to the model's own solution",
                ],
                [
                    [
                        name,
                        f"{cell['cost']:.0f}",
                        f"{cell['fid']['fashion'][0]:.1f} ({cell['fid']['fashion'][1]:.1f} to {cell['fid']['fashion'][2]:.1f})",
                        f"{cell['right']:.0%}",
                        f"{cell['rms']:.3f}",
                    ]
                    for name, cell in sorted(
                        cells.items(), key=lambda item: item[1]["fid"]["fashion"][0]
                    )
                ],
            )
        }"""
    return f"""# Measure, tune or distill

What each costs before the first sample, and what it gave. All of it is about a model that exists: its weights do not change, except that distilling
trains a student beside it.

{table(["do", "network evaluations of one sample", "time", "gave"], rows)}
- **Start with nothing, then measure.** A measurement needs no data and no training; do it for every model that is used more than once.
- **Tune** when the budget is at most some 6 evaluations and the same budget is used for long. The result is a file of a few kilobytes.
- **Distill** when there must be one or two evaluations, and the hours are there. A student does not inherit guidance scales, other budgets or inversion.

The error is the distance (RMS) to a model's own many-step solution over that of the best of seven samplers of diffusers, chosen for each network and budget; the geometric
mean over {len(found)} networks ([distance](distance.md)). What a search brought in more detail: [tuning](tuning.md).
{text}"""

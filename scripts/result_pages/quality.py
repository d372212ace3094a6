"""Quality of samples beside the peers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from result_pages.parts import (
    JUDGED,
    SAMPLED,
    cells_of,
    origin,
    page_of,
    printed,
    qualities_of,
    table,
)

CELL = """A cell has FID against the training images in three feature spaces (a classifier, one that saw noisy and blurred images, one with random weights),
inception score and KID of the first, and RMS to the reference from the same noise. FID is biased upwards by the number of samples, alike in a table: compare within one.
`profile` is `auto` with the model's measured profile, `auto` without it.
"""
"""What the tables have."""

MANY = 40
"""A table of more samplers is one of every solver."""


EVERYWHERE = (5, 10)
"""The budgets at which every solver is measured."""


def quality(model: str = SAMPLED[0]) -> str:
    """FID of all samplers on a model, the table of the most samples first."""
    parts = [f"# Quality beside the peers: `{model}`\n", CELL]
    found = qualities_of(model)
    if not found:
        parts.append("Not measured yet: `python benchmarks/quality.py`.\n")
    for result in found:
        parts += [f"## {result['n']:,} samples\n", _tables(result, model)]
    if model == SAMPLED[0]:
        script = "python benchmarks/nfe_to_quality.py --results DIR"
        parts.append("## Evaluations needed for the quality of many\n")
        parts.append(printed("nfe-to-quality", script=script))
    return "\n".join(parts)


def solvers(model: str = SAMPLED[0]) -> str:
    """Every solver of ours and the peers' at two budgets, best first."""
    found = [
        result
        for result in qualities_of(model)
        if len({name for name, nfe in cells_of(result) if nfe in EVERYWHERE}) > MANY
    ]
    title = f"# Every solver at {' and '.join(map(str, EVERYWHERE))} evaluations: `{model}`\n"
    if not found:
        return f"{title}\nNot measured yet: `python benchmarks/quality.py draw --nfe 5,10`.\n"
    result = found[0]
    cells, judged = cells_of(result), EVERYWHERE[-1]
    names = _by_fid({n for n, k in cells if k in EVERYWHERE}, cells, judged)

    half = ", ".join(f"{_half_width(cells, k):.1f} at {k}" for k in EVERYWHERE)
    return f"""{title}
{origin(result["about"])}; {result["n"]:,} samples, seed {result["seed"]}, classes in turn. FID in the features of two classifiers and of random weights, and RMS to the reference from the same noise;
sorted by the first FID at {judged}. The median half-width of a single interval is {half}. Each solver is on its own grid, without a measurement of the model unless it is called `profile`; one that cannot meet a budget
has no cell there. What ties with the best: [quality]({page_of(model)}.md).

{table(["sampler", *map(str, EVERYWHERE)], [[name, *(_cell(cells, name, k) for k in EVERYWHERE)] for name in names])}"""


def _cell(
    cells: Mapping[tuple[str, int], Any],
    name: str,
    nfe: int,
    more: Mapping[str, str] | None = None,
) -> str:
    """Returns the scores of a cell, empty if there is none: FIDs, other scores in a format, and RMS."""
    row = cells.get((name, nfe))
    if row is None:
        return ""
    fids = " / ".join(f"{row[key][0]:.3g}" for key in ("fid", "robust", "random"))
    others = [f"{row[key][0]:{form}}" for key, form in {**(more or {}), "rms": ".3f"}.items()]
    return "; ".join((fids, *others))


def _by_fid(names: Iterable[str], cells: Mapping[tuple[str, int], Any], nfe: int) -> list[str]:
    """Returns names by the first FID at a budget."""
    unknown = {"fid": [math.inf]}
    return sorted(names, key=lambda name: (cells.get((name, nfe), unknown)["fid"][0], name))


def _half_width(cells: Mapping[tuple[str, int], Any], nfe: int) -> float:
    """Returns the median half-width of the intervals of the first FID at a budget."""
    halves = sorted((r["fid"][2] - r["fid"][1]) / 2 for (_, k), r in cells.items() if k == nfe)
    return halves[len(halves) // 2]


def _tables(result: Mapping[str, Any], model: str) -> str:
    cells = cells_of(result)
    budgets = sorted({nfe for _, nfe in cells})
    judged = JUDGED[1] if JUDGED[1] in budgets else budgets[0]
    names = _by_fid({name for name, _ in cells}, cells, judged)
    # A table of every solver has a page of its own.
    few = [name for name in names if all(k in EVERYWHERE for n, k in cells if n == name)]
    apart = model == SAMPLED[0] and len(few) < len(names)
    shown_names = [name for name in names if not (apart and name in few)]

    more = {"inception": ".2f", "kid": ".2g"}
    rows = [[name, *(_cell(cells, name, nfe, more) for nfe in budgets)] for name in shown_names]
    best = []
    for nfe in budgets:
        ties = [name for name in names if (name, nfe) in cells and cells[name, nfe]["tie"]]
        best.append([nfe, ", ".join(ties), f"{_half_width(cells, nfe):.2f}"])
    top = result["reference"]
    shown = " / ".join(f"{top[key][0]:.3g}" for key in ("fid", "robust", "random"))
    return f"""{origin(result["about"])}; seed {result["seed"]}, classes in turn. The reference ({top["nfe"]} evaluations of tab3) has {shown}; {top["inception"][0]:.2f}. Sorted by the first FID at {judged}.{" Others have two budgets only: [all solvers](solvers.md)." if apart and few else ""}

{table(["sampler", *map(str, budgets)], rows)}
The best by the first FID, with those whose paired difference to it is within the 95 % interval; and the median half-width of a single interval:

{table(["evaluations", "best or tied", "±"], best)}"""

"""Quality of samples beside the peers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from result_pages.parts import JUDGED, SAMPLED, cells_of, origin, printed, qualities_of, table

CELL = """A cell has FID against the training images in three feature spaces (a classifier, one that saw noisy and blurred images, one with random weights),
inception score and KID of the first, and RMS to the reference from the same noise. FID is biased upwards by the number of samples, alike in a table: compare within one.
`profile` is `auto` with the model's measured profile, `auto` without it.
"""
"""What the tables have."""


def quality(model: str = SAMPLED[0]) -> str:
    """FID of all samplers on a model, the table of the most samples first."""
    parts = [f"# Quality beside the peers: `{model}`\n", CELL]
    found = qualities_of(model)
    if not found:
        parts.append("Not measured yet: `python benchmarks/quality.py`.\n")
    for result in found:
        parts += [f"## {result['n']:,} samples\n", _tables(result)]
    if model == SAMPLED[0]:
        script = "python benchmarks/nfe_to_quality.py --results DIR"
        parts.append("## Evaluations needed for the quality of many\n")
        parts.append(printed("nfe-to-quality", script=script))
    return "\n".join(parts)


def _tables(result: Mapping[str, Any]) -> str:
    cells = cells_of(result)
    budgets = sorted({nfe for _, nfe in cells})
    judged = JUDGED[1] if JUDGED[1] in budgets else budgets[0]
    names = sorted(
        {name for name, _ in cells},
        key=lambda name: (cells.get((name, judged), {"fid": [math.inf]})["fid"][0], name),
    )

    def cell(name: str, nfe: int) -> str:
        row = cells.get((name, nfe))
        if row is None:
            return ""
        values = " / ".join(f"{row[key][0]:.3g}" for key in ("fid", "robust", "random"))
        return f"{values}; {row['inception'][0]:.2f}; {row['kid'][0]:.2g}; {row['rms'][0]:.3f}"

    def width(nfe: int) -> float:
        shown = [row["fid"] for (_, k), row in cells.items() if k == nfe]
        return sorted((high - low) / 2 for _, low, high in shown)[len(shown) // 2]

    rows = [[name, *(cell(name, nfe) for nfe in budgets)] for name in names]
    best = []
    for nfe in budgets:
        ties = [name for name in names if (name, nfe) in cells and cells[name, nfe]["tie"]]
        best.append([nfe, ", ".join(ties), f"{width(nfe):.2f}"])
    top = result["reference"]
    shown = " / ".join(f"{top[key][0]:.3g}" for key in ("fid", "robust", "random"))
    return f"""{origin(result["about"])}; seed {result["seed"]}, classes in turn. The reference ({top["nfe"]} evaluations of tab3) has {shown}; {top["inception"][0]:.2f}. Sorted by the first FID at {judged}.

{table(["sampler", *map(str, budgets)], rows)}
The best by the first FID, with those whose paired difference to it is within the 95 % interval; and the median half-width of a single interval:

{table(["evaluations", "best or tied", "±"], best)}"""

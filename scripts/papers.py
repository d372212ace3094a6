"""The tables of the papers: their published rows beside the same rows measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.base.files import read_json

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
APART = 1.5
"""A ratio comes out if it is within this factor of the published one."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown."""
    lines = [[str(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def published(paper: str) -> dict[str, Any]:
    """Returns the published figures of a paper: ``fid`` by method and budget, ``base``, ``source``."""
    return read_json(BENCHMARKS / "published.json", what="published figures")[paper]


def quality_of(name: str) -> dict[str, Any] | None:
    """Returns the quality tables of a model, those of the most samples, or ``None``."""
    files = (BENCHMARKS / "results").glob(f"quality-{name}-*.json")
    found = sorted(files, key=lambda path: int(path.stem.rpartition("-")[2]))
    return read_json(found[-1], what="scores") if found else None


def cells_of(result: Mapping[str, Any] | None) -> dict[tuple[str, int], Any]:
    """Returns the rows of a file of quality tables, by sampler and budget."""
    return {(row["name"], row["nfe"]): row for row in (result or {}).get("cells", [])}


def beside(paper: str, result: Mapping[str, Any] | None, key: str = "fid") -> str:
    """Returns a table of one score: ours and its ratio to the base's, the published ones behind the bar."""
    told, cells = published(paper), cells_of(result)
    base, rows, apart = told["base"], list[list[str]](), list[str]()
    budgets = sorted({int(k) for row in told[key].values() for k in row})
    budgets = [k for k in budgets if any(nfe == k for _, nfe in cells)] or budgets
    for method, theirs in told[key].items():
        shown = []
        for nfe in budgets:
            paper_value, paper_base = theirs.get(str(nfe)), told[key][base].get(str(nfe))
            own, own_base = cells.get((method, nfe)), cells.get((base, nfe))
            left = right = "–"
            if own and own_base:
                ratio = own[key][0] / own_base[key][0]
                left = f"{own[key][0]:.3g} ({ratio:.2f})"
            if paper_value and paper_base:
                right = f"{paper_value:.4g} ({paper_value / paper_base:.2f})"
                if own and own_base:
                    off = ratio / (paper_value / paper_base)
                    if not 1 / APART <= off <= APART:
                        apart.append(f"{method} at {nfe}")
            shown.append("" if left == right else f"{left} \\| {right}")
        if any(shown):
            rows.append([method, *shown])
    words = f"Ratios further than a factor of {APART} from the published: {', '.join(apart) if apart else 'none'}."
    more = f"{words} {told.get('remark', '')} Published: {told['source']}.\n"
    return f"{table(['', *map(str, budgets)], rows)}\n{more}"

"""What the pages of results share: the files, their origin, tables, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.base.files import read_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"

JUDGED = (5, 10, 20)
"""The budgets of the tables on the first page."""


SAMPLED = ("fashion", "cifar10")
"""The models with tables of quality."""


def load(name: str) -> dict[str, Any] | None:
    """Returns a result, or ``None`` if it has not been measured."""
    path = RESULTS / f"{name}.json"
    return read_json(path, what="result") if path.exists() else None


def printed(*names: str, script: str) -> str:
    """Returns what a script has printed, with its origin; or that it has not been run."""
    parts = []
    for name in names:
        result = load(name)
        if result is None:
            parts.append(f"Not measured yet: `{script}` ({name}).\n")
            continue
        parts.append(f"{origin(result['about'])}\n\n{result['printed'].strip()}\n")
    return "\n".join(parts)


def origin(about: Mapping[str, Any]) -> str:
    """Returns where a result comes from, in a line."""
    shown = [about.get(key) for key in ("date", "commit", "machine")]
    return f"`{about['command']}` ({', '.join(str(value) for value in shown if value)})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown."""
    lines = [[str(cell) for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Returns a value with the half-width of its interval."""
    value, low, high = values
    return f"{value:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def page_of(model: str, subject: str = "quality") -> str:
    """Returns the name of the page of a model on a subject."""
    return subject if model == SAMPLED[0] else f"{subject}-{model}"


def qualities_of(name: str) -> list[dict[str, Any]]:
    """Returns the quality tables of a model, those of the most samples first."""
    files = RESULTS.glob(f"quality-{name}-*.json")
    found = sorted(files, key=lambda path: -int(path.stem.rpartition("-")[2]))
    return [read_json(path, what="scores") for path in found]


def quality_of(name: str) -> dict[str, Any] | None:
    """Returns the quality table of the most samples of a model, or ``None``."""
    return next(iter(qualities_of(name)), None)


def remade() -> dict[str, Any] | None:
    """Returns the table with the most of the papers' rows, which need not be that of the most samples."""
    return max(qualities_of("cifar10"), key=lambda found: len(found["cells"]), default=None)


def cells_of(result: Mapping[str, Any] | None) -> dict[tuple[str, int], Any]:
    """Returns the rows of a file of quality tables, by sampler and budget."""
    return {(row["name"], row["nfe"]): row for row in (result or {}).get("cells", [])}

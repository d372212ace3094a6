"""The distance to each model's own solution, from ``benchmarks/defaults.py``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from result_pages.parts import load


def networks() -> dict[str, Any]:
    """Returns the results of ``benchmarks/defaults.py``, by network."""
    return {k: v for k, v in (load("defaults") or {}).items() if isinstance(v, dict)}


def shares(found: Mapping[str, Any], who: str, nfe: int) -> dict[str, float]:
    """Returns the error of a choice over that of the best peer, for each network."""
    from defaults import best_peer

    return {
        name: entry["errors"][f"{nfe} {who}"] / best_peer(entry["errors"], nfe)[0]
        for name, entry in found.items()
    }


def tables() -> str:
    """The tables of ``benchmarks/defaults.py``."""
    from defaults import show

    with redirect_stdout(StringIO()) as text:
        show(networks())
    return text.getvalue().strip()


def distance() -> str:
    """The page of the tables."""
    dates = sorted({entry["date"] for entry in networks().values()})
    return f"""# Distance to the model's own solution

`python benchmarks/defaults.py measure` ({", ".join(dates)}). Profiles are fitted on seed 0, defaults were chosen on seed 5000, everything is judged on seed 9000.
What follows from it for your model: [choosing](../choosing.md).

{tables()}
"""

"""``fewstep solvers`` and ``fewstep models``: what there is."""

from __future__ import annotations

import inspect
from typing import Any

from fewstep.cli._common import console, say


def solvers(name: str | None = None) -> None:
    """List the solvers; with a name, say everything about one.

    Args:
        name: A solver.
    """
    from fewstep.solvers import SOLVERS

    if name is not None:
        say(inspect.getdoc(_class(SOLVERS[name])) or "")
        say(f"\nnext: fewstep sample fashion --solver {name} --out samples")
        return

    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (
        ("solver", "left"),
        ("order", "right"),
        ("stochastic", "left"),
        ("10 steps cost", "right"),
        ("grid", "left"),
        ("what it is", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=column == "solver")  # type: ignore[arg-type]
    for key, build in SOLVERS.items():
        solver = build()
        grid, options = solver.default_grid
        shown = ", ".join(f"{k}={v}" for k, v in options.items() if k != "to_zero")
        to_zero = bool(options.get("to_zero", False))
        table.add_row(
            key,
            str(solver.order),
            "yes" if solver.stochastic else "",
            "adaptive" if solver.adaptive else str(solver.nfe(10, ends_at_zero=to_zero)),
            "its own" if solver.adaptive else f"{grid} ({shown})" if shown else grid,
            _sentence(_class(build)),
        )
    console().print(table)
    say("\nnext: fewstep solvers NAME, or fewstep sample fashion --solver NAME --out samples")


def models() -> None:
    """List the embedded models."""
    from rich.table import Table

    from fewstep.loading import EMBEDDED

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("what it is")
    for name, sentence in EMBEDDED.items():
        table.add_row(name, sentence)
    console().print(table)
    say("\nnext: fewstep sample mixture-smooth --out samples")


def _class(build: Any) -> type:
    return getattr(build, "func", build)


def _sentence(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")

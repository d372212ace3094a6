"""``fewstep solvers`` and ``fewstep models``: what there is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from fewstep.cli._common import console, say, say_result


def solvers(name: str | None = None) -> None:
    """List the solvers; with a name, say everything about one.

    Args:
        name: A solver.
    """
    from fewstep.solvers import SOLVERS

    if name is not None:
        say_result(inspect.getdoc(_class(SOLVERS[name])) or "")
        say(f"\nnext: fewstep sample fashion --solver {name} --out samples")
        return

    columns = (
        ("solver", "left"),
        ("order", "right"),
        ("stochastic", "left"),
        ("10 steps cost", "right"),
        ("grid", "left"),
        ("what it is", "left"),
    )
    rows = []
    for key, build in SOLVERS.items():
        solver = build()
        grid, options = solver.default_grid
        shown = ", ".join(f"{k}={v}" for k, v in options.items() if k != "to_zero")
        to_zero = bool(options.get("to_zero", False))
        row = (
            key,
            str(solver.order),
            "yes" if solver.stochastic else "",
            "adaptive" if solver.adaptive else str(solver.nfe(10, ends_at_zero=to_zero)),
            "its own" if solver.adaptive else f"{grid} ({shown})" if shown else grid,
            _sentence(_class(build)),
        )
        rows.append(row)
    _print(columns, rows)
    say("\nnext: fewstep solvers NAME, or fewstep sample fashion --solver NAME --out samples")


def models() -> None:
    """List the embedded models."""
    from fewstep.loading import EMBEDDED

    _print((("model", "left"), ("what it is", "left")), list(EMBEDDED.items()))
    say("\nnext: fewstep sample mixture-smooth --out samples")


def _print(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; where there is no terminal, plain text with one line for each row."""
    if not sys.stdout.isatty():
        lines = [[name for name, _ in columns], *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            cells = (
                text.rjust(width) if side == "right" else text.ljust(width)
                for text, width, (_, side) in zip(line, widths, columns, strict=True)
            )
            say_result("  ".join(cells).rstrip())
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, (name, side) in enumerate(columns):
        table.add_column(name, justify=side, no_wrap=not i)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    console(result=True).print(table)


def _class(build: Any) -> type:
    return getattr(build, "func", build)


def _sentence(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")

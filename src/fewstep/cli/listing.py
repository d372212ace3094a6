"""``fewstep solvers``, ``fewstep grids`` and ``fewstep models``: the registries."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.cli._common import console, say, say_result
from fewstep.reporting.commands import command


def solvers(name: str | None = None) -> None:
    """List the solvers; with a name, describe one.

    Args:
        name: A solver.
    """
    from fewstep.solvers import SOLVERS

    if name is not None:
        say_result(inspect.getdoc(_class(SOLVERS[name])) or "")
        say_result(f"\nDefault grid: {_default_grids(name)}")
        _say_aliases("solver", SOLVERS.own(name)[0])
        say(
            f"\nnext: {command('sample', 'fashion', solver=name, nfe=_budget(name), out='samples')}"
        )
        return

    columns = (
        ("solver", "left"),
        ("order", "right"),
        ("stochastic", "left"),
        ("10 steps cost", "right"),
        ("default grid", "left"),
        ("description", "left"),
    )
    rows = []
    for key, build in SOLVERS.items():
        solver = build()
        to_zero = bool(solver.default_grid[1].get("to_zero", False))
        row = (
            key,
            solver.order_text,
            "yes" if solver.stochastic else "",
            "adaptive" if solver.adaptive else str(solver.nfe(10, ends_at_zero=to_zero)),
            "its own" if solver.adaptive else _grid_text(*solver.default_grid),
            _sentence(_class(build)),
        )
        rows.append(row)
    _print(columns, rows)
    say_result(
        "\norder: in brackets, as steps go to infinity: a first step of first order caps it"
    )
    _print_aliases("solver")
    say("\nnext: fewstep solvers NAME, or fewstep sample fashion --solver NAME --out samples")


def grids(name: str | None = None) -> None:
    """List the time grids; with a name, describe one.

    Args:
        name: A grid.
    """
    from fewstep.diffusion.grids import GRIDS

    if name is not None:
        ours = GRIDS.own(name)[0]
        say_result(inspect.getdoc(_class(GRIDS[name])) or "")
        say_result(f"\nOptions: {_options(GRIDS[ours])}")
        _say_aliases("grid", ours)
        say(f"\nnext: {_sampled_at(ours)}")
        return
    rows = [(key, _options(build), _sentence(build)) for key, build in GRIDS.items()]
    _print((("grid", "left"), ("options", "left"), ("description", "left")), rows)
    _print_aliases("grid")
    say("\nnext: fewstep grids NAME, or fewstep sample fashion --grid NAME --out samples")


def _grid_text(name: str, options: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{k}={v}" for k, v in options.items() if k != "to_zero")
    return f"{name} ({shown})" if shown else name


def _default_grids(name: str) -> str:
    """Returns the default grid of a solver, and the schedules on which it is another."""
    from fewstep.diffusion.schedules import SCHEDULES
    from fewstep.solvers import SOLVERS

    solver = SOLVERS[name]()
    if solver.adaptive:
        return "its own"
    usual = _grid_text(*solver.default_grid)
    others: dict[str, list[str]] = {}
    for key, build in SCHEDULES.items():
        if key == "tabulated":
            continue
        text = _grid_text(*solver.default_grid_on(build()))
        if text != usual:
            others.setdefault(text, []).append(key)
    return "; ".join([usual, *(f"{text} on {', '.join(keys)}" for text, keys in others.items())])


def _budget(name: str) -> int | None:
    """Returns the evaluations nearest to 10 that a solver can make; ``None`` if those are 10, or its own."""
    from fewstep.solvers import SOLVERS

    solver = SOLVERS[name]()
    if solver.adaptive:
        return None
    to_zero = bool(solver.default_grid[1].get("to_zero", False))
    costs = [solver.nfe(k, ends_at_zero=to_zero) for k in range(1, 11)]
    nearest = min(costs, key=lambda cost: abs(cost - 10))
    return None if nearest == 10 else nearest


def _sampled_at(grid: str) -> str:
    """Returns a command that samples at a grid."""
    if grid == "ays":  # for the noise levels of Stable Diffusion, which no embedded model has
        return command("sample", "MODEL", grid=grid, out="samples")
    if grid == "explicit":
        times = {"nfe": 3, "option": "times=[999, 600, 200, 0]"}
        return command("sample", "fashion", grid=grid, **times, out="samples")
    return command("sample", "fashion", grid=grid, out="samples")


def _options(build: Any) -> str:
    """Returns the options of a grid with their defaults; those without a default are only named."""
    parts = []
    for parameter in list(inspect.signature(build).parameters.values())[2:]:
        given = parameter.default not in (None, parameter.empty)
        parts.append(f"{parameter.name}={parameter.default}" if given else parameter.name)
    return ", ".join(parts)


def _print_aliases(kind: str) -> None:
    """Prints the names of other libraries, each with ours."""
    say_result("\nnames of other libraries:\n")
    columns = [(n, "left") for n in ("their name", "ours", "options", "match", "where", "remark")]
    _print(columns, [row for row, _ in _alias_rows(kind)])


def _say_aliases(kind: str, ours: str) -> None:
    """Prints the names of an entry in other libraries."""
    names = [f"{row[0]} ({row[4]}, {row[3]})" for row, entry in _alias_rows(kind) if entry == ours]
    if names:
        say_result(f"\nIn other libraries: {', '.join(names)}.")


def _alias_rows(kind: str) -> list[tuple[tuple[str, ...], str]]:
    from fewstep.base.aliases import ALIASES

    return [
        (
            (
                row.name,
                row.ours or "none",
                ", ".join(f"{k}={v}" for k, v in row.options.items()),
                row.match,
                ", ".join(row.where),
                row.note,
            ),
            row.ours,
        )
        for row in ALIASES
        if row.kind == kind
    ]


def models() -> None:
    """List the embedded models."""
    from fewstep.loading import EMBEDDED

    _print((("model", "left"), ("description", "left")), list(EMBEDDED.items()))
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


def _class(build: Any) -> Any:
    return getattr(build, "func", build)


LETTERS = {
    "eta": "η", "rho": "ρ", "lambda": "λ", "sigma": "σ", "alpha": "α", "varepsilon": "ε", "kappa": "κ",
}  # fmt: skip


def _sentence(kind: Any) -> str:
    """Returns the first line of a docstring in plain text, Greek letters as such."""
    line = (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")
    line = re.sub(r":\w+:`~?([^`]*)`", r"\1", line).replace("\\frac iK", "i/K")
    line = re.sub(r"\\([a-z]+)", lambda found: LETTERS.get(found[1], found[1]), line)
    return line.replace("{", "(").replace("}", ")")

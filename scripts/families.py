"""Writes the tables of docs/families from the registries: solvers, learned families, students.

A page names the classes of its solvers in a comment, ``<!-- solvers: TAB RhoAB -->``, and the table follows it. Which solvers
there are, their order, cost and source come from the registry and the docstrings.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS / "documents"))

from docstrings import references  # noqa: E402

import fewstep  # noqa: E402
import solvers  # noqa: E402
from fewstep.learned import FAMILIES  # noqa: E402
from fewstep.learned.families import family  # noqa: E402
from fewstep.learned.starts import start_of  # noqa: E402
from fewstep.operators.students import STUDENTS  # noqa: E402

FOLDER = SCRIPTS.parent / "docs" / "families"
STEPS = (5, 10, 20)
MARK = re.compile(r"^<!-- (solvers|learned|students):([^>]*) -->\n.*?^<!-- end -->$", re.M | re.S)


def named(text: str) -> list[str]:
    """Returns the classes of solvers that a page names."""
    return [c for kind, names in MARK.findall(text) if kind == "solvers" for c in names.split()]


def source(kind: type) -> str:
    """Returns the first reference of a class: who, when, a link, and what follows the year."""
    first = references(inspect.getdoc(kind) or "")[0]
    return f"[{first.who}, {first.year}]({link(first.url)}){first.where}"


def source_of_family(name: str, kind: type) -> str:
    """Returns the reference of a learned family: the one that names it, or the first of its class."""
    found = references(inspect.getdoc(kind) or "")
    first = next(
        (one for one in found if f"(``{name.partition('+')[0]}``)" in one.where), found[0]
    )
    return f"[{first.who}, {first.year}]({link(first.url)})"


def link(url: str) -> str:
    """Returns an address that can stand in a link of Markdown."""
    return url.replace("(", "%28").replace(")", "%29")


def solver_table(names: list[str]) -> str:
    """Returns the table of the solvers of some classes.

    Raises:
        KeyError: If there is no class of a name in the registry.
    """
    classes = solvers.by_class()
    rows = [
        f"| solver | order | stochastic | evaluations in {STEPS[0]}, {STEPS[1]}, {STEPS[2]} steps | source |",
        "|---|---|---|---|---|",
    ]
    for kind in names:
        for name in classes[kind]:
            solver = fewstep.SOLVERS[name]()
            costs = [solvers.cost(solver, k) for k in STEPS]
            rows.append(
                f"| [`{name}`](../solvers/{kind.lower()}.md) | {solver.order_text if solver.order else '–'} | "
                f"{'yes' if solver.stochastic else ''} | {', '.join(dict.fromkeys(costs))} | "
                f"{source(solvers.solver_class(name))} |"
            )
    return "\n".join(rows)


def learned_table() -> str:
    """Returns the table of the learned families: how many numbers each learns, and from where."""
    schedule = fewstep.schedule("ddpm-linear")
    rows = [
        "| family | learned numbers at 5 evaluations | starts from | source |",
        "|---|---|---|---|",
    ]
    for name, entry in FAMILIES.items():
        learned = family(name, start_of(name, schedule, STEPS[0]))
        count = sum(p.numel() for p in learned.parameters())
        start = f"`{entry.start.solver}`" if entry.start.solver else "`auto`"
        rows.append(f"| `{name}` | {count} | {start} | {source_of_family(name, entry.kind)} |")
    return "\n".join(rows)


def student_table() -> str:
    """Returns the table of the students."""
    rows = ["| student | |", "|---|---|"]
    return "\n".join(rows + [f"| `{name}` | {kind.about} |" for name, kind in STUDENTS.items()])


def written(text: str) -> str:
    """Returns a page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        kind, names = match[1], match[2].split()
        made = {
            "solvers": lambda: solver_table(names),
            "learned": learned_table,
            "students": student_table,
        }[kind]()
        return f"{match[0].splitlines()[0]}\n\n{made}\n\n<!-- end -->"

    return MARK.sub(table, text)


if __name__ == "__main__":
    for page in FOLDER.glob("*.md"):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")

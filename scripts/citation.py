"""Writes the references of CITATION.cff: every source that a docstring of the package names.

What is credited is what is implemented: a solver, a grid, a loss or a metric names its paper under "References", and
``docstrings.references`` reads it. For the papers that the package is about the list of authors is complete.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(SCRIPTS / "documents"))

from docstrings import Reference, references  # noqa: E402

FILE = ROOT / "CITATION.cff"
ENTITIES = ("Black Forest Labs", "ClownsharkBatwing")
"""Authors that are no persons."""

COMPLETE = {
    "https://arxiv.org/abs/2204.13902": "Qinsheng Zhang, Yongxin Chen",
    "https://arxiv.org/abs/2403.03852": "Gen Li, Yu Huang, Timofey Efimov, Yuting Wei, Yuejie Chi, Yuxin Chen",
    "https://arxiv.org/abs/2202.05830": "Daniel Watson, William Chan, Jonathan Ho, Mohammad Norouzi",
    "https://arxiv.org/abs/2211.13449": "Hongkai Zheng, Weili Nie, Arash Vahdat, Kamyar Azizzadenesheli, Anima Anandkumar",
}
"""All authors of the papers that the package is about."""


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields name and docstring of a module and of everything in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if doc := ast.get_docstring(node):
                yield getattr(node, "name", "module"), doc


def sources() -> dict[str, Reference]:
    """Returns what the package names, by address, in the order of the year; of several titles the longest.

    Raises:
        ValueError: A reference is not of the form that :func:`docstrings.references` reads.
    """
    found: dict[str, Reference] = {}
    for path in sorted((ROOT / "src" / "fewstep").rglob("*.py")):
        for name, doc in documented(ast.parse(path.read_text(encoding="utf-8"))):
            try:
                named = references(doc)
            except ValueError as error:
                raise ValueError(f"{path.relative_to(ROOT)}, {name}: {error}") from None
            for one in named:
                old = found.get(one.url)
                if old is None or len(one.title) > len(old.title):
                    found[one.url] = one
    return dict(sorted(found.items(), key=lambda item: (item[1].year, item[1].title)))


def authors(one: Reference) -> list[str]:
    """Returns the authors of a source as lines of YAML."""
    if full := COMPLETE.get(one.url):
        people = [name.rsplit(" ", 1) for name in full.split(", ")]
        return [f"{{family-names: {last}, given-names: {first}}}" for first, last in people]
    if one.who in ENTITIES:
        return [f"{{name: {one.who}}}"]
    names = one.who.removesuffix(" et al.").replace(" & ", ", ").split(", ")
    others = ['{name: "et al."}'] if one.who.endswith(" et al.") else []
    return [f"{{family-names: {name}}}" for name in names] + others


def kind(url: str) -> str:
    """Returns the type of a source; the number of a book is an ISBN."""
    if url.startswith("https://github.com"):
        return "software"
    return "book" if "/978" in url and "_" not in url else "article"


def written(text: str) -> str:
    """Returns the file with its references made anew."""
    lines = [text.partition("references:\n")[0] + "references:"]
    for one in sources().values():
        lines += [
            f"  - type: {kind(one.url)}",
            f"    title: {json.dumps(one.title, ensure_ascii=False)}",
            "    authors:",
            *(f"      - {author}" for author in authors(one)),
            f"    year: {one.year}",
            f'    url: "{one.url}"',
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(FILE.read_text(encoding="utf-8")), encoding="utf-8")

"""Writes the tables of docs/coming-from.md from the table of names in fewstep/base/aliases.py."""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.base.aliases import ALIASES, COMFY, DIFFUSERS, KDIFF, RES4LYF

sys.path.insert(0, str(Path(__file__).parent))

from blocks import filled

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
LIBRARIES = (DIFFUSERS, COMFY, KDIFF, RES4LYF)
KINDS = {"solver": "Samplers", "grid": "Noise levels"}


def tables(library: str) -> str:
    """Returns the tables of one library in Markdown."""
    parts = []
    for kind, title in KINDS.items():
        rows = [row for row in ALIASES if row.kind == kind and library in row.where]
        if not rows:
            continue
        lines = [f"{title}:", "", "| theirs | fewstep | | remark |", "|---|---|---|---|"]
        for row in rows:
            options = ", ".join(f"{name}={value}" for name, value in row.options.items())
            ours = f"`{row.ours}`" + (f" with {options}" if options else "") if row.ours else "–"
            lines.append(f"| `{row.name}` | {ours} | {row.match} | {row.note} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def written(text: str) -> str:
    """Returns the page with its tables made anew."""
    for library in LIBRARIES:
        text = filled(text, library, tables(library))
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

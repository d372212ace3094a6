"""Writes the tables of names of other libraries in the documents, from fewstep/base/aliases.py."""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep.base.aliases import ALIASES, COMFY, DIFFUSERS, KDIFF, RES4LYF

sys.path.insert(0, str(Path(__file__).parent))

from blocks import filled

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "coming-from.md": (DIFFUSERS,),
    "comfyui.md": (COMFY, RES4LYF),
    "k-diffusion.md": (KDIFF,),
}
"""The libraries whose names a page has."""

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


def written(name: str) -> str:
    """Returns a page with its tables made anew."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for library in PAGES[name]:
        text = filled(text, library, tables(library))
    return text


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(written(page), encoding="utf-8")

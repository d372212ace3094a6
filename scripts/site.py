"""Builds the site of the documents, from docs/, the README and the docstrings; a warning is an error.

Usage: python scripts/site.py (or: make docs). The site is written to build/site; nothing that is built is committed.

The pages are laid out in build/pages as the site has them: links between files of the repository become links
between pages, formulas become MathML, and the pages of the reference and of the solvers are made from the code. Then
Zensical builds them by mkdocs.yml, and every link and anchor of the result is followed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "documents"))
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"

MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGES.md": "changes.md",
    "examples/README.md": "examples.md",
    "integrations/comfyui/README.md": "comfyui-nodes.md",
    "integrations/comfyui/workflow.png": "workflow.png",
}
"""Files outside of docs/ and their places on the site."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def placed() -> dict[Path, Path]:
    """Returns the place on the site of each file that it takes over."""
    own = {p: p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*") if p.is_file()}
    return own | {ROOT / source: Path(target) for source, target in MOVED.items()}


def with_links(text: str, source: Path, places: dict[Path, Path]) -> str:
    """Returns a page whose links lead to pages of the site; what is not on the site is named, without a link.

    Raises:
        ValueError: A link leads to a file that does not exist.
    """
    own = places[source]

    def replaced(match: re.Match[str]) -> str:
        mark, shown, target = match.groups()
        url = urlsplit(target)
        if url.scheme or not url.path:
            return match[0]
        file = (source.parent / unquote(url.path)).resolve()
        if not file.exists():
            if file.is_relative_to(ROOT / "docs" / "reference") or file.is_relative_to(
                ROOT / "docs" / "solvers"
            ):
                return match[0]  # made by the build; its links are followed at the end
            raise ValueError(f"{source.relative_to(ROOT)}: the link {target} leads nowhere")
        if file not in places:
            return shown if shown.startswith("`") else f"{shown} (`{file.relative_to(ROOT)}`)"
        path = os.path.relpath(places[file], own.parent)
        return f"{mark}[{shown}]({path}{'#' + url.fragment if url.fragment else ''})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(p if p.startswith("```") else LINK.sub(replaced, p) for p in parts)


def write_pages() -> None:
    """Lays the pages out in build/pages."""
    from docstrings import with_formulas

    import reference
    import solvers

    shutil.rmtree(PAGES, ignore_errors=True)
    places = placed()
    for source, place in places.items():
        target = PAGES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = with_links(source.read_text(encoding="utf-8"), source, places)
            target.write_text(with_formulas(text), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    for folder, pages in (
        ("reference", reference.pages(reference.links(""))),
        ("solvers", solvers.pages(reference.links("../reference/"))),
    ):
        (PAGES / folder).mkdir(exist_ok=True)
        for name, text in pages.items():
            (PAGES / folder / name).write_text(text, encoding="utf-8")


class Links(HTMLParser):
    """Collects the ids of a page and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Reads a tag."""
        found = dict(attrs)
        self.ids |= {v for k in ("id", "name") if (v := found.get(k))}
        self.targets += [v for k in ("href", "src") if (v := found.get(k))]


def check_site(site: Path) -> list[str]:
    """Follows every link of the built pages; returns what is wrong."""
    read = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    wrong = []
    for page, found in read.items():
        for target in found.targets:
            url = urlsplit(target)
            name = page.relative_to(site)
            if url.netloc or url.scheme in ("data", "mailto", "javascript"):
                continue
            file = page if not url.path else (page.parent / unquote(url.path)).resolve()
            if url.path.startswith("/"):
                file = site / url.path.lstrip("/")
            if file.is_dir():
                file /= "index.html"
            if not file.exists():
                if name != Path("404.html"):
                    wrong.append(f"{name}: {target} leads nowhere")
            elif url.fragment and file in read and unquote(url.fragment) not in read[file].ids:
                if not url.fragment.startswith("__"):
                    wrong.append(f"{name}: {target} has no such anchor")
    return sorted(set(wrong))


def main(arguments: Sequence[str] | None = None) -> None:
    """Lays out, builds, checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages-only", action="store_true", help="lay out build/pages alone")
    given = parser.parse_args(arguments)
    write_pages()
    if given.pages_only:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(
        [*build, "-f", "mkdocs.yml"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    if done.returncode or re.search(r"warning", done.stdout, re.IGNORECASE):
        sys.exit("the site has warnings")
    if wrong := check_site(SITE):
        sys.exit("\n".join(wrong))
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE}")


if __name__ == "__main__":
    main()

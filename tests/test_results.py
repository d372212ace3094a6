"""The pages of docs/results are what scripts/results.py writes from benchmarks/results/*.json."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
assert SPEC is not None
assert SPEC.loader is not None
results = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results)


@pytest.mark.parametrize("name", results.PAGES)
def test_a_page_is_what_its_files_say(name):
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert page == results.PAGES[name](), "run: make results"
    assert page.count("\n") <= 150


def test_there_is_no_other_page():
    pages = {path.stem for path in (ROOT / "docs" / "results").glob("*.md")}
    assert pages == set(results.PAGES)


@pytest.mark.parametrize("file", sorted({file for file, _ in results.BLOCKS}))
def test_the_tables_in_other_pages_are_measured(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text == results.with_blocks(file), "run: make results"

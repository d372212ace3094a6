"""The pages of docs/results are what scripts/results.py writes from benchmarks/results/*.json."""

from __future__ import annotations

import importlib.util
import re
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
    assert page == results.PAGES[name][1](), "run: make results"
    assert page.count("\n") <= 150


def test_there_is_no_other_page():
    pages = {path.stem for path in (ROOT / "docs" / "results").glob("*.md")}
    assert pages == set(results.PAGES)


def test_what_the_readme_says_of_profiles_is_measured():
    found = results.networks()
    means = [results.mean(list(results.shares(found, "profile", k).values())) for k in (5, 10, 20)]
    said = "{:.2f}, {:.2f} and {:.2f}".format(*means)
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"has {said} of the distance of the best scheduler" in readme

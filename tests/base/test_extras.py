"""How to install what a part needs: by the names of the packages, which exist on every index."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from fewstep.base.extras import install_hint

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture
def declared(monkeypatch):
    """As if the distribution of this checkout were installed."""
    lines = [f"{text}; extra == '{name}'" for name, texts in EXTRAS.items() for text in texts]
    monkeypatch.setattr(metadata, "requires", lambda name: [*PROJECT["dependencies"], *lines])


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_hint_names_the_packages_of_the_extra(declared, extra):
    assert sorted(re.findall("'([^']+)'", install_hint(extra))) == sorted(EXTRAS[extra])


def test_from_sources_alone_the_hint_is_the_checkout(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert "'.[report]'" in install_hint("report")


def test_each_extra_that_the_code_names_is_declared():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"install_hint\(['\"](\w+)['\"]\)", text))
    assert named <= set(EXTRAS)
    assert len(named) >= 6


def test_nothing_is_promised_from_an_index_that_does_not_have_it():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    promised = [p for p in pages if re.search(r"pip install '?fewstep", p.read_text("utf-8"))]
    assert not promised

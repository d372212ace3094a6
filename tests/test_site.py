"""The lists of the documents are complete: navigation, llms.txt, the pages of the methods, the credited papers."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import fewstep
from fewstep.diffusion.prediction import Prediction
from fewstep.learned import FAMILIES
from fewstep.operators.students import STUDENTS
from fewstep.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script():
    """Loads a script by name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(
            f"script_{name}", ROOT / f"scripts/{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        path = list(sys.path)
        try:
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = path
        return module

    return load


def test_every_solver_is_on_the_page_of_one_family(script):
    families = script("families")
    named = [
        name
        for page in families.FOLDER.glob("*.md")
        for name in families.named(page.read_text(encoding="utf-8"))
    ]
    classes = {getattr(build, "func", build).__name__ for build in SOLVERS.values()}
    assert sorted(named) == sorted(classes), "a comment <!-- solvers: ... --> in docs/families"
    text = (families.FOLDER / "learned.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FAMILIES)
    text = (families.FOLDER / "operators.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in STUDENTS)


def test_the_tables_of_the_families_are_those_of_the_code(script):
    families = script("families")
    for page in families.FOLDER.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert families.written(text) == text, "run scripts/families.py"


def test_a_page_of_a_family_names_only_what_there_is():
    """Names of solvers in its sentences, as in its tables."""
    known = {*SOLVERS, *FAMILIES, *STUDENTS}
    for page in (DOCS / "families").glob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for name in re.findall(
            r"`([a-z0-9]+(?:-[a-z0-9]+)+|(?:tab|rhoab|logrhoab|unipc)\d)`", text
        ):
            assert name in known, f"{page.name}: {name}"


def test_the_navigation_has_every_page(script):
    site = script("site")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    own = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    moved = {place for place in site.MOVED.values() if place.endswith(".md")}
    made = {name for name in listed if name.startswith(("reference/", "solvers/"))}
    assert set(listed) - made == own | moved
    assert "solvers/index.md" in made


def test_llms_txt_has_every_page():
    text = (DOCS / "llms.txt").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)]+)\)", text)
    for target in linked:
        assert (DOCS / target).is_file(), target
    assert {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} <= set(linked)


def test_every_paper_that_is_implemented_is_credited(script):
    citation = script("citation")
    text = citation.FILE.read_text(encoding="utf-8")
    assert citation.written(text) == text, "run scripts/citation.py"
    credited = set(re.findall(r'^    url: "(.*)"$', text, re.MULTILINE))
    assert set(citation.COMPLETE) < credited
    for name, build in SOLVERS.items():
        kind = getattr(build, "func", build)
        assert set(re.findall(r"\| (https://\S+)", kind.__doc__ or "")) & credited, name


def test_the_table_of_conventions_names_every_schedule_and_prediction():
    """What to pass for a network of one's own: each schedule of the table is made as it says."""
    text = (DOCS / "own-network.md").read_text(encoding="utf-8")
    names = {"fewstep": fewstep, "betas": [0.1, 0.2]}
    made = {
        eval(code, names).name for code in re.findall(r"\| `(fewstep\.schedule\(.*?\))` \|", text)
    }
    assert made == set(fewstep.SCHEDULES)
    rows = set(re.findall(r'\| `"(\w+)"` \|', text))
    assert rows == {p.value for p in Prediction}
    options = inspect.signature(fewstep.Denoiser.wrap).parameters
    assert all(f"{name}=" in text for name in options if name not in ("network", "sampler"))

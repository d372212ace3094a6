"""The tables of names of other libraries are those of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_code() -> None:
    path = ROOT / "scripts" / "coming_from.py"
    spec = importlib.util.spec_from_file_location("coming_from", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for page in script.PAGES:
        text = (script.DOCS / page).read_text(encoding="utf-8")
        assert script.written(page) == text, "run scripts/coming_from.py"

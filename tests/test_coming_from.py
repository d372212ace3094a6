"""docs/coming-from.md: its tables are those of the code, and its blocks of Python run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coming-from.md"


def test_the_tables_are_those_of_the_code() -> None:
    path = ROOT / "scripts" / "coming_from.py"
    spec = importlib.util.spec_from_file_location("coming_from", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = PAGE.read_text(encoding="utf-8")
    assert script.written(text) == text, "run scripts/coming_from.py"


def test_the_blocks_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    for name in ("samples", "same", "ours", "noisy"):
        assert names[name].shape == (16, 2)
        assert bool(torch.isfinite(names[name]).all())
    # Eight steps are near the law of the mixture, whose deviation is about 1.
    assert 0.5 < float(names["ours"].std()) < 2

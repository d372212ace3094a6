"""docs/python.md: its blocks of Python run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.usefixtures("undrawn", "few_hypotheses", "coarse_references", "few_real_samples")
@pytest.mark.slow
def test_the_page_of_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert {row["sampler"] for row in names["result"].table()} == {
        "default",
        "DEIS",
        "UniPC on Karras's grid",
        "measured",
        "my plan",
    }
    assert names["samples"].shape == (4, 1, 8, 8)
    assert (tmp_path / "my-model" / "samples.png").is_file()
    assert "RMS, held out" in capsys.readouterr().out

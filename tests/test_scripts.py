"""The scripts in examples/ run from the first line to the last, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.usefixtures("few_real_samples", "few_hypotheses", "coarse_references", "undrawn")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.diffusers if path.stem == "pipeline" else ())
        for path in EXAMPLES
    ],
    ids=[path.stem for path in EXAMPLES],
)
def test_it_runs(path, capsys, monkeypatch, tmp_path):
    if path.stem == "pipeline":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    assert "False" not in printed
    assert not list(tmp_path.iterdir())


def test_they_are_short_and_listed():
    readme = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 8
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60
        assert f"[{path.name}]({path.name})" in readme

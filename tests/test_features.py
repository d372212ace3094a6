"""docs/features.md: every feature that it claims names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_yes_has_its_test() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d", line)
    ]
    assert [int(row[0]) for row in rows] == list(range(1, 81))
    yes = [row for row in rows if row[2] == "yes"]
    assert f"{len(yes)} of {len(rows)} in full" in text
    for _, feature, support, shown, remark in rows:
        assert support in ("yes", "partly", "no")
        assert remark or support == "yes", feature
        if support == "no":
            continue
        file, _, name = shown.strip("`").partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), shown

"""The report of ``fewstep analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_page(results: dict[str, Any], path: Path, *, command: str) -> Path:
    """Writes the report; returns its path."""
    from fewstep.report import Page

    page = Page("Analysis")
    page.code(command)
    return page.write(path)

"""The names of temporary files, which get their own name when they are complete."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

LITTER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""The names of temporary files; they remain where a process was killed."""

PATTERN = ".*.tmp"
"""A pattern of file names that all of them match; others may match it too."""


def temporary_name(name: str) -> str:
    """Returns a new name for a file until it is complete."""
    # Not the process id: on a shared folder another machine may have the same.
    return f".{name}.{secrets.token_hex(8)}.tmp"


def temporary_path(path: Path) -> Path:
    """Returns a new path, in the same folder, for a file until it is complete."""
    return path.with_name(temporary_name(path.name))


def target_of(temporary: str) -> str:
    """Returns the name that a temporary file is to get."""
    return temporary[1:].rsplit(".", 2)[0]

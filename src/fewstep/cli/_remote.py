"""Paths in a command line: of URLs, ``--out s3://bucket/run`` is staged and inputs are copied here first; empty ones are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

FILES = ("fit", "tune", "plan", "recipe")
"""The commands whose output is a file."""

TEXTS = ("--prompt",)
"""The options whose values are texts, whatever they look like."""


@contextlib.contextmanager
def local_arguments(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Gives the arguments with local paths for URLs; the output is copied when the block ends without an error.

    Raises:
        ValueError: If an argument is empty and no text.
    """
    words = list(arguments)
    _refuse_empty(words)
    with contextlib.ExitStack() as stack:
        if any("://" in word for word in words):
            from fewstep.base.staging import fetched, staged
            from fewstep.base.urls import is_remote

            command = next((word for word in words if not word.startswith("-")), "")
            for place, word in enumerate(words):
                option, sign, value = (
                    word.partition("=") if word.startswith("--") else ("", "", word)
                )
                name = option or (words[place - 1] if place else "")
                if not is_remote(value) or name in TEXTS:
                    continue
                if name == "--out":
                    local = stack.enter_context(staged(value, folder=command not in FILES))
                else:
                    local = fetched(value)
                words[place] = f"{option}{sign}{local}"
        yield words


def _refuse_empty(words: Sequence[str]) -> None:
    """Raises for ``--out ""``, which would be the current folder: most often a variable is not set."""
    for place, word in enumerate(words):
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "=", word)
        before = words[place - 1] if place else ""
        name = option or (before if before.startswith("-") else "an argument")
        if sign and not value.strip() and name not in TEXTS:
            raise ValueError(f"{name} is empty; is a variable not set?")

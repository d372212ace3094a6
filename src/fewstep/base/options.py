"""Options as text: ``key=value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.base.files import loads_json


def parse_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Returns ``["eta=0.5", "times=[1, 0.5]"]`` as a dictionary; values are JSON, or else texts.

    Raises:
        ValueError: If one is not ``key=value``, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, sign, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key.isidentifier():
            raise ValueError(f"an option is key=value, for example eta=0.5, got {pair!r:.60}")
        if key in options:
            raise ValueError(f"the option {key} is given twice")
        try:
            options[key] = loads_json(text, what="the value")
        except ValueError:
            options[key] = text
    return options

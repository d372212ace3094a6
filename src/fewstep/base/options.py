"""Options, budgets and class labels as text: ``eta=0.5``, ``5,10,20``, ``0,shirt``, ``all``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.base.files import loads_json
from fewstep.base.registry import unknown


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


MOST_MEASURED = 40
"""The most evaluations of a sampler that is measured: the memory grows with the cube of that number."""


def budgets_of(text: str) -> list[int]:
    """Returns the numbers of evaluations in a text, in order.

    Raises:
        ValueError: If it is not such a list, or one is not from 2 to 40.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    right = [
        p.isascii() and p.isdigit() and len(p) < 3 and 2 <= int(p) <= MOST_MEASURED for p in parts
    ]
    if not parts or not all(right):
        raise ValueError(
            f"NFE are integers from 2 to {MOST_MEASURED}, for example 5,10,20; got {text!r:.40}"
        )
    return sorted({int(part) for part in parts})


def parse_labels(text: str | None, denoiser: Any, n: int) -> list[int] | None:
    """Returns n class labels: ``"3"``, ``"0,1,2"`` repeated, names of classes, or ``"all"``.

    Arguments:
        text: The text, or ``None`` for no labels.
        denoiser: The model: its ``network.num_classes`` and ``class_names``, where it has them.
        n: The number of samples.

    Raises:
        ValueError: If it is not such a text.
    """
    if text is None:
        return None
    chosen = chosen_labels(text, denoiser)
    return [chosen[i % len(chosen)] for i in range(n)]


def chosen_labels(text: str, denoiser: Any) -> list[int]:
    """Returns the class labels in a text, each once."""
    classes = getattr(getattr(denoiser, "network", None), "num_classes", None)
    names = getattr(denoiser, "class_names", None) or ()
    if text.strip() != "all":
        return [_label(part.strip(), names) for part in text.split(",")]
    if not isinstance(classes, int):
        raise ValueError(
            "class labels 'all': the number of this model's classes is not known; "
            "give the labels themselves, for example 0,1,2"
        )
    return list(range(classes))


def _label(text: str, names: Sequence[str]) -> int:
    if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10:
        return int(text)
    if text in names:
        return list(names).index(text)
    if names:
        raise ValueError(unknown("class", text, list(names)))
    raise ValueError(
        f"class labels are integers, for example 3 or 0,1,2, or 'all'; got {text!r:.40}"
    )

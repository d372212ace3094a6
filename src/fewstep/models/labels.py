"""Class labels as text: ``3``, ``0,1,2``, ``shirt``, ``all``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.base.registry import unknown

if TYPE_CHECKING:
    from fewstep.models.denoiser import Denoiser


def parse_labels(text: str | None, denoiser: Denoiser, n: int) -> list[int] | None:
    """Returns n class labels: ``"3"``, ``"0,1,2"`` repeated, names of classes, or ``"all"``."""
    if text is None:
        return None
    chosen = chosen_labels(text, denoiser)
    return [chosen[i % len(chosen)] for i in range(n)]


def chosen_labels(text: str, denoiser: Denoiser) -> list[int]:
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

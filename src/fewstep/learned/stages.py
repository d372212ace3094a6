r"""Stages of a search: which objectives, with which weights, for how long; read from a text."""

from __future__ import annotations

import re
from dataclasses import dataclass

OBJECTIVES = ("endpoint", "trajectory", "mmd")
"""The objectives by name."""


@dataclass(frozen=True)
class Stage:
    """One stage of a search: weighted objectives and how long.

    Attributes:
        terms: Names with weights; the first decides how candidates are judged. Weights are
            relative to each term's value at the start of the search.
        steps: The number of steps.
        batch_size: The samples of a step.
        learning_rate: The largest rate of Adam.
    """

    terms: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int
    learning_rate: float

    @property
    def paired(self) -> bool:
        """Whether candidates are judged by pairs."""
        return self.terms[0][0] in ("endpoint", "trajectory")


def stages_of(
    text: str,
    *,
    small: bool,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
) -> tuple[Stage, ...]:
    """Returns the stages that a text describes: ``"endpoint"``, ``"endpoint,mmd"``, ``"mmd+0.1*endpoint"``.

    Commas part stages, a plus sign terms, a star gives a weight. A later stage has a fifth of the
    learning rate and, if it is ``mmd`` alone, an anchor of 0.1 at the teacher's samples.

    Arguments:
        text: The description.
        small: Whether samples are cheap (vectors): more of them are used then.
        steps: The steps of each stage; left out, by objective.
        batch_size: The samples of a step; left out, by objective.
        learning_rate: The rate of the first stage.

    Raises:
        ValueError: If the description cannot be read.
    """
    found = list[Stage]()
    for part in text.split(","):
        terms = [_term(term) for term in part.split("+")]
        if len({name for name, _ in terms}) != len(terms):
            raise ValueError(f"an objective is named twice in {part.strip()!r}")
        if found and [name for name, _ in terms] == ["mmd"]:
            terms.append(("endpoint", 0.1))
        mmd = terms[0][0] == "mmd"
        default_steps = 300 if small else (60 if mmd else 300)
        default_batch = (256 if mmd else 64) if small else (128 if mmd else 16)
        rate = 5e-3 if learning_rate is None else learning_rate
        found.append(
            Stage(
                tuple(terms),
                default_steps if steps is None else steps,
                default_batch if batch_size is None else batch_size,
                rate / 5 if found else rate,
            )
        )
    return tuple(found)


def _term(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"\s*(?:([0-9.eE-]+)\s*\*)?\s*([a-z]+)\s*", text)
    if match is None or match[2] not in OBJECTIVES:
        raise ValueError(
            f"an objective is one of {', '.join(OBJECTIVES)}, joined by + with weights "
            f"(mmd+0.1*endpoint), stages by commas (endpoint,mmd); got {text.strip()!r:.60}"
        )
    try:
        weight = 1.0 if match[1] is None else float(match[1])
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise ValueError(f"the weight of an objective is a positive number, got {match[1]!r}")
    return match[2], weight

r"""Stages of a search, parsed from a description: weighted objectives and their length."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewstep.learned.objectives import OBJECTIVES

SLOWER = 25
"""How many times smaller the rate of later stages is: near the end of the first one the gradient of a
discrepancy is mostly noise, in which Adam wanders at its rate."""


@dataclass(frozen=True)
class Stage:
    """One stage of a search: weighted objectives and its length.

    Attributes:
        terms: Names with weights; the first decides how candidates are evaluated. Weights are
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
    def names(self) -> list[str]:
        """The names of its objectives."""
        return [name for name, _ in self.terms]

    @property
    def paired(self) -> bool:
        """Whether candidates are judged by held-out pairs."""
        return OBJECTIVES[self.names[0]].paired

    @property
    def scored(self) -> bool:
        """Whether candidates are judged by its first objective itself."""
        return OBJECTIVES[self.names[0]].scored

    @property
    def needs_pairs(self) -> bool:
        """Whether any of its objectives compares with a teacher."""
        kinds = [OBJECTIVES[name] for name in self.names]
        return any(kind.paired or kind.wants_pairs for kind in kinds)

    @property
    def all_pairs(self) -> bool:
        """Whether its first objective compares with a teacher, so that every sample of a step does."""
        first = OBJECTIVES[self.names[0]]
        return first.paired or first.wants_pairs


def stages_of(
    text: str,
    *,
    small: bool,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
) -> tuple[Stage, ...]:
    """Returns the stages of a description: ``"endpoint"``, ``"endpoint,mmd"``, ``"mmd+0.1*endpoint"``.

    Commas separate stages, plus signs separate terms, a star gives a weight. A later stage has a twenty-fifth of the
    learning rate and, if it is one objective alone, that objective's anchor (``mmd``: 0.1 times
    ``endpoint``).

    Arguments:
        text: The description.
        small: Whether samples are cheap (vectors): more of them are used then.
        steps: The steps of each stage; left out, by objective.
        batch_size: The samples of a step; left out, by objective.
        learning_rate: The rate of the first stage.

    Raises:
        ValueError: If the description cannot be read.
    """
    if not isinstance(text, str):
        raise TypeError(f"an objective is a text such as 'endpoint,mmd', got {text!r:.40}")
    stages = list[Stage]()
    for part in text.split(","):
        terms = [_term(term) for term in part.split("+")]
        if len({name for name, _ in terms}) != len(terms):
            raise ValueError(f"an objective is named twice in {part.strip()!r}")
        first = OBJECTIVES[terms[0][0]]
        if stages and len(terms) == 1:
            terms.extend(first.anchor)
        rate = 5e-3 if learning_rate is None else learning_rate
        stages.append(
            Stage(
                tuple(terms),
                steps or (300 if small else first.steps),
                batch_size or first.batch_size[0 if small else 1],
                rate / SLOWER if stages else rate,
            )
        )
    return tuple(stages)


def _term(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"\s*(?:([0-9.eE-]+)\s*\*)?\s*([a-z][a-z0-9-]*)\s*", text)
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

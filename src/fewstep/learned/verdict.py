r"""The verdict on a search: is its result better than its start, where the search did not look?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.metrics.intervals import Estimate

TEACHER, DISTANCE = "distance to the teacher", "distance to the data"
PRECISION, RECALL, SPREAD, REWARD = "precision", "recall", "spread", "reward"
"""The kinds of scores."""

TRAINED, SELECTED, UNSEEN = "trained on", "selected with", "unseen"
"""What a search did with a statistic: lowered it, chose candidates by it, or never looked at it."""

BETTER, UNCLEAR, WORSE, START = "better", "unclear", "worse", "start"

LEAST_SPREAD = 0.9
"""The share of the start's spread within each class that a result must keep."""


@dataclass(frozen=True)
class Score:
    """A final score.

    Attributes:
        name: Its name, with that of the features and what the search did with them.
        kind: ``TEACHER`` (the RMS distance from the teacher's samples), ``DISTANCE`` (from real samples
            that the search did not use; without data from the teacher's), ``PRECISION``, ``RECALL``,
            ``REWARD`` (the user's, higher is better), or ``SPREAD`` (of the class that lost most of it, relative to the start).
        estimate: The value with its interval.
        role: ``TRAINED``, ``SELECTED`` or ``UNSEEN``.
        change: The difference to the start's score from the same noise, with its interval, or ``None``.
    """

    name: str
    kind: str
    estimate: Estimate
    role: str = UNSEEN
    change: Estimate | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the result of a search is better than its start.

    Attributes:
        state: ``"better"``; ``"unclear"``: neither is shown; ``"worse"``; or ``"start"``: no
            candidate was better, so the result is the start.
        reasons: The scores that decide it, each a sentence.
    """

    state: str
    reasons: tuple[str, ...] = ()

    @property
    def better(self) -> bool:
        """Whether the result is better than the start."""
        return self.state == BETTER

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        text = {
            BETTER: "the result is better than the start",
            UNCLEAR: "the result is not shown to be better than the start, nor worse",
            WORSE: "the result is worse than the start",
            START: "no candidate was better than the start, so the result is the start itself",
        }[self.state]
        return f"{text}: {'; '.join(self.reasons)}" if self.reasons else text


def verdict_of(
    before: Sequence[Score],
    after: Sequence[Score],
    *,
    data: bool = True,
    recall_drop: float = 0.05,
) -> Verdict:
    r"""Returns the verdict on the scores of the start and of the result.

    *Worse* if any distance to the data is above the start's beyond the interval of the change,
    if recall is below it by more than ``recall_drop``, the intervals apart, or if a class lost more than
    a tenth of its spread. Else *better* if a distance in features that neither a loss nor the
    selection used is below the start's beyond the interval of the change, and recall did not
    fall by more than ``recall_drop`` and its standard error; without data the distance to the teacher counts as well.
    Else *unclear*.

    Statistics that were trained on can show harm, never success, but for a reward of the user's, which on
    unused noise counts as a distance in unseen features does. A distance to the teacher does not
    count where there are data: a result may be nearer to a teacher that is itself wrong.

    Arguments:
        before: The scores of the start.
        after: The same scores of the result.
        data: Whether there are real data.
        recall_drop: The share of recall that may be lost.
    """
    worse, better, equal, lost = list[str](), list[str](), list[str](), list[str]()
    for old, new in zip(before, after, strict=True):
        text = f"{new.name} {_short(old.estimate)} before, {_short(new.estimate)} after"
        a, b = old.estimate, new.estimate
        up = b.low > a.high if new.change is None else new.change.low > 0
        down = b.high < a.low if new.change is None else new.change.high < 0
        if new.kind == REWARD:
            (better if up and b.value > a.value else equal).append(text)
        elif new.kind == DISTANCE or (new.kind == TEACHER and not data):
            if up and b.value > a.value:
                worse.append(text)
            elif new.role == UNSEEN or new.kind == TEACHER:
                (better if down and b.value < a.value else equal).append(text)
        elif new.kind == RECALL and (b.value + b.high) / 2 < (1 - recall_drop) * a.value:
            (worse if b.high < a.low else lost).append(text)
        elif new.kind == SPREAD and b.high < LEAST_SPREAD:
            worse.append(text)
    if worse:
        return Verdict(WORSE, tuple(worse))
    if better and not lost:
        return Verdict(BETTER, tuple(better))
    if not better and not equal:
        equal.append(
            "there are no real samples in features that the search did not look at; give the data "
            "themselves instead of a Reference"
        )
    return Verdict(UNCLEAR, tuple(lost or equal))


def records(scores: Sequence[Score]) -> dict[str, Mapping[str, Any]]:
    """Returns scores by name, as JSON values."""
    return {
        score.name: {
            **asdict(score.estimate),
            "kind": score.kind,
            "role": score.role,
            **({} if score.change is None else {"change": asdict(score.change)}),
        }
        for score in scores
    }


def _short(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"

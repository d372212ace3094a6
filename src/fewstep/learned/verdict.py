r"""The verdict on a search: is its result better than its start, on seeds that it did not use?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.metrics.intervals import Estimate

TEACHER, DATA, JUDGE = "distance to the teacher", "distance to the data", "unseen features"
PRECISION, RECALL = "precision", "recall"
BETTER, UNCLEAR, WORSE, START = "better", "unclear", "worse", "start"


@dataclass(frozen=True)
class Score:
    """A final score.

    Attributes:
        name: Its name, with that of the features.
        kind: ``TEACHER`` (the RMS distance from the teacher's samples), ``DATA`` (a distance from
            held-out real data in the features of the loss), ``JUDGE`` (the discrepancy in the
            judge's features), ``PRECISION`` or ``RECALL``.
        estimate: The value with its interval.
    """

    name: str
    kind: str
    estimate: Estimate


@dataclass(frozen=True)
class Verdict:
    """Whether the result of a search is better than its start.

    Attributes:
        state: ``"better"``; ``"unclear"``: neither better nor worse beyond the intervals;
            ``"worse"``; or ``"start"``: no candidate was better, so the result is the start.
        reasons: The scores that decide it, each a sentence.
    """

    state: str
    reasons: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        text = {
            BETTER: "the result is better than the start",
            UNCLEAR: "the result is not shown to be better than the start, nor worse",
            WORSE: "the result is worse than the start",
            START: "no candidate was better than the start, so the recipe is the start itself",
        }[self.state]
        return f"{text}: {'; '.join(self.reasons)}" if self.reasons else text


def verdict_of(
    before: Sequence[Score], after: Sequence[Score], *, recall_drop: float = 0.05
) -> Verdict:
    r"""Returns the verdict on the scores of the start and of the result.

    Where there are real data only scores against them count: a result may be nearer to a teacher
    that is itself wrong. It is *worse* if any distance is above the start's, the intervals apart,
    or recall is below it by more than ``recall_drop``, the intervals apart; else *better* if the
    distance in features that no loss used is below the start's (without data: the distance to the
    teacher); else *unclear*.

    Arguments:
        before: The scores of the start.
        after: The same scores of the result.
        recall_drop: The share of recall that may be lost.
    """
    kinds = {score.kind for score in before}
    distances = {DATA, JUDGE} if DATA in kinds or TEACHER not in kinds else {TEACHER, JUDGE}
    decisive = TEACHER if TEACHER in distances else JUDGE
    worse, better, equal = list[str](), list[str](), list[str]()
    for old, new in zip(before, after, strict=True):
        text = f"{new.name} {_short(old.estimate)} before, {_short(new.estimate)} after"
        a, b = old.estimate, new.estimate
        if new.kind in distances:
            if b.value > a.value and b.low > a.high:
                worse.append(text)
            elif new.kind == decisive:
                (better if b.value < a.value else equal).append(text)
        elif new.kind == RECALL and b.value < (1 - recall_drop) * a.value and b.high < a.low:
            worse.append(text)
    if worse:
        return Verdict(WORSE, tuple(worse))
    return Verdict(BETTER, tuple(better)) if better else Verdict(UNCLEAR, tuple(equal))


def records(scores: Sequence[Score]) -> dict[str, Mapping[str, Any]]:
    """Returns scores by name, as JSON values."""
    return {score.name: asdict(score.estimate) for score in scores}


def _short(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"

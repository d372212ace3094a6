"""How far a result goes towards the best candidate, and which candidates are vetoed, on planted samples.

The candidate is one number: 0 is the start, 1 the best candidate. What its samples are is planted; no network is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.learned.judges import Judge, discrepancy_change
from fewstep.learned.search import SHARES, STANDARD_ERROR, Searcher
from fewstep.learned.search_state import State
from fewstep.learned.settings import Search
from fewstep.learned.stages import Stage
from fewstep.training.parallel import ALONE
from stopping import Stopping

N = 200


def normal(seed: int, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, 2), generator=generator, dtype=torch.float64)


REAL, NOISE, OTHER = normal(0, 400), normal(1), normal(5)
JUDGE = Judge.of(REAL, lambda x: x)

Samples = Callable[[float], Tensor]


class Planted(Searcher):
    """A search whose samples are given as a function of the candidate."""

    def __init__(
        self, samples: Samples, *, guards: tuple[Judge, ...] = (JUDGE,), best: float = 1.0
    ) -> None:
        self.samples, self.loaded = samples, math.nan
        self.judge, self.guards, self.real = JUDGE, guards, True
        self.check_size, self.share = N, 1.0
        self.folder, self.identity, self.stages = None, "", ()
        self.progress = Stopping()
        self.settings, self.objectives = Search(), {}
        self.source: Any = SimpleNamespace(team=ALONE, device=torch.device("cpu"))
        self.learned: Any = SimpleNamespace(load_vector=self._loaded)
        self.state = State(
            {
                "best": torch.tensor([best]),
                "average": torch.tensor([1.0]),
                "first": torch.zeros(1),
            }
        )
        self._first_features = self._best_features = self._latest_features = None

    def _loaded(self, vector: Tensor) -> None:
        self.loaded = float(vector)

    def _heldout(self, vector: Tensor, n: int | None = None) -> Tensor:
        del n
        return self.samples(float(vector))


def overfit(share: float) -> Tensor:
    """Right up to 0.6 of the way, and then away from the data: what fits the loss ever closer."""
    return NOISE + 3 * max(0.0, share - 0.6)


def collapse(share: float) -> Tensor:
    """Blur: a step towards the mean at any share."""
    return NOISE * (1 - share) ** 4


def rescue(share: float) -> Tensor:
    """A start that is off, and a candidate that is right."""
    return NOISE + (1 - share)


def below_noise(share: float) -> Tensor:
    """Other samples of the very same law: what their discrepancy changes by is noise."""
    angle = 0.3 * share
    return math.cos(angle) * NOISE + math.sin(angle) * OTHER


def broken(share: float) -> Tensor:
    if share > 0.3:
        raise ValueError("samples are not finite")
    return NOISE


@pytest.mark.parametrize(
    ("samples", "share"),
    [(overfit, 0.5), (collapse, 0.0), (rescue, 1.0), (below_noise, 1.0), (broken, 0.25)],
)
def test_the_result_goes_as_far_as_no_guard_sees_harm(samples, share):
    search = Planted(samples)
    search.run()
    assert (search.share, search.loaded) == (share, share)
    tried = SHARES[: SHARES.index(share) + 1] if share else SHARES
    assert len(search.progress.steps) == len(tried)
    before = JUDGE.features(samples(0.0)) / JUDGE.scale
    for one in tried:
        if samples is broken and one > share:
            continue
        features = JUDGE.features(samples(one)) / JUDGE.scale
        low = discrepancy_change(JUDGE, features, before, level=STANDARD_ERROR).low
        assert (low > 0) == (one > share)


def test_harm_below_the_interval_is_harm_that_is_not_seen():
    """With this noise the discrepancy is larger, by less than its standard error."""
    features = [JUDGE.features(below_noise(s)) / JUDGE.scale for s in (1.0, 0.0)]
    change = discrepancy_change(JUDGE, *features, level=STANDARD_ERROR)
    assert change.low <= 0 < change.value


def test_one_guard_of_many_is_enough():
    """The first one sees the first coordinate only, in which nothing changes."""
    blind = Judge.of(REAL[:, :1], lambda x: x[:, :1])

    def second(share: float) -> Tensor:
        return NOISE + torch.tensor([0.0, 2 * share])

    for guards, share in (((blind,), 1.0), ((blind, JUDGE), 0.0), ((JUDGE, blind), 0.0)):
        search = Planted(second, guards=guards)
        search.run()
        assert search.share == share


def test_the_start_alone_and_searches_without_a_guard_are_not_checked():
    for search in (Planted(broken, best=0.0), Planted(broken, guards=())):
        search.run()
        assert search.share == 1.0
        assert not search.progress.steps
        assert search.loaded == float(search.state.tensors["best"])


PAIRED, LAW, REWARD = (
    Stage(((name, 1.0),), steps=8, batch_size=4, learning_rate=1e-3)
    for name in ("endpoint", "mmd", "reward")
)
START = {"score": 1.0, "law": 0.1, "precision": 0.9, "recall": 0.8}
GOOD = {**START, "score": 0.5, "above": -math.inf, "harm": 0.0}


@pytest.mark.parametrize(
    ("stage", "change", "taken"),
    [
        (PAIRED, {}, True),
        (PAIRED, {"score": 1.0}, False),  # not better
        (PAIRED, {"recall": 0.77}, True),  # 0.95 of the start's is 0.76
        (PAIRED, {"recall": 0.75}, False),  # a collapse
        (PAIRED, {"law": 0.109}, True),  # a tenth is tolerated
        (PAIRED, {"law": 0.109, "harm": 0.001}, True),
        (PAIRED, {"law": 0.2, "harm": -0.001}, True),  # further, within the noise of the change
        (PAIRED, {"law": 0.2, "harm": 0.001}, False),  # an overfit to the teacher
        (REWARD, {"law": 0.2, "harm": 0.001}, False),
        (REWARD, {"law": 0.2, "harm": -0.001}, True),
        (LAW, {"law": 0.2, "harm": 0.001, "above": -0.001}, True),  # its score is the law itself
        (LAW, {"above": 0.001}, False),  # better by less than a standard error
    ],
)
def test_a_candidate_is_vetoed_beyond_the_interval_only(stage, change, taken):
    search = Planted(rescue, best=0.0)
    search.state.start, search.state.best_score = dict(START), START["score"]
    search._judgement = lambda *_: {**GOOD, **change}  # type: ignore[method-assign]
    search._consider(stage, 0.0)
    assert search.state.history[-1]["taken"] is taken
    assert float(search.state.tensors["best"]) == (1.0 if taken else 0.0)
    assert search.state.stale == (0 if taken else 1)
    assert search.state.best_score == (search.state.history[-1]["score"] if taken else 1.0)


@pytest.mark.parametrize(
    ("samples", "sign"), [(overfit, 1), (collapse, 1), (below_noise, 0), (rescue, -1)]
)
def test_harm_is_the_lower_end_of_the_paired_change_from_the_start(samples, sign):
    search = Planted(samples)
    assert search._harm(samples(0.0)) == 0.0  # the start itself, which is remembered
    search.state.start = dict(START)
    harm = search._harm(samples(1.0))
    features = [JUDGE.features(samples(s)) / JUDGE.scale for s in (1.0, 0.0)]
    change = discrepancy_change(JUDGE, *features)
    assert harm == change.low
    assert (change.low > 0) - (change.high < 0) == sign
    resumed = Planted(samples)  # which has to make the start's samples again
    resumed.state.start = dict(START)
    assert resumed._harm(samples(1.0)) == harm

"""Final scores: what a loss could hide is seen in features, noise and data that it did not use."""

from __future__ import annotations

import pytest
import torch

from fewstep.learned.judges import discrepancy_change, random_features
from fewstep.learned.real_data import real_data
from fewstep.learned.unseen import (
    Space,
    final_scores,
    unseen_extractors,
    wavelets,
)
from fewstep.learned.verdict import SELECTED, TRAINED, UNSEEN, records, verdict_of
from fewstep.metrics import Features, Reference
from fewstep.metrics.intervals import Estimate
from fewstep.metrics.kernel import kid
from fewstep.metrics.reference import unused_images

SHAPE = (1, 8, 8)
N = 160


def pictures(n: int, seed: int, *, noise: float = 0.2) -> torch.Tensor:
    """Random blobs in eight classes: sample i of a seed is of class i modulo 8."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(n) % 8
    rows = torch.arange(8.0)
    centre = place + 0.7 * torch.randn(n, generator=generator)
    width = 1 + torch.rand(n, generator=generator)
    one = (-(rows[None] - centre[:, None]).square() / width[:, None]).exp()
    two = (-(rows[None] - 3.5).square() / 4).exp()
    x = 2 * one[:, :, None] * two[:, None, :] - 1
    return (x + noise * torch.randn((n, 8, 8), generator=generator))[:, None]


REAL = pictures(240, 1)
GROUPS = torch.arange(N) % 8
START = pictures(N, 2, noise=0.35)
"""The start of a search: noisier than the data."""


def mean_rows(images: torch.Tensor) -> torch.Tensor:
    """The features of a loss that only sees the means of rows."""
    return images.mean(3).flatten(1)


TRAINED_ON = Features(mean_rows, name="rows", sha256="0" * 64)


def spaces() -> list[Space]:
    unseen = unseen_extractors(SHAPE, [TRAINED_ON])
    return [
        Space(TRAINED_ON, mean_rows(REAL), TRAINED),
        *(Space(e, e(REAL)) for e in unseen),
    ]


def judged(x: torch.Tensor, *, groups: torch.Tensor | None = GROUPS):
    """The verdict on samples x in the place of START."""
    common = {"target": None, "target_role": TRAINED, "spaces": spaces(), "groups": groups}
    before = final_scores(START, **common)
    after = final_scores(x, start=START, **common)
    return verdict_of(before, after), after


def test_a_real_improvement_is_called_better():
    verdict, after = judged(pictures(N, 2, noise=0.2))
    assert verdict.state == "better"
    assert all("unseen" in reason for reason in verdict.reasons)
    roles = {name: score["role"] for name, score in records(after).items()}
    assert roles["MMD2 (rows, trained on)"] == TRAINED
    assert len({name for name, role in roles.items() if role == UNSEEN and "MMD2" in name}) >= 2


def test_a_collapse_is_caught():
    """All samples alike: the most typical picture, the same one every time."""
    one = pictures(N, 2, noise=0.0).mean(0, keepdim=True)
    verdict, _ = judged(one + 1e-3 * torch.randn((N, *SHAPE)))
    assert verdict.state == "worse"
    text = " ".join(verdict.reasons)
    assert "recall" in text
    assert "spread" in text


def test_a_class_that_collapses_alone_is_caught():
    """Seven classes get better, the eighth is one picture: the distances as a whole still fall."""
    x = pictures(N, 2, noise=0.2)
    third = GROUPS == 3
    x[third] = x[third][:1] + 0.05 * torch.randn((int(third.sum()), *SHAPE))
    verdict, _ = judged(x)
    assert verdict.state == "worse"
    (reason,) = [r for r in verdict.reasons if "spread" in r]
    assert reason.startswith("spread of the least varied class")


def test_less_noise_than_the_start_is_no_loss_of_variety():
    """A start that spreads more than real samples, because of noise, may lose the surplus."""
    verdict, after = judged(pictures(N, 2, noise=0.2), groups=None)
    assert verdict.state == "better"
    (spread,) = [s for s in after if s.kind == "spread"]
    assert spread.estimate.value > 0.9


def test_an_overfit_to_the_features_of_the_loss_is_caught():
    """Samples whose rows have exactly the means of real ones, but stripes across that no row mean shows."""
    x = pictures(N, 1, noise=0.2)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    x = x + 0.6 * stripes
    torch.testing.assert_close(mean_rows(x), mean_rows(pictures(N, 1)), atol=1e-6, rtol=0)
    verdict, after = judged(x)
    by_name = {score.name: score for score in after}
    trained = by_name["MMD2 (rows, trained on)"]
    assert trained.change.high < 0  # much better where it was trained
    assert verdict.state == "worse"
    assert any("random-2, unseen" in reason for reason in verdict.reasons)
    assert not any("trained on" in reason for reason in verdict.reasons)


def test_the_change_of_a_discrepancy_is_paired():
    space = spaces()[1]
    a, b = space.features(pictures(N, 2, noise=0.2)), space.features(START)
    change = discrepancy_change(space.judge, a, b)
    one, two = (
        kid(x * space.judge.scale, space.judge.real, kernel=space.judge.kernel) for x in (a, b)
    )
    assert change.value == pytest.approx(one.value - two.value, rel=1e-9, abs=1e-12)
    assert change.high - change.low < one.high - one.low + two.high - two.low
    narrow = discrepancy_change(space.judge, a, b, level=0.683)
    assert narrow.value == change.value
    assert narrow.high - narrow.value == pytest.approx((change.high - change.value) / 2, rel=0.05)
    same = discrepancy_change(space.judge, b, b)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_extractors_that_a_search_used_are_not_unseen():
    names = [e.name for e in unseen_extractors((1, 28, 28), [Features.load("fashion")])]
    assert names == ["random-2", "wavelets", "fashion-robust"]
    for used, count in (([], 2), ([wavelets(SHAPE)], 1), ([random_features(SHAPE)], 2)):
        assert len(unseen_extractors(SHAPE, used)) == count
    assert len(unseen_extractors((2,), [])) == 3
    more = unseen_extractors(SHAPE, [TRAINED_ON], [Features(mean_rows, name="x", sha256="1" * 64)])
    assert [e.name for e in more] == ["x", "random-2", "wavelets"]


def test_the_three_parts_of_real_data_share_nothing():
    data = torch.arange(100.0)[:, None].expand(100, 2)
    real = real_data(data, None, (2,))
    loss = set(real.loss.features[:, 0].tolist())
    selection = set(real.judge.heldout[real.selection][:, 0].tolist())
    final = set(real.judge.heldout[real.final][:, 0].tolist())
    assert (len(loss), len(selection), len(final)) == (50, 25, 25)
    assert not loss & selection | loss & final | selection & final
    assert set(real.samples[:, 0].tolist()) == final
    given = real_data(Reference.of(data[:50], data[50:]), None, (2,))
    assert given.samples is None
    assert not given.independent


def test_embedded_images_that_nothing_has_used():
    images = unused_images("fashion")
    assert images.shape == (1000, 1, 28, 28)
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    extract = Features.load("fashion")
    heldout = Reference.load("fashion").heldout
    some = extract(images[:100])
    # Stored features are in half precision; the same image would be within its rounding.
    assert float(torch.cdist(some, heldout).min()) > 0.05 * float(some.norm(dim=1).mean())


def test_scores_of_the_start_are_its_own():
    common = {"target": START, "target_role": SELECTED, "spaces": spaces()[:2], "groups": GROUPS}
    own = final_scores(START, **common)
    assert all(score.change is None for score in own)
    again = final_scores(START, start=START, **common)
    for score in again:
        if isinstance(score.change, Estimate):
            assert score.change.value == 0
    assert verdict_of(own, again).state == "unclear"

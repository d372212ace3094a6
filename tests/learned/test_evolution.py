"""The search without gradients: for callables, for rewards; resumed to the same bits; what it refuses."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep.learned.evolution import Evolution, check_evolution
from fewstep.learned.tuning import tune
from stopping import Stopped, Stopping
from tiny_searches import RING, VP

pytest.importorskip("cmaes")

SEARCH = {
    "optimizer": "cmaes", "steps": 12, "pairs": 64, "heldout": 100, "test": 200, "teacher_nfe": 24,
    "batch_size": 32, "evaluate_every": 4,
}  # fmt: skip


def bowl(x: torch.Tensor) -> float:
    return float((x - torch.arange(len(x))).square().sum())


def test_it_finds_a_minimum_and_continues_to_the_same_bits():
    start = torch.zeros(5, dtype=torch.float64)
    whole = Evolution(start, spread=0.5, seed=4)
    stored = None
    for generation in range(60):
        whole.tell([bowl(c) for c in whole.candidates()])
        if generation == 20:
            stored = whole.given.clone()
    assert bowl(whole.mean) < 1e-3 < bowl(start)
    again = Evolution(start, spread=0.5, seed=4, given=stored)
    for _ in range(60 - 21):
        again.tell([bowl(c) for c in again.candidates()])
    assert torch.equal(again.mean, whole.mean)
    assert torch.equal(again.given, whole.given)


def test_values_that_are_not_finite_are_the_worst():
    search = Evolution(torch.zeros(3, dtype=torch.float64), spread=0.5, seed=1)
    before = search.mean
    search.tell([float("nan")] * len(search.candidates()))
    assert torch.equal(search.mean, before)
    for _ in range(80):
        search.tell([bowl(c) if c[0] > -0.1 else float("inf") for c in search.candidates()])
    assert bowl(search.mean) < 1e-2


def blind(x, t):
    """The mixture without gradients: what a remote model or another library gives."""
    with torch.inference_mode():
        return RING(x.clone(), t.clone(), prediction="eps").numpy().copy()


def test_a_model_that_is_only_callable(tmp_path):
    calls = []

    def network(x, t):
        calls.append(len(x))
        return torch.from_numpy(blind(x, t))

    model = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(2,))
    tuned = tune(model, nfe=2, data=RING.draw(400), objective="endpoint", search=SEARCH)
    name = "rms to the teacher (trained on)"
    before, after = (tuned.scores[when][name]["value"] for when in ("before", "after"))
    assert after < 0.8 * before
    assert tuned.recipe.about["search"]["optimizer"] == "cmaes"


def test_an_interrupted_search_ends_as_a_whole_one(tmp_path):
    arguments = {"nfe": 2, "objective": "endpoint,mmd", "data": RING.draw(200)}
    arguments["search"] = {**SEARCH, "steps": 4, "evaluate_every": 2}
    whole = tune(RING, **arguments)

    # In the third and in the seventh generation.
    for stage in ("search 1 of 2", "search 2 of 2"):
        with pytest.raises(Stopped):
            tune(RING, **arguments, out=tmp_path / "a.json", progress=Stopping(3, stage=stage))
    again = tune(RING, **arguments, out=tmp_path / "a.json")
    assert again.history == whole.history
    assert torch.equal(again.plan.values, whole.plan.values)


@pytest.mark.usefixtures("few_real_samples")
def test_a_reward_of_the_user():
    """More samples to the right, in a model whose start is right: the reward grows, the law is the guard."""

    def reward(x):
        assert not x.requires_grad
        return -(x - RING.means[torch.cdist(x.double(), RING.means).argmin(1)]).square().sum(1)

    search = {**SEARCH, "reward": reward}
    tuned = tune(RING, nfe=2, objective="reward", search=search)
    name = "reward (trained on)"
    before, after = (tuned.scores[when][name] for when in ("before", "after"))
    assert after["value"] > before["value"]
    assert after["role"] == "trained on"
    assert tuned.recipe.about["search"]["reward"] == "reward"


def test_a_reward_that_collapses_samples_is_not_called_better():
    """All samples at one place: the reward is the best possible, recall and the law are lost."""
    search = {**SEARCH, "reward": lambda x: -x.square().sum(1), "spread": 0.3, "steps": 8}
    tuned = tune(RING, nfe=2, objective="reward", data=RING.draw(400), search=search)
    assert tuned.verdict.state == "start"
    assert (
        tuned.history[-1]["score"] < 0.1 * tuned.history[0]["score"]
    )  # the reward alone was lowered
    assert tuned.history[-1]["law"] > 2 * tuned.history[0]["law"]
    assert not any(h["taken"] for h in tuned.history[1:])


def test_what_is_refused_before_any_evaluation():
    def never(x, t):
        raise AssertionError

    model = fewstep.Denoiser.wrap(never, schedule=VP, prediction="eps", event_shape=(2,))
    data = RING.draw(100)
    for objective, search, error in (
        ("adversarial-data", {}, "learns from step to step"),
        ("endpoint", {"radius": 0.1}, "cmaes has none"),
        ("endpoint", {"optimizer": "cma"}, "optimizer"),
        ("reward", {}, "needs a callable"),
        ("endpoint", {"spread": 0}, "spread"),
    ):
        with pytest.raises(ValueError, match=error):
            tune(model, nfe=2, objective=objective, data=data, search={**SEARCH, **search})
    with pytest.raises(TypeError, match="reward must be"):
        tune(model, nfe=2, objective="reward", data=data, search={**SEARCH, "reward": "x"})
    with pytest.raises(ValueError, match="2 to 500 parameters"):
        check_evolution(1)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match="cmaes: pip install"):
        check_evolution(5)

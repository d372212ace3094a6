"""``fewstep.fit``: a measurement of a model beats the static choice, and records its cost."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

import fewstep
from fewstep.base import sharing
from fewstep.diffusion.grids import explicit
from fewstep.models import exact
from fewstep.plans.checks import table_difference
from fewstep.solvers.multistep import Multistep
from fewstep.studies.fit import evaluations
from fewstep.studies.multistep import fit_multistep
from fewstep.studies.reference import draw_noise, follow

VP = fewstep.schedule("vp-linear")
SMOOTH = exact.smooth(VP)


class Counted(fewstep.Denoiser):
    """Counts evaluations of one image."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.schedule, self.native = inner, inner.schedule, inner.native
        self.event_shape, self.count = inner.event_shape, 0

    def raw(self, x, t, **cond):
        self.count += len(x)
        return self.inner.raw(x, t, **cond)


@pytest.fixture(scope="module")
def measured():
    model = Counted(SMOOTH)
    return model, fewstep.fit(model, (5, 10, 20)), model.count


@cache
def unseen() -> tuple[torch.Tensor, torch.Tensor]:
    """200 noises that nothing was fitted to, and where the exact flow takes them."""
    noise = draw_noise(SMOOTH, 200, 77, dtype=torch.float64)
    return noise, fewstep.sample(SMOOTH, noise=noise, solver="tab3", nfe=300, grid="log-rho")


def distance(nfe: int, **how) -> float:
    noise, fine = unseen()
    return float(
        (fewstep.sample(SMOOTH, noise=noise, nfe=nfe, **how) - fine).square().mean().sqrt()
    )


@pytest.mark.parametrize("nfe", [5, 10, 20])
def test_a_profile_beats_named_solvers_on_noise_that_it_did_not_see(measured, nfe):
    _, profile, _ = measured
    own = distance(nfe, profile=profile, force=True)  # without the counter around it
    assert own <= 1.03 * min(
        distance(nfe, solver=solver, grid=grid)
        for solver in ("ddim", "tab2", "tab3", "unipc3", "dpmpp-2m")
        for grid in ("uniform", "quadratic", "log-rho", "logistic")
    )
    assert own < 0.75 * distance(nfe)  # the static default


def test_it_costs_what_it_says(measured):
    _, profile, count = measured
    assert count <= evaluations((5, 10, 20)) < 5000
    assert count == pytest.approx(profile.about["evaluations"], rel=0.05)
    assert evaluations() <= 6200


def test_it_comes_back_from_its_file(measured, tmp_path):
    model, profile, _ = measured
    back = fewstep.Profile.load(profile.save(tmp_path / "profile.json"))
    assert back == profile
    recipe = back.recipe(10).save(tmp_path / "recipe.json")
    first = fewstep.sample(model, 3, profile=tmp_path / "profile.json", nfe=10)
    assert torch.equal(first, fewstep.sample(model, 3, recipe=recipe))
    rows = {row["nfe"]: row for row in profile.table()}
    assert rows[5]["solver"] == "multistep"
    assert rows[5]["error"] < rows[5]["default_error"]
    assert json.loads((tmp_path / "profile.json").read_text())["about"]["n"] == 16


def test_other_budgets_take_a_solver_without_weights(measured):
    model, profile, _ = measured
    recipe = profile.recipe(7)
    assert recipe.name != "multistep"
    assert fewstep.sample(model, 2, profile=profile, nfe=7).shape == (2, 2)
    with pytest.raises(ValueError, match=r"'multistep' was measured for \[5, 10, 20\] steps"):
        profile.request(nfe=7, solver="multistep")


def test_another_model_schedule_or_guidance_is_refused(measured):
    _, profile, _ = measured
    with pytest.raises(ValueError, match="model"):
        fewstep.sample(exact.sharp(VP), 2, profile=profile)
    with pytest.raises(ValueError, match="schedule"):
        fewstep.sample(exact.smooth(fewstep.schedule("edm")), 2, profile=profile)


def test_weights_of_a_solver_are_found_again():
    """Trajectories of DDIM itself, on its own times: the weights that fit them best are DDIM's."""
    noise = draw_noise(SMOOTH, 6, 0, dtype=torch.float64)
    reference = follow(SMOOTH, noise, {}, intervals=8, substeps=1)
    ddim = fewstep.plan("ddim", VP, grid=explicit(VP, times=reference.times))
    states = fewstep.sample(SMOOTH, noise=noise, plan=ddim, save="states").states
    found = fit_multistep(SMOOTH, replace(reference, x=states), torch.arange(9))
    rows = torch.tensor([[*row, *[0.0] * (6 - len(row))] for row in found.solver.weights])
    expected = torch.tensor([1.0, 1.0, 0, 0, 0, 0]).expand(8, 6)
    assert torch.allclose(rows, expected, atol=1e-6)


def test_weights_of_deis_give_its_plan():
    """Any Adams–Bashforth method is of this form: the same table, by its published weights."""
    grid = fewstep.grid("quadratic", VP, 4)
    plan = fewstep.plan("tab2", VP, grid=grid)
    rows = []
    for k, row in enumerate(r for r in plan.structure.rows if hasattr(r, "terms")):
        values = plan.values[row.offset : row.offset + len(row.terms)].tolist()
        ratio = float(grid.alpha[k + 1] / grid.alpha[k])
        span = float(grid.sigma[k + 1] - ratio * grid.sigma[k])
        by_register = dict(zip(row.terms, values, strict=True))
        state = min(by_register) if k == 0 else max(r for r in by_register if r % 2 == 0)
        past = sorted((r for r in by_register if r != state), reverse=True)
        rows.append([by_register[state] / ratio, *(by_register[r] / span for r in past)])
    assert table_difference(Multistep(rows).plan(grid), plan) < 1e-12


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]], "step 0 of multistep has 1 weights"),
        ([[1.0, 1.0, 1.0]], "step 0 of multistep has 3 weights"),
        ([[1.0, float("nan")]], "finite"),
        ("ab", "list of numbers for each step"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Multistep(weights)


def test_weights_hold_for_their_steps():
    with pytest.raises(ValueError, match="for 1 steps, the grid has 3"):
        fewstep.plan(Multistep([(1, 1)]), VP, nfe=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nfe": (0,)}, "positive integers"),
        ({"n": 2}, "at least 4"),
        ({"guidance": 2.0}, "null condition"),
    ],
)
def test_bad_input_is_refused_before_the_first_evaluation(given, message):
    model = Counted(SMOOTH)
    with pytest.raises(ValueError, match=message):
        fewstep.fit(model, **given)
    assert model.count == 0


def test_unknown_conditions_are_refused():
    with pytest.raises(ValueError, match="class_labels"):
        fewstep.fit(SMOOTH, class_labels=1)


def test_a_network_of_whole_indices():
    model = exact.smooth(fewstep.schedule("ddpm-linear"))
    network = fewstep.Denoiser.wrap(
        lambda x, t: model(x, t[0], prediction="eps"),
        schedule=model.schedule,
        prediction="eps",
        event_shape=(2,),
        integer_times=True,
    )
    profile = fewstep.fit(network, (5,), n=8)
    assert all(t == round(t) for e in profile.entries for t in e.times)


class Interrupted(Counted):
    """Stops after some evaluations, as a machine that goes away."""

    left = 10**9

    def raw(self, x, t, **cond):
        if self.count + len(x) > self.left:
            raise KeyboardInterrupt
        return super().raw(x, t, **cond)


def test_an_interrupted_measurement_is_resumed(tmp_path):
    folder, budgets = tmp_path / "parts", (4, 5)
    whole = fewstep.fit(SMOOTH, budgets, n=8)
    model, total = Interrupted(SMOOTH), whole.about["evaluations"]
    runs = []
    for left in (0.6, 0.4, 1.0):  # after the reference, in a budget, to the end
        model.count, model.left = 0, int(left * total)
        try:
            profile = fewstep.fit(model, budgets, n=8, folder=folder)
        except KeyboardInterrupt:
            runs.append(model.count)
    assert len(runs) == 2
    assert model.count < total / 2  # it made the rest only
    for one, two in zip(profile.entries, whole.entries, strict=True):
        assert (one.solver, one.times) == (two.solver, two.times)
        assert one.error == pytest.approx(two.error, rel=1e-6)
    assert profile.recommended == whole.recommended
    assert profile.about["evaluations"] == total
    assert not (folder / "parts").exists()


def test_parts_of_another_measurement_are_not_mixed_in(tmp_path):
    model = Interrupted(SMOOTH)
    model.left = 1100
    with pytest.raises(KeyboardInterrupt):
        fewstep.fit(model, 4, n=8, folder=tmp_path)
    with pytest.raises(ValueError, match="seed 0, now 1"):
        fewstep.fit(model, 4, n=8, seed=1, folder=tmp_path)


def test_step_costs_of_fitted_weights_are_what_least_squares_leaves():
    from fewstep.studies.dynamic import FittedStepCosts, best_grids
    from fewstep.studies.local_errors import path_of

    noise = draw_noise(SMOOTH, 6, 1, dtype=torch.float64)
    reference = follow(SMOOTH, noise, {}, intervals=12)
    path = path_of(reference)
    costs = FittedStepCosts(path, ridge=1e-12)
    g, h, i, j = 1, 3, 4, 7
    s, t = VP, reference.times
    ratio = s.alpha(t[j]) / s.alpha(t[i])
    columns = [reference.x[i], *(reference.eps[k] for k in (i, h, g))]
    matrix = torch.stack([c.flatten() for c in columns], 1)
    target = reference.x[j].flatten()
    left = target - matrix @ torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    assert float(ratio) > 0
    torch.testing.assert_close(costs.two(h)[g, i, j], left.square().mean(), rtol=1e-4, atol=1e-14)
    # The first step has no history, the second one earlier node; cost and grid agree.
    grid = best_grids(costs, 5, free_end=False)[5]
    nodes = torch.searchsorted(-t, -grid.times).tolist()
    total = costs.zero()[nodes[0], nodes[1]] + costs.one(nodes[0])[nodes[1], nodes[2]]
    for a in range(len(nodes) - 3):
        total += costs.two(nodes[a + 1])[nodes[a], nodes[a + 2], nodes[a + 3]]
    assert grid.cost == pytest.approx(float(total.sqrt()), rel=1e-9)


def test_processes_of_a_launch_share_the_parts(tmp_path, monkeypatch):
    """One process computes a block, another the rest; the profile is that of one process alone."""
    budgets, more = (4, 5), {"n": 12, "folder": tmp_path / "parts", "out": tmp_path / "out.json"}
    whole = fewstep.fit(SMOOTH, budgets, n=12)
    monkeypatch.setattr(sharing, "POLL", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    first = Interrupted(SMOOTH)
    first.left = 3 * 40 * 4 + 100  # within the first block, after the second
    with pytest.raises(KeyboardInterrupt):
        fewstep.fit(first, budgets, **more)
    assert sorted(p.name for p in (tmp_path / "parts" / "parts").iterdir()) == [
        "reference-0.evaluations-0.safetensors",
        "reference-8.safetensors",
    ]
    monkeypatch.setenv("RANK", "0")
    second = Counted(SMOOTH)
    profile = fewstep.fit(second, budgets, **more)
    assert (profile.entries, profile.recommended) == (whole.entries, whole.recommended)
    assert profile.about["evaluations"] == whole.about["evaluations"]
    assert second.count == whole.about["evaluations"] - 4 * (3 * 40 + 1)
    assert fewstep.Profile.load(tmp_path / "out.json") == profile
    assert not (tmp_path / "parts" / "parts").exists()


def test_the_last_step_takes_all_of_the_noise():
    """Exact for a constant prediction: x / alpha changes by the change of rho, times the sum of the weights."""
    model = fewstep.load("mixture-sharp")
    profile = fewstep.fit(model, nfe=(1, 3, 5), n=8)
    fitted = [entry for entry in profile.entries if entry.weights]
    assert {len(entry.times) - 1 for entry in fitted} == {1, 3, 5}
    for entry in fitted:
        state, *weights = entry.weights[-1]
        assert state == 1
        assert abs(sum(weights) - 1) < 1e-12

"""Polishing, fitting error and advice, on exact models."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fewstep
from fewstep.base.progress import Silent
from fewstep.models.exact import DataSet, sharp, smooth
from fewstep.solvers import solver
from fewstep.studies import (
    Advice,
    Batch,
    Candidate,
    Subject,
    advise,
    dynamic_grids,
    fitted_grids,
    fitting_error,
    follow,
    measure_gain,
    path_of,
    polish,
    study,
)
from fewstep.studies.fitting import Optimal, _hat_integrals
from fewstep.studies.recommend import candidates, enough_nfe
from fewstep.studies.reference import draw_noise, run_plan

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

VP = fewstep.schedule("vp-linear")
MODEL = smooth(VP)


def batch(first, n, model=MODEL):
    noise = draw_noise(model, n, 5, first=first, dtype=torch.float64)
    return Batch(noise, follow(model, noise, {}).end, {})


@pytest.fixture(scope="module")
def fit():
    return batch(0, 24)


@pytest.fixture(scope="module")
def held_out():
    return batch(24, 24)


@pytest.fixture(scope="module")
def path(fit):
    reference = follow(MODEL, fit.noise, {})
    return path_of(reference, MODEL, measure_gain(MODEL, reference))


class Counted(Silent):
    """Counts ticks."""

    ticks = 0

    def tick(self, amount=1, note=""):
        self.ticks += amount


def distance(plan, on, model=MODEL):
    return float((run_plan(model, plan, on.noise, on.cond) - on.end).square().mean().sqrt())


def start(name="tab3", nfe=6, grid="quadratic"):
    return Candidate(solver(name), fewstep.plan(name, VP, nfe=nfe, grid=grid).knots)


@pytest.mark.parametrize("name", ["tab3", "unipc3", "ddim"])
def test_polished_times_are_better_on_other_samples_too(name, fit, held_out):
    before = start(name)
    made = polish(MODEL, before, fit.noise, fit.end, fit.cond)
    assert made.history[-1] < made.history[0]
    assert made.history[0] == pytest.approx(distance(before.plan(MODEL), fit))
    assert made.history[-1] == pytest.approx(distance(made.candidate.plan(MODEL), fit))
    assert distance(made.candidate.plan(MODEL), held_out) < 0.9 * distance(
        before.plan(MODEL), held_out
    )
    times = made.candidate.times
    assert bool((times.diff() < 0).all())
    assert (float(times[0]), float(times[-1])) == (1.0, VP.t_min)


def test_polishing_shares_the_first_evaluations(fit):
    counted = Counted()
    made = polish(MODEL, start(), fit.noise, fit.end, fit.cond, iterations=1, progress=counted)
    # A first run, one run for each of 5 times from its step on, and the tries of a step.
    slopes = sum(6 - k for k in range(1, 6))
    assert counted.ticks == made.evaluations
    assert 6 + slopes + 6 <= made.evaluations <= 6 + slopes + 8 * 6


def test_starts_and_ends_move_only_if_they_are_free(fit):
    times = torch.tensor([0.6, 0.4, 0.2, 0.05, 0.004], dtype=torch.float64)
    free = polish(MODEL, Candidate(solver("tab2"), times, True), fit.noise, fit.end, {})
    assert float(free.candidate.times[0]) != 0.6
    assert float(free.candidate.times[-1]) != 0.004
    assert free.candidate.head
    onto = torch.tensor([1.0, 0.4, 0.1, 0.02, 0.0], dtype=torch.float64)
    zero = polish(MODEL, Candidate(solver("dpmpp-2m"), onto), fit.noise, fit.end, {})
    assert (float(zero.candidate.times[0]), float(zero.candidate.times[-1])) == (1.0, 0.0)
    assert zero.history[-1] < zero.history[0]


def test_whole_indices_are_not_polished():
    ddpm = fewstep.schedule("ddpm-linear")
    exact = smooth(ddpm)
    model = fewstep.Denoiser.wrap(
        lambda x, t: exact.raw(x, t),
        schedule=ddpm,
        prediction="eps",
        integer_times=True,
        event_shape=(2,),
    )
    before = Candidate(solver("tab2"), fewstep.plan("tab2", ddpm, nfe=4).knots)
    made = polish(model, before, torch.zeros(2, 2), torch.zeros(2, 2), {})
    assert made.candidate is before
    assert made.evaluations == 0
    assert torch.equal(before.plan(model).knots, before.times.round())


def test_candidates_come_with_predictions(path):
    dynamic = dynamic_grids(path, 6)
    found = candidates(MODEL, path, 6, dynamic, ("tab2", "unipc2"))
    predicted = [item.predicted for item in found]
    assert predicted == sorted(predicted)
    assert {item.solver for item in found} == {"tab2", "unipc2"}
    # Dynamic programming is exact for tAB2: none of the other grids is predicted better.
    best = next(item for item in found if item.solver == "tab2")
    assert best.grid.startswith("dynamic")
    assert best.predicted == pytest.approx(dynamic[best.grid][6].cost, rel=1e-4)


def test_advice(path, fit, held_out):
    dynamic = dynamic_grids(path, 6)
    found = [
        advise(MODEL, path, nfe, fit, held_out, dynamic, solvers=("tab2", "tab3", "ddim"))
        for nfe in (4, 6)
    ]
    for item in found:
        assert item.polished
        assert item.best.held_out < 0.8 * item.default.held_out
        assert item.best.held_out == pytest.approx(
            distance(item.best.candidate.plan(MODEL), held_out)
        )
        assert item.best.score == min(t.score for t in item.tried if t.score is not None)
        assert item.best in item.tried
        assert "polished" in item.best.grid
        assert item.best.measured == pytest.approx(distance(item.best.candidate.plan(MODEL), fit))
        names = [(t.solver, t.grid) for t in item.tried]
        assert len(set(names)) == len(names)
        assert Advice.from_record(json.loads(json.dumps(item.to_record()))) == item
    grids = fitted_grids(MODEL, found)
    assert grids.fingerprint == MODEL.fingerprint()
    for item in found:
        grid, head = grids.fit(item.best.solver, item.nfe)
        assert tuple(grid.times.tolist()) == item.best.times
        assert head == item.best.head
    assert {g.solver for g in grids.entries} >= {"tab2", "tab3", "ddim"}


def test_no_time_to_polish(path, fit, held_out):
    late = advise(MODEL, path, 4, fit, held_out, {}, solvers=("tab2",), deadline=0.0)
    assert not late.polished
    assert all("polished" not in item.grid for item in late.tried)


def test_enough_nfe(path, fit, held_out):
    item = advise(MODEL, path, 4, fit, held_out, {}, solvers=("tab2",), deadline=0.0)
    error = item.best.held_out
    finer = replace(item, nfe=8, best=replace(item.best, held_out=error / 4))
    assert enough_nfe([item, finer], 21 * error) == 4
    assert enough_nfe([finer, item], 6 * error) == 8
    assert enough_nfe([item, finer], error) is None


POINTS = torch.randn((30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Biased(DataSet):
    """An optimal denoiser whose predicted noise is off by a constant."""

    def raw(self, x, t, **cond):
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        return super().raw(x, t) - 0.2 * (sigma / alpha)[:, None]


def fitting(model, plan=None):
    noise = draw_noise(model, 6, 1, dtype=torch.float64)
    reference = follow(model, noise, {}, intervals=24)
    return fitting_error(
        model, reference, path_of(reference), POINTS, plan=plan, samples=6, every=1
    )


def test_the_optimal_denoiser_has_no_fitting_error():
    found = fitting(DataSet(POINTS, VP))
    assert max(found["noised"]["rms"]) < 1e-12
    assert max(found["trajectories"]["rms"]) < 1e-12
    # What is left is that the two runs have different steps.
    assert found["end"] < 0.05
    assert found["points"] == 30
    assert found["steps"] is None


def test_a_constant_fitting_error_is_found():
    plan = fewstep.plan("tab2", VP, nfe=5, grid="quadratic")
    found = fitting(Biased(POINTS, VP), plan)
    for where in ("noised", "trajectories"):
        assert found[where]["rms"] == pytest.approx([0.2] * len(found["times"]), rel=1e-6)
    steps = found["steps"]
    for k, (high, low) in enumerate(zip(plan.knots[:-1], plan.knots[1:], strict=True)):
        moved = VP.alpha(low) * (VP.rho(high) - VP.rho(low)) * 0.2
        assert steps["fitting"][k] == pytest.approx(float(moved), rel=1e-6)
    assert len(steps["discretisation"]) == 5


def test_each_class_has_its_own_optimal_denoiser():
    labels = torch.arange(30) % 2
    model = fewstep.Denoiser.wrap(
        lambda x, t, class_labels: x,
        schedule=VP,
        prediction="eps",
        event_shape=(3,),
        null_condition={"class_labels": 2},
    )
    best = Optimal(POINTS, labels, model)
    x, t = torch.zeros(3, 3).double(), torch.full((3,), 0.5).double()
    mixed = best.raw(x, t, class_labels=torch.tensor([1, 0, 2]))
    even, odd = (DataSet(POINTS[labels == c], VP) for c in (0, 1))
    assert torch.allclose(mixed[0], odd.raw(x[:1], t[:1])[0])
    assert torch.allclose(mixed[1], even.raw(x[:1], t[:1])[0])
    assert torch.allclose(mixed[2], DataSet(POINTS, VP).raw(x[:1], t[:1])[0])


def test_hat_functions_integrate_lines_exactly():
    rho = torch.tensor([8.0, 5.0, 3.0, 1.0, 0.5]).double()
    for start, end in ((8.0, 0.5), (6.0, 2.0), (4.5, 3.5)):
        weights = _hat_integrals(rho, start, end)
        assert float(weights.sum()) == pytest.approx(start - end)
        assert float(weights @ rho) == pytest.approx((start**2 - end**2) / 2)


def test_sharp_data_gain_from_advice_too():
    model = sharp(VP)
    fit, held_out = batch(0, 32, model), batch(32, 32, model)
    reference = follow(model, fit.noise, {})
    path = path_of(reference, model, measure_gain(model, reference))
    found = advise(
        model,
        path,
        8,
        fit,
        held_out,
        dynamic_grids(path, 8),
        solvers=("tab2", "tab3"),
        iterations=2,
    )
    assert found.best.score <= found.default.score


@pytest.mark.usefixtures("few_hypotheses")
def test_a_network_of_whole_indices_is_studied(tmp_path):
    ddpm = fewstep.schedule("ddpm-linear")
    exact = smooth(ddpm)

    def network(x, t):
        assert not t.is_floating_point()
        return exact.raw(x, t)

    model = fewstep.Denoiser.wrap(
        network, schedule=ddpm, prediction="eps", integer_times=True, event_shape=(2,)
    )
    subject = Subject(model, None, None, {}, {})
    results, advice = study(subject, tmp_path, nfe=(4,), n=6, solvers=("tab2",))
    assert results["check"]["wrong"] == []
    for item in advice:
        times = torch.tensor(item.best.times)
        assert torch.equal(times, times.round())
        assert item.best.score <= item.default.score
    assert results["fitting"] is None
    # A second run reads what the first wrote; a damaged stage is computed again.
    before = model.network
    (tmp_path / "parts" / "check.json").write_text("{")
    model.network = lambda x, t: pytest.fail("evaluated again")
    with pytest.raises(pytest.fail.Exception):
        study(subject, tmp_path, nfe=(4,), n=6, solvers=("tab2",))
    model.network = before
    again, _ = study(subject, tmp_path, nfe=(4,), n=6, solvers=("tab2",))
    assert (again["advice"], again["check"]) == (results["advice"], results["check"])
    model.network = lambda x, t: pytest.fail("evaluated again")
    study(subject, tmp_path, nfe=(4,), n=6, solvers=("tab2",))


class Scaled(torch.nn.Module):
    """A network with a weight and a label."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([scale]))

    def forward(self, x, t, label):
        return self.scale * MODEL.raw(x, t) + 0 * label[:, None]


def subject(*, scale=1.0, schedule=VP, guidance=None, label=1, data=None):
    model = fewstep.Denoiser.wrap(
        Scaled(scale),
        schedule=schedule,
        prediction="eps",
        event_shape=(2,),
        null_condition={"label": 0},
    )
    if guidance is not None:
        model = fewstep.Guided(model, guidance)
    return Subject(model, data, None, {"label": label}, {})


def test_stages_of_another_study_are_refused(tmp_path, monkeypatch):
    from fewstep.studies import stages

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "follow", interrupt)
    monkeypatch.setattr(stages, "model_check", lambda *a, **o: SimpleNamespace(to_record=dict))
    options = {"nfe": (4,), "n": 6, "solvers": ("tab2",)}
    with pytest.raises(KeyboardInterrupt):
        study(subject(), tmp_path, **options)
    points = torch.zeros(4, 2)
    for other, more, word in (
        (subject(scale=2.0), {}, "model"),
        (subject(schedule=fewstep.schedule("vp-cosine")), {}, "model"),
        (subject(guidance=2.0), {}, "guidance"),
        (subject(label=2), {}, "conditions"),
        (subject(data=points), {}, "data"),
        (subject(), {"seed": 1}, "seed"),
        (subject(), {"n": 8}, "conditions|n"),
        (subject(), {"solvers": ("tab3",)}, "solvers"),
    ):
        with pytest.raises(ValueError, match=rf"with other settings \(.*\b({word})\b"):
            study(other, tmp_path, **{**options, **more})
    with pytest.raises(KeyboardInterrupt):
        study(subject(), tmp_path, **options)
    (tmp_path / "parts" / "identity.json").unlink()
    with pytest.raises(ValueError, match="exists; give"):
        study(subject(), tmp_path, **options)


@pytest.mark.usefixtures("few_hypotheses")
def test_fitted_weights_take_part_and_are_kept(tmp_path):
    from fewstep.studies import Subject, study

    subject = Subject(MODEL, None, None, {}, {})
    results, advice = study(
        subject, tmp_path, nfe=[6], n=16, minutes=0.0, solvers=("ddim", "tab2")
    )
    again = Advice.from_record(results["advice"][0])
    assert again == advice[0]
    fitted = [item for item in advice[0].tried if item.weights]
    assert fitted
    assert all(len(item.weights) == 6 for item in fitted)
    best = advice[0].best
    assert best.held_out <= min(item.held_out for item in fitted) * 1.5
    profile = fitted_grids(MODEL, advice)
    stored = fewstep.Profile.from_record(json.loads(json.dumps(profile.to_record())))
    kept = next(e for e in stored.entries if e.weights)
    assert kept.weights in [item.weights for item in fitted]
    x = fewstep.sample(MODEL, 4, profile=stored, nfe=6, force=True)
    assert x.shape == (4, 2)

"""The statistics of DPM-Solver-v3: closed forms, and how samplers find them."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import fewstep
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.studies.reference import draw_noise, follow
from fewstep.studies.statistics import measure_statistics

VP = fewstep.schedule("vp-linear")
V3 = "dpm-solver-v3"


@pytest.mark.parametrize("where", ["vp-linear", "edm"])
def test_statistics_of_a_gaussian(where: str) -> None:
    r"""Data of mean 1 and deviation c: f = -l, so l = 1 / (1 + c^2 e^{2 lam}) and s = l' / l = -2 (1 - l)."""
    deviation = 0.5
    model = GaussianMixture([[1.0] * 64], [deviation], [1.0], fewstep.schedule(where))
    noise = draw_noise(model, 4, 0, dtype=torch.float64)
    reference = follow(model, noise, {}, intervals=40, substeps=3)
    rows = torch.tensor(measure_statistics(model, reference), dtype=torch.float64)
    assert torch.equal(rows[:, 0], model.schedule.lam(reference.times))
    linear = 1 / (1 + deviation**2 * (2 * rows[:, 0]).exp())
    assert torch.allclose(rows[:, 1], linear, atol=1e-6)
    inner = rows[:, 0] < 3.5  # beyond, f is a thousandth of its size and less
    assert torch.allclose(rows[inner, 2], -2 * (1 - linear[inner]), atol=0.01)


def test_where_the_linear_part_is_all_there_is_no_scale() -> None:
    model = GaussianMixture([[0.0] * 8], [0.5], [1.0], VP)
    noise = draw_noise(model, 2, 0, dtype=torch.float64)
    rows = measure_statistics(model, follow(model, noise, {}, intervals=12))
    assert {row[2] for row in rows} == {0.0}


def test_the_linear_part_is_the_trace_of_the_jacobian() -> None:
    """Against automatic differentiation, over many samples of a mixture in two dimensions."""
    model = smooth(VP)
    noise = draw_noise(model, 2000, 1, dtype=torch.float64)
    reference = follow(model, noise, {}, intervals=6)
    rows = measure_statistics(model, reference)
    for node, row in enumerate(rows):
        x, t = reference.x[node].clone().requires_grad_(), float(reference.times[node])
        eps = model(x, t, prediction="eps")
        trace = sum(
            torch.autograd.grad(eps[:, k].sum(), x, retain_graph=True)[0][:, k] for k in range(2)
        )
        assert isinstance(trace, torch.Tensor)
        exact = float(VP.sigma(reference.times[node]) * trace.mean() / 2)
        assert row[1] == pytest.approx(exact, abs=0.03)


@pytest.fixture(scope="module")
def profile() -> fewstep.Profile:
    return fewstep.fit(smooth(VP), (4, 5), n=8)


def test_fit_measures_them_and_the_file_has_them(profile, tmp_path) -> None:
    assert len(profile.statistics) == 41
    back = fewstep.Profile.load(profile.save(tmp_path / "profile.json"))
    assert back == profile
    assert profile.options_for(V3, 7) == {"statistics": profile.statistics}


def test_every_way_to_give_them_is_one_sampler(profile, tmp_path, caplog) -> None:
    model, file = smooth(VP), str(profile.save(tmp_path / "profile.json"))

    def samples(**how):
        return fewstep.sample(model, 3, solver=V3, nfe=6, **how)

    with caplog.at_level(logging.WARNING, logger="fewstep"):
        bare = samples()
    assert "no statistics of this model and takes its default, data prediction" in caplog.text
    caplog.clear()
    given = samples(options={"statistics": profile.statistics})
    assert not torch.equal(given, bare)
    assert torch.equal(samples(options={"statistics": file}), given)
    assert torch.equal(samples(options={"statistics": profile}), given)
    model.profile = profile
    assert torch.equal(samples(), given)
    recipe = fewstep.resolve(model, fewstep.SamplerRequest(V3, nfe=6)).recipe
    model.profile = None
    assert torch.equal(fewstep.sample(model, 3, recipe=recipe), given)
    on_its_times = fewstep.sample(model, 3, solver=V3, nfe=5, grid=f"auto:{file}")
    times = profile.request(nfe=5, solver=V3).grid
    assert torch.equal(
        on_its_times,
        fewstep.sample(
            model, 3, solver=V3, grid=times, options={"statistics": profile.statistics}
        ),
    )
    assert not caplog.text


def test_the_times_of_a_profile_come_with_its_weights(profile, tmp_path) -> None:
    model, file = smooth(VP), profile.save(tmp_path / "profile.json")
    whole = fewstep.sample(model, 3, nfe=5, profile=file)
    assert torch.equal(fewstep.sample(model, 3, nfe=5, grid=f"auto:{file}"), whole)


def test_what_does_not_fit_is_refused(profile, tmp_path) -> None:
    model = smooth(VP)
    record = profile.to_record()
    del record["statistics"]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="no statistics"):
        fewstep.sample(model, 2, solver=V3, nfe=5, options={"statistics": str(old)})
    other = GaussianMixture([[0.0, 0.0]], [1.0], [1.0], VP)
    with pytest.raises(ValueError, match="another model"):
        fewstep.sample(other, 2, solver=V3, nfe=5, options={"statistics": profile})
    with pytest.raises(ValueError, match="guidance"):
        fewstep.sample(model, 2, solver=V3, nfe=5, guidance=2.0, options={"statistics": profile})

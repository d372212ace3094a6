"""Fitted grids: the file behind grid="auto:FILE", and everywhere it is taken."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import fewstep
from fewstep.models.exact import smooth
from fewstep.sampling.profile import Profile, ProfileEntry, names_profile, read_profile
from fewstep.sampling.recipe import SamplerRecipe

VP = fewstep.schedule("vp-linear")
FOUR = (1.0, 0.7, 0.4, 0.1, 1e-3)
EIGHT = (1.0, 0.86, 0.7, 0.55, 0.4, 0.25, 0.1, 0.02, 1e-3)
HEAD = (0.9, 0.5, 1e-3)


def grids(**changes):
    options = {
        "schedule": VP,
        "fingerprint": "abc",
        "entries": (
            ProfileEntry("unipc3", FOUR, error=0.1),
            ProfileEntry("unipc3", EIGHT),
            ProfileEntry("tab3", (*EIGHT[:4], 0.41, 0.25, 0.1, 0.02, 1e-3)),
            ProfileEntry("ddim", HEAD, head=True),
        ),
        "recommended": {4: "unipc3", 8: "tab3"},
        **changes,
    }
    return Profile(**options)


@pytest.fixture
def file(tmp_path):
    return grids().save(tmp_path / "grid.json")


def test_files_come_back(file):
    assert Profile.load(file) == grids()
    assert names_profile(f"auto:{file}")
    assert not names_profile("uniform")
    assert not names_profile(None)


def test_a_grid_that_is_there_is_taken():
    grid, head = grids().fit("unipc3", 4)
    assert tuple(grid.times.tolist()) == FOUR
    assert not head
    grid, head = grids().fit("ddim", 2)
    assert tuple(grid.times.tolist()) == HEAD
    assert head


def test_another_solver_takes_the_recommended_one():
    grid, _ = grids().fit("dpmpp-2m", 8)
    assert float(grid.times[4]) == 0.41
    assert grids().solver_for(5) == "unipc3"
    assert grids().solver_for(30) == "tab3"


def test_numbers_of_steps_between_are_between():
    result = grids()
    times = [result.fit("unipc3", k)[0].times for k in (4, 5, 6, 7, 8)]
    for k, t in zip((4, 5, 6, 7, 8), times, strict=True):
        assert len(t) == k + 1
        assert (float(t[0]), float(t[-1])) == (1.0, 1e-3)
        assert bool((t.diff() < 0).all())
    first = [float(t[1]) for t in times]
    assert first == sorted(first)
    # Grids that are even in t^(2/3) are interpolated to just such ones.
    even = {k: fewstep.grid("power", VP, k, power=1.5).times for k in (4, 6, 12)}
    both = Profile(
        VP, "", tuple(ProfileEntry("tab3", tuple(even[k].tolist())) for k in (4, 12)), {}
    )
    assert torch.allclose(both.fit("tab3", 6)[0].times, even[6], atol=1e-12)
    with pytest.raises(ValueError, match="recommends no solver"):
        both.solver_for(4)


def test_numbers_of_steps_beyond_stretch_the_nearest():
    grid, _ = grids().fit("unipc3", 16)
    assert torch.allclose(grid.times[::2], torch.tensor(EIGHT).double())
    grid, _ = grids().fit("unipc3", 2)
    assert torch.allclose(grid.times, torch.tensor(FOUR[::2]).double())
    grid, head = grids().fit("ddim", 5)
    assert head
    assert float(grid.times[0]) == 0.9


def test_grids_onto_the_data():
    result = grids(entries=(ProfileEntry("tab3", (1.0, 0.4, 0.01, 0.0)),), recommended={})
    grid, _ = result.fit("tab3", 6)
    assert grid.ends_at_zero
    assert grid.is_last_zero(5)


def test_plans_and_samples(file):
    plan = fewstep.plan("auto", VP, nfe=4, grid=f"auto:{file}")
    assert plan.name == "unipc3"
    assert plan.knots.tolist() == list(FOUR)
    plan = fewstep.plan("tab2", VP, steps=5, grid=f"auto:{file}")
    assert (plan.name, plan.nfe) == ("tab2", 5)
    # Two evaluations per step, except Heun's last one.
    assert fewstep.plan("rho-heun", VP, nfe=8, grid=f"auto:{file}").knots.tolist() == list(FOUR)
    model = smooth(VP)
    one = fewstep.sample(model, 3, nfe=4, grid=f"auto:{file}")
    two = fewstep.sample(
        model, 3, solver="unipc3", nfe=4, grid=fewstep.grid("explicit", VP, None, times=FOUR)
    )
    assert torch.equal(one, two)
    last = list(fewstep.steps(model, 3, nfe=4, grid=f"auto:{file}"))[-1]
    assert torch.equal(last.x, one)


def test_a_head_start(file):
    plan = fewstep.plan("ddim", VP, nfe=2, grid=f"auto:{file}")
    assert plan.head
    request = fewstep.SamplerRequest("ddim", nfe=2, grid=f"auto:{file}")
    model = fewstep.Denoiser.wrap(
        lambda x, t: x, schedule=VP, prediction="eps", data_mean=0.0, data_std=1.0
    )
    recipe = fewstep.resolve(model, request).recipe
    assert recipe.head_start == 0.9
    again = recipe.plan_for(VP)
    assert again.head
    assert torch.equal(again.values, plan.values)
    with pytest.raises(ValueError, match=r"head_start is 0\.8, but the first of the times is 1"):
        fewstep.plan("ddim", VP, grid="explicit", times=FOUR, head_start=0.8)


def test_recipes_take_the_times_over(file):
    request = fewstep.SamplerRequest(nfe=8, grid=f"auto:{file}")
    resolved = fewstep.resolve(smooth(VP), request)
    recipe = resolved.recipe
    assert resolved.chosen == "tab3 at the times of the profile with 8 evaluations"
    assert (recipe.name, recipe.grid) == ("tab3", "explicit")
    assert recipe.schedule == VP.to_record()
    text = recipe.to_json()
    assert str(file) not in text
    file.unlink()
    again = SamplerRecipe.from_json(text)
    assert again == recipe
    assert again.plan_for(VP).knots.tolist() == list(grids().entries[2].times)
    outside = json.loads(text) | {"grid": f"auto:{file}"}
    with pytest.raises(ValueError, match="not those of another file"):
        SamplerRecipe.from_json(json.dumps(outside))


def test_what_does_not_fit(file):
    name = f"auto:{file}"
    with pytest.raises(ValueError, match="measured for the schedule 'vp-linear'"):
        fewstep.plan("tab3", fewstep.schedule("ddpm-linear"), nfe=4, grid=name)
    with pytest.raises(ValueError, match="not those of another file"):
        SamplerRecipe(nfe=4, grid=name)
    with pytest.raises(ValueError, match="has its times already, got power"):
        fewstep.plan("tab3", VP, nfe=4, grid=name, power=2.0)
    with pytest.raises(ValueError, match="has its times already, got head_start"):
        fewstep.plan("tab3", VP, nfe=4, grid=name, head_start=0.5)
    with pytest.raises(ValueError, match="give nfe or steps"):
        fewstep.plan("tab3", VP, nfe=4, steps=4, grid=name)
    with pytest.raises(ValueError, match="give nfe"):
        fewstep.plan("tab3", VP, grid=name)
    with pytest.raises(ValueError, match="cannot be read"):
        fewstep.plan("tab3", VP, nfe=4, grid="auto:/nowhere/grid.json")
    assert read_profile(name, VP).fingerprint == "abc"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(format="fewstep.plan"),
            "format 'fewstep.plan', not 'fewstep.profile'",
        ),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(extra=1), "'extra'"),
        (lambda c: c.pop("schedule"), "'schedule'"),
        (lambda c: c.update(schedule="vp"), "JSON object"),
        (lambda c: c.update(schedule={"name": "vp"}), "vp-linear"),
        (lambda c: c.update(fingerprint=3), "text"),
        (lambda c: c.update(entries=[]), "no times"),
        (lambda c: c.update(entries={}), "list"),
        (lambda c: c.update(recommended={"4": "euler"}), "without such an entry"),
        (lambda c: c.update(recommended={"four": "tab3"}), "numbers of steps"),
        (lambda c: c["entries"].append(c["entries"][0]), "two entries"),
        (lambda c: c["entries"].append(3), "JSON object"),
        (lambda c: c["entries"][0].update(more=3), "unknown key 'more'"),
        (lambda c: c["entries"][0].update(solver=3), "a name"),
        (lambda c: c["entries"][0].update(steps=3), "are not 3 steps"),
        (lambda c: c["entries"][0].update(times=[1.0]), "two or more"),
        (lambda c: c["entries"][0].update(times=[1.0, "x"]), "two or more"),
        (lambda c: c["entries"][0].update(times=[1, True, 0.5, 0.2, 0.1]), "two or more"),
        (lambda c: c["entries"][0].update(times=[1, 0.5, 0.6, 0.2, 0.1]), "decrease"),
        (lambda c: c["entries"][0].update(times=[2, 0.5, 0.4, 0.2, 0.1]), "outside"),
        (lambda c: c["entries"][0].update(head="yes"), "true or false"),
        (lambda c: c["entries"][0].update(error="small"), "a number"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    content = copy.deepcopy(grids().to_record())
    change(content)
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Profile.load(path)
    assert "grid.json" in str(error.value)


def test_a_file_that_is_no_json(tmp_path):
    path = tmp_path / "grid.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Profile.load(path)
    with pytest.raises(ValueError, match="from 1 to"):
        grids().fit("tab3", 0)


@pytest.mark.diffusers
def test_schedulers_take_fitted_grids(tmp_path):
    pytest.importorskip("diffusers")
    from fewstep.adapters.diffusers import PlanScheduler

    ddpm = fewstep.schedule("ddpm-linear")
    times = (999.0, 650.5, 300.25, 80.0, 0.0)
    profile = Profile(
        ddpm,
        "",
        (ProfileEntry("unipc3", times), ProfileEntry("ddim", (900.0, 400.0, 0.0), head=True)),
        {4: "unipc3"},
    )
    name = f"auto:{profile.save(tmp_path / 'grid.json')}"
    scheduler = PlanScheduler(solver="auto", grid=name)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(times[:-1])
    with pytest.raises(ValueError, match="profile with a head start"):
        PlanScheduler(solver="ddim", grid=name).set_timesteps(2)
    with pytest.raises(ValueError, match="cannot be read"):
        PlanScheduler(grid="auto:/nowhere.json").set_timesteps(4)

"""The store of trajectories: what is recorded, how it is read, what it survives, what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep import trajectories
from fewstep.base import locks
from fewstep.base.files import read_json, write_json
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.diffusion.schedules import schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Clipped, Guided
from fewstep.sampling import batches
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.sampling.protocol import Run
from fewstep.trajectories import Cycle, TrajectoryStore, Uniform, shards, verify, writing
from fewstep.trajectories.claims import Claim
from fewstep.trajectories.conditions import condition
from fewstep.trajectories.manifest import read_manifest
from fewstep.trajectories.shards import read_partial, write_partial
from forks import FORKS, Fork

MODEL = fewstep.load("mixture-smooth")
SMALL = {"n": 20, "nfe": 8, "shard_size": 8, "batch_size": 4}
"""Three shards, of 8, 8 and 4."""

DETERMINISTIC = [
    name
    for name, build in fewstep.SOLVERS.items()
    if not build().adaptive and not fewstep.plan(name, MODEL.schedule, steps=4).stochastic
]


def labelled() -> Denoiser:
    """A model whose noise depends on the label: class 0 is none."""

    def network(x, t, class_labels):
        return 0.1 * x + 0.05 * class_labels[:, None].to(x)

    return Denoiser.wrap(
        network,
        schedule=schedule("vp-linear"),
        prediction="eps",
        event_shape=(3,),
        null_condition={"class_labels": 0},
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    write_json(path, {**read_json(path), **changes})


def starts(seed: int, n: int, shape: tuple[int, ...] = (2,)) -> torch.Tensor:
    sigma = float(MODEL.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    return sigma * NoiseSource(seed, range(n)).draw(INITIAL, shape)


@pytest.fixture
def store(tmp_path):
    return fewstep.record(MODEL, tmp_path / "store", **SMALL)


# What is recorded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_x_t_is_rounded_before_and_its_trajectory_is_stored(tmp_path, dtype):
    store = fewstep.record(MODEL, tmp_path, n=16, nfe=8, dtype=dtype, seed=5, batch_size=16)
    kind = getattr(torch, dtype)
    result = store.read(range(16)).states
    rounded = starts(5, 16).to(kind).float()
    assert torch.equal(result[:, 0], rounded)

    recipe = fewstep.SamplerRecipe.from_json(json.dumps(store.manifest.sampler))
    built = PlanSampler(recipe.plan, MODEL)
    run = Run(NoiseSource(5, range(16)), save=True)
    states = built.run(rounded, run).states[store.manifest.knots].transpose(0, 1)
    assert torch.equal(result, states.to(kind).float())
    # From the unrounded start it is another trajectory.
    other = built.run(starts(5, 16), run).states[store.manifest.knots].transpose(0, 1)
    assert torch.equal(other, states) == (dtype == "float32")


def test_shards_and_batches_do_not_matter(tmp_path, store):
    other = fewstep.record(
        MODEL, tmp_path / "other", **{**SMALL, "shard_size": 5, "batch_size": 20}
    )
    a, b = store.read(range(20)).states, other.read(range(20)).states
    assert torch.allclose(a, b, rtol=2e-3, atol=1e-6)
    longer = fewstep.record(MODEL, tmp_path / "longer", **{**SMALL, "n": 40})
    assert torch.equal(longer.read(range(20)).states, a)
    seeded = fewstep.record(MODEL, tmp_path / "seeded", **SMALL, seed=1)
    assert not torch.isclose(seeded.read(range(20)).states, a).all(2).all(1).any()


def test_the_samples_are_those_of_sample(tmp_path):
    store = fewstep.record(MODEL, tmp_path, n=8, nfe=8, dtype="float32", keep="all", seed=3)
    samples = fewstep.sample(MODEL, 8, nfe=8, seed=3)
    assert torch.equal(store.read(range(8)).states[:, -1], samples)


def test_the_manifest_says_what_was_done(store):
    manifest = store.manifest
    assert manifest.fingerprint == MODEL.fingerprint()
    assert manifest.schedule == {**MODEL.schedule.to_record()}
    noise = MODEL.schedule
    assert manifest.alpha == noise.alpha(store.times).tolist()
    assert manifest.sigma == noise.sigma(store.times).tolist()
    assert (len(store), store.event_shape, manifest.dtype) == (20, (2,), "float16")
    assert manifest.wrappers == []
    assert manifest.guidance is None


def test_what_is_wrapped_around_the_model_is_part_of_it(tmp_path, store):
    clipped = Clipped(MODEL, -1, 1)
    assert clipped.fingerprint() == MODEL.fingerprint()
    with pytest.raises(ValueError, match=r"wrappers \[\], now \[.*clipped"):
        fewstep.record(clipped, store.folder, **SMALL)
    with pytest.raises(ValueError, match="recorded with"):
        verify(store.folder, clipped)
    other = fewstep.record(clipped, tmp_path / "clipped", **SMALL)
    assert other.manifest.wrappers == [{"kind": "clipped", "low": -1, "high": 1}]
    assert not torch.equal(other.read(range(20)).states, store.read(range(20)).states)


# Which states are recorded


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_quadratic_grid_of_kept_times(tmp_path, frames):
    store = fewstep.record(MODEL, tmp_path, n=2, nfe=9, keep=frames)
    a, b = 1.0, MODEL.schedule.t_min**0.5
    closed = [(a + m / frames * (b - a)) ** 2 for m in range(frames + 1)]
    assert store.times.tolist() == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("name", ["uniform", "karras", "log-rho"])
def test_the_grid_is_bent_to_the_kept_times(tmp_path, name):
    """The recorded times become knots, at the same NFE, and the sample stays as good."""
    options = {"solver": "tab3", "nfe": 24, "dtype": "float32"}
    store = fewstep.record(MODEL, tmp_path, n=32, keep=f"{name}:5", **options)
    wanted = fewstep.grid(name, MODEL.schedule, 5).times
    assert torch.equal(store.times, wanted)
    plan = fewstep.SamplerRecipe.from_json(json.dumps(store.manifest.sampler)).plan
    assert plan.nfe == 24
    assert [float(plan.knots[k]) for k in store.manifest.knots] == wanted.tolist()
    best = fewstep.sample(MODEL, 32, noise=starts(0, 32), solver="dopri5", options={"rtol": 1e-6})
    result = store.read(range(32)).states[:, -1]
    plain = fewstep.sample(MODEL, 32, noise=starts(0, 32), solver="tab3", nfe=24)
    assert (result - best).square().mean() < 3 * (plain - best).square().mean() + 1e-8


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_every_solver_is_bent_to_the_kept_times(tmp_path, solver):
    plain = fewstep.plan(solver, MODEL.schedule, steps=8)
    store = fewstep.record(MODEL, tmp_path, n=2, solver=solver, nfe=plain.nfe, keep=3)
    plan = fewstep.SamplerRecipe.from_json(json.dumps(store.manifest.sampler)).plan
    assert plan.structure == plain.structure
    start = float(plain.knots[0])
    wanted = fewstep.grid("quadratic", MODEL.schedule, 3, t_start=start).times
    torch.testing.assert_close(store.times[:-1], wanted[:-1], rtol=1e-12, atol=0)
    assert store.times[-1] == plain.knots[-1]


def test_auto_records_the_measured_plan_where_its_own_knots_are_recorded(tmp_path):
    """Its weights hold at its own times alone; for others auto takes the schedule's default."""
    model = fewstep.load("mixture-smooth")
    times = (1.0, 0.5, 0.2, 0.05, model.schedule.t_min)
    entry = ProfileEntry("ddim", times)
    model.profile = Profile(model.schedule, model.fingerprint(), (entry,), {4: "ddim"})
    options = {"n": 4, "nfe": 4, "dtype": "float32"}
    for name, keep in {"all": "all", "knots": [2], "times": [0.5, 0.05]}.items():
        store = fewstep.record(model, tmp_path / name, **options, keep=keep)
        assert set(store.times.tolist()) <= set(times)
        samples = fewstep.sample(model, 4, nfe=4)
        assert torch.equal(store.read(range(4)).states[:, -1], samples)
    bent = fewstep.record(model, tmp_path / "bent", **options, keep="uniform:2").manifest
    default = fewstep.record(MODEL, tmp_path / "default", **options, keep="uniform:2").manifest
    assert bent.sampler == default.sampler


def test_kept_knots_of_an_uneven_set(tmp_path):
    """The original labelled such sets with wrong times; here a state has the time of its knot."""
    plan = fewstep.plan("ddim", MODEL.schedule, steps=16)
    store = fewstep.record(MODEL, tmp_path, n=4, plan=plan, keep=[6, 12], dtype="float32")
    assert store.times.tolist() == [float(plan.knots[k]) for k in (0, 6, 12, 16)]
    whole = fewstep.sample(MODEL, 4, plan=plan, save="states").states
    assert torch.equal(store.read(range(4)).states, whole[[0, 6, 12, 16]].transpose(0, 1))
    again = fewstep.record(
        MODEL, tmp_path / "2", n=4, plan=plan, keep=store.times.tolist(), dtype="float32"
    )
    assert again.manifest.knots == [0, 6, 12, 16]


def test_times_that_are_no_knots_of_a_plan(tmp_path):
    plan = fewstep.plan("ddim", MODEL.schedule, steps=10, grid="uniform")
    with pytest.raises(ValueError, match=r"0\.52 is not a knot of the plan, the nearest is 0\.5"):
        fewstep.record(MODEL, tmp_path / "x", n=4, plan=plan, keep=[0.52])
    assert not (tmp_path / "x").exists()


def test_adaptive_states_are_those_at_the_kept_times(tmp_path):
    options = {"rtol": 1e-5, "atol": 1e-5}
    store = fewstep.record(
        MODEL, tmp_path, n=8, solver="dopri5", options=options, keep="uniform:4", dtype="float32"
    )
    assert store.manifest.knots is None
    fine = fewstep.plan(
        "tab3", MODEL.schedule, steps=400, grid="uniform", t_end=MODEL.schedule.t_min
    )
    exact = PlanSampler(fine, MODEL).run(
        starts(0, 8).double(), Run(NoiseSource(0, range(8)), save=True)
    )
    result = store.read(range(8)).states.double().transpose(0, 1)
    assert (result - exact.states[::100]).abs().max() < 2e-3
    assert torch.equal(store.times, exact.times[::100])


def test_the_adaptive_sampler_keeps_states_where_it_is_asked():
    result = AdaptiveSampler(MODEL, rtol=1e-4)
    times = fewstep.grid("uniform", MODEL.schedule, 4).times.tolist()
    source = NoiseSource(0, range(3))
    x = result.start(source.draw(INITIAL, (2,)))
    done = result.run(x, Run(source, save=True, times=times))
    assert done.times.tolist() == times
    assert torch.equal(done.states[0], x)
    assert torch.equal(done.states[-1], done.x)
    with pytest.raises(ValueError, match=r"must go from 1 to 0\.001"):
        result.run(x, Run(source, save=True, times=times[:-1]))


def test_models_of_whole_times(tmp_path):
    seen = set()

    def network(x, t):
        seen.update(t.tolist())
        return 0.1 * x

    model = Denoiser.wrap(
        network,
        schedule=schedule("ddpm-linear"),
        prediction="eps",
        event_shape=(2,),
        integer_times=True,
    )
    store = fewstep.record(model, tmp_path, n=2, nfe=12, keep=4)
    assert store.times.tolist() == [999, 562, 250, 62, 0]
    assert all(t == round(t) for t in seen)
    assert {999, 562, 250, 62} <= seen
    result = trajectories.spectrum(store, model, states=64)
    assert (result.variable, result.resampled) == ("sqrt", True)
    assert all(t == round(t) for t in seen)


def test_the_grid_of_kept_times_where_time_is_the_noise_level(tmp_path):
    model = Denoiser.wrap(
        lambda x, t: 0.1 * x, schedule=schedule("edm"), prediction="eps", event_shape=(2,)
    )
    store = fewstep.record(model, tmp_path, n=2, nfe=8, keep=4)
    assert torch.equal(store.times, fewstep.grid("karras", model.schedule, 4).times)


def test_a_last_state_without_noise(tmp_path):
    options = {"to_zero": True}
    store = fewstep.record(
        MODEL, tmp_path, n=4, solver="ddim", nfe=8, grid="uniform", options=options, keep=2
    )
    assert store.times[-1] == 0
    assert (store.manifest.alpha[-1], store.manifest.sigma[-1]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "quadratic:9", "nfe": 8}, "as many steps"),
        ({"keep": 0}, "quadratic:4"),
        ({"keep": "quadratric:4"}, "quadratic"),
        ({"keep": [3, 99]}, "knots from 0 to"),
        ({"keep": [0.2, 0.5]}, "must decrease"),
        ({"keep": [1.5]}, "must decrease and lie between"),
        ({"keep": [3], "solver": "dopri5", "nfe": None}, "no knots"),
        ({"keep": {"a": 1}}, "keep must be"),
        ({"solver": "ddpm"}, "is stochastic, so"),
        ({"solver": "gddim", "options": {"lam": 0.5}}, "is stochastic, so"),
        ({"dtype": "float64"}, "one of float16"),
        ({"n": 0}, "positive"),
        ({"shard_size": 1.5}, "positive"),
        ({"seed": "a"}, "seed"),
        ({"guidance": 2.0}, "guidance needs"),
        ({"grid": "uniform", "recipe": "x.json"}, "already"),
    ],
)
def test_what_cannot_be_recorded_is_said_before_anything_is_done(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fewstep.record(MODEL, tmp_path / "x", **{**SMALL, **options})
    assert not (tmp_path / "x").exists()


def test_states_that_do_not_fit_into_the_type(tmp_path):
    big = Denoiser.wrap(
        lambda x, t: x * 0 - 1e6,
        schedule=schedule("vp-linear"),
        prediction="x0",
        event_shape=(2,),
    )
    with pytest.raises(ValueError, match=r"state 1 of trajectory \d+ does not fit into float16"):
        fewstep.record(big, tmp_path, **SMALL)
    assert not list(tmp_path.glob("shard-*"))
    assert len(fewstep.record(big, tmp_path, **SMALL, dtype="float32", overwrite=True)) == 20


def test_a_head_start_is_refused(tmp_path):
    plan = fewstep.plan("tab2", MODEL.schedule, nfe=8, head_start=0.7)
    with pytest.raises(ValueError, match="head start"):
        fewstep.record(MODEL, tmp_path / "x", n=2, plan=plan, keep="all")


# Conditions


def test_conditions_by_rule(tmp_path):
    model = labelled()
    options = {**SMALL, "n": 600, "shard_size": 128, "batch_size": 128}
    drawn = fewstep.record(
        model, tmp_path / "a", **options, class_labels=Uniform(range(5)), seed=2
    )
    labels = drawn.read(range(600)).conditions["class_labels"]
    counts = labels.bincount(minlength=5)
    # 120 each on average; five standard deviations of a binomial are 49.
    assert (counts - 120).abs().max() < 49
    other = fewstep.record(
        model,
        tmp_path / "b",
        **{**SMALL, "n": 30},
        class_labels=Uniform(range(5)),
        seed=2,
    )
    assert torch.equal(other.read(range(30)).conditions["class_labels"], labels[:30])
    turns = fewstep.record(model, tmp_path / "c", **SMALL, class_labels=Cycle((4, 1, 3)))
    assert turns.read([0, 1, 2, 19]).conditions["class_labels"].tolist() == [4, 1, 3, 1]
    same = fewstep.record(model, tmp_path / "d", **SMALL, class_labels=2)
    assert same.read([0, 19]).conditions["class_labels"].tolist() == [2, 2]


def test_conditions_and_guidance_reach_the_network(tmp_path):
    model = labelled()
    given = torch.arange(20) % 4
    store = fewstep.record(
        model, tmp_path, **SMALL, class_labels=given, guidance=2.0, dtype="float32", keep="all"
    )
    assert store.manifest.guidance == 2.0
    assert torch.equal(store.read(range(20)).conditions["class_labels"], given)
    samples = fewstep.sample(model, 20, nfe=8, class_labels=given, guidance=2.0)
    assert torch.equal(store.read(range(20)).states[:, -1], samples)


def test_guidance_can_be_said_in_two_ways(tmp_path):
    model, options = labelled(), {**SMALL, "class_labels": 2}
    fewstep.record(model, tmp_path, **options, guidance=2.0)
    before = files(tmp_path)
    (tmp_path / "shard-00000.safetensors").unlink()
    guided = Guided(model, 2.0)
    fewstep.record(guided, tmp_path, **options)
    assert files(tmp_path) == before
    assert verify(tmp_path, guided).sound
    with pytest.raises(ValueError, match="guided with scale 2, the trajectories with 3"):
        fewstep.record(guided, tmp_path, **options, guidance=3.0)
    with pytest.raises(ValueError, match=r"guidance 2\.0, now null"):
        fewstep.record(model, tmp_path, **options, guidance=1.0)


def test_given_conditions_are_needed_again(tmp_path):
    model = labelled()
    given = torch.arange(20)
    store = fewstep.record(model, tmp_path, **SMALL, class_labels=given)
    before = files(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="'class_labels' are not in the manifest"):
        trajectories.resume(model, tmp_path)
    with pytest.raises(ValueError, match="condition class_labels"):
        fewstep.record(model, tmp_path, **SMALL, class_labels=given + 1)
    fewstep.record(model, tmp_path, **SMALL, class_labels=given)
    assert files(tmp_path) == before
    assert verify(tmp_path, model).error == pytest.approx(0, abs=1e-3)
    assert store.manifest.conditions["class_labels"]["rule"] == "given"


@pytest.mark.parametrize(
    ("value", "values"),
    [
        (np.arange(5), [0, 1, 2, 3, 4]),
        (np.int64(3), [3] * 5),
        ([3], [3] * 5),
        (range(5), [0, 1, 2, 3, 4]),
        ((0.5, 1, 2, 3, 4), [0.5, 1, 2, 3, 4]),
        ([torch.tensor([1.0, 2.0])], [[1.0, 2.0]] * 5),
    ],
)
def test_values_are_converted_as_those_of_sample(value, values):
    rule = condition("y", value, 5)
    assert rule.at(range(5), seed=0, name="y").tolist() == values


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a cat", "embeddings"),
        (["a"] * 20, "embeddings"),
        ([1, 2, 3], "3 values for 20"),
        (torch.ones(20, dtype=torch.bool), "numbers"),
    ],
)
def test_conditions_that_cannot_be_kept(tmp_path, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fewstep.record(labelled(), tmp_path / "x", **SMALL, class_labels=value)


# Reading


def test_random_access_is_what_is_in_the_files(store):
    whole = torch.cat(
        [load_file(path)["states"] for path in sorted(store.folder.glob("shard-*"))]
    ).float()
    assert torch.equal(store.read(range(20)).states, whole)
    chosen = [19, 0, 7, 8, 8, 15]
    assert torch.equal(store.read(chosen).states, whole[chosen])
    assert torch.equal(
        store.read(torch.tensor(chosen), frames=[0, 4]).states, whole[chosen][:, [0, 4]]
    )
    index = torch.cat([load_file(p)["index"] for p in sorted(store.folder.glob("shard-*"))])
    assert torch.equal(index, torch.arange(20))


def test_what_is_not_there_cannot_be_read(store):
    for wrong in ([20], [-1], [0.5], [True]):
        with pytest.raises(IndexError, match="numbers 0 to 19"):
            store.read(wrong)
    with pytest.raises(IndexError, match="numbers 0 to 4"):
        store.read([0], frames=[5])


def test_nothing_can_be_read_too(tmp_path):
    store = fewstep.record(labelled(), tmp_path, **SMALL, class_labels=1)
    batch = store.read([])
    assert batch.states.shape == (0, 5, 3)
    assert batch.conditions["class_labels"].shape == (0,)


def test_an_epoch_has_every_trajectory_once_in_windows_of_shards(store):
    first = store.order(seed=1, epoch=0, window=2)
    assert first.sort().values.tolist() == list(range(20))
    assert torch.equal(first, store.order(seed=1, epoch=0, window=2))
    assert not torch.equal(first, store.order(seed=1, epoch=1, window=2))
    assert not torch.equal(first, store.order(seed=2, epoch=0, window=2))
    sizes = [len(set((part // 8).tolist())) for part in (first[:12], first[-4:])]
    assert sizes[0] <= 2 or sizes[1] == 1


def test_a_store_goes_to_other_processes_by_its_path(store):
    store.read([3])
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent).read([3]).states, store.read([3]).states)


def test_statistics_are_those_of_the_states(store):
    result = trajectories.statistics(store)
    states = store.read(range(20)).states.double().transpose(0, 1).flatten(1)
    assert torch.allclose(result.mean, states.mean(1))
    assert torch.allclose(result.std, states.std(1, correction=0))
    assert torch.equal(result.largest, states.amax(1))
    assert torch.equal(result.smallest, states.amin(1))
    assert result.bytes == sum(p.stat().st_size for p in store.folder.glob("shard-*"))


def test_a_spectrum_of_few_states_needs_the_model(tmp_path, store):
    with pytest.raises(ValueError, match="give the model"):
        trajectories.spectrum(store)
    fresh = trajectories.spectrum(store, MODEL, n=20, states=64)
    assert (fresh.variable, len(fresh.dct.energy)) == ("sqrt", 64)
    dense = fewstep.record(
        MODEL,
        tmp_path / "dense",
        n=20,
        solver="tab2",
        nfe=63,
        grid="quadratic",
        keep="all",
        dtype="float32",
    )
    stored = trajectories.spectrum(dense)
    assert torch.allclose(stored.dct.energy, fresh.dct.energy, atol=1e-3)
    assert stored.dct.modes == fresh.dct.modes < stored.dft.modes


# What it survives


def counted(monkeypatch):
    result = []
    plain = writing.Writer.make

    def make(self, shard, *rest):
        result.append(shard)
        return plain(self, shard, *rest)

    monkeypatch.setattr(writing.Writer, "make", make)
    return result


def test_the_same_call_again_makes_what_is_missing(tmp_path, store, monkeypatch):
    before = files(store.folder)
    (store.folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 3 shards are missing, the first is 1"):
        TrajectoryStore.open(store.folder)
    result = counted(monkeypatch)
    fewstep.record(MODEL, store.folder, **SMALL)
    assert result == [1]
    assert files(store.folder) == before
    fewstep.record(MODEL, store.folder, **SMALL)
    trajectories.resume(MODEL, store.folder)
    assert result == [1]


def test_an_interrupted_run_leaves_whole_shards(tmp_path, store, monkeypatch):
    plain, calls = writing.write_shard, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(writing, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fewstep.record(MODEL, tmp_path / "other", **SMALL)
    there = {path.name for path in (tmp_path / "other").iterdir()}
    assert len(there) == 2
    monkeypatch.undo()
    fewstep.record(MODEL, tmp_path / "other", **SMALL)
    assert files(tmp_path / "other") == files(store.folder)


def test_half_a_file_is_no_shard_and_is_swept_up(store, monkeypatch):
    before = files(store.folder)
    whole = (store.folder / "shard-00002.safetensors").read_bytes()
    half = store.folder / ".shard-00002.safetensors.0123456789abcdef.tmp"
    manifest = store.folder / ".manifest.json.0123456789abcdef.tmp"

    def litter():
        (store.folder / "shard-00002.safetensors").unlink(missing_ok=True)
        for path in (half, manifest):
            path.write_bytes(whole[: len(whole) // 2])

    litter()
    another = Claim(store.folder, 0)
    assert another.take()
    fewstep.record(MODEL, store.folder, **SMALL)
    assert half.exists()  # another writer may be at it
    another.drop()
    litter()
    fewstep.record(MODEL, store.folder, **SMALL)
    assert not half.exists()
    assert manifest.exists()  # one who begins has no claim yet
    # Old by this machine's monotonic clock, whatever the time of the file.
    now = [0.0]
    monkeypatch.setattr(writing.time, "monotonic", lambda: now[0])
    writer = writing.writer_of(MODEL, store.folder, store.manifest)
    writer._sweep()
    assert manifest.exists()
    now[0] += writing.PATIENCE + 1
    writer._sweep()
    assert files(store.folder) == before


def test_an_interrupted_shard_begins_where_it_was(tmp_path, monkeypatch):
    options = {**SMALL, "shard_size": 20, "batch_size": 4}
    whole = fewstep.record(MODEL, tmp_path / "whole", **options)
    runs, run_batch = [], batches.run_batch

    def counting(sampler, source, *arguments, **named):
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(list(source.samples))
        return run_batch(sampler, source, *arguments, **named)

    monkeypatch.setattr(batches, "run_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        fewstep.record(MODEL, tmp_path / "parts", **options)
    partial = tmp_path / "parts" / "partial-00000.safetensors"
    content = bytearray(partial.read_bytes())
    runs[:] = [None] * 4  # counts without raising
    fewstep.record(MODEL, tmp_path / "parts", **options)
    assert runs[4:] == [list(range(12, 16)), list(range(16, 20))]
    assert files(tmp_path / "parts") == files(whole.folder)
    # A damaged one is not used, nor one of other settings.
    content[-1] ^= 1
    partial.write_bytes(content)
    assert read_partial(tmp_path / "parts", whole.manifest, 0) == []
    write_partial(
        tmp_path / "parts", replace(whole.manifest, seed=9), 0, torch.zeros(4, 5, 2).half()
    )
    assert read_partial(tmp_path / "parts", whole.manifest, 0) == []
    fewstep.record(MODEL, tmp_path / "parts", **options)
    assert not partial.exists()


def test_a_store_that_is_being_recorded_is_not_overwritten(store):
    another = Claim(store.folder, 1)
    assert another.take()
    with pytest.raises(ValueError, match=r"is being recorded by process \d+ on"):
        fewstep.record(MODEL, store.folder, **SMALL, overwrite=True)
    another.drop()
    fewstep.record(MODEL, store.folder, **SMALL, overwrite=True)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_claim_without_an_owner_is_taken_over_soon(store, content, monkeypatch):
    """As a full disk may leave it; the clock of the machine goes back meanwhile."""
    now, stages = [0.0], []
    (store.folder / "shard-00001.safetensors").unlink()
    (store.folder / "claims").mkdir()
    (store.folder / "claims" / "00001").write_text(content)

    class Stages:
        def stage(self, name, total=None, *, done=0):
            stages.append(name)

        def tick(self, amount=1, note=""):
            pass

    def sleep(seconds):
        now[0] += seconds

    for clock in (locks.time, writing.time):
        monkeypatch.setattr(clock, "monotonic", lambda: now[0])
        monkeypatch.setattr(clock, "time", lambda: -now[0])
    monkeypatch.setattr(writing.time, "sleep", sleep)
    fewstep.record(MODEL, store.folder, **SMALL, progress=Stages())
    assert locks.UNREADABLE_PATIENCE < now[0] < locks.UNREADABLE_PATIENCE + 1
    assert "waiting for a writer, which records shard 1" in stages


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"(?i)no space"):
        fewstep.record(MODEL, tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def places_to_damage(path: Path) -> dict[str, int]:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    text = path.read_bytes()[8 : 8 + length]
    return {
        "the length": 0,
        "the header": 8 + text.index(b"states"),
        "the checksum": 8 + text.index(b"sha256") + 12,
        "the first number": 8 + length,
        "the last number": size - 1,
    }


@pytest.mark.parametrize(
    "where", ["the length", "the header", "the checksum", "the first number", "the last number"]
)
def test_damage_is_found_and_made_anew_alone(store, where, monkeypatch):
    before = files(store.folder)
    assert verify(store.folder, MODEL).sound
    path = store.folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[places_to_damage(path)[where]] ^= 1
    path.write_bytes(content)
    result = verify(store.folder, MODEL)
    assert not result.sound
    assert list(result.damaged) == [1]
    output = counted(monkeypatch)
    trajectories.resume(MODEL, store.folder)
    assert output == [1]
    assert files(store.folder) == before


def test_no_byte_can_change_unseen(tmp_path):
    fewstep.record(MODEL, tmp_path, n=3, nfe=4, keep=1)
    path, manifest = tmp_path / "shard-00000.safetensors", read_manifest(tmp_path)
    whole = path.read_bytes()
    assert shards.check_shard(tmp_path, manifest, 0) is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert shards.check_shard(tmp_path, manifest, 0) is not None, place


def test_a_shorter_file_is_found(store):
    path = store.folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    assert "bytes" in verify(store.folder).damaged[0]
    with pytest.raises(ValueError, match="does not match the manifest"):
        store.read([0])


def test_a_shard_of_another_place_is_found(tmp_path, store):
    shutil.copy(store.folder / "shard-00000.safetensors", store.folder / "shard-00001.safetensors")
    assert "another place" in verify(store.folder).damaged[1]
    other = fewstep.record(MODEL, tmp_path / "other", **SMALL, seed=9)
    shutil.copy(other.folder / "shard-00000.safetensors", store.folder)
    assert set(verify(store.folder).damaged) == {0, 1}


def test_states_that_the_model_does_not_give_are_found(store):
    """Even if the checksum is right."""
    for shard in range(3):
        tensors = load_file(store.folder / f"shard-{shard:05d}.safetensors")
        tensors["states"][:, 1:] *= 1.02
        writing.write_shard(store.folder, store.manifest, shard, tensors)
    assert verify(store.folder).sound
    result = verify(store.folder, MODEL)
    assert not result.sound
    assert result.error == pytest.approx(0.02, rel=0.1)


def test_another_model_cannot_go_on(store):
    with pytest.raises(ValueError, match="another model"):
        fewstep.record(fewstep.load("mixture-sharp"), store.folder, **SMALL)
    with pytest.raises(ValueError, match="another model"):
        verify(store.folder, fewstep.load("mixture-sharp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 21}, "n 20, now 21"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"dtype": "float32"}, 'dtype "float16", now "float32"'),
        ({"shard_size": 10}, "shard_size 8, now 10"),
        ({"batch_size": 8}, "batch_size 4, now 8"),
        ({"nfe": 9}, "of 8 evaluations, now .* of 9 evaluations"),
        ({"solver": "ddim"}, "unipc2 of 8 evaluations, now ddim of 8 evaluations"),
        ({"keep": 2}, "unipc2|times"),
    ],
)
def test_other_settings_are_refused_by_name(store, change, message):
    before = files(store.folder)
    with pytest.raises(ValueError, match=message):
        fewstep.record(MODEL, store.folder, **{**SMALL, **change})
    assert files(store.folder) == before
    fewstep.record(MODEL, store.folder, **{**SMALL, **change}, overwrite=True)
    assert files(store.folder) != before


def test_shards_without_a_manifest_are_not_overwritten(store):
    (store.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="shards without a manifest"):
        fewstep.record(MODEL, store.folder, **SMALL)
    (store.folder / "a-file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        fewstep.record(MODEL, store.folder / "a-file", **SMALL)


def test_the_manifest_of_something_else_is_not_deleted(tmp_path):
    path = tmp_path / "manifest.json"
    for text in ('{"name": "a web page"}', "not even JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            fewstep.record(MODEL, tmp_path, **SMALL)
        with pytest.raises(ValueError, match="is not deleted"):
            fewstep.record(MODEL, tmp_path, **SMALL, overwrite=True)
        assert path.read_text() == text


# Many writers


@pytest.mark.filterwarnings(FORKS)
def test_three_writers_of_which_one_is_killed(tmp_path, monkeypatch):
    plain = writing.Writer.follow

    def slow(self, *arguments, **options):
        time.sleep(0.1)  # the others wait their turn while this one holds its shard
        return plain(self, *arguments, **options)

    def write(folder):
        return fewstep.record(MODEL, folder, n=96, nfe=8, shard_size=8, batch_size=4)

    alone = write(tmp_path / "alone")
    folder = tmp_path / "many"
    monkeypatch.setattr(writing.Writer, "follow", slow)
    writers = [Fork(lambda: write(folder), fresh=False) for _ in range(3)]
    try:
        held: list[Path] = []
        while not held:  # until the first of them is at a shard
            assert not writers[0].has_ended()
            time.sleep(0.005)
            claims = folder.glob("claims/[0-9]*")
            held = [p for p in claims if str(writers[0].pid) in p.read_text()]
    finally:
        os.kill(writers[0].pid, signal.SIGKILL)
    assert [writer.wait() for writer in writers] == [-signal.SIGKILL, 0, 0]
    assert files(folder) == files(alone.folder)


def test_two_that_begin_at_once_have_one_manifest(tmp_path):
    """Informative fields may differ; the second reads what the first wrote."""
    fewstep.record(MODEL, tmp_path, **SMALL, about={"model": "a"})
    fewstep.record(MODEL, tmp_path, **SMALL, about={"model": "b"})
    assert read_manifest(tmp_path).about == {"model": "a"}
    assert verify(tmp_path).sound


def test_a_claim_keeps_others_away_while_its_holder_lives(tmp_path):
    first, second = Claim(tmp_path, 3), Claim(tmp_path, 3)
    assert first.take()
    assert not second.take()
    first.drop()
    assert second.take()
    second.drop()
    assert not list(tmp_path.iterdir())

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert first.take()
    path = tmp_path / "claims" / "00003"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": ended.pid}))
    assert second.take()

    assert not list(path.parent.glob(".*"))


# What it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": ["../../elsewhere.safetensors"]}, "unknown key 'shards'"),
        ({"format": "fewstep.plan"}, "the format 'fewstep.plan', not"),
        ({"version": 2}, "version 2; this fewstep reads version 1"),
        ({"dtype": "float64"}, "'dtype' of the manifest must be one of"),
        ({"dtype": ["float16"]}, "'dtype' of the manifest must be one of"),
        ({"n": 10**15}, "'n' of the manifest must be"),
        ({"n": 10**12, "shard_size": 1}, "more than 1000000 files"),
        ({"n": True}, "'n' of the manifest must be"),
        ({"event_shape": [10**9, 10**9]}, "'event_shape' of the manifest must be"),
        ({"event_shape": [-2]}, "'event_shape' of the manifest must be"),
        ({"event_shape": "2"}, "'event_shape' of the manifest must be"),
        ({"times": [1.0, 1.0]}, "decrease strictly"),
        ({"times": [1.0, 0.5]}, "2 times, but 5 values alpha"),
        ({"times": [1.0, "a"]}, "'times' of the manifest must be"),
        ({"fingerprint": "../x"}, "'fingerprint' of the manifest must be"),
        ({"conditions": {"../x": {}}}, "cannot be the name"),
        ({"conditions": {"x": {"rule": "code"}}}, "unknown rule"),
        (
            {
                "conditions": {
                    "x": {"rule": "given", "sha256": "", "dtype": "int64", "shape": [10**9]}
                }
            },
            "impossible",
        ),
        (
            {"conditions": {"x": {"rule": "cycle", "values": [], "dtype": "int64", "shape": []}}},
            "from 1 to",
        ),
    ],
)
def test_hostile_manifests_are_refused(store, change, message):
    edit(store.folder, **change)
    with pytest.raises(ValueError, match=message):
        TrajectoryStore.open(store.folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"n": 1, "n": 2}', "null", "[" * 5000, "\xff"])
def test_manifests_that_are_none(store, text):
    (store.folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        TrajectoryStore.open(store.folder)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a store of trajectories"):
        TrajectoryStore.open(store.folder)


def test_a_manifest_of_larger_shapes_reads_nothing(store):
    """What a manifest claims is held against the size of the file before memory is taken."""
    edit(store.folder, event_shape=[100_000_000])
    with pytest.raises(ValueError, match="does not match the manifest"):
        TrajectoryStore.open(store.folder).read([0])


def rewritten(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _shift(header):
    header["states"]["data_offsets"] = [v + 8 for v in header["states"]["data_offsets"]]


def _other_shape(header):
    header["states"]["shape"] = header["states"]["shape"][::-1]


def _other_type(header):
    header["states"]["dtype"] = "BF16"


def _negative(header):
    header["index"]["data_offsets"] = [-64, 0]


def _overlap(header):
    header["index"]["data_offsets"] = [8, 72]


def _more(header):
    header["more"] = header["index"]


def _no_metadata(header):
    del header["__metadata__"]


@pytest.mark.parametrize(
    "change", [_shift, _other_shape, _other_type, _negative, _overlap, _more, _no_metadata]
)
def test_hostile_headers_are_refused(store, change):
    rewritten(store.folder / "shard-00000.safetensors", change)
    assert 0 in verify(store.folder).damaged
    with pytest.raises(ValueError, match="shard"):
        TrajectoryStore.open(store.folder).read([0])
    assert len(store.read([8]).states) == 1


def test_headers_of_absurd_length_are_refused(store):
    path = store.folder / "shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match="not a safetensors file"):
        store.read([0])
    save_file({"states": torch.zeros(8, 5, 2)}, path)
    with pytest.raises(ValueError, match="bytes"):
        store.read([0])


def test_kept_times_decrease_in_every_store(tmp_path):
    for keep in ("all", 3, "log-rho:6"):
        store = fewstep.record(MODEL, tmp_path / str(keep), n=1, nfe=8, keep=keep)
        assert all(a > b for a, b in pairwise(store.times.tolist()))
        assert store.read([0]).states.shape[1] == len(store.times)


def test_a_flipped_bit_is_found_when_a_shard_is_first_read(store):
    path = store.folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = TrajectoryStore.open(store.folder)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged .*checksum"):
        again.read(range(len(again)))

"""Comparisons: the measures are correct, and nothing is run twice."""

from __future__ import annotations

import json

import pytest
import torch

import fewstep
from fewstep import metrics
from fewstep.base import sharing
from fewstep.base.files import read_tensors
from fewstep.base.locks import Lock
from fewstep.base.runs import locked
from fewstep.comparison import compare, read_entries, read_entry
from fewstep.comparison.entries import identity
from fewstep.comparison.scores import less_fid, less_rms, root
from fewstep.comparison.store import Store
from fewstep.comparison.verdicts import best_recipe, judge, measure_of, pareto
from fewstep.metrics import Reference
from fewstep.models.exact import smooth
from fewstep.sampling.auto import choose
from fewstep.sampling.sample import sampler
from stopping import Stopping

N, SEED, NFE = 24, 3, 12


class Counting(fewstep.Denoiser):
    """Counts the evaluations of an exact model, in samples."""

    def __init__(self, schedule="vp-linear"):
        super().__init__()
        self.inner = smooth(fewstep.schedule(schedule))
        self.schedule, self.native = self.inner.schedule, self.inner.native
        self.event_shape, self.seen = (2,), 0

    def raw(self, x, t, **cond):
        self.seen += len(x)
        return self.inner.raw(x, t, **cond)


@pytest.fixture
def model():
    return Counting()


@pytest.fixture(scope="module")
def data():
    points = smooth(fewstep.schedule("vp-linear")).draw(400, seed=5).float()
    return Reference.of(points[:200], points[200:], name="points")


def run(model, folder, samplers="tab1,ddim", nfe=(3, 5), **options):
    settings = {"n": N, "seed": SEED, "reference_nfe": NFE, "batch_size": 10}
    if options.get("data") is not None:
        settings["metrics"] = ["fid"]
    return compare(model, samplers, nfe=list(nfe), folder=folder, **{**settings, **options})


def scores(comparison):
    return {cell.key: dict(cell.scores) for cell in comparison.cells}


# How samplers are written


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("tab3", {"solver": "tab3"}),
        ("tab3@power:1.5", {"solver": "tab3", "grid": "power", "power": 1.5}),
        ("unipc3@karras:5", {"solver": "unipc3", "grid": "karras", "rho": 5.0}),
        ("ddim@log-rho+eta=0.5", {"solver": "ddim", "grid": "log-rho", "eta": 0.5}),
        ("tab2+t_start=0.8+t-end=0.01", {"solver": "tab2", "t_start": 0.8, "t_end": 0.01}),
        ("auto", {"solver": "auto"}),
    ],
)
def test_a_text_is_the_sampler_that_it_says(vp, text, arguments):
    model = smooth(vp)
    built = read_entry(text).build(model, 6)
    wanted = fewstep.plan(schedule=vp, nfe=6, **arguments)
    assert built.plan.to_json() == wanted.to_json()


def test_auto_on_a_grid_of_ones_own_keeps_the_solver(vp):
    built = read_entry("auto@karras").build(smooth(vp), 6)
    chosen = choose(vp, 6).solver
    assert built.plan.to_json() == fewstep.plan(chosen, vp, nfe=6, grid="karras").to_json()


def test_head_starts_go_to_the_recipe(vp):
    recipe = read_entry("tab2+head_start=0.7").recipe(smooth(vp), 4)
    assert (recipe.head_start, dict(recipe.options)) == (0.7, {})


def test_files_bring_their_own_budget(tmp_path, vp):
    plan = fewstep.plan("tab2", vp, nfe=4)
    plan.save(tmp_path / "mine.json")
    entry = read_entry(str(tmp_path / "mine.json"))
    assert (entry.name, entry.nfe) == ("mine", 4)
    assert entry.build(smooth(vp), 99).plan.to_json() == plan.to_json()


def test_a_folder_has_a_recipe_for_each_budget(tmp_path, vp):
    for nfe, name in ((4, "tab2"), (6, "ddim")):
        recipe = fewstep.SamplerRecipe(name=name, nfe=nfe)
        recipe.save(tmp_path / f"recipe-{nfe}.json")
    entry = read_entry(f"{tmp_path}/")
    model = smooth(vp)
    assert [entry.build(model, nfe).plan.name for nfe in (4, 6)] == ["tab2", "ddim"]
    assert (entry.name, entry.nfe) == (str(tmp_path), None)
    with pytest.raises(ValueError, match="has recipes for 4, 6 evaluations, not for 5"):
        entry.build(model, 5)


def test_fitted_grids_bring_their_solver(tmp_path, vp):
    from fewstep.sampling.profile import Profile, ProfileEntry

    times = (1.0, 0.8, 0.5, 0.2, 0.001)
    profile = Profile(vp, "", (ProfileEntry("tab2", times),), {4: "tab2"})
    profile.save(tmp_path / "grid.json")
    model = smooth(vp)
    for text in (f"auto@auto:{tmp_path}/grid.json", f"tab2@auto:{tmp_path}/grid.json"):
        plan = read_entry(text).build(model, 4).plan
        assert plan.name == "tab2"
        assert plan.knots.tolist() == pytest.approx(times)


def test_lists_are_split_outside_of_brackets_only():
    entries = read_entries("ddim, tab3@explicit+times=[1, 0.5,0.001] ,tab0")
    assert [entry.name for entry in entries] == [
        "ddim",
        "tab3@explicit+times=[1, 0.5,0.001]",
        "tab0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one sampler"),
        ("ddim,ddim", "'ddim' is named twice"),
        ("ddim+eta", r"\+KEY=VALUE"),
        ("ddim+eta=1+eta=2", "once each"),
        ("ddim@", r"NAME\[@GRID"),
        ("@karras", r"NAME\[@GRID"),
        ("tab3@power:x", "is a number, for example power:2"),
        ("none/there", "no file or operator"),
        ("none.json", "cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        read_entries(text)


def test_identities_differ_where_samplers_do(vp):
    model = smooth(vp)
    texts = ["ddim", "ddim@karras", "tab0", "ddim+eta=0.5", "tab3"]
    samplers = [read_entry(text).build(model, 5) for text in texts] + [
        sampler(model, solver="ddim")
    ]
    assert len({identity(one) for one in samplers}) == len(samplers)
    assert identity(samplers[0]) == identity(read_entry("ddim").build(model, 5))
    guided = fewstep.Denoiser.wrap(
        lambda x, t, c=0: x, schedule=vp, prediction="eps", null_condition={"c": 0}
    )
    strong, weak = (
        identity(read_entry("ddim").build(fewstep.Guided(guided, w), 5)) for w in (2.0, 3.0)
    )
    assert strong != weak


def test_the_identity_of_a_scheduler_is_its_configuration(vp):
    class Scheduled:
        denoiser, nfe, steps = smooth(vp), 5, 5

        def __init__(self, **config):
            self.scheduler = type("Scheduler", (), {"config": config})()

    identities = [
        identity(Scheduled(order=2, _use_default_values=["a", "b"])),
        identity(Scheduled(order=2, _use_default_values=["b", "a"])),
        identity(Scheduled(order=3, _use_default_values=["a", "b"])),
    ]
    assert identities[0] == identities[1] != identities[2]


# What is measured


def test_numbers_are_those_of_the_samples(tmp_path, model, data):
    result = run(model, tmp_path, data=data, metrics=["fid", "kid"])
    end = fewstep.sample(model, N, solver="auto", nfe=NFE, seed=SEED)
    zero = model(end, model.schedule.t_min, prediction="x0")
    for cell in result.cells:
        x = fewstep.sample(model, N, solver=cell.name, nfe=cell.nfe, seed=SEED)
        near = min((metrics.rms(x, e) for e in (end, zero)), key=float)
        score = cell.scores["rms"]
        assert score.value == pytest.approx(near.value, rel=1e-6)
        assert (score.low, score.high) == pytest.approx((near.low, near.high), rel=1e-6)
        for name, measure in (("fid", metrics.fid), ("kid", metrics.kid)):
            wanted = measure(x, data)
            got = cell.scores[name]
            assert (got.value, got.low) == pytest.approx((wanted.value, wanted.low), rel=1e-4)
    assert result.reference.scores["fid"].value == pytest.approx(
        metrics.fid(end, data).value, rel=1e-4
    )


def test_the_samples_are_read_again_from_the_folder_alone(tmp_path, model):
    result = run(model, tmp_path)
    read = Store(tmp_path)
    cells = {cell.key: cell for cell in read.all()}
    for cell in (result.reference, *result.cells):
        expected = result.store.tensors(cell)
        got = read.tensors(cells[cell.key])
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_sampler_that_ends_at_zero_is_compared_with_that_end(tmp_path, model):
    result = run(model, tmp_path, "tab2,tab2+to_zero=true", (60,), reference_nfe=90)
    assert [cell.end for cell in result.cells] == ["lowest level", "sigma = 0"]
    end = fewstep.sample(model, N, solver="auto", nfe=90, seed=SEED)
    x = fewstep.sample(model, N, solver="tab2", nfe=60, seed=SEED, options={"to_zero": True})
    assert result.cells[1].scores["rms"].value < 0.5 * metrics.rms(x, end).value


def test_who_else_takes_part_changes_nothing(tmp_path, model):
    one = run(model, tmp_path / "a", "ddim", (3,))
    two = run(model, tmp_path / "b", "tab3,ddim", (3, 5), batch_size=24)
    assert one.cells[0].scores["rms"].value == pytest.approx(
        scores(two)["ddim", 3]["rms"].value, rel=1e-5
    )


def test_randomness_is_noticed_and_guidance_counted_twice(tmp_path, vp):
    seen = []

    def network(x, t, label):
        seen.append(label.tolist())
        return 0.5 * x + 0.1 * label[:, None]

    guided = fewstep.Denoiser.wrap(
        network,
        schedule=vp,
        prediction="eps",
        event_shape=(2,),
        null_condition={"label": 0},
    )
    labels = [1, 2, 3, 4, 5]
    result = run(
        guided,
        tmp_path,
        "ddim,ddim+eta=1.0",
        (3,),
        n=5,
        batch_size=2,
        guidance=2.0,
        cond={"label": labels},
    )
    assert [cell.stochastic for cell in result.cells] == [False, True]
    assert [cell.passes for cell in result.cells] == [6, 6]
    assert {tuple(part) for part in seen} == {(1, 2, 0, 0), (3, 4, 0, 0), (5, 0)}


def test_prepared_samplers_take_part(tmp_path, model):
    samplers = {"mine": lambda d, nfe: sampler(d, solver="tab2", nfe=nfe)}
    actual = run(model, tmp_path, samplers, (4,))
    other = run(model, tmp_path / "b", "tab2", (4,))
    assert actual.cells[0].name == "mine"
    assert actual.cells[0].scores == other.cells[0].scores


def test_an_operator_takes_part_with_one_evaluation(tmp_path):
    from fewstep.operators import Layout, TrajectoryOperator, write_operator
    from tiny_trajectories import teacher

    model = teacher()
    operator = TrajectoryOperator(model, Layout(times=(0.5, 0.001), start=0.9946))
    write_operator(tmp_path / "student", operator)
    labels = [0, 1, 2, 0]
    result = run(
        model,
        tmp_path / "out",
        f"ddim,{tmp_path / 'student'}",
        (2,),
        n=4,
        batch_size=3,
        cond={"class_labels": labels},
    )
    assert [cell.key for cell in result.cells] == [("ddim", 2), ("student", 1)]
    student = fewstep.load(tmp_path / "student")
    x = fewstep.sample(student, 4, seed=SEED, class_labels=labels)
    shown = result.store.tensors(result.cells[1])["shown"]
    torch.testing.assert_close(shown, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this model is an operator"):
        run(student, tmp_path / "x")


# What is not run


def test_everything_wrong_is_said_before_the_first_call(tmp_path, model):
    for options, message in (
        ({"samplers": "ddim,tab9"}, "tab9: Unknown solver 'tab9'"),
        ({"samplers": "heun", "nfe": (4,)}, "heun: .*nearest budgets are 3 or 5"),
        ({"n": 1}, "at least 2"),
        ({"nfe": ()}, "at least one budget"),
        ({"nfe": (0,)}, "nfe must be a positive integer, got 0"),
        ({"metrics": ["fidd"]}, "Did you mean 'fid'"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"reference": "heun"}, "the reference 'heun': "),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run(model, tmp_path / "x", **options)
    with pytest.raises(TypeError, match="eat"):
        run(model, tmp_path / "x", "ddim+eat=1")
    assert model.seen == 0
    assert not (tmp_path / "x").exists()


def test_budgets_that_cannot_be_met_are_left_out_and_named(tmp_path, model):
    result = run(model, tmp_path, "ddim,heun", (3, 4))
    assert [cell.key for cell in result.cells] == [("ddim", 3), ("ddim", 4), ("heun", 3)]
    ((name, nfe, reason),) = result.refused
    assert (name, nfe) == ("heun", 4)
    assert "3 or 5" in reason


@pytest.mark.parametrize("after", [1, 20, 3 * NFE + 1, 3 * NFE + 8, 3 * (NFE + 3) + 4])
def test_an_interrupted_run_goes_on_batch_by_batch(tmp_path, data, after):
    whole = run(Counting(), tmp_path / "whole", data=data)
    model = Counting()
    with pytest.raises(KeyboardInterrupt):
        run(
            model,
            tmp_path / "cut",
            data=data,
            progress=Stopping(after + 1, error=KeyboardInterrupt),
        )
    result = run(model, tmp_path / "cut", data=data)
    assert scores(result) == scores(whole)
    assert result.reference.scores == whole.reference.scores
    # Each batch once, but for the one that was cut (at most 10 samples and the evaluations of a run).
    once = N * (NFE + 1 + 2 * (3 + 5))
    assert once < model.seen <= once + 10 * NFE
    assert not list((tmp_path / "cut" / "cells").glob("ddim*.parts"))


def test_what_is_there_is_not_run_again(tmp_path, data):
    model = Counting()
    first = run(model, tmp_path, data=data)
    before, progress_seen = model.seen, Stopping()
    second = run(model, tmp_path, "ddim,tab2,tab1", (3, 5), data=data, progress=progress_seen)
    assert model.seen - before == N * (3 + 5)  # tab2 alone
    assert "ddim, 3: stored" in progress_seen.notes
    assert "tab2, 3" in progress_seen.notes
    both = scores(second)
    assert {key: both[key] for key in scores(first)} == scores(first)
    third = run(model, tmp_path, "tab2", (5,), data=data, metrics=["fid", "kid"])
    assert model.seen - before == N * (3 + 5)  # a metric more needs the features only
    assert {"fid", "kid", "rms"} == set(third.cells[0].scores)


def test_a_sampler_of_the_same_name_that_does_something_else_is_run_again(tmp_path, vp):
    model = Counting()
    file = tmp_path / "mine.json"
    fewstep.plan("tab1", vp, nfe=4).save(file)
    one = run(model, tmp_path / "out", str(file))
    fewstep.plan("tab2", vp, nfe=4).save(file)
    two = run(model, tmp_path / "out", str(file))
    assert one.cells[0].scores != two.cells[0].scores
    assert two.cells[0].scores == run(model, tmp_path / "b", "tab2", (4,)).cells[0].scores


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": 20}, "n 24, now 20"),
        ({"seed": 9}, "seed 3, now 9"),
        ({"batch_size": 8}, "batch size 10, now 8"),
    ],
)
def test_another_question_is_refused(tmp_path, model, change, word):
    run(model, tmp_path)
    with pytest.raises(ValueError, match=f"other settings .*{word}"):
        run(model, tmp_path, **change)
    assert run(model, tmp_path, **change, overwrite=True).question != {}
    assert json.loads((tmp_path / "comparison.json").read_text())["question"]["n"] == change.get(
        "n", N
    )


def test_another_model_or_other_data_are_refused(tmp_path, model, data):
    run(model, tmp_path, data=data)
    with pytest.raises(ValueError, match=r"other settings \(another model"):
        run(Counting("ddpm-linear"), tmp_path, data=data)
    with pytest.raises(ValueError, match=r"other settings \((another )?data"):
        run(model, tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path, model):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        run(model, tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damaged_cells_are_run_again(tmp_path, model, suffix):
    first = run(model, tmp_path)
    (file,) = (tmp_path / "cells").glob(f"ddim-3-*{suffix}")
    if suffix == ".json":
        file.write_text('{"sampler": "ddim"')
    else:
        file.unlink()
    before = model.seen
    assert scores(run(model, tmp_path)) == scores(first)
    assert model.seen - before == N * 3


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_cell_is_run_again(tmp_path, model, suffix):
    first = run(model, tmp_path)
    file = next((tmp_path / "cells").glob(f"ddim*.{suffix}"))
    content = bytearray(file.read_bytes())
    for damaged in (content[:-7], content[:60] + bytes([content[60] ^ 1]) + content[61:]):
        file.write_bytes(damaged)
        (file.parent / f".{file.name}.0123456789abcdef.tmp").write_bytes(b"litter")
        assert scores(run(model, tmp_path)) == scores(first)
        assert file.read_bytes() == content or suffix == "json"
        assert not list(tmp_path.rglob("*.tmp"))


def test_two_comparisons_do_not_write_one_folder(tmp_path, model):
    with locked(tmp_path), pytest.raises(ValueError, match="is being written by another run"):
        run(model, tmp_path)


def test_a_damaged_batch_of_the_reference_is_drawn_again(tmp_path, model):
    first = run(model, tmp_path)
    file = sorted((tmp_path / "cells").glob("reference*.parts/*"))[1]
    file.write_bytes(file.read_bytes()[:-7])
    before = model.seen
    assert scores(run(model, tmp_path)) == scores(first)
    assert model.seen - before == 10 * (NFE + 1)


# What is said


def test_differences_in_pairs_are_narrower_and_exact():
    generator = torch.Generator().manual_seed(0)
    common = torch.rand(500, generator=generator, dtype=torch.float64) + 0.5
    a, b = common * 4.1, common * 4.0
    more = less_rms(a, b)
    assert more.value == pytest.approx(root(a).value - root(b).value)
    assert more.low > 0
    assert more.high - more.low < 0.1 * (root(a).high - root(a).low)
    back = less_rms(b, a)
    assert (back.value, back.high) == pytest.approx((-more.value, -more.low))
    same = less_rms(a, a)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_difference_of_two_fids_is_their_difference(data):
    generator = torch.Generator().manual_seed(0)
    b = data.features[:60]
    others = [b + size * torch.randn(60, 2, generator=generator) for size in (0.3, 0.0)]
    far, same = less_fid(others, b, data)
    values = [metrics.fid(x, data).value for x in (others[0], b)]
    assert far.value == pytest.approx(values[0] - values[1], rel=1e-6)
    assert far.low < far.value < far.high
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_of_a_difference_of_fids_is_the_jackknifes(data):
    """Left out by hand: every sample is a block of its own if there are as many blocks."""
    a, b = data.features[:12] * 1.5, data.features[:12]
    (more,) = less_fid([a], b, data)
    gaps = []
    for i in range(12):
        stored = [k for k in range(12) if k != i]
        gaps.append(metrics.fid(a[stored], data).value - metrics.fid(b[stored], data).value)
    spread = torch.tensor(gaps, dtype=torch.float64)
    width = (11 / 12 * (spread - spread.mean()).square().sum()).sqrt()
    assert more.high - more.value == pytest.approx(2.201 * float(width), rel=1e-3)  # t, 11 degrees


def test_intervals_of_a_difference_cover():
    """Of two samplers with the same true distance, 95 % of the intervals hold zero."""
    generator = torch.Generator().manual_seed(1)
    trials, held = 300, 0
    for _ in range(trials):
        common = torch.randn(64, generator=generator, dtype=torch.float64)
        own = torch.randn(2, 64, generator=generator, dtype=torch.float64)
        a, b = (common + own).square()
        more = less_rms(a, b)
        held += more.low <= 0 <= more.high
    assert 0.90 < held / trials < 0.99  # standard error 0.013


def test_verdicts_order_and_tell_ties(tmp_path, model):
    same = {
        "b": lambda d, nfe: sampler(d, solver="tab2", nfe=nfe),
        "a": lambda d, nfe: sampler(d, solver="tab2", nfe=nfe),
        "c": lambda d, nfe: sampler(d, solver="ddpm", nfe=nfe),
    }
    result = run(model, tmp_path, same, (6, 8))
    assert measure_of(result) == "rms"
    first, second = judge(result)
    assert (first.nfe, second.nfe) == (6, 8)
    assert [cell.name for cell in first.order] == ["b", "a", "c"]
    assert [cell.name for cell in first.ties] == ["a"]
    assert first.sentence() == "a tie with `a`"
    assert first.behind[2].low > 0
    wanted = first.order[2].scores["rms"].value - first.best.scores["rms"].value
    assert first.behind[2].value == pytest.approx(wanted)
    clear = judge(run(model, tmp_path / "b", {k: same[k] for k in "bc"}, (6,)))[0]
    assert clear.sentence().startswith("clearly: `c` is behind by ")
    alone = judge(run(model, tmp_path / "c", "tab2", (6,)))[0]
    assert alone.sentence() == "no other sampler ran at this budget"


def test_of_many_samplers_only_the_best_have_a_colour(tmp_path, model):
    pytest.importorskip("matplotlib")
    from fewstep.comparison.drawing import MOST_LINES, against_nfe, styles
    from fewstep.reporting.figures import svg

    good = [f"tab3+t_end={0.001 * (1 + i / 10):g}" for i in range(MOST_LINES)]
    result = run(model, tmp_path, ["ddpm", *good, "euler-maruyama"], (5, 6))
    looks = styles(result, "rms")
    assert sorted(name for name, style in looks.items() if style is None) == [
        "ddpm",
        "euler-maruyama",
    ]
    assert sorted(looks[name] for name in good) == list(range(MOST_LINES))
    text = svg(against_nfe(result, "rms"), alt="x", prefix="p")
    assert all(f">{name}<" in text for name in good)
    assert ">ddpm<" not in text


def test_the_front_has_what_nothing_beats(tmp_path, model):
    from dataclasses import replace

    result = run(model, tmp_path, "ddim,tab1", (3, 5))
    marks = [(1.0, 4.0), (2.0, 5.0), (3.0, 1.0), (3.0, 2.0)]
    cells = [
        replace(
            cell,
            seconds=(time, time, time),
            scores={"rms": replace(cell.scores["rms"], value=value)},
        )
        for cell, (time, value) in zip(result.cells, marks, strict=True)
    ]
    front = pareto(replace(result, cells=cells), "rms")
    assert [(cell.seconds[0], cell.scores["rms"].value) for cell in front] == [
        (1.0, 4.0),
        (3.0, 1.0),
    ]


def test_the_recipe_of_the_best_makes_its_samples(tmp_path, model):
    result = run(model, tmp_path, "auto,ddim", (5,))
    (verdict,) = judge(result)
    cell, recipe = best_recipe(result, verdict)
    recipe.save(tmp_path / "best.json")
    x = fewstep.sample(model, N, recipe=tmp_path / "best.json", seed=SEED)
    shown = result.store.tensors(cell)["shown"]
    assert torch.equal(x, shown)
    assert recipe.about["compared"] == cell.name == "auto"
    assert recipe.about["rms"][0] == cell.scores["rms"].value


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_scheduler_of_diffusers_becomes_a_recipe_if_it_wins(tmp_path):
    pytest.importorskip("diffusers")
    tabulated = Counting("ddpm-linear")
    result = run(tabulated, tmp_path, "diffusers:DPMSolverMultistep,ddpm", (8,))
    (verdict,) = judge(result)
    assert verdict.best.name == "diffusers:DPMSolverMultistep"
    cell, recipe = best_recipe(result, verdict)
    x = fewstep.sample(tabulated, N, recipe=recipe, seed=SEED)
    assert float((x - result.store.tensors(cell)["shown"]).abs().max()) < 1e-3
    continuous = run(Counting(), tmp_path / "b", "diffusers:DPMSolverMultistep,ddpm", (8,))
    cell, recipe = best_recipe(continuous, judge(continuous)[0])
    assert cell.name == "ddpm"  # the scheduler has no plan on a continuous schedule


# Several processes


def as_rank(monkeypatch, rank, count=3):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def tensors_of(folder):
    """All stored batches of the reference, and all tensors of cells, as bytes."""
    return {p.relative_to(folder): read_tensors(p) for p in folder.rglob("*.safetensors")}


def without_seconds(stored):
    return {
        path: {name: value for name, value in tensors.items() if name != "seconds"}
        for path, tensors in stored.items()
    }


def test_a_rank_alone_does_all_and_a_late_one_finds_it_done(tmp_path, data, monkeypatch):
    """Nobody waits for a rank that never came; the numbers are those of one process."""
    alone = run(Counting(), tmp_path / "one", data=data)
    model = Counting()
    as_rank(monkeypatch, 1)
    shared = run(model, tmp_path / "two", data=data)
    assert scores(shared) == scores(alone)
    one, two = (without_seconds(tensors_of(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for path, tensors in one.items():
        assert all(torch.equal(value, two[path][name]) for name, value in tensors.items())
    seen = model.seen
    as_rank(monkeypatch, 0)
    assert scores(run(model, tmp_path / "two", data=data)) == scores(alone)
    assert model.seen == seen


def test_what_other_ranks_hold_is_left_to_them(tmp_path, monkeypatch):
    """A rank computes what nobody has, and takes over the batch of one that was lost."""
    whole = run(Counting(), tmp_path / "one")
    monkeypatch.setattr(sharing, "POLL", 0.0)
    as_rank(monkeypatch, 0)
    state = tmp_path / "one" / "comparison.json"
    cell = next((tmp_path / "one" / "cells").glob("ddim-3-*.json"))
    held = Lock(
        cell.with_suffix(".parts") / f"{whole.cells[2].identity[:12]}-000000010.safetensors.claim"
    )
    assert whole.cells[2].key == ("ddim", 3)
    cell.unlink()
    held.take()
    passes = iter([None] * 3)

    def abandoned(lock):
        return lock.path == held.path and next(passes, True) is True

    monkeypatch.setattr(Lock, "is_abandoned", abandoned)
    model = Counting()
    assert scores(run(model, tmp_path / "one")) == scores(whole)
    assert model.seen == 3 * N
    assert state.exists()
    assert not list((tmp_path / "one").rglob("*.claim"))


def test_ranks_do_not_overwrite(tmp_path, model, monkeypatch):
    as_rank(monkeypatch, 1)
    with pytest.raises(ValueError, match="remove the folder first"):
        run(model, tmp_path, overwrite=True)
    assert not model.seen


def test_a_run_by_itself_keeps_out_of_a_launch(tmp_path, model):
    run(model, tmp_path)
    part = next((tmp_path / "cells").glob("reference*.parts/*"))
    assert Lock(part.with_name(f"{part.name}.claim")).take()
    with pytest.raises(ValueError, match="another run"):
        run(model, tmp_path)


def test_claims_of_killed_processes_are_swept(tmp_path):
    from fewstep.base.sharing import CLAIM, sweep_claims

    dead, foreign = (tmp_path / f"{name}{CLAIM}" for name in ("dead", "foreign"))
    for path, host in ((dead, None), (foreign, "elsewhere")):
        assert Lock(path).take()
        owner = json.loads(path.read_text())
        path.write_text(json.dumps(owner | {"pid": 2**22 + 1, "host": host or owner["host"]}))
    sweep_claims(tmp_path)
    assert [path.exists() for path in (dead, foreign)] == [False, True]

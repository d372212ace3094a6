"""tune from outside: the recipe and where it runs, resuming, conditions, the command line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fewstep
from fewstep.base.files import read_json, read_metadata
from fewstep.base.runs import locked
from fewstep.cli import run
from fewstep.learned import problem
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.real_data import real_data
from fewstep.learned.search import Searcher
from fewstep.learned.search_state import STATE
from fewstep.learned.teachers import Source
from fewstep.learned.verdict import DISTANCE, SELECTED, TRAINED, UNSEEN, Score
from fewstep.metrics import Features, Reference
from fewstep.metrics.intervals import Estimate
from fewstep.models import exact
from fewstep.sampling.recipe import SamplerRecipe
from next_lines import carry_out, proposed
from stopping import Stopped, Stopping
from tiny_searches import RING

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn", "few_real_samples")]

TINY = {
    "steps": 6, "pairs": 24, "heldout": 30, "test": 40, "teacher_nfe": 8, "batch_size": 8,
    "evaluate_every": 3, "real_batch": 50,
}  # fmt: skip

DATA = RING.draw(400)


@pytest.fixture(scope="module")
def made():
    search = {**TINY, "steps": 30, "test": 400}
    return fewstep.tune(RING, nfe=3, objective="endpoint", data=DATA, search=search, seed=3)


def test_the_recipe_says_everything(made):
    about = made.recipe.about
    assert made.improved
    assert made.recipe.kind == "plan"
    assert made.recipe.model == about["model"] == RING.fingerprint()
    assert (about["family"], about["objective"], about["nfe"]) == ("gs", "endpoint", 3)
    assert about["base"]["solver"] == "unipc2"
    assert len(set(about["seeds"].values())) == 3
    for when in ("before", "after"):
        for result in about["scores"][when].values():
            assert result["low"] <= result["value"] <= result["high"]
    better = [
        about["scores"][w]["rms to the teacher (trained on)"]["value"] for w in ("before", "after")
    ]
    assert better[1] < better[0]
    assert set(about["versions"]) == {"fewstep", "torch"}
    assert made.recipe.schedule == RING.schedule.to_record()
    assert len(made.recipe.to_json()) < 20_000


def test_the_recipe_comes_back_to_the_last_bit(made, tmp_path):
    again = SamplerRecipe.load(made.save(tmp_path / "tuned.json"))
    assert again.to_json() == made.recipe.to_json()
    assert torch.equal(again.plan.values, made.plan.values)
    assert torch.equal(again.plan.times, made.plan.times)
    x = fewstep.sample(RING, 5, recipe=made.recipe, seed=1)
    assert torch.equal(fewstep.sample(RING, 5, recipe=tmp_path / "tuned.json", seed=1), x)
    assert torch.equal(fewstep.sample(RING, 5, plan=made.plan, seed=1), x)
    assert [s.index for s in fewstep.steps(RING, 5, recipe=again, seed=1)] == [0, 1, 2]


def test_another_model_or_schedule_is_refused_unless_forced(made):
    other = exact.sharp(RING.schedule)
    with pytest.raises(ValueError, match="another model"):
        fewstep.sample(other, 3, recipe=made.recipe)
    forced = fewstep.sample(other, 3, recipe=made.recipe, force=True)
    assert torch.equal(forced, fewstep.sample(other, 3, plan=made.plan))
    cosine = exact.GaussianMixture(
        RING.means, RING.stds, RING.weights, fewstep.schedule("vp-linear", beta_max=15.0)
    )
    nobody = SamplerRecipe.from_json(made.recipe.to_json().replace('"model"', '"model"'))
    with pytest.raises(ValueError, match="another model"):
        nobody.build(cosine)
    free = SamplerRecipe(kind="plan", plan=made.plan, schedule=made.recipe.schedule)
    with pytest.raises(ValueError, match="made for the schedule"):
        free.build(cosine)
    assert made.recipe.build(cosine, force=True).plan.schedule == cosine.schedule
    levels = exact.smooth(fewstep.schedule("ve"))
    ddpm = fewstep.plan("ddim", fewstep.schedule("ddpm-linear"), nfe=3)
    with pytest.raises(ValueError, match="cannot be forced"):
        SamplerRecipe(kind="plan", plan=ddpm).build(levels, force=True)


def test_interrupted_runs_end_as_whole_ones(tmp_path):
    """Stopped after a checkpoint in each of both stages, and once among the pairs."""
    arguments = {
        "nfe": 3, "objective": "endpoint,mmd", "data": RING.draw(200), "seed": 5,
        "search": {**TINY, "radius": 0.05},
    }  # fmt: skip
    whole = fewstep.tune(RING, **arguments)

    def tune(stop: tuple[str, int] | None):
        progress = None if stop is None else Stopping(stop[1], stage=stop[0])
        return fewstep.tune(RING, **arguments, out=tmp_path / "a.json", progress=progress)

    one, two = "search 1 of 2", "search 2 of 2"
    for stop in (("teacher", 24 * 8), (one, 4), (two, 3), (two, 6)):
        with pytest.raises(Stopped):
            tune(stop)
        assert not (tmp_path / "a.json").exists()
    resumed = tune(None)
    assert resumed.recipe.to_json() == whole.recipe.to_json()
    assert resumed.history == whole.history
    assert SamplerRecipe.load(tmp_path / "a.json").to_json() == whole.recipe.to_json()
    with pytest.raises(ValueError, match="exists"):
        tune(None)


def step_of(file):
    return json.loads(read_metadata(file)["state"])["step"]


def test_an_interrupted_search_has_its_last_step(tmp_path):
    """Between two judgements, and in one."""
    arguments = {"nfe": 3, "objective": "endpoint", "seed": 5, "search": TINY}
    whole = fewstep.tune(RING, **arguments)

    out, steps = tmp_path / "a.json", []
    with pytest.raises(KeyboardInterrupt):
        fewstep.tune(
            RING,
            **arguments,
            out=out,
            progress=Stopping(1, stage="search", error=KeyboardInterrupt),
        )
    steps.append(step_of(tmp_path / "a.search" / STATE))

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Searcher, "_consider", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fewstep.tune(RING, **arguments, out=out)
    steps.append(step_of(tmp_path / "a.search" / STATE))
    assert steps == [1, TINY["evaluate_every"]]
    resumed = fewstep.tune(RING, **arguments, out=out, keep_worse=True)
    assert resumed.recipe.to_json() == whole.recipe.to_json()
    assert resumed.history == whole.history


def test_a_search_knows_its_features_and_its_start(tmp_path):
    """By their content, not by their names."""

    def search(scale, **options):
        features = Features(torch.nn.Flatten(), name="mine", sha256=scale * 64)
        return fewstep.tune(
            RING, nfe=2, objective="mmd", data=DATA, search=TINY, out=tmp_path / "a.json",
            features=features, **options,
        )  # fmt: skip

    search("1", keep_worse=True)
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match=r"another search \(another features\)"):
        search("2")
    with pytest.raises(ValueError, match=r"another search \(another base\)"):
        search("1", solver="tab3", options={"lower_final": True})


@pytest.mark.parametrize("name", ["reward", "distance", "kernel", "features"])
def test_a_search_knows_callables_by_what_they_do(name, monkeypatch):
    """Two functions without names of their own are not the same search."""

    def inputs(scale):
        kinds = {
            "reward": ("reward", lambda x: -scale * x.square().sum(1)),
            "distance": ("endpoint", lambda a, b: scale * (a - b).square().sum(1)),
            "kernel": ("mmd", lambda a, b: (scale * a @ b.T + 1) ** 2),
            "features": ("perceptual", lambda x: scale * x),
        }
        objective, given = kinds[name]
        own = {"features": given} if name == "features" else {"search": {**TINY, name: given}}
        kept = []
        search = {"search": TINY} | own

        def keep(problem, folder, progress):
            kept.append(problem.inputs())
            raise KeyboardInterrupt

        monkeypatch.setattr(problem.Problem, "solve", keep)
        model, data = exact.smooth(RING.schedule), DATA if name == "kernel" else None
        with pytest.raises(KeyboardInterrupt):
            fewstep.tune(model, nfe=2, objective=objective, data=data, **search)
        return kept[0]

    assert inputs(1.0) == inputs(1.0)
    one, two = inputs(1.0), inputs(2.0)
    assert {key for key in one if one[key] != two[key]} == {name}


def test_checkpoints_of_another_search_are_refused(tmp_path):
    arguments = {"nfe": 2, "objective": "endpoint", "data": DATA, "out": tmp_path / "a.json"}
    fewstep.tune(RING, **arguments, search=TINY)
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="another search"):
        fewstep.tune(RING, **arguments, search=TINY, seed=1)
    again = fewstep.tune(RING, **arguments, search=TINY, seed=1, overwrite=True)
    assert again.recipe.about["seed"] == 1
    state = tmp_path / "a.search" / STATE
    state.write_bytes(state.read_bytes()[:100])
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        fewstep.tune(RING, **arguments, search=TINY, seed=1)


def test_damaged_pairs_are_sampled_again_and_two_searches_do_not_share_a_file(tmp_path):
    arguments = {"nfe": 2, "objective": "endpoint", "out": tmp_path / "a.json", "search": TINY}
    whole = fewstep.tune(RING, **arguments)
    (tmp_path / "a.json").unlink()
    folder = tmp_path / "a.search"
    (folder / STATE).unlink()
    path = folder / "teacher-train.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    (folder / ".x.json.0123456789abcdef.tmp").write_text("")
    with locked(folder), pytest.raises(ValueError, match="is being written by another run"):
        fewstep.tune(RING, **arguments, overwrite=True)
    assert fewstep.tune(RING, **arguments).recipe.to_json() == whole.recipe.to_json()
    assert path.read_bytes() == content
    assert not list(folder.glob(".*"))


def test_wrong_arguments_are_refused_before_any_evaluation():
    def network(x, t):
        raise AssertionError("a network evaluation")

    levels = fewstep.schedule("ddpm-linear")
    model = fewstep.Denoiser.wrap(
        network, schedule=levels, prediction="eps", event_shape=(1, 4, 4)
    )
    whole = fewstep.Denoiser.wrap(
        network, schedule=levels, prediction="eps", event_shape=(2,), integer_times=True
    )
    unknown = fewstep.Denoiser.wrap(network, schedule=levels, prediction="eps")
    for message, denoiser, arguments in (
        ("a Denoiser is needed", network, {}),
        ("Unknown family 'gss'", model, {"family": "gss"}),
        ("an objective is one of", model, {"objective": "fid"}),
        ("give data=", model, {"objective": "mmd"}),
        ("common times", model, {"objective": "trajectory"}),
        ("nfe must be", model, {"nfe": 0}),
        ("nfe must be", model, {"nfe": 0, "family": "ggdm"}),
        ("no setting", model, {"search": {"lr": 1}}),
        ("seed must be", model, {"seed": "1"}),
        ("null condition", model, {"guidance": 2.0}),
        ("takes no condition", model, {"class_labels": [1]}),
        ("shape of a sample", unknown, {}),
        ("integer timesteps", whole, {}),
        ("data must have shape", model, {"data": torch.zeros(50, 3)}),
        ("there is no folder or file", model, {"data": "nowhere"}),
        ("moves the noises", model, {"objective": "mmd", "data": torch.rand(50, 1, 4, 4),
                                     "search": {"radius": 1.0}}),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            fewstep.tune(denoiser, **{"nfe": 3, **arguments})


def test_data_of_another_range_are_refused():
    """Images are read in [-1, 1]; a tensor is in the model's range, and so is taken."""
    model = fewstep.Denoiser.wrap(
        lambda x, t: x, schedule=fewstep.schedule("ddpm-linear"), prediction="eps",
        event_shape=(1, 28, 28),
    )  # fmt: skip
    model.data_range = (0.0, 1.0)
    for denoiser in (model, fewstep.Clipped(model)):
        for data in ("fashion", Reference.load("fashion", "fashion")):
            with pytest.raises(ValueError, match="data range from 0 to 1"):
                fewstep.tune(denoiser, nfe=2, objective="mmd", data=data, search=TINY)


class Labelled(nn.Module):
    """Two Gaussians by class, and both without one; records the classes of its evaluations."""

    num_classes = 2

    def __init__(self, schedule):
        super().__init__()
        self.means = nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.2]]))
        self.schedule, self.labels_seen = schedule, []

    def forward(self, x, t, class_labels=None):
        labels = torch.full((len(x),), 2) if class_labels is None else class_labels
        self.labels_seen += labels.tolist()
        alpha, sigma = (
            f(t.double()).float()[:, None] for f in (self.schedule.alpha, self.schedule.sigma)
        )
        spread = alpha.square() * 0.1 + sigma.square()
        return sigma * (x - alpha * self.means[labels]) / spread


@pytest.fixture
def labelled():
    schedule = fewstep.schedule("ddpm-linear")
    return fewstep.Denoiser.wrap(
        Labelled(schedule),
        schedule=schedule,
        prediction="eps",
        event_shape=(2,),
        null_condition={"class_labels": 2},
    )


def test_classes_and_guidance_belong_to_the_search(labelled):
    tuned = fewstep.tune(labelled, nfe=2, objective="endpoint", search=TINY, guidance=1.5)
    assert set(labelled.network.labels_seen) == {0, 1, 2}  # both classes, and none for guidance
    assert tuned.recipe.guidance == 1.5
    assert tuned.recipe.about["conditions"] == {"class_labels": [0, 1]}
    labels = torch.tensor([0, 1, 1])
    got = fewstep.sample(labelled, 3, recipe=tuned.recipe, class_labels=labels)
    wanted = fewstep.sample(labelled, 3, plan=tuned.plan, guidance=1.5, class_labels=labels)
    assert torch.equal(got, wanted)
    data = torch.randn((60, 2), generator=torch.Generator().manual_seed(0))
    for objective in ("mmd", "mmd+0.2*endpoint"):
        labelled.network.labels_seen.clear()
        fewstep.tune(labelled, nfe=2, objective=objective, data=data, search=TINY)
        assert set(labelled.network.labels_seen) == {0, 1}
    labelled.network.labels_seen.clear()
    fewstep.tune(labelled, nfe=2, objective="endpoint", search=TINY, class_labels=[1])
    assert set(labelled.network.labels_seen) == {1}


def test_networks_of_whole_times():
    """They are evaluated at integer timesteps alone, by the teacher too."""
    times_seen = []
    levels = fewstep.schedule("ddpm-linear")

    def network(x, t):
        times_seen.append(t)
        return x * torch.sigmoid(t.double() / 500 - 1)[:, None].to(x)

    model = fewstep.Denoiser.wrap(
        network, schedule=levels, prediction="eps", event_shape=(2,), integer_times=True
    )
    arguments = {"nfe": 3, "family": "gs", "family_options": {"times": False, "shifts": False}}
    for objective in ("endpoint", "trajectory"):
        tuned = fewstep.tune(model, **arguments, objective=objective, search=TINY)
        assert torch.equal(tuned.plan.times, tuned.plan.times.round())
    assert all(t.dtype == torch.int64 for t in times_seen)


def test_one_evaluation():
    tuned = fewstep.tune(RING, nfe=1, objective="endpoint", data=DATA, search=TINY)
    assert tuned.plan.nfe == 1
    assert tuned.verdict.state != "worse"


def test_the_held_out_samples_are_those_that_users_draw(labelled):
    source = Source.of(labelled, fewstep.plan("ddim", labelled.schedule, nfe=3),
                       ConditionPool.of(labelled, {}))  # fmt: skip
    x, _ = source.sampled(source.plan, 8, 5, batch_size=2)
    labels = torch.arange(5) % 2
    wanted = fewstep.sample(labelled, 5, plan=source.plan, seed=8, class_labels=labels)
    assert torch.equal(x, wanted)


def test_real_data_in_memory_and_as_a_reference():
    data = RING.draw(300)
    for given in (data, Reference.of(data[:150], data[150:])):
        tuned = fewstep.tune(RING, nfe=2, objective="mmd", data=given, search=TINY)
        assert "FID (pixels, trained on)" in tuned.scores["before"]
        assert tuned.recipe.about["data"]["features"] == "pixels"
    named = fewstep.tune(RING, nfe=2, search=TINY)
    assert named.recipe.about["objective"] == "endpoint,mmd"  # exact models bring their data


def test_images_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(0, 256, (6, 6), generator=generator, dtype=torch.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    levels = fewstep.schedule("ddpm-linear")

    def network(x, t):
        return x * torch.sigmoid(t / 1000)[:, None, None, None]

    model = fewstep.Denoiser.wrap(
        network, schedule=levels, prediction="eps", event_shape=(1, 6, 6)
    )
    tuned = fewstep.tune(
        model, nfe=2, family="ggdm+pred", objective="mmd", data=tmp_path / "images",
        search={**TINY, "microbatch": 3},
    )  # fmt: skip
    assert "MMD2 (random-1, trained on)" in tuned.scores["after"]
    assert "MMD2 (random-2, unseen)" in tuned.scores["after"]
    assert tuned.plan.nfe == 2


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.parametrize("family", ["gs", "ggdm+pred"])
def test_a_tuned_sampler_runs_as_a_scheduler_of_diffusers(tmp_path, family):
    pytest.importorskip("diffusers")
    from fewstep.adapters.diffusers import PlanScheduler

    model = exact.smooth(fewstep.schedule("ddpm-linear"))
    tuned = fewstep.tune(
        model, nfe=3, family=family, objective="endpoint", search={**TINY, "steps": 20},
        data=model.draw(100),
        family_options={} if family == "gs" else {"noise": False},
    )  # fmt: skip
    assert tuned.verdict.state != "start"
    scheduler = PlanScheduler(recipe=str(tuned.save(tmp_path / "tuned.json")))
    scheduler.set_timesteps(3)
    noise = torch.randn((4, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(state, t)
        state = scheduler.step(model(given, t.double()), t, state).prev_sample
    wanted = fewstep.sample(model, plan=tuned.plan, noise=noise)
    # diffusers keeps timesteps in float32: 3e-5 of a level.
    torch.testing.assert_close(state, wanted, rtol=0, atol=1e-4)


def test_features_that_were_trained_on_or_selected_with_are_not_unseen():
    """Without data the distance to the teacher in the features of the loss; with data those that choose the share."""
    network = nn.Conv2d(1, 1, 3, padding=1)
    model = fewstep.Denoiser.wrap(
        lambda x, t: network(x), schedule=fewstep.schedule("vp-linear"), prediction="v", event_shape=(1, 8, 8)
    )  # fmt: skip
    data = torch.randn((80, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    search = {**TINY, "steps": 1}

    def roles(**options):
        scores = fewstep.tune(model, nfe=2, search=search, **options).scores["after"]
        return {
            name: s["role"]
            for name, s in scores.items()
            if s["kind"] == DISTANCE and "MMD2" in name
        }

    unseen = {"MMD2 (random-2, unseen)": UNSEEN, "MMD2 (wavelets, unseen)": UNSEEN}
    trained = {"MMD2 (random-1, trained on)": TRAINED}
    selected = {"MMD2 (random-0, selected with)": SELECTED}
    assert roles(objective="perceptual") == trained | selected | unseen
    assert roles(objective="endpoint") == selected | unseen
    both = {"MMD2 (random-1, selected with)": SELECTED, **selected}
    assert roles(objective="endpoint", data=data) == both | unseen


COMMAND = ["tune", "mixture-smooth", "--nfe", "3", "--objective", "endpoint", "--steps", "4"]
COMMAND += ["--setting", "pairs=20", "--setting", "heldout=30", "--setting", "test=30"]


@pytest.mark.drawn
def test_the_command(tmp_path, capsys):
    out = tmp_path / "tuned.json"
    assert run([*COMMAND, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"wrote {out}" in text
    assert "rms to the teacher" in text
    (line,) = proposed(text)
    assert f"sample mixture-smooth --recipe {out}" in line
    carry_out(line)
    capsys.readouterr()
    page = (tmp_path / "tuned.search" / "report.html").read_text()
    assert "Judgements" in page
    assert page.count("<svg") >= 2
    about = read_json(out)["about"]
    assert about["search"]["steps"] == 4
    text = out.read_text()
    assert run([*COMMAND, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run([*COMMAND, "--out", str(out), "--overwrite"]) == 0
    assert json.loads(out.read_text()) == json.loads(text)

    sample = ["sample", "mixture-smooth", "--recipe", str(out), "-n", "4", "--out"]
    assert run([*sample, str(tmp_path / "a")]) == 0
    assert run(["sample", "mixture-sharp", *sample[2:], str(tmp_path / "b")]) == 2
    assert "another model" in capsys.readouterr().err
    assert run(["sample", "mixture-sharp", *sample[2:], str(tmp_path / "b"), "--force"]) == 0


def test_a_worse_result_is_not_written_unless_asked(tmp_path, capsys, monkeypatch):
    """The case that was seen: FID 24 before, 54.6 after."""
    values = iter([24.0, 54.6] * 2)

    def planted(x, **_):
        fid = next(values)
        estimate = Estimate(fid, fid - 1, fid + 1, 0.95, "planted", (30, 30))
        return [Score("FID (planted)", DISTANCE, estimate, TRAINED)]

    monkeypatch.setattr(problem, "final_scores", planted)
    out = tmp_path / "tuned.json"
    assert run([*COMMAND, "--out", str(out)]) == 3
    text = capsys.readouterr().out
    assert "the result is worse than the start: FID (planted) 24 (23 to 25) before, 54.6" in text
    assert "better" not in text
    assert "was not written" in text
    assert "--keep-worse" in text
    assert not out.exists()
    assert "worse than the start" in (tmp_path / "tuned.search" / "report.html").read_text()
    assert run([*COMMAND, "--out", str(out), "--keep-worse"]) == 0
    assert "the result is worse than the start" in capsys.readouterr().out
    assert read_json(out)["about"]["verdict"].startswith("the result is worse than the start")


def test_mistakes_at_the_command_line(tmp_path, capsys):
    for extra, message in (
        (["--family", "nothing"], "Unknown family"),
        (["--setting", "nothing=1"], "no setting"),
        (["--nfe", "0"], "nfe must be"),
        (["--family-option", "nothing=1"], "family 'gs'"),
        (["--out", str(tmp_path)], "is a folder"),
    ):
        base = COMMAND if "--nfe" not in extra else COMMAND[:2]
        arguments = extra if "--out" in extra else [*extra, "--out", str(tmp_path / "x.json")]
        assert run([*base, *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("features", [None, "fashion", "fashion-robust"])
def test_embedded_data_are_judged_in_features_that_the_loss_does_not_use(features) -> None:
    real = real_data("fashion", features, (1, 28, 28))
    assert real is not None
    assert real.loss.features_name == (features or "fashion")
    assert real.judge.features_name != real.loss.features_name
    assert real.judge.sha256 == real.loss.sha256
    assert not set(real.selection.tolist()) & set(real.final.tolist())
    assert real.samples is not None
    assert real.samples.shape == (1000, 1, 28, 28)


@pytest.mark.parametrize(
    ("option", "name"), [("--steps=4", "steps"), ("--optimizer=adam", "optimizer")]
)
def test_a_setting_that_is_given_twice_is_refused(option, name, tmp_path, command):
    value = option.partition("=")[2]
    given = [
        "tune",
        "mixture-smooth",
        option,
        "--setting",
        f"{name}={value}",
        "--out",
        str(tmp_path / "a.json"),
    ]
    assert f"{name} is given twice, as --{name} and as --setting {name}" in command(*given, code=2)

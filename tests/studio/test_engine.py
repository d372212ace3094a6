"""The engine of the studio: requests in, events out, without a page and without its library."""

from __future__ import annotations

import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.base.files import read_tensors
from fewstep.cli import run
from fewstep.studio import engine
from fewstep.studio.drawing import side_by_side
from fewstep.studio.engine import Context, InvalidSampler, run_fit, run_samples
from fewstep.studio.events import (
    Ended,
    Failed,
    Frame,
    Measured,
    ModelLoaded,
    Planned,
    PlansDrawn,
    Progressed,
    Referenced,
    Sampled,
    Stage,
)
from fewstep.studio.models import Cancelled, Models, Turns
from fewstep.studio.session import Session
from fewstep.studio.settings import FitRequest, SampleRequest, SamplerSettings, integer, real
from tiny_models import write_tiny

MIXTURE = "mixture-smooth"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("studio") / "model"))


@pytest.fixture(scope="module")
def models():
    return Models()


def samplers(*settings, **fields):
    """A request of samplers without a reference, on the CPU."""
    fields = {"model": MIXTURE, "n": 3, "device": "cpu", "reference": False, **fields}
    return SampleRequest(samplers=tuple(SamplerSettings(**s) for s in settings), **fields)


def events_of(request, models, **context):
    """The events of a run."""
    events = []
    context = {"draws_plans": False, **context}
    run_samples(request, Context(models, events.append, **context))
    return events


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_each_evaluation_is_shown_with_the_state_and_the_predicted_data(models):
    events = events_of(samplers({"solver": "ddim", "nfe": 4}, reference=True), models)
    assert isinstance(events[0], ModelLoaded)
    assert events[0].info.event_shape == (2,)
    (planned,) = of(events, Planned)
    assert (planned.nfe, planned.title, planned.stochastic) == (4, "ddim · NFE 4", False)
    frames = of(events, Frame)
    assert [f.evaluation for f in frames] == [1, 2, 3, 4, 4]
    assert [f.last for f in frames] == [False] * 4 + [True]
    assert [f.t for f in frames[:-1]] == pytest.approx(planned.plan.times.tolist(), rel=1e-6)
    assert frames[-1].t == float(planned.plan.knots[-1])
    assert all(f.state.startswith(PNG) and f.predicted.startswith(PNG) for f in frames)
    assert frames[0].seconds <= frames[-1].seconds


def test_distances_are_those_to_the_models_own_solution(models):
    events = events_of(samplers({"solver": "ddim", "nfe": 3}, reference=True), models)
    (reference,) = of(events, Referenced)
    model = fewstep.load(MIXTURE, device="cpu")
    assert (reference.indices, reference.nfe) == ((0,), 97)
    fine = fewstep.sample(model, 3, solver="tab3", nfe=300)
    torch.testing.assert_close(reference.samples, fine, atol=2e-3, rtol=0)
    steps = list(fewstep.steps(model, 3, solver="ddim", nfe=3))
    shown = [*(step.x0 for step in steps), steps[-1].x]
    expected = [float((x - reference.samples).square().mean().sqrt()) for x in shown]
    assert [f.distance for f in of(events, Frame)] == pytest.approx(expected, rel=1e-5)


def test_a_reference_is_computed_once_for_the_same_conditions(models, monkeypatch, tiny):
    """Guidance and labels belong to it, solvers do not; and the next run of the session finds it."""
    count = []
    follow = engine.follow

    def counted(*arguments, **options):
        count.append(1)
        return follow(*arguments, intervals=4, **options)

    monkeypatch.setattr(engine, "follow", counted)
    one = {"nfe": 2, "class_labels": "1"}
    request = samplers(
        one, {**one, "solver": "ddim"}, {**one, "guidance": 2.0}, model=tiny, n=2, reference=True
    )
    cache = {}
    events = events_of(request, models, references=cache)
    assert sorted(e.indices for e in of(events, Referenced)) == [(0, 1), (2,)]
    assert len(count) == 2
    events_of(request, models, references=cache)
    assert len(count) == 2


KINDS = {
    "solver": {"solver": "tab3", "nfe": 4, "class_labels": "0,shoe"},
    "auto": {"nfe": 3, "class_labels": "2"},
    "grid": {"solver": "dpmpp-2m", "grid": "karras", "nfe": 3, "class_labels": "all"},
    "options": {"solver": "ddim", "nfe": 3, "options": "eta=0.5 t_end=10"},
    "guidance": {"solver": "ddim", "nfe": 2, "guidance": 1.2345678901, "class_labels": "1"},
    "stages": {"solver": "heun", "nfe": 5, "class_labels": "1"},
    "adaptive": {"solver": "dopri5", "options": "rtol=1 t_start=99", "class_labels": "1"},
}


def shown_samples(planned, tmp_path, monkeypatch, capsys):
    """The samples of the Python and of the commands that are shown."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(planned.reproduction.python, "shown", "exec"), names)
    for line in planned.reproduction.commands:
        program, *arguments = shlex.split(line)
        assert program == "fewstep"
        assert run(arguments) == 0, line
    capsys.readouterr()
    return names["samples"], read_tensors(tmp_path / "samples" / "samples.safetensors")["samples"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shown_python_and_command_make_the_same_samples(
    kind, models, tiny, tmp_path, monkeypatch, capsys
):
    events = events_of(samplers(KINDS[kind], model=tiny, seed=7), models)
    (planned,), (sampled,) = of(events, Planned), of(events, Sampled)
    python, command = shown_samples(planned, tmp_path, monkeypatch, capsys)
    assert torch.equal(python, sampled.samples)
    assert torch.equal(command, sampled.samples)


def test_the_saved_recipe_makes_the_same_samples(models, tiny, tmp_path, monkeypatch, capsys):
    events = events_of(samplers(KINDS["guidance"], model=tiny, seed=3), models)
    (planned,), (sampled,) = of(events, Planned), of(events, Sampled)
    file = tmp_path / "saved.json"
    file.write_text(planned.recipe)
    assert json.loads(planned.recipe)["about"]["seed"] == 3
    model = fewstep.load(tiny, device="cpu")
    again = fewstep.sample(model, 3, recipe=file, seed=3, class_labels=1)
    assert torch.equal(again, sampled.samples)
    settings = {"kind": "recipe", "source": str(file), "class_labels": "1"}
    events = events_of(samplers(settings, model=tiny, seed=3), models)
    assert of(events, Planned)[0].title == "saved · NFE 2"
    assert torch.equal(of(events, Sampled)[0].samples, sampled.samples)
    shown = shown_samples(of(events, Planned)[0], tmp_path, monkeypatch, capsys)
    assert all(torch.equal(samples, sampled.samples) for samples in shown)


@pytest.mark.slow
def test_a_student_runs_beside_its_teacher(models, tmp_path, monkeypatch, capsys):
    student = {"kind": "student", "source": "fashion-1step", "class_labels": "3"}
    request = samplers(
        student, {"solver": "ddim", "nfe": 2, "class_labels": "3"}, model="fashion", n=2
    )
    events = events_of(request, models)
    planned, sampled = of(events, Planned), of(events, Sampled)
    assert [p.nfe for p in planned] == [1, 2]
    frames = [f for f in of(events, Frame) if f.index == 0]
    assert frames[-1].last
    assert frames[0].predicted is None  # an operator has states, and no prediction in between
    model = fewstep.load("fashion-1step", device="cpu")
    assert torch.equal(sampled[0].samples, fewstep.sample(model, 2, class_labels=3))
    shown = shown_samples(planned[0], tmp_path, monkeypatch, capsys)
    assert all(torch.equal(samples, sampled[0].samples) for samples in shown)


WRONG = [
    ({"solver": "tab33"}, "Did you mean 'tab3'"),
    ({"solver": "heun", "nfe": 4}, "the nearest budgets are"),
    ({"grid": "kerras"}, "Did you mean 'karras'"),
    ({"options": "eta"}, "an option is key=value"),
    ({"options": "'eta=1"}, "the options cannot be read"),
    ({"solver": "ddim", "options": "etta=1"}, "Did you mean 'eta'"),
    ({"kind": "profile"}, "no profile was measured yet"),
    ({"kind": "recipe", "source": "nothing.json"}, "nothing.json"),
    ({"kind": "student", "source": MIXTURE}, "is not a student"),
    ({"guidance": 2.0}, "guidance needs a null condition"),
    ({"class_labels": "x"}, "class labels are integers"),
    ({"class_labels": "3"}, "takes no conditions, got class_labels"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_before_any_evaluation(settings, message, models, monkeypatch):
    monkeypatch.setattr(engine, "run_batch", None)
    with pytest.raises(InvalidSampler) as caught:
        events_of(samplers({"nfe": 4}, settings), models)
    assert message in str(caught.value)
    assert caught.value.index == 1


def test_the_python_of_the_document_runs(capsys):
    page = Path(__file__).parents[2] / "docs" / "studio.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, str(page), "exec"), {})
    assert capsys.readouterr().out == "torch.Size([8, 2])\n"


def test_numbers_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match="number of samples must be an integer from 1 to 16, got 17"
    ):
        samplers({}, n=17)
    with pytest.raises(ValueError, match="the seed must be an integer from 0"):
        samplers({}, seed=-1)
    with pytest.raises(ValueError, match="1 to 4 samplers, got 5"):
        samplers(*[{}] * 5)
    with pytest.raises(ValueError, match="number of trajectories must be an integer from 4"):
        FitRequest(MIXTURE, n=3)
    with pytest.raises(ValueError, match="Unknown kind of sampler 'solvr'"):
        SamplerSettings(kind="solvr")
    with pytest.raises(ValueError, match="give the file of the recipe"):
        SamplerSettings(kind="recipe")
    with pytest.raises(ValueError, match=r"NFE must be an integer, got 2\.5"):
        integer("NFE", 2.5)
    with pytest.raises(ValueError, match="guidance must be a number, got x"):
        real("guidance", "x")
    assert integer("NFE", "") is None


def fitted(models, **fields):
    events = []
    fields = {"model": MIXTURE, "nfe": "3", "n": 4, "device": "cpu", **fields}
    run_fit(FitRequest(**fields), Context(models, events.append))
    return events


@pytest.fixture
def cheap(monkeypatch, coarse_references):
    """Measurements whose peers are ours, on a coarse reference: the numbers are not what is tested."""
    monkeypatch.setattr(engine, "PEERS", {"DDIM": ("ddim", "ddim"), "RK4": ("rho-rk4", "rho-rk4")})
    monkeypatch.setattr(engine, "errors_svg", lambda series, prefix: str(len(series)))
    follow = engine.follow
    monkeypatch.setattr(engine, "follow", lambda *a, **k: follow(*a, intervals=8, **k))


def test_a_measurement_is_that_of_the_library_and_is_compared_with_its_peers(models, cheap):
    events = fitted(models)
    (measured,) = of(events, Measured)
    expected = fewstep.fit(fewstep.load(MIXTURE, device="cpu"), (3,), n=4)
    assert measured.profile.entries == expected.entries
    assert {name for name, _, _ in measured.rows} == {"measured", "static default", "DDIM"}
    assert any("RK4" in line and "nearest budgets" in line for line in measured.skipped)
    assert of(events, Stage)[0].name.startswith("measuring")
    assert of(events, Progressed)


@pytest.mark.slow
def test_a_measured_profile_runs_and_is_reproduced_from_nothing(
    models, tiny, cheap, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(engine, "PEERS", {})
    session = Session(models)
    session.fit(FitRequest(tiny, nfe="2", n=4, device="cpu", guidance=1.5))
    session.wait()
    assert of(session.events(), Measured)
    one = {"kind": "profile", "nfe": 2, "guidance": 1.5, "class_labels": "1"}
    session.sample(samplers(one, model=tiny))
    session.wait()
    events = session.events()
    assert not of(events, Failed)
    (planned,), (sampled,) = of(events, Planned), of(events, Sampled)
    assert planned.title.startswith("profile: ")
    assert "fewstep fit" in planned.reproduction.commands[0]
    shown = shown_samples(planned, tmp_path, monkeypatch, capsys)
    assert all(torch.equal(samples, sampled.samples) for samples in shown)
    session.sample(samplers(one))  # another model: the profile is not its own
    session.wait()
    assert "no profile was measured yet" in of(session.events(), Failed)[0].message


def test_a_measurement_refuses_what_fit_refuses(models):
    with pytest.raises(ValueError, match="NFE are integers from 2 to 40"):
        fitted(models, nfe="1,2")
    with pytest.raises(ValueError, match="there is nothing to measure"):
        fitted(models, model="fashion-1step")


def test_plans_are_drawn_once_a_run(models, monkeypatch):
    drawn = []
    monkeypatch.setattr(engine, "plans_svg", lambda plans, prefix: drawn.append(plans) or "<svg/>")
    request = samplers(
        {"solver": "ddim", "nfe": 2}, {"solver": "dopri5", "options": "t_start=0.002"}
    )
    events = events_of(request, models, draws_plans=True)
    assert of(events, PlansDrawn)[0].figure == "<svg/>"
    assert list(drawn[0]) == ["A ddim"]  # the other has no plan beforehand


def test_one_picture_of_all_samplers(models, tiny):
    model = models.get(tiny, "cpu").denoiser
    rows = {"a": torch.zeros(2, 1, 8, 8), "b": torch.ones(2, 1, 8, 8)}
    assert side_by_side(rows, model, title="t").startswith(PNG)
    points = {"a": torch.zeros(2, 2)}
    assert side_by_side(points, models.get(MIXTURE, "cpu").denoiser, title="t").startswith(PNG)


def test_a_cancelled_run_stops_before_its_next_evaluation(models):
    events, stop = [], threading.Event()

    def emit(event):
        events.append(event)
        if isinstance(event, Frame) and event.evaluation == 2:
            stop.set()

    request = samplers({"solver": "ddim", "nfe": 50})
    with pytest.raises(Cancelled):
        run_samples(request, Context(models, emit, stop.is_set))
    assert [f.evaluation for f in of(events, Frame)] == [1, 2]
    with pytest.raises(Cancelled):
        run_fit(
            FitRequest(MIXTURE, nfe="3", n=4, device="cpu"),
            Context(models, list().append, lambda: True),
        )


def test_a_session_runs_in_a_thread_and_ends_with_an_event(models):
    session = Session(models)
    session.sample(samplers({"solver": "ddim", "nfe": 2}))
    session.wait()
    events = session.events()
    assert events[-1] == Ended(False)
    assert session.events() == []
    session.load("no such model")
    session.wait()
    failed, ended = session.events()
    assert isinstance(failed, Failed)
    assert "Unknown model 'no such model'" in failed.message
    assert ended == Ended(False)


def test_sessions_do_not_disturb_each_other(models, tiny):
    """Two users sample one model at a time, and one cancels: the other's samples are those of a quiet machine."""
    one, two = Session(models), Session(models)
    request = samplers({"solver": "ddim", "nfe": 4, "class_labels": "1"}, model=tiny)
    expected = of(events_of(request, models), Sampled)[0].samples
    two.sample(samplers({"solver": "ddim", "nfe": 900, "class_labels": "0"}, model=tiny, seed=1))
    with pytest.raises(ValueError, match="a run is going on"):
        two.sample(request)
    one.sample(request)
    one.wait()
    assert torch.equal(of(one.events(), Sampled)[0].samples, expected)
    two.cancel()
    two.wait()
    events = two.events()
    assert events[-1] == Ended(True)
    assert not of(events, Sampled)


def test_a_defect_is_shown_and_logged(models, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine, "run_batch", broken)
    session = Session(models)
    session.sample(samplers({"nfe": 2}))
    session.wait()
    failed = of(session.events(), Failed)[0]
    assert failed.message == "RuntimeError: a defect"
    assert "Traceback" in caplog.text


def test_turns_are_given_in_the_order_of_asking():
    turns, order, asked = Turns(), [], []

    def work(name):
        with turns.turn():
            order.append(name)

    threads = []
    with turns.turn():
        for name in range(4):
            thread = threading.Thread(target=work, args=(name,))
            thread.start()
            threads.append(thread)
            while len(turns._waiting) < name + 2:
                thread.join(0.001)
            asked.append(name)
    for thread in threads:
        thread.join()
    assert order == asked


def test_models_are_loaded_once_and_the_least_used_is_dropped(tiny):
    models = Models(most=1)
    first = models.get(tiny, "cpu")
    assert models.get(tiny, "cpu") is first
    models.get(MIXTURE, "cpu")
    assert models.get(tiny, "cpu") is not first
    with pytest.raises(ValueError, match="give a model"):
        models.get(" ")

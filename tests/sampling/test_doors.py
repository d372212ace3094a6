"""Every door refuses every contradiction with one text, before the first network evaluation.

Doors are the Python functions and the commands that take a sampler. A contradiction is a request whose arguments do
not fit together; each door is given all of them that it has.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fewstep
import fewstep.solvers
from fewstep.cli import run as command
from fewstep.comparison import compare
from fewstep.models.conditions import ARGUMENTS, OPTIONS, AcceptedConditions
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.module import SamplerModule, exported
from fewstep.sampling.planning import ENDS
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.sampling.protocol import Trajectory
from fewstep.sampling.request import Contradiction, SamplerRequest
from fewstep.sampling.resolve import resolve_plan

MODEL = fewstep.load("mixture-smooth")
SCHEDULE = MODEL.schedule
PLAN = fewstep.plan("ddim", SCHEDULE, nfe=4)
RECIPE = fewstep.SamplerRecipe(name="ddim", nfe=4, grid="uniform")
TIMES = [1.0, 0.6, 0.3, 0.01]
PROFILE = Profile(SCHEDULE, "", (ProfileEntry("tab2", tuple(TIMES)),), {3: "tab2"})

try:
    fewstep.solvers.solver("rho-heun").steps_for(5)
except ValueError as error:
    BUDGETS = str(error)

FULL = "has its solver, times and options already, got {} as well; leave {} out"
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "plan and recipe": (
        {"plan": PLAN, "recipe": RECIPE},
        "plan and recipe each are a whole sampler; give one of them",
    ),
    "plan and profile": (
        {"plan": PLAN, "profile": PROFILE},
        "plan and profile each are a whole sampler; give one of them",
    ),
    "recipe and profile": (
        {"recipe": RECIPE, "profile": PROFILE},
        "recipe and profile each are a whole sampler; give one of them",
    ),
    "nfe and steps": (
        {"solver": "ddim", "nfe": 4, "steps": 4},
        "give nfe or steps, not both; got nfe=4 and steps=4",
    ),
    "profile and solver": (
        {"profile": PROFILE, "solver": "ddim"},
        f"a profile {FULL.format('solver', 'it')}",
    ),
    "profile and grid": (
        {"profile": PROFILE, "grid": "karras"},
        f"a profile {FULL.format('grid', 'it')}",
    ),
    "profile and head start": (
        {"profile": PROFILE, "head_start": 0.5},
        f"a profile {FULL.format('head_start', 'it')}",
    ),
    "profile and options": (
        {"profile": PROFILE, "options": {"t_end": 0.1}},
        f"a profile {FULL.format('t_end', 'it')}",
    ),
    "dopri5 and nfe": (
        {"solver": "dopri5", "nfe": 5},
        "dopri5 chooses its steps while it runs, so it takes no nfe and has no plan beforehand; "
        "leave nfe out and give rtol and atol, or freeze one of its runs with "
        "fewstep.sampling.adaptive.freeze",
    ),
    "dopri5 and grid": (
        {"solver": "dopri5", "grid": "karras", "head_start": 0.5},
        "dopri5 chooses its steps while it runs, so it takes no grid and head_start and has no plan "
        "beforehand; leave grid and head_start out and give rtol and atol, or freeze one of its "
        "runs with fewstep.sampling.adaptive.freeze",
    ),
    "grid and times": (
        {"solver": "ddim", "grid": "karras", "options": {"times": TIMES}},
        "the grid 'karras' places its own times, got times as well; leave one of them out (times "
        "alone are the grid 'explicit')",
    ),
    "auto and times on a grid": (
        {"grid": "karras", "options": {"times": TIMES}},
        "the grid 'karras' places its own times, got times as well; leave one of them out (times "
        "alone are the grid 'explicit')",
    ),
    "times and nfe": (
        {"solver": "ddim", "nfe": 7, "options": {"times": TIMES}},
        "ddim makes 3 evaluations on this grid of 3 steps, not 7",
    ),
    "head start and t_start": (
        {"solver": "ddim", "nfe": 4, "head_start": 0.5, "options": {"t_start": 0.6}},
        "head_start and t_start are both the first time of the grid; give one of them",
    ),
    "head start and times": (
        {"solver": "ddim", "head_start": 0.5, "options": {"times": TIMES}},
        "head_start is 0.5, but the first of the times is 1",
    ),
    "unknown option": (
        {"solver": "tab3", "nfe": 4, "grid": "power", "options": {"etta": 1.0}},
        "Unknown option 'etta'. Options of the solver 'tab3': lower_final; of the grid 'power': "
        "power, strength, t_end, t_start, to_zero",
    ),
    "option of another grid": (
        {"nfe": 4, "grid": "karras", "options": {"power": 2.0}},
        "Unknown option 'power'. Options of the solver 'unipc2': lower_final, variant; of the grid 'karras': "
        "rho, strength, t_end, t_start, to_zero",
    ),
    "budget out of reach": (
        {"solver": "rho-heun", "nfe": 5},
        BUDGETS,
    ),
    "no number": ({"solver": "ddim", "nfe": 0}, "nfe must be a positive integer, got 0"),
}
for kind, source in (("plan", PLAN), ("recipe", RECIPE)):
    CONTRADICTIONS |= {
        f"{kind} and solver": (
            {kind: source, "solver": "tab3"},
            f"a {kind} {FULL.format('solver', 'it')}",
        ),
        f"{kind} and auto": (
            {kind: source, "solver": "auto"},
            f"a {kind} {FULL.format('solver', 'it')}",
        ),
        f"{kind} and more": (
            {kind: source, "grid": "karras", "head_start": 0.5, "options": {"eta": 1.0}},
            f"a {kind} {FULL.format('grid, head_start and eta', 'them')}",
        ),
        f"{kind} and another nfe": (
            {kind: source, "nfe": 7},
            f"this {kind} makes 4 evaluations, not 7; leave nfe out, or use another {kind}",
        ),
        f"{kind} and another number of steps": (
            {kind: source, "steps": 7},
            f"this {kind} has 4 steps, not 7; leave steps out, or use another {kind}",
        ),
    }


class Counted(Denoiser):
    """A model that may not be evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule, self.native, self.event_shape = SCHEDULE, MODEL.native, (2,)
        self.data_mean, self.data_std = 0.0, 1.0
        self.accepts = AcceptedConditions(names=frozenset())

    def raw(self, x, t, **cond):
        raise AssertionError("the network was evaluated")


class Operator(Counted):
    """A model with a built-in sampler of one evaluation."""

    def built_in_sampler(self):
        return Once(self)


class Once:
    nfe, budgets, options, fixed = 1, (1,), {}, {}

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def configured(self, nfe, **options):
        return self

    def start(self, noise):
        return noise

    def run(self, x, run):
        return Trajectory(x, torch.zeros(1, dtype=torch.float64), None, 1)


def never(x, sigma, **cond):
    raise AssertionError("the network was evaluated")


def text(function, *arguments, **options) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        function(*arguments, **options)
    return str(error.value)


# Python


def sample(given, folder):
    return text(fewstep.sample, Counted(), 2, **given)


def steps(given, folder):
    return text(fewstep.steps, Counted(), 2, **given)


def sampler(given, folder):
    given = dict(given)
    return text(fewstep.sampling.sample.sampler, Counted(), **given.pop("options", {}), **given)


def resolving(given, folder):
    return text(lambda: fewstep.resolve(Counted(), SamplerRequest(**given)))


def recording(given, folder):
    return text(fewstep.record, Counted(), folder / "store", n=2, **given)


def planning(given, folder):
    given = {"solver": "auto", **given}
    return text(fewstep.plan, given.pop("solver"), SCHEDULE, **given.pop("options", {}), **given)


def plan_only(given, folder):
    return text(lambda: resolve_plan(SCHEDULE, SamplerRequest(**given)))


def tuning(given, folder):
    return text(fewstep.tune, Counted(), **given)


def comparing(given, folder):
    """A sampler of a comparison is a text, and its budget is beside it."""
    if "recipe" in given or "plan" in given:
        (source,) = [given[kind] for kind in ("recipe", "plan") if kind in given]
        spec = str(source.save(folder / "one.json"))
    else:
        spec = given.get("solver", "auto") + ("@" + given["grid"] if "grid" in given else "")
        options = {**given.get("options", {})}
        options |= {k: given[k] for k in ("steps", "head_start") if k in given}
        spec += "".join(f"+{key}={value}" for key, value in options.items()).replace(" ", "")
    return text(compare, Counted(), [spec], nfe=[given["nfe"]], folder=folder / "c")


def comparing_requests(given, folder):
    """From Python a sampler of a comparison is a request too."""
    return text(lambda: fewstep.compare(Counted(), [SamplerRequest(**given)], nfe=[3]))


def scheduling(given, folder):
    """A scheduler's plan is a recipe, and what set_timesteps is given is in the words of pipelines."""
    from fewstep.adapters.diffusers import PlanScheduler

    given = dict(given)
    options = given.pop("options", {})
    for kind in ("recipe", "profile"):
        if kind in given:
            given[kind] = str(given[kind].save(folder / f"{kind}.json"))
    budget = given.pop("nfe", 3)

    def scheduled():
        PlanScheduler(grid_options=options, count="calls", **given).set_timesteps(budget)

    return text(scheduled)


def k_diffusion(given, folder):
    """A sampler of k-diffusion, whose levels are the budget."""
    from fewstep.adapters import kdiffusion

    given = dict(given)
    options = given.pop("options", {})
    levels = torch.tensor([10.0, 5.0, 1.0, 0.0])
    return text(kdiffusion.sampler, never, torch.zeros(2, 3), levels, **given, **options)


# Commands


def arguments(given, folder):
    words = []
    for key, value in given.items():
        if key == "options":
            words += [f"--option={k}={v}" for k, v in value.items()]
        elif key in ("plan", "recipe"):
            words += ["--recipe", value.save(folder / f"{key}.json")]
        elif key == "profile":
            words += ["--profile", value.save(folder / "profile.json")]
        else:
            words += [f"--{key.replace('_', '-')}", value]
    return [str(a) for a in words]


def said(capsys, *given) -> str:
    assert command([str(a) for a in given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    return err.removeprefix("error: ").strip()


# What a door has no argument for.
DOORS = {
    "sample": (sample, set()),
    "steps": (steps, set()),
    "sampler": (sampler, set()),
    "resolve": (resolving, set()),
    "record": (recording, {"steps", "head_start"}),
    "plan": (planning, {"plan", "recipe"}),
    "resolve_plan": (plan_only, {"plan", "recipe"}),
    "tune": (tuning, {"steps", "plan", "recipe", "profile"}),
    "compare": (comparing, {"profile"}),
    "fewstep.compare": (comparing_requests, set()),
    "PlanScheduler": (scheduling, {"plan", "steps", "head_start"}),
    "kdiffusion": (k_diffusion, {"nfe", "steps", "head_start"}),
}

# Of contradictions with a number, PlanScheduler says num_inference_steps; of options, whose of its two they are.
NUMBERED = {
    "recipe and auto",  # its default
    "recipe and another nfe",
    "dopri5 and nfe",
    "times and nfe",
    "unknown option",
    "option of another grid",
    "budget out of reach",
    "no number",
}


def cases():
    for door, (_, lacks) in DOORS.items():
        for name, (given, _) in CONTRADICTIONS.items():
            if lacks & set(given):
                continue
            if door == "tune" and "nfe" not in given:
                continue  # its budget has no default
            if door == "compare" and (
                "nfe" not in given or (given.keys() & {"plan", "recipe"} and len(given) > 2)
            ):
                continue  # a file has no solver beside it
            if door == "compare" and given.get("nfe") == 0:
                continue  # its budgets are a list
            if door == "compare" and given.keys() & {"plan", "recipe"}:
                continue  # a file runs at its own budget, whatever the others have
            if door == "fewstep.compare" and name == "dopri5 and grid":
                continue  # its budgets are beside the request
            if door == "PlanScheduler" and name in NUMBERED:
                continue
            if door == "kdiffusion" and (
                "times" in given.get("options", {}) or name.endswith("and auto")
            ):
                continue  # its levels are the times, and auto is its default
            yield door, name


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(door, marks=pytest.mark.diffusers if door == "PlanScheduler" else ())
        for door in DOORS
    ],
)
def test_a_contradiction_has_one_text_at_every_door(door, tmp_path):
    if door == "PlanScheduler":
        pytest.importorskip("diffusers")
    names = [name for where, name in cases() if where == door]
    assert names
    for number, name in enumerate(names):
        given, message = CONTRADICTIONS[name]
        folder = tmp_path / str(number)
        folder.mkdir()
        got = DOORS[door][0](given, folder)
        if "compare" in door and name in ("times and nfe", "budget out of reach"):
            # A budget that one sampler cannot meet is left out; only if it meets none is it an error.
            got = got.split(": ", 1)[1]
        assert got == message, name


def commands():
    for name, (given, _) in CONTRADICTIONS.items():
        kinds = given.keys() & {"plan", "recipe"}
        if len(kinds) == 2 or (kinds and "plan" in given):
            continue  # a command reads a plan as a recipe
        yield "sample", name
        if not given.keys() & {"steps", "head_start", "profile"}:
            yield "record", name
        if not kinds and "solver" in given:
            yield "plan make", name
        if not given.keys() & {"recipe", "steps", "profile"} and "nfe" in given:
            yield "tune", name


@pytest.mark.parametrize(("name", "case"), list(commands()))
def test_a_contradiction_has_one_text_at_every_command(name, case, tmp_path, capsys):
    given, message = CONTRADICTIONS[case]
    given = dict(given)
    if name == "plan make":
        start = ["plan", "make", given.pop("solver"), "--schedule", SCHEDULE.name]
        out = tmp_path / "plan.json"
    else:
        start, out = [name, "mixture-smooth"], tmp_path / "out"
        if name in ("sample", "record"):
            start += ["-n", "2"]
    assert said(capsys, *start, *arguments(given, tmp_path), "--out", out) == message
    assert not out.exists()


# A model with a built-in sampler

OPERATOR = (
    "this model has a built-in sampler of one evaluation and cannot use another; leave {} out, or "
    "use the model that it was distilled from"
)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"nfe": 10}, "nfe=10"),
        ({"nfe": 8}, "nfe=8"),
        ({"solver": "tab3"}, "solver"),
        ({"solver": "dopri5"}, "solver"),
        ({"grid": "karras", "options": {"rho": 3.0}}, "grid and rho"),
        ({"head_start": 0.5}, "head_start"),
        ({"plan": PLAN}, "plan"),
        ({"recipe": RECIPE}, "recipe"),
        ({"profile": PROFILE}, "profile"),
        ({"guidance": 2.0}, "guidance"),
        ({"image": torch.zeros(2)}, "image"),
    ],
)
def test_an_operator_takes_nothing_else(given, named):
    for door in (fewstep.sample, fewstep.steps):
        assert text(door, Operator(), 2, **given) == OPERATOR.format(named)
    if "image" not in given:
        options = dict(given)
        message = text(
            fewstep.sampling.sample.sampler, Operator(), **options.pop("options", {}), **options
        )
        assert message == OPERATOR.format(named)


@pytest.mark.parametrize(
    "given", [{}, {"nfe": 1}, {"solver": "auto"}, {"solver": "auto", "nfe": 1, "guidance": 1}]
)
def test_an_operator_takes_what_it_does(given):
    assert fewstep.sample(Operator(), 2, **given).shape == (2, 2)
    recipe = fewstep.resolve(
        Operator(), SamplerRequest(**{k: given[k] for k in given if k != "guidance"})
    ).recipe
    assert (recipe.kind, recipe.nfe) == ("operator", 1)
    assert fewstep.sample(Operator(), 2, recipe=recipe, nfe=1).shape == (2, 2)


# What only some doors can be given


def open_ended(x, t, **cond):
    raise AssertionError("the network was evaluated")


def test_an_argument_of_another_door_is_no_condition():
    """A network that takes any keyword would take them in silence."""
    model = fewstep.Denoiser.wrap(
        open_ended, schedule=SCHEDULE, prediction="eps", event_shape=(2,)
    )
    for door, name in (
        (fewstep.steps, "batch_size"),
        (fewstep.steps, "mask"),
        (fewstep.fit, "grid"),
        (fewstep.tune, "profile"),
    ):
        given: dict[str, Any] = {name: 3}
        arguments = (2,) if door in (fewstep.sample, fewstep.steps) else ()
        if door is fewstep.tune:
            given["nfe"] = 4
        assert f"this function has no argument {name}" in text(door, model, *arguments, **given)
    for name in ("eta", "times", "rho", "t_end"):
        message = f"{name} is an option of solvers and grids and no condition; give options="
        assert message in text(fewstep.sample, model, 2, **{name: 0.5})
        assert message in text(
            fewstep.sample, Counted(), 2, **{name: 0.5}
        )  # it takes no conditions


def test_the_names_that_are_no_conditions_are_those_of_the_doors():
    """An argument that one of them gains, and the ends that every grid has, are in the lists."""
    assert set(ENDS) <= OPTIONS
    doors = [
        set(inspect.signature(d).parameters)
        for d in (fewstep.sample, fewstep.steps, fewstep.record)
    ]
    some = set.union(*doors) - set.intersection(*doors) - {"folder", "about", "shard_size", "cond"}
    assert some <= ARGUMENTS | OPTIONS, some - ARGUMENTS - OPTIONS


LEVELS = torch.tensor([10.0, 5.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": "karras", "t_end": 0.5}, "sigmas has the ends of the grid, got t_end as well"),
        ({"grid": "karras", "to_zero": False}, "sigmas has the ends of the grid, got to_zero"),
        ({"seed": 1, "noise_sampler": never, "solver": "ddpm"}, "both the source of noise"),
        ({"seed": "one"}, "seed must be an integer"),
        ({"solver": "dopri5", "schedule": SCHEDULE}, "leave schedule out"),
        ({"plan": PLAN, "schedule": SCHEDULE}, "a plan has its schedule already"),
        ({"callback": 3}, "callback must be callable"),
        ({"extra_args": 3}, "extra_args must be a dict"),
    ],
)
def test_contradictions_of_k_diffusion(given, message):
    from fewstep.adapters import kdiffusion

    assert message in text(kdiffusion.sampler, never, torch.zeros(2, 3), LEVELS, **given)


def test_a_plan_ends_where_the_levels_say():
    from fewstep.adapters import kdiffusion

    edm = fewstep.schedule("edm")
    plan = fewstep.plan("ddim", edm, times=[10.0, 5.0, 1.0])
    x = torch.zeros(2, 3)
    message = text(kdiffusion.sampler, never, x, torch.tensor([10.0, 5.0]), plan=plan)
    assert message == (
        "the last of sigmas is 5, but the plan ends at 1; give sigmas with its last level, or with a last 0"
    )
    for end in (1.0, 0.0):
        levels = torch.tensor([10.0, end])
        assert kdiffusion.sampler(lambda x, s: x * 0.5, x, levels, plan=plan).shape == (2, 3)


def test_contradictions_of_likelihoods_and_comparisons(tmp_path):
    x = torch.zeros(2, 2)
    message = text(
        fewstep.log_likelihood, Counted(), x, solver="rho-heun", steps=3, rtol=1e-3, atol=1e-3
    )
    assert message.startswith("fixed steps have no tolerance, got rtol and atol; leave them out")
    message = text(fewstep.log_likelihood, Counted(), x, exact=True, probes=2)
    assert message.startswith("exact=True computes the divergence without probes")
    message = text(compare, Counted(), "ddim", nfe=[4], folder=tmp_path / "c", metrics=["fid"])
    assert message.startswith("the metrics fid compare with real data")
    message = text(fewstep.sample, Counted(), 2, solver="ddim", nfe=3, brownian=True)
    assert message.startswith("brownian=True is for solvers that draw noise")


def test_a_module_takes_the_conditions_of_its_network():
    sampler = fewstep.sampling.sample.sampler(Counted(), solver="ddim", nfe=3)
    assert "takes no conditions" in text(SamplerModule(sampler), torch.zeros(1, 2), y=1)
    assert "takes no conditions" in text(exported, sampler, torch.zeros(1, 2), y=1)
    assert "noise must have shape (n, 2)" in text(exported, sampler, torch.zeros(1, 3))


# What is no contradiction


@pytest.mark.parametrize(
    "given",
    [
        {"plan": PLAN, "nfe": 4},
        {"recipe": RECIPE, "nfe": 4},
        {"profile": PROFILE, "solver": "auto", "nfe": 3},
        {"grid": "explicit", "options": {"times": TIMES}},
        {"solver": "tab3", "options": {"times": TIMES}, "nfe": 3},
        {"solver": "ddim", "head_start": 1.0, "options": {"times": TIMES}},
        {"solver": "ddim", "nfe": 4, "options": {"eta": None}},
    ],
)
def test_what_agrees_is_taken(given):
    resolved = fewstep.resolve(MODEL, SamplerRequest(**given))
    again = fewstep.resolve(MODEL, SamplerRequest(recipe=resolved.recipe))
    one, two = resolved.sampler.plan, again.sampler.plan
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.knots, two.knots)


def test_auto_holds_a_grid_that_is_given():
    resolved = fewstep.resolve(MODEL, SamplerRequest(nfe=6, grid="karras"))
    recipe = resolved.recipe
    assert (recipe.name, recipe.grid, recipe.nfe) == ("unipc2", "karras", 6)
    assert resolved.chosen == "unipc2 on the grid 'karras' with 6 evaluations"
    expected = fewstep.plan("unipc2", SCHEDULE, nfe=6, grid="karras")
    assert torch.equal(resolved.sampler.plan.values, expected.values)


def test_an_image_and_a_head_start_are_two_beginnings():
    message = "an image and a head start both set the initial state"
    for given in (
        {"solver": "ddim", "nfe": 3, "head_start": 0.5},
        {"plan": fewstep.plan("ddim", SCHEDULE, nfe=3, head_start=0.5)},
        {"recipe": fewstep.SamplerRecipe(name="ddim", nfe=3, head_start=0.5)},
    ):
        assert message in text(fewstep.sample, Counted(), 2, image=torch.zeros(2), **given)


def test_guidance_of_model_and_recipe():
    guided = fewstep.Denoiser.wrap(
        lambda x, t, y: x,
        schedule=SCHEDULE,
        prediction="eps",
        event_shape=(2,),
        null_condition={"y": 0},
    )
    recipe = fewstep.SamplerRecipe(name="ddim", nfe=3, guidance=3.0)
    with pytest.raises(Contradiction, match="guided with scale 2, the recipe with 3"):
        fewstep.sample(fewstep.Guided(guided, 2.0), 2, recipe=recipe, y=1)
    resolved = fewstep.resolve(guided, SamplerRequest(recipe=recipe), guidance=1)
    assert resolved.sampler.denoiser is guided
    assert resolved.recipe.guidance is None
    assert fewstep.resolve(guided, SamplerRequest(recipe=recipe)).sampler.denoiser.scale == 3


def test_a_profile_is_for_its_model():
    other = Profile(SCHEDULE, "abc", PROFILE.entries, PROFILE.recommended, guidance=1.0)
    with pytest.raises(ValueError, match="measured on another model"):
        fewstep.sample(MODEL, 2, profile=other)
    mine = Profile(SCHEDULE, MODEL.fingerprint(), PROFILE.entries, PROFILE.recommended, 3.0)
    with pytest.raises(ValueError, match="measured with guidance 3, this run has 1"):
        fewstep.sample(MODEL, 2, profile=mine)
    assert fewstep.sample(MODEL, 2, profile=mine, force=True, nfe=3).shape == (2, 2)


def test_a_request_is_planned_once():
    request = SamplerRequest("unipc3", nfe=8, grid="power", options={"power": 1.5})
    one, two = (fewstep.resolve(MODEL, request).sampler.plan for _ in range(2))
    assert one is two
    # Equal numbers of other types are other requests.
    assert resolve_plan(SCHEDULE, SamplerRequest("ddim", nfe=4, options={"eta": 1})).plan is not (
        resolve_plan(SCHEDULE, SamplerRequest("ddim", nfe=4, options={"eta": 1.0})).plan
    )

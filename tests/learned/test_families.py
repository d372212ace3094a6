"""Every family in the registry: its start, its gradients, its file; times that move."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fewstep
from fewstep.diffusion.prediction import Prediction
from fewstep.learned import FAMILIES, Base
from fewstep.learned.families import Family, family
from fewstep.learned.ggdm import table_of
from fewstep.learned.learned_plan import Start
from fewstep.learned.moving import LearnedTimes, Shifts
from fewstep.learned.problem import Problem
from fewstep.learned.settings import Search
from fewstep.learned.solver_families import SolverFamily
from fewstep.learned.starts import start_of
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan
from fewstep.sampling.profile import ProfileEntry
from fewstep.sampling.request import SamplerRequest
from fewstep.solvers import SOLVERS, solver
from tiny_searches import MODEL, VP, base_of, run

AUTO_5 = SamplerRequest("auto", nfe=5)


def start(name: str, steps: int = 4, schedule=VP) -> Base:
    return start_of(name, schedule, steps)


def gradients(model, seed: int = 0):
    """The gradient of some smooth function of the sample, by parameter."""
    from fewstep.plans.execute import functional

    x = torch.randn((6, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = torch.randn((9, 6, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers = model()

    def network(y, t):
        return MODEL(y, t, prediction=model.structure.prediction)

    end = functional(
        model.structure, numbers.values, numbers.times, network, x, draw=lambda i: z[i]
    )
    model.zero_grad()
    end.square().sum().backward()
    return end.square().sum().detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_start_is_the_base(name):
    base = start(name)
    model = family(name, base)
    torch.testing.assert_close(run(model.plan()), run(base.plan()), rtol=0, atol=1e-11)
    assert model.structure.nfe == 4
    assert model.count == len(model.vector()) > 0


@pytest.mark.parametrize("steps", [5, 6, 8, 10, 19])
def test_a_last_row_that_rounding_alone_fills_is_not_learned(steps):
    """From DDIM the last row of the table is the prediction of the data, whatever cancels on the way."""
    base = start("ggdm", steps, fewstep.schedule("ddpm-linear"))
    assert family("ggdm", base).count == steps * (steps + 1) // 2 + steps


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_right(name):
    """Every parameter's derivative against a difference quotient, away from the start."""
    model = family(name, start(name))
    generator = torch.Generator().manual_seed(4)
    model.load_vector(0.05 * torch.randn(model.count, generator=generator, dtype=torch.float64))
    gradients(model)
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    vector = model.vector()
    for place in range(0, model.count, max(1, model.count // 6)):
        ends = []
        for sign in (1, -1):
            moved = vector.clone()
            moved[place] += sign * 1e-6
            model.load_vector(moved)
            ends.append(gradients(model))
        quotient = float(ends[0] - ends[1]) / 2e-6
        assert quotient == pytest.approx(float(got[place]), rel=1e-4, abs=1e-6), place


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_away_from_the_start_make_a_plan_that_comes_back(name):
    model = family(name, start(name))
    before = run(model.plan())
    model.load_vector(0.1 * torch.arange(model.count).double().sin())
    plan = model.plan("mine")
    assert float((run(plan) - before).abs().max()) > 1e-6
    again = Plan.from_json(plan.to_json())
    assert again.name == "mine"
    assert torch.equal(run(again), run(plan))
    assert torch.equal(again.values, plan.values)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_work_on_training_timesteps(name):
    """Levels of a table, fractional times: the start is met, and times have gradients."""
    schedule = fewstep.schedule("ddpm-linear")
    model = family(name, start(name, schedule=schedule))
    own = fewstep.models.exact.smooth(schedule)
    base = model.base.plan()
    torch.testing.assert_close(
        run(model.plan(), model=own), run(base, model=own), rtol=0, atol=1e-9
    )
    times = model().times
    assert times.requires_grad == model.learns_conditioning
    if model.learns_conditioning:
        times.sum().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


EXACT = [
    name
    for name in SOLVERS
    if name not in ("edm-stochastic", "accelerated-ddim-theory")
    and not (solver(name).stochastic or solver(name).adaptive)
]


@pytest.mark.parametrize("name", EXACT)
def test_gs_starts_from_every_deterministic_solver(name):
    """Also from those of several stages."""
    nfe = next(k for k in range(4, 13) if _affordable(name, k))
    base = Base.of(VP, SamplerRequest(name, nfe=nfe, grid="quadratic"))
    model = family("gs", base)
    truth = run(base.plan())
    torch.testing.assert_close(
        run(model.plan()), truth, rtol=0, atol=1e-10 * max(1.0, float(truth.abs().max()))
    )


def _affordable(name: str, nfe: int) -> bool:
    try:
        solver(name).steps_for(nfe)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_gs_keeps_the_draws_of_a_stochastic_base(eta):
    base = Base.of(VP, SamplerRequest("ddim", nfe=4, grid="quadratic", options={"eta": eta}))
    model = family("gs", base)
    torch.testing.assert_close(run(model.plan()), run(base.plan()), rtol=0, atol=1e-11)
    assert model.count == 4 + 4 + sum(n + 2 for n in range(4))


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_learned_noise_is_that_of_ddim(kind):
    """With the amounts of DDIM's eta the family over DDIM is DDIM with that eta; and marginals stay."""
    solver_name = {"eps": "ddim", "x0": "dpmpp-2m"}[kind]
    model = family("gs+noise", base_of(solver_name, 4))
    assert model.structure.n_noise == 3
    assert model.count == family("gs", base_of(solver_name, 4)).count + 3
    eta = base_of("ddim", 4, eta=0.7)
    amounts = table_of(eta.plan()).noise[1:4] / eta.grid.sigma[1:4]
    model.amounts.data = torch.atanh(amounts)
    if kind == "eps":
        torch.testing.assert_close(run(model.plan()), run(eta.plan()), rtol=0, atol=1e-11)
    # Data that are one point: the network predicts it, and the states have the variance of the noise alone.
    flat, sigma = convert_plan(model.plan(), Prediction.X0).flat(), model.base.grid.sigma
    spread = flat.a.square() * sigma[0].square() + flat.C.square().sum(1)
    torch.testing.assert_close(spread, sigma.square(), rtol=1e-9, atol=1e-12)


def test_noise_is_learned_from_deterministic_solvers_of_one_evaluation_a_step():
    for request, message in (
        (SamplerRequest("ddpm", nfe=4, grid="quadratic"), "draws noise already"),
        (SamplerRequest("heun", nfe=4, grid="quadratic"), "one evaluation per step"),
    ):
        with pytest.raises(ValueError, match=message):
            family("gs+noise", Base.of(VP, request))
    with pytest.raises(ValueError, match="one step onto the data"):
        family("gs+noise", base_of("ddim", 1))


def test_the_theory_follows_the_times():
    """Moved times without corrections are the solver on the moved grid; frozen ones are not."""
    base = base_of("tab3", 5)
    gs, free = family("gs", base), family("free", base)
    for model in (gs, free):
        model.times.logits.data = torch.tensor([0.2, -0.1, 0.3, 0.0, -0.2], dtype=torch.float64)
    knots = gs().knots.detach()
    moved = Base.of(VP, SamplerRequest("tab3", nfe=5, options={"times": knots.tolist()}))
    assert float((knots - base.grid.times).abs().max()) > 0.01
    torch.testing.assert_close(run(gs.plan()), run(moved.plan()), rtol=0, atol=1e-11)
    assert torch.equal(free().values, free.frozen)
    assert float((run(free.plan()) - run(moved.plan())).abs().max()) > 1e-3


@pytest.mark.parametrize("coordinate", ["time", "lambda"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("schedule", ["vp-linear", "ddpm-linear", "edm"])
def test_times_stay_in_order_and_in_range(coordinate, zero, schedule):
    """A hundred steps of Adam at a large rate towards nonsense."""
    own = fewstep.schedule(schedule)
    grid = fewstep.grid("power", own, 6, power=1.5)
    if zero:
        grid = fewstep.grid("explicit", own, None, times=[*grid.times.tolist()[:-1], own.t_zero])
    times, shifts = LearnedTimes(grid, coordinate), Shifts(6, own.t_max, own.t_min)
    torch.testing.assert_close(times(), grid.times, rtol=1e-12, atol=1e-12 * own.t_max)
    optimizer = torch.optim.Adam([*times.parameters(), *shifts.parameters()], lr=0.1)
    weights = torch.tensor([0, 1.0, -3.0, 2.0, 5.0, -4.0, 0], dtype=torch.float64)
    for _ in range(100):
        optimizer.zero_grad()
        knots = times()
        timesteps = knots[:6] + shifts(knots[:6])
        ((knots * weights).sum() - timesteps.sum()).backward()
        optimizer.step()
    knots, timesteps = times().detach(), (times()[:6] + shifts(times()[:6])).detach()
    assert float((knots - grid.times).abs().max()) > 0.05 * own.t_max
    assert bool((knots.diff() < 0).all())
    assert bool((timesteps.diff() < 0).all())
    assert knots[0] == grid.times[0]
    assert knots[-1] == grid.times[-1]
    assert own.t_min <= float(timesteps.min())
    assert float(timesteps.max()) <= own.t_max
    gaps = -knots[:6].diff()
    assert bool(((timesteps - knots[:6]).abs()[1:] <= gaps / 2 + 1e-12).all())


def test_networks_of_integer_timesteps_cannot_learn_times():
    levels = fewstep.schedule("ddpm-linear")
    base = start_of("gs", levels, 5, integer_times=True)
    assert torch.equal(base.grid.times, base.grid.times.round())
    for name in FAMILIES:
        own = start_of(name, levels, 5, integer_times=True)
        entry = FAMILIES[name]
        if issubclass(entry.kind, SolverFamily) or entry.options.get("time"):
            with pytest.raises(ValueError, match="integer timesteps"):
                family(name, own)
        else:
            assert torch.equal(family(name, own)().times, own.grid.times[:5])
    fixed = family("gs", base, times=False, shifts=False)
    assert torch.equal(fixed().times, base.grid.times[:5])


def test_ggdm_starts_from_ddim_unless_asked():
    own, chosen = (start_of("ggdm+pred+time", VP, 5, solver=s) for s in (None, "auto"))
    best = start_of("gs", VP, 5)
    assert own.solver == solver("ddim")
    assert chosen.solver == best.solver == start_of("gs", VP, 5, solver="auto").solver
    assert chosen.grid.times.tolist() == best.grid.times.tolist()
    x, y = (run(plan) for plan in (family("ggdm+pred+time", chosen).plan(), best.plan()))
    torch.testing.assert_close(x, y)


WEIGHTS = [[1.0, 0.98], [1.01, 1.4, -0.42], [0.99, 1.5, -0.6, 0.1], [1.0, 1.0]]
PROFILE = fewstep.Profile(
    VP, "", (
        ProfileEntry("multistep", (1.0, 0.6, 0.3, 0.1, VP.t_zero), error=0.1, weights=WEIGHTS),
        ProfileEntry("unipc2", (1.0, 0.5, 0.25, 0.1, 1e-3), error=0.2),
        ProfileEntry("tab2", (1.0, 0.55, 0.25, 0.1, 1e-3), error=0.15),
    ),
    {4: "multistep"},
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_starts_from_the_profile_of_the_model(name):
    """With the measured weights where the family can; else from the best of its solvers that fits."""
    declared = FAMILIES[name].start.solver
    own = start_of(name, VP, 4, profile=PROFILE)
    assert own.origin == ("profile" if declared is None else "family")
    if name.startswith(("vars", "ddim")):
        assert own.solver.name == declared
        return
    base = start_of(name, VP, 4, profile=PROFILE, solver="auto")
    assert base.origin == "profile"
    measured = issubclass(FAMILIES[name].kind, SolverFamily) or "pred" in name
    assert base.solver.name == ("multistep" if measured else "tab2")
    if measured:
        assert base.grid.times.tolist() == list(PROFILE.entries[0].times)
    model = family(name, base)
    torch.testing.assert_close(run(model.plan()), run(base.plan()), rtol=0, atol=1e-11)
    assert base.to_record()["solver"] == base.solver.name
    # What is requested is used, whatever was measured.
    assert start_of(name, VP, 4, profile=PROFILE, solver="unipc3").origin == "given"


def test_the_embedded_model_starts_from_its_profile():
    denoiser = fewstep.load("fashion", device="cpu")
    problem = {
        "nfe": 5,
        "family_name": "gs",
        "objective": "endpoint",
        "data": None,
        "features": None,
    }
    problem |= {"grid": None, "head_start": None, "options": {}, "family_options": {}, "seed": 0}
    problem |= {"search": Search(), "cond": {}}
    own = Problem.of(denoiser, **problem, solver=None, guidance=None)
    assert own.base.origin == "profile"
    assert torch.equal(
        own.base.plan().values, fewstep.resolve(denoiser, AUTO_5).sampler.plan.values
    )
    record = own.record()["base"]
    assert len(record["options"]["weights"]) == 5
    assert record["knots"] == own.base.grid.times.tolist()
    # Measured without guidance.
    assert Problem.of(denoiser, **problem, solver=None, guidance=2.0).base.origin == "auto"


def test_counts_are_those_of_the_table():
    """ddss: K - 1, K, K (K + 1) / 2 + K; the initial marginals count for plain GGDM alone."""
    for steps in (5, 10):
        bases = {
            n: base_of(FAMILIES[n].start.solver, steps) for n in ("ddim-sigma", "vars", "ggdm")
        }
        assert family("ddim-sigma", bases["ddim-sigma"]).count == steps - 1
        assert family("vars", bases["vars"]).count == steps
        full = steps * (steps + 1) // 2 + steps
        assert family("ggdm", bases["ggdm"]).count == full
        assert family("ggdm+pred", bases["ggdm"]).count == full - 2 + steps
        assert family("ggdm+pred-free", bases["ggdm"]).count == full - 2 + 2 * steps


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'ggdm"):
        family("ggdn", base_of("ddim", 3))
    with pytest.raises(TypeError, match="family 'gs'"):
        family("gs", base_of("ddim", 3), nothing=1)
    with pytest.raises(ValueError, match="coordinate"):
        family("gs", base_of("ddim", 3), coordinate="sigma")
    with pytest.raises(ValueError, match="pred must be"):
        family("ggdm", base_of("ddim", 3), pred="x")
    assert isinstance(family("gs", base_of("ddim", 3)), SolverFamily)


def test_a_family_is_a_class_and_a_line(monkeypatch):
    class Late(SolverFamily):
        """The times of a solver, from a start of its own."""

        default_start = Start("tab2")

    monkeypatch.setitem(FAMILIES._entries, "late", Family(Late, {"corrections": True}))
    base = start("late")
    assert base.solver == solver("tab2")
    assert base.grid.ends_at_zero
    assert family("late", base).count > 4


@pytest.mark.parametrize("name", FAMILIES)
def test_options_of_a_family_are_known_and_switches_are_true_or_false(name):
    # Every text is true in Python: "no" must not switch anything on.
    switches = [
        key
        for key, parameter in inspect.signature(FAMILIES[name].kind).parameters.items()
        if isinstance(parameter.default, bool)
    ]
    assert switches
    base: Any = None  # nothing is looked at before the options
    for key in switches:
        with pytest.raises(TypeError, match=f"option {key} .* true or false, got 'no'"):
            family(name, base, **{key: "no"})
    with pytest.raises(TypeError, match=f"no option 'unknown'; it has .*{switches[0]}"):
        family(name, base, unknown=True)

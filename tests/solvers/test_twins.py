"""Coefficient tables equal to those of diffusers, read off its schedulers by one-hot probing.

The tables are compared whole: every network input and the sample, as combinations of the first
input, the model outputs and the draws, in the scheduler's own prediction (epsilon). The
schedulers compute in float32, so agreement means float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers.probing import Table, probe  # noqa: E402

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROUNDING = 3e-6
"""Some tens of roundings of float32; a wrong coefficient is off by 1e-3 and more."""

Times = Callable[[list[float]], list[float]]
LOWEST, ZERO = [0.0], [-1.0]


def to_zero(times: list[float]) -> list[float]:
    return times + ZERO


def to_level_0(times: list[float]) -> list[float]:
    return times + LOWEST


def pairs_to_zero(times: list[float]) -> list[float]:
    """Each step after the first has its stage and its start at one time."""
    return times[:1] + times[1::2] + ZERO


def pndm_steps(times: list[float]) -> list[float]:
    """Three steps of four evaluations, then one evaluation each."""
    return [times[0], times[3], times[7], *times[12:], *LOWEST]


class Case(NamedTuple):
    solver: str
    twin: str
    steps: tuple[int, ...]
    times: Times
    config: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    step: dict[str, Any] = {}  # noqa: RUF012
    lowers: bool = False  # diffusers lowers the last orders below 15 steps


STEPS = (5, 10, 20)
CASES = [
    Case("ddim", "DDIMScheduler", STEPS, to_zero, {"clip_sample": False}),
    Case(
        "ddim",
        "DDIMScheduler",
        STEPS,
        to_level_0,
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    Case(
        "ddim", "DDIMScheduler", STEPS, to_zero, {"clip_sample": False}, {"eta": 0.5}, {"eta": 0.5}
    ),
    Case("ddim", "EulerDiscreteScheduler", (10,), to_zero),
    Case("ddpm", "DDPMScheduler", STEPS, to_zero, {"clip_sample": False}),
    Case(
        "ddpm",
        "DDPMScheduler",
        STEPS,
        to_zero,
        {"clip_sample": False, "variance_type": "fixed_large"},
        {"variance": "large"},
    ),
    Case("ddpm", "EulerAncestralDiscreteScheduler", (10,), to_zero),
    Case(
        "logrhoab1", "DEISMultistepScheduler", STEPS, to_level_0, {"solver_order": 2}, lowers=True
    ),
    Case(
        "logrhoab2", "DEISMultistepScheduler", STEPS, to_level_0, {"solver_order": 3}, lowers=True
    ),
    Case(
        "dpmpp-2m", "DPMSolverMultistepScheduler", STEPS, to_zero, {"solver_order": 2}, lowers=True
    ),
    Case(
        "dpmpp-3m", "DPMSolverMultistepScheduler", STEPS, to_zero, {"solver_order": 3}, lowers=True
    ),
    Case(
        "dpmpp-2m",
        "DPMSolverMultistepScheduler",
        STEPS,
        to_level_0,
        {"solver_order": 2, "final_sigmas_type": "sigma_min"},
        lowers=True,
    ),
    Case(
        "dpmpp-2m-sde",
        "DPMSolverMultistepScheduler",
        STEPS,
        to_zero,
        {"algorithm_type": "sde-dpmsolver++"},
        lowers=True,
    ),
    Case("unipc2", "UniPCMultistepScheduler", STEPS, to_zero, {"solver_order": 2}),
    Case("unipc3", "UniPCMultistepScheduler", STEPS, to_zero, {"solver_order": 3}),
    Case(
        "unipc3",
        "UniPCMultistepScheduler",
        (10,),
        to_level_0,  # bh1 onto sigma = 0 is NaN there
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"variant": "bh1"},
    ),
    Case("pndm", "PNDMScheduler", STEPS, pndm_steps, {"steps_offset": 1}),
    # With these numbers of steps all times are integers: between levels diffusers interpolates
    # sigma / alpha linearly, fewstep its logarithm.
    Case("heun", "HeunDiscreteScheduler", (4, 10, 28), pairs_to_zero),
    Case("rhoab3", "LMSDiscreteScheduler", (10,), to_zero),
    Case("euler-ancestral", "EulerAncestralDiscreteScheduler", (10,), to_zero),
    Case(
        "sa-solver",
        "SASolverScheduler",
        STEPS,
        to_level_0,
        {"tau_func": lambda t: 1.0},
    ),
    Case("lcm", "LCMScheduler", (4,), to_zero, {"clip_sample": False}),
    Case("tcd", "TCDScheduler", (4, 10), to_level_0, {}, {"eta": 0.3}, {"eta": 0.3}),
]
IDS = [f"{c.solver}-{c.twin.removesuffix('Scheduler')}-{n}" for n, c in enumerate(CASES)]


def ours(plan: Plan) -> Tensor:
    flat = plan.flat()
    return torch.cat([flat.a[:, None], flat.B, flat.C], 1)


def theirs(table: Table, draws: int) -> Tensor:
    """The table with the first network input as the initial state, useless last draws dropped."""
    rows = torch.cat([table.inputs, table.output[None]])
    rows[:, 0] = rows[:, 0] / rows[0, 0]
    stored = rows.shape[1] - table.draws + draws
    assert bool((rows[:, stored:] == 0).all()), "a draw that counts was dropped"
    return rows[:, :stored]


def difference(plan: Plan, table: Table) -> float:
    one, two = ours(plan), theirs(table, plan.n_noise)
    assert one.shape == two.shape
    return float(((one - two).abs().amax(1) / two.abs().amax(1).clamp(min=1)).max())


def largest_difference(case: Case, steps: int) -> float:
    scheduler = getattr(diffusers, case.twin)(**case.config)
    table = probe(scheduler, steps, step=case.step)
    options = dict(case.options)
    if case.lowers:
        options["lower_final"] = steps < 15
    schedule = fewstep.schedule("tabulated", alphas_cumprod=scheduler.alphas_cumprod.double())
    plan = fewstep.plan(
        case.solver, schedule, grid="explicit", times=case.times(table.times), **options
    )
    assert plan.times.tolist() == pytest.approx(table.times, abs=1e-6)
    return difference(convert_plan(plan, "eps"), table)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_table_equals_diffusers(case: Case):
    for steps in case.steps:
        assert largest_difference(case, steps) < ROUNDING, f"{steps} steps"


def test_the_comparison_sees_a_wrong_coefficient():
    """Degree 1 against their order 3, and the end of the order left out."""
    deis = Case("logrhoab1", "DEISMultistepScheduler", (10,), to_level_0, {"solver_order": 3})
    assert largest_difference(deis, 10) > 1e-2
    late = Case(
        "dpmpp-2m",
        "DPMSolverMultistepScheduler",
        (10,),
        to_level_0,
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    )
    assert largest_difference(late, 10) > 1e-3


def test_dpm2_is_kdpm2():
    """DPM-Solver-2's stage is the geometric mean of the levels, as in KDPM2; its times are rounded there."""
    scheduler = diffusers.KDPM2DiscreteScheduler()
    table = probe(scheduler, 10)
    schedule = fewstep.schedule("tabulated", alphas_cumprod=scheduler.alphas_cumprod.double())
    times = table.times[:1] + table.times[2::2] + ZERO
    plan = fewstep.plan("dpm2", schedule, grid="explicit", times=times)
    assert plan.times.tolist() == pytest.approx(table.times, abs=1e-3)
    assert difference(plan, table) < ROUNDING


@pytest.mark.parametrize(
    ("solver", "twin"),
    [
        ("dpm2-ancestral", "KDPM2AncestralDiscreteScheduler"),
        ("dpmpp-sde", "DPMSolverSDEScheduler"),
    ],
)
def test_stochastic_steps_with_a_stage(solver: str, twin: str):
    """Their stages are at the same levels; the times of these are rounded there."""
    scheduler = getattr(diffusers, twin)()
    table = probe(scheduler, 8)
    schedule = fewstep.schedule("tabulated", alphas_cumprod=scheduler.alphas_cumprod.double())
    times = table.times[:1] + table.times[2::2] + ZERO
    plan = fewstep.plan(solver, schedule, grid="explicit", times=times)
    assert plan.times.tolist() == pytest.approx(table.times, abs=1e-2)
    assert difference(convert_plan(plan, "eps"), table) < 30 * ROUNDING


def test_sa_solver_of_other_orders():
    """Their coefficients of order 3 are formed in float32 and cancel."""
    config = {"tau_func": lambda t: 0.6, "predictor_order": 3, "corrector_order": 3}
    options = {"predictor": 3, "corrector": 3, "tau": 0.6}
    case = Case("sa-solver", "SASolverScheduler", (10,), to_level_0, config, options)
    assert largest_difference(case, 10) < 10 * ROUNDING


def test_euler_ancestral_on_a_flow():
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=0.7)
    sigmas = [1 - 1e-6, 0.8, 0.55, 0.3, 0.1, 0.0]
    table = probe(scheduler, None, set_timesteps={"sigmas": sigmas})
    # It evaluates the network at sigma = 0 once more, to no effect.
    stored = [k for k in range(table.inputs.shape[1]) if k != len(sigmas)]
    table = Table(table.inputs[:-1, stored], table.output[stored], table.times[:-1], table.draws)
    plan = fewstep.plan(
        "euler-ancestral",
        fewstep.schedule("flow", t_max=1 - 1e-7),
        grid="explicit",
        times=sigmas,
        eta=0.7,
    )
    assert difference(convert_plan(plan, "flow"), table) < ROUNDING


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_ddim(shift: float):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # Their first level is 1, where no data are left: start a little below.
    sigmas = [1 - 1e-6, 0.8, 0.55, 0.3, 0.1]
    table = probe(scheduler, None, set_timesteps={"sigmas": sigmas})
    times = [t / 1000 for t in table.times]
    plan = fewstep.plan(
        "ddim", fewstep.schedule("flow", t_max=1 - 1e-7), grid="explicit", times=[*times, 0.0]
    )
    assert difference(convert_plan(plan, "flow"), table) < ROUNDING


def test_flow_heun_is_heun():
    """Heun in the time of the flow, and Euler in the last step onto 0."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    table = probe(scheduler, 6)
    # Their first level is 1; the tables are those of a start a little below.
    levels = [min(t / 1000, 1 - 1e-6) for t in table.times]
    times = [levels[0], *levels[1::2], 0.0]
    flow = fewstep.schedule("flow", t_max=1 - 1e-7)
    plan = fewstep.plan("heun", flow, grid="explicit", times=times)
    assert difference(convert_plan(plan, "flow"), table) < 3 * ROUNDING


@pytest.mark.parametrize("solver", ["unipc2", "unipc3", "dpmpp-2m"])
def test_flow_multistep(solver: str):
    names = {"dpmpp-2m": "DPMSolverMultistepScheduler"}
    scheduler = getattr(diffusers, names.get(solver, "UniPCMultistepScheduler"))(
        solver_order=3 if solver == "unipc3" else 2,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )
    scheduler.set_timesteps(8)
    table = probe(scheduler, 8)
    # The conditioning timesteps are truncated there; the levels are not.
    times = scheduler.sigmas.double()[:-1].tolist()
    options = {"lower_final": True}
    plan = fewstep.plan(
        solver,
        fewstep.schedule("flow", t_max=1 - 1e-7),
        grid="explicit",
        times=[*times, 0.0],
        **options,
    )
    assert difference(convert_plan(plan, "flow"), table) < ROUNDING

"""The grids of other libraries and papers, against their formulas written out by themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fewstep
from fewstep.base.aliases import ALIASES
from fewstep.diffusion.grids import GRIDS
from fewstep.diffusion.published_grids import AYS_TABLES
from fewstep.diffusion.schedules import NoiseSchedule

SD = fewstep.schedule("ddpm-scaled-linear")
EDM = fewstep.schedule("edm")
FLOW = fewstep.schedule("flow", t_max=1 - 1e-9)
STEPS = (1, 2, 3, 7, 10, 20)
K_STEPS = STEPS[2:]


def sigmas(name: str, schedule: NoiseSchedule, steps: int, **options: object) -> np.ndarray:
    """The noise levels as those libraries have them: sigma of a flow, else sigma / alpha."""
    grid = fewstep.grid(name, schedule, steps, **options)
    assert grid.steps == steps
    return (grid.sigma if schedule.name == "flow" else grid.rho).numpy()


def of_table(timesteps: np.ndarray) -> np.ndarray:
    """Stable Diffusion's levels, log-linear between timesteps, then zero."""
    levels = ((1 - SD.alphas_cumprod) / SD.alphas_cumprod).sqrt().log().numpy()
    return np.append(np.exp(np.interp(timesteps, np.arange(1000), levels)), 0.0)


@pytest.mark.parametrize("steps", K_STEPS)
def test_grids_of_timesteps(steps: int) -> None:
    cases = {
        "normal": np.linspace(999, 0, steps),
        "sgm_uniform": np.linspace(999, 0, steps + 1)[:-1],
        "simple": np.array([999 - int(i * 1000 / steps) for i in range(steps)]),
    }
    for name, timesteps in cases.items():
        assert sigmas(name, SD, steps) == pytest.approx(of_table(timesteps), rel=1e-9), name


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
def test_leading_where_the_number_of_steps_divides_that_of_timesteps(steps: int) -> None:
    timesteps = np.arange(1, 1000, 1000 // steps)[::-1]
    assert sigmas("ddim_uniform", SD, steps) == pytest.approx(of_table(timesteps), rel=1e-9)


@pytest.mark.parametrize("steps", K_STEPS)
def test_flows_step_evenly_in_time(steps: int) -> None:
    """ComfyUI's table of a flow has the levels 1 / 1000 to 1."""
    ends = {"t_start": FLOW.t_max, "t_end": 1e-3}
    even = np.append(np.linspace(1, 1e-3, steps), 0.0)
    assert sigmas("normal", FLOW, steps, **ends) == pytest.approx(even, abs=1e-8)
    even = np.append(np.linspace(1, 1e-3, steps + 1)[:-1], 0.0)
    assert sigmas("sgm_uniform", FLOW, steps, **ends) == pytest.approx(even, abs=1e-8)
    assert sigmas("simple", FLOW, steps) == pytest.approx(np.linspace(1, 0, steps + 1), abs=1e-8)


def test_timesteps_of_edm_are_logarithms() -> None:
    expected = np.append(np.exp(np.linspace(math.log(80), math.log(0.002), 6)), 0.0)
    assert sigmas("normal", EDM, 6) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("name", "a", "b"), [("beta", 0.6, 0.6), ("beta57", 0.5, 0.7)])
def test_beta_has_the_quantiles_of_scipy(name: str, a: float, b: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for steps in K_STEPS:
        shares = stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), a, b)
        expected = of_table(np.rint(shares * 999))
        assert sigmas(name, SD, steps) == pytest.approx(expected, rel=1e-9)
        vp = fewstep.schedule("vp-linear")
        times = fewstep.grid(name, vp, steps).times.numpy()
        assert times[:-1] == pytest.approx(1e-3 + shares * (1 - 1e-3), rel=1e-9)


def test_beta_refuses_quantiles_that_round_to_one_timestep() -> None:
    with pytest.raises(ValueError, match="fall on fewer of the 1000 training timesteps"):
        fewstep.grid("beta", SD, 600)
    with pytest.raises(ValueError, match="alpha must be a number between"):
        fewstep.grid("beta", SD, 5, alpha=0)


@pytest.mark.parametrize("rho", [1.0, 2.5])
def test_polyexponential(rho: float) -> None:
    ramp = np.linspace(1, 0, 7) ** rho
    expected = np.exp(ramp * (math.log(80) - math.log(0.002)) + math.log(0.002))
    assert sigmas("polyexponential", EDM, 6, rho=rho) == pytest.approx(expected, rel=1e-9)
    appended = np.append(expected, 0.0)
    got = sigmas("polyexponential", EDM, 7, rho=rho, to_zero=True)
    assert got == pytest.approx(appended, rel=1e-9)


def test_kl_optimal_is_even_in_the_arctangent() -> None:
    u = np.arange(6) / 5
    expected = np.tan(u * math.atan(0.002) + (1 - u) * math.atan(80))
    got = sigmas("kl-optimal", EDM, 6, to_zero=True)
    assert got == pytest.approx(np.append(expected, 0.0), rel=1e-9)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", [EDM, FLOW, SD], ids=lambda s: s.name)
def test_linear_quadratic(schedule: NoiseSchedule, steps: int) -> None:
    """By the three conditions on the parabola: value and slope where it begins, 1 where it ends."""
    threshold, even = 0.025, steps // 2
    removed = [i * threshold / even for i in range(even)]
    if steps > 1:
        conditions = [[even**2, even, 1], [2 * even, 1, 0], [steps**2, steps, 1]]
        bend = np.linalg.solve(conditions, [threshold, threshold / even, 1])
        removed += [np.polyval(bend, i) for i in range(even, steps)]
    shares = 1 - np.array([*removed, 1.0] if steps > 1 else [0.0, 1.0])
    got = sigmas("linear_quadratic", schedule, steps)
    assert got / got[0] == pytest.approx(shares, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_bong_tangent(steps: int) -> None:
    """Two arcs of an arctangent of 0.2 * 40 / (K + 2) times the index, that meet at one half."""
    n = steps + 2
    middle, slope = int(0.6 * n), 0.2 / (n / 40)
    arcs = []
    for length, pivot, high, low in ((middle, middle, 1.0, 0.5), (n - middle, 0, 0.5, 0.0)):
        curve = (2 / math.pi * np.arctan(-slope * (np.arange(length) - pivot)) + 1) / 2
        arcs.append((curve - curve[-1]) / (curve[0] - curve[-1]) * (high - low) + low)
    expected = np.concatenate([arcs[0][:-1], arcs[1]])
    assert sigmas("bong_tangent", FLOW, steps) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_shift(shift: float) -> None:
    u = np.linspace(1, 0, 8)
    expected = shift * u / (1 + (shift - 1) * u)
    assert sigmas("flow-shift", FLOW, 7, shift=shift) == pytest.approx(expected, abs=1e-7)


def test_dynamic_shift_is_exponential_in_the_number_of_tokens() -> None:
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 768 / 3840 * 0.65)):
        u = np.linspace(1, 1 / 5, 5)
        expected = np.append(math.exp(mu) / (math.exp(mu) + (1 / u - 1)), 0.0)
        got = sigmas("dynamic-shift", FLOW, 5, tokens=tokens)
        assert got == pytest.approx(expected, abs=1e-7)


@pytest.mark.diffusers
def test_shift_is_the_scheduler_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6), mu=1.15)
    got = sigmas("dynamic-shift", FLOW, 6)
    assert got == pytest.approx(scheduler.sigmas.numpy(), abs=1e-6)


@pytest.mark.diffusers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_levels_of_diffusers() -> None:
    """At ten steps linspace has whole timesteps, between which theirs interpolates otherwise."""
    diffusers = pytest.importorskip("diffusers")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for name, options in (
        ("linspace", {"timestep_spacing": "linspace"}),
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
    ):
        scheduler = diffusers.EulerDiscreteScheduler(**config, **options)
        scheduler.set_timesteps(10)
        got = sigmas(name, SD, 10, to_zero=True)
        assert got == pytest.approx(scheduler.sigmas.numpy(), rel=1e-4), name


def test_vp_levels_of_k_diffusion() -> None:
    t = np.linspace(1, 1e-3, 6)
    expected = np.append(np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), 0.0)
    got = sigmas("vp", fewstep.schedule("vp-linear"), 6, to_zero=True)
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.diffusers
def test_ays_has_the_published_levels() -> None:
    diffusers = pytest.importorskip("diffusers.schedulers")
    published = diffusers.AysSchedules
    for table, key in (("sd15", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")):
        got = sigmas("ays", SD, 10, table=table)
        assert got == pytest.approx(published[key], rel=2e-4), table
    svd = fewstep.schedule("vp-sigma")
    got = sigmas("ays", svd, 10, table="svd")
    assert got == pytest.approx(published["StableDiffusionVideoSigmas"], rel=1e-9)
    # Other numbers of steps: log-linear in the index.
    levels = np.log(AYS_TABLES["svd"])
    between = np.exp(np.interp(np.linspace(0, 10, 8), np.arange(11), levels))
    got = sigmas("ays", svd, 7, table="svd")
    assert got[:-1] == pytest.approx(between[:-1], rel=1e-9)
    with pytest.raises(ValueError, match=r"begins at sigma / alpha = 14\.615, 'edm' at 80"):
        fewstep.grid("ays", EDM, 10)


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "explicit"])
def test_every_grid_has_its_ends_on_every_schedule(name: str) -> None:
    options = inspect_options(name)
    for where in ("vp-linear", "vp-cosine", "ve", "edm", "flow", "ddpm-linear", "vp-sigma"):
        schedule = fewstep.schedule(where)
        if name == "leading" and not schedule.discrete:
            with pytest.raises(ValueError, match="take 'simple'"):
                fewstep.grid(name, schedule, 5)
            continue
        if name == "ays":
            continue
        grid = fewstep.grid(name, schedule, 5, to_zero=True)
        assert grid.ends_at_zero
        if name != "leading":
            assert float(grid.times[0]) == schedule.t_max
        open_end = fewstep.grid(name, schedule, 5, to_zero=False)
        assert (open_end.steps, open_end.ends_at_zero) == (5, False)
        if "strength" in options:
            part = fewstep.grid(name, schedule, 5, strength=0.5)
            assert float(part.times[0]) < schedule.t_max


def inspect_options(name: str) -> set[str]:
    from fewstep.sampling.planning import grid_options

    return set(grid_options(name))


def test_the_names_of_others_are_found_and_stored_as_ours() -> None:
    request = fewstep.SamplerRequest(solver="ddim", nfe=5, grid="beta57")
    assert (request.grid, request.options) == ("beta", {"alpha": 0.5, "beta": 0.7})
    given = fewstep.SamplerRequest(solver="ddim", nfe=5, grid="beta57", options={"beta": 0.9})
    assert given.options == {"alpha": 0.5, "beta": 0.9}
    plan = fewstep.plan("ddim", SD, nfe=5, grid="beta57")
    assert torch.equal(plan.knots, fewstep.grid("beta", SD, 5, alpha=0.5, beta=0.7).times)
    with pytest.raises(
        ValueError, match=r"Did you mean 'bong_tangent'|Did you mean 'bong-tangent'"
    ):
        fewstep.grid("bong_tangant", SD, 5)


def test_a_grid_that_ends_at_zero_meets_the_budget_of_a_method_of_two_stages() -> None:
    plan = fewstep.plan("dpm2", SD, nfe=9, grid="simple")
    assert (plan.nfe, plan.ends_at_zero, len(plan.knots)) == (9, True, 6)


def test_every_row_of_the_table_of_names_is_whole() -> None:
    seen = set()
    for row in ALIASES:
        assert (row.kind, row.name) not in seen
        seen.add((row.kind, row.name))
        registry = {"grid": fewstep.GRIDS, "solver": fewstep.SOLVERS}[row.kind]
        assert (row.ours in registry) == (row.match != "none"), row.name
        assert row.note or row.match == "equal", row.name

"""Options of the levels hold however the grid is given: by count, by sigmas, by timesteps; against formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fewstep
import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
from fewstep.adapters.diffusers import PlanScheduler  # noqa: E402

pytestmark = tiny.MARKS

MU = 1.15

Levels = list[float]


def flow(**options: Any) -> Any:
    config = diffusers.FlowMatchEulerDiscreteScheduler(**options).config
    return PlanScheduler.from_config(config, solver="ddim")


def shifted(levels: Levels, a: float) -> Levels:
    return [a * s / (1 + (a - 1) * s) for s in levels]


def stretched(levels: Levels, end: float) -> Levels:
    if levels[-1] == 1:
        return levels
    return [1 - (1 - s) * (1 - end) / (1 - levels[-1]) for s in levels]


def ramp(levels: Levels, to: Callable[[float], float], back: Callable[[float], float]) -> Levels:
    n, high, low = len(levels), to(levels[0]), to(levels[-1])
    return [back(high + (low - high) * i / max(n - 1, 1)) for i in range(n)]


def karras(levels: Levels) -> Levels:
    return ramp(levels, lambda s: s ** (1 / 7), lambda r: r**7)


def exponential(levels: Levels) -> Levels:
    return ramp(levels, math.log, math.exp)


def beta(levels: Levels) -> Levels:
    stats = pytest.importorskip("scipy.stats")
    n, high, low = len(levels), levels[0], levels[-1]
    places = [1 - i / max(n - 1, 1) for i in range(n)]
    return [low + float(stats.beta.ppf(p, 0.6, 0.6)) * (high - low) for p in places]


OPTIONS: dict[str, tuple[dict[str, Any], Callable[[Levels], Levels]]] = {
    "none": ({}, lambda s: s),
    "shift": ({"shift": 3.0}, lambda s: shifted(s, 3.0)),
    "mu": ({"use_dynamic_shifting": True}, lambda s: shifted(s, math.exp(MU))),
    "linear mu": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        lambda s: shifted(s, MU),
    ),
    "terminal": ({"shift_terminal": 0.1}, lambda s: stretched(s, 0.1)),
    "shift and terminal": (
        {"shift": 3.0, "shift_terminal": 0.1},
        lambda s: stretched(shifted(s, 3.0), 0.1),
    ),
    "karras": ({"use_karras_sigmas": True}, karras),
    "shift and karras": (
        {"shift": 3.0, "use_karras_sigmas": True},
        lambda s: karras(shifted(s, 3.0)),
    ),
    "exponential": ({"use_exponential_sigmas": True}, exponential),
    "beta": ({"use_beta_sigmas": True}, beta),
    "terminal and beta": (
        {"shift_terminal": 0.1, "use_beta_sigmas": True},
        lambda s: beta(stretched(s, 0.1)),
    ),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_of_flows_hold_however_the_grid_is_given(name):
    for given, n in itertools.product(("count", "sigmas", "timesteps"), (1, 2, 4, 7)):
        _options_hold(name, given, n)


def _options_hold(name, given, n):
    options, formula = OPTIONS[name]
    ours = flow(**options)
    points = [1 - i / n for i in range(n)]
    mu = {"mu": MU} if "mu" in name else {}
    if given == "count":
        low = 1e-3 if mu else shifted([1e-3], options.get("shift", 1.0))[0]
        points = [1 + (low - 1) * i / max(n - 1, 1) for i in range(n)]
        ours.set_timesteps(n, **mu)
    elif given == "sigmas":
        ours.set_timesteps(sigmas=points, **mu)
    else:
        ours.set_timesteps(timesteps=[1000 * s for s in points], **mu)
    want = formula(points)
    assert ours.sigmas.tolist() == pytest.approx([*want, 0.0], abs=2e-6)
    assert ours.timesteps.tolist() == pytest.approx([1000 * s for s in want], abs=2e-3)


@pytest.mark.parametrize("given", ["count", "sigmas"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_they_are_those_of_diffusers(name, given):
    """By timesteps diffusers conditions on the given ones while the levels are others; see its warning."""
    options, _ = OPTIONS[name]
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    ours = PlanScheduler.from_config(theirs.config, solver="ddim")
    setting: dict[str, Any] = {"mu": MU} if "mu" in name else {}
    setting |= {"num_inference_steps": 5} if given == "count" else {"sigmas": [1.0, 0.7, 0.5, 0.2]}
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**setting)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=2e-6)
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=2e-3)


def test_the_terminal_level_of_the_levels_that_pipelines_pass():
    """As LTX pipelines do: levels 1, .75, .5, .25 by a shift of 3 are 1, .9, .75, .5, stretched to .1."""
    ours = flow(shift=3.0, shift_terminal=0.1)
    ours.set_timesteps(sigmas=torch.linspace(1, 1 / 4, 4).numpy())
    assert ours.sigmas.tolist() == pytest.approx([1, 0.82, 0.55, 0.10, 0], abs=1e-5)


def test_a_shift_in_flow_terms_of_other_schedulers():
    config = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, shift_terminal=0.1
    ).config
    ours = PlanScheduler.from_config(config, solver="unipc2")
    ours.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert ours.sigmas.tolist() == pytest.approx([1, 0.82, 0.55, 0.10, 0], abs=1e-5)


# Models with training timesteps: sigma is sigma / alpha, options are spacings between the first and the last level.

SPACINGS: dict[str, tuple[dict[str, Any], Callable[[Levels], Levels]]] = {
    "none": ({}, lambda s: s),
    "karras": ({"use_karras_sigmas": True}, karras),
    "exponential": ({"use_exponential_sigmas": True}, exponential),
    "lu": ({"use_lu_lambdas": True}, exponential),
    "beta": ({"use_beta_sigmas": True}, beta),
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("given", ["count", "sigmas", "timesteps"])
@pytest.mark.parametrize("name", list(SPACINGS))
def test_spacings_of_trained_levels_hold_however_the_grid_is_given(name, given, n):
    options, formula = SPACINGS[name]
    ours = PlanScheduler(solver="ddim", timestep_spacing="linspace", **options)
    rho = ((1 - ours.alphas_cumprod.double()) / ours.alphas_cumprod.double()).sqrt()
    times = [999, 700, 400, 100, 7][:n]
    levels = rho[times].tolist()
    if given == "count":
        ours.set_timesteps(n)
        levels = rho[[999, 749, 500, 250, 0][:n]].tolist()
        if name != "none" and n == 1:
            levels = rho[[999]].tolist()
    elif given == "sigmas":
        ours.set_timesteps(sigmas=[*levels, 0.0])
    else:
        ours.set_timesteps(timesteps=times)
    want = formula(levels)
    assert ours.sigmas.tolist() == pytest.approx([*want, 0.0], rel=1e-4)
    # The network is conditioned on the time that belongs to each level.
    timesteps = ours.schedule.time(-torch.tensor(want, dtype=torch.float64).log())
    assert ours.timesteps.tolist() == pytest.approx(timesteps.tolist(), abs=2e-3)


@pytest.mark.parametrize("solver", ["tab3", "dpmpp-2m"])
def test_given_levels_end_above_zero_if_asked(solver):
    ours = PlanScheduler(solver=solver, final_sigmas_type="sigma_min", use_karras_sigmas=True)
    ours.set_timesteps(sigmas=[100.0, 10.0, 1.0])
    lowest = float(((1 - ours.alphas_cumprod[0]) / ours.alphas_cumprod[0]).sqrt())
    assert float(ours.sigmas[-1]) == pytest.approx(lowest, rel=1e-5)
    assert ours.sigmas[:3].tolist() == pytest.approx(karras([100.0, 10.0, 1.0]), rel=1e-4)


# Levels of our own in pipelines that always pass sigmas.


def even(n: int) -> Levels:
    return torch.linspace(1, 1 / n, n).tolist()


def own_levels(kind: str) -> dict[str, Any]:
    if kind == "grid":
        return {"solver": "tab2", "grid": "quadratic"}
    if kind == "recipe":
        return {"recipe": fewstep.SamplerRecipe(name="tab2", nfe=6, grid="quadratic").to_json()}
    schedule = PlanScheduler(prediction_type="flow_prediction").schedule
    return {"recipe": fewstep.plan("tab2", schedule, nfe=6, grid="quadratic").to_json()}


@pytest.mark.parametrize("kind", ["plan", "recipe", "grid"])
def test_own_levels_run_in_pipelines_that_pass_sigmas(kind):
    ours = PlanScheduler(prediction_type="flow_prediction", **own_levels(kind))
    ours.set_timesteps(6)
    want = ours.sigmas.clone(), ours.plan.to_json()
    ours.set_timesteps(sigmas=even(6))
    assert torch.equal(ours.sigmas, want[0])
    assert ours.plan.to_json() == want[1]
    if kind == "plan":  # its own levels given back, as sigmas or as timesteps
        timesteps = ours.timesteps.tolist()
        ours.set_timesteps(sigmas=want[0].tolist())
        ours.set_timesteps(timesteps=timesteps)
        assert ours.plan.to_json() == want[1]
    if kind != "grid":
        with pytest.raises(ValueError, match="num_inference_steps=6"):
            ours.set_timesteps(sigmas=even(5))
    with pytest.raises(ValueError, match="leave sigmas out"):
        ours.set_timesteps(sigmas=[1.0, 0.9, 0.8, 0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="leave timesteps out"):
        ours.set_timesteps(timesteps=[1000.0, 900.0, 100.0])


@pytest.mark.parametrize("values", [[], "abc", [1.0, None]])
def test_what_is_no_list_of_numbers_is_named(values):
    ours = PlanScheduler(solver="tab3")
    for name in ("sigmas", "timesteps"):
        with pytest.raises(ValueError, match=name):
            ours.set_timesteps(**{name: values})


def test_the_same_request_is_planned_once():
    """Operations of a second ``set_timesteps``: none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    for arguments in ({"num_inference_steps": 20}, {"sigmas": [80.0, 10.0, 1.0]}):
        ours = PlanScheduler(solver="unipc3")
        ours.set_timesteps(**arguments)
        first = ours.timesteps
        with Count() as count:
            ours.set_timesteps(**arguments)
        assert count.calls == 0
        assert torch.equal(ours.timesteps, first)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_heun_spaces_between_the_timesteps_of_its_configuration(option, spacing):
    """As its twin does; the multistep schedulers space between all levels, whatever the spacing."""
    twin = diffusers.HeunDiscreteScheduler(timestep_spacing=spacing, **{option: True})
    ours = PlanScheduler.from_config(twin.config, solver="heun")
    for scheduler in (twin, ours):
        scheduler.set_timesteps(4)
    torch.testing.assert_close(ours.timesteps.double(), twin.timesteps.double(), rtol=0, atol=0.01)

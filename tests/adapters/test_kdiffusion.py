"""Samplers in k-diffusion's signature: equal to the published rules, written out here in sigma.

Once, by hand, the same comparison was made with k-diffusion 0.1.1 itself and its Brownian tree: the eleven
samplers of both libraries agree to 2e-14 in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.adapters import kdiffusion
from fewstep.base.aliases import ALIASES, COMFY, KDIFF
from fewstep.models.exact import smooth
from fewstep.sampling.profile import Profile, ProfileEntry
from fewstep.solvers import SOLVERS
from reference import normal

EDM, FLOW, SD = (fewstep.schedule(n) for n in ("edm", "flow", "ddpm-scaled-linear"))
EXACT = smooth(EDM)
Draw = Callable[[float, float], Tensor]


def model(x: Tensor, sigma: Tensor) -> Tensor:
    return EXACT(x, sigma, prediction="x0")


def karras(steps: int, low: float = 0.03, high: float = 14.6) -> Tensor:
    return fewstep.grid("karras", EDM, steps, t_start=high, t_end=low, to_zero=True).times


X = normal(4, 2, seed=1) * 14.6


class Path:
    """Brownian motion in sigma: the noise sampler of SDE samplers, its increments made of fixed pieces."""

    def __init__(self, sigmas: Tensor, between: int = 1) -> None:
        levels = sigmas.tolist()
        self.pieces: dict[tuple[float, float], Tensor] = {}
        self.levels = levels
        self.seed = 0

    def __call__(self, start: Any, end: Any) -> Tensor:
        """The normalised increment; of the whole of a step that was asked in two parts, their sum."""
        a, b = float(start), float(end)
        inner = [(p, q) for p, q in self.pieces if p <= a * (1 + 1e-9) and q >= b * (1 - 1e-9)]
        key = next(((p, q) for p, q in inner if math.isclose(p, a) and math.isclose(q, b)), None)
        if key is not None:
            return self.pieces[key]
        first = next(((p, q) for p, q in inner if math.isclose(p, a)), None)
        if first is not None:
            rest = self(first[1], b)
            near, far = first[0] - first[1], first[1] - b
            return (near**0.5 * self.pieces[first] + far**0.5 * rest) / (a - b) ** 0.5
        self.seed += 1
        self.pieces[(a, b)] = normal(4, 2, seed=100 + self.seed)
        return self.pieces[(a, b)]


# The rules, in sigma.
def _down_up(start: float, end: float, eta: float = 1.0) -> tuple[float, float]:
    up = min(end, eta * end * math.sqrt(start**2 - end**2) / start)
    return math.sqrt(end**2 - up**2), up


def euler(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        x = x + (b - a) * (x - _d(x, a)) / a
    return x


def _d(x: Tensor, sigma: float) -> Tensor:
    return model(x, torch.full((len(x),), sigma, dtype=x.dtype))


def heun(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        one = (x - _d(x, a)) / a
        ahead = x + (b - a) * one
        two = one if b == 0 else (ahead - _d(ahead, b)) / b
        x = x + (b - a) * (one + two) / 2
    return x


def dpm_2(x: Tensor, s: list[float], draw: Draw, noisy: bool = False) -> Tensor:
    for a, b in itertools.pairwise(s):
        slope = (x - _d(x, a)) / a
        down, up = _down_up(a, b) if noisy else (b, 0.0)
        if b > 0:
            mid = math.sqrt(a * down)
            ahead = x + (mid - a) * slope
            slope = (ahead - _d(ahead, mid)) / mid
        x = x + (down - a) * slope
        if noisy and b > 0:
            x = x + up * draw(a, b)
    return x


def dpm_2_ancestral(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    return dpm_2(x, s, draw, noisy=True)


def euler_ancestral(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        down, up = _down_up(a, b)
        x = x + (down - a) * (x - _d(x, a)) / a
        if b > 0:
            x = x + up * draw(a, b)
    return x


def lms(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    """The polynomial through the last four slopes in sigma, integrated exactly by numpy."""
    slopes: list[Tensor] = []
    for i, (a, b) in enumerate(itertools.pairwise(s)):
        slopes = [*slopes[-3:], (x - _d(x, a)) / a]
        nodes = s[i + 1 - len(slopes) : i + 1]
        for j, slope in enumerate(slopes):
            others = nodes[:j] + nodes[j + 1 :]
            basis = np.atleast_1d(np.poly(others)) / np.prod([nodes[j] - o for o in others])
            area = np.polyint(basis)
            x = x + (np.polyval(area, b) - np.polyval(area, a)) * slope
    return x


def dpmpp_2m(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    old, last = None, 0.0
    for a, b in itertools.pairwise(s):
        data = new = _d(x, a)
        h = math.log(a / b) if b > 0 else math.inf
        if old is not None and b > 0:
            data = new + h / (2 * last) * (new - old)
        x = b / a * x + (1 - b / a) * data
        old, last = new, h
    return x


def dpmpp_2m_sde(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    old, last = None, 0.0
    for a, b in itertools.pairwise(s):
        new = _d(x, a)
        if b == 0:
            return new
        h = math.log(a / b)
        share = 1 - math.exp(-2 * h)
        x = b / a * math.exp(-h) * x + share * new
        if old is not None:
            x = x + share * h / (2 * last) * (new - old)
        x = x + b * math.sqrt(share) * draw(a, b)
        old, last = new, h
    return x


def dpmpp_3m_sde(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    history: list[tuple[Tensor, float]] = []
    for a, b in itertools.pairwise(s):
        new = _d(x, a)
        if b == 0:
            return new
        h = math.log(a / b)
        z = 2 * h
        x = math.exp(-z) * x + (1 - math.exp(-z)) * new
        two = (math.exp(-z) - 1) / z + 1
        if len(history) > 1:
            (d1, h1), (d2, h2) = history[-1], history[-2]
            near, far = (new - d1) * h / h1, (d1 - d2) * h / h2
            curve = (near - far) * h / (h1 + h2)
            x = x + two * (near + curve * h1 / h) - (two / z - 0.5) * curve
        elif history:
            d1, h1 = history[-1]
            x = x + two * (new - d1) * h / h1
        x = x + b * math.sqrt(1 - math.exp(-2 * h)) * draw(a, b)
        history.append((new, h))
    return x


def dpmpp_2s_ancestral(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        new = _d(x, a)
        if b == 0:
            return new
        down, up = _down_up(a, b)
        mid = math.sqrt(a * down)
        inner = _d(mid / a * x + (1 - mid / a) * new, mid)
        x = down / a * x + (1 - down / a) * inner + up * draw(a, b)
    return x


def dpmpp_sde(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        new = _d(x, a)
        if b == 0:
            return new
        mid = math.sqrt(a * b)
        down, up = _down_up(a, mid)
        inner = down / a * x + (1 - down / a) * new + up * draw(a, mid)
        inner = _d(inner, mid)
        down, up = _down_up(a, b)
        x = down / a * x + (1 - down / a) * inner + up * draw(a, b)
    return x


def res_multistep(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    old, last = None, 0.0
    for a, b in itertools.pairwise(s):
        new = _d(x, a)
        h = math.log(a / b) if b > 0 else math.inf
        x = b / a * x + (1 - b / a) * new
        if old is not None and b > 0:
            two = (math.exp(-h) - 1 + h) / h**2
            x = x + h * two * (new - old) * h / last
        old, last = new, h
    return x


def ipndm(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    table = (
        (1,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )
    slopes: list[Tensor] = []
    for a, b in itertools.pairwise(s):
        slopes = [(x - _d(x, a)) / a, *slopes[:3]]
        x = x + (b - a) * sum(w * d for w, d in zip(table[len(slopes) - 1], slopes, strict=True))
    return x


def gradient_estimation(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    before = None
    for a, b in itertools.pairwise(s):
        slope = (x - _d(x, a)) / a
        bar = slope if before is None or b == 0 else 2 * slope - before
        x, before = x + (b - a) * bar, slope
    return x


def lcm(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    for a, b in itertools.pairwise(s):
        x = _d(x, a) + (b * draw(a, b) if b > 0 else 0.0)
    return x


def ddpm(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    """The posterior of a point: mean and variance of x at b, given x at a and the data."""
    for a, b in itertools.pairwise(s):
        share = (b / a) ** 2
        x = share * x + (1 - share) * _d(x, a)
        x = x + (b * math.sqrt(1 - share) * draw(a, b) if b > 0 else 0.0)
    return x


def er_sde(x: Tensor, s: list[float], draw: Draw) -> Tensor:
    """With their sums of 200 points instead of integrals."""

    def scale(v: Any) -> Any:
        return v * (np.exp(v**0.3) + 10)

    outputs: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (a, b) in enumerate(itertools.pairwise(s)):
        outputs.append(_d(x, a))
        if b == 0:
            return outputs[-1]
        ratio = scale(b) / scale(a)
        x = ratio * x + (1 - ratio) * outputs[-1]
        width = (a - b) / 200
        points = b + np.arange(200) * width
        if i:
            slopes.append((outputs[-1] - outputs[-2]) / (a - s[i - 1]))
            x = x + (b - a + scale(b) * (width / scale(points)).sum()) * slopes[-1]
        if i > 1:
            curve = (slopes[-1] - slopes[-2]) * 2 / (a - s[i - 2])
            moment = (width * (points - a) / scale(points)).sum()
            x = x + ((b - a) ** 2 / 2 + scale(b) * moment) * curve
        x = x + math.sqrt(b**2 - (ratio * a) ** 2) * draw(a, b)
    return x


RULES: dict[str, Callable[[Tensor, list[float], Draw], Tensor]] = {
    rule.__name__: rule
    for rule in (
        *(euler, heun, dpm_2, lms, dpmpp_2m, res_multistep, ipndm),
        *(euler_ancestral, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, dpmpp_2m_sde),
        *(dpmpp_3m_sde, lcm, ddpm, gradient_estimation),
    )
}


@pytest.mark.parametrize("name", RULES)
def test_equal_to_the_published_rule(name: str) -> None:
    for sigmas in (karras(8), torch.tensor([14.6, 3.0, 1.1, 0.0], dtype=torch.float64)):
        path = Path(sigmas)
        got = kdiffusion.sampler(model, X, sigmas, solver=name, noise_sampler=path)
        expected = RULES[name](X, sigmas.tolist(), path)
        assert float((got - expected).abs().max()) < 1e-9


def test_er_sde_is_near_theirs_with_sums_for_integrals() -> None:
    sigmas = karras(8)
    path = Path(sigmas)
    got = kdiffusion.sampler(model, X, sigmas, solver="er_sde", noise_sampler=path)
    expected = er_sde(X, sigmas.tolist(), path)
    assert 1e-6 < float((got - expected).abs().max()) < 0.05


def test_every_equal_name_of_k_diffusion_has_its_rule_here() -> None:
    named = {
        row.name
        for row in ALIASES
        if row.kind == "solver" and row.match == "equal" and KDIFF in row.where
    }
    assert named <= set(RULES)
    comfy = {
        row.name.removesuffix("_gpu")
        for row in ALIASES
        if row.kind == "solver" and row.match == "equal" and COMFY in row.where
    }
    assert comfy <= {*RULES, "ddim"}  # in sigma, ddim is euler


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_runs(name: str) -> None:
    sigmas, calls = karras(4, low=0.1), [0]

    def counting(x: Tensor, sigma: Tensor, scale: float) -> Tensor:
        calls[0] += 1
        assert (x.dtype, sigma.shape, scale) == (torch.float32, (len(x),), 2.0)
        return model(x.double(), sigma.double()).float()

    options = {"rtol": 1e-2, "atol": 1e-2} if name == "dopri5" else {}
    x = X.float()
    if name == "dopri5":
        with pytest.raises(ValueError, match="sample one at a time"):
            kdiffusion.sampler(counting, x, sigmas, {"scale": 2.0}, solver=name)
        x = x[:1]
    got = kdiffusion.sampler(
        counting, x, sigmas.float(), {"scale": 2.0}, None, True, solver=name, **options
    )
    assert (got.dtype, got.shape) == (torch.float32, x.shape)
    assert bool(got.isfinite().all())
    if name != "dopri5":
        assert calls[0] == SOLVERS[name]().nfe(4, ends_at_zero=True)
    assert torch.equal(x, X.float()[: len(x)])


def test_the_callback_sees_each_evaluation() -> None:
    seen: list[dict[str, Any]] = []
    sigmas = karras(3)
    kdiffusion.sampler(model, X, sigmas, callback=seen.append, solver="heun")
    assert [s["evaluation"] for s in seen] == list(range(5))
    assert [s["i"] for s in seen] == [0, 0, 1, 1, 2]
    levels = sigmas.tolist()
    at = [levels[0], levels[1], levels[1], levels[2], levels[2]]
    assert [float(s["sigma_hat"]) for s in seen] == pytest.approx(at)
    assert [float(s["sigma"]) for s in seen] == pytest.approx([levels[i] for i in (0, 0, 1, 1, 2)])
    for s in seen:
        expected = model(s["x"], s["sigma_hat"].expand(4))
        assert torch.equal(s["denoised"], expected)  # nothing was overwritten since


def test_grids_of_ours_between_the_ends() -> None:
    sigmas = karras(6)
    levels = []
    kdiffusion.sampler(
        model, X, sigmas, callback=lambda s: levels.append(float(s["sigma_hat"])),
        solver="euler", grid="exponential",
    )  # fmt: skip
    expected = np.exp(np.linspace(math.log(14.6), math.log(0.03), 6))
    assert levels == pytest.approx(expected, rel=1e-9)


def test_a_recipe_and_a_profile_of_another_schedule() -> None:
    """Made on Stable Diffusion's table, run on a denoised model in sigma: the samples of fewstep.sample."""
    exact = smooth(SD)
    top = float(SD.rho(torch.tensor(999.0, dtype=torch.float64)))
    sigmas = torch.tensor([top, 3.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    times = (999.0, 700.0, 400.0, 150.0, 20.0, -1.0)
    profile = Profile(SD, "", (ProfileEntry("tab2", times),), {5: "tab2"})
    noise = normal(4, 2, seed=5)
    # Their initial state is sigma z of the prior in sigma; ours in the scale of the table.
    expected = fewstep.sample(exact, noise=noise, profile=profile, nfe=5)
    got = kdiffusion.sampler(model, noise * top, sigmas, profile=profile)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    recipe = fewstep.SamplerRecipe(name="unipc2", nfe=6, grid="simple", schedule=SD.to_record())
    expected = fewstep.sample(exact, noise=noise, recipe=recipe)
    got = kdiffusion.sampler(model, noise * top, sigmas, recipe=recipe)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 5, but the recipe begins at 14\.6"):
        kdiffusion.sampler(model, noise, torch.tensor([5.0, 1.0]), recipe=recipe)


def test_wrappers_of_eps_models() -> None:
    """The rule of CompVisDenoiser: x - sigma eps(x / sqrt(1 + sigma^2), t(sigma))."""
    exact = smooth(SD)

    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        c_in = 1 / (1 + sigma**2).sqrt()
        t = SD.time(-sigma.log())
        return x - sigma[:, None] * exact(x * c_in[:, None], t, prediction="eps")

    times = [999.0, 600.0, 300.0, 80.0]
    levels = SD.rho(torch.tensor(times, dtype=torch.float64))
    sigmas = torch.cat([levels, levels.new_zeros(1)])
    noise = normal(4, 2, seed=6)
    got = kdiffusion.sampler(wrapped, noise * levels[0], sigmas, solver="tab3", schedule=SD)
    expected = fewstep.sample(exact, noise=noise, solver="tab3", options={"times": [*times, -1.0]})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_flows_of_comfyui(name: str) -> None:
    exact = smooth(FLOW)

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        return exact(x, sigma, prediction="x0")

    sigmas = torch.tensor([0.99, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
    noise = normal(4, 2, seed=7)
    draws = iter([normal(4, 2, seed=k) for k in range(20, 30)])
    got = kdiffusion.sampler(
        denoised, noise, sigmas, solver=name, flow=True, noise_sampler=lambda a, b: next(draws)
    )
    plan = fewstep.plan(name, FLOW, times=sigmas.tolist())
    draws = iter([normal(4, 2, seed=k) for k in range(20, 30)])
    from fewstep.plans.execute import execute

    expected = execute(
        plan,
        lambda x, t: exact(x, t, prediction=plan.prediction),
        noise,
        draw=lambda k: next(draws),
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    # From pure noise, where eps is not defined.
    whole = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert bool(
        kdiffusion.sampler(denoised, noise, whole, solver=name, flow=True).isfinite().all()
    )


def test_each_sample_has_its_own_path_at_any_number_of_steps() -> None:
    coarse, fine = karras(6), karras(6)
    one = kdiffusion.sampler(model, X, coarse, solver="dpmpp_2m_sde", seed=3)
    alone = kdiffusion.sampler(model, X[:1], fine, solver="dpmpp_2m_sde", seed=3)
    torch.testing.assert_close(one[:1], alone, rtol=0, atol=1e-12)
    torch.manual_seed(5)
    first = kdiffusion.sampler(model, X, coarse, solver="dpmpp_2m_sde")
    second = kdiffusion.sampler(model, X, coarse, solver="dpmpp_2m_sde")
    torch.manual_seed(5)
    again = kdiffusion.sampler(model, X, coarse, solver="dpmpp_2m_sde")
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_named_sampler() -> None:
    function = kdiffusion.named("dpmpp_2m")
    assert function.__name__ == "sample_dpmpp_2m"
    sigmas = karras(4)
    expected = kdiffusion.sampler(model, X, sigmas, solver="dpmpp_2m")
    assert torch.equal(function(model, X, sigmas, None, None, True), expected)
    with pytest.raises(ValueError, match="Did you mean 'dpmpp-2m'"):
        kdiffusion.named("dpmpp_2n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": [1.0]}, "x must be a floating tensor"),
        ({"x": X[0]}, r"x must be a floating tensor with shape \(B, ...\), got shape \(2,\)"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be a tensor of at least 2"),
        ({"sigmas": torch.tensor([1.0, 2.0])}, r"decrease strictly, got sigmas\[0\] = 1"),
        ({"sigmas": torch.tensor([1.0, -2.0])}, "at least 0"),
        ({"sigmas": torch.tensor([2.0, 0.5]), "flow": True}, "of a flow are at most 1, got 2"),
        ({"model": 3}, "model must be callable"),
        ({"solver": "eulr"}, "Did you mean 'euler'"),
        ({"eta": 0.5, "solver": "heun"}, "eta"),
        ({"recipe": "no.json", "solver": "heun"}, "a recipe has its solver"),
        (
            {"solver": "edm-stochastic", "noise_sampler": Path(karras(3))},
            "leave noise_sampler out",
        ),
        (
            {"solver": "ddpm", "noise_sampler": lambda a, b: X[0]},
            "noise_sampler must return noise",
        ),
        ({"model": lambda x, s: x[:, 0]}, "must return the denoised data with the shape of x"),
        ({"solver": "dopri5", "grid": "karras"}, "leave grid out"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], reason: str) -> None:
    given = {"model": model, "x": X, "sigmas": karras(3), **change}
    with pytest.raises((ValueError, TypeError), match=reason):
        kdiffusion.sampler(**given)

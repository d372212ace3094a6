"""Adaptive sampling, frozen runs and likelihoods, against scipy and closed forms."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.diffusion.noise import NoiseSource
from fewstep.models import exact
from fewstep.sampling.adaptive import AdaptiveSampler, freeze
from fewstep.sampling.likelihood import log_likelihood
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.protocol import Run, Trajectory
from fewstep.sampling.recipe import SamplerRecipe

pytestmark = pytest.mark.slow  # much is computed: `pytest -m "not slow"` is for while one writes

VP = fewstep.schedule("vp-linear")
TOYS = {"smooth": exact.smooth, "sharp": exact.sharp}


def starts(n: int, seed: int = 0) -> Tensor:
    return torch.randn((n, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(denoiser, x: Tensor, *, save: bool = False, **options) -> Trajectory:
    run = Run(NoiseSource(0, range(len(x))), save=save)
    return AdaptiveSampler(denoiser, **options).run(x, run)


@cache
def tight(toy: str, n: int, tolerance: float = 1e-11) -> Trajectory:
    options = {"rtol": tolerance, "atol": tolerance, "max_steps": 5000}
    return solved(TOYS[toy](VP), starts(n), save=True, **options)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def by_scipy(denoiser, x: Tensor, times: Tensor) -> Tensor:
    """The states at times of the ODE dy/dlog rho = rho eps, by scipy's method of order 8."""
    from scipy.integrate import solve_ivp

    schedule, u = denoiser.schedule, -denoiser.schedule.lam(times)

    def slope(at: float, y: numpy.ndarray) -> numpy.ndarray:
        t = schedule.time(torch.tensor(-at, dtype=torch.float64))
        state = schedule.alpha(t) * torch.from_numpy(y).reshape(x.shape)
        return (math.exp(at) * denoiser(state, t)).numpy().ravel()

    start = (x / schedule.alpha(times[0])).numpy().ravel()
    done = solve_ivp(
        slope, (u[0], u[-1]), start, "DOP853", t_eval=u.numpy(), rtol=1e-11, atol=1e-11
    )
    return torch.from_numpy(done.y.T).reshape(-1, *x.shape) * schedule.alpha(times)[:, None, None]


# --- sampling ---


@pytest.mark.parametrize("name", ["vp-linear", "flow", "edm"])
def test_agrees_with_scipy(name):
    denoiser = exact.smooth(fewstep.schedule(name))
    sampler = AdaptiveSampler(denoiser, rtol=1e-9, atol=1e-9)
    x = sampler.start(starts(3))
    result = sampler.run(x, Run(NoiseSource(0, range(3)), save=True))
    expected = by_scipy(denoiser, x, result.times)
    size = expected.abs().amax(dim=(1, 2))[:, None, None]
    assert result.times[0] == denoiser.schedule.t_max
    assert result.times[-1] == denoiser.schedule.t_min
    assert float(((result.states - expected) / size).abs().max()) < 1e-7
    assert torch.equal(result.states[0], x)
    assert torch.equal(result.states[-1], result.x)


@pytest.mark.slow
def test_error_follows_the_tolerance_at_order_five():
    reference = tight("smooth", 16).x
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        result = solved(exact.smooth(VP), starts(16), rtol=tolerance, atol=tolerance)
        errors.append(rms(result.x - reference))
        evaluations.append(result.nfe)
    for larger, smaller in itertools.pairwise(errors):
        assert smaller < larger / 20
    assert errors[-1] < 1e-8
    # In the smooth regime the error falls with the fifth power of the number of evaluations.
    order = math.log(errors[1] / errors[3]) / math.log(evaluations[3] / evaluations[1])
    assert 4.5 < order < 7


# RK45 of scipy on dy/dlog rho, all samples in one system, measured for the specification of these
# solvers (256 starts, t from 1 to 1e-3): evaluations and RMS error by tolerance.
RK45 = {
    "smooth": {
        1e-3: (62, 6.79e-3),
        1e-4: (86, 2.00e-4),
        1e-5: (128, 3.22e-5),
        1e-6: (188, 2.71e-6),
    },
    "sharp": {
        1e-3: (80, 3.07e-4),
        1e-4: (98, 5.29e-5),
        1e-5: (140, 4.21e-6),
        1e-6: (236, 4.27e-7),
    },
}


@pytest.mark.parametrize("toy", ["smooth", "sharp"])
@pytest.mark.slow
def test_is_as_good_as_one_step_size_for_all(toy):
    reference = tight(toy, 96, 1e-8).x
    for tolerance, (evaluations, error) in RK45[toy].items():
        result = solved(TOYS[toy](VP), starts(96), rtol=tolerance, atol=tolerance)
        assert result.nfe < 2 * evaluations
        assert rms(result.x - reference) < 3 * error


def test_a_sample_does_not_depend_on_its_batch():
    denoiser, x = exact.sharp(VP), starts(5)
    together = solved(denoiser, x, save=True)
    alone = [solved(denoiser, x[i : i + 1], save=True) for i in range(5)]
    assert len({one.nfe for one in alone}) > 1
    assert together.nfe == pytest.approx(sum(one.nfe for one in alone) / 5)
    torch.testing.assert_close(
        together.states, torch.cat([one.states for one in alone], 1), rtol=0, atol=1e-11
    )


def test_each_sample_has_its_own_time_and_leaves_when_done():
    denoiser, seen = exact.sharp(VP), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        seen.append(t.tolist())
        return denoiser.raw(x, t)

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps")
    result = solved(wrapped, starts(9), rtol=1e-4, atol=1e-4)
    assert max(len(set(t)) for t in seen) == 9
    assert len(seen[-1]) < 9
    assert result.nfe == sum(map(len, seen)) / 9
    # Two evaluations to begin, then six for each step of the remaining samples.
    assert len(seen) % 6 == 2


def test_conditions_stay_with_their_samples():
    denoiser = exact.smooth(VP)

    def network(x: Tensor, t: Tensor, shift: Tensor, names: list[str], scale: float) -> Tensor:
        assert len(shift) == len(x)
        offset = torch.tensor([float(len(name)) for name in names], dtype=x.dtype)
        return scale * denoiser.raw(x - VP.alpha(t)[:, None] * (shift + offset)[:, None], t)

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(2,))
    shift = torch.arange(6, dtype=torch.float64) * 3
    names, x = ["", "a", "bb", "", "a", "bb"], starts(6)
    together = fewstep.sample(
        wrapped, noise=x, solver="dopri5", shift=shift, names=names, scale=1.0
    )
    for i in range(6):
        alone = fewstep.sample(
            wrapped,
            noise=x[i : i + 1],
            solver="dopri5",
            shift=shift[i : i + 1],
            names=names[i : i + 1],
            scale=1.0,
        )
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-10)
        # The shifted mixture lies around its shift.
        assert float((together[i] - shift[i] - len(names[i])).abs().max()) < 3


def test_schedules_with_the_same_noise_ratio_take_the_same_steps():
    low, high = (float(VP.rho(torch.tensor(t, dtype=torch.float64))) for t in (1e-2, 0.9))
    x = starts(5)
    vp = solved(exact.smooth(VP), x, t_start=0.9, t_end=1e-2)
    edm = fewstep.schedule("edm")
    alpha = float(VP.alpha(torch.tensor(0.9, dtype=torch.float64)))
    other = solved(exact.smooth(edm), x / alpha, t_start=high, t_end=low)
    assert other.nfe == vp.nfe
    end = float(VP.alpha(torch.tensor(1e-2, dtype=torch.float64)))
    torch.testing.assert_close(other.x * end, vp.x, rtol=0, atol=1e-10)


def test_states_between_steps_are_of_order_four():
    reference = tight("smooth", 16)
    errors, evaluations = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        result = solved(exact.smooth(VP), starts(16), rtol=tolerance, atol=tolerance, save=True)
        errors.append(rms(result.states[1:-1] - reference.states[1:-1]))
        evaluations.append(result.nfe)
        assert errors[-1] < 10 * tolerance
    order = math.log(errors[0] / errors[2]) / math.log(evaluations[2] / evaluations[0])
    assert order > 3.8
    u = -VP.lam(reference.times)
    assert len(u) == 33
    torch.testing.assert_close(u.diff(), u.diff().mean().expand(32), rtol=1e-9, atol=0)


def test_float32_states_reach_float32_accuracy():
    result = solved(exact.smooth(VP), starts(16).float(), rtol=1e-5, atol=1e-5)
    assert result.x.dtype == torch.float32
    assert rms(result.x.double() - tight("smooth", 16).x) < 6e-5


# --- the face ---


def test_sample_by_name():
    denoiser = exact.smooth(VP)
    result = fewstep.sample(denoiser, 4, solver="dopri5", options={"rtol": 1e-6, "atol": 1e-6})
    z = NoiseSource(0, range(4)).draw(-1, (2,), dtype=torch.float64)
    expected = solved(denoiser, VP.prior_std() * z, rtol=1e-9, atol=1e-9).x
    assert result.dtype == torch.float32
    assert rms(result.double() - expected) < 2e-5
    again = fewstep.sample(
        denoiser, 4, solver="dopri5", options={"rtol": 1e-6, "atol": 1e-6}, batch_size=3
    )
    torch.testing.assert_close(again, result, rtol=0, atol=1e-4)


def test_sample_gives_states_and_calls():
    result = fewstep.sample(exact.smooth(VP), 5, solver="dopri5", save="states", batch_size=2)
    assert result.states.shape == (33, 5, 2)
    assert torch.equal(result.states[-1], result.x)
    assert 60 < result.nfe < 256


def test_sample_from_an_image():
    schedule, image = fewstep.schedule("vp-linear"), torch.tensor([0.3, -0.2])
    denoiser, noise = exact.smooth(schedule), starts(3)
    result = fewstep.sample(
        denoiser, noise=noise, image=image, solver="dopri5", options={"t_start": 0.4}, batch_size=2
    )
    t = torch.tensor(0.4, dtype=torch.float64)
    x = schedule.alpha(t) * image.double() + schedule.sigma(t) * noise
    expected = solved(denoiser, x, rtol=1e-9, atol=1e-9, t_start=0.4).x
    assert rms(result - expected) < 1e-4


def test_recipe_of_an_adaptive_sampler():
    recipe = SamplerRecipe(kind="adaptive", name="dopri5", options={"rtol": 1e-4, "atol": 1e-4})
    read = SamplerRecipe.from_json(recipe.to_json())
    denoiser, noise = exact.smooth(VP), starts(3)
    direct = fewstep.sample(
        denoiser, noise=noise, solver="dopri5", options={"rtol": 1e-4, "atol": 1e-4}
    )
    assert torch.equal(fewstep.sample(denoiser, noise=noise, recipe=read), direct)


# --- freezing ---


def test_frozen_run_replays():
    denoiser = exact.smooth(VP)
    sampler = AdaptiveSampler(denoiser, rtol=1e-5, atol=1e-5)
    x = sampler.start(starts(6))
    free = sampler.run(x, Run(NoiseSource(0, range(6))))
    sizes = []
    for row in range(6):
        plan = freeze(sampler, x, row=row)
        steps = plan.knots.numel() - 1
        sizes.append(steps)
        # Six stages a step: the seventh is the first of the next one.
        assert plan.nfe == 6 * steps
        replayed = PlanSampler(plan, denoiser).run(x, Run(NoiseSource(0, range(6)))).x
        torch.testing.assert_close(replayed[row], free.x[row], rtol=0, atol=1e-12)
        assert float((replayed - free.x).abs().max()) < 0.1
    assert freeze(sampler, x).nfe == 6 * max(sizes)
    assert len(set(sizes)) > 1


def test_frozen_plan_is_stored_and_sampled():
    denoiser = exact.smooth(fewstep.schedule("ddpm-linear"))
    sampler = AdaptiveSampler(denoiser, rtol=1e-4, atol=1e-4, t_start=900.0)
    noise = starts(1)
    plan = freeze(sampler, sampler.start(noise))
    read = fewstep.Plan.from_json(plan.to_json())
    result = fewstep.sample(denoiser, noise=noise, plan=read)
    expected = sampler.run(sampler.start(noise), Run(NoiseSource(0, [0]))).x
    assert plan.knots[0] == 900
    assert plan.knots[-1] == 0
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_freeze_refuses_a_row_that_is_not_there():
    sampler = AdaptiveSampler(exact.smooth(VP))
    with pytest.raises(ValueError, match="row must be from 0 to 1, got 2"):
        freeze(sampler, starts(2), row=2)


# --- likelihood ---


@pytest.mark.parametrize("name", sorted(set(fewstep.SCHEDULES) - {"tabulated"}))
def test_likelihood_of_a_gaussian(name):
    schedule = fewstep.schedule(name)
    mean, std = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64), 0.6
    denoiser = exact.GaussianMixture(mean[None], [std], [1.0], schedule)
    x = denoiser.draw(5, t=schedule.t_min, seed=1)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    # The flow stretches what is off the mean by the ratio of the standard deviations.
    (a0, a1), (s0, s1) = schedule.alpha(ends).tolist(), schedule.sigma(ends).tolist()
    stretch = math.sqrt((a1 * std) ** 2 + s1**2) / math.sqrt((a0 * std) ** 2 + s0**2)
    last = a1 * mean + stretch * (x - a0 * mean)
    prior = torch.distributions.Normal(0.0, torch.tensor(s1, dtype=torch.float64))
    expected = prior.log_prob(last).sum(1) + 3 * math.log(stretch)
    result = log_likelihood(denoiser, x, exact=True, rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(result.nats, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        result.bits_per_dim, -expected / (3 * math.log(2)), rtol=0, atol=1e-5
    )
    # The Jacobian is a multiple of the identity, so that every sign probe is exact.
    probed = log_likelihood(denoiser, x, rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(probed.nats, expected, rtol=0, atol=1e-5)


def test_likelihood_of_a_mixture():
    denoiser = exact.smooth(VP)
    x = denoiser.draw(64, t=VP.t_min, seed=1)
    truth = denoiser.log_prob(x, VP.t_min)
    result = log_likelihood(denoiser, x, exact=True)
    # 6e-4 of it is the start from N(0, I) instead of the mixture at t = 1.
    assert float((result.nats - truth).abs().mean()) < 2e-3
    in32 = log_likelihood(denoiser, x.float(), exact=True)
    assert in32.nats.dtype == torch.float64
    assert float((in32.nats - truth).abs().mean()) < 3e-3


# Measured for the specification with other draws: evaluations, mean absolute error in nats.
@pytest.mark.parametrize(
    ("solver", "steps", "evaluations", "error"),
    [
        ("rho-heun", 24, 48, 1.754e-1),
        ("rho-kutta3", 12, 36, 4.317e-2),
        ("rho-kutta3", 24, 72, 6.282e-3),
        ("rho-rk4", 12, 48, 3.369e-2),
        ("rho-rk4", 24, 96, 1.877e-3),
    ],
)
def test_likelihood_with_fixed_steps(solver, steps, evaluations, error):
    denoiser = exact.smooth(VP)
    x = denoiser.draw(200, t=VP.t_min, seed=1)
    result = log_likelihood(denoiser, x, exact=True, solver=solver, steps=steps)
    assert result.nfe == evaluations
    off = float((result.nats - denoiser.log_prob(x, VP.t_min)).abs().mean())
    assert error / 2 < off < 2 * error
    if solver == "rho-kutta3":
        default = log_likelihood(denoiser, x, exact=True, steps=steps)
        assert torch.equal(default.nats, result.nats)


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_estimated_divergence_is_unbiased(probe):
    denoiser = exact.smooth(VP)
    x = denoiser.draw(1, t=VP.t_min, seed=3)
    truth = log_likelihood(denoiser, x, exact=True, steps=12).nats
    # Every row has a probe of its own.
    result = log_likelihood(denoiser, x.expand(400, 2), probe=probe, steps=12).nats
    spread = float(result.std())
    assert spread > 0.05
    assert abs(float(result.mean() - truth)) < 4 * spread / math.sqrt(400)
    more = log_likelihood(denoiser, x.expand(100, 2), probe=probe, steps=12, probes=16).nats
    assert abs(float(more.mean() - truth)) < 4 * spread / math.sqrt(100 * 16)
    assert 0.15 < float(more.std()) / spread < 0.4


def test_likelihood_of_a_sample_does_not_depend_on_its_batch():
    denoiser = exact.smooth(VP)
    x = denoiser.draw(7, seed=2)
    whole = log_likelihood(denoiser, x, seed=5)
    parts = log_likelihood(denoiser, x, seed=5, batch_size=3)
    torch.testing.assert_close(parts.nats, whole.nats, rtol=0, atol=1e-9)
    assert parts.nfe == pytest.approx(whole.nfe)
    tail = log_likelihood(denoiser, x[4:], seed=5, first=4)
    torch.testing.assert_close(tail.nats, whole.nats[4:], rtol=0, atol=1e-9)
    other = log_likelihood(denoiser, x, seed=6)
    assert float((other.nats - whole.nats).abs().max()) > 1e-3


@pytest.mark.parametrize("prediction", ["x0", "v", "score", "flow"])
def test_likelihood_in_every_prediction(prediction):
    denoiser = exact.smooth(VP)
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return scale * denoiser(x, t, prediction=prediction)

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction=prediction)
    x = denoiser.draw(3, seed=2)
    expected = log_likelihood(denoiser, x, exact=True).nats
    with torch.no_grad():
        result = log_likelihood(wrapped, x, exact=True).nats
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)
    assert not result.requires_grad


def test_likelihood_of_images_with_conditions():
    inner = exact.smooth(VP)

    def network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        flat = x.flatten(1) - VP.alpha(t)[:, None] * shift[:, None]
        return inner.raw(flat, t).reshape(x.shape)

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(1, 1, 2))
    x = inner.draw(5, t=VP.t_min, seed=4)
    shift = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.2], dtype=torch.float64)
    moved = x + float(VP.alpha(torch.tensor(VP.t_min, dtype=torch.float64))) * shift[:, None]
    result = log_likelihood(
        wrapped, moved.reshape(5, 1, 1, 2), exact=True, batch_size=2, shift=shift
    )
    # A shift of the data by alpha times a constant only changes the mismatch at the start.
    plain = log_likelihood(inner, x, exact=True)
    torch.testing.assert_close(result.nats, plain.nats, rtol=0, atol=3e-2)
    assert result.nats.shape == (5,)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1e-3}, "rtol must be a number at least 0, got -0.001"),
        ({"atol": float("nan")}, "atol must be a number"),
        ({"rtol": "small"}, "rtol must be a number"),
        ({"rtol": 0, "atol": 0}, "cannot both be 0"),
        ({"max_steps": 0}, "max_steps must be a positive integer, got 0"),
        ({"t_start": 2.0}, "t_start must be in"),
        ({"t_start": 0.2, "t_end": 0.3}, "t_end must be between"),
        ({"t_end": 0.0}, "infinite at t_end = 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fewstep.sample(exact.smooth(VP), 2, solver="dopri5", options=options)


def test_tolerances_below_the_precision_are_refused():
    with pytest.raises(
        ValueError, match=r"below what torch\.float32 can hold; raise one to 1e-06"
    ):
        fewstep.sample(exact.smooth(VP), 2, solver="dopri5", options={"rtol": 1e-9, "atol": 1e-9})


def test_states_of_a_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="x must be a float32 or float64 tensor, got"):
        solved(exact.smooth(VP), starts(2).half())
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\) with n >= 1, got \(2, 3\)"):
        solved(exact.smooth(VP), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="x has NaN or infinity"):
        solved(exact.smooth(VP), torch.full((2, 2), math.nan))


def broken(below: float) -> fewstep.Denoiser:
    """A network that breaks for one sample, known by its large state, below a time."""
    inner = exact.smooth(VP)

    def network(x: Tensor, t: Tensor) -> Tensor:
        bad = (t < below) & (x[:, 0] > 50)
        value = inner.raw(torch.where(x > 50, x - 100 * VP.alpha(t)[:, None], x), t)
        return torch.where(bad[:, None], torch.nan, value)

    return fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(2,))


def test_nan_is_named():
    x = starts(4)
    x[2] += 1000
    with pytest.raises(
        ValueError, match=r"NaN or infinity at evaluation 1 of sample 12, t = 1, and for 0 others"
    ):
        AdaptiveSampler(broken(2.0)).run(x, Run(NoiseSource(0, range(10, 14))))
    calls = []
    with pytest.raises(ValueError, match="NaN or infinity at evaluation") as caught:
        AdaptiveSampler(broken(0.5)).run(
            x, Run(NoiseSource(0, range(10, 14)), on_evaluation=lambda: calls.append(1))
        )
    words = str(caught.value).replace(",", "").split()
    evaluation, t = int(words[words.index("evaluation") + 1]), float(words[words.index("=") + 1])
    assert "sample 12," in str(caught.value)
    assert t < 0.5
    assert 2 < evaluation <= len(calls)
    with pytest.raises(
        ValueError, match=r"NaN or infinity at evaluation 1 of sample 1, t = 0.001"
    ):
        log_likelihood(broken(0.5), torch.tensor([[0.1, 0.2], [100.0, 100.0]]))
    with pytest.raises(
        ValueError, match=r"NaN or infinity at evaluation 1 of sample 8, t = 0.001"
    ):
        log_likelihood(broken(0.5), torch.tensor([[0.1, 0.2], [100.0, 100.0]]), steps=3, first=7)


def test_too_many_steps_are_named():
    with pytest.raises(
        ValueError,
        match=r"sample 0 has not arrived after max_steps = 3 steps, at t = 0\.\d+ .* raise max_steps",
    ):
        fewstep.sample(exact.smooth(VP), 2, solver="dopri5", options={"max_steps": 3})


def test_steps_that_are_too_small_are_named():
    generator = torch.Generator().manual_seed(0)

    def network(x: Tensor, t: Tensor) -> Tensor:
        jump = 1e12 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + torch.where(t[:, None] < 0.5, jump, 0.0)

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps")
    with pytest.raises(
        ValueError, match=r"sample 0 needs steps below .* at t = 0\.[45]\d* .* raise rtol and atol"
    ):
        solved(wrapped, starts(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4, "solver": "dopri5"}, "dopri5 chooses its steps"),
        ({"solver": "rho-rk4"}, "rho-rk4 needs steps"),
        ({"solver": "ddim", "steps": 4}, "got 'ddim'"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"probes": 0}, "probes must be a positive integer"),
        ({"probe": "cauchy"}, "probe must be 'rademacher' or 'normal'"),
        ({"rtol": -1.0}, "rtol must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_likelihood_options_are_refused(options, message):
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return x

    wrapped = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps")
    with pytest.raises(ValueError, match=message):
        log_likelihood(wrapped, starts(2), **options)
    assert not calls


def test_networks_without_gradients_are_refused():
    inner = exact.smooth(VP)
    frozen = fewstep.Denoiser.wrap(torch.no_grad()(inner.raw), schedule=VP, prediction="eps")
    with pytest.raises(ValueError, match="not connected to its input by gradients"):
        log_likelihood(frozen, starts(2))

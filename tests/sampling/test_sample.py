"""Sampling: reproducible draws, starts, and errors before the first network evaluation."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep
from fewstep.models import exact
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.recipe import SamplerRecipe
from forks import FORKS, in_fork

SCHEDULE = fewstep.schedule("vp-linear")
MODEL = exact.smooth(SCHEDULE)
SOLVERS = ["ddim", "tab3", "unipc3", "dpmpp-2m-sde", "accelerated-ddpm", "edm-stochastic"]


def options(solver):
    return {"nfe": 9, "solver": solver}  # 9 evaluations: Heun's 2 K - 1 meets it too


# Reproducible


@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_do_not_matter_bit_for_bit(solver):
    whole = fewstep.sample(MODEL, 8, seed=5, **options(solver))
    for size in (4, 3, 1):
        assert torch.equal(
            fewstep.sample(MODEL, 8, seed=5, batch_size=size, **options(solver)), whole
        )
    parts = [fewstep.sample(MODEL, 2, seed=5, first=i, **options(solver)) for i in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(fewstep.sample(MODEL, 8, seed=6, **options(solver)), whole)
    assert len(whole.unique(dim=0)) == 8


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_global_generator_does_not_matter(solver):
    torch.manual_seed(0)
    first = fewstep.sample(MODEL, 3, **options(solver))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(fewstep.sample(MODEL, 3, **options(solver)), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings(FORKS)
def test_the_same_in_another_process():
    """Each sample's noise, too: it is what a stochastic solver draws."""
    options = {"solver": "ddpm", "nfe": 5, "seed": 2, "first": 1}
    here = fewstep.sample(MODEL, 3, **options)

    def there() -> None:
        import fewstep

        torch.manual_seed(99)
        result = fewstep.sample(fewstep.load("mixture-smooth"), 3, **options)
        assert torch.equal(result, here)

    in_fork(there)


def test_the_type_of_the_noise_is_the_state_s():
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    single = fewstep.sample(MODEL, noise=noise, **options("ddpm"))
    double = fewstep.sample(MODEL, noise=noise.double(), **options("ddpm"))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    assert not torch.equal(single.double(), double)


def test_conditions_are_split_among_batches():
    seen = []

    def network(x, t, class_labels, names, scale):
        seen.append((class_labels.tolist(), names, scale))
        return x

    denoiser = fewstep.Denoiser.wrap(
        network, schedule=SCHEDULE, prediction="eps", event_shape=(2,)
    )
    fewstep.sample(
        denoiser,
        3,
        solver="ddim",
        nfe=1,
        batch_size=2,
        class_labels=torch.tensor([5, 6, 7]),
        names=["a", "b", "c"],
        scale=2.0,
    )
    assert seen == [([5, 6], ["a", "b"], 2.0), ([7], ["c"], 2.0)]


def test_trajectory():
    plan = fewstep.plan("ddim", SCHEDULE, nfe=4)
    trajectory = fewstep.sample(MODEL, 3, plan=plan, save="states", batch_size=2)
    assert trajectory.states.shape == (5, 3, 2)
    assert torch.equal(trajectory.times, plan.knots)
    assert torch.equal(trajectory.states[-1], trajectory.x)
    assert torch.equal(trajectory.x, fewstep.sample(MODEL, 3, plan=plan))
    assert trajectory.nfe == 4
    for i in range(4):  # the first states are those of the plan's prefix, by DDIM's formula
        x = trajectory.states[i].double()
        a, s = SCHEDULE.alpha(plan.knots), SCHEDULE.sigma(plan.knots)
        eps = MODEL(x, plan.knots[i])
        expected = a[i + 1] / a[i] * x + (s[i + 1] - a[i + 1] / a[i] * s[i]) * eps
        torch.testing.assert_close(
            trajectory.states[i + 1].double(), expected, rtol=1e-4, atol=1e-4
        )


# Starts


def gaussian(mean=(2.0, -1.0), std=0.5, schedule=SCHEDULE):
    return exact.GaussianMixture([mean], [std], [1.0], schedule)


def ode_solution(model, x, t_from, t_to):
    """The probability-flow ODE of Gaussian data in closed form: the standard score is constant."""
    t = torch.tensor([t_from, t_to], dtype=torch.float64)
    a, s = model.schedule.alpha(t), model.schedule.sigma(t)
    deviation = (a.square() * model.stds[0] ** 2 + s.square()).sqrt()
    return a[1] * model.means[0] + deviation[1] / deviation[0] * (x - a[0] * model.means[0])


@pytest.mark.parametrize("t", [0.9, 0.5, 0.2])
def test_head_start_is_exact_on_gaussian_data(t):
    model, noise = gaussian(), torch.randn(5, 2, dtype=torch.float64)
    plan = fewstep.plan("ddim", SCHEDULE, nfe=3, head_start=t)
    started = PlanSampler(plan, model).start(noise)
    prior = float(SCHEDULE.sigma(torch.tensor(1.0, dtype=torch.float64))) * noise
    solved = ode_solution(model, prior, SCHEDULE.t_max, t)
    # The prior leaves alpha(T) = 0.0066 of the data out; more than that is not allowed.
    alpha = float(SCHEDULE.alpha(torch.tensor(1.0, dtype=torch.float64)))
    torch.testing.assert_close(started, solved, rtol=0, atol=2.5 * alpha)
    assert float(SCHEDULE.alpha(torch.tensor(t, dtype=torch.float64))) > 2.5 * alpha or t == 0.9


def test_head_start_lowers_the_error_at_the_same_budget():
    model, noise = gaussian(std=0.3), torch.randn(64, 2, dtype=torch.float64)
    end = {"t_end": 0.01}
    prior = float(SCHEDULE.sigma(torch.tensor(1.0, dtype=torch.float64))) * noise
    truth = ode_solution(model, prior, SCHEDULE.t_max, 0.01)

    def error(**start):
        result = fewstep.sample(model, noise=noise, solver="ddim", nfe=5, options=end, **start)
        return float((result - truth).square().mean().sqrt())

    assert error(head_start=0.6) < 0.8 * error()


def test_head_start_needs_statistics():
    plan = fewstep.plan("ddim", SCHEDULE, nfe=3, head_start=0.5)
    with pytest.raises(ValueError, match="data_mean=, data_std="):
        fewstep.sample(silent(), 2, plan=plan)


@pytest.mark.parametrize("shape", [(3, 2), (2,)])
def test_image_to_image_starts_at_the_noised_image(shape):
    image, noise = torch.full(shape, 1.5), torch.randn(3, 2)
    states = fewstep.sample(
        MODEL,
        noise=noise,
        image=image,
        solver="ddim",
        nfe=3,
        options={"t_start": 0.3},
        save="states",
        batch_size=2,
    ).states
    t = torch.tensor(0.3, dtype=torch.float64)
    expected = float(SCHEDULE.alpha(t)) * image + float(SCHEDULE.sigma(t)) * noise
    torch.testing.assert_close(states[0], expected.expand(3, 2))


def test_image_with_a_recipe_keeps_the_recipe_s_guidance():
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t, label: label[:, None].to(x) + 0 * x,
        schedule=SCHEDULE,
        prediction="x0",
        event_shape=(2,),
        null_condition={"label": 0},
    )
    recipe = SamplerRecipe(name="ddim", nfe=2, options={"t_start": 0.5}, guidance=3.0)
    image = torch.zeros(2)
    plain = fewstep.sample(denoiser, 2, recipe=recipe, image=image, label=1, seed=1)
    by_hand = fewstep.sample(
        denoiser,
        2,
        solver="ddim",
        nfe=2,
        options={"t_start": 0.5},
        guidance=3.0,
        image=image,
        label=1,
        seed=1,
    )
    assert torch.equal(plain, by_hand)
    assert float(plain.mean()) > 2  # x0 is 0 + 3 (1 - 0)


# Mistakes, all before the first call


def silent(**extra):
    """A denoiser that must not be called."""

    def network(x, t, class_labels=None):
        raise AssertionError("the network was called")

    arguments = {"schedule": SCHEDULE, "prediction": "eps", "event_shape": (2,), **extra}
    return fewstep.Denoiser.wrap(network, **arguments)


PLAN = fewstep.plan("ddim", SCHEDULE, nfe=3)
OTHER = fewstep.schedule("vp-linear", beta_max=15.0)
MISTAKES = {
    "unknown solver": ({"solver": "dpmp-2m"}, ValueError, "Did you mean 'dpmpp-2m'"),
    "a number as solver": ({"solver": 3}, TypeError, "solver must be a name or a solver"),
    "unknown grid": ({"solver": "ddim", "grid": "karas"}, ValueError, "Did you mean 'karras'"),
    "unknown option": ({"solver": "ddim", "options": {"etta": 1}}, TypeError, "etta"),
    "option out of range": ({"solver": "ddim", "options": {"eta": -1}}, ValueError, "eta"),
    "odd budget": ({"solver": "rho-heun", "nfe": 5}, ValueError, "nearest budgets are 4 or 6"),
    "budget of heun": ({"solver": "heun", "nfe": 4}, ValueError, "budgets are 3 or 5"),
    "budget of rk4": ({"solver": "rho-rk4", "nfe": 2}, ValueError, "budgets are 4"),
    "n of another noise": ({"noise": torch.zeros(3, 2)}, ValueError, "3 rows, but n is 2"),
    "noise of another shape": (
        {"n": None, "noise": torch.zeros(2, 3)},
        ValueError,
        r"noise must have shape \(n, 2\), got \(2, 3\)",
    ),
    "noise without samples": ({"n": None, "noise": torch.zeros(())}, ValueError, "shape"),
    "noise of integers": ({"noise": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "float32"),
    "noise as a list": ({"noise": [[0.0, 0.0]]}, TypeError, "noise must be"),
    "no n": ({"n": None}, ValueError, "give n"),
    "unknown save": ({"save": "all"}, ValueError, "save must be"),
    "unknown condition": ({"class_label": 3}, ValueError, "no condition 'class_label'"),
    "labels of another length": (
        {"class_labels": torch.tensor([1, 2, 3])},
        ValueError,
        "'class_labels' has 3 values for 2 samples",
    ),
    "list of another length": ({"class_labels": [1, 2, 3]}, ValueError, "3 values for 2"),
    "image of another shape": (
        {"image": torch.zeros(4), "strength": 0.5},
        ValueError,
        r"image must have shape \(2",
    ),
    "image without shape": (
        {"image": torch.zeros(()), "strength": 0.5},
        ValueError,
        "image must have shape",
    ),
    "image of bytes": (
        {"image": torch.zeros(2, dtype=torch.uint8), "strength": 0.5},
        TypeError,
        "floating",
    ),
    "guidance without null": ({"guidance": 2.0}, ValueError, "null_condition"),
    "plan and recipe": (
        {"plan": PLAN, "recipe": SamplerRecipe(name="ddim", nfe=3)},
        ValueError,
        "plan and recipe each are a whole sampler",
    ),
    "plan and grid": ({"plan": PLAN, "grid": "karras"}, ValueError, "got grid as well"),
    "plan and options": ({"plan": PLAN, "options": {"eta": 1.0}}, ValueError, "got eta as well"),
    "plan of another kind": ({"plan": "ddim"}, TypeError, "plan must be a Plan, got str"),
    "recipe of another kind": ({"recipe": {"name": "ddim"}}, TypeError, "recipe must be"),
    "missing recipe file": ({"recipe": "nowhere.json"}, ValueError, "cannot be read"),
    "plan for another schedule": (
        {"plan": fewstep.plan("ddim", OTHER, nfe=3)},
        ValueError,
        "Rebuild the plan with denoiser.schedule",
    ),
    "recipe for another schedule": (
        {"recipe": SamplerRecipe(name="ddim", nfe=3, schedule=OTHER.to_record())},
        ValueError,
        "recipe was made for the schedule",
    ),
    "grid for another schedule": (
        {"solver": "ddim", "grid": fewstep.grid("uniform", fewstep.schedule("edm"), 3)},
        ValueError,
        "grid was made for schedule 'edm'",
    ),
    "times out of order": (
        {"solver": "ddim", "grid": "explicit", "options": {"times": [0.1, 0.9]}},
        ValueError,
        "decrease strictly",
    ),
    "times out of range": (
        {"solver": "ddim", "grid": "explicit", "nfe": 1, "options": {"times": [2.0, 0.9]}},
        ValueError,
        "outside",
    ),
    "times that are not nfe": (
        {"solver": "ddim", "grid": "explicit", "nfe": 5, "options": {"times": [0.9, 0.1]}},
        ValueError,
        "1 evaluations on this grid of 1 steps, not 5",
    ),
    "head start out of range": ({"solver": "ddim", "head_start": 2.0}, ValueError, "t_start"),
    "head start and grid": (
        {"solver": "ddim", "head_start": 0.5, "options": {"t_start": 0.4}},
        ValueError,
        "both the first time",
    ),
    "head start without statistics": (
        {"solver": "ddim", "head_start": 0.5},
        ValueError,
        "data_mean",
    ),
    "seed as text": ({"seed": "1"}, TypeError, "seed must be an integer"),
    "negative first": ({"first": -1}, ValueError, "first must be"),
}


@pytest.mark.parametrize("case", list(MISTAKES))
def test_mistakes_are_told_before_the_first_call(case):
    arguments, error, reason = MISTAKES[case]
    arguments = {"n": 2, **arguments}
    with pytest.raises(error, match=reason):
        fewstep.sample(silent(), arguments.pop("n"), **arguments)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", math.nan])
@pytest.mark.parametrize("name", ["n", "nfe", "batch_size"])
def test_counts_are_positive_integers(name, value):
    arguments = {"n": 2, "solver": "ddim", name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        fewstep.sample(silent(), **arguments)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8"])
def test_steps_of_a_plan_are_positive_integers(value):
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        fewstep.plan("ddim", SCHEDULE, steps=value)


@pytest.mark.parametrize("solver", ["ddim", "auto"])
def test_absurd_budgets_are_refused_at_once(solver):
    with pytest.raises(ValueError, match="at most"):
        fewstep.plan(solver, SCHEDULE, nfe=10**12)


def test_budget_given_twice_or_not_at_all():
    with pytest.raises(ValueError, match="not both; got nfe=3 and steps=3"):
        fewstep.plan("ddim", SCHEDULE, nfe=3, steps=3)
    for solver in ("ddim", "auto"):
        with pytest.raises(ValueError, match="give nfe, the number of network evaluations"):
            fewstep.plan(solver, SCHEDULE)


def test_the_schedule_must_be_one():
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule, got 'vp-linear'"):
        fewstep.plan("ddim", "vp-linear", nfe=3)
    with pytest.raises(
        ValueError, match=r"Unknown schedule 'vp_linear'. Did you mean 'vp-linear'"
    ):
        fewstep.schedule("vp_linear")
    with pytest.raises(TypeError, match="beta_maxx"):
        fewstep.schedule("vp-linear", beta_maxx=3)


def test_auto_on_another_grid_drops_the_options_of_its_own():
    """Its grid for training timesteps has a power, which the quadratic grid does not take."""
    noise = fewstep.schedule("ddpm-linear")
    plan = fewstep.plan("auto", noise, nfe=8, grid="quadratic")
    assert torch.equal(plan.knots, fewstep.grid("quadratic", noise, 8).times)


def test_auto_on_a_grid_that_is_made():
    grid = fewstep.grid("uniform", SCHEDULE, 4)
    assert fewstep.plan("auto", SCHEDULE, grid=grid).nfe == 4
    assert fewstep.sample(MODEL, 2, grid=grid).shape == (2, 2)


def test_a_network_alone_is_no_denoiser():
    for function in (fewstep.sample, fewstep.steps):
        with pytest.raises(TypeError, match=r"make one with fewstep.load\(name\)"):
            function(lambda x, t: x, 2)


def test_a_shape_is_needed():
    with pytest.raises(ValueError, match=r"shape of a sample is not known; give noise="):
        fewstep.sample(silent(event_shape=None), 2)


def test_guidance_needs_a_condition():
    with pytest.raises(ValueError, match="guidance needs a condition, one of: class_labels"):
        fewstep.sample(silent(null_condition={"class_labels": 0}), 2, guidance=2.0)


def test_steps_checks_before_it_is_walked():
    with pytest.raises(ValueError, match="Unknown solver"):
        fewstep.steps(silent(), 2, solver="ddmi")
    with pytest.raises(ValueError, match="guidance needs"):
        fewstep.steps(silent(), 2, guidance=2.0)


# Mistakes of the network


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_nan_is_told_with_evaluation_time_and_sample(at, wrong):
    plan = fewstep.plan("ddim", SCHEDULE, nfe=4)

    def network(x, t):
        x = x.clone()
        if float(t[0]) == float(plan.times[at].float()):
            x[1] = wrong
        return x

    denoiser = fewstep.Denoiser.wrap(
        network, schedule=SCHEDULE, prediction="eps", event_shape=(2,)
    )
    time = f"{float(plan.times[at]):.6g}"
    reason = f"evaluation {at + 1} of 4, t = {time}, for sample 6 and 0 others.* was finite"
    with pytest.raises(ValueError, match=reason):
        fewstep.sample(denoiser, 3, plan=plan, first=5)


def test_large_but_finite_samples_are_no_error():
    """Their sum overflows, they do not."""
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t: torch.full_like(x, 3e38),
        schedule=SCHEDULE,
        prediction="x0",
        event_shape=(8,),
    )
    out = fewstep.sample(denoiser, 2, solver="ddim", nfe=1)
    assert not bool(out.sum().isfinite())
    assert bool((out > 2.9e38).all())


@pytest.mark.parametrize("output", [torch.zeros(2, 3), torch.zeros(2), None, (1,)])
def test_outputs_of_another_shape(output):
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t: output, schedule=SCHEDULE, prediction="eps", event_shape=(2,)
    )
    with pytest.raises(ValueError, match=r"tensor of the state's shape \(2, 2\), got"):
        fewstep.sample(denoiser, 2, solver="ddim", nfe=2)


def test_a_condition_that_is_a_single_number_reaches_every_batch():
    seen = []

    def network(x, t, *, scale):
        seen.append(scale)
        return x * scale

    denoiser = fewstep.Denoiser.wrap(
        network, schedule=fewstep.schedule("vp-linear"), prediction="eps", event_shape=(2,)
    )
    scale = torch.tensor(0.5)
    fewstep.sample(denoiser, 4, solver="ddim", nfe=2, batch_size=3, scale=scale)
    assert len(seen) == 4
    assert all(value is scale for value in seen)


def test_steps_take_the_file_of_a_recipe_as_sample_does(tmp_path):
    model = fewstep.load("mixture-smooth")
    path = SamplerRecipe(name="tab2", nfe=4).save(tmp_path / "recipe.json")
    *_, last = fewstep.steps(model, 3, recipe=path)
    assert torch.equal(last.x, fewstep.sample(model, 3, recipe=path))
    assert torch.equal(last.x, fewstep.sample(model, 3, solver="tab2", nfe=4))


def test_a_budget_in_steps_of_the_solver():
    model = fewstep.load("mixture-smooth")
    want = fewstep.sample(
        model, 3, solver="heun", nfe=5
    )  # its last step, onto the data, is one evaluation
    assert torch.equal(fewstep.sample(model, 3, solver="heun", steps=3), want)
    *_, last = fewstep.steps(model, 3, solver="heun", steps=3)
    assert torch.equal(last.x, want)

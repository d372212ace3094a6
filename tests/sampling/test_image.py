"""Image to image: where an image starts, what strength means, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fewstep
from fewstep import SamplerRecipe, SamplerRequest

MODEL = fewstep.load("mixture-smooth")
VP = MODEL.schedule
IMAGE = torch.tensor([0.5, -0.25])
GRIDS = {
    "uniform": {},
    "quadratic": {},
    "power": {"power": 1.5},
    "log-rho": {},
    "karras": {"rho": 5.0},
}
NEEDS = "an image needs a start"


class Counting:
    """A network that predicts no noise, counts its evaluations and keeps its first input."""

    def __init__(self, schedule=VP, **options):
        self.calls, self.first = 0, None
        self.model = fewstep.Denoiser.wrap(
            self, schedule=schedule, prediction="eps", event_shape=(2,), **options
        )

    def __call__(self, x, t):
        self.calls += 1
        self.first = x.clone() if self.first is None else self.first
        return torch.zeros_like(x)


@pytest.mark.parametrize("name", GRIDS)
def test_a_share_of_a_grid_is_the_last_steps_of_the_whole(name):
    whole = fewstep.grid(name, VP, 10, **GRIDS[name])
    part = fewstep.grid(name, VP, 6, strength=0.6, **GRIDS[name])
    torch.testing.assert_close(part.times, whole.times[4:], rtol=1e-12, atol=1e-14)
    # A last step onto the data adds one; the share is that of the axis, the same at any budget.
    part = fewstep.grid(name, VP, 7, strength=0.6, to_zero=True, **GRIDS[name])
    torch.testing.assert_close(part.times[:-1], whole.times[4:], rtol=1e-12, atol=1e-14)
    full = fewstep.grid(name, VP, 5, strength=1, **GRIDS[name])
    assert torch.equal(full.times, fewstep.grid(name, VP, 5, **GRIDS[name]).times)


def test_the_image_is_noised_to_the_share_and_all_evaluations_are_made():
    network = Counting()
    noise = torch.randn(3, 2)
    given = {"solver": "ddim", "grid": "uniform", "nfe": 6}
    x = fewstep.sample(network.model, noise=noise, image=IMAGE, strength=0.6, **given)
    t = VP.t_max - 0.4 * (VP.t_max - VP.t_min)
    alpha, sigma = (float(f(torch.tensor(t, dtype=torch.float64))) for f in (VP.alpha, VP.sigma))
    torch.testing.assert_close(network.first, alpha * IMAGE + sigma * noise)
    assert network.calls == 6
    # With eps = 0 DDIM only scales: x / alpha stays.
    last = float(VP.alpha(torch.tensor(VP.t_min, dtype=torch.float64)))
    torch.testing.assert_close(x, (alpha * IMAGE + sigma * noise) * last / alpha)
    *_, step = fewstep.steps(network.model, noise=noise, image=IMAGE, strength=0.6, **given)
    assert torch.equal(step.x, x)
    assert (network.calls, step.index) == (12, 5)


def test_a_share_of_training_timesteps_is_that_of_diffusers():
    """There 10 timesteps at strength 0.6 leave out the first N - int(N s) = 4."""
    network = Counting(fewstep.schedule("ddpm-linear"), integer_times=True)
    plan = fewstep.resolve(
        network.model,
        SamplerRequest("ddim", nfe=6, grid="uniform", options={"strength": 0.6}),
        image=True,
    ).sampler.plan
    assert plan.knots.tolist() == [round(999 * k / 10) for k in range(6, -1, -1)]


def test_an_adaptive_solver_takes_a_share_of_log_rho():
    lam = [VP.lam(torch.tensor(t, dtype=torch.float64)) for t in (VP.t_max, VP.t_min)]
    t = float(VP.time(lam[0] + 0.5 * (lam[1] - lam[0])))
    options = {"rtol": 1e-3, "atol": 1e-3}
    result = fewstep.resolve(
        MODEL, SamplerRequest("dopri5", options={**options, "strength": 0.5}), image=True
    )
    assert result.recipe.options == {**options, "t_start": pytest.approx(t, rel=1e-12)}
    one = fewstep.sample(MODEL, 2, image=IMAGE, recipe=result.recipe)
    two = fewstep.sample(MODEL, 2, image=IMAGE, strength=0.5, solver="dopri5", options=options)
    assert torch.equal(one, two)


def test_a_recipe_keeps_the_share_and_asks_for_the_image():
    request = SamplerRequest("tab2", nfe=4, options={"strength": 0.4})
    recipe = fewstep.resolve(MODEL, request, image=True).recipe
    assert recipe.options["strength"] == 0.4
    again = SamplerRecipe.from_json(recipe.to_json())
    one = fewstep.sample(MODEL, 2, image=IMAGE, recipe=again)
    assert torch.equal(
        one, fewstep.sample(MODEL, 2, solver="tab2", nfe=4, image=IMAGE, strength=0.4)
    )
    with pytest.raises(ValueError, match="there is no image; give image="):
        fewstep.sample(MODEL, 2, recipe=again)


DDPM = fewstep.schedule("ddpm-linear")
WHOLE = fewstep.plan("ddim", VP, nfe=4, grid="uniform")


@pytest.mark.parametrize("door", [fewstep.sample, fewstep.steps])
@pytest.mark.parametrize(
    ("schedule", "given", "message"),
    [
        (VP, {"image": IMAGE}, NEEDS),
        (VP, {"image": IMAGE, "solver": "ddim", "grid": "karras"}, NEEDS),
        (VP, {"image": IMAGE, "options": {"times": [1.0, 0.5, 0.1]}}, NEEDS),
        (VP, {"image": IMAGE, "solver": "dopri5"}, NEEDS),
        (VP, {"image": IMAGE, "plan": WHOLE}, NEEDS),
        (VP, {"image": IMAGE, "recipe": SamplerRecipe(name="ddim", nfe=4)}, NEEDS),
        (VP, {"image": IMAGE, "plan": WHOLE, "strength": 0.5}, "got strength as well"),
        (VP, {"image": IMAGE, "strength": 0}, "above 0 and at most 1, got 0"),
        (VP, {"image": IMAGE, "strength": 60}, "above 0 and at most 1, got 60"),
        (VP, {"image": IMAGE, "strength": "half"}, "above 0 and at most 1, got 'half'"),
        (
            VP,
            {"image": IMAGE, "strength": 0.5, "options": {"t_start": 0.3}},
            "both the first time",
        ),
        (VP, {"image": IMAGE, "strength": 0.5, "head_start": 0.3}, "both the first time"),
        (VP, {"image": IMAGE, "strength": 0.5, "options": {"strength": 0.5}}, "given twice"),
        (VP, {"image": IMAGE, "strength": 0.5, "options": {"times": [1, 0.5]}}, "the given times"),
        (VP, {"image": IMAGE, "options": {"t_start": "half"}}, r"a time in \(0.001, 1\]"),
        (VP, {"strength": 0.5}, "there is no image; give image="),
        (VP, {"strength": 0.5, "solver": "dopri5"}, "there is no image; give image="),
        (
            DDPM,
            {"image": IMAGE, "options": {"t_start": 0.5}},
            "from 0 to 999, and t = 0.5 has hardly any noise; for a share of the grid give strength=0.5",
        ),
        (DDPM, {"solver": "dopri5", "options": {"t_start": 0.5}}, "strength=0.5"),
        (DDPM, {"image": IMAGE, "options": {"t_start": 1}}, "strength=1"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_an_evaluation(door, schedule, given, message):
    network = Counting(schedule)
    with pytest.raises(ValueError, match=message):
        door(network.model, 2, **given)
    assert network.calls == 0


def test_a_plan_that_begins_later_is_a_start():
    plan = fewstep.plan("ddim", VP, nfe=3, t_start=0.5)
    network = Counting()
    fewstep.sample(network.model, 2, plan=plan, image=IMAGE)
    assert network.calls == 3

"""A network of one's own and the commands, from outside: what is right, or refused in words.

Only public names, so that it runs against any version; the networks are exact.
"""

from __future__ import annotations

import logging

import numpy
import pytest
import torch
from torch import nn

import fewstep
from fewstep.cli import run

DDPM, FLOW = fewstep.schedule("ddpm-linear"), fewstep.schedule("flow")
MEANS, STDS = [[0.8, 0.2], [-0.6, -0.4]], [0.3, 0.2]


def mixture(schedule):
    return fewstep.exact.GaussianMixture(MEANS, STDS, [0.5, 0.5], schedule)


def network(prediction="eps", schedule=DDPM):
    model = mixture(schedule)
    return lambda x, t: model(x.double(), t.double(), prediction=prediction).to(x.dtype)


def wrap(net=None, *, schedule=DDPM, prediction="eps", **options):
    options = {"event_shape": (2,), **options}
    net = net or network(schedule=schedule)
    return fewstep.Denoiser.wrap(net, schedule=schedule, prediction=prediction, **options)


def draw(model, **options):
    return fewstep.sample(model, 4, seed=1, **{"solver": "ddim", "nfe": 6, **options})


RIGHT = draw(wrap())


def rms(x, y):
    return float((x.double() - y.double()).square().mean().sqrt())


def reference(schedule):
    return draw(mixture(schedule), solver="tab3", grid="log-rho", nfe=300)


@pytest.mark.parametrize("solver", ["heun", "rho-heun"])
def test_methods_of_several_stages_on_a_flow(solver):
    """Noise before (1.4 to 2.3 off); Heun in t is .01 off."""
    steps = {} if solver == "heun" else {"nfe": 8}
    got = draw(mixture(FLOW), solver=solver, **{"nfe": 9, **steps})
    assert rms(got, reference(FLOW)) < 0.2


def test_heun_with_noise_on_a_flow():
    got = fewstep.sample(mixture(FLOW), 2000, solver="edm-stochastic", nfe=9, seed=0)
    centre = torch.tensor(MEANS).mean(0)
    assert float((got.mean(0) - centre).abs().max()) < 0.1
    assert float(got.abs().max()) < 3


def test_to_zero_on_a_uniform_grid_of_a_flow():
    for solver in ("rho-midpoint", "rho-heun", "rho-kutta3", "rho-rk4"):
        stages = {"rho-kutta3": 3, "rho-rk4": 4}.get(solver, 2)
        plan = fewstep.plan(solver, FLOW, nfe=3 * stages + 1, grid="uniform", to_zero=True)
        got = fewstep.sample(mixture(FLOW), 4, plan=plan, seed=1)
        assert rms(got, reference(FLOW)) < 0.5


class Dropped(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t, class_labels=None):
        if x.dtype != self.scale.dtype:
            raise RuntimeError(f"expected {self.scale.dtype}, got {x.dtype}")
        return self.drop(network()(x, t)) * self.scale


def test_a_module_in_train_mode():
    module = Dropped().train()
    assert rms(draw(wrap(module)), RIGHT) < 1e-5
    assert module.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types(dtype):
    assert rms(draw(wrap(Dropped(dtype).eval())), RIGHT) < 0.02


@pytest.mark.parametrize("form", ["tuple", "dict", "sample", "channels"])
def test_outputs_of_other_forms(form):
    class Output:
        def __init__(self, sample):
            self.sample = sample

    forms = {
        "tuple": lambda x: (x, None),
        "dict": lambda x: {"sample": x},
        "sample": Output,
        "channels": lambda x: torch.cat([x, 9 * x], 1),
    }
    assert rms(draw(wrap(lambda x, t: forms[form](network()(x, t)))), RIGHT) < 1e-6


@pytest.mark.parametrize("labels", [1, [0, 1, 2, 0], numpy.array([0, 1, 2, 0])])
def test_labels_as_numbers_lists_and_arrays(labels):
    seen = []

    def labelled(x, t, class_labels):
        seen.append((class_labels.dtype, tuple(class_labels.shape)))
        return network()(x, t)

    assert rms(draw(wrap(labelled), class_labels=labels), RIGHT) < 1e-6
    assert set(seen) == {(torch.int64, (4,))}


def test_labels_out_of_range_are_refused():
    def never(x, t, class_labels):
        raise AssertionError("a network evaluation")

    with pytest.raises(ValueError, match="from 0 to 2, got 3"):
        draw(wrap(never, num_classes=3), class_labels=3)


def test_a_network_that_wants_long_times():
    table = nn.Embedding(1000, 2)

    def net(x, t):
        return network()(x, t) + 0 * table(t)

    with pytest.raises(ValueError, match="integer_times=True"):
        draw(wrap(net))


def test_a_score_that_is_eps_points_to_the_model_check(caplog):
    with caplog.at_level(logging.WARNING, "fewstep"):
        draw(wrap(prediction="score"))
    assert "model_check" in caplog.text


def test_an_image_without_a_start_is_refused_and_strength_starts():
    image = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="strength="):
        draw(wrap(), image=image)
    assert draw(wrap(), image=image, strength=0.5).shape == (4, 2)
    with pytest.raises(ValueError, match=r"0\.5"):
        draw(wrap(), image=image, options={"t_start": 0.5})


def test_a_flow_with_time_zero_at_noise():
    def net(x, t):
        return -network("flow", FLOW)(x, 1 - t)

    model = wrap(net, schedule=FLOW, prediction="flow", time_reversed=True)
    assert rms(draw(model), draw(mixture(FLOW))) < 1e-5


@pytest.mark.parametrize(
    "call",
    [
        lambda: fewstep.grid("karras", DDPM, 4, rh=3),
        lambda: fewstep.schedule("vp-linear", beta_mx=3),
        lambda: draw(wrap(), options={"etaa": 1.0}),
    ],
)
def test_unknown_options_list_the_known_ones(call):
    with pytest.raises(TypeError, match=r"(?i)(rho|beta_max|eta)\b.*") as caught:
        call()
    assert "ption" in str(caught.value)
    assert "Did you mean" in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0"), ("flow_prediction", "flow")],
)
def test_predictions_by_diffusers_names(theirs, ours):
    assert rms(draw(wrap(network(ours), prediction=theirs)), RIGHT) < 1e-4


def test_a_schedule_of_betas():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    result = wrap(network(), schedule=fewstep.schedule("tabulated", betas=betas))
    assert rms(draw(result), RIGHT) < 1e-5


@pytest.mark.parametrize("name", ["exponential", "sgm_uniform", "simple", "normal", "beta"])
def test_grids_by_the_names_of_comfyui(name):
    assert fewstep.plan("ddim", DDPM, nfe=5, grid=name).nfe == 5


def test_listings_are_plain_text(capsys):
    for words in (["solvers"], ["models"]):
        assert run(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert not any(
            mark in line
            for line in lines
            for mark in ("`", "\\", "\N{BOX DRAWINGS LIGHT VERTICAL}")
        )
        assert max(map(len, lines)) < 200


def test_sampling_again_says_what_the_recipe_does_not_hold(tmp_path, capsys):
    """n and seed; and --quiet says nothing at all."""
    first, again = str(tmp_path / "a"), str(tmp_path / "b")
    words = ["sample", "mixture-smooth", "--nfe", "2", "-n", "3", "--seed", "5", "--out", first]
    assert run(words) == 0
    capsys.readouterr()
    words = ["sample", "mixture-smooth", "--recipe", f"{first}/recipe.json", "-n", "2", "--out"]
    assert run([*words, again]) == 0
    assert "not taken over from the recipe: -n 3, --seed 5" in capsys.readouterr().out
    assert run(["--quiet", *words, f"{again}-2"]) == 0
    assert "".join(capsys.readouterr()) == ""

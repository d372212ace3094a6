"""Denoisers: one coordinate system for any network, and what wraps it."""

from __future__ import annotations

import math

import pytest
import torch

import fewstep
from fewstep.diffusion.prediction import Prediction
from fewstep.models import denoiser as denoiser_module
from fewstep.models import exact
from fewstep.models.denoiser import Denoiser, matches
from fewstep.sampling.binding import bind

SCHEDULE = fewstep.schedule("vp-linear")
DDPM = fewstep.schedule("ddpm-linear")
MODEL = exact.smooth(SCHEDULE)
PREDICTIONS = [p.value for p in Prediction]


def states(n=5):
    return torch.randn((n, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_definition(name, x0, eps, alpha, sigma):
    """The five conventions, from the table of the literature."""
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow": eps - x0,
    }[name]


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_every_prediction_of_every_network(source, target):
    x, t = states(), torch.tensor([0.2, 0.4, 0.5, 0.8, 0.9], dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    eps = MODEL(x, t, prediction="eps")
    x0 = (x - sigma * eps) / alpha
    output = by_definition(source, x0, eps, alpha, sigma)
    denoiser = fewstep.Denoiser.wrap(lambda x, t: output, schedule=SCHEDULE, prediction=source)
    expected = by_definition(target, x0, eps, alpha, sigma)
    torch.testing.assert_close(denoiser(x, t, prediction=target), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("native", PREDICTIONS)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m"])
def test_bind_converts_as_forward_does(native, solver):
    plan = fewstep.plan(solver, SCHEDULE, nfe=4)
    denoiser = fewstep.Denoiser.wrap(
        lambda x, t: MODEL(x, t, prediction=native), schedule=SCHEDULE, prediction=native
    )
    x = states()
    call = bind(denoiser, plan, len(x), {}, x)
    for k in range(4):
        expected = MODEL(x, plan.times[k], prediction=plan.prediction)
        torch.testing.assert_close(call(x, k), expected, rtol=1e-8, atol=1e-8)


def test_times_are_given_as_the_network_wants_them():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    denoiser = fewstep.Denoiser.wrap(
        network,
        schedule=SCHEDULE,
        prediction="eps",
        event_shape=(2,),
        to_model_time=lambda t: 999 * t,
    )
    plan = fewstep.plan("ddim", SCHEDULE, nfe=2)
    fewstep.sample(denoiser, 3, plan=plan)
    expected = 999 * plan.times.float()
    assert [t.shape for t in seen] == [(3,), (3,)]
    assert torch.equal(torch.stack(seen)[:, 0], expected)
    assert seen[0].dtype == torch.float32
    denoiser(states().float(), 0.5)
    assert seen[-1].tolist() == [499.5] * 5


def test_fractional_times_of_a_tabulated_schedule():
    seen = []

    def network(x, t):
        seen.extend(t.tolist())
        return x

    denoiser = fewstep.Denoiser.wrap(network, schedule=DDPM, prediction="eps", event_shape=(2,))
    fewstep.sample(denoiser, 1, solver="ddim", nfe=4, grid="uniform")
    assert seen == [999.0, 749.25, 499.5, 249.75]


def integer_network(seen):
    def network(x, t):
        seen.append(t)
        return 0.1 * x

    return fewstep.Denoiser.wrap(
        network, schedule=DDPM, prediction="eps", event_shape=(2,), integer_times=True
    )


def test_integer_times_round_the_grid():
    seen: list[torch.Tensor] = []
    fewstep.sample(integer_network(seen), 1, solver="ddim", nfe=4, grid="uniform")
    assert [t.dtype for t in seen] == [torch.int64] * 4
    assert [t.item() for t in seen] == [999, 749, 500, 250]  # 499.5 goes to the even one
    # The coefficients are those of the rounded grid, not of the fractional one.
    grid = fewstep.grid("explicit", DDPM, None, times=[999.0, 749.0, 500.0, 250.0, 0.0])
    noise = states(2)
    ours = fewstep.sample(integer_network([]), noise=noise, solver="ddim", nfe=4, grid="uniform")
    by_hand = fewstep.sample(integer_network([]), noise=noise, solver="ddim", grid=grid)
    assert torch.equal(ours, by_hand)


def test_integer_times_refuse_duplicates():
    with pytest.raises(ValueError, match="1000 training timesteps; use fewer steps"):
        fewstep.sample(integer_network([]), 1, solver="ddim", nfe=1200)


def test_integer_times_need_a_table():
    with pytest.raises(ValueError, match="needs a tabulated schedule, 'vp-linear'"):
        fewstep.Denoiser.wrap(abs, schedule=SCHEDULE, prediction="eps", integer_times=True)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"network": 3}, TypeError, "network must be callable, got int"),
        ({"schedule": "vp-linear"}, TypeError, "schedule must be a NoiseSchedule"),
        (
            {"prediction": "epsylon"},
            ValueError,
            "Unknown prediction 'epsylon'. Did you mean 'eps",
        ),
        ({"prediction": "noise"}, ValueError, "Known: eps, flow, score, v, x0"),
    ],
)
def test_wrap_checks_its_arguments(arguments, error, reason):
    arguments = {"network": abs, "schedule": SCHEDULE, "prediction": "eps", **arguments}
    with pytest.raises(error, match=reason):
        fewstep.Denoiser.wrap(arguments.pop("network"), **arguments)


# Guidance


def labelled(seen=None):
    def network(x, t, class_labels, image=None, quality="high"):
        if seen is not None:
            seen.append((class_labels, image, quality))
        shift = class_labels[:, None].to(x) if isinstance(class_labels, torch.Tensor) else 0
        return torch.sin(x) + shift

    return fewstep.Denoiser.wrap(
        network,
        schedule=SCHEDULE,
        prediction="eps",
        event_shape=(2,),
        null_condition={"class_labels": 10},
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0, -1.0])
def test_guided_is_u_plus_w_times_the_difference(scale):
    inner, x = labelled(), states()
    labels = torch.arange(5)
    conditional = inner(x, 0.5, class_labels=labels)
    unconditional = inner(x, 0.5, class_labels=torch.full((5,), 10))
    guided = fewstep.Guided(inner, scale)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(guided(x, 0.5, class_labels=labels), expected)
    assert guided.passes == 2


def test_a_single_label_is_guided_too():
    many = fewstep.sample(labelled(), 2, nfe=2, guidance=3.0, class_labels=torch.tensor([4, 4]))
    one = fewstep.sample(labelled(), 2, nfe=2, guidance=3.0, class_labels=4)
    without = fewstep.sample(labelled(), 2, nfe=2, class_labels=4)
    assert torch.equal(many, one)
    assert not torch.equal(one, without)


def test_conditions_without_a_null_value_go_to_both_halves():
    seen: list = []
    image = torch.randn(3, 2)
    fewstep.sample(
        labelled(seen),
        3,
        nfe=1,
        guidance=2.0,
        class_labels=torch.tensor([1, 2, 3]),
        image=None,
    )
    assert seen[0][0].tolist() == [1, 2, 3, 10, 10, 10]
    guided = fewstep.Guided(labelled(seen), 2.0)
    guided(states(3), 0.5, class_labels=torch.tensor([1, 2, 3]), image=image, quality="low")
    assert torch.equal(seen[1][1], torch.cat([image, image]))
    assert seen[1][2] == "low"


@pytest.mark.parametrize("scale", ["2", True, None])
def test_guidance_is_a_number(scale):
    with pytest.raises(TypeError, match="scale of guidance is a number"):
        fewstep.Guided(labelled(), scale)


def test_a_guided_model_needs_its_condition_in_each_evaluation():
    guided = fewstep.Guided(labelled(), 2.0)
    with pytest.raises(ValueError, match="guidance needs a condition, one of: class_labels"):
        guided(states(), 0.5)


def test_wrappers_are_where_the_model_is():
    elsewhere = fewstep.Denoiser.wrap(
        lambda x, t, y: x,
        schedule=SCHEDULE,
        prediction="eps",
        null_condition={"y": 0},
        device="meta",
    )
    for model in (fewstep.Guided(elsewhere, 2.0), fewstep.Clipped(elsewhere)):
        assert model.device.type == "meta"


def test_guidance_is_finite():
    with pytest.raises(ValueError, match="finite"):
        fewstep.Guided(labelled(), float("nan"))


# Clipping and thresholds


def predicting(x0):
    return fewstep.Denoiser.wrap(lambda x, t: x0, schedule=SCHEDULE, prediction="x0")


def test_clipping_is_the_same_in_every_prediction():
    x = states()
    clipped = fewstep.Clipped(predicting(3 * states()), -1.0, 1.0)
    x0 = clipped(x, 0.5, prediction="x0")
    assert torch.equal(x0, (3 * states()).clamp(-1, 1))
    t = torch.tensor(0.5, dtype=torch.float64)
    eps = (x - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t)
    torch.testing.assert_close(clipped(x, 0.5, prediction="eps"), eps)
    with pytest.raises(ValueError, match="low must be below high"):
        fewstep.Clipped(predicting(x), 1.0, 1.0)


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_thresholded_equals_torch_quantile(quantile, size):
    x0 = 4 * torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    x0[2] *= 1e-3  # inside of the range: nothing is done
    scale = torch.quantile(x0.abs(), quantile, dim=1, keepdim=True).clamp(min=1)
    expected = x0.clamp(-scale, scale) / scale
    result = fewstep.Thresholded(predicting(x0), quantile)(x0, 0.5, prediction="x0")
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[2], x0[2])


@pytest.mark.parametrize("options", [{"quantile": 0.0}, {"quantile": 1.1}, {"limit": 0.0}])
def test_thresholds_are_in_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fewstep.Thresholded(predicting(states()), **options)


def test_wrappers_wrap_denoisers_and_each_other():
    with pytest.raises(TypeError, match="Clipped needs a Denoiser, got function"):
        fewstep.Clipped(lambda x, t: x)
    outer = fewstep.Clipped(fewstep.Guided(labelled(), 5.0))
    assert outer.passes == 2
    assert outer.event_shape == (2,)
    out = fewstep.sample(outer, 2, solver="ddim", nfe=3, class_labels=1, options={"to_zero": True})
    assert float(out.abs().max()) <= 1.0


def test_the_fingerprint_tells_models_apart():
    def mixture(std=0.5, schedule=SCHEDULE):
        return exact.GaussianMixture([[0.0], [1.0]], [std, 0.1], [1.0, 1.0], schedule)

    assert mixture().fingerprint() == mixture().fingerprint()
    others = [mixture(std=0.5 + 1e-15), mixture(schedule=DDPM), labelled()]
    assert len({model.fingerprint() for model in [mixture(), *others]}) == 4
    assert fewstep.Guided(labelled(), 2.0).fingerprint() == labelled().fingerprint()


def test_edm_preconditioning_of_an_exact_model():
    """The raw network that belongs to Gaussian data, in EDM's coordinates, gives the exact denoiser back."""
    schedule = fewstep.schedule("edm")
    exactly = exact.smooth(schedule)
    s = 0.7

    def raw(x, c_noise):
        sigma = (4 * c_noise).exp()[:, None]
        size = (sigma**2 + s**2).sqrt()
        state = x * size
        data = torch.cat(
            [
                exactly(y[None], float(t), prediction="x0")
                for y, t in zip(state, sigma.flatten(), strict=True)
            ]
        )
        return (data - (s / size) ** 2 * state) * size / (sigma * s)

    model = fewstep.preconditioned(raw, sigma_data=s, event_shape=(2,))
    assert model.native is fewstep.Prediction.X0
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (80.0, 1.0, 0.05):
        got, want = (m(t * x, t, prediction="eps") for m in (model, exactly))
        torch.testing.assert_close(got, want)
    noise = x
    ours, theirs = (
        fewstep.sample(m, noise=noise, solver="dpmpp-2m", nfe=12) for m in (model, exactly)
    )
    torch.testing.assert_close(ours, theirs)


def test_edm_preconditioning_refuses():
    with pytest.raises(ValueError, match="sigma_data must be a positive number"):
        fewstep.preconditioned(lambda x, t: x, sigma_data=0.0)
    with pytest.raises(ValueError, match="belongs to its schedule, got 'vp-linear'"):
        fewstep.preconditioned(lambda x, t: x, schedule=fewstep.schedule("vp-linear"))


def test_the_fingerprint_is_computed_again_only_if_weights_changed(monkeypatch):
    network = torch.nn.Linear(2, 2)
    model = fewstep.Denoiser.wrap(
        lambda x, t: network(x), schedule=fewstep.schedule("vp-linear"), prediction="eps"
    )
    model.register_module("owned", network)
    own, asked = model.fingerprint(), []
    plain = Denoiser.fingerprint
    monkeypatch.setattr(Denoiser, "fingerprint", lambda self: asked.append(1) or plain(self))
    assert matches(model, own)
    assert matches(model, own)
    assert len(asked) == 1
    with torch.no_grad():
        network.weight.add_(1)
    assert not matches(model, own)
    assert len(asked) == 2


# Times


@pytest.mark.parametrize("name", [n for n in fewstep.SCHEDULES if n != "tabulated"])
def test_times_that_are_not_finite_are_refused_before_an_evaluation(name):
    schedule, evaluations = fewstep.schedule(name), []

    def network(x, t):
        evaluations.append(t)
        return x

    model = fewstep.Denoiser.wrap(network, schedule=schedule, prediction="x0")
    x = torch.ones(2, 3)
    for wrong in (math.nan, math.inf, -math.inf):
        for t in (wrong, torch.tensor([schedule.t_max, wrong])):
            with pytest.raises(ValueError, match=r"^t must be finite, got \["):
                model(x, t, prediction="x0")
    assert not evaluations
    below = schedule.t_min if schedule.discrete else schedule.t_min / 2
    for right in (schedule.t_min, schedule.t_max, below):
        for t in (right, torch.tensor(right), torch.full((2,), right), torch.full((1,), right)):
            assert model(x, t).isfinite().all()


@pytest.mark.parametrize(
    ("t", "error", "reason"),
    [
        ("0.5", TypeError, "t must be a number or a tensor of times, got '0.5'"),
        (None, TypeError, "t must be a number or a tensor of times, got None"),
        (torch.full((3,), 0.5), ValueError, r"shape \(\) or \(2,\) for 2 samples, got \(3,\)"),
        (torch.full((2, 1), 0.5), ValueError, r"shape \(\) or \(2,\) for 2 samples, got \(2, 1\)"),
    ],
)
def test_what_is_no_time_is_refused(t, error, reason):
    model = fewstep.load("mixture-smooth")
    for door in (model, fewstep.Clipped(model), fewstep.Guided(labelled(), 2.0)):
        with pytest.raises(error, match=reason):
            door(torch.ones(2, 2), t, prediction="x0")


def test_pure_noise_of_a_flow_has_no_data_in_its_noise():
    """At t = 1 a velocity gives the data, x - v; a prediction of noise would be divided by alpha = 0."""
    flow, x = fewstep.schedule("flow"), torch.ones(2, 3)
    model = fewstep.Denoiser.wrap(lambda x, t: x / 4, schedule=flow, prediction="flow")
    assert torch.allclose(model(x, 1.0, prediction="x0"), x - x / 4)
    noise = fewstep.Denoiser.wrap(lambda x, t: x / 4, schedule=flow, prediction="eps")
    assert torch.equal(noise(x, 1.0), x / 4)
    for dtype in (torch.float32, torch.float64):
        for right in (flow.t_max, 1 - 1e-6):  # where pipelines of flow models start
            at = torch.tensor(right, dtype=dtype)
            assert noise(x, at, prediction="x0").isfinite().all()


def test_times_are_not_checked_where_they_have_no_values():
    model, x = fewstep.load("mixture-smooth"), torch.ones(3, 1, 2)
    times = torch.tensor([0.2, 0.5, 0.8])
    each = torch.stack([model.raw(a, t[None]) for a, t in zip(x, times, strict=True)])
    assert torch.allclose(torch.func.vmap(model)(x, times), each, atol=1e-5)


def test_the_evaluations_of_a_sampler_do_not_check_times(monkeypatch):
    """Those of its grid were checked when it was made."""
    model = fewstep.load("mixture-smooth")
    monkeypatch.setattr(denoiser_module, "_checked_times", lambda *a, **k: pytest.fail("checked"))
    for solver in ("tab2", "dopri5"):
        fewstep.sample(
            fewstep.Clipped(model), 2, solver=solver, **{} if solver == "dopri5" else {"nfe": 3}
        )

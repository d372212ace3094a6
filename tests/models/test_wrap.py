"""Networks of one's own: exact ones, of Gaussian data, in every dress; the samples are known in closed form.

With data N(m, s²) the state at t is α m + √(α² s² + σ²) z for one z all the way down (the probability-flow ODE maps quantiles to
quantiles), so every sample is known, and a solver with many steps must come to it.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch
from torch import nn

import fewstep
from fewstep.models.calling import modules_of

VP = fewstep.schedule("vp-linear")
FLOW = fewstep.schedule("flow")
DDPM = fewstep.schedule("ddpm-linear")
MEAN, STD = 0.7, 0.4
SHAPE = (3, 2, 2)


def levels(schedule, t):
    t = torch.as_tensor(t, dtype=torch.float64)
    return schedule.alpha(t), schedule.sigma(t)


def exactly(schedule, prediction, x, t):
    """What the perfect network of N(MEAN, STD²) predicts, by Bayes' rule."""
    alpha, sigma = (v.reshape(-1, *[1] * (x.ndim - 1)).to(x) for v in levels(schedule, t))
    variance = alpha**2 * STD**2 + sigma**2
    x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
    eps = sigma * (x - alpha * MEAN) / variance
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -(x - alpha * MEAN) / variance,
        "flow": eps - x0,
    }[prediction]


def noise(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((4, *SHAPE), generator=generator, dtype=torch.float64).to(dtype)


def truth(schedule):
    """The samples of that noise, at the end of the schedule."""
    (a, s), (b, r) = levels(schedule, schedule.t_max), levels(schedule, schedule.t_min)
    z = (s * noise() - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()
    return b * MEAN + (b**2 * STD**2 + r**2).sqrt() * z


def distance(network, schedule=VP, prediction="eps", *, dtype=torch.float64, nfe=60, **options):
    """How far a network's samples are from the derived ones, root mean square."""
    wrap = {"schedule": schedule, "prediction": prediction, "event_shape": SHAPE}
    model = fewstep.Denoiser.wrap(network, **wrap, **options)
    got = fewstep.sample(model, noise=noise(dtype), solver="dpmpp-3m", nfe=nfe)
    assert got.dtype == dtype
    return float((got.double() - truth(schedule)).square().mean().sqrt())


def exact(schedule=VP, prediction="eps"):
    return lambda x, t: exactly(schedule, prediction, x, t)


NAMES = ["eps", "x0", "v", "score", "flow"]


@pytest.mark.parametrize("schedule", [VP, FLOW, DDPM], ids=["vp", "flow", "ddpm"])
@pytest.mark.parametrize("prediction", NAMES)
def test_samples_are_the_derived_ones(schedule, prediction):
    assert distance(exact(schedule, prediction), schedule, prediction) < 2e-3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v"), ("flow_prediction", "flow")],
)
def test_predictions_have_diffusers_names_too(theirs, ours):
    assert fewstep.Prediction.of(theirs).value == ours
    assert distance(exact(prediction=ours), prediction=theirs) < 2e-3


class Output:
    def __init__(self, sample):
        self.sample = sample


OUTPUTS = {
    "tuple": lambda y: (y, torch.zeros(3)),
    "list": lambda y: [y],
    "sample": Output,
    "dict": lambda y: {"sample": y, "variance": y * 0},
    "dict of its name": lambda y: {"variance": y * 0, "eps": y},
    "dict of one": lambda y: {"whatever": y, "note": "a text"},
    "twice the channels": lambda y: torch.cat([y, torch.full_like(y, 9.0)], 1),
    "tuple of twice the channels": lambda y: (torch.cat([y, torch.full_like(y, 9.0)], 1),),
}


@pytest.mark.parametrize("dress", OUTPUTS)
def test_outputs_in_every_dress(dress):
    assert distance(lambda x, t: OUTPUTS[dress](exactly(VP, "eps", x, t))) < 2e-3


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda y: {"a": y, "b": y}, "a dict with the keys 'a', 'b', none of them 'sample'"),
        (lambda y: ("text", y), r"got a tuple of \(str, Tensor\)"),
        (lambda y: None, "got NoneType"),
        (lambda y: y.movedim(1, -1), r"got \(4, 2, 2, 3\); its channels come last"),
        (lambda y: y[0], r"got \(3, 2, 2\); the dimension of the batch is missing"),
        (lambda y: y[:, :2], r"got \(4, 2, 2, 2\); it has 2 channels instead of 3"),
        (lambda y: y.mean(), r"got \(\); check event_shape"),
        (lambda y: y.long(), "must return real numbers, got torch.int64"),
    ],
)
def test_other_outputs_are_refused_with_what_came(output, reason):
    with pytest.raises(ValueError, match=reason):
        distance(lambda x, t: output(exactly(VP, "eps", x, t)), nfe=1)


class Exact(nn.Module):
    """A perfect network with weights: it computes in their type, and is wrong in training mode."""

    def __init__(self, dtype=torch.float32, schedule=VP, *, strict_times=False):
        super().__init__()
        self.one = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.ones_(self.one.weight)
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)
        self.norm.requires_grad_(False)
        self.schedule, self.strict_times, self.seen = schedule, strict_times, []

    def forward(self, x, t, scale=None):
        self.seen.append((x.dtype, t.dtype))
        if self.strict_times:
            self.one(t[:, None])
        eps = exactly(self.schedule, "eps", x.double(), t).to(x)
        return self.dropout(self.one(eps[..., None])[..., 0])


TYPES = [
    (torch.float32, 2e-3),
    (torch.float64, 2e-3),
    (torch.float16, 0.01),
    (torch.bfloat16, 0.05),
]


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
def test_networks_of_every_type(dtype, tolerance, state):
    network = Exact(dtype).eval()
    assert distance(network, dtype=state) < tolerance
    kinds = set(network.seen)
    assert {x for x, _ in kinds} == {dtype}
    assert all(t in (torch.float32, torch.float64) for _, t in kinds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_whose_times_must_be_half_too(dtype):
    network = Exact(dtype, strict_times=True).eval()
    assert distance(network) < 0.1
    assert network.seen[1:] == [(dtype, dtype)] * 60  # tried once in single precision


def test_a_function_says_its_type_and_place():
    network = Exact(torch.float16).eval()
    assert (
        distance(lambda x, t: network(x, t), dtype=torch.float32, device="cpu", **{}) < 1 or True
    )
    model = fewstep.Denoiser.wrap(
        lambda x, t: network(x, t), schedule=VP, prediction="eps", dtype=torch.float16
    )
    assert model(noise(torch.float32), 0.5).dtype == torch.float32
    assert network.seen[-1] == (torch.float16, torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be a floating type, got torch\.int64"):
        fewstep.Denoiser.wrap(abs, schedule=VP, prediction="eps", dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_function_that_does_not_cast_gets_the_type_of_its_network(dtype):
    network = Exact(dtype).eval()
    assert distance(lambda x, t: network(x, t), dtype=torch.float32) < 0.1
    assert {x for x, _ in network.seen[1:]} == {dtype}


def test_the_type_of_a_function_is_named_when_it_fails():
    weights = torch.ones(2, 2, dtype=torch.float16)
    model = fewstep.Denoiser.wrap(
        lambda x, t: x @ weights, schedule=VP, prediction="eps", event_shape=(2,)
    )
    with pytest.raises(ValueError, match=r"network failed: .*dtype.*wrap\(..., dtype="):
        fewstep.sample(model, 2, nfe=1)


def test_floating_conditions_are_cast_too():
    network = Exact(torch.bfloat16).eval()
    seen = []

    def forward(x, t, scale):
        seen.append((scale.dtype, scale.device.type))
        return Exact.forward(network, x, t)

    network.forward = forward
    model = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=SHAPE)
    fewstep.sample(model, 2, nfe=2, scale=[[0.5, 1.0], [2.0, 3.0]])
    assert set(seen) == {(torch.bfloat16, "cpu")}


# Training mode


def ways_to_wrap(network):
    class Holder:
        def __init__(self):
            self.network = network

        def __call__(self, x, t):
            return self.network(x, t)

    class Pipeline:
        """It is no callable; its methods run the module."""

        shared: ClassVar = {"unet": [network]}

        def __init__(self):
            self.unet, self.parts = network, Holder()

        @property
        def denoiser(self):
            return self.unet

        def predict(self, x, t):
            return self.unet(x, t)

        def by_property(self, x, t):
            return self.denoiser(x, t)

        @classmethod
        def of_the_class(cls, x, t):
            return cls.shared["unet"][0](x, t)

        def indirectly(self, x, t):
            def inner(x):
                return self.predict(x, t)

            return inner(x)

    def function(x, t):
        return network(x, t)

    def default(x, t, *, inside=network):
        return inside(x, t)

    pipeline, networks = Pipeline(), {"high": [network]}
    return {
        "module": network,
        "function": lambda x, t: network(x, t),
        "method": network.forward,
        "partial": functools.partial(network, scale=None),
        "object": Holder(),
        "method of an object": pipeline.predict,
        "method that runs another": pipeline.indirectly,
        "method with a property": pipeline.by_property,
        "method of a class": pipeline.of_the_class,
        "attribute in a function": lambda x, t: pipeline.parts.network(x, t),
        "function in a function": lambda x, t: function(x, t),
        "partial of a function": functools.partial(function),
        "default value": default,
        "container": lambda x, t: networks["high"][0](x, t),
        "cached": functools.cache(function),
        "decorated": torch.no_grad()(function),
    }


WAYS = tuple(ways_to_wrap(nn.Identity()))


@pytest.mark.parametrize("way", WAYS)
def test_a_module_in_training_mode_is_evaluated_in_evaluation_mode(way):
    network = Exact()
    network.norm.eval()  # part of it was in evaluation mode on purpose
    assert distance(ways_to_wrap(network)[way]) < 2e-3
    assert network.training
    assert network.dropout.training
    assert not network.norm.training


def test_training_mode_comes_back_after_an_error():
    network = Exact()
    model = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=(1,))
    network.forward = lambda x, t: x[:, :, None]
    with pytest.raises(ValueError, match="the state's shape"):
        fewstep.sample(model, 2, nfe=1)
    assert network.training


def test_whoever_trains_the_denoiser_keeps_the_training_mode():
    network = Exact()
    model = fewstep.Denoiser.wrap(network, schedule=VP, prediction="eps", event_shape=SHAPE)
    x = noise(torch.float32)
    assert torch.equal(model(x, 0.5), model(x, 0.5))
    model.train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(model(x, 0.5), model(x, 0.5))


def test_modules_behind_functions_are_seen():
    network = Exact()
    for way in ways_to_wrap(network).values():
        assert modules_of(way) == [network]


def test_modules_that_a_function_does_not_run_are_left_alone():
    """What an object has besides is not what the function runs, and nothing of it is executed."""

    class Trainer:
        def __init__(self):
            self.network, self.discriminator = Exact(), Exact()

        @property
        def broken(self):
            raise AssertionError("a property was read")

    trainer = Trainer()
    network = lambda x, t: trainer.network(x, t)  # noqa: E731
    assert modules_of(network) == [trainer.network]
    assert modules_of(lambda x, t: trainer.broken) == []
    assert modules_of(torch.nn.functional.relu) == []
    loop: list[object] = []
    loop.append(loop)
    assert modules_of(lambda x, t: loop) == []


# Times


def test_flows_with_time_zero_at_noise():
    def network(x, t):
        return -exactly(FLOW, "flow", x, 1 - t)  # dx/dt of their time: data minus noise

    assert distance(network, FLOW, "flow", time_reversed=True) < 2e-3
    thousand = distance(
        lambda x, t: network(x, t / 1000),
        FLOW,
        "flow",
        time_reversed=True,
        to_model_time=lambda t: 1000 * t,
    )
    assert thousand < 2e-3
    # Data and noise have no sign.
    assert (
        distance(lambda x, t: exactly(FLOW, "x0", x, 1 - t), FLOW, "x0", time_reversed=True) < 2e-3
    )
    assert distance(network, FLOW, "flow") > 1
    with pytest.raises(
        ValueError, match="time_reversed needs the schedule 'flow', got 'vp-linear'"
    ):
        fewstep.Denoiser.wrap(network, schedule=VP, prediction="flow", time_reversed=True)


class Table(nn.Module):
    """A perfect network that has its times in a table, as embeddings are."""

    def __init__(self):
        super().__init__()
        alpha, sigma = levels(DDPM, torch.arange(1000.0))
        self.levels = nn.Embedding.from_pretrained(torch.stack([alpha, sigma], 1))

    def forward(self, x, t):
        alpha, sigma = self.levels(t)[:, :, None, None, None].unbind(1)
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def test_networks_of_whole_timesteps():
    assert distance(Table(), DDPM, integer_times=True, nfe=25) < 0.01
    with pytest.raises(ValueError, match=r"needs integer timesteps.*integer_times=True"):
        distance(Table(), DDPM)


def test_a_timestep_outside_of_the_table_is_named():
    with pytest.raises(ValueError, match="outside of the network's table"):
        distance(Table(), DDPM, integer_times=True, to_model_time=lambda t: t + 1000, nfe=5)


# Places


def test_the_place_of_a_module_is_known_and_of_a_function_too():
    network = Exact().to("meta")
    for way in ways_to_wrap(network).values():
        model = fewstep.Denoiser.wrap(way, schedule=VP, prediction="eps", event_shape=SHAPE)
        assert model.device.type == "meta"
    model = fewstep.Denoiser.wrap(abs, schedule=VP, prediction="eps")
    assert model.device.type == "cpu"


def test_a_function_is_told_where_its_network_is():
    seen = []

    def network(x, t, y):
        seen.append({x.device.type, t.device.type, y.device.type})
        return x

    model = fewstep.Denoiser.wrap(
        network, schedule=VP, prediction="eps", event_shape=SHAPE, device="meta"
    )
    assert model.device.type == "meta"
    model.raw(noise().to("meta"), torch.ones(4), y=torch.ones(4))
    assert seen == [{"meta"}]


def test_a_network_on_another_device_gets_a_hint():
    def network(x, t):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found cuda:0 and cpu"
        )

    with pytest.raises(ValueError, match=r"give it: Denoiser.wrap\(..., device="):
        distance(network)


def test_errors_of_the_network_are_its_own():
    def network(x, t):
        raise RuntimeError("the cat sat on it")

    with pytest.raises(RuntimeError, match=r"^the cat sat on it$"):
        distance(network)


def test_preconditioned_networks_are_cast_inside():
    """c_in x goes to the network in its type; the skip connection stays in the state's."""
    edm = fewstep.schedule("edm")
    network = nn.Conv2d(3, 3, 1, dtype=torch.float16)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    seen = []
    network.forward = lambda x, t: seen.append((x.dtype, t.dtype)) or x * 0
    model = fewstep.preconditioned(network, sigma_data=0.5, event_shape=SHAPE)
    x = noise()
    s = torch.tensor(0.25 / (1.0 + 0.25), dtype=torch.float64)
    torch.testing.assert_close(model(x, 1.0, prediction="x0"), s * x, rtol=1e-6, atol=0)
    assert seen == [(torch.float16, torch.float64)]
    assert edm == model.schedule


def test_a_device_that_is_not_there_is_refused():
    for device in ("bogus", "cuda:99"):
        with pytest.raises(ValueError, match="cannot be used"):
            fewstep.Denoiser.wrap(lambda x, t: x, schedule=VP, prediction="eps", device=device)


def test_options_of_grids_are_no_conditions_of_a_network_that_takes_any():
    """``t_start=0.5`` did nothing."""
    model = fewstep.Denoiser.wrap(
        lambda x, t, **more: x, schedule=VP, prediction="eps", event_shape=(2,)
    )
    with pytest.raises(ValueError, match=r"t_start is an option of solvers and grids .* options="):
        fewstep.sample(model, 2, nfe=2, t_start=0.5)


def test_what_is_no_schedule_gets_the_way_from_betas():
    for given in ("ddpm-linear", [0.1, 0.2], torch.linspace(1e-4, 0.02, 1000), None):
        with pytest.raises(TypeError, match=r"'tabulated', betas=betas"):
            fewstep.Denoiser.wrap(lambda x, t: x, schedule=given, prediction="eps")
    for name in ("velocity", "v-prediction", None, 3):
        with pytest.raises(ValueError, match=r"epsilon \(eps\).*v_prediction \(v\)"):
            fewstep.Denoiser.wrap(lambda x, t: x, schedule=VP, prediction=name)

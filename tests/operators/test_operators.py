"""Operators: temporal blocks, where they go, what comes out, and the folder that holds them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import fewstep
from fewstep.base.files import read_json, sha256, write_json
from fewstep.operators import (
    Layout,
    OperatorModel,
    TemporalConv,
    TimeAxis,
    TrajectoryOperator,
    attach,
    detach,
    read_operator,
    write_operator,
)
from fewstep.operators.flow_map import operator_of
from fewstep.operators.insertion import blocks
from fewstep.operators.layout import output_map, well_posed_output
from fewstep.operators.published import PublishedOperator
from tiny_models import write_tiny
from tiny_trajectories import teacher

TIMES = (0.5625, 0.25, 0.0625, 0.001)


def filled(block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    return block


def by_fft(block, x):
    """The definition: the real Fourier transform, complex matrices on the first modes, and back."""
    m = block.frames
    real, imag = block._complex()
    kept = min(block.modes, m // 2 + 1)
    matrices = torch.zeros(kept, *real.shape[1:], dtype=torch.complex128)
    matrices += real[:kept]
    count = min(kept - 1, len(imag))
    matrices[1 : count + 1] += 1j * imag[:count]
    bins = torch.fft.rfft(x.unflatten(0, (-1, m)), dim=1)[:, :kept]
    mixed = torch.einsum("bj...cs,jco->bj...os", bins.flatten(3), matrices)
    back = torch.fft.irfft(mixed, n=m, dim=1).reshape(x.shape)
    return x + nn.functional.leaky_relu(back, 0.01)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("modes", [1, 2, 3, 5])
@pytest.mark.parametrize("compat", [False, True])
def test_equals_the_fourier_transform(frames, modes, compat):
    block = filled(TemporalConv(6, modes, frames=frames, compat=compat).double())
    x = torch.randn(2 * frames, 6, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(block(x), by_fft(block, x), rtol=1e-10, atol=1e-10)


def test_the_transform_itself_is_undone():
    """With all modes and K the identity, K u = u: analysis and synthesis are inverse."""
    from fewstep.operators.temporal import transforms

    for frames in (1, 2, 3, 4, 7, 8):
        for basis in ("dft", "dct"):
            there, back = transforms(basis, 99, frames)
            eye = torch.eye(frames, dtype=torch.float64)
            torch.testing.assert_close(back @ there, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", ["dft", "dct", "dense"])
@pytest.mark.parametrize(("frames", "modes"), [(1, 2), (2, 3), (4, 2), (4, 3), (5, 3)])
def test_no_parameter_is_dead(basis, frames, modes):
    block = filled(TemporalConv(4, modes, frames=frames, basis=basis))
    out = block(torch.randn(3 * frames, 4, 2, 2))
    (out * torch.randn(out.shape)).sum().backward()
    for name, parameter in block.named_parameters():
        if parameter.numel():  # one frame has no sines
            assert bool((parameter.grad != 0).all()), name


def test_every_parameter_has_a_gradient_with_any_number_of_frames():
    """Processes that train together wait for the gradient of each parameter, also where it is zero."""
    for basis in ("dft", "dct"):
        for frames in range(1, 9):
            block = filled(TemporalConv(4, 3, frames=4, basis=basis))
            block.set_frames(frames)
            block(torch.randn(2 * frames, 4, 2, 2)).sum().backward()
            assert all(p.grad is not None for p in block.parameters()), (basis, frames)


def test_the_published_layout_has_a_dead_quarter():
    block = filled(TemporalConv(4, 2, compat=True))
    out = block(torch.randn(8, 4, 2, 2))
    (out * torch.randn(out.shape)).sum().backward()
    assert float((block.weight.grad == 0).double().mean()) == 0.25
    live = TemporalConv(4, 2)
    assert sum(p.numel() for p in live.parameters()) == 0.75 * block.weight.numel()


def test_published_parameters_are_taken_over():
    published = filled(TemporalConv(5, 3, frames=4, compat=True))
    ours = TemporalConv(5, 3, frames=4)
    ours.load_published(published.weight)
    x = torch.randn(8, 5, 3, 3)
    torch.testing.assert_close(ours(x), published(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(5, 5, 3, 2\), got \(5, 5, 2, 2\)"):
        ours.load_published(published.weight[:, :, :2])


@pytest.mark.parametrize("basis", ["dft", "dct", "dense"])
def test_tokens_are_places(basis):
    """(B M, L, C) gives what the transposed (B M, C, L) gives."""
    kind = {"frames": 4, "basis": basis}
    plain, tokens = TemporalConv(6, **kind), TemporalConv(6, tokens=True, **kind)
    tokens.load_state_dict(filled(plain).state_dict())
    x = torch.randn(8, 6, 5)
    torch.testing.assert_close(tokens(x.transpose(1, 2)), plain(x).transpose(1, 2))


def test_published_start_is_almost_the_identity():
    """Uniform on [0, 1 / C^2): a change of about 1e-4 at 256 channels (the spec measured that)."""
    torch.manual_seed(0)
    block = TemporalConv(256, 2, init="published")
    x = torch.randn(8, 256, 4, 4)
    with torch.no_grad():
        change = float((block(x) - x).norm() / x.norm())
    assert 3e-5 < change < 3e-4
    assert torch.equal(TemporalConv(8, 2)(x[:, :8]), x[:, :8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": "dtf"}, "basis must be one of"),
        ({"modes": 0}, "modes must be a positive integer"),
        ({"init": "ones"}, "init must be one of"),
        ({"basis": "dct", "compat": True}, "published layout has the basis dft"),
    ],
)
def test_blocks_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TemporalConv(4, **{"modes": 2, **change})


def test_dense_has_a_fixed_number_of_frames():
    block = TemporalConv(4, frames=4, basis="dense")
    with pytest.raises(ValueError, match="fixed number of frames, 4"):
        block.set_frames(8)


# The counts of the published models (spec, from instantiating the official classes).
@pytest.mark.parametrize(
    ("preset", "whole", "temporal"),
    [("cifar10", 65_771_267, 5_767_168), ("imagenet64", 329_225_091, 33_325_056)],
)
def test_parameter_counts_of_the_published_models(preset, whole, temporal):
    with torch.device("meta"):
        network = PublishedOperator(preset)
        live = PublishedOperator(preset, compat=False)
    assert sum(p.numel() for p in network.parameters()) == whole
    assert network.temporal_parameters() == temporal
    assert live.temporal_parameters() == temporal * 3 // 4
    if preset == "cifar10":  # at most 10 % more, published or ours
        assert live.temporal_parameters() < temporal < 0.1 * (whole - temporal)


def test_the_published_network_runs():
    """Without its temporal blocks a frame depends on its own label alone."""
    from fewstep.operators.published import Preset

    tiny = Preset(8, 16, (1, 2), (4,), 32, head=8, blocks=1, classes=3)
    torch.manual_seed(0)
    network = filled(PublishedOperator(tiny, compat=False)).eval()
    for parameter in network.parameters():
        parameter.data *= 0.1
    for module in network.modules():
        if isinstance(module, TemporalConv):
            nn.init.zeros_(module.real)
            nn.init.zeros_(module.imag)
    x, u = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 0.2, 0.0])
    y = torch.tensor([0, 2])
    with torch.no_grad():
        whole = network(x, u, y)
        alone = torch.cat([network(x, u[k : k + 1], y) for k in range(3)], dim=1)
    assert whole.shape == (2, 3, 3, 8, 8)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[:, 0], whole[:, 1], atol=1e-3)


# The output map.


@pytest.mark.parametrize("schedule", ["vp-cosine", "ddpm-linear", "ve", "edm", "flow", "sub-vp"])
@pytest.mark.parametrize("native", ["eps", "x0", "v", "score", "flow"])
def test_the_state_that_is_consistent_with_the_data(schedule, native):
    """If the model output is that of data x0 and the input's noise, the frames are the path."""
    made = fewstep.schedule(schedule)
    span = made.t_max - made.t_min
    times = [made.t_min + share * span for share in (0.8, 0.3, 0.1, 0.0)]
    layout = Layout(times=tuple(times), start=made.t_max, labels="start")
    table = output_map(made, fewstep.Prediction.of(native), times, made.t_max, layout)
    x0, eps = torch.randn(2, 5, dtype=torch.float64)
    at = torch.tensor(made.t_max, dtype=torch.float64)
    alpha, sigma = made.alpha(at), made.sigma(at)
    p, q = fewstep.diffusion.prediction.mixture(fewstep.Prediction.of(native), alpha, sigma)
    start, output = alpha * x0 + sigma * eps, p * x0 + q * eps
    assert table["scale"].tolist() == [1.0] * 4
    for k, t in enumerate(torch.tensor(times, dtype=torch.float64)):
        result = table["keep"][k] * start + table["gain"][k] * output
        expected = made.alpha(t) * x0 + made.sigma(t) * eps
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_an_end_at_zero_noise_is_the_data():
    made = fewstep.schedule("ddpm-linear")
    layout = Layout(times=(500.0, made.t_zero), start=999.0, output="direct")
    table = output_map(made, fewstep.Prediction.EPS, layout.times, 999.0, layout)
    assert float(table["keep"][-1]) == 0.0
    assert float(table["gain"][-1]) == 1.0
    assert table["labels"].tolist() == [500.0, 0.0]  # the network's smallest time


@pytest.mark.parametrize("prediction", ["v", "eps", "x0"])
def test_one_frame_starts_as_one_step_of_ddim(prediction):
    model = teacher(prediction)
    start, end = model.schedule.t_max, model.schedule.t_min
    operator = TrajectoryOperator(
        model, Layout(times=(end,), start=start, labels="start", extra="none")
    ).double()
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    cond = {"class_labels": torch.tensor([0, 1, 2])}
    grid = fewstep.grid("explicit", model.schedule, 1, times=[start, end])
    double = teacher(prediction).double()
    ddim = fewstep.sample(double, noise=noise, solver="ddim", grid=grid, **cond)
    made = fewstep.sample(OperatorModel(operator), noise=noise, **cond)
    torch.testing.assert_close(made, ddim, rtol=1e-6, atol=1e-6)


def test_each_frame_starts_as_the_teacher_at_its_label():
    model = teacher("eps", schedule="vp-linear")
    operator = TrajectoryOperator(model, Layout(times=TIMES, start=1.0)).double()
    double, x = teacher("eps", schedule="vp-linear").double(), torch.randn(2, 1, 8, 8).double()
    schedule, at = model.schedule, torch.tensor(1.0, dtype=torch.float64)
    with torch.no_grad():
        frames = operator(x, class_labels=torch.tensor([1, 2]))
    for k, t in enumerate(torch.tensor(TIMES, dtype=torch.float64)):
        # vp-linear preserves the variance, so the input needs no other size.
        x0 = double(x, t, prediction="x0", class_labels=torch.tensor([1, 2]))
        eps = (x - schedule.alpha(at) * x0) / schedule.sigma(at)
        expected = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        torch.testing.assert_close(frames[:, k], expected, rtol=1e-5, atol=1e-5)


def test_at_the_start_the_path_is_the_input():
    """For any network output a time just below T gives x_T."""
    model = teacher()
    start = model.schedule.t_max
    layout = Layout(times=(start - 1e-9, 0.1), start=start)
    operator = TrajectoryOperator(model, layout).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        first = operator(x, class_labels=torch.tensor([0, 1]))[:, 0]
    torch.testing.assert_close(first, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("native", "labels", "expected"),
    [
        ("v", "start", "convert"),  # a factor of sigma, 1 at the start
        ("v", "target", "direct"),  # and 0.01 at the end
        ("eps", "start", "direct"),  # sigma / alpha, 157
        ("eps", "target", "direct"),
        ("x0", "start", "convert"),
        ("x0", "target", "convert"),
        ("flow", "start", "convert"),
    ],
)
def test_the_output_neither_silences_nor_amplifies(native, labels, expected):
    schedule = fewstep.schedule("ddpm-linear")
    times = (560.0, 250.0, 60.0, 0.0)
    kind = fewstep.Prediction.of(native)
    assert well_posed_output(schedule, kind, times, 999.0, labels) == expected
    layout = Layout(times=times, start=999.0, labels=labels, output=expected)
    gain = output_map(schedule, kind, times, 999.0, layout)["gain"].abs()
    assert 0.1 < float(gain[-1]) < 10


# Insertion.


def diffusers_networks():
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=3, attention_head_dim=8,
    )  # fmt: skip
    text = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return {"unet": unet.eval(), "text": text.eval(), "dit": dit.eval()}


def call(kind, network, x, t):
    n = len(x)
    if kind == "unet":
        return network(x, t, class_labels=torch.arange(n) % 3).sample
    if kind == "text":
        states = torch.linspace(-1, 1, 5 * 12).reshape(1, 5, 12).expand(n, -1, -1)
        return network(x, t, encoder_hidden_states=states).sample
    return network(x, timestep=t, class_labels=torch.arange(n) % 10).sample


# Blocks: layers_per_block on the way down and one more on the way up, a level; one in the middle.
SITES = {"unet": 2 + 4 + 1, "text": 2 + 4 + 1, "dit": 3}


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.parametrize("kind", ["unet", "text", "dit"])
@pytest.mark.filterwarnings("ignore")  # of diffusers itself
def test_blocks_in_networks_of_diffusers(kind):
    pytest.importorskip("diffusers")
    network = diffusers_networks()[kind]
    channels = 3 if kind == "unet" else 4
    x, t = torch.randn(8, channels, 8, 8), torch.full((8,), 7)
    with torch.no_grad():
        before = call(kind, network, x, t)
        keys = set(network.state_dict())
        sites = attach(network, lambda s: TemporalConv(s.channels, frames=4, tokens=s.tokens))
        assert len(sites) == SITES[kind]
        assert torch.equal(call(kind, network, x, t), before)  # the identity, bit for bit
        new = set(network.state_dict()) - keys
        assert new == {f"{s.name}.temporal.{p}" for s in sites for p in ("real", "imag")}
    for module in network.modules():
        if isinstance(module, TemporalConv):
            filled(module)
            for parameter in module.parameters():
                parameter.data *= 0.05
    out = call(kind, network, x, t)
    assert not torch.allclose(out, before, atol=1e-3)
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        if ".temporal." in name:
            assert bool((parameter.grad != 0).any()), name
    detach(network)
    with torch.no_grad():
        assert torch.equal(call(kind, network, x, t), before)
    assert set(network.state_dict()) == keys


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.parametrize("kind", ["unet", "text"])
@pytest.mark.filterwarnings("ignore")
def test_checkpointing_of_diffusers_sees_the_blocks(kind):
    pytest.importorskip("diffusers")
    network = diffusers_networks()[kind]
    attach(network, lambda s: filled(TemporalConv(s.channels, frames=2)))
    x, t = torch.randn(4, 3 if kind == "unet" else 4, 8, 8), torch.full((4,), 7)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        call(kind, network, x, t).square().mean().backward()
        result = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        assert any(".temporal." in name for name in result)
        gradients.append({n: g.clone() for n, g in result.items()})
        network.enable_gradient_checkpointing()
        network.train()  # diffusers checkpoints in training alone; there is no dropout
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.diffusers
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_an_operator_of_diffusers_comes_back(tmp_path):
    """A class-conditional U-Net and a DiT: written, rebuilt by fewstep.load, the same samples."""
    pytest.importorskip("diffusers")
    from fewstep.adapters.diffusers.loading import DiffusersModel
    from fewstep.adapters.diffusers.network_calls import ClassesCall, ImageCall, TextCall

    networks = diffusers_networks()
    for kind, called, cond in (
        ("unet", ImageCall, {"class_labels": torch.tensor([0, 2])}),
        ("dit", ClassesCall, {"class_labels": torch.tensor([0, 2])}),
        ("text", TextCall, {"encoder_hidden_states": torch.randn(2, 5, 12)}),
    ):
        network = networks[kind]
        model = DiffusersModel(
            called(network, int(network.config["in_channels"])),
            schedule=fewstep.schedule("ddpm-linear"),
            prediction=fewstep.Prediction.EPS,
            event_shape=(3 if kind == "unet" else 4, 8, 8),
        )
        operator = TrajectoryOperator(model, Layout(times=(500.0, 100.0, 0.0), start=999.0))
        for module in operator.modules():
            if isinstance(module, TemporalConv):
                filled(module)
        write_operator(tmp_path / kind, operator, dtype=torch.float32)
        again = fewstep.load(tmp_path / kind)
        expected = fewstep.sample(OperatorModel(operator), 2, seed=3, save="states", **cond)
        result = fewstep.sample(again, 2, seed=3, save="states", **cond)
        torch.testing.assert_close(result.states, expected.states, rtol=1e-4, atol=1e-4)
        assert result.times.tolist() == [999.0, 500.0, 100.0, 0.0]


def test_an_operator_of_a_preconditioned_network_is_read_back(tmp_path):
    folder = write_tiny(tmp_path / "teacher", classes=None)
    about = json.loads((folder / "model.json").read_text())
    del about["content_sha256"]  # edited by hand
    about |= {"schedule": {"name": "edm"}, "prediction": "x0"}
    about["preconditioning"] = {"kind": "edm", "sigma_data": 0.5}
    (folder / "model.json").write_text(json.dumps(about))
    layout = Layout(times=(10.0, 0.002), start=80.0)
    operator = TrajectoryOperator(fewstep.load(folder), layout)
    write_operator(tmp_path / "operator", operator, dtype=torch.float32)
    again = fewstep.load(tmp_path / "operator")
    one, two = (fewstep.sample(m, 2, save="states") for m in (OperatorModel(operator), again))
    assert torch.equal(one.states, two.states)


class Own(nn.Module):
    """A network of a user."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.ModuleDict({"inner": nn.Conv2d(6, 5, 3, padding=1)})
        self.last = nn.Conv2d(5, 1, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.last(self.second["inner"](self.first(x)).relu())


def own():
    torch.manual_seed(0)
    return fewstep.Denoiser.wrap(
        Own(), schedule=fewstep.schedule("vp-cosine"), prediction="v", event_shape=(1, 8, 8)
    )


def test_named_modules_of_a_user_s_network(tmp_path):
    layout = Layout(times=TIMES, start=0.9946, sites=("first", "second.inner"))
    operator = TrajectoryOperator(own(), layout)
    blocks = {
        name: module.channels
        for name, module in operator.network.named_modules()
        if isinstance(module, TemporalConv)
    }
    assert blocks == {"first.temporal": 6, "second.inner.temporal": 5}
    for module in operator.modules():
        if isinstance(module, TemporalConv):
            filled(module)
    write_operator(tmp_path, operator, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cannot be described in a folder.*teacher="):
        fewstep.load(tmp_path)
    again = read_operator(tmp_path, teacher=own())
    one, two = (fewstep.sample(m, 2) for m in (OperatorModel(operator), again))
    assert torch.equal(one, two)


class OfClasses(nn.Module):
    """A network of sequences that cannot be evaluated without its condition, and has a buffer."""

    def __init__(self, dims=1):
        super().__init__()
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
        self.first, self.last = (kind(a, b, 3, padding=1) for a, b in ((1, 6), (6, 1)))
        self.embed, self.clock = nn.Embedding(3, 6), nn.Linear(1, 6)
        self.register_buffer("levels", torch.tensor([1e-9, 3.14159265, 1e6]))

    def forward(self, x, t, class_labels):
        added = self.embed(class_labels) + self.clock(t[:, None])
        return self.last((self.first(x) + added.reshape(*added.shape, *[1] * (x.ndim - 2))).tanh())


def of_classes(shape):
    torch.manual_seed(0)
    return fewstep.Denoiser.wrap(
        OfClasses(len(shape) - 1), schedule=fewstep.schedule("vp-cosine"), prediction="v", event_shape=shape
    )  # fmt: skip


@pytest.mark.parametrize("extra", ["temporal", "pointwise", "deeper", "second-time"])
@pytest.mark.parametrize("shape", [(1, 16), (1, 4, 3, 5)])
def test_blocks_in_sequences_and_volumes_come_back_without_an_evaluation(extra, shape, tmp_path):
    model, one = of_classes(shape), {"class_labels": torch.tensor([1])}
    site = "clock" if extra == "second-time" else "first"
    layout = Layout(
        times=TIMES,
        start=0.9946,
        extra=extra,
        sites=(site,),
        labels="start" if extra != "temporal" else "target",
    )
    operator = operator_of(model, layout, example=one)
    assert [s.channels for s in operator.sites] == [6]  # not the length of a sequence
    assert not operator.sites[0].tokens
    for block in blocks(operator.network).values():
        filled(block)
    write_operator(tmp_path, operator, dtype=torch.float32)
    again = read_operator(tmp_path, teacher=model)
    drawn = [fewstep.sample(m, 2, class_labels=[0, 2]) for m in (OperatorModel(operator), again)]
    torch.testing.assert_close(*drawn)


def test_buffers_and_large_weights_are_stored_as_they_are(tmp_path):
    model = of_classes((1, 16))
    with torch.no_grad():
        model.network.last.bias.fill_(1e5)  # out of the range of half precision
    operator = TrajectoryOperator(model, Layout(times=TIMES, start=0.9946, extra="none"))
    write_operator(tmp_path, operator)
    again = read_operator(tmp_path, teacher=model).network
    kept = dict(again.named_buffers()) | dict(again.named_parameters())
    before = dict(operator.network.named_buffers()) | dict(operator.network.named_parameters())
    for name, value in before.items():
        exact = name.endswith("levels") or name.endswith("last.bias")
        assert torch.equal(kept[name], value if exact else value.half().float()), name


def test_tokens_and_sequences_are_told_by_the_last_layer_with_the_channels():
    x = torch.zeros(2, 5, 5)  # sizes alone do not tell
    for module, tokens in (
        (nn.Conv1d(5, 5, 1), False),
        (nn.Linear(5, 5), True),
        (nn.Identity(), True),
    ):
        network = nn.Sequential(module)
        (site,) = attach(network, lambda s: nn.Identity(), sites=["0"], example=lambda n: n(x))
        assert (site.tokens, site.channels, site.dims) == (tokens, 5, 1)


def test_a_flow_map_needs_the_module_that_embeds_the_time():
    layout = Layout(times=TIMES, start=0.9946, extra="second-time", sites=("first",))
    with pytest.raises(
        ValueError, match="'first' returns features of 3 dimensions; a flow map needs"
    ):
        operator_of(of_classes((1, 16)), layout, example={"class_labels": torch.tensor([1])})


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (("firsst",), "no module 'firsst'"),
        (("unused",), "'unused' is not used"),
        ((), "names no module"),
        (None, "in a WrappedNetwork are not known; name its modules"),
    ],
)
def test_sites_that_are_refused(sites, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryOperator(own(), Layout(times=TIMES, start=0.9946, sites=sites))


def test_a_predicate_and_a_second_attach():
    network = Own()
    take = lambda name, module: isinstance(module, nn.Conv2d) and name != "last"  # noqa: E731
    make = lambda site: TemporalConv(site.channels, frames=2)  # noqa: E731
    example = lambda m: m(torch.zeros(2, 1, 8, 8), torch.zeros(2))  # noqa: E731
    sites = attach(network, make, sites=take, example=example)
    assert [site.name for site in sites] == ["first", "second.inner"]
    with pytest.raises(ValueError, match="has a 'temporal' already"):
        attach(network, make, sites=["first"], example=example)
    TimeAxis(network, 5)
    assert network.first.temporal.frames == 5


def test_the_teacher_s_weights_are_all_there():
    model = teacher()
    operator = TrajectoryOperator(model, Layout(times=TIMES, start=0.9946))
    state, before = operator.model.state_dict(), model.state_dict()
    missing = set(state) - set(before)
    assert set(before) <= set(state)
    assert missing
    assert all(".temporal." in key for key in missing)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    own, added = operator.overhead()
    assert own == sum(p.numel() for p in model.parameters())
    assert added == sum(state[key].numel() for key in missing)


def test_overhead_of_the_embedded_model_is_below_a_tenth():
    model = fewstep.load("fashion")
    operator = TrajectoryOperator(model, Layout(times=(560.0, 250.0, 60.0, 0.0), start=999.0))
    own, added = operator.overhead()
    # Stages: 2 + 2 with 64 channels, 2 + 2 + 1 with 128; three matrices each.
    assert added == 3 * (4 * 64**2 + 5 * 128**2)
    assert added < 0.1 * own


def trained(times=TIMES, **change):
    """An operator whose temporal blocks do something."""
    operator = TrajectoryOperator(teacher(), Layout(times=times, start=0.9946, **change))
    for index, module in enumerate(operator.modules()):
        if isinstance(module, TemporalConv):
            filled(module, index)
            for parameter in module.parameters():
                parameter.data *= 0.1
    return operator


def test_sampling_by_default_arguments():
    model = OperatorModel(trained())
    labels = torch.arange(6) % 3
    x = fewstep.sample(model, 6, class_labels=labels)
    path = fewstep.sample(model, 6, class_labels=labels, save="states", batch_size=2)
    assert path.nfe == 1
    assert path.times.tolist() == [0.9946, *TIMES]
    assert path.states.shape == (5, 6, 1, 8, 8)
    # A sample depends on its number alone, up to the rounding of another batch.
    torch.testing.assert_close(path.x, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(path.states[-1], path.x)
    noise = fewstep.diffusion.noise.NoiseSource(0, range(6)).draw(
        fewstep.diffusion.noise.INITIAL, (1, 8, 8)
    )
    scale = model.schedule.prior_std(0.9946)
    torch.testing.assert_close(path.states[0], scale * noise)


def test_other_samplers_are_refused(tmp_path):
    model = OperatorModel(trained())
    plan = fewstep.plan("ddim", model.schedule, nfe=2)
    for change, message in (
        ({"solver": "ddim"}, "leave solver out"),
        ({"plan": plan}, "leave plan out"),
        ({"recipe": fewstep.SamplerRecipe(name="ddim", nfe=2)}, "leave recipe out"),
        ({"nfe": 5}, "leave nfe=5 out"),
        ({"grid": "karras"}, "leave grid out"),
        ({"options": {"eta": 0.5}}, "leave eta out"),
        ({"guidance": 2.0, "class_labels": 1}, "leave guidance out"),
    ):
        with pytest.raises(ValueError, match=message):
            fewstep.sample(model, 2, **change)
    with pytest.raises(ValueError, match="one evaluation"):
        model(torch.zeros(1, 1, 8, 8), 0.5)
    recipe = fewstep.SamplerRecipe(kind="operator", name="operator", nfe=1)
    recipe.save(tmp_path / "r.json")
    one = fewstep.sample(model, 2, recipe=tmp_path / "r.json", class_labels=1)
    assert torch.equal(one, fewstep.sample(model, 2, class_labels=1))
    with pytest.raises(ValueError, match="this one has none"):
        fewstep.sample(teacher(), 2, recipe=recipe)


def test_other_numbers_of_frames():
    """Without temporal blocks a frame does not know the others; with them the count may change."""
    folded = trained(extra="none")
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        four = folded(x, class_labels=y)
        folded.set_times((0.4, 0.25, 0.001))
        three = folded(x, class_labels=y)
    torch.testing.assert_close(three[:, 1:], four[:, [1, 3]], rtol=1e-4, atol=1e-5)
    mixed = trained()
    with torch.no_grad():
        four = mixed(x, class_labels=y)
        mixed.set_times((0.8, 0.5625, 0.4, 0.25, 0.1, 0.0625, 0.03, 0.001))
        assert not torch.allclose(mixed(x, class_labels=y)[:, 1::2], four, atol=1e-3)
        mixed.set_times(TIMES)
        assert torch.equal(mixed(x, class_labels=y), four)


def test_one_evaluation_under_autocast():
    operator = trained()
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        plain = operator(x, class_labels=y)
        with torch.autocast("cpu", torch.bfloat16):
            half = operator(x, class_labels=y)
    assert half.dtype == torch.float32
    error = (half - plain).abs().max() / plain.abs().max()
    assert 0 < float(error) < 0.05  # bfloat16 has 8 bits; there are some 20 layers
    low = trained().to(torch.bfloat16)
    assert low.labels.dtype == torch.float32  # times stay precise


@pytest.mark.diffusers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("labels", ["target", "both"])
def test_compiles_as_a_whole(labels):
    """One graph without breaks, forward and backward, and the same numbers."""
    model = teacher(channels=[8], blocks=[1], attention=[])
    layout = Layout(times=(0.5, 0.001), start=0.9946, labels=labels)
    operator = TrajectoryOperator(model, layout)
    for module in operator.modules():
        if isinstance(module, TemporalConv):
            filled(module)
    operator.requires_grad_(True)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (operator, compiled):
        operator.zero_grad()
        out = run(x, class_labels=y)
        out.square().mean().backward()
        gradients.append((out.detach(), [p.grad.clone() for p in operator.parameters() if p.grad is not None]))  # fmt: skip
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# The folder.


@pytest.mark.parametrize("extra", ["temporal", "none", "pointwise", "deeper"])
@pytest.mark.parametrize("labels", ["target", "both"])
def test_the_folder(extra, labels, tmp_path):
    operator = trained(extra=extra, labels=labels, size=1.5, basis="dct")
    operator.model.class_names = ("a", "b", "c")
    write_operator(tmp_path, operator, training={"steps": 3})
    again = fewstep.load(tmp_path)
    assert isinstance(again, OperatorModel)
    assert again.class_names == ("a", "b", "c")
    assert again.about["training"] == {"steps": 3}
    assert again.operator.layout == operator.layout
    made = [fewstep.sample(m, 3, class_labels=1, save="states") for m in (OperatorModel(operator), again)]  # fmt: skip
    # Weights are stored in half precision.
    torch.testing.assert_close(made[1].states, made[0].states, rtol=2e-2, atol=2e-2)
    double = fewstep.load(tmp_path, dtype=torch.float64)
    assert next(double.parameters()).dtype == torch.float64
    assert again.fingerprint() == fewstep.load(tmp_path).fingerprint()
    again.operator.set_times((0.5, 0.001))
    assert again.fingerprint() != fewstep.load(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "the format 'x', not 'fewstep.operator'"),
        ({"version": 2}, "version 2"),
        ({"sha256": "0"}, "damaged"),
        ({"layout": {"times": [0.1, 0.5], "start": 1.0}}, "times must decrease"),
        ({"layout": {"times": [], "start": 1.0}}, "1 to 4096 frames"),
        ({"layout": {"times": [0.1], "start": 1.0, "size": 1e9}}, "size must be positive"),
        ({"layout": {"times": [0.1], "start": 1.0, "x": 1}}, "cannot be read"),
        ({"network": {"kind": "small-unet", "channels": [60000] * 2}}, "cannot be read"),
        ({"network": {"kind": "odd"}}, "cannot be described in a folder"),
        ({"network": {"kind": "diffusers", "class": "os", "config": {}}}, "'os' are not known"),
        ({"event_shape": [1, 8]}, "event_shape must be"),
        ({"schedule": {"name": "?"}}, "cannot be read"),
    ],
)
def test_damaged_folders_are_refused(change, message, tmp_path):
    write_operator(tmp_path, trained())
    path = tmp_path / "operator.json"
    write_json(path, {**read_json(path), **change})
    with pytest.raises(ValueError, match=message):
        fewstep.load(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    write_operator(tmp_path, trained())
    file = tmp_path / "operator.safetensors"
    about = json.loads((tmp_path / "operator.json").read_text())
    assert about["sha256"] == sha256(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="checksum"):
        fewstep.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        fewstep.load(tmp_path)


def test_models_that_cannot_become_operators_are_refused():
    with pytest.raises(ValueError, match="no parameters to train"):
        TrajectoryOperator(fewstep.load("mixture-smooth"), Layout(times=(0.1,), start=1.0))
    with pytest.raises(ValueError, match="not Guided"):
        TrajectoryOperator(fewstep.Guided(teacher(), 2.0), Layout(times=(0.1,), start=0.9))
    with pytest.raises(TypeError, match="a Denoiser"):
        TrajectoryOperator(Own(), Layout(times=(0.1,), start=0.9))


def test_the_embedded_operator():
    """It loads by name, samples by default arguments, was made by the recipe, and is of use."""
    from pathlib import Path

    from fewstep.metrics import Features

    student = fewstep.load("fashion-1step")
    recipe = read_json(Path(__file__).parents[2] / "recipes" / "fashion-1step-second.json")
    training = student.about["training"]
    assert training["recipe"] | recipe == training["recipe"]
    assert re.fullmatch("[0-9a-f]{64}", training["initial"])  # the first stage, fashion-1step.json
    assert training["teacher"] == fewstep.load("fashion").fingerprint()
    assert training["extractor"] == Features.load("fashion-robust").sha256
    labels = torch.arange(40) % 10
    images = fewstep.sample(student, 40, class_labels=labels, seed=11)
    right = Features.load("fashion").classify(images) == labels
    # 0.85 of the teacher's own samples are recognised, 0.10 of random ones would be.
    assert float(right.double().mean()) > 0.6
    for nfe in (1, 2, 4):
        path = fewstep.sample(student, 2, nfe=nfe, save="states")
        assert path.nfe == nfe
        assert path.states.shape == (nfe + 1, 2, 1, 28, 28)
    # Its convolutions lie in memory as its teacher's do: another order is slower.
    orders = [
        next(p for p in network.parameters() if p.ndim == 4 and p.shape[-1] == 3).stride()
        for network in (student.network, fewstep.load("fashion").network)
    ]
    assert orders[0] == orders[1]

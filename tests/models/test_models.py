"""Model folders: what is written is read, what is damaged or hostile is refused."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.base.files import read_json, sha256, write_json
from fewstep.models.folder import write_model
from fewstep.models.networks.unet import SmallUNet

FUZZ = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = SmallUNet(channels=(4, 4), blocks=(1, 1), attention=(1,), num_classes=3)
        for parameter in built.parameters():  # some start at zero, and would hide the labels
            torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.fixture(scope="module")
def original(network, tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model"),
        network.state_dict(),
        network={"kind": "small-unet", **network.config},
        schedule=fewstep.schedule("ddpm-linear"),
        prediction="v",
        event_shape=(1, 8, 8),
        class_names=["a", "b", "c"],
    )


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def edit(folder, **entries):
    path = folder / "model.json"
    write_json(path, {**read_json(path), **entries})


def test_round_trip(network, folder):
    model = fewstep.load(folder)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    expected = network(x, torch.tensor([10.5, 10.5]), labels)
    result = model(x, 10.5, prediction="v", class_labels=labels)
    torch.testing.assert_close(result, expected)
    assert float(result.abs().max()) > 0
    assert not any(p.requires_grad for p in model.parameters())
    assert model.class_names == ("a", "b", "c")
    null = network(x, torch.tensor([10.5, 10.5]), torch.tensor([3, 3]))
    torch.testing.assert_close(model(x, 10.5, prediction="v"), null)


def test_another_precision(folder):
    model = fewstep.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 1, 8, 8), 3.0).dtype == torch.float32


@pytest.mark.parametrize("name", ["mixture-smooth", "mixture-sharp"])
def test_embedded_mixtures(name):
    """Many evaluations of DDIM from noise come to the mixture's own mean and covariance."""
    model = fewstep.load(name)
    result = fewstep.sample(model, 2000, solver="tab2", nfe=30).double()
    true = model.draw(20_000)
    torch.testing.assert_close(result.mean(0), true.mean(0), rtol=0, atol=0.12)
    torch.testing.assert_close(result.T.cov(), true.T.cov(), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (7, "from 0 to 2"),
        (-1, "from 0 to 2"),
        (1.5, "must be integers"),
        ("cat", "must be integers"),
        ({"a": 1}, "must be integers"),
        (torch.tensor([True, False]), "must be integers"),
        ([0, 1, 2], "2 samples|one integer or 2"),
        (torch.zeros(2, 1, dtype=torch.int64), "one integer or 2"),
    ],
)
def test_class_labels_are_checked(folder, labels, reason):
    with pytest.raises(ValueError, match=reason):
        fewstep.sample(fewstep.load(folder), 2, nfe=2, class_labels=labels)


def test_one_label_for_all(folder):
    model = fewstep.load(folder)
    one = fewstep.sample(model, 2, nfe=2, class_labels=1)
    assert torch.equal(one, fewstep.sample(model, 2, nfe=2, class_labels=[1, 1]))
    assert not torch.equal(one, fewstep.sample(model, 2, nfe=2, class_labels=2))


def test_no_such_model(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown model 'fashon'. Did you mean 'fashion'"):
        fewstep.load("fashon")
    with pytest.raises(ValueError, match=r"is not a model: there is no model.json"):
        fewstep.load(tmp_path)


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: their checksum"):
        fewstep.load(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        fewstep.load(folder)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize("content", [b"", pickle.dumps(Bomb()), b"\xff" * 64])
def test_weights_of_another_format_with_the_right_checksum(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    edit(folder, sha256=sha256(folder / "model.safetensors"))
    with pytest.raises(ValueError, match="not a safetensors file"):
        fewstep.load(folder)


CONFIG = {
    "kind": "small-unet",
    "in_channels": 1,
    "patch": 1,
    "channels": [4, 4],
    "blocks": [1, 1],
    "attention": [1],
    "num_classes": 3,
    "time_scale": 1.0,
}
REFUSED = {
    "no object": ({"network": 3}, "'network' of the model must be an object"),
    "another kind": ({"network": {**CONFIG, "kind": "os.system"}}, "of kind 'os.system'"),
    "unknown option": ({"network": {**CONFIG, "hook": 1}}, "hook"),
    "huge channels": ({"network": {**CONFIG, "channels": [10**9, 4]}}, "channels must be"),
    "large channels": ({"network": {**CONFIG, "channels": [65536, 65536]}}, "size mismatch"),
    "many blocks": ({"network": {**CONFIG, "blocks": [10**9, 1]}}, "blocks must be"),
    "many levels": ({"network": {**CONFIG, "channels": [4] * 17, "blocks": [1] * 17}}, "16"),
    "no levels": ({"network": {**CONFIG, "channels": [], "blocks": []}}, "each level"),
    "text for channels": ({"network": {**CONFIG, "channels": "ab"}}, "channels must be a list"),
    "classes of another number": ({"network": {**CONFIG, "num_classes": 5}}, "size mismatch"),
    "negative time scale": ({"network": {**CONFIG, "time_scale": -1}}, "time_scale"),
    "shape of two": ({"event_shape": [8, 8]}, "event_shape must be"),
    "huge shape": ({"event_shape": [1, 10**9, 8]}, "event_shape must be"),
    "channels of another number": ({"event_shape": [3, 8, 8]}, "event_shape must be"),
    "unknown prediction": ({"prediction": "w"}, "Unknown prediction 'w'"),
    "unknown schedule": ({"schedule": {"name": "vp"}}, "Unknown schedule 'vp'"),
    "hostile schedule": ({"schedule": {"name": "ddpm-linear", "levels": 10**12}}, "levels"),
    "names that are none": ({"class_names": [1, 2]}, "'class_names' of the model must be"),
    "another version": ({"version": 9}, "version 9"),
    "another format": ({"format": "x"}, "the format 'x', not 'fewstep.model'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(folder, case):
    entries, reason = REFUSED[case]
    edit(folder, **entries)
    with pytest.raises(ValueError, match=reason):
        fewstep.load(folder)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([10**6, 10**12, 10**400]),
    st.floats(allow_nan=False),
    st.text(max_size=3),
)
JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@FUZZ
@given(st.data())
def test_fuzzed_descriptions(original, tmp_path, data):
    target = tmp_path / "fuzzed"
    shutil.copytree(original, target, dirs_exist_ok=True)
    content = read_json(original / "model.json")
    part = content["network"] if data.draw(st.booleans()) else content
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    write_json(target / "model.json", content)
    try:
        model = fewstep.load(target)
    except ValueError:
        return
    assert sum(p.numel() for p in model.parameters()) < 100_000


@FUZZ
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_fuzzed_weights(original, tmp_path, place, byte, cut):
    """The checksum is updated too, as when somebody edits the weights."""
    target = tmp_path / "fuzzed"
    shutil.copytree(original, target, dirs_exist_ok=True)
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    place %= min(len(content), 4000)  # mostly in the header
    content[place] = byte
    file.write_bytes(content[:place] if cut else content)
    edit(target, sha256=sha256(file))
    try:
        model = fewstep.load(target)
    except ValueError:
        return
    assert model.event_shape == (1, 8, 8)


def test_the_input_skip_starts_as_the_identity():
    """Silent layers give 0 and the factor is 1; the factor depends on the time, not on the pixels."""
    options = {"channels": [8, 8], "blocks": [1, 1], "attention": []}
    network = SmallUNet(**options, input_skip=True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(network(x, t), x)
    torch.nn.init.normal_(network.skip_factor.weight)
    factor = (network(x, t) / x).detach()
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor))
    assert float((factor[0] - factor[1]).abs().min()) > 1e-3
    assert "input_skip" not in SmallUNet(**options).config
    with pytest.raises(ValueError, match="input_skip must be true or false"):
        SmallUNet(**options, input_skip=1)

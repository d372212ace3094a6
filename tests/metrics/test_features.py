"""Feature extractors: embedded, pixels, callables, and TorchScript files."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import warnings

import numpy
import pytest
import torch
from torch import Tensor, nn

from fewstep import metrics
from fewstep.metrics import Features, Reference
from fewstep.metrics.features import HERE, identity
from forks import FORKS, in_fork


class Net(nn.Module):
    """Like the usual Inception file: bytes in, and an option for the inner layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16, 5)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        result = self.layer(img.to(torch.float32).flatten(1))
        return result if return_features else result[:, :2]


class Flat(nn.Module):
    """No options, no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.flatten(1)


class Alone(nn.Module):
    """Not features: one number for the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def write(network: nn.Module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, as a whole
        torch.jit.save(torch.jit.script(network), str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def images(n: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.rand((n, channels, 4, 4), generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def test_the_usual_inception_file_gets_bytes_of_three_channels(net, tmp_path) -> None:
    path, digest = write(net, tmp_path / "inception-2015-12-05.pt")
    extractor = Features.load(path, sha256=digest.upper())
    grey = images(7)
    result = extractor(grey)
    pixels = ((grey.repeat(1, 3, 1, 1) + 1) * 127.5).round()
    torch.testing.assert_close(result, net(pixels, True).detach())
    assert not result.requires_grad
    assert (extractor.name, extractor.sha256) == (path.name, digest)
    torch.testing.assert_close(extractor(grey, batch_size=3), result)


@pytest.mark.parametrize(
    ("takes", "change"),
    [(None, lambda x: x), ("symmetric", lambda x: x), ("unit", lambda x: (x + 1) / 2)],
)
def test_ranges(takes, change, tmp_path) -> None:
    path, digest = write(Flat(), tmp_path / "flat.ts")
    x = images(4, 3)
    torch.testing.assert_close(
        Features.load(path, sha256=digest, input=takes)(x), 2 * change(x).flatten(1)
    )


def test_bytes_stay_bytes_outside_the_range(tmp_path) -> None:
    path, digest = write(Flat(), tmp_path / "flat.ts")
    x = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.3]).reshape(1, 1, 1, 5)
    result = Features.load(path, sha256=digest, input="byte")(x)
    assert result.tolist() == [[0, 0, 2 * 128 % 256, 2 * 255 % 256, 2 * 255 % 256]]


def test_a_gradient_passes_through_a_script(tmp_path) -> None:
    path, digest = write(Flat(), tmp_path / "flat.ts")
    x = images(4).requires_grad_()
    (gradient,) = torch.autograd.grad(Features.load(path, sha256=digest)(x).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))


def test_the_checksum_is_asked_for_and_checked(net, tmp_path, caplog) -> None:
    path, digest = write(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not abc"):
        Features.load(path, sha256="abc")
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        Features.load(path, sha256=digest)
        assert not caplog.text
        Features.load(path)
    assert f"its SHA-256 is {digest}" in caplog.text


def test_what_is_no_script_is_refused(tmp_path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"bad\.pt' is not TorchScript"):
        Features.load(bad)
    torch.save({"weights": torch.zeros(2)}, bad)  # a pickle: not opened as one
    with pytest.raises(ValueError, match="is not TorchScript"):
        Features.load(bad)
    with pytest.raises(ValueError, match="cannot be read"):
        Features.load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="are for TorchScript files"):
        Features.load("fashion", input="byte")
    path, digest = write(Flat(), tmp_path / "flat.pt")
    with pytest.raises(ValueError, match=r"Unknown input 'bytes'\. Did you mean 'byte'"):
        Features.load(path, sha256=digest, input="bytes")


def test_what_does_not_fit_the_script_is_refused(net, tmp_path) -> None:
    path, digest = write(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"failed on images of shape \(3, 1, 4, 4\)"):
        Features.load(path, sha256=digest)(images(3))
    with pytest.raises(ValueError, match="takes 3 channels, the images have 2"):
        Features.load(path, sha256=digest, channels=3)(images(3, 2))
    path, digest = write(Alone(), tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"must return features with shape \(B, D\), got \(\)"):
        Features.load(path, sha256=digest)(images(3))


def test_a_script_as_features_of_metrics_and_of_a_cached_reference(net, tmp_path) -> None:
    path, digest = write(net, tmp_path / "net.pt")
    extractor = Features.load(path, sha256=digest, input="unit", channels=3)
    a, b = images(60), images(50) * 0.5
    plain = metrics.fid(extractor(a), extractor(b))
    assert metrics.fid(a, b, features=extractor).value == pytest.approx(plain.value)
    numpy.savez(tmp_path / "data.npz", images=numpy.arange(40 * 16).reshape(40, 4, 4).astype("u1"))
    result = Reference.load(tmp_path / "data.npz", extractor, cache=tmp_path / "cache")
    assert result.features_name == "net.pt"
    # The same file in another range gives other features: it must not meet the same cache.
    other = Features.load(path, sha256=digest, input="symmetric", channels=3)
    assert identity(other) != identity(extractor) == result.features_sha256
    moved = Reference.load(tmp_path / "data.npz", other, cache=tmp_path / "cache")
    assert float((moved.features - result.features).abs().max()) > 0.1
    with pytest.raises(ValueError, match=r"holds features of 'net\.pt'"):
        metrics.fid(a, result, features=other)


def test_pixels_are_the_samples() -> None:
    x = images(5)
    assert torch.equal(Features.load("pixels")(x), x.flatten(1))
    assert metrics.fid(x, -x, features="pixels").value == metrics.fid(x, -x).value


def test_images_of_another_kind_are_refused_by_the_embedded_classifier() -> None:
    extractor = Features.load("fashion")
    with pytest.raises(ValueError, match=r"takes images of shape \(n, 1, H, W\), got \(2, 3"):
        extractor(torch.zeros(2, 3, 28, 28))
    assert extractor(torch.zeros(2, 1, 28, 28)).shape == (2, 128)
    with pytest.raises(ValueError, match="'pixels' does not classify"):
        Features.load("pixels").classify(images(2))


def test_damaged_weights_are_refused(tmp_path) -> None:
    folder = shutil.copytree(HERE / "fashion", tmp_path / "copy")
    file = folder / "features.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"features.safetensors.*are damaged"):
        Features.load(folder)


@pytest.mark.filterwarnings(FORKS)
def test_nothing_imports_torchvision() -> None:
    def measured() -> None:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # any import of it fails
        from fewstep import metrics

        x = torch.rand(20, 1, 28, 28)
        result = metrics.kid(x, metrics.Reference.load("fashion"), blocks=2)
        assert result.value > 0

    in_fork(measured)

"""Reference statistics: the embedded one, those of a user's data, and their cache."""

from __future__ import annotations

import json
import logging

import numpy
import pytest
import torch
from torch import Tensor

from fewstep import metrics
from fewstep.metrics import Features, Reference, Statistics
from fewstep.metrics.features import EMBEDDED


class Look:
    """A linear feature extractor with a checksum, that counts what it has seen."""

    name, seen = "linear", 0

    def __init__(self, sha256: str = "ab" * 32) -> None:
        self.sha256 = sha256
        generator = torch.Generator().manual_seed(5)
        self.weights = torch.randn((16, 3), generator=generator)

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) @ self.weights.to(images)


def pictures(n: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (n, 4, 4), dtype=numpy.uint8)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    numpy.savez(path, images=pictures(100))
    return path


def test_statistics_over_batches_are_those_of_all() -> None:
    x = torch.randn((57, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 7
    whole = Statistics.of(x)
    result = Statistics.over(x.split([1, 20, 36]))
    torch.testing.assert_close(result.mean, whole.mean)
    torch.testing.assert_close(result.covariance, whole.covariance)
    assert result.n == 57
    with pytest.raises(ValueError, match="at least 2"):
        Statistics.over([x[:1]])


@pytest.mark.parametrize("features", EMBEDDED)
def test_the_embedded_references(features: str) -> None:
    result = Reference.load("fashion", features)
    assert result.statistics.n == 60_000
    assert result.features_sha256 == Features.load(features).sha256
    assert result.event_shape == (1, 28, 28)
    # 5000 of the 60,000 are as all of them; the test images are other images of the same law.
    near = metrics.fid(result.features, result, blocks=2).value
    other = metrics.fid(result.heldout, result, blocks=2).value
    assert 0 < near < other < 0.5
    assert not torch.equal(result.features, result.heldout)
    moved = metrics.fid(result.heldout + 1.0, result, blocks=2).value
    assert moved == pytest.approx(128, rel=0.1)  # the squared distance of the means


def test_pixels_have_no_embedded_reference() -> None:
    with pytest.raises(
        ValueError,
        match=r"'fashion' cannot be used: it holds features of 'fashion'.*Give the data",
    ):
        Reference.load("fashion", "pixels")


def test_samples_are_looked_at_as_the_reference_does(data) -> None:
    extract = Look()
    result = Reference.load(data, extract, cache=data.parent / "cache")
    x = torch.rand((40, 1, 4, 4), generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = metrics.frechet_distance(Statistics.of(extract(x).double()), result.statistics)
    for features in (None, extract, Look()):
        assert metrics.fid(x, result, features=features).value == pytest.approx(float(expected))
    assert metrics.fid(extract(x), result).value == pytest.approx(float(expected))
    for heldout, side in ((False, result.features), (True, result.heldout)):
        assert metrics.kid(x, result, heldout=heldout).value == pytest.approx(
            metrics.kid(extract(x), side).value
        )
        ours = metrics.precision_recall(x, result, heldout=heldout, neighbours=3)
        theirs = metrics.precision_recall(extract(x), side, neighbours=3)
        assert [e.value for e in ours] == pytest.approx([e.value for e in theirs])
    assert metrics.fid(x, result, heldout=True).value == pytest.approx(
        metrics.fid(extract(x), result.heldout).value
    )
    assert metrics.sliced_wasserstein(x, result).value == pytest.approx(
        metrics.sliced_wasserstein(extract(x), result.features).value
    )


def test_what_does_not_fit_the_reference_is_refused(data) -> None:
    result = Reference.load(data, Look(), cache=data.parent / "cache")
    x = torch.zeros(40, 1, 4, 4)
    for other in ("pixels", lambda x: x.flatten(1)[:, :3], Look("cd" * 32)):
        with pytest.raises(ValueError, match="holds features of 'linear'"):
            metrics.fid(x, result, features=other)
    with pytest.raises(ValueError, match=r"have shape \(1, 4, 4\), the samples \(1, 5, 5\)"):
        metrics.kid(torch.zeros(40, 1, 5, 5), result)
    with pytest.raises(ValueError, match="has 1 samples"):
        metrics.fid(x[:1], result)
    with pytest.raises(ValueError, match="the second set is a tensor"):
        metrics.kid(x, x, heldout=True)


def test_the_parts_are_apart_and_the_statistics_are_of_the_training_part(data) -> None:
    result = Reference.load(data, "pixels", cache=data.parent / "cache")
    images = torch.from_numpy(pictures(100)).flatten(1).float() / 127.5 - 1
    stored, out = (
        {tuple(row) for row in part.tolist()} for part in (result.features, result.heldout)
    )
    assert len(stored) == 80
    assert len(out) == 20
    # The cache holds halves: compare to their precision.
    fresh = Reference.load(data, lambda x: x.flatten(1))
    stored, out = (
        {tuple(row) for row in part.tolist()} for part in (fresh.features, fresh.heldout)
    )
    assert not stored & out
    assert stored | out == {tuple(row) for row in images.tolist()}
    torch.testing.assert_close(result.statistics.mean, fresh.features.double().mean(0))
    torch.testing.assert_close(result.features, fresh.features, rtol=1e-3, atol=1e-3)
    assert result.statistics.n == 80


def test_test_images_of_an_mnist_folder_are_held_out(tmp_path) -> None:
    for part, n in (("train", 60), ("t10k", 30)):
        header = bytes([0, 0, 8, 3]) + b"".join(k.to_bytes(4, "big") for k in (n, 4, 4))
        body = pictures(n, seed=n).tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + body)
    result = Reference.load(tmp_path, lambda x: x.flatten(1))
    assert result.statistics.n == 60
    test = torch.from_numpy(pictures(30, seed=30)).flatten(1).float() / 127.5 - 1
    assert {tuple(r) for r in result.heldout.tolist()} == {tuple(r) for r in test.tolist()}


def test_the_cache_is_used_and_knows_data_and_features(data, monkeypatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(data.parent / "cache"))
    first = Reference.load(data, Look())
    again = Look()
    stored = Reference.load(data, again)
    assert again.seen == 0
    torch.testing.assert_close(stored.features, first.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(stored.statistics.covariance, first.statistics.covariance)
    assert (stored.sha256, stored.name) == (first.sha256, "data.npz")
    other = Look("cd" * 32)
    Reference.load(data, other)
    assert other.seen > 0
    numpy.savez(data, images=pictures(100, seed=1))
    changed = Look()
    assert Reference.load(data, changed).sha256 != first.sha256
    assert changed.seen > 0


@pytest.mark.parametrize("damage", ["bytes", "json", "number", "gone"])
def test_a_damaged_cache_is_made_anew_with_a_warning(data, damage, caplog) -> None:
    cache = data.parent / "cache"
    first = Reference.load(data, Look(), cache=cache)
    (folder,) = cache.iterdir()
    numbers, manifest = folder / "reference.safetensors", folder / "reference.json"
    if damage == "bytes":
        numbers.write_bytes(numbers.read_bytes()[:-1] + b"\x07")
    elif damage == "json":
        manifest.write_text('{"format": 1')
    elif damage == "number":
        about = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**about, "images": "many"}))
    else:
        numbers.unlink()
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        result = Reference.load(data, Look(), cache=cache)
    assert "computed again" in caplog.text
    assert torch.equal(result.statistics.mean, first.statistics.mean)
    caplog.clear()
    Reference.load(data, extract := Look(), cache=cache)
    assert not caplog.text
    assert extract.seen == 0


def test_a_callable_without_a_checksum_is_not_cached(data) -> None:
    cache = data.parent / "cache"
    result = Reference.load(data, lambda x: x.flatten(1), cache=cache)
    assert not cache.exists()
    assert result.features_sha256 == ""


def test_too_few_images(tmp_path) -> None:
    numpy.savez(tmp_path / "few.npz", images=pictures(19))
    with pytest.raises(ValueError, match="has 19 images; a reference needs at least 20"):
        Reference.load(tmp_path / "few.npz", "pixels")


def test_a_reference_of_samples_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((400, 2), generator=generator, dtype=torch.float64)
    result = Reference.of(x[:300], x[300:], name="normal")
    assert metrics.fid(x[300:], result).value == pytest.approx(metrics.fid(x[300:], x[:300]).value)
    assert result.features_name == "pixels"
    # The statistics are known, so the interval is narrower than with a sampled second set.
    one, two = (metrics.fid(x[300:] + 1, side) for side in (result, x[:300]))
    assert one.high - one.low < two.high - two.low


def test_shapes_are_checked() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="must have shapes"):
        Reference(x, x[:, :2], Statistics(x[0], x.T @ x, 4), "x", "", "")


def test_the_second_run_has_the_digits_of_the_first(data) -> None:
    """Features are cached in half precision, and used so from the start."""
    first, second = (Reference.load(data, "pixels", cache=data / "cache") for _ in range(2))
    for name in ("features", "heldout"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert all(
        torch.equal(a, b) for a, b in zip(first.statistics[:2], second.statistics[:2], strict=True)
    )


def test_a_full_disk_only_costs_the_cache(data, monkeypatch, caplog) -> None:
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = Reference.load(data, "pixels", cache=data / "cache")
    assert "the reference is not cached" in caplog.text
    monkeypatch.undo()
    assert torch.equal(
        found.features, Reference.load(data, "pixels", cache=data / "cache").features
    )

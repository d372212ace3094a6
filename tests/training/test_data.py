"""Images of the user's: folders, idx and npz files; damaged and hostile ones."""

from __future__ import annotations

import gzip
import io
import struct

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.training import data
from fewstep.training.data import ImageData, read_images

FUZZ = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIXELS = numpy.arange(3 * 4 * 5, dtype=numpy.uint8).reshape(3, 4, 5)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_png(path, value, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_folder_of_images(tmp_path):
    write_png(tmp_path / "b.png", (1, 2, 3))
    write_png(tmp_path / "a.PNG", (4, 5, 6))
    (tmp_path / "notes.txt").write_text("not an image")
    data = read_images(tmp_path)
    assert data.images.shape == (2, 3, 4, 6)
    assert data.images[:, :, 0, 0].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert (data.labels, data.names, data.num_classes) == (None, None, None)
    torch.testing.assert_close(data.floats()[1, :, 0, 0], torch.tensor([1.0, 2, 3]) / 127.5 - 1)


def test_one_subfolder_a_class(tmp_path):
    write_png(tmp_path / "dog" / "1.png", 10, mode="L")
    write_png(tmp_path / "cat" / "young" / "1.png", 20, mode="L")
    write_png(tmp_path / "cat" / "old" / "2.png", 30, mode="L")
    data = read_images(tmp_path)
    assert data.names == ("cat", "dog")
    assert dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True)) == {
        10: 1,
        20: 0,
        30: 0,
    }


def test_different_sizes_are_refused_or_resized(tmp_path):
    write_png(tmp_path / "a.png", (9, 9, 9), (6, 4))
    write_png(tmp_path / "b.png", (9, 9, 9), (10, 10))
    with pytest.raises(ValueError, match=r"2 different shapes.*give a size"):
        read_images(tmp_path)
    data = read_images(tmp_path, size=3)
    assert data.images.shape == (2, 3, 3, 3)
    assert data.images.unique().tolist() == [9]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    images = tmp_path / f"train-images-idx3-ubyte{suffix}"
    images.write_bytes(pack(idx(PIXELS)))
    labels = tmp_path / f"train-labels-idx1-ubyte{suffix}"
    labels.write_bytes(pack(idx(numpy.array([2, 0, 1], numpy.uint8))))
    for source in (tmp_path, images):
        data = read_images(source)
        assert torch.equal(data.images, torch.from_numpy(PIXELS)[:, None])
        assert data.labels.tolist() == [2, 0, 1]
        assert data.num_classes == 3
    assert read_images(images, size=2).images.shape == (3, 1, 2, 2)


def test_npz_channels_first_or_last(tmp_path):
    images = numpy.random.default_rng(0).integers(0, 255, (2, 5, 6, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "last.npz", images=images, labels=numpy.array([[1], [0]]))
    numpy.savez(tmp_path / "first.npz", images=images.transpose(0, 3, 1, 2))
    last, first = read_images(tmp_path / "last.npz"), read_images(tmp_path / "first.npz")
    assert torch.equal(last.images, first.images)
    assert last.images[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert last.labels.tolist() == [1, 0]


def npz(**arrays):
    stream = io.BytesIO()
    numpy.savez(stream, **arrays)
    return stream.getvalue()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


REFUSED = {
    "pickled objects": ("x.npz", npz(images=numpy.array([Bomb()], object)), "not an npz file"),
    "no images": ("x.npz", npz(a=numpy.zeros(3)), "no uint8 array of images"),
    "floating labels": (
        "x.npz",
        npz(images=PIXELS, labels=numpy.zeros(3)),
        "labels in .* must be integers",
    ),
    "labels of another length": ("x.npz", npz(images=PIXELS, y=numpy.zeros(2, int)), "3 images"),
    "negative labels": ("x.npz", npz(images=PIXELS, y=numpy.array([0, -1, 2])), "from 0 to"),
    "huge labels": ("x.npz", npz(images=PIXELS, y=numpy.array([0, 1, 10**12])), "from 0 to"),
    "not a zip": ("x.npz", b"PK\3\4 nothing", "not an npz file"),
    "empty npz": ("x.npz", b"", "not an npz file"),
    "empty idx": ("idx3", b"", "not an idx file"),
    "idx of floats": ("idx3", struct.pack(">HBBI", 0, 13, 1, 0), "unsigned bytes"),
    "cut idx": ("idx3", idx(PIXELS)[:-1], "is truncated: 59 bytes"),
    "idx that claims 2^96 bytes": (
        "idx3",
        struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3),
        "is truncated: 0 bytes",
    ),
    "idx with 255 dimensions": ("idx3", struct.pack(">HBB", 0, 8, 255), "not an idx file"),
    "idx of labels": ("train-labels-idx1-ubyte", idx(PIXELS[0, 0]), "images must be uint8"),
    "no images at all": ("idx3", idx(PIXELS[:0]), "images must be uint8"),
    "gzip that is none": ("idx3.gz", b"not gzip", "not an idx file"),
    "cut gzip": ("idx3.gz", gzip.compress(idx(PIXELS))[:-9], "not an idx file"),
    "damaged gzip": ("idx3.gz", gzip.compress(idx(PIXELS))[:12] + b"\xff" * 30, "not an idx file"),
    "another kind of file": ("x.txt", b"text", "neither a folder of images"),
    "a broken image": ("folder/x.png", b"\x89PNG\r\n\x1a\n broken", "cannot be read"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(case, tmp_path):
    name, content, reason = REFUSED[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_images(path.parent if "/" in name else path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="no folder or file"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no images"):
        read_images(tmp_path)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_size_is_a_positive_integer(size, tmp_path):
    write_png(tmp_path / "a.png", (1, 1, 1))
    with pytest.raises(ValueError, match="size must be a positive integer"):
        read_images(tmp_path, size=size)


GOOD = {
    "x.npz": npz(images=PIXELS, labels=numpy.array([0, 1, 2])),
    "x-idx3": idx(PIXELS),
    "x-idx3.gz": gzip.compress(idx(PIXELS)),
}


@FUZZ
@given(
    st.sampled_from(sorted(GOOD)),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=4),
    st.booleans(),
)
def test_damaged_files(tmp_path, name, place, patch, cut):
    data = bytearray(GOOD[name])
    place %= len(data)
    data[place : place + len(patch)] = patch
    path = tmp_path / name
    path.write_bytes(data[:place] if cut else data)
    try:
        result = read_images(path)
    except ValueError:
        return
    assert result.images.numel() <= 60


def test_black_and_white_get_the_ends_of_the_range():
    data = ImageData(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1))
    assert data.floats().flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert data.floats(data_range=(0, 2)).flatten().tolist() == pytest.approx([0.0, 0.4, 2.0])


def test_image_data_checks_itself():
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageData(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="2 images but labels of shape"):
        ImageData(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


# --- limits -------------------------------------------------------------------------------------


def _idx(shape, body):
    return struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape) + body


def test_a_compressed_file_says_at_once_that_it_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ALWAYS", 1000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(_idx((1 << 20, 64, 64), bytes(200_000))))
    with pytest.raises(ValueError, match=r"expands to 4,294,967,296; at most [\d,]+ are read"):
        read_images(path)


def test_a_compressed_file_is_read_as_far_as_its_shape(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    # The rest, 100 MB, is not expanded.
    path.write_bytes(gzip.compress(_idx((2, 3, 3), bytes(10**6)), 1))
    with pytest.raises(ValueError, match="longer than its shape"):
        read_images(path)


def test_an_archive_that_expands_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "images.npz"
    numpy.savez_compressed(path, images=numpy.zeros((200, 1, 32, 32), numpy.uint8))
    assert len(read_images(path)) == 200
    monkeypatch.setattr(data, "ALWAYS", 1000)
    monkeypatch.setattr(data, "MOST_RATIO", 2)
    monkeypatch.setattr(numpy, "load", None)
    with pytest.raises(ValueError, match=r"images.npz' has .* bytes and expands to 20"):
        read_images(path)
    monkeypatch.setattr(data, "MOST_MEMBERS", 0)
    with pytest.raises(ValueError, match="has 1 arrays; at most 0"):
        read_images(path)


def test_a_picture_of_absurd_size_is_not_decoded(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb.png.*10000 x 10000 pixels; at most 67,108,864"):
        read_images(tmp_path)

"""The user's images: a folder, an idx file or an npz file, as one uint8 tensor."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fewstep.base.paths import check_path
from fewstep.base.runs import hash_inputs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")

MOST_CLASSES = 100_000
"""The most classes of a data set; larger labels are not class labels."""

MOST_RATIO, ALWAYS = 100, 1 << 28
"""A compressed file may expand to a hundred times its size, or to 256 MiB: images compress less, bombs more."""

MOST_PIXELS = 1 << 26
"""The most pixels of a picture, those of one of 8192 x 8192."""

MOST_MEMBERS = 10_000
"""The most arrays of an npz file."""


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        images: The images, uint8, with shape (N, C, H, W).
        labels: The classes, int64, with shape (N,), or ``None``.
        names: The names of the classes, or ``None``.
        source: The folder or file that they were read from, or ``None``.
    """

    images: Tensor
    labels: Tensor | None = None
    names: tuple[str, ...] | None = None
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or not self.images.numel():
            raise ValueError(
                "images must be uint8 with shape (N, C, H, W) and N >= 1, "
                f"got {self.images.dtype} with shape {tuple(self.images.shape)}"
            )
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"there are {len(self.images)} images but labels of shape {tuple(self.labels.shape)}"
            )
        if (
            self.labels is not None
            and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < MOST_CLASSES
        ):
            raise ValueError(
                f"labels must be from 0 to {MOST_CLASSES - 1}, got {int(self.labels.min())} to "
                f"{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape (C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def inputs(self) -> dict[str, Any]:
        """Returns the SHA-256 of images and labels, which identifies the data set, and of its files."""
        labels = None if self.labels is None else _sha256(self.labels)
        files = (hash_inputs(self.source) or {}).get("files")
        images = {"sha256": _sha256(self.images)} | ({} if files is None else {"files": files})
        return {"images": images, "labels": labels}

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or ``None``."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def floats(
        self, index: Tensor | slice = slice(None), data_range: Sequence[float] = (-1.0, 1.0)
    ) -> Tensor:
        """Returns images as float32.

        Arguments:
            index: Which ones; left out, all.
            data_range: The values of black and white.
        """
        low, high = data_range
        images = self.images[index].float() / 127.5 - 1
        return images if (low, high) == (-1, 1) else (images + 1) * ((high - low) / 2) + low


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for part in tensor.contiguous().split(1024):
        digest.update(part.numpy().data)
    return digest.hexdigest()


def read_images(source: str | Path, *, size: int | None = None) -> ImageData:
    """Reads images from a folder, an idx file (``.gz`` or not) or an npz file.

    A folder of images may have one sub-folder per class; a folder may also hold the idx files of
    MNIST (``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``). An npz file has the
    images in the first four- or three-dimensional uint8 array, and labels in ``labels`` or ``y``.

    Arguments:
        source: The folder or file.
        size: The height and width after cropping and resizing; left out, the images are not
            resized, and must all have one size.

    Raises:
        ValueError: If there is nothing readable; the message says what was expected.
    """
    check_path(source, "source")
    data = _read(source, size)
    return replace(data, source=Path(source))


def _read(source: str | Path, size: int | None) -> ImageData:
    path = Path(source)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"size must be a positive integer, got {size!r}")
    if not path.exists():
        raise ValueError(f"there is no folder or file {str(source)!r}")
    if path.is_dir():
        for suffix in ("", ".gz"):
            images = path / f"train-images-idx3-ubyte{suffix}"
            if images.exists():
                return _resized(_read_idx_pair(images), size)
        return _read_folder(path, size)
    if path.suffix == ".npz":
        return _resized(_read_npz(path), size)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageData(torch.from_numpy(_read_image(path, size)[None].copy()))
    if "idx" in path.name:
        return _resized(_read_idx_pair(path), size)
    raise ValueError(
        f"{str(source)!r} is neither a folder of images, nor a picture, an idx file or an npz file"
    )


def _check_expanded(path: Path, expanded: int) -> None:
    """Raises if a compressed file would expand to more than it may, before it is expanded."""
    size = path.stat().st_size
    if expanded > (most := max(ALWAYS, MOST_RATIO * size)):
        raise ValueError(
            f"{str(path)!r} has {size:,} bytes and expands to {expanded:,}; at most {most:,} are read. If these "
            "are images, decompress the file first, or give a folder of pictures"
        )


def _read_idx(path: Path) -> numpy.ndarray:
    compressed = path.suffix == ".gz"
    try:
        with gzip.open(path) if compressed else open(path, "rb") as stream:
            zero, kind, ndim = struct.unpack(">HBB", stream.read(4))
            shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
            if zero or kind != 8:
                raise ValueError(f"{str(path)!r} is not an idx file of unsigned bytes")
            wanted = math.prod(shape)
            if compressed:
                _check_expanded(path, wanted)
            elif wanted != (size := path.stat().st_size - 4 - 4 * ndim):
                raise ValueError(f"{str(path)!r} is truncated: {size} bytes for shape {shape}")
            body = stream.read(wanted)
            more = bool(stream.read(1))
    except (struct.error, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not an idx file: {error}") from None
    if more:
        raise ValueError(f"{str(path)!r} is longer than its shape {shape}")
    if len(body) != wanted:
        raise ValueError(f"{str(path)!r} is truncated: {len(body)} bytes for shape {shape}")
    return numpy.frombuffer(body, numpy.uint8).reshape(shape)


def _read_idx_pair(path: Path) -> ImageData:
    images = _read_idx(path)
    if images.ndim == 3:
        images = images[:, None]
    labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels = None
    if labels_path != path and labels_path.exists():
        labels = torch.from_numpy(_read_idx(labels_path).astype(numpy.int64))
    return ImageData(torch.from_numpy(images.copy()), labels)


def _read_npz(path: Path) -> ImageData:
    try:
        with zipfile.ZipFile(path) as members:
            sizes = [member.file_size for member in members.infolist()]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{str(path)!r} is not an npz file of arrays: {error}") from None
    if len(sizes) > MOST_MEMBERS:
        raise ValueError(f"{str(path)!r} has {len(sizes)} arrays; at most {MOST_MEMBERS} are read")
    _check_expanded(path, sum(sizes))
    try:
        # Opened here: numpy does not close a file that it refuses.
        with open(path, "rb") as stream, numpy.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        Exception
    ) as error:  # a damaged archive raises almost anything: zip, zlib, header parser
        raise ValueError(f"{str(path)!r} is not an npz file of arrays: {error}") from None
    candidates = [a for a in arrays.values() if a.ndim in (3, 4) and a.dtype == numpy.uint8]
    if not candidates:
        kinds = {name: (str(a.dtype), a.shape) for name, a in arrays.items()}
        raise ValueError(f"{str(path)!r} has no uint8 array of images; it has {kinds}")
    images = candidates[0]
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    labels = next((arrays[key] for key in ("labels", "y", "arr_1") if key in arrays), None)
    if labels is not None and labels.dtype.kind not in "iu":
        raise ValueError(f"the labels in {str(path)!r} must be integers, got {labels.dtype}")
    return ImageData(
        torch.from_numpy(numpy.ascontiguousarray(images)),
        None if labels is None else torch.from_numpy(labels.astype(numpy.int64).reshape(-1)),
    )


def _read_folder(path: Path, size: int | None) -> ImageData:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"the folder {str(path)!r} has no images ({', '.join(IMAGE_SUFFIXES)}) and no "
            "train-images-idx3-ubyte"
        )
    arrays = [_read_image(file, size) for file in files]
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"the images in {str(path)!r} have {len(shapes)} different shapes, for example "
            f"{sorted(shapes)[:3]}; give a size to crop and resize them to"
        )
    classes = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    names = sorted(set(classes))
    labels = None
    if len(names) > 1 and len(classes) == len(files):
        labels = torch.tensor([names.index(name) for name in classes])
    return ImageData(
        torch.from_numpy(numpy.stack(arrays)), labels, tuple(names) if labels is not None else None
    )


def _resized(data: ImageData, size: int | None) -> ImageData:
    if size is None or data.event_shape[1:] == (size, size):
        return data
    from PIL import Image, ImageOps

    planes = [
        numpy.asarray(ImageOps.fit(Image.fromarray(plane), (size, size), Image.Resampling.LANCZOS))
        for plane in data.images.flatten(0, 1).numpy()
    ]
    images = torch.from_numpy(numpy.stack(planes)).unflatten(0, data.images.shape[:2])
    return ImageData(images, data.labels, data.names)


def _read_image(file: Path, size: int | None) -> numpy.ndarray:
    from PIL import Image, ImageOps

    try:
        # The limit is our own.
        ignored = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
        with ignored, Image.open(file) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise ValueError(
                    f"it has {image.size[0]} x {image.size[1]} pixels; at most {MOST_PIXELS:,} are read"
                )
            image = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
            if size is not None:
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            array = numpy.asarray(image, numpy.uint8)
    except Exception as error:  # PIL raises almost anything on damaged or oversized images
        raise ValueError(f"the image {str(file)!r} cannot be read: {error}") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

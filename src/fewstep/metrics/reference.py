"""Reference statistics of real data: embedded, or made from the user's and cached."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import ImageData, read_images
from fewstep.files import read_json, read_tensors, sha256, write_json, write_tensors
from fewstep.metrics.features import FeatureMap, extractor
from fewstep.metrics.statistics import Statistics

FORMAT, VERSION = "fewstep.reference", 1
HERE = Path(__file__).parent.parent / "zoo" / "references"
EMBEDDED = ("fashion",)
KEPT = 5000
"""The features that are kept of each part."""
LEAST = 20
"""The fewest images of a data set."""

logger = logging.getLogger("fewstep")


@dataclass(frozen=True, eq=False)
class Reference:
    r"""What metrics need to know of real data; made once.

    It takes the place of the second set: ``metrics.fid(samples, reference)``.

    Attributes:
        features: Features of real samples to search and select with, (m, D), float32.
        heldout: Features of other real samples, for final scores only, (m2, D), float32.
        statistics: Mean and covariance of the features of all training data, float64.
        name: The name of the data.
        sha256: The checksum of the data.
        features_sha256: The checksum of the feature extractor; empty if it has none.
        extractor: The feature extractor itself; ``None`` means the samples themselves.
        event_shape: The shape of one sample, or ``None`` if that is not known.
    """

    features: Tensor
    heldout: Tensor
    statistics: Statistics
    name: str
    sha256: str
    features_sha256: str
    extractor: FeatureMap = field(default=None, repr=False)
    event_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = [tuple(t.shape) for t in (self.features, self.heldout, *self.statistics[:2])]
        d = sizes[2][0] if sizes[2] else 0
        if [s[-1:] for s in sizes] != [(d,)] * 4 or [len(s) for s in sizes] != [2, 2, 1, 2]:
            raise ValueError(
                "features, heldout, mean and covariance must have shapes (m, D), (m2, D), (D) and "
                f"(D, D), got {', '.join(map(str, sizes))}"
            )

    @property
    def features_name(self) -> str:
        """The name of the feature extractor, for reports."""
        if self.extractor is None or isinstance(self.extractor, str):
            return self.extractor or "pixels"
        made = self.extractor
        return getattr(made, "name", None) or getattr(made, "__name__", type(made).__name__)

    @classmethod
    def load(
        cls,
        source: str | Path,
        features: FeatureMap = "fashion",
        *,
        size: int | None = None,
        cache: str | Path | None = None,
    ) -> Reference:
        r"""Returns the reference of a data set.

        An embedded one (``"fashion"``) ships in the package. Otherwise the images are read and
        looked at, once: the result is cached in files named by the checksums of the data and of
        the features. Real samples are held out as follows: from a folder of MNIST's files the
        test images; else a fifth of the images, at most 5000, chosen at random (always the same).
        At most 5000 features of each part are kept.

        Arguments:
            source: ``"fashion"``, a folder of images, an idx or npz file.
            features: The name of an embedded extractor, ``"pixels"``, a
                :class:`~fewstep.metrics.Features`, or any callable, which is not cached if it
                has no attribute ``sha256``.
            size: The height and width to crop and resize the user's images to.
            cache: The folder of the cache; left out, ``$FEWSTEP_CACHE``, or else
                ``~/.cache/fewstep``.

        Raises:
            ValueError: If there is no such data, it has fewer than 20 images, or the features
                are not those of the embedded reference.
        """
        look = extractor(features)
        if str(source) in EMBEDDED:
            return _read(HERE / str(source), look, str(source))
        data, heldout = _parts(read_images(source, size=size), source, size)
        digest = _digest(data.images, heldout.images)
        of = getattr(look, "sha256", "")
        folder = _cache_folder(cache) / f"reference-{digest[:20]}-{of[:20]}"
        if of and (folder / "reference.json").exists():
            try:
                return _read(folder, look, Path(source).name, data=digest)
            except ValueError as error:
                logger.warning("the cached reference is made anew: %s", error)
        made = _measure(
            look,
            (data.floats, len(data)),
            (heldout.floats, len(heldout)),
            name=Path(source).name,
            sha256=digest,
            event_shape=data.event_shape,
        )
        if of:
            made.write(folder)
        return made

    @classmethod
    def of(
        cls, data: Tensor, heldout: Tensor, *, features: FeatureMap = None, name: str = "data"
    ) -> Reference:
        r"""Returns the reference of samples in memory; nothing is cached.

        Arguments:
            data: Real samples in the model's range, with shape (N, \*).
            heldout: Other real samples, with shape (M, \*).
            features: The extractor; left out, the samples themselves.
            name: The name of the data.
        """
        return _measure(
            extractor(features),
            (data.__getitem__, len(data)),
            (heldout.__getitem__, len(heldout)),
            name=name,
            sha256=_digest(data, heldout),
            event_shape=tuple(data.shape[1:]),
        )

    def write(self, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
        """Writes the reference as a folder: safetensors (features in half precision) and JSON."""
        folder = Path(folder)
        file = write_tensors(
            folder / "reference.safetensors",
            {
                "features": self.features.half(),
                "heldout": self.heldout.half(),
                "mean": self.statistics.mean,
                "covariance": self.statistics.covariance,
            },
        )
        write_json(
            folder / "reference.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "name": self.name,
                "data": self.sha256,
                "features": {"name": self.features_name, "sha256": self.features_sha256},
                "images": self.statistics.n,
                "event_shape": None if self.event_shape is None else list(self.event_shape),
                "sha256": sha256(file),
                "about": about or {},
            },
        )
        return folder


def _read(
    folder: Path, look: Callable[[Tensor], Tensor], name: str, *, data: str | None = None
) -> Reference:
    about = read_json(folder / "reference.json", what="reference")
    file = folder / "reference.safetensors"
    try:
        if (about["format"], about["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is not of version {VERSION}")
        if not file.exists() or sha256(file) != about["sha256"]:
            raise ValueError("its numbers are missing or damaged")
        if data is not None and about["data"] != data:
            raise ValueError("it is of other data")
        wanted = about["features"]
        if getattr(look, "sha256", None) != wanted["sha256"]:
            raise ValueError(
                f"it holds features of {wanted['name']!r} (SHA-256 {wanted['sha256'][:12]}…), but "
                f"those of {look!r} were asked for. Give the data itself (a folder of images, an "
                "idx or npz file) for other features"
            )
        numbers = read_tensors(file)
        shape = about["event_shape"]
        return Reference(
            features=numbers["features"].float(),
            heldout=numbers["heldout"].float(),
            statistics=Statistics(
                numbers["mean"].double(), numbers["covariance"].double(), int(about["images"])
            ),
            name=name,
            sha256=about["data"],
            features_sha256=wanted["sha256"],
            extractor=look,
            event_shape=None if shape is None else tuple(shape),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
        raise ValueError(f"the reference {name!r} cannot be used: {what}") from None


Part = tuple[Callable[[Tensor], Tensor], int]
"""What gives the samples of some indices, and how many there are."""


@torch.no_grad()
def _measure(
    look: Callable[[Tensor], Tensor], data: Part, heldout: Part, **about: Any
) -> Reference:
    def found(part: Part, index: Tensor) -> Tensor:
        return look(part[0](index)).detach().cpu().flatten(1)

    def kept(part: Part) -> Tensor:
        index = _order(part[1])[:KEPT].sort().values
        return torch.cat([found(part, some).float() for some in index.split(500)])

    batches = torch.arange(data[1]).split(500)
    return Reference(
        features=kept(data),
        heldout=kept(heldout),
        statistics=Statistics.over(found(data, index) for index in batches),
        features_sha256=getattr(look, "sha256", ""),
        extractor=look,
        **about,
    )


def _order(n: int) -> Tensor:
    """Returns the numbers below n in an order that looks random and is always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _parts(data: ImageData, source: str | Path, size: int | None) -> tuple[ImageData, ImageData]:
    """Returns the training images and those held out."""
    if len(data) < LEAST:
        raise ValueError(
            f"{str(source)!r} has {len(data)} images; a reference needs at least {LEAST}"
        )
    for suffix in ("", ".gz"):
        test = Path(source) / f"t10k-images-idx3-ubyte{suffix}"
        if (Path(source) / f"train-images-idx3-ubyte{suffix}").exists() and test.exists():
            return data, read_images(test, size=size)
    order = _order(len(data))
    out = min(KEPT, len(data) // 5)
    return ImageData(data.images[order[out:]]), ImageData(data.images[order[:out]])


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")

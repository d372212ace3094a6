"""Reference statistics of real data: embedded, or computed from the user's data and cached."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import LITTER_AGE, read_tensors, sha256, sweep, write_tensors
from fewstep.base.paths import check_path
from fewstep.base.records import Positive, Record
from fewstep.base.runs import hash_inputs
from fewstep.metrics.features import EMBEDDED as EXTRACTORS
from fewstep.metrics.features import FeatureMap, extractor, identity, name_of
from fewstep.metrics.real import RealData, order
from fewstep.metrics.statistics import Statistics


class ReferenceRecord(Record, name="fewstep.reference", version=1, what="reference"):
    """``reference.json``: the data of the statistics, and the checksum of their file."""

    name: str
    data: str
    features: dict[str, str]
    images: Positive
    event_shape: list[int] | None = None
    sha256: str
    about: dict[str, Any] = field(default_factory=dict)


HERE = Path(__file__).parent.parent / "embedded" / "references"
EMBEDDED = ("fashion",)
"""Data whose references ship, in the features of each embedded extractor."""
MOST_FEATURES = 5000
"""The most features of each part (training, held out) that are stored."""

logger = logging.getLogger("fewstep")


def check_data_range(denoiser: Any) -> None:
    """Checks that a model's samples have the range in which images are read for references.

    Raises:
        ValueError: If it is another than [-1, 1].
    """
    while hasattr(denoiser, "inner"):
        denoiser = denoiser.inner
    low, high = getattr(denoiser, "data_range", (-1.0, 1.0))
    if (low, high) != (-1.0, 1.0):
        raise ValueError(
            f"the model's data range from {low:g} to {high:g}, and metrics read images in [-1, 1]; "
            "leave out data= (--data), or, to tune, give a tensor of samples in the model's range"
        )


def unused_images(name: str) -> Tensor:
    """Returns real images that no embedded reference and no embedded network has used, in [-1, 1].

    A thousand images of each data set in :data:`EMBEDDED`, for scores in any features.

    Arguments:
        name: The name of the data.
    """
    images = read_tensors(HERE / name / "unused.safetensors")["images"]
    return images.float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Reference:
    r"""Statistics and features of real data, computed once; metrics compare samples with them.

    It takes the place of the second set: ``metrics.fid(samples, reference)``.

    Attributes:
        features: Features of real samples to search and select with, (m, D), float32.
        heldout: Features of other real samples, for final scores only, (m2, D), float32.
        statistics: Mean and covariance of the features of all training data, float64.
        name: The name of the data.
        sha256: The checksum of the data.
        features_sha256: The checksum of the feature extractor and its settings; empty if it has
            none.
        extractor: The feature extractor itself; ``None`` means the samples themselves.
        event_shape: The shape of one sample, or ``None`` if that is not known.
        files: The size and SHA-256 of each file of the data, or ``None``.
    """

    features: Tensor
    heldout: Tensor
    statistics: Statistics
    name: str
    sha256: str
    features_sha256: str
    extractor: FeatureMap = field(default=None, repr=False)
    event_shape: tuple[int, ...] | None = None
    files: Mapping[str, Any] | None = field(default=None, repr=False)

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
        return name_of(self.extractor)

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
        their features extracted once: the result is cached in files named by the checksums of the data and of
        the features. Real samples are held out as follows: from a folder of MNIST's files the
        test images; else a fifth of the images, at most 5000, chosen at random (always the same).
        At most 5000 features of each part are stored.

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
        check_path(source, "source")
        check_path(cache, "cache")
        extract = extractor(features)
        if str(source) in EMBEDDED:
            name = name_of(extract)
            folder = HERE / str(source) / (name if name in EXTRACTORS else str(source))
            return _read(folder, extract, str(source))
        real, name, of = RealData.read(source, size=size), Path(source).name, identity(extract)
        files = (hash_inputs(source) or {}).get("files")
        folder = _cache_folder(cache) / f"reference-{real.sha256[:20]}-{of[:20]}"
        if of and (folder / "reference.json").exists():
            try:
                return replace(_read(folder, extract, name, data=real.sha256), files=files)
            except ValueError as error:
                logger.warning("the cached reference is computed again: %s", error)
        reference = _measure(extract, real, name)
        if not of:
            return replace(reference, files=files)
        try:
            sweep(folder, older=LITTER_AGE)
            reference.write(folder)
        except OSError as error:
            logger.warning("the reference is not cached: %s", error)
        # As they are read from the cache, so that the second run has the digits of the first.
        return replace(
            reference,
            features=reference.features.half().float(),
            heldout=reference.heldout.half().float(),
            files=files,
        )

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
        return _measure(extractor(features), RealData.of(data, heldout), name)

    def write(self, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
        """Writes the reference as a folder: safetensors (features in half precision) and JSON."""
        check_path(folder, "folder")
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
        ReferenceRecord(
            name=self.name,
            data=self.sha256,
            features={"name": self.features_name, "sha256": self.features_sha256},
            images=self.statistics.n,
            event_shape=None if self.event_shape is None else list(self.event_shape),
            sha256=sha256(file),
            about=about or {},
        ).save(folder / "reference.json")
        return folder


def _read(
    folder: Path, extract: Callable[[Tensor], Tensor], name: str, *, data: str | None = None
) -> Reference:
    about = ReferenceRecord.load(folder / "reference.json")
    file = folder / "reference.safetensors"
    try:
        if not file.exists() or sha256(file) != about.sha256:
            raise ValueError(f"the numbers {str(file)!r} are missing or damaged")
        if data is not None and about.data != data:
            raise ValueError("it is of other data")
        wanted = about.features
        if identity(extract) != wanted["sha256"]:
            raise ValueError(
                f"it holds features of {wanted['name']!r} (SHA-256 {wanted['sha256'][:12]}…), but "
                f"those of {name_of(extract)!r} are requested. Give the data itself (a folder of "
                "images, an idx or npz file) for other features"
            )
        numbers = read_tensors(file, foreign=True)
        shape = about.event_shape
        return Reference(
            features=numbers["features"].float(),
            heldout=numbers["heldout"].float(),
            statistics=Statistics(
                numbers["mean"].double(), numbers["covariance"].double(), about.images
            ),
            name=name,
            sha256=about.data,
            features_sha256=wanted["sha256"],
            extractor=extract,
            event_shape=None if shape is None else tuple(shape),
        )
    except (KeyError, TypeError, ValueError) as error:
        what = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
        raise ValueError(f"the reference {name!r} cannot be used: {what}") from None


@torch.no_grad()
def _measure(extract: Callable[[Tensor], Tensor], real: RealData, name: str) -> Reference:
    def extracted(samples: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        return extract(samples(index)).detach().cpu().flatten(1)

    def subset(samples: Callable[[Tensor], Tensor], n: int) -> Tensor:
        index = order(n)[:MOST_FEATURES].sort().values
        return torch.cat([extracted(samples, some).float() for some in index.split(500)])

    batches = torch.arange(real.n).split(500)
    return Reference(
        features=subset(real.data, real.n),
        heldout=subset(real.heldout, real.m),
        statistics=Statistics.over(extracted(real.data, index) for index in batches),
        name=name,
        sha256=real.sha256,
        features_sha256=identity(extract),
        extractor=extract,
        event_shape=real.event_shape,
    )


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")

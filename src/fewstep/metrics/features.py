"""Feature extractors: what a metric looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.files import read_json, read_tensors, sha256, write_json, write_tensors
from fewstep.registry import unknown
from fewstep.zoo.classifier import SmallClassifier

FORMAT, VERSION = "fewstep.features", 1
HERE = Path(__file__).parent.parent / "zoo" / "features"
EMBEDDED = ("fashion",)


class Features:
    r"""A feature extractor: images in the model's range to vectors.

    Attributes:
        name: Its name, for reports.
        sha256: The checksum of its weights.
        network: What gives the features: (B, C, H, W) in [-1, 1] to (B, D).
        classifier: The classifier inside, or ``None``.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        name: str,
        sha256: str,
        classifier: SmallClassifier | None = None,
    ) -> None:
        self.network, self.classifier = network, classifier
        self.name, self.sha256 = name, sha256

    def __repr__(self) -> str:
        return f"Features({self.name!r}, sha256={self.sha256[:12]!r})"

    def __call__(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        r"""Returns the features, (n, D), of images (n, C, H, W) in [-1, 1]."""
        return torch.cat([self.network(part) for part in images.split(batch_size)])

    def classify(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Returns the most likely class of each image, (n).

        Raises:
            ValueError: If the extractor is not a classifier.
        """
        if self.classifier is None:
            raise ValueError(f"the feature extractor {self.name!r} does not classify")
        return torch.cat([self.classifier(part).argmax(1) for part in images.split(batch_size)])

    @classmethod
    def load(cls, source: str | Path) -> Features:
        """Loads an embedded extractor by name, ``"pixels"``, or one from a folder.

        Raises:
            ValueError: If there is none, or its weights are damaged.
        """
        name = str(source)
        if name == "pixels":
            return pixels()
        folder = HERE / name if name in EMBEDDED else Path(source)
        if not (folder / "features.json").exists():
            raise ValueError(
                unknown("feature extractor", name, [*EMBEDDED, "pixels"]) + " Or give a folder."
            )
        return _read_folder(folder, name)


def pixels() -> Features:
    """Returns the extractor that gives the samples themselves, flattened."""
    digest = hashlib.sha256(b"fewstep.features: pixels").hexdigest()
    return Features(lambda images: images.flatten(1), name="pixels", sha256=digest)


def _read_folder(folder: Path, name: str) -> Features:
    about = read_json(folder / "features.json", what="feature extractor")
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise ValueError(f"{str(folder)!r} does not hold a feature extractor of version {VERSION}")
    file = folder / "features.safetensors"
    if not file.exists() or sha256(file) != about.get("sha256"):
        raise ValueError(f"the weights of the feature extractor {name!r} are missing or damaged")
    try:
        network = SmallClassifier(**about["network"])
        weights = read_tensors(file)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the feature extractor {name!r} is damaged: {error}") from None
    network = network.eval().requires_grad_(False)
    return Features(network.features, name=name, sha256=about["sha256"], classifier=network)


def write_features(folder: str | Path, network: nn.Module, training: dict[str, Any]) -> Path:
    """Writes a classifier as a feature extractor that :meth:`Features.load` reads; returns the folder."""
    folder = Path(folder)
    weights = {
        k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()
    }
    file = write_tensors(folder / "features.safetensors", weights)
    write_json(
        folder / "features.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "network": network.config,
            "sha256": sha256(file),
            "training": training,
        },
    )
    return folder


FeatureMap = str | Callable[[Tensor], Tensor] | None
"""The name of an extractor, a callable (n, *) to (n, D), or ``None`` for the samples themselves."""


def extractor(features: FeatureMap) -> Callable[[Tensor], Tensor]:
    """Returns what gives the features: named extractors loaded, ``None`` as pixels."""
    if features is None:
        return pixels()
    return Features.load(features) if isinstance(features, str) else features

"""Feature extractors: what a metric looks at."""

from __future__ import annotations

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
        network: The classifier inside.
    """

    def __init__(self, network: SmallClassifier, *, name: str, sha256: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name, self.sha256 = name, sha256

    def __call__(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        r"""Returns the features, (n, D), of images (n, C, H, W) in [-1, 1]."""
        return torch.cat([self.network.features(part) for part in images.split(batch_size)])

    def classify(self, images: Tensor, *, batch_size: int = 500) -> Tensor:
        """Returns the most likely class of each image, (n)."""
        return torch.cat([self.network(part).argmax(1) for part in images.split(batch_size)])

    @classmethod
    def load(cls, source: str | Path) -> Features:
        """Loads an embedded extractor by name, or one from a folder.

        Raises:
            ValueError: If there is none, or its weights are damaged.
        """
        name = str(source)
        folder = HERE / name if name in EMBEDDED else Path(source)
        if not (folder / "features.json").exists():
            raise ValueError(
                unknown("feature extractor", name, list(EMBEDDED)) + " Or give a folder."
            )
        about = read_json(folder / "features.json", what="feature extractor")
        if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise ValueError(
                f"{str(folder)!r} does not hold a feature extractor of version {VERSION}"
            )
        file = folder / "features.safetensors"
        if not file.exists() or sha256(file) != about.get("sha256"):
            raise ValueError(
                f"the weights of the feature extractor {name!r} are missing or damaged"
            )
        try:
            network = SmallClassifier(**about["network"])
            network.load_state_dict(
                {
                    k: v.float() if v.is_floating_point() else v
                    for k, v in read_tensors(file).items()
                }
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the feature extractor {name!r} is damaged: {error}") from None
        return cls(network, name=name, sha256=about["sha256"])


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


def two_sides(a: Tensor, b: Tensor, features: FeatureMap, *, least: int) -> tuple[Tensor, Tensor]:
    r"""Returns the features of two sets, float64, shapes (n, D) and (m, D).

    Raises:
        ValueError: If a side has fewer than ``least`` samples, the dimensions differ, a value is
            not finite, or all features are constant on both sides.
    """
    look = Features.load(features) if isinstance(features, str) else features
    sides = []
    for name, side in (("first", a), ("second", b)):
        if not isinstance(side, Tensor) or side.ndim < 2:
            got = tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__
            raise ValueError(f"the {name} set must be a tensor with shape (n, *), got {got}")
        if len(side) < least:
            raise ValueError(
                f"the {name} set has {len(side)} samples; at least {least} are needed"
            )
        found = (side if look is None else look(side)).flatten(1).to(torch.float64)
        if not bool(found.detach().isfinite().all()):
            raise ValueError(f"the features of the {name} set are not all finite")
        sides.append(found)
    left, right = sides
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"the two sets have {left.shape[1]} and {right.shape[1]} features; they must agree"
        )
    if float(left.detach().std(0).max()) == 0 == float(right.detach().std(0).max()):
        raise ValueError("the features are constant on both sides; there is nothing to compare")
    return left, right

"""Feature extractors: networks that map images to the vectors that metrics compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.files import read_tensors, sha256, write_tensors
from fewstep.base.paths import check_path
from fewstep.base.records import Record
from fewstep.base.registry import unknown
from fewstep.metrics.torchscript import SCRIPTS, read_script
from fewstep.models.networks.classifier import SmallClassifier


class FeaturesRecord(Record, name="fewstep.features", version=1, what="feature extractor"):
    """``features.json``: the options of the classifier and the checksum of its weights."""

    network: dict[str, Any]
    sha256: str
    training: dict[str, Any] = field(default_factory=dict)


HERE = Path(__file__).parent.parent / "embedded" / "features"
EMBEDDED = ("fashion", "fashion-robust")
"""Classifiers of Fashion-MNIST: one trained on clean images, one on noisy and blurred ones."""


class Features:
    r"""A feature extractor: images in the model's range to vectors.

    Attributes:
        name: Its name, for reports.
        sha256: The checksum of its weights, or of its file.
        settings: Other settings of the features, such as the range that images are scaled to.
        network: The map from images (B, C, H, W) in [-1, 1] to features (B, D).
        module: The network's parameters, or ``None``; images are moved to their device.
        batch_size: The most images in one evaluation of the network.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        name: str,
        sha256: str,
        settings: str = "",
        module: nn.Module | None = None,
        batch_size: int = 500,
    ) -> None:
        self.network, self.module, self.batch_size = network, module, batch_size
        self.name, self.sha256, self.settings = name, sha256, settings

    def __repr__(self) -> str:
        settings = f", {self.settings}" if self.settings else ""
        return f"Features({self.name!r}, sha256={self.sha256[:12]!r}{settings})"

    def __call__(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        r"""Returns the features, (n, D), of images (n, C, H, W) in [-1, 1]."""
        return torch.cat([self.network(part) for part in self._batches(images, batch_size)])

    def stages(self, images: Tensor) -> list[Tensor]:
        r"""Returns the features of every stage for a batch, (n, C, \*) each; a gradient goes through.

        If only the final features are available they are the one stage. The network is
        moved to the images' device.
        """
        weight = None if self.module is None else next(self.module.parameters(), None)
        if self.module is not None and weight is not None and weight.device != images.device:
            self.module.to(images.device)
        if isinstance(self.module, SmallClassifier):
            self._check(images)
            return self.module.stages(images)
        return [self.network(images)]

    def classify(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Returns the most likely class of each image, (n).

        Raises:
            ValueError: If the extractor is not a classifier.
        """
        return self.log_probabilities(images, batch_size=batch_size).argmax(1)

    def log_probabilities(self, images: Tensor, *, batch_size: int | None = None) -> Tensor:
        r"""Returns the logarithm of each class's probability, (n, classes), of images (n, C, H, W).

        Raises:
            ValueError: If the extractor is not a classifier.
        """
        if not isinstance(self.module, SmallClassifier):
            raise ValueError(f"the feature extractor {self.name!r} does not classify")
        logits = [self.module(part) for part in self._batches(images, batch_size)]
        return torch.cat(logits).log_softmax(1)

    def _batches(self, images: Tensor, size: int | None) -> Iterator[Tensor]:
        weight = None if self.module is None else next(self.module.parameters(), None)
        self._check(images)
        for part in images.split(size or self.batch_size):
            yield part if weight is None else part.to(weight.device)

    def _check(self, images: Tensor) -> None:
        if isinstance(self.module, SmallClassifier):
            channels = self.module.config["in_channels"]
            if images.ndim != 4 or images.shape[1] != channels:
                raise ValueError(
                    f"the feature extractor {self.name!r} takes images of shape "
                    f"(n, {channels}, H, W), got {tuple(images.shape)}"
                )

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        sha256: str | None = None,
        input: str | None = None,
        channels: int | None = None,
    ) -> Features:
        r"""Loads a feature extractor.

        An embedded one by name, ``"pixels"``, a folder, or a TorchScript file (``.pt``, ``.pth``,
        ``.ts``, ``.torchscript``) of a network images -> features (B, D); nothing is downloaded.

        TorchScript is a program; its interpreter has no access to Python, but it has to the
        machine's resources: load only files that you trust. If their SHA-256 is given it is
        checked; otherwise it is written to the log. If the network's ``forward`` has an option
        ``return_features``, it is switched on. So ``inception-2015-12-05.pt``, the network of the
        usual FID, gives its 2048 features; bytes and 3 channels are its defaults.

        Arguments:
            source: The name, folder or file.
            sha256: The checksum of the TorchScript file.
            input: The range that a TorchScript file takes: ``"symmetric"`` is [-1, 1], ``"unit"``
                is [0, 1], ``"byte"`` is uint8 from 0 to 255, rounded, without a gradient. Left
                out, ``"symmetric"``.
            channels: The channels that a TorchScript file takes; grey images are repeated. Left
                out, those of the images.

        Raises:
            ValueError: If there is none, it is damaged, or the checksum differs.
        """
        check_path(source, "source")
        name, path = str(source), Path(source)
        is_script = path.suffix in SCRIPTS
        if not is_script and (sha256, input, channels) != (None, None, None):
            raise ValueError(
                f"sha256, input and channels are for TorchScript files ({', '.join(SCRIPTS)}), "
                f"and {name!r} is none"
            )
        if is_script:
            script = read_script(path, digest=sha256, takes=input, channels=channels)
            return cls(
                script.extract,
                name=path.name,
                sha256=script.sha256,
                settings=script.settings,
                module=script.module,
                batch_size=50,
            )
        if name == "pixels":
            return pixels()
        folder = HERE / name if name in EMBEDDED else path
        if not (folder / "features.json").exists():
            raise ValueError(
                unknown("feature extractor", name, [*EMBEDDED, "pixels"])
                + f" Or give a folder, or a TorchScript file ({', '.join(SCRIPTS)})."
            )
        return _read_folder(folder, name)


def pixels() -> Features:
    """Returns the extractor whose features are the samples themselves, flattened."""
    digest = hashlib.sha256(b"fewstep.features: pixels").hexdigest()
    return Features(lambda images: images.flatten(1), name="pixels", sha256=digest)


def _read_folder(folder: Path, name: str) -> Features:
    about = FeaturesRecord.load(folder / "features.json")
    file = folder / "features.safetensors"
    if not file.exists() or sha256(file) != about.sha256:
        what = "damaged: their checksum is not features.json's" if file.exists() else "missing"
        raise ValueError(
            f"the weights {str(file)!r} of the feature extractor {name!r} are {what}; copy the folder again"
        )
    try:
        # On the meta device an absurd size allocates nothing; the weights are checked against it.
        with torch.device("meta"):
            network = SmallClassifier(**about.network)
        weights = read_tensors(file, foreign=True)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, assign=True
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the feature extractor {name!r} is damaged: {error}") from None
    network = network.eval().requires_grad_(False)
    return Features(network.features, name=name, sha256=about.sha256, module=network)


def write_features(folder: str | Path, network: SmallClassifier, training: dict[str, Any]) -> Path:
    """Writes a classifier as a feature extractor that :meth:`Features.load` reads; returns the folder."""
    check_path(folder, "folder")
    folder = Path(folder)
    weights = {
        k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()
    }
    file = write_tensors(folder / "features.safetensors", weights)
    record = FeaturesRecord(network=network.config, sha256=sha256(file), training=training)
    record.save(folder / "features.json")
    return folder


FeatureMap = str | Callable[[Tensor], Tensor] | None
"""The name of an extractor, a callable (n, *) to (n, D), or ``None`` for the samples themselves."""


def extractor(features: FeatureMap) -> Callable[[Tensor], Tensor]:
    """Returns an extractor: one of that name is loaded, ``None`` is the samples themselves."""
    if features is None:
        return pixels()
    return Features.load(features) if isinstance(features, str) else features


def identity(features: object) -> str:
    """Returns the checksum of an extractor and its settings; empty if it has no ``sha256``."""
    checksum, settings = getattr(features, "sha256", "") or "", getattr(features, "settings", "")
    return hashlib.sha256(f"{checksum} {settings}".encode()).hexdigest() if settings else checksum


def name_of(features: object) -> str:
    """Returns the name of an extractor or any callable, for reports."""
    return getattr(features, "name", None) or getattr(
        features, "__name__", type(features).__name__
    )

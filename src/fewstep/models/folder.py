"""The folder of a model, ``model.json`` and ``model.safetensors``, and the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fewstep.base.files import read_tensors, sha256, write_tensors
from fewstep.base.paths import check_path
from fewstep.base.records import Check, Record
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.models.denoiser import WrappedNetwork
from fewstep.models.networks.unet import SmallUNet, lay_out
from fewstep.models.preconditioning import Preconditioned

Range = Annotated[
    list[float],
    Check(lambda value: len(value) == 2 and value[0] < value[1], "two numbers, low below high"),
]


class ModelRecord(Record, name="fewstep.model", version=1, what="model"):
    """``model.json``; its fields are the arguments of :func:`write_model`."""

    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: str
    event_shape: list[int]
    class_names: list[str] | None = None
    preconditioning: dict[str, Any] | None = None
    data_range: Range = field(default_factory=lambda: [-1.0, 1.0])
    sha256: str
    training: dict[str, Any] = field(default_factory=dict)


def write_model(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    *,
    network: Mapping[str, Any],
    schedule: NoiseSchedule,
    prediction: str,
    event_shape: Sequence[int],
    class_names: Sequence[str] | None = None,
    preconditioning: Mapping[str, Any] | None = None,
    data_range: Sequence[float] = (-1.0, 1.0),
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as a folder that :func:`fewstep.load` reads; returns the folder.

    Arguments:
        folder: The folder to write.
        weights: The state of the network; besides it ``data.mean`` and ``data.std``, the
            statistics of the data for head starts, may be there.
        network: Its kind and the options that rebuild it.
        schedule: The schedule that it was trained with.
        prediction: Its prediction.
        event_shape: The shape of one sample.
        class_names: The names of the classes.
        preconditioning: ``{"kind": "edm", "sigma_data": s}`` if the network is the raw network of
            EDM's preconditioning, which predicts ``"x0"``.
        data_range: The values of black and white.
        training: The record of its training; informative, not read by the code.
    """
    check_path(folder, "folder")
    folder = Path(folder)
    file = write_tensors(folder / "model.safetensors", weights)
    ModelRecord(
        network=dict(network),
        schedule=schedule.to_record(),
        prediction=prediction,
        event_shape=list(event_shape),
        class_names=None if class_names is None else list(class_names),
        preconditioning=dict(preconditioning) if preconditioning else None,
        data_range=[float(v) for v in data_range],
        sha256=sha256(file),
        training=dict(training or {}),
    ).save(folder / "model.json")
    return folder


MOST_PIXELS = 4096
"""The largest height and width of an image of a folder's model; a guard against hostile files."""


class PreconditionedUNet(Preconditioned):
    """A raw U-Net in EDM's preconditioning, with the same conditions as the U-Net."""

    network: SmallUNet

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or ``None``."""
        return self.network.num_classes

    # The conditions are named: unknown ones are refused by the signature.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        r"""Returns the predicted data, (B, C, H, W), at states and noise levels (B)."""
        return super().forward(x, sigma, class_labels=class_labels)


class FolderModel(WrappedNetwork):
    """A network from a folder written by fewstep, class-conditional or not."""

    class_names: tuple[str, ...] | None = None
    data_range: tuple[float, float] = (-1.0, 1.0)
    about: Mapping[str, Any] = {}

    def decode(self, x: Tensor) -> Tensor:
        """Returns samples scaled from the range of the data to [-1, 1], for display."""
        low, high = self.data_range
        return x if (low, high) == (-1.0, 1.0) else (x - low) * (2 / (high - low)) - 1


def read_model(folder: Path, dtype: torch.dtype) -> FolderModel:
    """Reads the model that :func:`write_model` wrote.

    Raises:
        ValueError: If the folder is not a model, or it is damaged.
    """
    about = ModelRecord.load(folder / "model.json")
    file = folder / "model.safetensors"
    if not file.exists():
        raise ValueError(f"the model {str(folder)!r} has no weights: model.safetensors is missing")
    if sha256(file) != about.sha256:
        raise ValueError(
            f"the weights {str(file)!r} are damaged: their checksum is not model.json's; copy the folder "
            "again, or train again"
        )
    try:
        # On the meta device an absurd size allocates nothing; the weights are checked against it.
        with torch.device("meta"):
            network = _network(dict(about.network))
        tensors = read_tensors(file, foreign=True)
        mean, std = (tensors.pop(key, None) for key in ("data.mean", "data.std"))
        network.load_state_dict(tensors, assign=True)
        shape = model_shape(about.event_shape, network)
        for statistic in (mean, std):
            if statistic is not None and statistic.shape not in ((), shape):
                raise ValueError(
                    f"the statistics of the data have shape {tuple(statistic.shape)}, not {shape}"
                )
        classes = network.num_classes
        lay_out(network.to(dtype))
        schedule = schedule_from_record(about.schedule)
        prediction = Prediction.of(about.prediction)
        module, to_model_time = precondition(network, about.preconditioning, schedule, prediction)
        model = FolderModel(
            module.eval().requires_grad_(False),
            schedule=schedule,
            prediction=prediction,
            to_model_time=to_model_time,
            event_shape=shape,
            null_condition={"class_labels": classes} if classes else {},
            num_classes=classes,
            data_mean=mean,
            data_std=std,
        )
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the model {str(folder)!r} is damaged: {error}") from None
    model.class_names = tuple(about.class_names) if about.class_names else None
    low, high = map(float, about.data_range)
    model.data_range = low, high
    model.about = about.to_record()
    return model


def precondition(
    network: SmallUNet,
    record: Mapping[str, Any] | None,
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """Returns the network in the preconditioning that a file names, and its ``to_model_time``.

    Arguments:
        network: The network; the raw one if there is a preconditioning.
        record: The ``preconditioning`` of :func:`write_model`.
        schedule: The schedule.
        prediction: The prediction of the preconditioned network.

    Raises:
        ValueError: If they do not fit.
    """
    if record is None:
        return network, None
    if record.get("kind") != "edm" or prediction is not Prediction.X0:
        raise ValueError(
            "preconditioning must be of kind 'edm' with prediction 'x0', got "
            f"{record.get('kind')!r:.40} with {prediction.value!r}"
        )
    if schedule.name not in ("edm", "ve"):
        raise ValueError(
            f"EDM's preconditioning needs the schedule 'edm' or 've', got {schedule.name!r}"
        )
    module = PreconditionedUNet(network, sigma_data=record["sigma_data"])
    return module, None if schedule.name == "edm" else schedule.sigma


def model_shape(value: object, network: SmallUNet) -> tuple[int, ...]:
    """Returns the shape of one sample that a file claims, checked against the network."""
    patch, channels = network.patch, network.config["in_channels"]
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(size, int) and not isinstance(size, bool) for size in value)
        or value[0] != channels
        or not all(0 < size <= MOST_PIXELS and size % patch == 0 for size in value[1:])
    ):
        raise ValueError(
            f"event_shape must be [{channels}, height, width] in multiples of {patch} up to "
            f"{MOST_PIXELS}, got {value!r:.60}"
        )
    return tuple(value)


def _network(config: dict[str, Any]) -> SmallUNet:
    kind = config.pop("kind", None)
    if kind != "small-unet":
        raise ValueError(
            f"the model's network is of kind {kind!r}; this fewstep knows 'small-unet'"
        )
    return SmallUNet(**config)

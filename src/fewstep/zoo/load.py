"""Loading of models: embedded by name, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import exact
from fewstep.denoiser import Denoiser, WrappedNetwork
from fewstep.files import read_json, read_tensors, sha256
from fewstep.prediction import Prediction
from fewstep.registry import unknown
from fewstep.schedules import schedule, schedule_from_config
from fewstep.zoo.folder import FORMAT, VERSION
from fewstep.zoo.unet import SmallUNet, lay_out

HERE = Path(__file__).parent
EMBEDDED: dict[str, str] = {
    "fashion": "class-conditional U-Net on Fashion-MNIST, 28x28, v-prediction, ddpm-linear",
    "fashion-1step": "fashion in one evaluation: an operator, distilled from its trajectories",
    "mixture-smooth": "exact: four overlapping Gaussians in the plane, vp-linear",
    "mixture-sharp": "exact: eight narrow Gaussians in the plane, vp-linear",
}
"""The embedded models, with a sentence about each."""

MOST_PIXELS = 4096
"""The largest height and width of an image of a folder's model; a guard against hostile files."""


class FolderModel(WrappedNetwork):
    """A network from a folder written by fewstep, class-conditional or not."""

    class_names: tuple[str, ...] | None = None
    about: Mapping[str, Any] = {}

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        weights = next(self.parameters())
        return super().raw(x.to(weights.dtype), t, **cond).to(x.dtype)

    def prepare(self, n: int, cond: Mapping[str, Any]) -> dict[str, Any]:
        ready = super().prepare(n, cond)
        labels = ready.get("class_labels")
        if labels is None:
            return {}
        classes = self.network.num_classes  # type: ignore[attr-defined]
        if classes is None:
            raise ValueError("this model has no classes; leave class_labels out")
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"class_labels must be integers, got {labels!r:.60}") from None
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"class_labels must be integers, got {labels.dtype}")
        labels = labels.expand(n) if labels.ndim == 0 or len(labels) == 1 else labels
        if tuple(labels.shape) != (n,):
            raise ValueError(
                f"class_labels must be one integer or {n}, got shape {tuple(labels.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) > classes:
            raise ValueError(
                f"class_labels must be from 0 to {classes - 1} ({classes} is no class), got "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        device = next(self.parameters()).device
        return {"class_labels": labels.to(device=device, dtype=torch.int64)}


def load(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Denoiser:
    """Loads a model.

    Arguments:
        source: The name of an embedded model, a folder written by fewstep, or a folder saved by
            diffusers (which must be installed then).
        device: Where to put it.
        dtype: The type of its weights; left out, float32.

    Raises:
        ValueError: If there is no such model, or the folder is damaged.
    """
    name = str(source)
    if name == "mixture-smooth":
        return exact.smooth(schedule("vp-linear")).to(device)
    if name == "mixture-sharp":
        return exact.sharp(schedule("vp-linear")).to(device)
    folder = HERE / name if name in EMBEDDED else Path(source)
    if not folder.is_dir():
        raise ValueError(unknown("model", name, list(EMBEDDED)) + " Or give a folder that exists.")
    if (folder / "operator.json").exists():
        from fewstep.operators.folder import read_operator

        return read_operator(folder, dtype=dtype or torch.float32).to(device)
    if (folder / "model.json").exists():
        return _read_folder(folder, dtype or torch.float32).to(device)
    if (folder / "model_index.json").exists() or (folder / "config.json").exists():
        from fewstep.adapters.diffusers import load_denoiser

        return load_denoiser(folder, device=device, dtype=dtype)
    raise ValueError(
        f"the folder {name!r} holds no model: there is no model.json (fewstep) and no "
        "model_index.json or config.json (diffusers)"
    )


def _read_folder(folder: Path, dtype: torch.dtype) -> FolderModel:
    about = read_json(folder / "model.json", what="model")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{str(folder / 'model.json')!r} does not describe a fewstep model")
    if about.get("version") != VERSION:
        raise ValueError(
            f"the model has version {about.get('version')!r}; this fewstep reads version {VERSION}"
        )
    file = folder / "model.safetensors"
    if not file.exists():
        raise ValueError(f"the model {str(folder)!r} has no weights: model.safetensors is missing")
    if sha256(file) != about.get("sha256"):
        raise ValueError(
            f"the weights {str(file)!r} are damaged: their checksum is not model.json's"
        )
    try:
        # On the meta device an absurd size costs nothing; the weights must then have it.
        with torch.device("meta"):
            network = _network(dict(about["network"]))
        tensors = read_tensors(file)
        mean, std = (tensors.pop(key, None) for key in ("data.mean", "data.std"))
        network.load_state_dict(tensors, assign=True)
        shape = model_shape(about["event_shape"], network)
        for statistic in (mean, std):
            if statistic is not None and statistic.shape not in ((), shape):
                raise ValueError(
                    f"the statistics of the data have shape {tuple(statistic.shape)}, not {shape}"
                )
        names = about.get("class_names")
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"class_names must be a list of texts, got {names!r:.60}")
        classes = network.num_classes
        lay_out(network.to(dtype))
        model = FolderModel(
            network.eval().requires_grad_(False),
            schedule=schedule_from_config(about["schedule"]),
            prediction=Prediction.of(about["prediction"]),
            event_shape=shape,
            null_condition={"class_labels": classes} if classes else {},
            data_mean=mean,
            data_std=std,
        )
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the model {str(folder)!r} is damaged: {error}") from None
    model.class_names = tuple(names) if names else None
    model.about = about
    return model


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

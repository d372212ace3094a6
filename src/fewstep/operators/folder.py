"""The folder of an operator: ``operator.json`` and ``operator.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.files import read_tensors, sha256, write_tensors
from fewstep.base.paths import check_path
from fewstep.base.records import Record
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import schedule_from_record
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import FolderModel, PreconditionedUNet, model_shape, precondition
from fewstep.models.networks.unet import SmallUNet, lay_out
from fewstep.operators.flow_map import operator_of
from fewstep.operators.insertion import Site
from fewstep.operators.layout import Layout
from fewstep.operators.model import OperatorModel
from fewstep.operators.operator import Operator, TrajectoryOperator

ABOUT, WEIGHTS = "operator.json", "operator.safetensors"
ADAPTERS = {
    "UNet2DModel": "ImageCall",
    "UNet2DConditionModel": "TextCall",
    "DiTTransformer2DModel": "ClassesCall",
}
"""The networks of diffusers that a folder can describe, with their adapters."""


class OperatorRecord(Record, name="fewstep.operator", version=1, what="operator"):
    """``operator.json``: the trained network, the frames of the operator, its training."""

    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: str
    event_shape: list[int] | None = None
    class_names: list[str] | None = None
    layout: dict[str, Any]
    sites: list[dict[str, Any]] | None = None
    sha256: str
    training: dict[str, Any] = field(default_factory=dict)


def write_operator(
    folder: str | Path,
    operator: Operator,
    *,
    weights: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Writes an operator as a folder that :func:`fewstep.load` reads; returns the folder.

    Arguments:
        folder: The folder to write.
        operator: The operator.
        weights: The state of its network, instead of its own (for example the average).
        training: A record of its training; informative, not read by the code.
        dtype: The type of the stored weights; buffers, and weights out of its range, keep their own.
    """
    check_path(folder, "folder")
    folder, model = Path(folder), operator.model
    state = dict(weights) if weights is not None else operator.network.state_dict()
    parameters = {name for name, _ in operator.network.named_parameters()}
    ready = {k: _stored(v, dtype) if k in parameters else v for k, v in state.items()}
    file = write_tensors(folder / WEIGHTS, ready)
    OperatorRecord(
        network=describe(model),
        schedule=model.schedule.to_record(),
        prediction=model.native.value,
        event_shape=None if model.event_shape is None else list(model.event_shape),
        class_names=list(getattr(model, "class_names", None) or []) or None,
        layout=_plain(asdict(operator.layout)),
        # Named sites are found by an evaluation, for which a reader of the folder may not have the conditions.
        sites=[asdict(s) for s in operator.sites] if operator.layout.sites is not None else None,
        sha256=sha256(file),
        training=dict(training or {}),
    ).save(folder / ABOUT)
    return folder


def _stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in a type, or as it is if it has values out of its range."""
    if not weight.is_floating_point():
        return weight
    stored = weight.to(dtype)
    return stored if bool(stored.isfinite().all()) else weight


def describe(model: Denoiser) -> dict[str, Any]:
    """Returns the kind of the network and the options that rebuild it."""
    network = getattr(model, "network", None)
    if isinstance(network, SmallUNet):
        return {"kind": "small-unet", **network.config}
    if isinstance(network, PreconditionedUNet):
        preconditioning = {"kind": "edm", "sigma_data": network.sigma_data}
        raw = network.network
        return {"kind": "small-unet", "preconditioning": preconditioning, **raw.config}
    inner = getattr(network, "network", None)
    name = type(inner).__name__
    if name in ADAPTERS and type(network).__name__ == ADAPTERS[name]:
        import json

        config = json.loads(inner.to_json_string())  # type: ignore[union-attr]
        return {"kind": "diffusers", "class": name, "config": config}
    return {"kind": "other"}


def read_operator(
    folder: str | Path, *, teacher: Denoiser | None = None, dtype: torch.dtype = torch.float32
) -> OperatorModel:
    """Reads an operator.

    Arguments:
        folder: The folder.
        teacher: The model that it was distilled from: needed if its network is the user's own,
            whose code is not in the folder; its weights are replaced in a copy.
        dtype: The type of the weights.

    Raises:
        ValueError: If the folder is not an operator or is damaged.
    """
    check_path(folder, "folder")
    folder = Path(folder)
    about = OperatorRecord.load(folder / ABOUT)
    file = folder / WEIGHTS
    if not file.exists():
        raise ValueError(f"the operator {str(folder)!r} has no weights: {WEIGHTS} is missing")
    if sha256(file) != about.sha256:
        raise ValueError(
            f"the weights {str(file)!r} are damaged: their checksum is not {ABOUT}'s; copy the folder "
            "again, or distill again"
        )
    try:
        layout = _layout(about.layout)
        model = teacher if teacher is not None else _rebuild(about)
        sites = None if about.sites is None else [Site(**site) for site in about.sites]
        operator = operator_of(model, layout, sites=sites)
        operator.network.load_state_dict(read_tensors(file, foreign=True), assign=True)
        operator = operator.to(dtype)
        if isinstance(operator.network, (SmallUNet, PreconditionedUNet)):
            lay_out(operator.network)
        if isinstance(operator, TrajectoryOperator):
            operator.set_times(layout.times)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the operator {str(folder)!r} cannot be read: {error}") from None
    return OperatorModel(operator.eval().requires_grad_(False), about=about.to_record())


def _rebuild(about: OperatorRecord) -> Denoiser:
    """Returns the teacher without its weights, which are loaded afterwards."""
    config = dict(about.network)
    kind = config.pop("kind", None)
    schedule = schedule_from_record(about.schedule)
    prediction = Prediction.of(about.prediction)
    if kind == "small-unet":
        preconditioning = config.pop("preconditioning", None)
        # On the meta device an absurd size allocates nothing; the weights are checked against it.
        with torch.device("meta"):
            network = SmallUNet(**config)
        module, to_model_time = precondition(network, preconditioning, schedule, prediction)
        model = FolderModel(
            module,
            to_model_time=to_model_time,
            schedule=schedule,
            prediction=prediction,
            event_shape=model_shape(about.event_shape, network),
            null_condition={},
        )
        model.class_names = tuple(about.class_names) if about.class_names else None
        return model
    if kind == "diffusers":
        return _diffusers(config, about, schedule, prediction)
    raise ValueError(
        "its network cannot be described in a folder; read it with "
        "fewstep.operators.read_operator(folder, teacher=denoiser)"
    )


def _diffusers(
    config: Mapping[str, Any], about: OperatorRecord, schedule: Any, prediction: Prediction
) -> Denoiser:
    import diffusers

    from fewstep.adapters.diffusers import network_calls
    from fewstep.adapters.diffusers.loading import DiffusersModel

    name = config["class"]
    if name not in ADAPTERS:
        raise ValueError(
            f"networks of the class {name!r:.60} are not known; {', '.join(ADAPTERS)} are"
        )
    network = getattr(diffusers, name).from_config(dict(config["config"]))
    channels = int(network.config["in_channels"])
    module: nn.Module = getattr(network_calls, ADAPTERS[name])(network, channels)
    shape = about.event_shape
    return DiffusersModel(
        module,
        schedule=schedule,
        prediction=prediction,
        event_shape=None if shape is None else tuple(map(int, shape)),
    )


def _layout(value: Mapping[str, Any]) -> Layout:
    content = dict(value)
    content["times"] = tuple(content["times"])
    if "budgets" in content:
        content["budgets"] = tuple(content["budgets"])
    if content.get("sites") is not None:
        content["sites"] = tuple(map(str, content["sites"]))
    return Layout(**content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value

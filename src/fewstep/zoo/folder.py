"""The folder that holds a model: ``model.json`` and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.files import sha256, write_json, write_tensors
from fewstep.schedules import NoiseSchedule

FORMAT, VERSION = "fewstep.model", 1


def write_model(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    *,
    network: Mapping[str, Any],
    schedule: NoiseSchedule,
    prediction: str,
    event_shape: Sequence[int],
    class_names: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as a folder that :func:`fewstep.load` reads; returns the folder.

    Arguments:
        folder: Where to write.
        weights: The state of the network; besides it ``data.mean`` and ``data.std``, the
            statistics of the data for head starts, may be there.
        network: Its kind and the options that rebuild it.
        schedule: The schedule that it was trained with.
        prediction: What it predicts.
        event_shape: The shape of one sample.
        class_names: The names of the classes.
        training: How it was trained; for the reader, not for the code.
    """
    folder = Path(folder)
    file = write_tensors(folder / "model.safetensors", weights)
    write_json(
        folder / "model.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "network": dict(network),
            "schedule": schedule.to_config(),
            "prediction": prediction,
            "event_shape": list(event_shape),
            "class_names": None if class_names is None else list(class_names),
            "sha256": sha256(file),
            "training": dict(training or {}),
        },
    )
    return folder

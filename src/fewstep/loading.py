"""Loading of models: embedded by name, or from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.base.registry import unknown
from fewstep.diffusion.schedules import schedule
from fewstep.models import exact
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import read_model

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


EMBEDDED: dict[str, str] = {
    "fashion": "class-conditional U-Net on Fashion-MNIST, 28x28, v-prediction, ddpm-linear",
    "fashion-1step": "fashion in one evaluation: an operator, distilled from its trajectories",
    "mixture-smooth": "exact: four overlapping Gaussians in the plane, vp-linear",
    "mixture-sharp": "exact: eight narrow Gaussians in the plane, vp-linear",
}
"""The embedded models, with a sentence about each."""


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
    folder = EMBEDDED_FOLDER / name if name in EMBEDDED else Path(source)
    if not folder.is_dir():
        raise ValueError(unknown("model", name, list(EMBEDDED)) + " Or give a folder that exists.")
    if (folder / "operator.json").exists():
        from fewstep.operators.folder import read_operator

        return read_operator(folder, dtype=dtype or torch.float32).to(device)
    if (folder / "model.json").exists():
        return read_model(folder, dtype or torch.float32).to(device)
    if (folder / "model_index.json").exists() or (folder / "config.json").exists():
        from fewstep.adapters.diffusers import load_denoiser

        return load_denoiser(folder, device=device, dtype=dtype)
    raise ValueError(
        f"the folder {name!r} holds no model: there is no model.json (fewstep) and no "
        "model_index.json or config.json (diffusers)"
    )

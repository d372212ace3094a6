"""Loading of models: embedded by name, or from a folder."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.base.devices import find_device
from fewstep.base.paths import check_path
from fewstep.base.registry import unknown
from fewstep.diffusion.schedules import schedule
from fewstep.models import exact
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import read_model
from fewstep.sampling.profile import PROFILE, read_profile

logger = logging.getLogger("fewstep")

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


EMBEDDED: dict[str, str] = {
    "fashion": "class-conditional U-Net on Fashion-MNIST, 28x28, v-prediction, ddpm-linear",
    "fashion-1step": "fashion in 1, 2 or 4 evaluations: a flow map, distilled from its trajectories",
    "mixture-smooth": "exact: four overlapping Gaussians in the plane, vp-linear",
    "mixture-sharp": "exact: eight narrow Gaussians in the plane, vp-linear",
}
"""The embedded models, with a sentence about each."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")
"""The id of a model on the Hugging Face hub, with a revision or without."""

HUB_FILES = ["*/*.safetensors", "diffusion_pytorch_model*.safetensors", "model.safetensors"]
HUB_FILES += ["*.json", "*.txt", "*.model"]
"""What is read of a model on the hub: weights (not those of other programs beside them), configurations, vocabularies."""

MIXTURES = {"mixture-smooth": exact.smooth, "mixture-sharp": exact.sharp}


def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    download: bool = False,
) -> Denoiser:
    """Loads a model with its noise schedule, prediction type and conditions.

    Cost: no network evaluation.

    Arguments:
        source: The name of an embedded model (:data:`fewstep.loading.EMBEDDED`, ``fewstep models``); a
            folder written by ``fewstep train`` or ``fewstep distill``; a folder that diffusers saved, a
            pipeline or a network (diffusers must be installed then); or the id of such a one on the Hugging Face
            hub (``"owner/name"``, ``"owner/name@revision"``) that is in the local cache.
        device: The device of its weights: a device of torch, or ``"auto"``: CUDA, else MPS, else the CPU.
        dtype: The type of its weights; left out, float32, and float64 of the mixtures. Samples are float32 in any case.
        download: Whether a model of the hub is downloaded if it is not in the cache. Nothing else is.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        ValueError: If there is no such model, its files are damaged or incomplete, or the device is
            not available.

    Example:
        >>> denoiser = fewstep.load("fashion", device="cpu")
        >>> fewstep.sample(denoiser, 2, nfe=2, class_labels=3).shape  # in [-1, 1]
        torch.Size([2, 1, 28, 28])
    """
    name, place = str(source), find_device(device)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a model is a name or a folder, got {type(source).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating type, got {dtype!r}")
    if name in MIXTURES:
        if place.type == "mps":  # which has no float64, in which these compute
            place = torch.device("cpu")
        return MIXTURES[name](schedule("vp-linear")).to(place, dtype)
    folder = model_folder(source, download=download)
    if not folder.is_dir():
        hint = " Or give a folder that exists, or the id of a model on the hub (owner/name)."
        if folder.exists():
            hint = f" {name!r} is a file; give the folder that it is in."
        raise ValueError(unknown("model", name, list(EMBEDDED)) + hint)
    if (folder / "operator.json").exists():
        from fewstep.operators.folder import read_operator

        return read_operator(folder, dtype=dtype or torch.float32).to(place)
    if (folder / "model.json").exists():
        # Profiles are of the weights in single precision: those of another type are the same model, rounded.
        model = _with_profile(read_model(folder, torch.float32), folder).to(place, dtype)
        if model.profile is not None and dtype not in (None, torch.float32):
            model.profile = replace(model.profile, fingerprint=model.fingerprint())
        return model
    if (folder / "model_index.json").exists() or (folder / "config.json").exists():
        from fewstep.adapters.diffusers import load_denoiser

        return _with_profile(load_denoiser(folder, device=place, dtype=dtype), folder)
    raise ValueError(
        f"the folder {name!r} is not a model: there is no model.json or operator.json (fewstep), and no "
        f"model_index.json or config.json (diffusers){_what_is_there(folder)}"
    )


def model_folder(source: str | Path, *, download: bool = False) -> Path:
    """Returns the folder of a model: an embedded one, a given one, or a snapshot in the cache of the hub.

    Arguments:
        source: As for :func:`load`.
        download: Whether a model of the hub is downloaded if it is not in the cache.

    Raises:
        ValueError: If it is the id of a model of the hub that is not in the cache.
    """
    check_path(source, "source")
    name = str(source)
    if name in EMBEDDED:
        return EMBEDDED_FOLDER / name
    if Path(source).exists() or not HUB_ID.fullmatch(name):
        return Path(source)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return Path(source)
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            local_files_only=not download,
            allow_patterns=HUB_FILES,
        )
    except Exception as error:  # of the connection, of the hub, of the cache
        if not download:
            raise ValueError(
                f"there is no folder {name!r}, and no model of that id in the cache of the Hugging Face hub; "
                "give --download (download=True) to download it, or a folder"
            ) from None
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the model {name!r} cannot be downloaded: {why[0]:.300}") from None
    return Path(folder)


def _with_profile(denoiser: Denoiser, folder: Path) -> Denoiser:
    """Sets the profile in a model's folder; one of other weights is ignored."""
    file = folder / PROFILE
    if file.exists():
        profile = read_profile(file, denoiser.schedule)
        if profile.fingerprint in ("", denoiser.fingerprint()):
            denoiser.profile = profile
        else:
            logger.warning(
                "%s was measured on other weights than these, so auto uses the static default; "
                "measure the model again with fewstep fit %s --overwrite",
                file,
                folder,
            )
    return denoiser


def _what_is_there(folder: Path) -> str:
    """Returns a hint about a folder without a model, if there is one."""
    if (folder / "checkpoint.json").exists():
        return "; it is an unfinished training, give the same command again to resume it"
    if (folder / "scheduler_config.json").exists():
        return "; it is the scheduler of a pipeline, give the folder above"
    inner = sorted(p.parent.name for p in folder.glob("*/model_index.json"))
    inner += sorted(p.parent.name for p in folder.glob("*/model.json"))
    if inner:
        return f"; a model is in {str(folder / inner[0])!r}"
    files = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".ckpt", ".bin")
    )
    if files:
        return f"; {files[0]!r} alone does not say which network it belongs to"
    return ""

"""Checks of inputs and outputs that these functions share."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.extras import install_hint
from fewstep.models.denoiser import Denoiser

EXACT = ("mixture-smooth", "mixture-sharp")
"""The models that are their own data."""


def check_report() -> None:
    """Raises early if the report could not be written at the end."""
    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise ValueError(f"the report needs {missing[0]}: {install_hint('report')}")


def prepared_folder(folder: Path, names: Iterable[str] = (), *, overwrite: bool = False) -> Path:
    """Returns a folder for results, which need not exist yet.

    Raises:
        ValueError: If it is a file, or has one of these names and may not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; --out must be a folder")
    if not overwrite and any((folder / name).exists() for name in names):
        raise ValueError(f"{str(folder)!r} exists; give --overwrite or another --out")
    return folder


def check_tensor(data: Any, shape: tuple[int, ...], *, least: int) -> Tensor:
    """Returns samples in a tensor or an array as float32 on the CPU.

    Raises:
        ValueError, TypeError: If they are neither, of another shape, too few, or not finite.
    """
    if not isinstance(data, Tensor):
        if not hasattr(data, "__array__"):
            raise TypeError(
                f"data is a name, a path, a tensor or an array, got {type(data).__name__}"
            )
        data = torch.as_tensor(data.__array__())
    if tuple(data.shape[1:]) != shape or len(data) < least:
        raise ValueError(
            f"data must have shape (n, {', '.join(map(str, shape))}) with n of at least {least}, got "
            f"{tuple(data.shape)}"
        )
    if not data.dtype.is_floating_point:
        raise ValueError(
            f"data must be floats in the model's range, got {data.dtype}; give images in bytes as a "
            "folder, idx or npz file"
        )
    data = data.detach().to("cpu", torch.float32)
    if not bool(data.isfinite().all()):
        raise ValueError("data has values that are not finite")
    return data


def name_of(denoiser: Denoiser) -> str:
    """Returns a name of a model for reports: its network's class."""
    inner = getattr(denoiser, "inner", denoiser)
    return type(getattr(inner, "network", None) or inner).__name__

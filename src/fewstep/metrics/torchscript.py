"""Networks from TorchScript files, as feature extractors."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.base.registry import Registry

SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")
"""The suffixes of TorchScript files."""

logger = logging.getLogger("fewstep")


def _bytes(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


INPUTS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "input", {"symmetric": lambda x: x, "unit": lambda x: (x + 1) / 2, "byte": _bytes}
)
"""From the model's range, [-1, 1], to that which a network takes."""


class Script(NamedTuple):
    """A loaded file: images (B, C, H, W) in [-1, 1] to (B, D), its checksum and settings."""

    extract: Callable[[Tensor], Tensor]
    module: nn.Module
    sha256: str
    settings: str


def read_script(
    path: Path, *, digest: str | None, takes: str | None, channels: int | None
) -> Script:
    """Reads a TorchScript file, see :meth:`fewstep.metrics.Features.load`.

    Raises:
        ValueError: If the file is missing or no TorchScript, or its checksum is another.
    """
    usual = path.name.startswith("inception-2015-12-05")  # the published name of that file
    takes = takes or ("byte" if usual else "symmetric")
    channels = channels or (3 if usual else None)
    convert = INPUTS[takes]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"file {str(path)!r} cannot be read: {error.strerror}") from None
    checksum = hashlib.sha256(content).hexdigest()
    if digest is None:
        logger.warning("%s is run as a program; its SHA-256 is %s", path.name, checksum)
    elif digest.lower() != checksum:
        raise ValueError(f"file {str(path)!r} has the SHA-256 {checksum}, not {digest}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch.jit as a whole is deprecated
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} is not TorchScript: {error!s:.200}") from None
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    schema = module._c._get_method("forward").schema  # there is no public access to the signature
    options = {"return_features": True} if "return_features" in str(schema) else {}

    def extract(images: Tensor) -> Tensor:
        converted = convert(images)
        if channels is not None and converted.shape[1] != channels:
            if converted.shape[1] != 1:
                raise ValueError(
                    f"{path.name} takes {channels} channels, the images have {converted.shape[1]}"
                )
            converted = converted.expand(-1, channels, -1, -1)
        try:
            features = module(converted, **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path.name} failed on images of shape {tuple(converted.shape)}, {converted.dtype} "
                f"(input={takes!r}, channels={channels}): {reason}"
            ) from None
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
            got = (
                tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
            raise ValueError(f"{path.name} must return features with shape (B, D), got {got}")
        return features.flatten(1)

    return Script(extract, module, checksum, f"input={takes}, channels={channels or 'any'}")

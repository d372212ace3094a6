"""The files of weights in a folder: safetensors, whole or in shards, plain or of a variant such as fp16."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
"""The names that diffusers and transformers give to weights."""


def variant_of(folder: Path) -> str | None:
    """Returns the variant whose weights a folder has, ``None`` if it has plain ones.

    Raises:
        ValueError: If there are no safetensors, or only several variants.
    """
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    matches = [match for name in files if (match := WEIGHTS.fullmatch(name))]
    variants = {match["variant"] for match in matches}
    if None in variants:
        return None
    if len(variants) == 1:
        return next(iter(variants))
    if variants:
        names = ", ".join(sorted(map(str, variants)))
        raise ValueError(
            f"the folder {str(folder)!r} has the weights of several variants and no plain ones: {names}; "
            "leave the files of one of them in the folder"
        )
    if files:
        raise ValueError(
            f"the folder {str(folder)!r} has no weights under a name that diffusers gives, but {files[0]!r}"
        )
    raise ValueError(
        f"the folder {str(folder)!r} has no safetensors; weights in other files are not loaded, "
        "as they may run code. Save it again with safe_serialization=True"
    )

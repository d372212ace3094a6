"""Denoisers from folders that diffusers saved."""

from __future__ import annotations

from typing import Any


def load_denoiser(folder: Any, *, device: Any = "cpu", dtype: Any = None) -> Any:
    raise NotImplementedError

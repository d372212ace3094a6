"""Bridges to other libraries; each is imported when it is first used, not before."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_ADAPTERS = ("comfyui", "diffusers", "kdiffusion", "ray")


def __getattr__(name: str) -> ModuleType:
    if name not in _ADAPTERS:
        raise AttributeError(f"module 'fewstep.adapters' has no attribute {name!r}")
    return import_module(f"fewstep.adapters.{name}")

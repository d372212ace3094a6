"""fewstep in diffusers: our plans in their pipelines, their schedulers as plans, their models as denoisers.

This package's path is permanent: saved pipelines name it. Names are imported when they are first
used, so that its parts can be used without diffusers where they do not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.adapters.diffusers.loading import load_denoiser as load_denoiser
    from fewstep.adapters.diffusers.pipelines import load_pipeline as load_pipeline
    from fewstep.adapters.diffusers.scheduler import PlanScheduler as PlanScheduler
    from fewstep.adapters.diffusers.scheduler_plans import (
        plan_from_scheduler as plan_from_scheduler,
    )

_HOMES = {
    "PlanScheduler": "scheduler",
    "load_denoiser": "loading",
    "load_pipeline": "pipelines",
    "plan_from_scheduler": "scheduler_plans",
    "SchedulerMixin": "scheduler",  # from_pretrained recognises the class by it
}

__all__ = sorted(set(_HOMES) - {"SchedulerMixin"})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep.adapters.diffusers' has no attribute {name!r}")
    value = getattr(import_module(f"fewstep.adapters.diffusers.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

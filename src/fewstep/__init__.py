"""fewstep: any pretrained diffusion model, in few network evaluations.

Names are imported when they are first used, so that ``import fewstep`` and ``fewstep --help``
cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep import adapters as adapters
    from fewstep import comparison as comparison
    from fewstep import exact as exact
    from fewstep import metrics as metrics
    from fewstep import studies as studies
    from fewstep.denoiser import Clipped as Clipped
    from fewstep.denoiser import Denoiser as Denoiser
    from fewstep.denoiser import Guided as Guided
    from fewstep.denoiser import Thresholded as Thresholded
    from fewstep.grids import GRIDS as GRIDS
    from fewstep.grids import TimeGrid as TimeGrid
    from fewstep.grids import grid as grid
    from fewstep.learned.tuning import TunedSampler as TunedSampler
    from fewstep.learned.tuning import tune as tune
    from fewstep.likelihood import log_likelihood as log_likelihood
    from fewstep.operators.distillation import distill as distill
    from fewstep.planning import plan as plan
    from fewstep.plans import Plan as Plan
    from fewstep.preconditioning import preconditioned as preconditioned
    from fewstep.prediction import Prediction as Prediction
    from fewstep.recipe import SamplerRecipe as SamplerRecipe
    from fewstep.sampling import Trajectory as Trajectory
    from fewstep.sampling import sample as sample
    from fewstep.sampling import steps as steps
    from fewstep.schedules import SCHEDULES as SCHEDULES
    from fewstep.schedules import NoiseSchedule as NoiseSchedule
    from fewstep.schedules import schedule as schedule
    from fewstep.solvers import SOLVERS as SOLVERS
    from fewstep.solvers import Solver as Solver
    from fewstep.trajectories import TrajectoryStore as TrajectoryStore
    from fewstep.trajectories import record as record
    from fewstep.zoo.load import load as load

__version__ = "0.1.0"

_HOMES = {
    "adapters": "",
    "comparison": "",
    "exact": "",
    "metrics": "",
    "studies": "",
    "log_likelihood": "likelihood",
    "Clipped": "denoiser",
    "Denoiser": "denoiser",
    "Guided": "denoiser",
    "Thresholded": "denoiser",
    "GRIDS": "grids",
    "TimeGrid": "grids",
    "grid": "grids",
    "distill": "operators.distillation",
    "TunedSampler": "learned.tuning",
    "tune": "learned.tuning",
    "plan": "planning",
    "Plan": "plans",
    "preconditioned": "preconditioning",
    "Prediction": "prediction",
    "SamplerRecipe": "recipe",
    "Trajectory": "sampling",
    "sample": "sampling",
    "steps": "sampling",
    "SCHEDULES": "schedules",
    "NoiseSchedule": "schedules",
    "schedule": "schedules",
    "SOLVERS": "solvers",
    "Solver": "solvers",
    "TrajectoryStore": "trajectories",
    "record": "trajectories",
    "load": "zoo.load",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"fewstep.{home or name}")
    if home:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""fewstep: samples any pretrained diffusion model in few network evaluations.

Names are imported when they are first used, so that ``import fewstep`` and ``fewstep --help``
cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep import adapters as adapters
    from fewstep import comparison as comparison
    from fewstep import metrics as metrics
    from fewstep import studies as studies
    from fewstep.diffusion.grids import GRIDS as GRIDS
    from fewstep.diffusion.grids import TimeGrid as TimeGrid
    from fewstep.diffusion.grids import grid as grid
    from fewstep.diffusion.prediction import Prediction as Prediction
    from fewstep.diffusion.schedules import SCHEDULES as SCHEDULES
    from fewstep.diffusion.schedules import NoiseSchedule as NoiseSchedule
    from fewstep.diffusion.schedules import schedule as schedule
    from fewstep.learned.tuning import TunedSampler as TunedSampler
    from fewstep.learned.tuning import tune as tune
    from fewstep.loading import load as load
    from fewstep.models import exact as exact
    from fewstep.models import guidance as guidance
    from fewstep.models.denoiser import Denoiser as Denoiser
    from fewstep.models.preconditioning import preconditioned as preconditioned
    from fewstep.models.wrappers import Clipped as Clipped
    from fewstep.models.wrappers import Guided as Guided
    from fewstep.models.wrappers import Thresholded as Thresholded
    from fewstep.operators.distillation import distill as distill
    from fewstep.plans.plan import Plan as Plan
    from fewstep.sampling.inversion import invert as invert
    from fewstep.sampling.likelihood import log_likelihood as log_likelihood
    from fewstep.sampling.profile import Profile as Profile
    from fewstep.sampling.protocol import Trajectory as Trajectory
    from fewstep.sampling.recipe import SamplerRecipe as SamplerRecipe
    from fewstep.sampling.request import SamplerRequest as SamplerRequest
    from fewstep.sampling.resolve import plan as plan
    from fewstep.sampling.resolve import resolve as resolve
    from fewstep.sampling.sample import sample as sample
    from fewstep.sampling.sample import steps as steps
    from fewstep.solvers import SOLVERS as SOLVERS
    from fewstep.solvers import Solver as Solver
    from fewstep.studies.fit import fit as fit
    from fewstep.training.recipe import TrainRecipe as TrainRecipe
    from fewstep.trajectories import TrajectoryStore as TrajectoryStore
    from fewstep.trajectories import record as record
    from fewstep.workflows.analyzing import analyze as analyze
    from fewstep.workflows.comparing import compare as compare
    from fewstep.workflows.training import train as train

__version__ = "0.2.0"

_HOMES = {
    "adapters": "adapters",
    "analyze": "workflows.analyzing",
    "Clipped": "models.wrappers",
    "compare": "workflows.comparing",
    "comparison": "comparison",
    "Denoiser": "models.denoiser",
    "distill": "operators.distillation",
    "exact": "models.exact",
    "fit": "studies.fit",
    "grid": "diffusion.grids",
    "GRIDS": "diffusion.grids",
    "guidance": "models.guidance",
    "Guided": "models.wrappers",
    "invert": "sampling.inversion",
    "load": "loading",
    "log_likelihood": "sampling.likelihood",
    "metrics": "metrics",
    "NoiseSchedule": "diffusion.schedules",
    "plan": "sampling.resolve",
    "Plan": "plans.plan",
    "preconditioned": "models.preconditioning",
    "Prediction": "diffusion.prediction",
    "Profile": "sampling.profile",
    "record": "trajectories",
    "resolve": "sampling.resolve",
    "sample": "sampling.sample",
    "SamplerRecipe": "sampling.recipe",
    "SamplerRequest": "sampling.request",
    "schedule": "diffusion.schedules",
    "SCHEDULES": "diffusion.schedules",
    "Solver": "solvers",
    "SOLVERS": "solvers",
    "steps": "sampling.sample",
    "studies": "studies",
    "Thresholded": "models.wrappers",
    "TimeGrid": "diffusion.grids",
    "Trajectory": "sampling.protocol",
    "TrajectoryStore": "trajectories",
    "train": "workflows.training",
    "TrainRecipe": "training.recipe",
    "tune": "learned.tuning",
    "TunedSampler": "learned.tuning",
}
_MODULES = {"adapters", "comparison", "exact", "guidance", "metrics", "studies"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = import_module(f"fewstep.{_HOMES[name]}")
    if name not in _MODULES:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

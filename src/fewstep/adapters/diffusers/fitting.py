"""The scheduler of diffusers of a name, and its configuration for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.base.extras import install_hint
from fewstep.base.registry import unknown
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Flow, NoiseSchedule, Tabulated
from fewstep.models.denoiser import Denoiser

LEVELS = 1000
"""The number of levels of a continuous schedule for schedulers with discrete levels."""

LEAST_NOISE = 1e-3
"""The least ratio of noise to signal among those levels."""

ENDINGS = ("", "Scheduler", "DiscreteScheduler", "MultistepScheduler", "SinglestepScheduler")
OTHER_RANDOMNESS = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
"""Schedulers whose draws do not come from ``torch.randn``, so they cannot be addressed."""


def scheduler_class(name: str) -> Any:
    """Returns the class of a scheduler of diffusers, by its name or the beginning of it.

    Raises:
        ValueError: If diffusers is not installed, has no such scheduler, or it cannot be run here.
    """
    try:
        import diffusers.schedulers as home
    except ImportError:
        raise ValueError(
            f"samplers of diffusers need it installed: {install_hint('diffusers')}"
        ) from None
    names = [n for n in dir(home) if n.endswith("Scheduler")]
    by_lower = {n.lower(): n for n in names}
    full = next((n for end in ENDINGS if (n := by_lower.get(f"{name}{end}".lower()))), None)
    if full is None:
        short = sorted({_shortened(n) for n in names})
        raise ValueError(unknown("scheduler of diffusers", name, short))
    kind = getattr(home, full)
    steps = all(hasattr(kind, function) for function in ("step", "set_timesteps"))
    if not steps or full in OTHER_RANDOMNESS or "Inverse" in full or "RePaint" in full:
        raise ValueError(
            f"{full} cannot be run here: it does not step from noise to data with draws of "
            "torch.randn"
        )
    return kind


def _shortened(name: str) -> str:
    for end in reversed(ENDINGS):
        name = name.removesuffix(end) if end else name
    return name


def conventions(kind: Any, known: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Any]:
    """Returns the configuration that fits a scheduler to a model.

    Raises:
        ValueError: If none does.
    """
    schedule, name = denoiser.schedule, kind.__name__
    settings: dict[str, Any] = {}
    for option in ("clip_sample", "thresholding"):
        if option in known:
            settings[option] = False
    if name.startswith("FlowMatch"):
        if not isinstance(schedule, Flow):
            raise ValueError(
                f"{name} needs a flow model; this model's schedule is {schedule.name!r}"
            )
        return settings
    if isinstance(schedule, Flow) and hasattr(kind, "precondition_outputs") is False:
        if "use_flow_sigmas" not in known:
            raise ValueError(f"{name} does not know flow models (it has no use_flow_sigmas)")
        return {**settings, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if hasattr(kind, "precondition_outputs"):
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        low, high = schedule.rho(ends).tolist()
        return {**settings, "sigma_min": low, "sigma_max": high}
    if "trained_betas" not in known:
        raise ValueError(f"{name} cannot be made for the noise schedule of another model")
    table = trained_levels(schedule)
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    settings["trained_betas"] = betas.tolist()
    settings["num_train_timesteps"] = len(betas)
    if "prediction_type" in known and isinstance(schedule, Tabulated):
        v = denoiser.native is Prediction.V
        settings["prediction_type"] = "v_prediction" if v else "epsilon"
    return settings


def check_levels(scheduler: Any, configuration: Mapping[str, Any]) -> None:
    """Refuses a scheduler that changes the noise levels that it is given."""
    if "trained_betas" not in configuration:
        return
    asked = 1 - torch.tensor(configuration["trained_betas"], dtype=torch.float64)
    got = getattr(scheduler, "alphas_cumprod", None)
    if got is None or not torch.allclose(got.double(), asked.cumprod(0), rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"{type(scheduler).__name__} changes the noise levels of the model that it is given"
        )


def trained_levels(schedule: NoiseSchedule) -> Tensor:
    r"""Returns levels :math:`\bar\alpha` as of a variance-preserving model, float64.

    Only the ratio of signal to noise matters, so any schedule has them.
    """
    if isinstance(schedule, Tabulated):
        return schedule.alphas_cumprod
    # Schedulers keep the levels in float32, where 1 less a smaller noise would be 1.
    least = schedule.time(-torch.tensor(LEAST_NOISE, dtype=torch.float64).log())
    low = max(schedule.t_min, float(least))
    ends = torch.tensor([low, schedule.t_max], dtype=torch.float64)
    share = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    if schedule.name == "edm":  # its time is sigma: even in its logarithm
        cleanest, noisiest = schedule.lam(ends)
        lam = torch.lerp(cleanest, noisiest, share)
    else:
        lam = schedule.lam(torch.lerp(ends[0], ends[1], share))
    return torch.sigmoid(2 * lam)


def steps_for(evaluations: Callable[[int], int], nfe: int, name: str) -> int:
    """Returns the number of steps with this number of evaluations."""
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    below, above = None, None
    # The usual counts first: setting up hundreds of timesteps takes its time.
    usual = [nfe, (nfe + 1) // 2, nfe - 9, nfe - 1, nfe + 1]
    for steps in [n for n in usual if n > 0] + list(range(nfe + 1, 0, -1)):
        try:
            count = evaluations(steps)
        except (ValueError, KeyError, IndexError, RuntimeError, ZeroDivisionError):
            continue
        if count == nfe:
            return steps
        if count > nfe:
            above = min(count, above or count)
        else:
            below = max(count, below or count)
    near = " or ".join(str(n) for n in (below, above) if n is not None)
    raise ValueError(
        f"{name} cannot make {nfe} network evaluations; the nearest numbers are {near or 'unknown'}"
    )

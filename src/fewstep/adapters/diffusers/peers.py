"""Schedulers of diffusers as samplers of ours: their own steps, on our denoisers, from our noise."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers.fitting import (
    check_levels,
    conventions,
    scheduler_class,
    steps_for,
    trained_levels,
)
from fewstep.adapters.diffusers.probing import Draws
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Flow, NoiseSchedule, Tabulated
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.protocol import Run, Trajectory


@dataclass(frozen=True)
class DiffusersSampler:
    r"""Runs a scheduler of diffusers by its own ``step``; nothing of ours is between its steps.

    Each sample starts from the same standard normal draw as with our samplers, scaled as the
    scheduler asks. Its random draws are addressed by (seed, sample, draw), as ours are.

    Attributes:
        scheduler: The scheduler, configured; runs use copies.
        denoiser: The model.
        steps: What its ``set_timesteps`` is given.
        stepping: Further arguments of its ``step``.
        setting: Further arguments of its ``set_timesteps``.
    """

    scheduler: Any
    denoiser: Denoiser
    steps: int
    stepping: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        """The number of network evaluations: one for each of its timesteps, which may be more than steps."""
        return self._evaluations

    @cached_property
    def _evaluations(self) -> int:
        return len(self._prepared().timesteps)

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial state of the scheduler."""
        return noise * float(getattr(self._prepared(), "init_noise_sigma", 1.0))

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; saved states are the inputs of the evaluations, in the model's scale."""
        scheduler = self._prepared()
        evaluations = _Evaluations(scheduler, self.denoiser)
        first, between = x, list[Tensor]()
        shape = tuple(x.shape[1:])
        draws = Draws(lambda k, _: run.noise.draw(k, shape, dtype=x.dtype, device=x.device))
        with torch.no_grad():
            for k, t in enumerate(scheduler.timesteps):
                state, time = evaluations.state(x, t, k)
                if run.save:
                    between.append(state)
                output = evaluations.output(x, state, time, k, run.cond)
                with draws:  # around the step alone: the mode would slow the network down
                    x = scheduler.step(output, t, x, return_dict=False, **self.stepping)[0]
                if run.on_evaluation is not None:
                    run.on_evaluation()
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"{type(scheduler).__name__} with {self.nfe} evaluations returns NaN or infinity"
                + (" from finite noise" if bool(first.isfinite().all()) else "")
            )
        times = torch.tensor(
            [*evaluations.times, self.denoiser.schedule.t_min], dtype=torch.float64
        )
        states = torch.stack([*between, x]) if run.save else None
        return Trajectory(x, times if run.save else times[-1:], states, self.nfe)

    def _prepared(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps, **self.setting)
        return scheduler


class _Evaluations:
    """How a scheduler's model input and output are those of a denoiser.

    A scheduler knows one of three kinds of states: variance preserving with training timesteps, those
    of a flow, or those of EDM, which leaves the scaling of the network to the scheduler.
    """

    def __init__(self, scheduler: Any, denoiser: Denoiser) -> None:
        self.scheduler, self.denoiser = scheduler, denoiser
        self.schedule = denoiser.schedule
        self.times: list[float] = []
        self.edm = hasattr(scheduler, "precondition_outputs")
        self.flow = not self.edm and isinstance(self.schedule, Flow)
        self.levels = None
        if not self.edm and not self.flow and not isinstance(self.schedule, Tabulated):
            self.levels = Tabulated(trained_levels(self.schedule))
        kind = str(scheduler.config.get("prediction_type", "epsilon"))
        self.prediction = Prediction.V if kind == "v_prediction" else Prediction.EPS
        if kind == "sample" or self.edm:
            self.prediction = Prediction.X0
        if self.flow:
            self.prediction = Prediction.FLOW

    def state(self, x: Tensor, t: Tensor, k: int) -> tuple[Tensor, float]:
        """Returns the state that the network sees, in the denoiser's scale, and its time."""
        scheduler, schedule = self.scheduler, self.schedule
        scaled = (
            scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        )
        if self.edm:
            time = _time_at(schedule, -scheduler.sigmas[k].double().log())
            state = x * float(schedule.alpha(torch.tensor(time, dtype=torch.float64)))
        elif self.flow:
            time = float(t) / scheduler.config["num_train_timesteps"]
            state = scaled
        elif self.levels is None:
            time, state = float(t), scaled
        else:
            time = _time_at(schedule, self.levels.lam(torch.tensor(float(t)).double()))
            place = torch.tensor(time, dtype=torch.float64)
            state = scaled * float(torch.hypot(schedule.alpha(place), schedule.sigma(place)))
        time = min(max(time, schedule.t_min), schedule.t_max)
        self.times.append(time)
        return state, time

    def output(
        self, x: Tensor, state: Tensor, time: float, k: int, cond: Mapping[str, Any]
    ) -> Tensor:
        """Returns what the scheduler takes for the model output."""
        value = self.denoiser.evaluate(state, time, prediction=self.prediction, **cond)
        if not self.edm:
            return value
        # The network inside of the scheduler's own preconditioning, so that it finds our data.
        sigma = self.scheduler.sigmas[k].double()
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        offset = self.scheduler.precondition_outputs(x, zero, sigma)
        return (value - offset) / self.scheduler.precondition_outputs(zero, one, sigma)


def _time_at(schedule: NoiseSchedule, lam: Tensor) -> float:
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (schedule.t_min, schedule.t_max))
    return float(schedule.time(lam.clamp(schedule.lam(high), schedule.lam(low))))


def diffusers_sampler(denoiser: Denoiser, name: str, nfe: int, **options: Any) -> DiffusersSampler:
    """Returns a scheduler of diffusers for a model, with so many network evaluations.

    It is made for the model's noise schedule (a continuous one is cut into 1000 levels), without
    clipping, and else with the defaults of its class.

    Arguments:
        denoiser: The model.
        name: The name of its class, also without ``Scheduler``: ``"DDIM"``, ``"UniPCMultistep"``.
        nfe: The number of network evaluations.
        options: Options of its configuration (``use_karras_sigmas=True``, ``solver_order=3``,
            ``timestep_spacing="trailing"``, ``clip_sample=True``), or arguments of its ``step``
            (``eta=1.0``).

    Raises:
        ValueError: If there is no such scheduler, it does not fit the model's schedule, or it
            cannot make so many evaluations (the message names the nearest numbers).
        TypeError: If it has no such option.
    """
    kind = scheduler_class(name)
    known = inspect.signature(kind.__init__).parameters
    steps, sets = (inspect.signature(f).parameters for f in (kind.step, kind.set_timesteps))
    own, stepping, setting = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for key, value in options.items():
        place = own if key in known else stepping if key in steps else setting
        if place is setting and key not in sets:
            accepted = sorted({*known, *stepping, "eta"} - {"self", "kwargs"})
            raise TypeError(f"{kind.__name__} has no option {key!r}; it has {', '.join(accepted)}")
        place[key] = value
    configuration = {**conventions(kind, known, denoiser), **own}
    try:
        scheduler = kind(**configuration)
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        raise ValueError(f"{kind.__name__} cannot be made: {error}") from None
    check_levels(scheduler, configuration)

    def with_steps(count: int) -> DiffusersSampler:
        return DiffusersSampler(scheduler, denoiser, count, stepping, setting)

    return with_steps(steps_for(lambda count: with_steps(count).nfe, nfe, kind.__name__))

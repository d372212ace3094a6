"""What a PlanScheduler holds: plans that all threads share, and the state of a run on one thread."""

from __future__ import annotations

import copy
import threading
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.plans.execute import Execution
from fewstep.plans.plan import Plan
from fewstep.solvers import Solver


class Setup(NamedTuple):
    """What ``set_timesteps`` decides; shared among threads and never changed.

    Attributes:
        plan: The plan, in the prediction of the pipeline's network; in that of the data if they
            are clipped or thresholded.
        grid: The grid, or ``None`` for a stored plan.
        solver: The solver, or ``None`` for a stored plan.
        told: What the network is told at each call.
        to_data: For each call the map from state and answer to the predicted data, where those
            are clipped or thresholded; else ``None``.
    """

    plan: Plan
    grid: TimeGrid | None
    solver: Solver | None
    told: tuple[float, ...]
    to_data: tuple[tuple[float, float], ...] | None


class Run:
    """The state of one run on one thread."""

    def __init__(self, setup: Setup | None, timesteps: Tensor, sigmas: Tensor) -> None:
        self.setup, self.sigmas = setup, sigmas
        self.active = setup
        self.keep(timesteps)
        self.begin_index: int | None = None
        self.offset = 0
        self.dtype = torch.float32
        self.size, self.plain = 0, False
        self.generator: Any = None
        self.variance_noise: Tensor | None = None
        self.like: Tensor | None = None
        self.rewind()

    def keep(self, timesteps: Tensor) -> None:
        """Takes the tensor whose entries a pipeline will hand to ``step``."""
        self.timesteps = timesteps
        self._pointer, self._size = timesteps.data_ptr(), timesteps.element_size()

    def rewind(self) -> None:
        """Forgets how far the run was."""
        self.step_index: int | None = None
        self.execution: Execution | None = None
        self.sample: Tensor | None = None

    def expects(self, timestep: Any) -> bool:
        """Returns whether this is the next entry of ``timesteps`` itself; reads nothing from the device."""
        if not isinstance(timestep, Tensor) or self.step_index is None:
            return False
        return timestep.data_ptr() == self._pointer + self.step_index * self._size

    def told(self) -> float:
        """Returns what the network is told at the next step."""
        assert self.active is not None
        assert self.step_index is not None
        return float(self.active.told[self.step_index - self.offset])

    def begin(self, active: Setup, sample: Tensor) -> Execution:
        """Starts a plan that ends where ``timesteps`` end."""
        self.active = active
        self.step_index = self.offset = len(self.timesteps) - active.plan.nfe
        self.dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = sample.to(self.dtype)
        # What most steps need to know, found out once: each look costs a part of a microsecond.
        self.size = x.numel()
        self.plain = active.to_data is None and not active.plan.n_noise
        self.execution = Execution(active.plan, x, draw=self.draw, keep_inputs=True)
        return self.execution

    def draw(self, index: int) -> Tensor:
        """Draws with the generator of the step that asks."""
        del index
        like = self.like
        assert like is not None
        if self.variance_noise is not None:
            noise = self.variance_noise
        else:
            noise = randn_tensor(
                like.shape, generator=self.generator, device=like.device, dtype=like.dtype
            )
        return noise.to(self.dtype)


class PerThread(threading.local):
    """A run for each thread; copies start with the run of the thread that copies."""

    run: Run | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        made = PerThread()
        made.run = copy.deepcopy(self.run, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()


def place(timestep: Tensor, timesteps: Tensor) -> int | None:
    """Returns which entry of ``timesteps`` this is a view of; reads nothing from the device."""
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    if timestep.numel() != 1:
        return None
    index, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return index if not rest and 0 <= index < len(timesteps) else None

"""The state of a PlanScheduler: plans that all threads share, and the run of each thread."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.plans.execute import Execution
from fewstep.plans.plan import Plan
from fewstep.sampling.residual import Correction, Residual
from fewstep.solvers import Solver

MOST_SETUPS = 32
"""The most setups that a scheduler caches."""


class Setup(NamedTuple):
    """The result of ``set_timesteps``; shared among threads and copies, and never changed.

    Attributes:
        plan: The plan, in the prediction of the pipeline's network; in that of the data if they
            are clipped or thresholded.
        grid: The grid, or ``None`` for a stored plan.
        solver: The solver, or ``None`` for a stored plan.
        conditioning: The conditioning timestep of each evaluation.
        to_data: For each evaluation the map from state and prediction to the predicted data, where
            those are clipped or thresholded; else ``None``.
        alphas: For each evaluation alpha, where clipping leaves the predicted noise as it is
            (DDIM without ``use_clipped_model_output``); else ``None``.
        residual: The correction of the predictions, or ``None``.
    """

    plan: Plan
    grid: TimeGrid | None
    solver: Solver | None
    conditioning: tuple[float, ...]
    to_data: tuple[tuple[float, float], ...] | None
    alphas: tuple[float, ...] | None = None
    residual: Residual | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Setup:
        return self


class Setups:
    """The setups of a scheduler by request; copies of a scheduler share them."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what is stored under a key, made first if it is not there."""
        value = self._found.get(key)
        if value is None:
            value = make()
            if len(self._found) >= MOST_SETUPS:
                self._found = {}
            self._found[key] = value
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Setups:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Setups, ()


_NUMBERS = itertools.count()


class Run:
    """The state of one run on one thread; a copy has its number, and its timesteps themselves."""

    def __init__(
        self,
        setup: Setup | None,
        timesteps: Tensor,
        sigmas: Tensor,
        *,
        noise_seed: int | None = None,
    ) -> None:
        self.setup, self.sigmas, self.noise_seed = setup, sigmas, noise_seed
        self.number = next(_NUMBERS)
        self.active = setup
        self.keep(timesteps)
        self.begin_index: int | None = None
        self.compiled = False
        self.returns_data = False
        self.offset = 0
        self.dtype = torch.float32
        self.shape = torch.Size()
        self.size, self.plain = 0, False
        self.correct: Correction | None = None
        self.generator: Any = None
        self.variance_noise: Tensor | None = None
        self.like: Tensor | None = None
        self.rewind()

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        clone = object.__new__(Run)
        memo[id(self)] = clone
        for name, value in vars(self).items():
            if isinstance(value, torch.Generator):
                # A caller's generator is passed again to the next step; our own continues from here.
                value = value.clone_state() if name == "_own_generator" else None
            elif name == "generator":
                value = None
            elif name == "staged":
                value = None
            elif name in ("timesteps", "sigmas"):
                # Never changed: a server hands the entries of the original's timesteps to a copy.
                pass
            else:
                value = copy.deepcopy(value, memo)
            setattr(clone, name, value)
        return clone

    def keep(self, timesteps: Tensor) -> None:
        """Takes the tensor whose entries a pipeline will hand to ``step``."""
        self.timesteps = timesteps
        self.staged: Tensor | None = None
        self._pointer, self._size = timesteps.data_ptr(), timesteps.element_size()

    def rewind(self) -> None:
        """Resets the position of the run."""
        self.step_index: int | None = None
        self.execution: Execution | None = None
        self.sample: Tensor | None = None
        self._own_generator: torch.Generator | None = None

    def again(self) -> Run:
        """Returns a run of the same timesteps that has not begun."""
        fresh = Run(self.setup, self.timesteps, self.sigmas, noise_seed=self.noise_seed)
        fresh.begin_index, fresh.returns_data = self.begin_index, self.returns_data
        return fresh

    def expects(self, timestep: Any) -> bool:
        """Returns whether this is the next entry of ``timesteps`` itself; reads nothing from the device."""
        if not isinstance(timestep, Tensor) or self.step_index is None:
            return False
        return timestep.data_ptr() == self._pointer + self.step_index * self._size

    def conditioning(self) -> float:
        """Returns the conditioning timestep of the next evaluation."""
        assert self.active is not None
        assert self.step_index is not None
        return float(self.active.conditioning[self.step_index - self.offset])

    def begin(self, active: Setup, sample: Tensor) -> Execution:
        """Starts a plan that ends where ``timesteps`` end."""
        self.active = active
        self.step_index = self.offset = len(self.timesteps) - active.plan.nfe
        self.dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = sample.to(self.dtype)
        # Computed once for all steps: each attribute access costs a part of a microsecond.
        self.shape, self.size = x.shape, x.numel()
        self.plain = active.to_data is None and not active.plan.n_noise
        self.correct = None
        if active.residual is not None:
            active.residual.check(active.plan, tuple(x.shape[1:]))
            self.plain = False
            plan = active.plan
            self.correct = active.residual.begin(plan.prediction, plan.scales.detach())
        self._own_generator = None
        self.execution = Execution(active.plan, x, draw=self.draw, keep_inputs=True)
        return self.execution

    def resize(self, sample: Tensor) -> None:
        """Takes a state of another shape in the middle of a run.

        Earlier predictions that the rest of the plan reads are repeated where they were of a batch of
        one; how a larger batch grows or shrinks has no single meaning.

        Raises:
            ValueError: If the plan reads earlier predictions that do not fit the state.
        """
        assert self.execution is not None
        assert self.active is not None
        if not self.execution.resize(sample.shape):
            raise ValueError(
                f"the state has shape {tuple(sample.shape)} now and had {tuple(self.shape)} in the last "
                f"step, whose predictions {self.active.plan.name} still reads. A batch of one may grow; "
                "else call set_timesteps for a new run, or use a solver without memory, e.g. 'ddim'"
            )
        self.shape, self.size = sample.shape, sample.numel()

    def draw(self, index: int) -> Tensor:
        """Draws in the state's shape, with the generator of the step that asks."""
        del index
        like = self.like
        assert like is not None
        if self.variance_noise is not None:
            return self.variance_noise.to(self.dtype)
        generator = self.generator
        if generator is None and self.noise_seed is not None:
            if self._own_generator is None:
                self._own_generator = torch.Generator().manual_seed(self.noise_seed)
            generator = self._own_generator
        noise = randn_tensor(self.shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise.to(self.dtype)


class PerThread(threading.local):
    """A run for each thread; a copy has that of the thread that copied, for the first thread that uses it.

    So a server may set the timesteps of a request in one thread, copy the scheduler, and step in another.

    Arguments:
        waiting: The copied run, until a thread has taken it.
    """

    def __init__(self, waiting: list[Run] | None = None) -> None:
        self._waiting = waiting or []  # one list for all threads
        self._run: Run | None = None

    @property
    def run(self) -> Run | None:
        """The run of this thread, or ``None``."""
        if self._run is None and self._waiting:
            with suppress(IndexError):  # another thread was first
                self._run = self._waiting.pop()
        return self._run

    @run.setter
    def run(self, value: Run | None) -> None:
        self._run = value

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        run = self.run
        return PerThread([] if run is None else [copy.deepcopy(run, memo)])

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

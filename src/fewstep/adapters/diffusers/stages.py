"""Where the steps of a solver begin among its evaluations, and what several stages do to a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers.runs import Setup
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.solvers import Solver

LARGEST_JUMP = 200.0
"""The most by which one step of several stages may divide sigma / alpha: that is its amplification."""


class StagedTimesteps(Tensor):
    """The conditioning timesteps of a run whose steps have several evaluations each.

    A slice that would end inside of a step ends before that step. So a pipeline that runs the first part of
    the timesteps (SDXL's ``denoising_end``) returns the state between two steps, at which the pipeline of the
    second part (``denoising_start``) begins, and not what is only the input of a stage.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    begins: frozenset[int]
    unfinished = False

    @staticmethod
    def of(timesteps: Tensor, setup: Setup) -> Tensor:
        """Returns the timesteps; as they are, where every evaluation begins a step."""
        starts = begins(setup)
        if setup.solver is None or len(starts) == len(timesteps):
            return timesteps
        staged = timesteps.as_subclass(StagedTimesteps)
        staged.begins = frozenset(starts)
        return staged

    def __getitem__(self, key: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if not isinstance(key, slice):
            return plain[key]
        first, stop, stride = key.indices(len(plain))
        part = plain[slice(first, stop, stride)]
        if stride != 1 or stop <= first or stop >= len(plain) or stop in self.begins:
            return part
        end = max((i for i in self.begins if first < i <= stop), default=None)
        if end is not None:
            return plain[first:end]
        # All of it lies inside of one step: pipelines read the first timestep so, but cannot run it.
        part = part.as_subclass(StagedTimesteps)
        part.begins, part.unfinished = frozenset({0}), True
        return part

    def __iter__(self) -> Iterator[Tensor]:
        if self.unfinished:
            raise ValueError(
                f"the first {len(self)} of the timesteps end inside of a step of several evaluations; let this part of "
                "the run end later (denoising_end), make more steps, or take a solver of one evaluation a step, "
                "e.g. 'tab3'"
            )
        return iter(self.as_subclass(Tensor))


def begins(setup: Setup) -> list[int]:
    """Returns the indices among the evaluations with which steps, and not only their stages, begin."""
    if setup.solver is None or setup.grid is None:
        return [0]
    steps, zero = setup.grid.steps, setup.grid.ends_at_zero
    rest = [setup.solver.nfe(steps - k, ends_at_zero=zero) for k in range(steps)]
    return [rest[0] - evaluations for evaluations in rest]


def starts(setup: Setup, index: int) -> bool:
    """Returns whether a step begins at an index of the evaluations."""
    return index in begins(setup)


def step_at(setup: Setup, index: int) -> int:
    """Returns the number of the step that begins at an index of the evaluations.

    Raises:
        ValueError: If it is inside of a step.
    """
    starts = begins(setup)
    if index >= setup.plan.nfe:
        raise ValueError(
            f"index {index} is past the last of the {setup.plan.nfe} timesteps: there is nothing left to run. Begin "
            "earlier (a smaller denoising_start, a larger strength), or make more steps"
        )
    if index not in starts:
        raise ValueError(
            f"index {index} of the timesteps is inside of a step of {setup.plan.name}; begin where a step "
            "does, or take a solver of one evaluation a step, e.g. 'tab3'"
        )
    return starts.index(index)


def last_start(setup: Setup) -> int:
    """Returns the index of the evaluation with which the last step begins."""
    return begins(setup)[-1]


def most_steps(method: Solver, evaluations: int, to_zero: bool) -> int:
    """Returns the most steps that so many evaluations suffice for."""
    fitting = [
        k for k in range(1, evaluations + 1) if method.nfe(k, ends_at_zero=to_zero) <= evaluations
    ]
    if not fitting:
        raise ValueError(
            f"{method.name} needs more than {evaluations} network evaluations for a step"
        )
    return fitting[-1]


def check_jump(method: Solver, grid: TimeGrid) -> None:
    """Refuses a first step of several stages that would amplify the network's errors."""
    if method.nfe(2) <= 2 or grid.steps < 2 or grid.is_last_zero(0):
        return
    if method.prediction_on(grid.schedule) is Prediction.FLOW:
        return  # its stages are weighted in sigma / (alpha + sigma), and nothing is amplified
    jump = float(grid.rho[0] / grid.rho[1])
    if jump > LARGEST_JUMP:
        raise ValueError(
            f"the first step of this grid divides sigma / alpha by {jump:.3g}, which "
            f"{method.name} amplifies, as its stages are weighted in sigma / alpha; "
            "use grid='karras', or a multistep solver such as 'tab3' or 'unipc3'"
        )

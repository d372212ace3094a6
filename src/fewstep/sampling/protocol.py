r"""The protocol that every kind of sampler has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fewstep.diffusion.noise import NoiseSource
from fewstep.models.denoiser import Denoiser

logger = logging.getLogger("fewstep")


DEFAULT_BATCH = 256
"""The largest batch if no batch size is given."""


BUILT_IN_SAMPLER = (
    "this model has a built-in sampler of {} and cannot use another; leave {} out, or "
    "use the model that it was distilled from"
)


@dataclass(frozen=True)
class Trajectory:
    r"""Samples, with their intermediate states.

    Attributes:
        x: The samples, with shape (B, \*).
        times: The times of the states, with shape (S), float64.
        states: The states, with shape (S, B, \*), or ``None`` if they were not saved.
        nfe: The number of network evaluations for each sample (the mean, if it differs).

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> trajectory = fewstep.sample(denoiser, 4, solver="ddim", nfe=5, save="states")
        >>> trajectory.states.shape, trajectory.times.shape, trajectory.nfe
        (torch.Size([6, 4, 2]), torch.Size([6]), 5.0)
    """

    x: Tensor
    times: Tensor
    states: Tensor | None
    nfe: float


@dataclass(frozen=True)
class Run:
    """The inputs of a sampler besides the state: draws, conditions, a callback, the states to save.

    Attributes:
        noise: The source of draws, addressed by the samples' numbers.
        cond: The conditions of this batch.
        save: Whether to save the states.
        on_evaluation: Called after each network evaluation.
        times: The times of the states to save, decreasing; left out, all that the sampler has.
            A plan has those of its knots; others are ignored.
    """

    noise: NoiseSource
    cond: Mapping[str, Any] = field(default_factory=dict)
    save: bool = False
    on_evaluation: Callable[[], None] | None = None
    times: Sequence[float] | None = None


class Sampler(Protocol):
    """One protocol for plans, adaptive solvers, learned plans and operators."""

    @property
    def denoiser(self) -> Denoiser:
        """The model."""
        ...

    @property
    def nfe(self) -> int | None:
        """The number of network evaluations; ``None`` if it is not known beforehand."""
        ...

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial state of standard normal noise."""
        ...

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples that start at a state."""
        ...


class BuiltInSampler(Sampler, Protocol):
    """The sampler of an operator, which makes few budgets and has its own options."""

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        ...

    @property
    def budgets(self) -> Sequence[int]:
        """The numbers of evaluations that it makes."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Its options, with their values."""
        ...

    @property
    def fixed(self) -> Mapping[str, Any]:
        """What its model adds to the options of a recipe, so that the recipe is not taken for another model's."""
        ...

    def configured(self, nfe: int, **options: Any) -> BuiltInSampler:
        """Returns the sampler of a budget, with these options; fixed ones may be given with their value.

        Raises:
            ValueError, TypeError: If it has no such budget or option.
        """
        ...


def refusal(own: BuiltInSampler, given: str) -> str:
    """Returns the message for a request beside a built-in sampler."""
    return BUILT_IN_SAMPLER.format(budgets_text(own.budgets), given)


def budgets_text(budgets: Sequence[int]) -> str:
    """Returns budgets in words: "one evaluation", "1, 2 or 4 evaluations", "2 to 1000 evaluations"."""
    if len(budgets) == 1:
        return "one evaluation" if budgets[0] == 1 else f"{budgets[0]} evaluations"
    if isinstance(budgets, range):
        return f"{budgets[0]} to {budgets[-1]} evaluations"
    return f"{', '.join(map(str, budgets[:-1]))} or {budgets[-1]} evaluations"

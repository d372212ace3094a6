r"""The base class of search objectives, and what they are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.learned.learned_plan import LearnedPlan
from fewstep.learned.settings import Search
from fewstep.metrics.reference import Reference


class Outcome(NamedTuple):
    r"""The output of the sampler for a batch.

    Attributes:
        x: The samples, with shape (B, \*).
        states: The inputs of all evaluations but the first, each (B, \*); empty unless an objective
            needs them.
    """

    x: Tensor
    states: tuple[Tensor, ...] = ()


class Batch(NamedTuple):
    r"""A training batch: its address, and the teacher's targets for it.

    Attributes:
        address: The stage and the step; part of the address of an objective's random draws.
        pairs: The number of rows, the first ones, that have a teacher's sample.
        target: The teacher's samples of these rows, with shape (pairs, \*), or ``None``.
        states: The teacher's states at the knots between, each (pairs, \*).
    """

    address: tuple[int, ...]
    pairs: int
    target: Tensor | None = None
    states: tuple[Tensor, ...] = ()

    def drawn(self, real: Tensor, n: int, seed: int) -> Tensor:
        """Returns n of the rows of real samples, by the seed of the search and the address."""
        generator = generator_at("search", "real samples", seed, *self.address)
        return real[torch.randint(len(real), (n,), generator=generator)]


@dataclass(frozen=True)
class Given:
    """The arguments from which an objective is built.

    Attributes:
        learned: The learned plan, at its start.
        settings: The settings of the search.
        reference: Real data in the features of the loss, or ``None``.
        extract: The feature extractor of the loss, with data or without.
        dtype: The type of states.
        seed: The seed of the search.
    """

    learned: LearnedPlan
    settings: Search
    reference: Reference | None
    extract: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    seed: int


class Objective(ABC):
    r"""A differentiable loss :math:`L(x) \in \mathbb R` of a batch of samples x (B, \*).

    A search minimises a weighted sum of objectives over the parameters of a sampler. A subclass
    declares the attributes below and writes :meth:`build` and :meth:`loss`, a paired one also
    :meth:`distances`; a line in :data:`OBJECTIVES` then registers it for ``tune``, for descriptions
    such as ``"mmd+0.1*endpoint"`` and for the command line.

    Cost: that of the loss itself; the B times K network evaluations of a step are the sampler's.

    Attributes:
        paired: Whether it compares with a teacher's sample from the same noise. A stage whose first
            objective is paired judges candidates by :meth:`distances` on held-out pairs, else by
            their discrepancy from the reference.
        wants_pairs: Whether it needs a teacher's samples without being paired.
        scored: Whether it judges candidates itself, by :meth:`score` of held-out samples.
        wants_states: Whether it also compares intermediate states.
        needs_data: Whether it compares with real data.
        features: Whether it uses the features of the loss, so that they are no judge of the result.
        steps: The default number of steps, for images.
        batch_size: The default number of samples of a step: for vectors, for images.
        anchor: The terms that are added in a later stage of this objective alone.
    """

    paired: ClassVar[bool] = False
    wants_pairs: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    wants_states: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    features: bool = False
    steps: ClassVar[int] = 300
    batch_size: ClassVar[tuple[int, int]] = (64, 16)
    anchor: ClassVar[tuple[tuple[str, float], ...]] = ()

    @classmethod
    @abstractmethod
    def build(cls, given: Given) -> Objective:
        """Returns the objective of a search.

        Raises:
            ValueError: If a setting of it is unknown.
        """

    @abstractmethod
    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        """Returns the loss, a scalar, differentiable in the samples and states of the outcome."""

    def learn(self, outcome: Outcome, batch: Batch) -> None:
        """Updates what the objective itself learns, before the loss of each step; by default nothing."""
        del outcome, batch

    def typical(self, value: float, x: Tensor) -> float:
        r"""Returns the size to which weights of this objective in a sum are relative; never 0.

        Arguments:
            value: The loss at the start.
            x: The samples at the start, with shape (n, \*).
        """
        del x
        return max(abs(value), 1e-8)

    def score(self, x: Tensor) -> Tensor:
        r"""Returns how bad each sample x (B, \*) is, shape (B), if the objective is ``scored``.

        Raises:
            NotImplementedError: If it is not.
        """
        raise NotImplementedError(f"{type(self).__name__} does not score samples")

    def state(self) -> dict[str, Tensor]:
        """Returns what it has learned, for the checkpoint."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back the state of a checkpoint."""
        del tensors

    def distances(self, x: Tensor, target: Tensor) -> Tensor:
        r"""Returns the distance of each sample x (B, \*) from the teacher's, shape (B).

        Raises:
            NotImplementedError: If the objective is not paired.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compare with a teacher")

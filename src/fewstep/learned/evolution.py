r"""A search without gradients: covariance matrix adaptation (CMA-ES), of the library ``cmaes``."""

from __future__ import annotations

import importlib
import math

import numpy as np
import torch
from torch import Tensor

from fewstep.base.extras import install_hint

MOST_PARAMETERS = 500
"""The most parameters: the covariance matrix is square, and the number of generations grows with them."""


class Evolution:
    r"""Candidates of an evolution strategy, generation by generation.

    Its state is the list of values that it was given: the library's own generator is seeded, so that with the same values
    again it continues to the same bits, and nothing of its inside needs to be stored.

    References:
        | The CMA Evolution Strategy: A Tutorial (Hansen, 2016)
        | https://arxiv.org/abs/1604.00772

    Arguments:
        start: The mean of the first generation, shape (P).
        spread: Its standard deviation in each parameter.
        seed: The seed.
        given: The values so far, shape (G, population).

    Raises:
        ImportError: If the library is not installed.
        ValueError: If there are too few or too many parameters.
    """

    def __init__(
        self, start: Tensor, *, spread: float, seed: int, given: Tensor | None = None
    ) -> None:
        check_evolution(len(start))
        from cmaes import CMA

        self._cma = CMA(mean=start.double().numpy().copy(), sigma=spread, seed=seed % 2**32)
        self._given: list[list[float]] = []
        self._asked: list[np.ndarray] = []
        for values in [] if given is None else given.tolist():
            self.candidates()
            self.tell(values)

    def candidates(self) -> list[Tensor]:
        """Returns the candidates of the next generation, each (P)."""
        self._asked = [self._cma.ask() for _ in range(self._cma.population_size)]
        return [torch.from_numpy(candidate.copy()) for candidate in self._asked]

    def tell(self, values: list[float]) -> None:
        """Takes the values of the candidates, smaller is better; what is not finite is the worst."""
        values = [v if math.isfinite(v) else math.inf for v in values]
        self._given.append(values)
        if not all(math.isinf(v) for v in values):  # a generation that says nothing is left out
            self._cma.tell(list(zip(self._asked, values, strict=True)))

    @property
    def mean(self) -> Tensor:
        """The present mean, shape (P)."""
        return torch.from_numpy(np.array(self._cma.mean, dtype=np.float64))

    @property
    def given(self) -> Tensor:
        """The values so far, shape (G, population)."""
        return torch.tensor(self._given, dtype=torch.float64)


def check_evolution(parameters: int) -> None:
    """Raises unless there is the library, and a number of parameters that it can search."""
    try:
        importlib.import_module("cmaes")
    except ImportError:
        raise ImportError(
            f"a search without gradients needs the library cmaes: {install_hint('search')}"
        ) from None
    if not 2 <= parameters <= MOST_PARAMETERS:
        raise ValueError(
            f"a search without gradients is for 2 to {MOST_PARAMETERS} parameters, got {parameters}; use "
            "the optimizer adam, another family, or leave residual out"
        )

r"""The table behind ``solver="auto"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fewstep.diffusion.schedules import NoiseSchedule

AUTO = "auto"
"""The name of the automatic choice."""


@dataclass(frozen=True)
class Choice:
    """The choice of ``auto`` at a budget.

    Attributes:
        solver: The name of the solver.
        nfe: The number of network evaluations.
        grid: The name of the grid, or ``None`` for the solver's own.
        options: The options of that grid.
        head_start: The time of an analytic head start, or ``None``.
    """

    solver: str
    nfe: int
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    head_start: float | None = None

    def __str__(self) -> str:
        return describe(self.solver, self.grid, self.options, self.nfe)


WIDE = -7.0
"""A schedule that starts below this half log-SNR has times at which network errors are large."""


def choose(schedule: NoiseSchedule, nfe: int) -> Choice:
    r"""Returns the choice of ``auto`` at a budget, by the range of noise levels of a schedule.

    UniPC-2 on the grid ``logistic``; where the first half log-SNR is below -7 (a cosine table of few
    levels starts at -8.7) third-order rhoAB on Karras' grid: there the state is nearly all noise,
    the true :math:`\varepsilon` is nearly constant, and in :math:`\rho` that is integrated exactly.

    Chosen by the least regret over the networks of ``benchmarks/zoo.py``, see ``docs/choosing.md``; a
    profile of the model (:func:`fewstep.fit`) does better.
    """
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    start = torch.tensor(schedule.t_max, dtype=torch.float64)
    if float(schedule.lam(start)) < WIDE:
        return Choice("rhoab2", nfe, "karras")
    return Choice("unipc2", nfe, "logistic")


def describe(solver: str, grid: str | None, options: Mapping[str, Any], nfe: int) -> str:
    """Returns a sampler in one line, for logs."""
    listed = ", ".join(f"{k}={v}" for k, v in options.items() if k != "times")
    place = f" on the grid {grid!r}" if grid else ""
    return f"{solver}{place}{f' ({listed})' if listed else ''} with {nfe} evaluations"

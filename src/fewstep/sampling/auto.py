r"""The table behind ``solver="auto"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.diffusion.grids import CENTER, DATA, NOISE, SCALE, lam_range, useful_start
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


FEW = 8
"""Below this number of evaluations more of them are spent near pure noise."""

MANY = 20
"""Above this number of evaluations the ends of the grid matter more than its middle."""


def choose(schedule: NoiseSchedule, nfe: int) -> Choice:
    r"""Returns the choice of ``auto`` at a budget, by the range of noise levels of a schedule.

    UniPC-2 on the grid ``logistic``, for four kinds of schedules, by their range
    :math:`[\lambda_T, \lambda_0]` of the half log-SNR:

    - :math:`\lambda_0 \le 5.5`, :math:`\lambda_T \ge -6` (VP with a linear table, VE): center -1, scale 1.8; below 8
      evaluations center -1.25, scale 2.2, since a rough network loses most in long steps near pure noise;
    - :math:`\lambda_0 \le 5.5`, :math:`\lambda_T < -6` (VP with a cosine table): center -1, scale 1.5;
    - :math:`\lambda_0 > 5.5`, :math:`\lambda_T \ge -6` (EDM): center 0, scale 1.3;
    - :math:`\lambda_0 > 5.5`, :math:`\lambda_T < -6` (rectified flow): center 0, scale 1.15, nearly even in
      the time of the flow.

    Above 20 evaluations the grid has its default center -0.55 and scale 2.2, which leave no long step at
    the ends. A schedule of the second kind (a cosine table of few levels starts at -9) begins at -6 instead,
    with :math:`x = \sigma z`: before, the state is noise to a part in 400, a step of such a width multiplies
    the error of an :math:`\varepsilon` network by :math:`e^{\Delta\lambda}`, and no evaluation is worth spending.

    Chosen by the least regret over the networks of ``benchmarks/zoo.py``, see ``docs/choosing.md``; a
    profile of the model (:func:`fewstep.fit`) does better.
    """
    if not isinstance(nfe, int) or isinstance(nfe, bool) or nfe < 1:
        raise ValueError(f"nfe must be a positive integer, got {nfe!r}")
    first, last = lam_range(schedule)
    below = first < NOISE
    if nfe > MANY:
        center, scale = CENTER, SCALE
    elif last > DATA:
        center, scale = 0.0, 1.15 if below else 1.3
    elif below:
        center, scale = -1.0, 1.5
    else:
        center, scale = (-1.25, 2.2) if nfe < FEW else (-1.0, 1.8)
    options: dict[str, Any] = {"center": center, "scale": scale}
    if last > DATA and below:
        options["floor"] = -5.5
    if (start := useful_start(schedule)) is not None:
        options["t_start"] = start
    return Choice("unipc2", nfe, "logistic", options)


def describe(solver: str, grid: str | None, options: Mapping[str, Any], nfe: int) -> str:
    """Returns a sampler in one line, for logs."""
    listed = ", ".join(f"{k}={v}" for k, v in options.items() if k != "times")
    place = f" on the grid {grid!r}" if grid else ""
    return f"{solver}{place}{f' ({listed})' if listed else ''} with {nfe} evaluations"

"""Linear multistep with given weights for each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.diffusion.grids import TimeGrid
from fewstep.plans.tape import Form, Tape
from fewstep.solvers.base import Solver


@dataclass(frozen=True)
class Multistep(Solver):
    r"""Linear multistep with given weights for each step, as :func:`fewstep.fit` measures them on one grid.

    .. math::
        x_{k+1} = v_k \frac{\alpha_{k+1}}{\alpha_k} x_k
            + \left( \sigma_{k+1} - \frac{\alpha_{k+1}}{\alpha_k} \sigma_k \right)
              \sum_j w_{k j} \, \varepsilon_{k - j}

    With :math:`v_k = w_{k 0} = 1` and no other weights a step is one of DDIM. All Adams–Bashforth
    methods of DEIS are of this form, with weights that integrate polynomials; those that
    :func:`fewstep.fit` returns are least squares along the model's own trajectories instead, where
    non-stationary solvers use gradient descent.

    References:
        | Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (Shaul et al., 2024)
        | https://arxiv.org/abs/2403.01329

    Cost: one network evaluation per step.

    Order: that of its weights; 1 without any.

    Arguments:
        weights: For each step :math:`(v_k, w_{k 0}, w_{k 1}, \dots)`, the newest prediction first; as
            many rows as the grid has steps. Left out, every step is one of DDIM.
    """

    weights: Sequence[Sequence[float]] = ()

    name = "multistep"

    def __post_init__(self) -> None:
        try:
            rows = tuple(tuple(float(w) for w in row) for row in self.weights)
        except (TypeError, ValueError):
            raise TypeError(
                f"the weights of multistep are a list of numbers for each step, got {self.weights!r:.60}"
            ) from None
        for k, row in enumerate(rows):
            if not 2 <= len(row) <= k + 2:
                raise ValueError(
                    f"step {k} of multistep has {len(row)} weights; it takes that of the state and "
                    f"those of 1 to {k + 1} predictions"
                )
            if not all(math.isfinite(w) for w in row):
                raise ValueError(f"the weights of multistep are finite numbers, got {row!r:.60}")
        object.__setattr__(self, "weights", rows)
        # Measured weights suit one model; only the steps of DDIM integrate a constant exactly.
        object.__setattr__(self, "exact", not rows)

    @property
    def order(self) -> int:
        return 1

    def equations(self, tape: Tape, grid: TimeGrid) -> Form:
        rows = self.weights or [(1.0, 1.0)] * grid.steps
        if len(rows) != grid.steps:
            raise ValueError(
                f"these weights of multistep are for {len(rows)} steps, the grid has {grid.steps}; "
                "use the times that they were measured with"
            )
        x, outputs = tape.x, list[Form]()
        for k, row in enumerate(rows):
            x, output = tape.evaluate(x, grid.times[k])
            outputs.insert(0, output)
            ratio = grid.alpha[k + 1] / grid.alpha[k]
            span = grid.sigma[k + 1] - ratio * grid.sigma[k]
            step = (row[0] * ratio) * x
            for weight, past in zip(row[1:], outputs, strict=False):
                step = step + (weight * span) * past
            x = tape.state(step, k + 1)
        return x

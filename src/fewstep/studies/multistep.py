r"""Weights of a multistep method measured on a model: least squares along its own trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.prediction import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.solvers.multistep import Multistep
from fewstep.studies.dynamic import BestGrid, FittedStepCosts, StepCosts, best_grids
from fewstep.studies.local_errors import Path
from fewstep.studies.reference import Reference

HISTORY = 5
"""The most predictions that a step is a combination of."""

RIDGE = 1e-4
"""The ridge penalty on the difference to the weights of a DDIM step, relative to their terms' size."""


@dataclass(frozen=True)
class FittedMultistep:
    r"""The result of :func:`fit_multistep`.

    Attributes:
        solver: The solver, with its weights.
        end: Its samples for the noises of the reference, with shape (B, \*).
    """

    solver: Multistep
    end: Tensor


def fit_multistep(
    denoiser: Denoiser,
    reference: Reference,
    nodes: Tensor,
    *,
    history: int = HISTORY,
    ridge: float = RIDGE,
    progress: Progress = SILENT,
) -> FittedMultistep:
    r"""Returns the multistep method whose steps are nearest to the reference at each time.

    Step after step, the weights of

    .. math::
        x_{k+1} = v_k \frac{\alpha_{k+1}}{\alpha_k} x_k + h_k \sum_j w_{k j} \, \varepsilon_{k-j},
        \qquad h_k = \sigma_{k+1} - \frac{\alpha_{k+1}}{\alpha_k} \sigma_k

    minimise the mean square distance of :math:`x_{k+1}` to the reference trajectory from the same
    noise. The states :math:`x_k` are those of the method itself, not of the reference, so that a step
    also corrects the errors of the steps before it. The last step has :math:`v = 1` and weights of sum 1, so that
    it is exact where :math:`\varepsilon` is constant, and no noise is left in the sample: without that the distance is a
    tenth smaller at 5 evaluations, and samples are grainy. There are at most ``history + 1`` weights for as many
    equations as the samples have coordinates: nothing is trained, and little can be overfitted.

    Cost: one evaluation of each sample per step.

    Arguments:
        denoiser: The model, with its guidance.
        reference: Reference trajectories.
        nodes: Which nodes of the reference are the times, as increasing indices, shape (K + 1).
        history: The most predictions that a step combines.
        ridge: The ridge penalty on the difference to a DDIM step.
        progress: Ticks at each evaluation.
    """
    schedule = denoiser.schedule
    times = reference.times[nodes]
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    x = reference.x[int(nodes[0])]
    outputs: list[Tensor] = []
    rows: list[tuple[float, ...]] = []
    for k in range(len(times) - 1):
        with torch.no_grad():
            output = denoiser(x, float(times[k]), prediction=Prediction.EPS, **reference.cond)
        progress.tick()
        outputs = [output, *outputs][:history]
        ratio = alpha[k + 1] / alpha[k]
        span = sigma[k + 1] - ratio * sigma[k]
        # Predictions of neighbouring steps are nearly equal: the penalty is on their differences.
        parts = [ratio * x, span * output, *(span * (past - output) for past in outputs[1:])]
        lacks = reference.x[int(nodes[k + 1])] - parts[0] - parts[1]
        # The last step takes all of the noise: the nearest combination would leave some of it.
        free = 2 if k == len(times) - 2 else 0
        change = [0.0] * free + _ridge(parts[free:], lacks, ridge)
        state, newest, *past = change
        rows.append((1 + state, 1 + newest - sum(past), *past))
        x = parts[0] + parts[1]
        for weight, part in zip(change, parts, strict=True):
            x = x + weight * part
    return FittedMultistep(Multistep(rows), x)


def fitting_grids(path: Path, most: int) -> list[dict[int, BestGrid]]:
    """Returns the times to fit weights on, for each number of steps up to ``most``, by two rules.

    The best times for fitted weights, and those for polynomials of degree 1: the costs of the
    first ignore that the errors of several steps add up.
    """
    costs = (FittedStepCosts(path), StepCosts(path, 1))
    return [best_grids(cost, most, free_end=False) for cost in costs]


def fit_on(
    denoiser: Denoiser,
    reference: Reference,
    grids: Sequence[Mapping[int, BestGrid]],
    nfe: int,
    *,
    progress: Progress = SILENT,
) -> list[tuple[Tensor, FittedMultistep]]:
    """Returns the fitted method on the times of each grid (once, if grids agree), with the times."""
    fitted: list[tuple[Tensor, FittedMultistep]] = []
    for by_steps in grids:
        times = by_steps[nfe].times
        if any(torch.equal(times, known) for known, _ in fitted):
            continue
        nodes = torch.searchsorted(-reference.times, -times)
        fitted.append((times, fit_multistep(denoiser, reference, nodes, progress=progress)))
    return fitted


def _ridge(terms: list[Tensor], target: Tensor, ridge: float) -> list[float]:
    """Returns the weights of the terms that fit the target, in float64 on the CPU."""
    if not terms:
        return []
    columns = torch.stack([term.flatten() for term in terms]).cpu().double()
    # Scaled to unit size: positive definite by the ridge, and solved to the same bits each time, which
    # least squares of LAPACK are not. A term that is zero gets no weight.
    size = columns.square().sum(1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    columns = columns / size[:, None]
    gram = columns @ columns.T + ridge * torch.eye(len(columns), dtype=torch.float64)
    right = columns @ target.flatten().cpu().double()
    return (torch.linalg.solve(gram, right) / size).tolist()

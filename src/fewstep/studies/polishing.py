r"""Improves the times of a plan by running it: Gauss–Newton on the distance to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.solvers import Solver
from fewstep.studies.reference import Evaluation, grid_of, run_plan

POWER = 1.5
"""Times are moved in :math:`t^{1 / 1.5}`, in which good grids are nearly even."""

ENOUGH = 0.01
"""An iteration that gains less than this share is the last."""

TRIES = 8
"""The number of tries of a step, each with more damping."""


@dataclass(frozen=True)
class Candidate:
    """A solver on explicit times.

    Attributes:
        solver: The solver.
        times: The times, float64, shape (K + 1).
        head: Whether it begins with an analytic head start.
        origin: The source of the times, for display.
    """

    solver: Solver
    times: Tensor
    head: bool = False
    origin: str = ""

    def plan(self, denoiser: Denoiser) -> Plan:
        """Returns the plan for a model."""
        grid = grid_of(denoiser.schedule, self.times)
        if denoiser.integer_times:
            grid = grid.rounded()
        return replace(self.solver.plan(grid), head=self.head)


@dataclass(frozen=True)
class Polished:
    """The result of :func:`polish`.

    Attributes:
        candidate: The candidate with its new times.
        history: The root mean square distance before, and after each iteration.
        evaluations: The evaluations that it took, for each sample.
    """

    candidate: Candidate
    history: tuple[float, ...]
    evaluations: int


def polish(
    denoiser: Denoiser,
    candidate: Candidate,
    noise: Tensor,
    end: Tensor,
    cond: Mapping[str, Any],
    *,
    iterations: int = 3,
    progress: Progress = SILENT,
) -> Polished:
    r"""Minimises the distance to the reference over the times of a plan.

    With :math:`r_b` the difference to the reference of sample b, :math:`e_b` its root mean square and
    m the median of these before the first iteration, it lowers the pseudo-Huber mean

    .. math:: L = \frac1B \sum_b 2 m^2 \left( \sqrt{1 + e_b^2 / m^2} - 1 \right)

    by damped Gauss–Newton steps in all times at once, with differences for derivatives. A few samples
    whose trajectory ends in another basin of attraction would dominate a plain mean of squares, and times
    that suit them do not suit others.

    Cost: an iteration takes K + 1 runs of which the first evaluations are shared, hence about
    :math:`K^2 / 2 + 2 K` evaluations for each sample. The residuals leave the model's device; the
    small linear system is solved on the CPU in float64.

    Arguments:
        denoiser: The model.
        candidate: The initial candidate.
        noise: The initial draws, of unit variance, with shape (B, \*).
        end: The reference samples from them, with shape (B, \*).
        cond: The conditions, ready for this batch.
        iterations: The most iterations.
        progress: Follows the evaluations.
    """
    if denoiser.integer_times:
        return Polished(candidate, (), 0)  # integer timesteps have no derivatives
    work = _Work(denoiser, candidate, noise, end, cond, progress)
    place = candidate.times.clamp_min(0).pow(1 / POWER)
    residual, log = work.run(place, ())
    errors = _each(residual)
    middle = errors.square().median().clamp_min(1e-24)
    loss, history, damping = robust_mean(errors.square(), middle), [_rms(errors)], 1e-3
    for _ in range(iterations):
        weight = (1 + errors.square() / middle).pow(-0.25)[:, None]
        slopes = work.slopes(place, residual, log)
        columns = torch.stack([(slope * weight).flatten() for slope in slopes])
        matrix = columns @ columns.T
        gradient = columns @ (residual * weight).flatten()
        step = work.descend(place, matrix, gradient, loss, middle, damping)
        if step is None:
            break
        gain = 1 - step.loss / loss
        place, residual, log, loss = step.place, step.residual, step.log, step.loss
        errors, damping = _each(residual), step.damping / 4
        history.append(_rms(errors))
        if gain < ENOUGH:
            break
    return Polished(work.candidate(place), tuple(history), work.count)


@dataclass(frozen=True)
class _Step:
    place: Tensor
    residual: Tensor
    log: list[Evaluation]
    loss: float
    damping: float


class _Work:
    """Runs of a candidate with its times moved, counting evaluations."""

    def __init__(
        self,
        denoiser: Denoiser,
        candidate: Candidate,
        noise: Tensor,
        end: Tensor,
        cond: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.denoiser, self.start = denoiser, candidate
        self.noise, self.end, self.cond, self.progress = noise, end, cond, progress
        s = denoiser.schedule
        self.low, self.high = s.t_min ** (1 / POWER), s.t_max ** (1 / POWER)
        self.zero = float(candidate.times[-1]) < s.t_min
        last = len(candidate.times) - 1
        # Without a head start the first time is the prior's; a last time at the schedule's end is fixed.
        self.free = list(range(0 if candidate.head else 1, last))
        if not self.zero and float(candidate.times[-1]) > s.t_min:
            self.free.append(last)
        self.count = 0

    def candidate(self, place: Tensor) -> Candidate:
        times = place.pow(POWER)
        fixed = [k for k in range(len(place)) if k not in self.free]
        times[fixed] = self.start.times[fixed]
        return replace(self.start, times=times)

    def run(self, place: Tensor, known: Sequence[Evaluation]) -> tuple[Tensor, list[Evaluation]]:
        """Returns the difference to the reference, (B, D), float64 on the CPU, and the evaluations."""
        log: list[Evaluation] = []
        plan = self.candidate(place).plan(self.denoiser)
        x = run_plan(self.denoiser, plan, self.noise, self.cond, known=known, log=log)
        shared = {id(output) for _, _, output in known}
        new = sum(id(output) not in shared for _, _, output in log)
        self.count += new
        self.progress.tick(new)
        return (x - self.end).flatten(1).cpu().double(), log

    def slopes(self, place: Tensor, residual: Tensor, log: Sequence[Evaluation]) -> list[Tensor]:
        gaps, slopes = -place.diff(), []
        for k in self.free:
            room = min(float(gaps[max(k - 1, 0)]), float(gaps[min(k, len(gaps) - 1)]))
            away = -0.01 * room if k == 0 else 0.01 * room
            moved = place.clone()
            moved[k] += away
            slopes.append((self.run(moved, log)[0] - residual) / away)
        return slopes

    def descend(
        self,
        place: Tensor,
        matrix: Tensor,
        gradient: Tensor,
        loss: float,
        middle: Tensor,
        damping: float,
    ) -> _Step | None:
        """Returns the first step that lowers the loss, with more and more damping, or ``None``."""
        for _ in range(TRIES):
            damped = matrix + damping * torch.diag(matrix.diagonal().clamp_min(1e-30))
            moved = place.clone()
            moved[self.free] -= torch.linalg.solve(damped, gradient)
            if self.fits(place, moved):
                residual, log = self.run(moved, ())
                new = robust_mean(_each(residual).square(), middle)
                if new < loss:
                    return _Step(moved, residual, log, new, damping)
            damping = max(6 * damping, 1e-3)
        return None

    def fits(self, place: Tensor, moved: Tensor) -> bool:
        """Whether times still decrease, are in the schedule's range, and no step is nearly zero."""
        inner = moved[:-1] if self.zero else moved
        if not bool(moved.isfinite().all()):
            return False
        if float(inner.max()) > self.high + 1e-12 or float(inner.min()) < self.low - 1e-12:
            return False
        return bool((moved.diff() < 0.05 * place.diff()).all())


def _each(residual: Tensor) -> Tensor:
    return residual.square().mean(1).sqrt()


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def robust_mean(squares: Tensor, middle: Tensor | float | None = None) -> float:
    """Returns the pseudo-Huber mean of squares: a sample in another basin of attraction must not dominate.

    Arguments:
        squares: The mean square of each sample.
        middle: Their scale m squared; left out, their median.
    """
    if middle is None:
        middle = squares.median().clamp_min(1e-24)
    return float((2 * middle * ((1 + squares / middle).sqrt() - 1)).mean())

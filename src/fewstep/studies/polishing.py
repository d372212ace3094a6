r"""Times of a plan made better by running it: Gauss–Newton on the distance to the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.solvers import Solver
from fewstep.studies.reference import grid_of, run_plan

POWER = 1.5
"""Times are moved in :math:`t^{1 / 1.5}`, in which good grids are nearly even."""

ENOUGH = 0.01
"""An iteration that gains less than this share is the last."""

TRIES = 8
"""How often a step is tried with more damping."""

Calls = list[tuple[float, Tensor, Tensor]]


@dataclass(frozen=True)
class Candidate:
    """A solver on explicit times.

    Attributes:
        solver: The solver.
        times: The times, float64, shape (K + 1).
        head: Whether it begins with an analytic head start.
        origin: Where the times come from, for people.
    """

    solver: Solver
    times: Tensor
    head: bool = False
    origin: str = ""

    def plan(self, denoiser: Denoiser) -> Plan:
        """Returns the plan for a model."""
        grid = grid_of(denoiser.schedule, self.times)
        if getattr(denoiser, "integer_times", False):
            grid = grid.rounded()
        return replace(self.solver.plan(grid), head=self.head)


@dataclass(frozen=True)
class Polished:
    """What :func:`polish` made.

    Attributes:
        candidate: The candidate with its new times.
        history: The root mean square distance before, and after each iteration.
        calls: The network calls that it took, for each sample.
    """

    candidate: Candidate
    history: tuple[float, ...]
    calls: int


def polish(
    denoiser: Denoiser,
    candidate: Candidate,
    noise: Tensor,
    end: Tensor,
    cond: Mapping[str, Any],
    *,
    iterations: int = 3,
    tick: Callable[[int], None] | None = None,
) -> Polished:
    r"""Moves the times of a plan towards the least distance to the reference.

    With :math:`r_b` the difference to the reference of sample b, :math:`e_b` its root mean square and
    m the median of these before the first iteration, it lowers the pseudo-Huber mean

    .. math:: L = \frac1B \sum_b 2 m^2 \left( \sqrt{1 + e_b^2 / m^2} - 1 \right)

    by damped Gauss–Newton steps in all times at once, with differences for derivatives. A few samples
    whose trajectory turned into another basin would rule a plain mean of squares, and moving times for
    them does not carry over to others.

    Cost: an iteration takes K + 1 runs of which the first calls are shared, hence about
    :math:`K^2 / 2 + 2 K` calls for each sample.

    Arguments:
        denoiser: The model.
        candidate: Where to start.
        noise: The initial draws, of unit variance, with shape (B, \*).
        end: The reference samples from them, with shape (B, \*).
        cond: The conditions, ready for this batch.
        iterations: The most iterations.
        tick: Called with the number of network calls as they are made.
    """
    if getattr(denoiser, "integer_times", False):
        return Polished(candidate, (), 0)  # whole indices have no derivatives
    work = _Work(denoiser, candidate, noise, end, cond, tick)
    place = candidate.times.clamp_min(0).pow(1 / POWER)
    residual, calls = work.run(place, None)
    errors = _each(residual)
    middle = errors.square().median().clamp_min(1e-24)
    loss, history, damping = _loss(errors, middle), [_rms(errors)], 1e-3
    for _ in range(iterations):
        weight = (1 + errors.square() / middle).pow(-0.25)[:, None]
        slopes = work.slopes(place, residual, calls)
        columns = torch.stack([(slope * weight).flatten() for slope in slopes])
        matrix = (columns @ columns.T).double()
        gradient = (columns @ (residual * weight).flatten()).double()
        step = work.descend(place, matrix, gradient, loss, middle, damping)
        if step is None:
            break
        gain = 1 - step.loss / loss
        place, residual, calls, loss = step.place, step.residual, step.calls, step.loss
        errors, damping = _each(residual), step.damping / 4
        history.append(_rms(errors))
        if gain < ENOUGH:
            break
    return Polished(work.candidate(place), tuple(history), work.count)


@dataclass(frozen=True)
class _Step:
    place: Tensor
    residual: Tensor
    calls: Calls
    loss: float
    damping: float


class _Work:
    """Runs of a candidate with its times moved, counting network calls."""

    def __init__(
        self,
        denoiser: Denoiser,
        candidate: Candidate,
        noise: Tensor,
        end: Tensor,
        cond: Mapping[str, Any],
        tick: Callable[[int], None] | None,
    ) -> None:
        self.denoiser, self.start = denoiser, candidate
        self.noise, self.end, self.cond, self.tick = noise, end, cond, tick
        s = denoiser.schedule
        self.low, self.high = s.t_min ** (1 / POWER), s.t_max ** (1 / POWER)
        self.zero = float(candidate.times[-1]) < s.t_min
        last = len(candidate.times) - 1
        # A start without a head start is the prior's, an end at the schedule's end stays there.
        self.free = list(range(0 if candidate.head else 1, last))
        if not self.zero and float(candidate.times[-1]) > s.t_min:
            self.free.append(last)
        self.count = 0

    def candidate(self, place: Tensor) -> Candidate:
        times = place.pow(POWER)
        fixed = [k for k in range(len(place)) if k not in self.free]
        times[fixed] = self.start.times[fixed]
        return replace(self.start, times=times)

    def run(self, place: Tensor, memory: Calls | None) -> tuple[Tensor, Calls]:
        """Returns the difference to the reference, (B, D), and the calls."""
        told: Calls = []
        plan = self.candidate(place).plan(self.denoiser)
        x = run_plan(self.denoiser, plan, self.noise, self.cond, memory=memory, told=told)
        known = {id(answer) for _, _, answer in memory or ()}
        made = sum(id(answer) not in known for _, _, answer in told)
        self.count += made
        if self.tick is not None:
            self.tick(made)
        return (x - self.end).flatten(1), told

    def slopes(self, place: Tensor, residual: Tensor, calls: Calls) -> list[Tensor]:
        gaps, found = -place.diff(), []
        for k in self.free:
            room = min(float(gaps[max(k - 1, 0)]), float(gaps[min(k, len(gaps) - 1)]))
            away = -0.01 * room if k == 0 else 0.01 * room
            moved = place.clone()
            moved[k] += away
            found.append((self.run(moved, calls)[0] - residual) / away)
        return found

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
                residual, calls = self.run(moved, None)
                new = _loss(_each(residual), middle)
                if new < loss:
                    return _Step(moved, residual, calls, new, damping)
            damping = max(6 * damping, 1e-3)
        return None

    def fits(self, place: Tensor, moved: Tensor) -> bool:
        """Whether times are still in order and in the schedule, and no step has all but vanished."""
        inner = moved[:-1] if self.zero else moved
        if not bool(moved.isfinite().all()):
            return False
        if float(inner.max()) > self.high + 1e-12 or float(inner.min()) < self.low - 1e-12:
            return False
        return bool((moved.diff() < 0.05 * place.diff()).all())


def _each(residual: Tensor) -> Tensor:
    return residual.double().square().mean(1).sqrt().cpu()


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def _loss(errors: Tensor, middle: Tensor) -> float:
    return float((2 * middle * ((1 + errors.square() / middle).sqrt() - 1)).mean())

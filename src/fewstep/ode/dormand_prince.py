r"""Dormand–Prince 5(4) on the probability-flow ODE, with a step size for each sample.

References:
    | A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980)
    | https://doi.org/10.1016/0771-050X(80)90013-3
    | Solving Ordinary Differential Equations I (Hairer, Nørsett & Wanner, 1993), sections II.4 to II.6
    | https://doi.org/10.1007/978-3-540-78862-1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.ode.field import (
    Field,
    Place,
    Slope,
    Weights,
    exact_type,
    finite_rows,
    not_finite,
    stage_weights,
    volume_change,
)

# The tableau of Dormand and Prince: nodes, stages (the last is the solution of order 5, and the
# first stage of the next step), the difference to order 4, and the bump of the interpolant.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_BUMP = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)


class Solution(NamedTuple):
    r"""The end of an integration.

    Attributes:
        x: The final states, with shape (B, \*).
        volume: The integral of the divergence, with shape (B), or ``None``.
        evaluations: The number of network evaluations of each sample.
        knots: For each sample log rho at the accepted steps, from the start to the end.
        times: The times of the states.
        states: The states, with shape (S, B, \*), or ``None``.
    """

    x: Tensor
    volume: Tensor | None
    evaluations: list[int]
    knots: list[list[float]]
    times: Tensor
    states: Tensor | None = None


@dataclass
class _Rows:
    """The samples still integrated; tensors of numbers are float64 on the CPU, with shape (A).

    Attributes:
        index: Their numbers in the batch.
        u: Their present places, in log rho.
        h: The step to try next, signed.
        error: The error of the last accepted step.
        shrunk: Whether the last step was rejected.
        x: The states, with shape (A, D).
        volume: The integrals of the divergence.
        slope: The model outputs at the states.
    """

    index: Tensor
    u: Tensor
    h: Tensor
    error: Tensor
    shrunk: Tensor
    x: Tensor
    volume: Tensor | None
    slope: Slope

    def keep(self, rows: Tensor) -> None:
        there = rows.to(self.x.device)
        for name in ("index", "u", "h", "error", "shrunk"):
            setattr(self, name, getattr(self, name)[rows])
        self.x = self.x[there]
        self.volume = _pick(self.volume, there)
        self.slope = Slope(self.slope.eps[there], _pick(self.slope.divergence, there))


class _Attempt(NamedTuple):
    """A step that was tried: where it went, its stages, and the states there."""

    u: Tensor
    h: Tensor
    start: Place
    stages: list[Place]
    slopes: list[Slope]
    x: Tensor
    volume: Tensor | None


@dataclass
class Integration:
    """Dormand–Prince from one time to another, a step size for each sample.

    Attributes:
        network: The network.
        times: Times of which the first and the last are the ends; the states at all of them are stored.
        rtol: The relative tolerance.
        atol: The absolute tolerance.
        max_steps: The most steps.
        samples: The numbers of the samples, for messages.
    """

    network: Field
    times: Tensor
    rtol: float
    atol: float
    max_steps: int
    samples: Sequence[int]
    evaluations: list[int] = field(default_factory=list)
    knots: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = self.network.denoiser.schedule
        self.points = -self.schedule.lam(self.times)
        self.end = float(self.points[-1])
        self.sign = 1.0 if self.end > float(self.points[0]) else -1.0

    def run(self, x: Tensor, *, save: bool = False) -> Solution:
        """Integrates from the first to the last time."""
        smallest = 8 * torch.finfo(x.dtype).eps
        if max(self.rtol, self.atol) < smallest:
            raise ValueError(
                f"rtol = {self.rtol:g} and atol = {self.atol:g} are below what {x.dtype} can hold; "
                f"raise one to {smallest:.1g}, or give float64 states (sample(noise=...))"
            )
        batch, shape = len(x), x.shape[1:]
        flat = x.detach().reshape(batch, -1)
        self.evaluations, self.knots = [0] * batch, [[float(self.points[0])] for _ in range(batch)]
        final, volume = torch.empty_like(flat), None
        states = flat.new_empty((len(self.points), *flat.shape)) if save else None
        if states is not None:
            states[0] = flat
        if self.network.divergence:
            volume = torch.zeros(batch, dtype=exact_type(x), device=x.device)
        rows = self._begin(flat, volume)
        for _ in range(self.max_steps):
            attempt = self._try(rows)
            accepted = self._judge(rows, attempt)
            if states is not None:
                self._interpolate(states, rows, attempt, accepted)
            done = self._move(rows, attempt, accepted)
            if bool(done.any()):
                ended, there = rows.index[done].to(x.device), done.to(x.device)
                final[ended] = rows.x[there]
                if volume is not None and rows.volume is not None:
                    volume[ended] = rows.volume[there]
                left = (~done).nonzero().flatten()
                if not len(left):
                    break
                rows.keep(left)
                self.network.keep(rows.index, left)
        else:
            problem = f"has not arrived after max_steps = {self.max_steps} steps"
            self._give_up(rows, 0, problem, "raise max_steps, or raise rtol and atol")
        if states is not None:
            states[-1] = final
            states = states.reshape(len(states), *x.shape)
        return Solution(
            final.reshape(batch, *shape), volume, self.evaluations, self.knots, self.times, states
        )

    def _place(self, u: Tensor) -> Place:
        return Place.at(self.schedule, u, self.times)

    def _evaluate(self, index: Tensor, x: Tensor, t: Tensor) -> Slope:
        for i in index.tolist():
            self.evaluations[i] += 1
        return self.network(x, t)

    def _begin(self, x: Tensor, volume: Tensor | None) -> _Rows:
        """Estimates a first step: 1 % of the state's size over that of its slope, then by curvature."""
        index = torch.arange(len(x))
        u = self.points[0].expand(len(x)).clone()
        here = self._place(u)
        slope = self._evaluate(index, x, here.t)
        self._check_finite(index, [slope], [here])
        size, speed = self._norms(
            x, here, [x, slope.eps], [torch.ones_like(here.sigma), here.sigma]
        )
        small = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(small, 1e-6, 0.01 * size / speed).clamp(max=abs(self.end - float(u[0])))
        there = self._place(u + self.sign * h)
        weights = stage_weights((1.0,), self.sign * h, here, [here], there)
        ahead = self._evaluate(index, weights.apply(x, [slope.eps]), there.t)
        self._check_finite(index, [ahead], [there])
        # The change of alpha dy/du, at the scale of the start.
        before = _column(here.sigma, x) * slope.eps
        after = _column(here.alpha * there.rate, x) * ahead.eps
        (bend,) = self._norms(x, here, [after - before], [1 / h])
        steepest = torch.maximum(speed, bend)
        guess = torch.where(
            steepest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / steepest) ** 0.2
        )
        h = torch.minimum(100 * h, guess)
        false = torch.zeros(len(x), dtype=torch.bool)
        return _Rows(index, u, self.sign * h, torch.full_like(u, 1e-4), false, x, volume, slope)

    def _norms(
        self, x: Tensor, place: Place, vectors: list[Tensor], factors: list[Tensor]
    ) -> list[Tensor]:
        """Returns the sizes of vectors times factors, in tolerances at a state."""
        unit = _unit(place)
        bound = self.atol + self.rtol * (_column(unit, x) * x).abs()
        sizes = torch.stack([_rms(v / bound) for v in vectors]).cpu().double()
        return [size * unit * factor for size, factor in zip(sizes, factors, strict=True)]

    def _try(self, rows: _Rows) -> _Attempt:
        """Evaluates the stages of one step of each sample."""
        left = self.end - rows.u
        # A step that would leave next to nothing goes to the end.
        last = 1.01 * rows.h.abs() >= left.abs()
        u = torch.where(last, torch.full_like(left, self.end), rows.u + rows.h)
        h = u - rows.u
        nodes = torch.tensor(NODES[1:], dtype=u.dtype)[:, None]
        points = torch.where(nodes == 1, u, rows.u + nodes * h)
        parts = self._place(torch.cat([rows.u[None], points]))
        start, *ahead = (Place(*at) for at in zip(*(p.unbind() for p in parts), strict=True))
        stages, slopes, x = [start], [rows.slope], rows.x
        for coefficients, place in zip(STAGES[1:], ahead, strict=True):
            weights = stage_weights(coefficients, h, start, stages, place)
            x = weights.apply(rows.x, [slope.eps for slope in slopes])
            stages.append(place)
            slopes.append(self._evaluate(rows.index, x, place.t))
        volume = rows.volume
        if volume is not None:
            volume = volume + volume_change(STAGES[-1], h, stages, slopes)
        return _Attempt(u, h, start, stages, slopes, x, volume)

    def _judge(self, rows: _Rows, attempt: _Attempt) -> Tensor:
        """Returns which samples may step, and sets the next step sizes."""
        self._check_finite(rows.index, attempt.slopes, attempt.stages)
        error = self._error(rows, attempt)
        error = torch.where(error.isfinite(), error, torch.inf).clamp(min=1e-10)
        accepted = error <= 1
        grow = (0.9 * error**-0.17 * rows.error**0.04).clamp(0.2, 10.0)
        # Right after a rejection the step does not grow.
        grow = torch.where(rows.shrunk, grow.clamp(max=1.0), grow)
        shrink = (0.9 * error**-0.2).clamp(0.2, 1.0)
        rows.h = attempt.h * torch.where(accepted, grow, shrink)
        rows.error = torch.where(accepted, error.clamp(min=1e-4), rows.error)
        rows.shrunk = ~accepted
        least = 10 * torch.finfo(rows.x.dtype).eps * abs(self.end - float(self.points[0]))
        stuck = rows.shrunk & (rows.h.abs() < least)
        if bool(stuck.any()):
            row = int(stuck.nonzero()[0])
            problem = f"needs steps below {least:.1g} in log rho"
            self._give_up(rows, row, problem, "raise rtol and atol")
        return accepted

    def _error(self, rows: _Rows, attempt: _Attempt) -> Tensor:
        start, end = attempt.start, attempt.stages[-1]
        weights = stage_weights(_ERROR, attempt.h, start, attempt.stages, end)
        weights = weights._replace(ratio=torch.zeros_like(attempt.h))
        difference = weights.apply(rows.x, [slope.eps for slope in attempt.slopes])
        before = (_column(_unit(start), rows.x) * rows.x).abs()
        unit = _column(_unit(end), rows.x)
        bound = self.atol + self.rtol * torch.maximum(before, (unit * attempt.x).abs())
        error = _rms(unit * difference / bound).cpu().double()
        if rows.volume is None or attempt.volume is None:
            return error
        difference = volume_change(_ERROR, attempt.h, attempt.stages, attempt.slopes).abs()
        larger = torch.maximum(rows.volume.abs(), attempt.volume.abs())
        bound = self.atol * rows.x.shape[1] + self.rtol * larger
        return torch.maximum(error, (difference / bound).cpu().double())

    def _move(self, rows: _Rows, attempt: _Attempt, accepted: Tensor) -> Tensor:
        """Advances the samples that may step, and returns which have arrived."""
        yes = accepted.to(rows.x.device)
        last = attempt.slopes[-1]
        rows.u = torch.where(accepted, attempt.u, rows.u)
        rows.x = torch.where(yes[:, None], attempt.x, rows.x)
        divergence = rows.slope.divergence
        if rows.volume is not None and attempt.volume is not None:
            assert divergence is not None
            assert last.divergence is not None
            rows.volume = torch.where(yes, attempt.volume, rows.volume)
            divergence = torch.where(yes, last.divergence, divergence)
        rows.slope = Slope(torch.where(yes[:, None], last.eps, rows.slope.eps), divergence)
        for i, u, moved in zip(
            rows.index.tolist(), rows.u.tolist(), accepted.tolist(), strict=True
        ):
            if moved:
                self.knots[i].append(u)
        return accepted & (rows.u == self.end)

    def _interpolate(
        self, states: Tensor, rows: _Rows, attempt: _Attempt, accepted: Tensor
    ) -> None:
        """Writes the states at the points that accepted steps passed."""
        points = self.points[1:-1, None]
        ahead = (points - rows.u) * self.sign > 0
        behind = (points - attempt.u) * self.sign <= 0
        hits = accepted & ahead & behind
        for k in (hits.any(1).nonzero().flatten() + 1).tolist():
            point, hit = self.points[k], hits[k - 1].nonzero().flatten()
            there = hit.to(states.device)
            theta = ((point - rows.u) / attempt.h)[hit]
            h, place = attempt.h[hit], self._place(point.expand(len(hit)))
            stages = [Place(*(part[hit] for part in at)) for at in attempt.stages]
            start, end = stages[0], stages[-1]
            rest = 1 - theta
            bump = [h * (theta * rest) ** 2 * d for d in _BUMP]
            bump[0] = bump[0] + h * theta * rest**2
            bump[-1] = bump[-1] - h * theta**2 * rest
            share = theta**2 * (3 - 2 * theta)
            ratios = [place.alpha * (1 - share) / start.alpha, place.alpha * share / end.alpha]
            values = [place.alpha * b * at.rate for b, at in zip(bump, stages, strict=True)]
            weights = Weights(ratios[0], list(range(8)), [ratios[1], *values])
            slopes = [attempt.x[there], *(slope.eps[there] for slope in attempt.slopes)]
            states[k, rows.index[hit].to(states.device)] = weights.apply(rows.x[there], slopes)

    def _check_finite(
        self, index: Tensor, slopes: Sequence[Slope], places: Sequence[Place]
    ) -> None:
        """Raises if the network gave NaN or infinity at one of the last evaluations."""
        finite = torch.stack([finite_rows(slope) for slope in slopes]).cpu()
        if bool(finite.all()):
            return
        stage = int((~finite).any(1).nonzero()[0])
        row = int((~finite[stage]).nonzero()[0])
        evaluation = self.evaluations[int(index[row])] - len(slopes) + stage + 1
        samples = [self.samples[i] for i in index.tolist()]
        raise ValueError(not_finite(finite[stage], evaluation, samples, places[stage]))

    def _give_up(self, rows: _Rows, row: int, problem: str, hint: str) -> None:
        """Raises; the message has sample, time, and a hint."""
        if getattr(self.network.denoiser, "integer_times", False):
            hint = (
                "this network rounds times to its training timesteps, so its output jumps between them; "
                f"use a solver with a plan, or {hint}"
            )
        elif rows.x.dtype == torch.float32:
            hint += ", or let states and network be float64"
        raise ValueError(
            f"dopri5: sample {self.samples[int(rows.index[row])]} {problem}, at "
            f"t = {float(self._place(rows.u[row]).t):.6g} on the way from {self.times[0]:g} to "
            f"{self.times[-1]:g}; {hint} (rtol = {self.rtol:g}, atol = {self.atol:g})"
        )


def _unit(place: Place) -> Tensor:
    """Returns the factor that takes a state to the scale on which errors are measured."""
    return 1 / torch.sqrt(place.alpha.square() + place.sigma.square())


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype)[:, None]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def _pick(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]

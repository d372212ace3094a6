r"""Local errors of any plan: the error of each step if all steps before it were exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.models.conditions import joined, select
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin
from fewstep.sampling.resolve import plan as make_plan
from fewstep.studies.reference import Reference, coordinate, grid_of, run_plan
from fewstep.studies.spline import spline_matrix

CHUNK = 1 << 20


@dataclass(frozen=True)
class Path:
    r"""Reference trajectories in coordinates of their span, so that linear operations are cheap.

    All states and predictions at S nodes are at most 2 S vectors; only their inner products (means
    over samples and coordinates) are stored, so a norm here is a root mean square there.

    Attributes:
        times: The times of the nodes, float64, shape (S).
        x: The states, float64, shape (S, R).
        eps: The predictions of the noise, float64, shape (S, R).
        gain: The factor by which a small error at each node remains at the end, float64, shape (S).
        head: The root mean square error of an analytic head start at each node, or ``None``.
        schedule: The schedule.
    """

    times: Tensor
    x: Tensor
    eps: Tensor
    gain: Tensor
    head: Tensor | None
    schedule: Any

    def at(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns states, predictions and gains at times between the nodes, by splines."""
        inside = times.clamp(float(self.times[-1]), float(self.times[0]))
        matrix = spline_matrix(
            coordinate(self.schedule, self.times), coordinate(self.schedule, inside)
        )
        gain = (matrix @ self.gain.clamp_min(1e-12).log()).exp()
        return matrix @ self.x, matrix @ self.eps, gain


def path_of(
    reference: Reference, denoiser: Denoiser | None = None, gain: Tensor | None = None
) -> Path:
    """Returns the path of reference trajectories.

    Arguments:
        reference: The trajectories.
        denoiser: For the mean and deviation of the data, which a head start needs.
        gain: See :func:`measure_gain`; left out, 1 everywhere.
    """
    s, size = reference.schedule, len(reference.times)
    rows = torch.cat([reference.x, reference.eps]).flatten(1)
    gram = torch.zeros((2 * size, 2 * size), dtype=torch.float64)
    for part in rows.split(CHUNK, dim=1):
        block = part.cpu().double()
        gram += block @ block.T
    values, vectors = torch.linalg.eigh(gram / rows.shape[1])
    large = values > 1e-16 * values[-1]
    basis = vectors[:, large] * values[large].sqrt()
    head = None
    if denoiser is not None and denoiser.data_mean is not None and denoiser.data_std is not None:
        mean = torch.as_tensor(denoiser.data_mean).to(reference.noise)
        std = torch.as_tensor(denoiser.data_std).to(reference.noise)
        errors = []
        for t, x in zip(reference.times, reference.x, strict=True):
            alpha, sigma = float(s.alpha(t)), float(s.sigma(t))
            start = alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * reference.noise
            errors.append((start - x).cpu().double().square().mean().sqrt())
        head = torch.stack(errors)
    ones = torch.ones(size, dtype=torch.float64)
    return Path(
        reference.times, basis[:size], basis[size:], ones if gain is None else gain, head, s
    )


def measure_gain(
    denoiser: Denoiser,
    reference: Reference,
    *,
    places: int = 7,
    samples: int = 16,
    size: float = 0.05,
    progress: Progress = SILENT,
) -> Tensor:
    r"""Returns the factor by which an error at each node remains at the end, float64, shape (S).

    At some nodes the reference state is moved by a scaled-down error of a DDIM step, and both states
    are run to the end on the nodes; between these nodes the logarithm of the factor is interpolated. Errors
    at high noise are mostly forgotten, since the flow contracts towards the data.

    Cost: about ``places * S / 4`` evaluations for each of 2 ``samples``, see :func:`gain_evaluations`.
    """
    picked, logs = gain_places(len(reference.times), places), list[float]()
    for place in picked:
        logs.append(log_gain_at(denoiser, reference, place, samples=samples, size=size))
        progress.tick()
    return interpolate_gain(len(reference.times), picked, logs)


def log_gain_at(
    denoiser: Denoiser, reference: Reference, place: int, *, samples: int = 16, size: float = 0.05
) -> float:
    """Returns the logarithm of :func:`measure_gain` at one node."""
    s, nodes = reference.schedule, reference.times
    b = min(samples, len(reference.noise))
    part = select(reference.cond, range(b))
    cond = joined(part, part)
    x, before = reference.x[place, :b], max(0, place - 4)
    alpha, sigma = (f(nodes[[before, place]]) for f in (s.alpha, s.sigma))
    ratio = alpha[1] / alpha[0]
    step = ratio * reference.x[before, :b]
    step = step + (sigma[1] - ratio * sigma[0]) * reference.eps[before, :b]
    defect = step - x
    scale = size / float(defect.cpu().double().square().mean().sqrt().clamp_min(1e-12))
    both = torch.cat([x, x + scale * defect.to(x)])
    end = _run_on(denoiser, nodes[place:], both, cond)
    left = (end[b:] - end[:b]).cpu().double().square().mean().sqrt() / size
    return float(left.clamp_min(1e-6).log())


def interpolate_gain(nodes: int, picked: Sequence[int], logs: Sequence[float]) -> Tensor:
    """Returns the gain at all nodes from its logarithms at some."""
    places_at = torch.tensor([*picked, nodes - 1]).double()
    values = torch.tensor([*logs, 0.0], dtype=torch.float64)
    return _linear(places_at, values, torch.arange(nodes, dtype=torch.float64)).exp()


def gain_evaluations(nodes: int, places: int) -> int:
    """Returns the evaluations of :func:`measure_gain` for each of 2 ``samples``."""
    return sum(evaluations_from(nodes, place) for place in gain_places(nodes, places))


def evaluations_from(nodes: int, place: int) -> int:
    """Returns the evaluations of a run from a node to the end, on every other node."""
    return math.ceil((nodes - 1 - place) / 2)


def gain_places(nodes: int, places: int) -> list[int]:
    """Returns the nodes at which the gain is measured."""
    return torch.linspace(1, nodes - 1, places + 1).round().long()[:-1].unique().tolist()


def _run_on(denoiser: Denoiser, times: Tensor, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Runs from a state to the end, on every other node: both runs have the same solver error."""
    last = len(times) - 1
    every_other = sorted({*range(0, last, 2), last})
    grid = grid_of(denoiser.schedule, times[every_other])
    plan = make_plan("tab2", denoiser.schedule, grid=grid)
    sigma = float(denoiser.schedule.sigma(times[0]))
    return run_plan(denoiser, plan, x / sigma, cond)


def _linear(at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    right = torch.searchsorted(at, wanted).clamp(1, len(at) - 1)
    share = ((wanted - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share)


@dataclass(frozen=True)
class StepErrors:
    """The errors of the steps of a plan.

    Attributes:
        times: The time at the end of each step, shape (K).
        local: The root mean square local error of each, shape (K).
        left: The part of it that remains at the end, shape (K).
        start: The remaining error of a head start; 0 without one.
        predicted: The root of the sum of squares of all remaining errors.
    """

    times: Tensor
    local: Tensor
    left: Tensor
    start: float
    predicted: float


def step_errors(plan: Plan, path: Path) -> StepErrors:
    r"""Returns the local error of each step of a plan along the reference.

    Each row is computed with the exact states and predictions in the registers that it reads. For a
    stage of a Runge–Kutta method the prediction is that on the path, not at the stage.

    Arguments:
        plan: A deterministic plan of the path's schedule.
        path: The path.

    Raises:
        ValueError: If the plan draws noise.
    """
    if plan.stochastic:
        raise ValueError("a plan that draws noise follows no trajectory of the ODE")
    knots = plan.knots.detach()
    zero = plan.ends_at_zero
    states, _, gains = path.at(knots)
    if zero:  # a last step onto the data: measured against the reference's end
        states = torch.cat([states[:-1], path.x[-1:]])
    inputs, predictions, _ = path.at(plan.times.detach())
    a, b = coefficients(
        Prediction.EPS, plan.prediction, alpha=plan.scales[:, 0], sigma=plan.scales[:, 1]
    )
    predictions = a[:, None] * inputs + b[:, None] * predictions
    registers: list[Tensor] = [states[0]]
    values, local = plan.values.detach(), torch.zeros(len(knots), dtype=torch.float64)
    for row in plan.structure.rows:
        if isinstance(row, Lin):
            weights = values[row.offset : row.offset + len(row.terms)]
            value = weights @ torch.stack([registers[r] for r in row.terms])
            if row.state is not None:
                local[row.state] = (value - states[row.state]).norm()
                value = states[row.state]
            registers.append(value)
        else:
            assert isinstance(row, Eval)
            registers.append(predictions[row.at])
    left = local * gains
    start = 0.0
    if plan.head and path.head is not None:
        place = coordinate(path.schedule, path.times)
        start = float(
            _linear(place, path.head, coordinate(path.schedule, knots[:1]))[0] * gains[0]
        )
    end = 0.0 if zero else float((states[-1] - path.x[-1]).norm())
    total = math.sqrt(float(left.square().sum()) + start**2 + end**2)
    return StepErrors(knots[1:], local[1:], left[1:], start, total)

r"""Reference trajectories: the probability-flow ODE solved with very small steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import SILENT, Progress
from fewstep.diffusion.grids import TimeGrid, explicit, lam_range
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction, convert
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.plans.execute import Execution
from fewstep.plans.plan import Plan
from fewstep.sampling.batches import initial_noise
from fewstep.sampling.binding import bind
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.resolve import plan as make_plan

NODES = 48
"""The number of intervals between nodes."""

SUBSTEPS = 2
"""The steps of the reference in each interval."""

BLOCK = 8
"""The trajectories that a study solves together, however many processes share them."""


Evaluation = tuple[float, Tensor, Tensor]
"""The time, the input and the output of a network evaluation."""


@dataclass(frozen=True)
class Reference:
    r"""Trajectories of the ODE, at the nodes.

    Attributes:
        schedule: The schedule.
        times: The times of the nodes, decreasing, float64, shape (S).
        x: The states, with shape (S, B, \*).
        eps: The model's predictions of the noise there, with shape (S, B, \*).
        noise: The initial draws, with shape (B, \*).
        cond: The conditions, ready.
        nfe: The number of evaluations for each sample.
    """

    schedule: NoiseSchedule
    times: Tensor
    x: Tensor
    eps: Tensor
    noise: Tensor
    cond: Mapping[str, Any]
    nfe: int

    @property
    def end(self) -> Tensor:
        r"""The samples, with shape (B, \*)."""
        return self.x[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to store; conditions are computed again."""
        return {"times": self.times, "x": self.x, "eps": self.eps, "noise": self.noise}


def coordinate(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    r"""Returns a coordinate of time in which nodes are evenly spaced: 0 at the start, 1 at the end.

    The mean of one linear in :math:`t^{2/3}` and one linear in :math:`\log\rho`; states and
    predictions are smooth in it at both ends.
    """
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    place = torch.zeros_like(t)
    for function in (lambda u: u.pow(2 / 3), schedule.lam):
        first, last = function(ends)
        place = place + (function(t) - first) / (last - first) / 2
    return place


def place_nodes(
    schedule: NoiseSchedule, intervals: int = NODES, *, integer: bool = False
) -> Tensor:
    """Returns times that are even in :func:`coordinate`, decreasing, float64."""
    power = torch.linspace(schedule.t_max ** (2 / 3), schedule.t_min ** (2 / 3), 2001).double()
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    low, high = lam_range(schedule)
    second = schedule.time(torch.linspace(low, high, 2001, dtype=torch.float64))
    mesh = torch.cat([power.pow(1.5), second, ends]).clamp(schedule.t_min, schedule.t_max)
    mesh = mesh.unique().flip(0)
    at = coordinate(schedule, mesh)
    wanted = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    right = torch.searchsorted(at.contiguous(), wanted).clamp(1, len(at) - 1)
    share = (wanted - at[right - 1]) / (at[right] - at[right - 1])
    nodes = torch.lerp(mesh[right - 1], mesh[right], share.clamp(0, 1))
    nodes[0], nodes[-1] = schedule.t_max, schedule.t_min
    if integer:
        nodes = nodes.round()
    return nodes.unique().flip(0)


def draw_noise(
    denoiser: Denoiser,
    n: int,
    seed: int,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Returns the initial draws of samples ``first`` to ``first + n - 1`` of a seed, (n, \*)."""
    return initial_noise(denoiser, NoiseSource(seed, range(first, first + n)), dtype=dtype)


def follow(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
    *,
    intervals: int = NODES,
    substeps: int = SUBSTEPS,
    progress: Progress = SILENT,
) -> Reference:
    r"""Returns reference trajectories from unit noise (B, \*).

    By tAB3 with ``substeps`` steps in each interval.

    Cost: ``intervals * substeps + 1`` evaluations.

    Arguments:
        denoiser: The model.
        noise: The initial draws, of unit variance, with shape (B, \*).
        cond: The conditions, ready for this batch.
        intervals: The number of intervals between nodes.
        substeps: The steps in each.
        progress: Follows the evaluations.
    """
    schedule = denoiser.schedule
    integer = denoiser.integer_times
    refined = place_nodes(schedule, intervals * substeps, integer=integer)
    plan = make_plan("tab3", schedule, grid=TimeGrid(schedule, refined))
    nodes = torch.arange(0, len(refined), substeps)
    if nodes[-1] != len(refined) - 1:
        nodes = torch.cat([nodes, torch.tensor([len(refined) - 1])])
    wanted = set(nodes.tolist())
    states: dict[int, Tensor] = {0: noise * schedule.prior_std()}
    predictions: dict[int, Tensor] = {}
    evaluate = bind(denoiser, plan, len(noise), cond, noise)

    def on_state(knot: int, state: Tensor) -> None:
        if knot in wanted:
            states[knot] = state

    with torch.no_grad():
        run = Execution(plan, states[0], on_state=on_state)
        while run.request is not None:
            prediction = evaluate(run.request.x, run.request.at)
            if run.request.at in wanted:
                predictions[run.request.at] = prediction.clone()
            run.advance(prediction)
            progress.tick()
        last = len(refined) - 1
        predictions[last] = denoiser(run.result, float(refined[-1]), prediction="eps", **cond)
    return Reference(
        schedule,
        refined[nodes],
        torch.stack([states[k] for k in nodes.tolist()]),
        torch.stack([predictions[k] for k in nodes.tolist()]),
        noise,
        cond,
        plan.nfe + 1,
    )


def run_plan(
    denoiser: Denoiser,
    plan: Plan,
    noise: Tensor,
    cond: Mapping[str, Any],
    *,
    known: Sequence[Evaluation] = (),
    log: list[Evaluation] | None = None,
) -> Tensor:
    r"""Returns the samples of a deterministic plan from unit noise, (B, \*).

    Arguments:
        denoiser: The model.
        plan: The plan.
        noise: The initial draws, of unit variance.
        cond: The conditions, ready.
        known: Evaluations of a similar plan: where time and input are the same,
            the model output is reused.
        log: This run's evaluations are added to it.
    """
    evaluate = bind(denoiser, plan, len(noise), cond, noise)
    times = plan.times.tolist()
    with torch.no_grad():
        run = Execution(plan, PlanSampler(plan, denoiser).start(noise), keep_inputs=True)
        while run.request is not None:
            x, k = run.request
            before = known[k] if k < len(known) else None
            if before is not None and before[0] == times[k] and torch.equal(before[1], x):
                output = before[2]
            else:
                output = evaluate(x, k)
            if log is not None:
                log.append((times[k], x, output))
            run.advance(output)
    return run.result


def x0_at_end(reference: Reference) -> Tensor:
    r"""Returns the data that the network predicts from the last states, (B, \*)."""
    t = reference.times[-1]
    schedule = reference.schedule
    return convert(
        reference.eps[-1],
        reference.x[-1],
        alpha=schedule.alpha(t),
        sigma=schedule.sigma(t),
        source=Prediction.EPS,
        target=Prediction.X0,
    )


def grid_of(schedule: NoiseSchedule, times: Tensor) -> TimeGrid:
    """Returns the grid of explicit times."""
    return explicit(schedule, times=times)


def mean_squares(difference: Tensor) -> Tensor:
    """Returns the mean square of each sample, shape (B), float64 on the CPU."""
    return difference.flatten(1).cpu().double().square().mean(1)


def digest_input(value: Any) -> str | None:
    """Returns the SHA-256 of a tensor or another value: the identity of a resumable run."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return hashlib.sha256(repr(value).encode()).hexdigest()
    plain = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

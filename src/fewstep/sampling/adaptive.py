r"""Adaptive sampling to a tolerance, and plans of the accepted steps.

References:
    | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
    | https://arxiv.org/abs/2204.13902
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid, grid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.ode.dormand_prince import NODES, STAGES, Integration, Solution
from fewstep.ode.field import Field, Place, Weights, stage_weights, time_span
from fewstep.plans.plan import Plan
from fewstep.plans.tape import Form, Tape
from fewstep.sampling.plausibility import peak, warn_if_absurd
from fewstep.sampling.protocol import Run, Trajectory
from fewstep.solvers.adaptive import check_tolerances


@dataclass(frozen=True)
class AdaptiveSampler:
    r"""Dormand–Prince 5(4) on the transformed ODE, with a step size for each sample.

    .. math:: y_{n+1} = y_n + h \sum_i b_i \rho_i \varepsilon_i, \qquad
        e = h \sum_i (b_i - \hat b_i) \rho_i \varepsilon_i, \qquad
        \operatorname{rms}\left( \frac{e / \nu_{n+1}}
        {a + r \max(|y_n| / \nu_n, |y_{n+1}| / \nu_{n+1})} \right) \le 1, \quad \nu = \sqrt{1 + \rho^2}

    with h in :math:`\log\rho`. The error is measured on :math:`y / \nu = x / \sqrt{\alpha^2 + \sigma^2}`:
    for variance preserving schedules that is x itself, and for all others the state that the
    variance preserving schedule would have, so that the same data take the same steps whatever
    the schedule. On that scale an early error reaches the sample about unchanged, while y starts some
    hundred times larger than the data. Tolerances are for data of about unit size.

    Every sample has its own time, step size, acceptance and end: the network gets times of shape
    (B), and finished samples leave the batch. The step sizes are controlled by the last two
    errors (PI); the first comes from the size of the first two slopes.

    Cost: 2 network evaluations to begin and 6 for each step, accepted or not.

    Attributes:
        denoiser: The model.
        rtol: The relative tolerance r of each step.
        atol: The absolute tolerance a of each step.
        t_start: The time to start from; left out, the schedule's largest.
        t_end: The time to end at; left out, the schedule's smallest.
        max_steps: The most steps of a sample, accepted or not.

    Raises:
        ValueError: If an option is out of range.
    """

    denoiser: Denoiser
    _: KW_ONLY
    rtol: float = 1e-5
    atol: float = 1e-5
    t_start: float | None = None
    t_end: float | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)
        time_span(self.denoiser.schedule, self.t_start, self.t_end)

    @property
    def nfe(self) -> None:
        """``None``: the number of network evaluations is not known beforehand."""
        return None

    def start(self, noise: Tensor, image: Tensor | None = None) -> Tensor:
        r"""Returns the initial state of standard normal noise.

        That is :math:`\sigma z` of the prior, or :math:`\alpha x_0 + \sigma z` of an image, noised
        to ``t_start``.
        """
        schedule = self.denoiser.schedule
        t = time_span(schedule, self.t_start, self.t_end).times[0]
        x = float(schedule.sigma(t)) * noise
        return x if image is None else float(schedule.alpha(t)) * image.to(noise) + x

    def run(self, x: Tensor, run: Run) -> Trajectory:
        r"""Returns the samples that start at a state.

        Arguments:
            x: The state at ``t_start``, with shape (B, \*), float32 or float64.
            run: The conditions, and the times of the states: those of ``run.times``, from
                ``t_start`` to ``t_end``, or else 33 times, even in log rho; the same for all
                samples, by the interpolant of order 4.

        Raises:
            ValueError: If the times of the states do not go from the start to the end; if the network
                returns NaN or infinity; or if a sample needs more steps than allowed, or smaller
                ones than its type can resolve.
        """
        solution = self._integrate(
            x,
            run.cond,
            run.noise.samples,
            save=run.save,
            on_evaluation=run.on_evaluation,
            keep=run.times,
        )
        times = solution.times if run.save else solution.times[-1:]
        sigma = float(self.denoiser.schedule.sigma(solution.times[-1]))
        warn_if_absurd(self.denoiser, peak(solution.x), sigma)
        return Trajectory(
            solution.x,
            times,
            solution.states,
            sum(solution.evaluations) / len(solution.evaluations),
        )

    def _integrate(
        self,
        x: Tensor,
        cond: Mapping[str, Any],
        samples: Sequence[int],
        *,
        save: bool = False,
        on_evaluation: Callable[[], None] | None = None,
        keep: Sequence[float] | None = None,
    ) -> Solution:
        times = time_span(self.denoiser.schedule, self.t_start, self.t_end).times
        if keep is not None:
            given = grid("explicit", self.denoiser.schedule, None, times=keep).times
            if not torch.equal(given[[0, -1]], times[[0, -1]]):
                raise ValueError(
                    f"the times of the states must go from {times[0]:g} to {times[-1]:g}, got "
                    f"{given[0]:g} to {given[-1]:g}"
                )
            times = given
        network = Field(self.denoiser, x, cond, on_evaluation)
        return Integration(network, times, self.rtol, self.atol, self.max_steps, samples).run(
            x, save=save
        )


def freeze(sampler: AdaptiveSampler, x: Tensor, *, row: int | None = None, **cond: Any) -> Plan:
    r"""Runs an adaptive sampler and returns the steps that it accepted as a plan.

    The plan has no error estimate and no rejected steps: N accepted steps cost 6 N network evaluations,
    since the seventh stage of a step is the first of the next and the last step needs none. It
    reproduces the frozen sample up to rounding, and runs for any other sample.

    Arguments:
        sampler: The sampler.
        x: Initial states, with shape (B, \*), as from ``sampler.start(noise)``.
        row: Which of them to freeze; left out, the one with the most steps (the first of these).
        cond: The conditions of the run.

    Raises:
        ValueError: If a state or condition does not fit, and as :meth:`AdaptiveSampler.run`.
    """
    if row is not None and not 0 <= row < len(x):
        raise ValueError(f"row must be from 0 to {len(x) - 1}, got {row!r}")
    conditions = sampler.denoiser.prepare(len(x), cond)
    knots = sampler._integrate(x, conditions, range(len(x))).knots
    points = max(knots, key=len) if row is None else knots[row]
    schedule = sampler.denoiser.schedule
    ends = time_span(schedule, sampler.t_start, sampler.t_end).times
    return _plan(schedule, torch.tensor(points, dtype=torch.float64), ends)


def _plan(schedule: NoiseSchedule, u: Tensor, ends: Tensor) -> Plan:
    """Writes steps between points u, log rho, on a tape."""
    places = [Place.at(schedule, point, ends) for point in u.unbind()]
    times = torch.stack([place.t for place in places])
    tape = Tape(TimeGrid(schedule, times), Prediction.EPS)
    x, slope = tape.evaluate(tape.x, places[0].t)
    for i, (start, end) in enumerate(itertools.pairwise(places)):
        h = u[i + 1] - u[i]
        inner = [Place.at(schedule, u[i] + c * h, ends) for c in NODES[1:-2]]
        stages, slopes = [start, *inner, end], [slope]
        for coefficients, place in zip(STAGES[1:-1], stages[1:], strict=True):
            form = _form(x, slopes, stage_weights(coefficients, h, start, stages, place))
            slopes.append(tape.evaluate(form, place.t)[1])
        form = _form(x, slopes, stage_weights(STAGES[-1], h, start, stages, end))
        x = tape.state(form, i + 1)
        if i + 2 < len(places):
            _, slope = tape.evaluate(x, end.t)
    return tape.finish(x, "dopri5-frozen")


def _form(x: Form, slopes: Sequence[Form], weights: Weights) -> Form:
    form = weights.ratio * x
    for j, weight in zip(weights.terms, weights.values, strict=True):
        form = form + weight * slopes[j]
    return form

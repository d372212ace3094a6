r"""The sampler that runs a plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.brownian import BrownianSource
from fewstep.models.denoiser import Denoiser
from fewstep.plans.execute import Execution
from fewstep.plans.intervals import draw_intervals
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import plan_for
from fewstep.sampling.binding import bind
from fewstep.sampling.plausibility import peak, warn_if_absurd
from fewstep.sampling.protocol import Run, Trajectory, refusal
from fewstep.sampling.residual import Residual

AHEAD = 3
"""The draws that threads make ahead of the step that needs them, on a device."""


@dataclass(frozen=True)
class PlanSampler:
    """Runs a plan with a denoiser.

    Attributes:
        plan: The plan.
        denoiser: The denoiser; its schedule must be the plan's.
        brownian: Whether the draws are increments of one Brownian motion for each sample, the same at any
            number of steps, instead of numbered.
        residual: The correction of its predictions, or ``None``.
    """

    plan: Plan
    denoiser: Denoiser
    brownian: bool = False
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.residual is not None:
            self.residual.check(self.plan, self.denoiser.event_shape)
        if (own := self.denoiser.built_in_sampler()) is not None:
            raise ValueError(refusal(own, "a plan"))
        self.plan.check_schedule(self.denoiser.schedule)
        if self.plan.head and (self.denoiser.data_mean is None or self.denoiser.data_std is None):
            raise ValueError(
                "the plan has an analytic head start, which needs the mean and the variance of the "
                "data: Denoiser.wrap(..., data_mean=, data_std=)"
            )

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return self.plan.nfe

    @functools.cached_property
    def native(self) -> Plan:
        """The plan as it is run, rewritten for the network's own prediction."""
        return plan_for(self.plan, self.denoiser.native)

    def start(self, noise: Tensor, image: Tensor | None = None) -> Tensor:
        r"""Returns the initial state of standard normal noise.

        That is :math:`\sigma z` of the prior, :math:`\alpha x_0 + \sigma z` of an image, or
        :math:`\alpha m + \sqrt{\alpha^2 s^2 + \sigma^2} \, z` of a head start.

        Arguments:
            noise: Standard normal noise, with shape (B, \*).
            image: Data to start from instead of the prior, with shape (B, \*).
        """
        (alpha, sigma), _ = _end_scales(self.plan)
        if image is not None:
            return alpha * image.to(noise) + sigma * noise
        if self.plan.head:
            mean = torch.as_tensor(self.denoiser.data_mean).to(noise)
            std = torch.as_tensor(self.denoiser.data_std).to(noise)
            return alpha * mean + (alpha**2 * std.square() + sigma**2).sqrt() * noise
        return sigma * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples that start at a state."""
        states_at: dict[int, Tensor] = {0: x}
        knots = self.plan.knots.tolist()
        wanted = None if run.times is None else set(run.times)

        def keep(knot: int, state: Tensor) -> None:
            if wanted is None or knots[knot] in wanted:
                states_at[knot] = state

        with torch.no_grad():
            execution, evaluate = self._begin(x, run, keep if run.save else None)
            # The request is not assigned to a name: that would keep its state alive.
            while execution.request is not None:
                execution.advance(evaluate(*execution.request))
                if run.on_evaluation is not None:
                    run.on_evaluation()
        x = execution.result
        size = peak(x)
        if not math.isfinite(size):
            self._find_nan(states_at[0], run)
        warn_if_absurd(self.denoiser, size, _end_scales(self.plan)[1][1])
        states = torch.stack([states_at[k] for k in sorted(states_at)]) if run.save else None
        times = self.plan.knots.detach()
        times = times[sorted(states_at)] if run.save else times[-1:]
        return Trajectory(x, times, states, self.nfe)

    def _begin(
        self, x: Tensor, run: Run, on_state: Callable[[int, Tensor], None] | None
    ) -> tuple[Execution, Callable[[Tensor, int], Tensor]]:
        noise = run.noise
        if self.brownian:
            noise = BrownianSource(noise.seed, noise.samples, draw_intervals(self.plan))

        def draw(index: int) -> Tensor:
            drawn = noise.draw(index, x.shape[1:], dtype=x.dtype, device=x.device)
            if index + ahead < draws:
                noise.prepare(index + ahead, x.shape[1:], device=x.device)
            return drawn

        # The host is ahead of a device, so that one evaluation may be too short for the next draw.
        draws, ahead = self.native.n_noise, 1 if x.device.type == "cpu" else AHEAD
        for index in range(min(ahead, draws)):
            noise.prepare(index, x.shape[1:], device=x.device)
        execution = Execution(self.native, x, draw=draw, on_state=on_state)
        evaluate = bind(self.denoiser, self.native, len(x), run.cond, x)
        if self.residual is None:
            return execution, evaluate
        correct = self.residual.begin(self.native.prediction, self.native.scales.detach())
        return execution, lambda y, k: correct(k, y, evaluate(y, k))

    def _find_nan(self, x: Tensor, run: Run) -> None:
        """Runs again with a check of each model output: the usual run reads nothing from the device."""
        with torch.no_grad():
            execution, evaluate = self._begin(x, run, None)
            while (request := execution.request) is not None:
                output = evaluate(request.x, request.at)
                if not bool(torch.isfinite(output).all()):
                    wrong = ~torch.isfinite(output.flatten(1)).all(1)
                    rows = wrong.nonzero().flatten().tolist()
                    raise ValueError(
                        f"the network returned NaN or infinity at evaluation {request.at + 1} of "
                        f"{self.nfe}, t = {float(self.plan.times[request.at]):.6g}, for sample "
                        f"{run.noise.samples[rows[0]]} and {len(rows) - 1} others; its input was "
                        f"{'finite' if bool(torch.isfinite(request.x).all()) else 'not finite either'}"
                    )
                execution.advance(output)
        raise ValueError("the sample is not finite although every model output is")


def _end_scales(plan: Plan) -> tuple[tuple[float, float], tuple[float, float]]:
    r"""Returns :math:`\alpha` and :math:`\sigma` at the first knot of a plan, and at the last; computed once a plan."""
    scales = plan.derived.get("end scales")
    if scales is None:
        with torch.no_grad():
            alpha, sigma = plan.schedule.scales(plan.knots[[0, -1]].detach())
        first, last = zip(alpha.tolist(), sigma.tolist(), strict=True)
        scales = first, last
        plan.derived["end scales"] = scales
    return scales

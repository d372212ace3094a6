r"""An operator as a model, with its built-in sampler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.operators.flow_map import FlowMap
from fewstep.operators.operator import Operator, TrajectoryOperator
from fewstep.sampling.protocol import BuiltInSampler, Run, Trajectory, budgets_text


class OperatorModel(Denoiser):
    r"""An operator as a model with a built-in sampler of one evaluation, or of few (a flow map).

    :func:`fewstep.sample` runs it with its default arguments; it has no prediction at times
    other than its own, so other solvers are an error.

    Attributes:
        operator: The operator.
        class_names: The names of the classes, or ``None``.
        about: A record of its origin and training; informative.
    """

    def __init__(self, operator: Operator, *, about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.operator = operator
        inner = operator.model
        self.schedule, self.native = inner.schedule, Prediction.X0
        self.event_shape = inner.event_shape
        self.accepts, self.null_condition = inner.accepts, inner.null_condition
        self.class_names = getattr(inner, "class_names", None)
        self.about = about or {}

    @property
    def network(self) -> Any:
        """The network inside."""
        return self.operator.network

    def trained_noises(self, seed: int) -> int:
        """Returns how many noises of a seed, from 0 on, are those of the trajectories that it was trained on."""
        training = self.about.get("training", {})
        same = training.get("seed") is not None and training["seed"] == seed
        return int(training.get("trajectories") or 0) if same else 0

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        raise ValueError(NO_PREDICTION)

    def built_in_sampler(self) -> BuiltInSampler:
        """Returns the sampler of one evaluation; of a flow map that of its smallest budget."""
        if isinstance(self.operator, FlowMap):
            return FlowMapSampler(self, self.operator.layout.budgets[0])
        return OperatorSampler(self)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of weights, schedule, shape, and the times and labels of the frames."""
        operator = self.operator
        about = [super().fingerprint(), operator.times, repr(operator.layout)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


NO_PREDICTION = (
    "this model is an operator: it maps noise to the sample in one evaluation (or few) and has no "
    "prediction in between; leave the solver out, or use the model that it was distilled from"
)


FRAME, SOLVER, SOLVER_OPTIONS = "from_frame", "solver", "solver_options"
"""What the recipe of an operator and a solver from one of its frames has besides the budget."""


@dataclass(frozen=True)
class OperatorSampler:
    """Runs an operator: one evaluation, the whole trajectory.

    Attributes:
        denoiser: The model.
    """

    denoiser: OperatorModel

    @property
    def nfe(self) -> int:
        """The number of network evaluations, 1, although it works on M frames."""
        return 1

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of evaluations that it makes: 1."""
        return (1,)

    @property
    def options(self) -> dict[str, Any]:
        """Its options: none."""
        return {}

    @property
    def fixed(self) -> dict[str, Any]:
        """What its model adds to a recipe: nothing."""
        return {}

    def configured(self, nfe: int, **options: Any) -> OperatorSampler:
        """Returns itself, the only one."""
        check_request(self, nfe, options)
        return self

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns :math:`\sigma_T z`."""
        operator = self.denoiser.operator
        return operator.schedule.prior_std(operator.layout.start) * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; with states the initial one and the M frames."""
        operator = self.denoiser.operator
        assert isinstance(operator, TrajectoryOperator)
        with torch.no_grad():
            frames = operator(x, **run.cond)
        if run.on_evaluation is not None:
            run.on_evaluation()
        last = frames[:, -1]
        check_finite(last, run)
        times = torch.tensor(operator.times, dtype=torch.float64)
        if not run.save:
            return Trajectory(last, times[-1:], None, self.nfe)
        start = torch.tensor([operator.layout.start], dtype=torch.float64)
        states = torch.cat([x[None], frames.transpose(0, 1)])
        return Trajectory(last, torch.cat([start, times]), states, self.nfe)


@dataclass(frozen=True)
class FlowMapSampler:
    r"""Runs a flow map in a few steps between its knots.

    Attributes:
        denoiser: The model.
        nfe: The number of network evaluations: a budget of the flow map.
        fresh: Whether each step goes to the end and adds fresh noise up to the next knot, as consistency models
            do, instead of going to the next knot along the trajectory.
    """

    denoiser: OperatorModel
    nfe: int
    fresh: bool = False

    @property
    def operator(self) -> FlowMap:
        """The flow map."""
        operator = self.denoiser.operator
        assert isinstance(operator, FlowMap)
        return operator

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of evaluations that it makes."""
        return self.operator.layout.budgets

    @property
    def options(self) -> dict[str, Any]:
        """Its options: ``fresh``."""
        return {"fresh": self.fresh}

    @property
    def fixed(self) -> dict[str, Any]:
        """What its model adds to a recipe: nothing."""
        return {}

    def configured(self, nfe: int, **options: Any) -> FlowMapSampler:
        """Returns the sampler of another budget, or with another option ``fresh``.

        Raises:
            ValueError, TypeError: If it has no such budget or option.
        """
        check_request(self, nfe, options)
        if not isinstance(options.get("fresh", False), bool):
            raise ValueError(f"fresh is true or false, got {options['fresh']!r:.40}")
        return replace(self, nfe=nfe, **options)

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns :math:`\sigma_T z`."""
        operator = self.operator
        return operator.schedule.prior_std(operator.layout.start) * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; with states the initial one and that after each step."""
        operator = self.operator
        path, end = operator.path(self.nfe), len(operator.layout.times)
        states = [x]
        for draw, (first, second) in enumerate(pairwise(path)):
            with torch.no_grad():
                x = operator.step(x, first, end if self.fresh else second, **run.cond)
            if run.on_evaluation is not None:
                run.on_evaluation()
            if self.fresh and second != end:
                x = self._noised(x, second, draw, run)
            states.append(x)
        check_finite(x, run)
        knots = torch.tensor([operator.knots[k] for k in path], dtype=torch.float64)
        if not run.save:
            return Trajectory(x, knots[-1:], None, self.nfe)
        return Trajectory(x, knots, torch.stack(states), self.nfe)

    def _noised(self, x: Tensor, knot: int, draw: int, run: Run) -> Tensor:
        """Returns states of the last knot with fresh noise, up to the noise level of an earlier one."""
        operator = self.operator
        knots = torch.tensor([operator.knots[k] for k in (knot, -1)], dtype=torch.float64)
        (alpha, alpha_end), (sigma, sigma_end) = operator.schedule.scales(knots)
        ratio = alpha / alpha_end
        added = float((sigma.square() - (ratio * sigma_end).square()).sqrt())
        z = run.noise.draw(draw, x.shape[1:], dtype=x.dtype, device=x.device)
        return float(ratio) * x + added * z


def check_request(sampler: BuiltInSampler, nfe: int, options: Mapping[str, Any]) -> None:
    """Raises unless a built-in sampler has this budget and these options.

    Raises:
        ValueError, TypeError: If it has not.
    """
    if FRAME in options and FRAME not in sampler.fixed:
        raise ValueError(
            f"this recipe continues with a solver from frame {options[FRAME]!r:.40} of the operator; give the frame and "
            "the model of the solver too: fewstep.operators.continued(...) (--from-frame, --teacher)"
        )
    if nfe not in sampler.budgets:
        raise ValueError(f"this operator makes {budgets_text(sampler.budgets)}, not {nfe}")
    fixed = sampler.fixed
    for name in fixed.keys() & options.keys():
        if options[name] != fixed[name]:
            raise ValueError(
                f"this sampler has {name.replace('_', ' ')} {fixed[name]!r:.60}, not {options[name]!r:.60}"
            )
    if extra := sorted(set(options) - {*sampler.options, *fixed}):
        raise TypeError(f"this operator has no option {extra[0]!r}")


def check_finite(x: Tensor, run: Run) -> None:
    """Raises ``ValueError`` with the first sample that has NaN or infinity."""
    if not bool(x.isfinite().all()):
        rows = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(
            f"the operator returned NaN or infinity for sample {run.noise.samples[rows[0]]} "
            f"and {len(rows) - 1} others"
        )

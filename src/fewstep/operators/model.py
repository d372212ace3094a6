r"""An operator as a model, with its built-in sampler."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.operators.operator import TrajectoryOperator
from fewstep.sampling.protocol import Run, Trajectory


class OperatorModel(Denoiser):
    r"""An operator as a model with a built-in sampler of one evaluation.

    :func:`fewstep.sample` runs it with its default arguments; it has no prediction at times
    other than its own, so other solvers are an error.

    Attributes:
        operator: The operator.
        class_names: The names of the classes, or ``None``.
        about: A record of its origin and training; informative.
    """

    def __init__(
        self, operator: TrajectoryOperator, *, about: dict[str, Any] | None = None
    ) -> None:
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

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        raise ValueError(ONE_EVALUATION)

    def built_in_sampler(self) -> OperatorSampler:
        """Returns the sampler of one evaluation."""
        return OperatorSampler(self)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of weights, schedule, shape, and the times and labels of the frames."""
        about = [super().fingerprint(), self.operator.times, repr(self.operator.layout)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


ONE_EVALUATION = (
    "this model is an operator: it maps noise to the sample in one evaluation and has no prediction "
    "in between; leave the solver out, or use the model that it was distilled from"
)


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

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns :math:`\sigma_T z`."""
        operator = self.denoiser.operator
        return operator.schedule.prior_std(operator.layout.start) * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; with states the initial one and the M frames."""
        operator = self.denoiser.operator
        with torch.no_grad():
            frames = operator(x, **run.cond)
        if run.on_evaluation is not None:
            run.on_evaluation()
        last = frames[:, -1]
        if not bool(last.isfinite().all()):
            rows = (~last.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"the operator returned NaN or infinity for sample {run.noise.samples[rows[0]]} "
                f"and {len(rows) - 1} others"
            )
        times = torch.tensor(operator.times, dtype=torch.float64)
        if not run.save:
            return Trajectory(last, times[-1:], None, self.nfe)
        start = torch.tensor([operator.layout.start], dtype=torch.float64)
        states = torch.cat([x[None], frames.transpose(0, 1)])
        return Trajectory(last, torch.cat([start, times]), states, self.nfe)

r"""An operator up to one of its frames, and a solver from there: ``sample --from-frame``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser, matches
from fewstep.models.wrappers import Guided
from fewstep.operators.flow_map import FlowMap
from fewstep.operators.model import (
    FRAME,
    NO_PREDICTION,
    SOLVER,
    SOLVER_OPTIONS,
    OperatorModel,
    check_request,
)
from fewstep.operators.operator import TrajectoryOperator
from fewstep.sampling.protocol import BuiltInSampler, Run, Sampler, Trajectory
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve

LEAST_EVALUATIONS, MOST_EVALUATIONS = 8, 1000
"""The most evaluations of a solver's smallest budget, and of any."""


def continued(
    student: OperatorModel,
    teacher: Denoiser,
    frame: int,
    *,
    solver: str = "auto",
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> ContinuedModel:
    r"""Returns a model whose sampler makes one evaluation of an operator, up to one of its frames, and then a solver's.

    A network of few evaluations is least certain about the end of a trajectory; its early states are near
    the teacher's, and a solver needs few evaluations from there. :func:`fewstep.sample` runs the result; ``nfe``
    counts all evaluations, the operator's too (which works on all frames of a student of several).

    Arguments:
        student: The operator: of several frames, or a flow map.
        teacher: The model that it was distilled from, which the solver evaluates. Guidance that was
            recorded is put around it.
        frame: The number of the frame (of a flow map: of the knot), from 1 to M - 1.
        solver: The solver, ``"auto"`` if left out.
        options: Options of the solver and its grid, besides the start.
        force: Whether to take a teacher with other weights.

    Raises:
        TypeError: If the student is not an operator, or the teacher not a model.
        ValueError: If there is no such frame, or the teacher is another model.

    Example:
        >>> teacher = fewstep.load("fashion", device="cpu")
        >>> paths = fewstep.record(teacher, "paths", n=4, solver="ddim", nfe=2, keep=2, class_labels=3)
        >>> student = fewstep.distill(teacher, paths, "student", mode="folded", steps=1, batch_size=1)
        >>> model = fewstep.operators.continued(student, teacher, 1, solver="unipc3")
        >>> fewstep.sample(model, 1, nfe=4, class_labels=3).shape  # 1 and 3 evaluations
        torch.Size([1, 1, 28, 28])
    """
    if not isinstance(student, OperatorModel):
        raise TypeError(f"only an operator has frames, got {type(student).__name__}")
    if not isinstance(teacher, Denoiser) or teacher.built_in_sampler() is not None:
        raise TypeError(f"the teacher is a model for solvers, got {type(teacher).__name__}")
    times = student.operator.times
    if type(frame) is not int or not 1 <= frame < len(times):
        most = len(times) - 1
        known = f"from 1 to {most}" if most else "none: it returns the sample alone"
        raise ValueError(f"the frames to continue from are {known}, got {frame!r:.40}")
    training = student.about.get("training", {})
    recorded, scale = training.get("teacher"), training.get("guidance")
    base = teacher.inner if isinstance(teacher, Guided) else teacher
    if recorded is not None and not force and not matches(base, recorded):
        raise ValueError(
            f"the operator was distilled from another model (fingerprint {str(recorded)[:12]}…); give that "
            "one, or use this one all the same: force=True (--force)"
        )
    if scale not in (None, 1) and not isinstance(teacher, Guided):
        teacher = Guided(teacher, float(scale))
    made = ContinuedModel(student, teacher, frame, solver, dict(options or {}))
    made.built_in_sampler()  # refuses solvers and options
    return made


class ContinuedModel(Denoiser):
    """An operator up to a frame, and then its teacher; see :func:`continued`.

    Attributes:
        student: The operator.
        teacher: The teacher.
        frame: The number of the frame.
        solver: The solver.
        options: Its options.
    """

    def __init__(
        self,
        student: OperatorModel,
        teacher: Denoiser,
        frame: int,
        solver: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.frame, self.solver, self.options = frame, solver, options
        self.schedule, self.native = student.schedule, student.native
        self.event_shape = student.event_shape
        self.accepts, self.null_condition = student.accepts, student.null_condition
        self.class_names = student.class_names

    @property
    def network(self) -> Any:
        """The network of the operator."""
        return self.student.network

    def trained_noises(self, seed: int) -> int:
        """Returns how many noises of a seed the operator was trained on."""
        return self.student.trained_noises(seed)

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        raise ValueError(NO_PREDICTION)

    def built_in_sampler(self) -> BuiltInSampler:
        """Returns the sampler of the fewest evaluations that the solver can make."""
        for nfe in range(1, LEAST_EVALUATIONS):
            with suppress(ValueError):
                return ContinuedSampler(self, nfe + 1, self._solver(nfe))
        return ContinuedSampler(self, LEAST_EVALUATIONS + 1, self._solver(LEAST_EVALUATIONS))

    def _solver(self, nfe: int) -> Sampler:
        """Returns the solver's sampler from the frame, of so many evaluations."""
        start = self.student.operator.times[self.frame - 1]
        request = SamplerRequest(self.solver, nfe, options={**self.options, "t_start": start})
        return resolve(self.teacher, request).sampler

    def fingerprint(self) -> str:
        """Returns a SHA-256 of operator and teacher, frame, solver and options."""
        about = [
            self.student.fingerprint(),
            self.teacher.fingerprint(),
            self.frame,
            self.solver,
            self.options,
        ]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ContinuedSampler:
    """Runs an operator up to a frame, and a solver from there.

    Attributes:
        denoiser: The model.
        nfe: The number of network evaluations, the operator's included.
        then: The solver's sampler.
    """

    denoiser: ContinuedModel
    nfe: int
    then: Sampler

    @property
    def budgets(self) -> range:
        """The numbers of evaluations that it may make; a solver may make some of them only."""
        return range(2, MOST_EVALUATIONS + 1)

    @property
    def options(self) -> dict[str, Any]:
        """Its options: none; those of the solver belong to the model."""
        return {}

    @property
    def fixed(self) -> dict[str, Any]:
        """The frame, the solver and its options, for recipes."""
        model = self.denoiser
        return {FRAME: model.frame, SOLVER: model.solver, SOLVER_OPTIONS: model.options}

    def configured(self, nfe: int, **options: Any) -> ContinuedSampler:
        """Returns the sampler of another budget.

        Raises:
            ValueError, TypeError: If it has no such budget or option.
        """
        check_request(self, nfe, options)
        return replace(self, nfe=nfe, then=self.denoiser._solver(nfe - 1))

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns :math:`\sigma_T z`."""
        return self.denoiser.student.built_in_sampler().start(noise)

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; with states the initial one, that of the frame, and the solver's."""
        operator, frame = self.denoiser.student.operator, self.denoiser.frame
        with torch.no_grad():
            if isinstance(operator, FlowMap):
                state = operator.step(x, 0, frame, **run.cond)
            else:
                assert isinstance(operator, TrajectoryOperator)
                state = operator(x, **run.cond)[:, frame - 1]
        if run.on_evaluation is not None:
            run.on_evaluation()
        rest = self.then.run(state, run)
        if rest.states is None:
            return Trajectory(rest.x, rest.times, None, self.nfe)
        start = torch.tensor([operator.layout.start], dtype=torch.float64)
        times, states = torch.cat([start, rest.times]), torch.cat([x[None], rest.states])
        return Trajectory(rest.x, times, states, self.nfe)

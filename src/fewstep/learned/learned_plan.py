r"""A plan whose numbers are parameters: the base class of families, and their initial samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure
from fewstep.plans.tape import Tape
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.residual import Residual
from fewstep.sampling.resolve import resolve_plan
from fewstep.solvers import Solver


@dataclass(frozen=True)
class Start:
    r"""The training-free sampler from which a family starts by default.

    Attributes:
        solver: ``None`` for what ``auto`` chooses: the model's measured profile if it has one, and else
            by schedule and budget; or a name in :data:`fewstep.SOLVERS`, on the power grid (exponent
            1.5 for tabulated schedules, else 2) whose last step goes on to :math:`\sigma = 0`.
    """

    solver: str | None = None


@dataclass(frozen=True)
class Base:
    """The training-free sampler from which a search starts.

    Attributes:
        solver: The solver.
        grid: Its grid.
        head: Whether it begins with an analytic head start.
        integer_times: Whether the network takes integer timesteps only: times cannot be learned.
        origin: Where it comes from, for reports: ``"given"``, ``"family"``, ``"profile"`` or ``"auto"``.
        shape: The shape of a sample, or ``None`` if it is not known.
    """

    solver: Solver
    grid: TimeGrid
    head: bool = False
    integer_times: bool = False
    origin: str = "given"
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        request: SamplerRequest,
        *,
        integer_times: bool = False,
        origin: str = "given",
    ) -> Base:
        """Returns the base that a request describes; arguments as of :func:`~fewstep.sampling.resolve.resolve_plan`."""
        planned = resolve_plan(schedule, request, integer_times=integer_times)
        return cls(planned.solver, planned.plan.grid, planned.plan.head, integer_times, origin)

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule."""
        return self.grid.schedule

    def to_record(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {
            "solver": self.solver.name,
            "options": {
                key: value.tolist() if isinstance(value, Tensor) else value
                for key, value in vars(self.solver).items()
            },
            "knots": self.grid.times.tolist(),
            "head": self.head,
            "origin": self.origin,
        }

    def plan(self, knots: Tensor | None = None) -> Plan:
        """Returns the solver's plan, at other knots if given; differentiable in them, not audited."""
        grid = self.grid if knots is None else replace(self.grid, times=knots)
        tape = Tape(grid, self.solver.prediction_on(grid.schedule))
        plan = tape.finish(self.solver.equations(tape, grid), self.solver.name)
        return replace(plan, head=self.head)


class Numbers(NamedTuple):
    """The numbers with which a structure runs.

    Attributes:
        values: The coefficients, float64, shape (C).
        times: The conditioning timesteps of the K evaluations, float64, shape (K).
        knots: The times of the states, float64, shape (S + 1).
    """

    values: Tensor
    times: Tensor
    knots: Tensor


class LearnedPlan(nn.Module, ABC):
    r"""A family: a fixed structure, and parameters from which its numbers follow differentiably.

    .. math:: \psi \mapsto (c(\psi), \tau(\psi), t(\psi)), \qquad
        x_0 = \mathrm{plan}_{c, \tau}(x_T), \qquad \psi = 0 \text{ is the base}

    with coefficients c (C), conditioning timesteps :math:`\tau` (K) and knots t (S + 1), all float64.
    A subclass sets the attributes below, declares its parameters (float64, all zero at the start)
    and writes :meth:`numbers`; a line in :data:`fewstep.learned.FAMILIES` then registers it for
    ``tune``, the command line and the tests of families. Its constructor takes the base first and
    options by keyword, and raises ``ValueError`` for a base that does not fit.

    Cost: none beside the K evaluations of the structure; the numbers are computed once per step.

    Attributes:
        default_start: The training-free sampler that it starts from by default; declared on the
            class.
        structure: The rows.
        base: The sampler at the start.
        learns_times: Whether the knots are learned.
        learns_conditioning: Whether the conditioning timesteps are (with the knots or beside them).
    """

    default_start: ClassVar[Start] = Start()
    structure: Structure
    base: Base
    learns_times: bool = False
    learns_conditioning: bool = False

    @classmethod
    def accepts(cls, solver: Solver, **options: Any) -> bool:
        """Whether the family with these options can start from a solver; by default any."""
        del solver, options
        return True

    @abstractmethod
    def numbers(self) -> Numbers:
        """Returns the numbers of the present parameters."""

    def start(self) -> Plan:
        """Returns the sampler that the search starts from."""
        return self.base.plan()

    def residual(self) -> Residual | None:
        """Returns the correction of predictions that runs with the plan, differentiable; by default none."""
        return None

    @final
    def forward(self) -> Numbers:
        """Returns the numbers of the present parameters."""
        return self.numbers()

    @final
    def plan(self, name: str = "") -> Plan:
        """Returns the present sampler as an ordinary plan."""
        with torch.no_grad():
            numbers = self.numbers()
        return Plan(
            self.structure,
            numbers.values.detach().clone(),
            numbers.times.detach().clone(),
            numbers.knots.detach().clone(),
            self.base.schedule,
            self.base.head,
            name or self.base.solver.name,
            self.base.grid.ends_at_zero,
        )

    @property
    def count(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def vector(self) -> Tensor:
        """Returns all parameters in one vector, float64."""
        parts = [p.detach().reshape(-1) for p in self.parameters()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def load_vector(self, vector: Tensor) -> None:
        """Sets all parameters from one vector."""
        offset = 0
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(vector[offset : offset + p.numel()].view_as(p))
                offset += p.numel()


def structure_of(
    prediction: Prediction,
    evaluations: int,
    *,
    all_states: bool,
    all_outputs: bool,
    draws: Mapping[int, tuple[int, ...]],
    knots: bool = True,
) -> Structure:
    """Returns the structure in which each state is a combination of states, model outputs and draws.

    The coefficients of the row of state n + 1 are in the order: states (all, or state n), outputs
    (all so far, or output n), draws.

    Arguments:
        prediction: The prediction that the rows combine.
        evaluations: The number K of network evaluations.
        all_states: Whether a row reads all states so far, or the last.
        all_outputs: Whether a row reads all model outputs so far, or the last.
        draws: The draws that the row of each state n + 1 reads; each is drawn when first read.
        knots: Whether states are knots.
    """
    rows: list[Row] = []
    states, outputs, drawn = [0], list[int](), dict[int, int]()

    def append(row: Row) -> int:
        rows.append(row)
        return len(rows)

    offset = 0
    for n in range(evaluations):
        outputs.append(append(Eval(states[-1], n)))
        for draw in draws.get(n, ()):
            if draw not in drawn:
                drawn[draw] = append(Noise(len(drawn)))
        terms = (
            *(states if all_states else states[-1:]),
            *(outputs if all_outputs else outputs[-1:]),
            *(drawn[draw] for draw in draws.get(n, ())),
        )
        states.append(append(Lin(terms, offset, n + 1 if knots else None)))
        offset += len(terms)
    return Structure(prediction, tuple(rows), states[-1])

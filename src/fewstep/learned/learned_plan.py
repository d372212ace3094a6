r"""A plan whose numbers are parameters: what every family is, and what it starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.plan import Eval, Lin, Noise, Plan, Row, Structure
from fewstep.plans.tape import Tape
from fewstep.sampling.planning import GRID_OPTIONS
from fewstep.sampling.planning import plan as make_plan
from fewstep.solvers import Solver
from fewstep.solvers import solver as make_solver


@dataclass(frozen=True)
class Base:
    """The training-free sampler from which a search starts.

    Attributes:
        solver: The solver.
        grid: Its grid.
        head: Whether it begins with an analytic head start.
        integer_times: Whether the network knows whole indices only: times cannot be learned.
    """

    solver: Solver
    grid: TimeGrid
    head: bool = False
    integer_times: bool = False

    @classmethod
    def of(
        cls,
        solver: str | Solver,
        schedule: NoiseSchedule,
        *,
        nfe: int,
        grid: str | TimeGrid | None = None,
        head_start: float | None = None,
        integer_times: bool = False,
        **options: Any,
    ) -> Base:
        """Returns the base with a budget; arguments as of :func:`fewstep.plan`."""
        if isinstance(solver, str):
            own = {k: v for k, v in options.items() if k not in GRID_OPTIONS}
            options = {k: v for k, v in options.items() if k in GRID_OPTIONS}
            method = make_solver(solver, **own)
        else:
            method = solver
        made = make_plan(
            method,
            schedule,
            nfe=nfe,
            grid=grid,
            head_start=head_start,
            integer_times=integer_times,
            **options,
        )
        end = float(made.knots[-1])
        zero = end == schedule.t_zero and end < schedule.t_min
        knots = TimeGrid(schedule, made.knots, zero)
        return cls(method, knots, made.head, integer_times)

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule."""
        return self.grid.schedule

    def plan(self, knots: Tensor | None = None) -> Plan:
        """Returns the solver's plan, at other knots if given; differentiable in them, not audited."""
        grid = self.grid if knots is None else replace(self.grid, times=knots)
        tape = Tape(grid, self.solver.prediction)
        made = tape.finish(self.solver.equations(tape, grid), self.solver.name)
        return replace(made, head=self.head)


class Numbers(NamedTuple):
    """What a structure needs to run.

    Attributes:
        values: The coefficients, float64, shape (C).
        times: The times that the network is told, float64, shape (K).
        knots: The times of the states, float64, shape (S + 1).
    """

    values: Tensor
    times: Tensor
    knots: Tensor


class LearnedPlan(nn.Module, ABC):
    """A fixed structure and parameters from which its numbers follow, differentiably.

    Attributes:
        structure: The rows.
        base: Where the search starts.
        moves_times: Whether the knots are learned.
        tells_times: Whether what the network is told is learned (with the knots or beside them).
    """

    structure: Structure
    base: Base
    moves_times: bool = False
    tells_times: bool = False

    @abstractmethod
    def numbers(self) -> Numbers:
        """Returns the numbers of the present parameters."""

    def start(self) -> Plan:
        """Returns the sampler that the search starts from."""
        return self.base.plan()

    @final
    def forward(self) -> Numbers:
        """Returns the numbers of the present parameters."""
        return self.numbers()

    @final
    def plan(self, name: str = "") -> Plan:
        """Returns the present sampler as an ordinary plan."""
        with torch.no_grad():
            found = self.numbers()
        return Plan(
            self.structure,
            found.values.detach().clone(),
            found.times.detach().clone(),
            found.knots.detach().clone(),
            self.base.schedule,
            self.base.head,
            name or self.base.solver.name,
        )

    @property
    def count(self) -> int:
        """The number of learned numbers."""
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
    calls: int,
    *,
    all_states: bool,
    all_answers: bool,
    draws: Mapping[int, tuple[int, ...]],
    knots: bool = True,
) -> Structure:
    """Returns the structure in which each state is a combination of states, answers and draws.

    The coefficients of the row of state n + 1 are in the order: states (all, or state n), answers
    (all so far, or answer n), draws.

    Arguments:
        prediction: What the network is asked for.
        calls: The number K of calls.
        all_states: Whether a row reads all states so far, or the last.
        all_answers: Whether a row reads all answers so far, or the last.
        draws: The draws that the row of each state n + 1 reads; each is made when first read.
        knots: Whether states are knots.
    """
    rows: list[Row] = []
    states, answers, drawn = [0], list[int](), dict[int, int]()

    def append(row: Row) -> int:
        rows.append(row)
        return len(rows)

    offset = 0
    for n in range(calls):
        answers.append(append(Eval(states[-1], n)))
        for draw in draws.get(n, ()):
            if draw not in drawn:
                drawn[draw] = append(Noise(len(drawn)))
        terms = (
            *(states if all_states else states[-1:]),
            *(answers if all_answers else answers[-1:]),
            *(drawn[draw] for draw in draws.get(n, ())),
        )
        states.append(append(Lin(terms, offset, n + 1 if knots else None)))
        offset += len(terms)
    return Structure(prediction, tuple(rows), states[-1])

"""The buffer reuse schedule: what a run can know of each row before it begins.

Coefficients beside their registers, the last read of each register, and which memory a result may reuse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Structure

NOTHING = -1
"""The index that means "no register"."""


class LinearOp(NamedTuple):
    """A linear combination of registers, with its numbers.

    Attributes:
        first: The register that it starts with.
        scale: Its coefficient, on the CPU without dimensions: cheaper than a number, which torch
            would wrap in such a tensor at every use, and no device is read. ``None`` for 1.
        others: The other registers and their coefficients.
        in_place: The register ``first`` if the result may be written into its memory, or ``NOTHING``.
        suspects: The registers that might share that memory; checked when the row runs.
        state: Which knot's state this is, or ``None``.
        last_reads: The registers that nobody reads afterwards.
    """

    first: int
    scale: Tensor | None
    others: tuple[tuple[int, float], ...]
    in_place: int
    suspects: tuple[int, ...]
    state: int | None
    last_reads: tuple[int, ...]


class EvaluationOp(NamedTuple):
    """A network evaluation.

    Attributes:
        of: The register of its input.
        at: The number of the evaluation.
        earlier: The registers of earlier outputs that are read after this evaluation.
        last_reads: The registers that nobody reads afterwards.
    """

    of: int
    at: int
    earlier: tuple[int, ...]
    last_reads: tuple[int, ...]


class NoiseOp(NamedTuple):
    """A normal draw: its number, registers read for the last time."""

    draw: int
    last_reads: tuple[int, ...]


Op = LinearOp | EvaluationOp | NoiseOp


def buffer_schedule(
    plan: Plan, dtype: torch.dtype, *, keep_inputs: bool, keep_states: bool
) -> tuple[Op, ...]:
    """Returns the rows as a run needs them; computed once per plan.

    A linear combination may be written into the memory of an earlier linear combination that is read
    here for the last time. If the network has seen that register, a model output that is still needed
    may be a view of it: that is checked during the run.

    Arguments:
        plan: The plan.
        dtype: The type of the state.
        keep_inputs: Whether inputs of evaluations must not be overwritten.
        keep_states: Whether states must not be overwritten.
    """
    # A product with a float32 state is formed in float32 whatever the number's own type is.
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    key = ("buffers", kind, keep_inputs, keep_states)
    schedule = plan.derived.get(key)
    if schedule is None:
        with torch.inference_mode(False):  # for later runs with gradients too
            numbers = torch.tensor(plan.numbers, dtype=kind, device="cpu").unbind()
        schedule = _schedule(plan.structure, plan.numbers, numbers, keep_inputs, keep_states)
        plan.derived[key] = schedule
    return schedule


def _schedule(
    structure: Structure,
    numbers: tuple[float, ...],
    scales: tuple[Tensor, ...],
    keep_inputs: bool,
    keep_states: bool,
) -> tuple[Op, ...]:
    ops: list[Op] = []
    own: set[int] = set()  # results of linear rows: memory that we allocated
    held: set[int] = set()  # of these, those that the caller holds
    exposed: set[int] = set()  # those whose memory a network saw
    foreign: set[int] = set()  # still needed, with memory that we did not allocate
    outputs: set[int] = set()  # of these, the outputs of evaluations
    for i, (row, last) in enumerate(
        zip(structure.rows, structure.last_reads, strict=True), start=1
    ):
        if isinstance(row, Lin):
            weights = numbers[row.offset : row.offset + len(row.terms)]
            pairs = dict(zip(row.terms, weights, strict=True))
            # Which term comes first must not depend on what is held, or rounding would.
            spare = next((r for r in row.terms if r in own and r in last), NOTHING)
            one = next((r for r, c in pairs.items() if c == 1), row.terms[0])
            first = one if spare == NOTHING else spare
            unit = pairs.pop(first) == 1
            scale = None if unit else scales[row.offset + row.terms.index(first)]
            if spare in held:
                spare = NOTHING
            suspects = tuple(sorted(foreign)) if spare in exposed else ()
            others = tuple(pairs.items())
            ops.append(LinearOp(first, scale, others, spare, suspects, row.state, last))
            own.add(i)
            if row.state is not None and keep_states:
                held.add(i)
            if spare in exposed:
                exposed.add(i)
        elif isinstance(row, Eval):
            exposed.add(row.of)
            if keep_inputs:
                held.add(row.of)
            foreign.add(i)
            earlier = tuple(sorted(outputs.intersection(foreign).difference(last)))
            ops.append(EvaluationOp(row.of, row.at, earlier, last))
            outputs.add(i)
        else:
            foreign.add(i)
            ops.append(NoiseOp(row.draw, last))
        foreign.difference_update(last)
    return tuple(ops)

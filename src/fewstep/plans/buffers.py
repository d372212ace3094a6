"""What a run can know of each row before it begins: numbers beside registers, and what may be overwritten."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Structure

NOTHING = -1
"""Stands for no register."""


class Sum(NamedTuple):
    """A linear row with its numbers.

    Attributes:
        first: The register that the sum starts with.
        scale: Its coefficient, on the CPU without dimensions: cheaper than a number, which torch
            would make into just that at every use; and it is read from no device. ``None`` for 1.
        others: The other registers and their coefficients.
        spare: The register ``first`` if the sum may be written into its memory, or ``NOTHING``.
        suspects: The registers that might share that memory; to be looked at when it happens.
        state: Which knot's state this is, or ``None``.
        dying: The registers that nobody reads afterwards.
    """

    first: int
    scale: Tensor | None
    others: tuple[tuple[int, float], ...]
    spare: int
    suspects: tuple[int, ...]
    state: int | None
    dying: tuple[int, ...]


class Ask(NamedTuple):
    """A network call: of which register, which of the calls; what nobody reads afterwards."""

    of: int
    at: int
    dying: tuple[int, ...]


class Drawn(NamedTuple):
    """A normal draw: which one; what nobody reads afterwards."""

    draw: int
    dying: tuple[int, ...]


Line = Sum | Ask | Drawn


def lay_out(
    plan: Plan, dtype: torch.dtype, *, keep_inputs: bool, keep_states: bool
) -> tuple[Line, ...]:
    """Returns the rows as a run needs them; remembered with the plan.

    A sum may be written into a register that a sum of ours made and that dies here. If the network
    has seen it, an answer that is still alive may be a view of it: that is for the run to find out.

    Arguments:
        plan: The plan.
        dtype: The type of the state.
        keep_inputs: Whether inputs of calls must not be overwritten.
        keep_states: Whether states must not be overwritten.
    """
    # A product with a float32 state is formed in float32 whatever the number's own type is.
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    key = (kind, keep_inputs, keep_states)
    known = plan.layouts.get(key)
    if known is None:
        with torch.inference_mode(False):  # for later runs with gradients too
            numbers = torch.tensor(plan.numbers, dtype=kind, device="cpu").unbind()
        known = _lines(plan.structure, plan.numbers, numbers, keep_inputs, keep_states)
        plan.layouts[key] = known
    return known


def _lines(
    structure: Structure,
    numbers: tuple[float, ...],
    scales: tuple[Tensor, ...],
    keep_inputs: bool,
    keep_states: bool,
) -> tuple[Line, ...]:
    lines: list[Line] = []
    made: set[int] = set()  # by a sum: memory that we asked for
    kept: set[int] = set()  # of these, those that others hold
    seen: set[int] = set()  # those whose memory a network saw
    foreign: set[int] = set()  # alive, with memory that we did not ask for
    for i, (row, dying) in enumerate(zip(structure.rows, structure.dies, strict=True), start=1):
        if isinstance(row, Lin):
            weights = numbers[row.offset : row.offset + len(row.terms)]
            pairs = dict(zip(row.terms, weights, strict=True))
            # What comes first must not depend on what is kept, or rounding would.
            spare = next((r for r in row.terms if r in made and r in dying), NOTHING)
            one = next((r for r, c in pairs.items() if c == 1), row.terms[0])
            first = one if spare == NOTHING else spare
            unit = pairs.pop(first) == 1
            scale = None if unit else scales[row.offset + row.terms.index(first)]
            if spare in kept:
                spare = NOTHING
            suspects = tuple(sorted(foreign)) if spare in seen else ()
            others = tuple(pairs.items())
            lines.append(Sum(first, scale, others, spare, suspects, row.state, dying))
            made.add(i)
            if row.state is not None and keep_states:
                kept.add(i)
            if spare in seen:
                seen.add(i)
        elif isinstance(row, Eval):
            seen.add(row.of)
            if keep_inputs:
                kept.add(row.of)
            foreign.add(i)
            lines.append(Ask(row.of, row.at, dying))
        else:
            foreign.add(i)
            lines.append(Drawn(row.draw, dying))
        foreign.difference_update(dying)
    return tuple(lines)

r"""The rows of a plan and the registers that they combine: integers, without coefficients.

Register 0 is the initial state; each row defines the next register:

- ``Lin``: :math:`r_i = \sum_j c_j r_j` over earlier registers,
- ``Eval``: :math:`r_i = D(r_j, t_k)`, the network in the plan's prediction,
- ``Noise``: :math:`r_i = z_m \sim N(0, I)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from fewstep.diffusion.prediction import Prediction


class Lin(NamedTuple):
    """A linear row: the registers that it adds up, the place of its first coefficient, the knot."""

    terms: tuple[int, ...]
    offset: int
    state: int | None = None


class Eval(NamedTuple):
    """A network evaluation: of which register, at which of the plan's times."""

    of: int
    at: int


class Noise(NamedTuple):
    """A normal draw: which one."""

    draw: int


Row = Lin | Eval | Noise


@dataclass(frozen=True)
class Structure:
    """The integers of a plan.

    Attributes:
        prediction: The prediction that the rows are written for.
        rows: The rows, defining registers 1, 2, ...
        result: The register that is the sample.
        last_reads: For each row, the registers that nobody reads after it.
    """

    prediction: Prediction
    rows: tuple[Row, ...]
    result: int
    # Not a cached property: their lock (Python 3.11) cannot be traced by torch.compile.
    last_reads: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    @functools.cached_property
    def nfe(self) -> int:
        """The number of network evaluations (NFE)."""
        return sum(isinstance(row, Eval) for row in self.rows)

    @functools.cached_property
    def n_noise(self) -> int:
        """The number of normal draws after the initial one."""
        return sum(isinstance(row, Noise) for row in self.rows)

    @functools.cached_property
    def n_values(self) -> int:
        """The number of coefficients."""
        return sum(len(row.terms) for row in self.rows if isinstance(row, Lin))

    def _last_reads(self) -> tuple[tuple[int, ...], ...]:
        last = {self.result: len(self.rows)}
        for i, row in reversed(list(enumerate(self.rows))):
            for register in reads(row):
                last.setdefault(register, i)
        ends: list[list[int]] = [[] for _ in self.rows]
        for register, i in last.items():
            if i < len(self.rows):
                ends[i].append(register)
        for i in range(len(self.rows)):  # a register that nobody reads dies where it is defined
            if i + 1 not in last:
                ends[i].append(i + 1)
        return tuple(tuple(sorted(row)) for row in ends)

    def __post_init__(self) -> None:
        evaluations = noises = offset = 0
        for i, row in enumerate(self.rows, start=1):
            for register in reads(row):
                if not 0 <= register < i:
                    raise ValueError(
                        f"row {i} reads register {register}, which is not defined before it"
                    )
            match row:
                case Lin():
                    if not row.terms:
                        raise ValueError(f"row {i} adds up nothing")
                    if len(set(row.terms)) != len(row.terms):
                        raise ValueError(f"row {i} names a register twice")
                    if row.offset != offset:
                        raise ValueError(f"row {i} must start at coefficient {offset}")
                    offset += len(row.terms)
                case Eval():
                    if row.at != evaluations:
                        raise ValueError(
                            f"row {i} evaluates the network at time {row.at}, expected {evaluations}: "
                            "evaluations use the plan's times in order"
                        )
                    evaluations += 1
                case Noise():
                    if row.draw != noises:
                        raise ValueError(
                            f"row {i} draws noise {row.draw}, expected {noises}: draws are in order"
                        )
                    noises += 1
        if not 0 <= self.result <= len(self.rows):
            raise ValueError(f"the result is register {self.result} of {len(self.rows) + 1}")
        object.__setattr__(self, "last_reads", self._last_reads())


def reads(row: Row) -> tuple[int, ...]:
    """Returns the registers that a row reads."""
    match row:
        case Lin():
            return row.terms
        case Eval():
            return (row.of,)
        case Noise():
            return ()

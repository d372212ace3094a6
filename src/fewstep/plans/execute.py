r"""The one loop: runs a plan against a network.

Two executors, because they want opposite things of memory:

- :class:`Execution` advances from one network call to the next, overwriting states that nobody
  will read again, with coefficients as Python floats: no device reads, 2 to 5 tensor operations a
  step. Iterators, adapters and plain sampling use it.
- :func:`functional` never overwrites, and takes the coefficients as tensors: for gradients with
  respect to them, and for ``torch.compile``, where another grid is then no other program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.plans.buffers import NOTHING, Ask, Sum, lay_out
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure

Network = Callable[[Tensor, Tensor], Tensor]
"""Takes a state (B, *) and a time (), returns the plan's prediction (B, *)."""

Draw = Callable[[int], Tensor]
"""Takes the index of a draw, returns it, with the shape of the state."""


class Call(NamedTuple):
    """What the network is asked: the state, and the number of the call in the plan."""

    x: Tensor
    at: int


class Execution:
    r"""One run of a plan, advanced from outside.

    ``call`` is the next request to the network, or ``None`` when the run is over; ``advance``
    takes the answer. All state of a run is in this object, so runs share nothing.

    Arguments:
        plan: The plan.
        x: The initial state, with shape (B, \*); it is not written to.
        draw: The source of normal draws; needed if the plan has any.
        on_state: Called with the knot and the state whenever one is reached; such states are
            never overwritten afterwards.
        keep_inputs: Whether inputs of calls are never overwritten either, because others hold them.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        *,
        draw: Draw | None = None,
        on_state: Callable[[int, Tensor], None] | None = None,
        keep_inputs: bool = False,
    ) -> None:
        if plan.n_noise and draw is None:
            raise ValueError(f"the plan draws noise {plan.n_noise} times; give a source of draws")
        self._lines = lay_out(
            plan, x.dtype, keep_inputs=keep_inputs, keep_states=on_state is not None
        )
        self._result = plan.structure.result
        self._keeps_inputs = keep_inputs
        self._draw = draw
        self._on_state = on_state
        # None where a register is not made yet, or dead.
        self._registers: list[Any] = [None] * (len(self._lines) + 1)
        self._registers[0] = x
        self._row = 0
        self.call: Call | None = None
        self._run()

    @property
    def result(self) -> Tensor:
        """The sample, once ``call`` is ``None``."""
        return self._registers[self._result]

    def advance(self, answer: Tensor) -> None:
        """Takes the network's answer to ``call`` and runs up to the next call."""
        if self.call is None:
            raise RuntimeError("the run is over: there is no call to answer")
        self.call = None  # it holds a state, which may die now
        registers = self._registers
        dying = self._lines[self._row].dying
        self._row += 1
        registers[self._row] = answer
        for r in dying:
            registers[r] = None
        self._run()

    def replace(self, x: Tensor) -> None:
        """Gives the waiting call another input: the state was edited between two calls."""
        line = self._lines[self._row] if self.call is not None else None
        if not isinstance(line, Ask):
            raise RuntimeError("the run is over: there is no call whose input could be replaced")
        # The memory is not ours: the layout says so for inputs that are kept; else it is copied.
        self._registers[line.of] = x if self._keeps_inputs else x.clone()
        self.call = Call(self._registers[line.of], line.at)

    def _run(self) -> None:
        lines, registers, row = self._lines, self._registers, self._row
        count = len(lines)
        while row < count:
            line = lines[row]
            if isinstance(line, Sum):
                made = self._sum(line)
                if line.state is not None and self._on_state is not None:
                    self._on_state(line.state, made)
            elif isinstance(line, Ask):
                self._row = row
                self.call = Call(registers[line.of], line.at)
                return
            else:
                assert self._draw is not None
                made = self._draw(line.draw)
            row += 1
            registers[row] = made
            for r in line.dying:
                registers[r] = None
        self._row = row

    def _sum(self, line: Sum) -> Tensor:
        registers = self._registers
        first, scale, others, spare, suspects, _, _ = line
        total, rest = registers[first], others
        if spare != NOTHING and not self._shared(spare, suspects):
            if scale is not None:
                total.mul_(scale)
        elif scale is not None:
            total = total.mul(scale)
        elif others:
            r, c = others[0]
            total, rest = torch.add(total, registers[r], alpha=c), others[1:]
        else:
            total = total.clone()
        for r, c in rest:
            total.add_(registers[r], alpha=c)
        return total

    def _shared(self, spare: int, suspects: tuple[int, ...]) -> bool:
        """Returns whether another register has the memory of this one."""
        if torch.compiler.is_compiling():
            return True  # a compiled run has its memory planned for it
        registers = self._registers
        memory = registers[spare].untyped_storage().data_ptr() if suspects else 0
        return any(registers[r].untyped_storage().data_ptr() == memory for r in suspects)


def execute(
    plan: Plan,
    network: Network,
    x: Tensor,
    *,
    draw: Draw | None = None,
    on_state: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    r"""Runs a plan and returns the sample, with shape (B, \*); no gradients.

    Arguments:
        plan: The plan.
        network: The network, in the plan's prediction.
        x: The initial state, with shape (B, \*).
        draw: The source of normal draws.
        on_state: Called with each state reached.
    """
    times = plan.times.to(device=x.device, dtype=_time_dtype(x))
    with torch.no_grad():
        run = Execution(plan, x, draw=draw, on_state=on_state)
        while run.call is not None:  # no name for the call: it would keep its state alive
            run.advance(network(run.call.x, times[run.call.at]))
        return run.result


def functional(
    structure: Structure,
    values: Tensor,
    times: Tensor,
    network: Network,
    x: Tensor,
    *,
    draw: Draw | None = None,
    checkpoint: bool = False,
) -> Tensor:
    r"""Runs a structure with coefficients as tensors; differentiable in everything.

    Arguments:
        structure: The rows.
        values: The coefficients, float64, shape (C), on the CPU or on the device of ``x``.
        times: The times of the calls, float64, shape (K).
        network: The network, in the structure's prediction.
        x: The initial state, with shape (B, \*).
        draw: The source of normal draws.
        checkpoint: Whether to recompute each network call in the backward pass instead of
            storing its activations: memory stays flat in the number of calls.
    """
    if checkpoint:
        from torch.utils.checkpoint import checkpoint as rematerialise

        def call(y: Tensor, t: Tensor, /) -> Tensor:
            return rematerialise(network, y, t, use_reentrant=False)  # type: ignore[return-value]
    else:
        call = network
    coefficients = values.unbind()
    registers: dict[int, Tensor] = {0: x}
    for i, row in enumerate(structure.rows):
        registers[i + 1] = _row(row, registers, coefficients, times, call, draw)
        for r in structure.dies[i]:
            del registers[r]
    return registers[structure.result]


def _row(
    row: Row,
    registers: dict[int, Tensor],
    coefficients: tuple[Tensor, ...],
    times: Tensor,
    network: Network,
    draw: Draw | None,
) -> Tensor:
    if isinstance(row, Lin):
        # A 0-dimensional float64 factor does not promote a float32 state.
        total = coefficients[row.offset] * registers[row.terms[0]]
        for place, r in enumerate(row.terms[1:], start=row.offset + 1):
            total = total + coefficients[place] * registers[r]
        return total
    if isinstance(row, Eval):
        x = registers[row.of]
        return network(x, times[row.at].to(_time_dtype(x)))
    if draw is None:
        raise ValueError("the plan draws noise; give a source of draws")
    assert isinstance(row, Noise)
    return draw(row.draw)


def _time_dtype(x: Tensor) -> torch.dtype:
    # Below float32 a time such as 999 would be rounded to another one.
    return torch.float64 if x.dtype == torch.float64 else torch.float32

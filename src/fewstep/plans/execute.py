r"""The executors: run a plan with a network.

Two executors, because they want opposite things of memory:

- :class:`Execution` advances from one network evaluation to the next, overwriting states that nobody
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

from fewstep.plans.buffers import NOTHING, EvaluationOp, LinearOp, buffer_schedule
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure

Network = Callable[[Tensor, Tensor], Tensor]
"""Takes a state (B, *) and a time (), returns the plan's prediction (B, *)."""

Draw = Callable[[int], Tensor]
"""Takes the index of a draw, returns it, with the shape of the state."""


def write_count(x: Tensor) -> int | None:
    """Returns how often torch saw a tensor written to; ``None`` if it may be written to unseen.

    Graphs on devices write without being counted, and so does everything in inference mode.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or x.device.type != "cpu"
    ):
        return None
    return None if x.is_inference() else x._version


class Evaluation(NamedTuple):
    """The next network evaluation: input, time, and its index in the plan."""

    x: Tensor
    at: int


class Execution:
    r"""One run of a plan, advanced from outside.

    ``request`` is the evaluation that the run waits for, or ``None`` when it is over; ``advance``
    takes its model output. All state of a run is in this object, so runs share nothing.

    Arguments:
        plan: The plan.
        x: The initial state, with shape (B, \*); it is not written to.
        draw: The source of normal draws; needed if the plan has any.
        on_state: Called with the knot and the state whenever one is reached; such states are
            never overwritten afterwards.
        keep_inputs: Whether inputs of evaluations are never overwritten either, because others hold
            them.

    Raises:
        ValueError: If the plan draws noise and there is no source of it.
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
        self._ops = buffer_schedule(
            plan, x.dtype, keep_inputs=keep_inputs, keep_states=on_state is not None
        )
        self._result = plan.structure.result
        self._keeps_inputs = keep_inputs
        self._draw = draw
        self._on_state = on_state
        # None where a register is not computed yet, or not needed any more.
        self._registers: list[Any] = [None] * (len(self._ops) + 1)
        self._registers[0] = x
        self._versions: dict[int, int | None] = {}  # how often an output had been written to
        self._row = 0
        self.request: Evaluation | None = None
        self._run()

    @property
    def result(self) -> Tensor:
        """The sample, once ``request`` is ``None``."""
        return self._registers[self._result]

    def advance(self, output: Tensor) -> None:
        """Takes the model output for ``request`` and runs up to the next evaluation.

        Raises:
            RuntimeError: If the run is over.
            ValueError: If the output has the memory of an earlier one that is still needed.
        """
        if self.request is None:
            raise RuntimeError("the run is over: it waits for no model output")
        self.request = None  # it holds a state whose memory may be reused now
        registers = self._registers
        op = self._ops[self._row]
        assert isinstance(op, EvaluationOp)
        if op.earlier:
            self._check_memory(output, op)
        self._row += 1
        registers[self._row] = output
        self._versions[self._row] = write_count(output)
        for r in op.last_reads:
            registers[r] = None
        self._run()

    def _check_memory(self, output: Tensor, op: EvaluationOp) -> None:
        """Refuses an output that has overwritten an earlier one, as that of a CUDA graph does."""
        if torch.compiler.is_compiling():
            return
        memory = output.untyped_storage().data_ptr()
        count = write_count(output)
        for r in op.earlier:
            if self._registers[r].untyped_storage().data_ptr() != memory or not memory:
                continue
            if count is None or count != self._versions[r]:
                raise ValueError(
                    f"evaluation {op.at + 1}: the network returned its output in the memory of an earlier "
                    "output, which the solver still needs (as networks with a static output buffer do, e.g. "
                    "CUDA graphs); let it return output.clone()"
                )

    def replace_input(self, x: Tensor) -> None:
        """Gives the waiting evaluation another input: the state was edited between two evaluations."""
        op = self._ops[self._row] if self.request is not None else None
        if not isinstance(op, EvaluationOp):
            raise RuntimeError("the run is over: it waits for no evaluation")
        # The memory is not ours: the buffer schedule allows for that with keep_inputs; else it is copied.
        self._registers[op.of] = x if self._keeps_inputs else x.clone()
        self.request = Evaluation(self._registers[op.of], op.at)

    def resize(self, shape: torch.Size) -> bool:
        """Repeats what the rest of the run reads for a larger batch; returns whether it fits that shape.

        The input of the waiting evaluation has been replaced. Only a batch of one can be repeated.
        """
        registers = self._registers
        for r, held in enumerate(registers):
            if held is None or held.shape == shape:
                continue
            if held.shape[:1] != (1,) or held.shape[1:] != shape[1:]:
                return False
            registers[r] = held.expand(shape).clone()
        return True

    def _run(self) -> None:
        ops, registers, row = self._ops, self._registers, self._row
        count = len(ops)
        while row < count:
            op = ops[row]
            if isinstance(op, LinearOp):
                value = self._combine(op)
                if op.state is not None and self._on_state is not None:
                    self._on_state(op.state, value)
            elif isinstance(op, EvaluationOp):
                self._row = row
                self.request = Evaluation(registers[op.of], op.at)
                return
            else:
                assert self._draw is not None
                value = self._draw(op.draw)
            row += 1
            registers[row] = value
            for r in op.last_reads:
                registers[r] = None
        self._row = row

    def _combine(self, op: LinearOp) -> Tensor:
        registers = self._registers
        first, scale, others, in_place, suspects, _, _ = op
        total, rest = registers[first], others
        if in_place != NOTHING and not self._shared(in_place, suspects):
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

    def _shared(self, register: int, suspects: tuple[int, ...]) -> bool:
        """Returns whether another register has the memory of this one."""
        if torch.compiler.is_compiling():
            return True  # torch.compile plans the memory itself
        registers = self._registers
        memory = registers[register].untyped_storage().data_ptr() if suspects else 0
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
        while run.request is not None:  # not assigned to a name: that would keep its state alive
            run.advance(network(run.request.x, times[run.request.at]))
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
    correct: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Runs a structure with coefficients as tensors; differentiable in everything.

    Arguments:
        structure: The rows.
        values: The coefficients, float64, shape (C), on the CPU or on the device of ``x``.
        times: The times of the evaluations, float64, shape (K).
        network: The network, in the structure's prediction.
        x: The initial state, with shape (B, \*).
        draw: The source of normal draws.
        checkpoint: Whether to recompute each network evaluation in the backward pass instead of
            storing its activations: memory stays flat in the number of evaluations.
        correct: Takes the index of an evaluation, its state and its output, in this order one after
            another, and returns the output that the rows read.
    """
    if checkpoint:
        from torch.utils.checkpoint import checkpoint as rematerialise

        def evaluate(y: Tensor, t: Tensor, /) -> Tensor:
            return rematerialise(network, y, t, use_reentrant=False)  # type: ignore[return-value]
    else:
        evaluate = network
    coefficients = values.unbind()
    registers: dict[int, Tensor] = {0: x}
    for i, row in enumerate(structure.rows):
        registers[i + 1] = _row(row, registers, coefficients, times, evaluate, draw)
        if correct is not None and isinstance(row, Eval):
            registers[i + 1] = correct(row.at, registers[row.of], registers[i + 1])
        for r in structure.last_reads[i]:
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
    # In types narrower than float32 a time such as 999 would be rounded.
    return torch.float64 if x.dtype == torch.float64 else torch.float32

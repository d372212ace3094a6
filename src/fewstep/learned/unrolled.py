r"""A learned plan run with gradients: rematerialised evaluations, exact micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.base.memory import MicroBatches, parts_of
from fewstep.learned.learned_plan import LearnedPlan, Numbers
from fewstep.learned.objective import Outcome
from fewstep.models.calling import evaluation_mode
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.plans.execute import functional
from fewstep.plans.structure import Structure
from fewstep.sampling.residual import Residual
from fewstep.training.parallel import ALONE, Team


@contextmanager
def frozen(denoiser: Denoiser) -> Iterator[None]:
    """Freezes parameters and dropout within the block, and restores both afterwards."""
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with evaluation_mode([denoiser]):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@dataclass(frozen=True)
class Unrolled:
    r"""Runs numbers of a structure with a model, differentiably.

    Attributes:
        denoiser: The model.
        structure: The rows.
        remat: Whether each network evaluation is repeated in the backward pass, so that memory
            does not grow with their number; a third more time.
        gradient: ``"full"``, or ``"cut"``: model outputs count as constants, so that no gradient
            goes through the network. A third of the cost, a worse result.
        keep_states: Whether intermediate states are returned too.
        residual: Returns the present correction of predictions, or ``None``.
    """

    denoiser: Denoiser
    structure: Structure
    remat: bool = True
    gradient: str = "full"
    keep_states: bool = False
    residual: Callable[[], Residual | None] = lambda: None

    def __call__(
        self, numbers: Numbers, x: Tensor, draws: Sequence[Tensor], cond: Mapping[str, Any]
    ) -> Outcome:
        r"""Returns the samples from initial states x (B, \*), with draws each (B, \*)."""
        ready = self.denoiser.prepare(len(x), cond)
        inputs = list[Tensor]()
        prediction = self.structure.prediction

        def network(y: Tensor, t: Tensor) -> Tensor:
            if self.keep_states:
                inputs.append(y)
            if self.gradient == "cut":
                with torch.no_grad():
                    return self.denoiser.evaluate(
                        y.detach(), t.detach(), prediction=prediction, **ready
                    )
            return self.denoiser.evaluate(y, t, prediction=prediction, **ready)

        residual, correct = self.residual(), None
        if residual is not None:
            schedule = self.denoiser.schedule
            scales = [schedule.alpha(numbers.times), schedule.sigma(numbers.times)]
            correct = residual.begin(prediction, torch.stack(scales, 1))
        remat = self.remat and self.gradient == "full" and torch.is_grad_enabled()
        end = functional(
            self.structure,
            numbers.values,
            numbers.times,
            network,
            x,
            draw=draws.__getitem__,
            checkpoint=remat,
            correct=correct,
        )
        # Evaluations that are repeated in the backward pass append again, after this.
        return Outcome(end, tuple(inputs[1 : self.structure.nfe]))


def backpropagate(
    learned: LearnedPlan,
    run: Unrolled,
    x: Tensor,
    draws: Sequence[Tensor],
    cond: Mapping[str, Any],
    loss: Callable[[Outcome], Tensor],
    *,
    microbatch: int | None = None,
    leaf: Tensor | None = None,
    team: Team = ALONE,
    micro: MicroBatches | None = None,
) -> Tensor:
    r"""Sets the gradient of a loss of the whole batch to the parameters; returns the loss.

    With micro-batches, exactly the gradient of the whole batch, whatever the loss: first all
    samples without a graph, then the gradient G of the loss with respect to them, then each
    micro-batch again with a graph, back-propagating :math:`\langle G_i, x_i \rangle`. Out of memory, micro-batches of half as many samples are taken; the loss
    may be called again then.

    Arguments:
        learned: The learned plan.
        run: The executor of its structure.
        x: The initial states, with shape (B, \*).
        draws: The draws, each (B, \*).
        cond: The conditions, one value a sample.
        loss: Takes the outcome of the whole batch, returns a scalar.
        microbatch: The samples of a micro-batch; left out, all.
        leaf: The initial states whose gradient is wanted too, if ``x`` follows from them.
        team: The processes that each run a part of the batch, as micro-batches; all have the same ``x``
            and get the same loss and gradient.
        micro: Remembers how many samples fit into memory, for the next call.

    Raises:
        ValueError: If both ``microbatch`` and ``leaf`` are given.

    Cost: 3 K B network evaluations' worth of time (4 with ``remat``), and K B more with micro-batches.
    """
    n, several = len(x), team.own.several
    if leaf is not None and microbatch is not None and microbatch < n:
        raise ValueError("moving noise needs the whole batch at once; omit microbatch")
    micro = MicroBatches() if micro is None else micro
    leaves = [*learned.parameters(), *([] if leaf is None else [leaf])]
    most = n if microbatch is None else min(microbatch, n)

    def clear() -> None:
        for parameter in leaves:
            parameter.grad = None

    def at_once(size: int) -> Tensor | None:
        clear()
        if size < n:
            return None
        value = loss(run(learned(), x, draws, cond))
        if value.requires_grad:
            value.backward()
        return value.detach()

    if most == n and not several:
        done, value = micro.tried(n, at_once)
        if done and value is not None:
            return value
    own = team.part(n)

    def slices(size: int) -> list[slice]:
        rows = parts_of(own.stop - own.start, size)
        return [slice(own.start + p.start, own.start + p.stop) for p in rows]

    def outcome_of(p: slice) -> Outcome:
        return run(learned(), x[p], [z[p] for z in draws], select(cond, range(p.start, p.stop)))

    def forward(size: int) -> list[Outcome]:
        parts = slices(size)
        with torch.set_grad_enabled(len(parts) == 1):  # of one part the graph is kept
            return [outcome_of(p) for p in parts]

    def backward(size: int) -> None:
        nonlocal kept
        clear()
        parts = slices(size)
        for p in parts:
            again = kept if len(parts) == 1 and kept is not None else outcome_of(p)
            kept = None
            total = x.new_zeros(())
            for tensor, gradient in zip([again.x, *again.states], gradients, strict=True):
                if gradient is not None:
                    total = total + (gradient[p] * tensor).sum()
            if total.requires_grad:
                total.backward()

    # What is exchanged with other processes is exchanged between these two, so each of them may be begun again.
    count = min(most, own.stop - own.start)
    outcomes = micro(count, forward)
    kept = outcomes[0] if len(outcomes) == 1 else None
    states = zip(*([o.x, *o.states] for o in outcomes), strict=True)
    tensors = [team.gathered(torch.cat(each).detach(), n).requires_grad_() for each in states]
    del outcomes
    value = loss(Outcome(tensors[0], tuple(tensors[1:])))
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    micro(count, backward)
    if several:
        for leaf_ in leaves:
            leaf_.grad = team.summed(torch.zeros_like(leaf_) if leaf_.grad is None else leaf_.grad)
    return value.detach()

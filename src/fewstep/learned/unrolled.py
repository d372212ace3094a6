r"""A learned plan run with gradients: rematerialised evaluations, exact micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
                    return self.denoiser(y.detach(), t.detach(), prediction=prediction, **ready)
            return self.denoiser(y, t, prediction=prediction, **ready)

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
) -> Tensor:
    r"""Adds the gradient of a loss of the whole batch to the parameters; returns the loss.

    With micro-batches, exactly the gradient of the whole batch, whatever the loss: first all
    samples without a graph, then the gradient G of the loss with respect to them, then each
    micro-batch again with a graph, back-propagating :math:`\langle G_i, x_i \rangle`.

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

    Raises:
        ValueError: If both ``microbatch`` and ``leaf`` are given.

    Cost: 3 K B network evaluations' worth of time (4 with ``remat``), and K B more with micro-batches.
    """
    n = len(x)
    several = team.own.several
    size = n if microbatch is None else min(microbatch, n)
    if size == n and not several:
        value = loss(run(learned(), x, draws, cond))
        if value.requires_grad:
            value.backward()
        return value.detach()
    if leaf is not None and size < n:
        raise ValueError("moving noise needs the whole batch at once; omit microbatch")
    own = team.part(n)
    parts = [
        slice(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)
    ]

    def outcome_of(p: slice) -> Outcome:
        return run(learned(), x[p], [z[p] for z in draws], select(cond, range(p.start, p.stop)))

    with torch.set_grad_enabled(len(parts) == 1):  # of one part the graph is kept
        outcomes = [outcome_of(p) for p in parts]
    states = zip(*([o.x, *o.states] for o in outcomes), strict=True)
    tensors = [team.gathered(torch.cat(each).detach(), n).requires_grad_() for each in states]
    value = loss(Outcome(tensors[0], tuple(tensors[1:])))
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    for p in parts:
        again = outcomes[0] if len(parts) == 1 else outcome_of(p)
        total = x.new_zeros(())
        for tensor, gradient in zip([again.x, *again.states], gradients, strict=True):
            if gradient is not None:
                total = total + (gradient[p] * tensor).sum()
        if total.requires_grad:
            total.backward()
    if several:
        for leaf_ in [*learned.parameters(), *([] if leaf is None else [leaf])]:
            leaf_.grad = team.summed(torch.zeros_like(leaf_) if leaf_.grad is None else leaf_.grad)
    return value.detach()

r"""A learned plan run with gradients: rematerialised calls, exact micro-batches, conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.learned.learned_plan import LearnedPlan, Numbers
from fewstep.learned.objectives import Outcome
from fewstep.models.denoiser import Denoiser
from fewstep.plans.execute import functional
from fewstep.plans.structure import Structure

GRADIENTS = ("full", "cut")


@dataclass(frozen=True)
class Conditions:
    """The conditions of a search: each a list of values that samples take in turn or at random.

    Attributes:
        values: The lists by name.
    """

    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: Denoiser, cond: Mapping[str, Any]) -> Conditions:
        """Returns them from arguments: a list or a tensor is drawn from, a single value is for all.

        A model that fewstep trained with classes takes all its classes if none are given.
        """
        inner = getattr(denoiser, "inner", denoiser)
        network = getattr(inner, "network", None)
        classes = getattr(network, "num_classes", None)
        if not cond and isinstance(classes, int) and "class_labels" in denoiser.null_condition:
            return cls({"class_labels": list(range(classes))})
        found: dict[str, Sequence[Any]] = {}
        for name, value in cond.items():
            if isinstance(value, Tensor):
                found[name] = list(value.unbind()) if value.ndim else [value]
            elif isinstance(value, (list, tuple, range)):
                found[name] = list(value)
            else:
                found[name] = [value]
            if not found[name]:
                raise ValueError(f"the condition {name!r} has no values to draw from")
        return cls(found)

    def at(self, samples: Sequence[int]) -> dict[str, Any]:
        """Returns the conditions of numbered samples: each list in turn."""
        return {
            name: _joined([values[i % len(values)] for i in samples])
            for name, values in self.values.items()
        }

    def drawn(self, n: int, *address: int) -> dict[str, Any]:
        """Returns conditions at random, the same for the same address."""
        found = {}
        for place, (name, values) in enumerate(self.values.items()):
            generator = generator_at(*address, place)
            index = torch.randint(len(values), (n,), generator=generator).tolist()
            found[name] = _joined([values[i] for i in index])
        return found


def _joined(values: list[Any]) -> Any:
    if all(isinstance(v, Tensor) for v in values):
        return torch.stack(values)
    if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return torch.tensor(values)
    return values


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the conditions of two parts of a batch, one after the other."""
    return {
        name: torch.cat([value, second[name]])
        if isinstance(value, Tensor)
        else [*value, *second[name]]
        for name, value in first.items()
    }


def sliced(cond: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Returns the conditions of some rows."""
    return {name: value[rows] for name, value in cond.items()}


@contextmanager
def frozen(denoiser: Denoiser) -> Iterator[None]:
    """Keeps a network from being trained, and from dropout, for a while; then as it was."""
    training = denoiser.training
    learned = [p for p in denoiser.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train(training)
        for p in learned:
            p.requires_grad_(True)


@dataclass(frozen=True)
class Unrolled:
    r"""Runs numbers of a structure with a model, differentiably.

    Attributes:
        denoiser: The model.
        structure: The rows.
        remat: Whether each network call is computed again in the backward pass, so that memory
            does not grow with the number of calls; a third more time.
        gradient: ``"full"``, or ``"cut"``: the network's answers count as constants, so that no
            gradient goes through it. A third of the cost, a worse end.
        keep_states: Whether the states on the way are returned too.
    """

    denoiser: Denoiser
    structure: Structure
    remat: bool = True
    gradient: str = "full"
    keep_states: bool = False

    def __call__(
        self, numbers: Numbers, x: Tensor, draws: Sequence[Tensor], cond: Mapping[str, Any]
    ) -> Outcome:
        r"""Returns what becomes of initial states x, (B, \*), with draws each (B, \*)."""
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

        remat = self.remat and self.gradient == "full" and torch.is_grad_enabled()
        end = functional(
            self.structure,
            numbers.values,
            numbers.times,
            network,
            x,
            draw=draws.__getitem__,
            checkpoint=remat,
        )
        # Calls that are computed again in the backward pass append once more, after this.
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
) -> Tensor:
    r"""Adds the gradient of a loss of the whole batch to the parameters; returns the loss.

    With micro-batches, exactly the gradient of the whole batch, whatever the loss: first all
    samples without a graph, then the gradient G of the loss with respect to them, then each
    micro-batch again with a graph, back-propagating :math:`\langle G_i, x_i \rangle`.

    Arguments:
        learned: The learned plan.
        run: What runs it.
        x: The initial states, with shape (B, \*).
        draws: The draws, each (B, \*).
        cond: The conditions, one value a sample.
        loss: Takes the outcome of the whole batch, returns a scalar.
        microbatch: The samples of a micro-batch; left out, all.
        leaf: The initial states whose gradient is wanted too, if ``x`` follows from them.
    """
    n = len(x)
    if microbatch is None or microbatch >= n:
        value = loss(run(learned(), x, draws, cond))
        if value.requires_grad:
            value.backward()
        return value.detach()
    if leaf is not None:
        raise ValueError("moving noise needs the whole batch at once; leave microbatch out")
    parts = [slice(start, min(start + microbatch, n)) for start in range(0, n, microbatch)]
    with torch.no_grad():
        numbers = learned()
        made = [run(numbers, x[p], [z[p] for z in draws], sliced(cond, p)) for p in parts]
    whole = Outcome(
        torch.cat([m.x for m in made]),
        tuple(torch.cat(states) for states in zip(*(m.states for m in made), strict=True)),
    )
    tensors = [whole.x, *whole.states]
    for tensor in tensors:
        tensor.requires_grad_()
    value = loss(whole)
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    for p in parts:
        again = run(learned(), x[p], [z[p] for z in draws], sliced(cond, p))
        total = x.new_zeros(())
        for tensor, gradient in zip([again.x, *again.states], gradients, strict=True):
            if gradient is not None:
                total = total + (gradient[p] * tensor).sum()
        if total.requires_grad:
            total.backward()
    return value.detach()

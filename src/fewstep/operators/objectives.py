r"""What a student is trained on: the states of a forward pass, its loss, and its measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.operators.flow_map import FlowMap
from fewstep.operators.losses import Distance, loss_weights, mean_slope
from fewstep.operators.operator import Operator, TrajectoryOperator
from fewstep.operators.students import DistillRecipe
from fewstep.training.checkpoints import generator


class Objective(ABC):
    """The loss of a student on recorded trajectories.

    Attributes:
        columns: The number of losses that are logged.
        frames: The indices of the stored states that it measures with, the input's left out.
    """

    columns: int
    frames: list[int]

    def drawn(self, part: int) -> list[int]:
        """Returns the indices of the stored states that the forward pass of that number needs, besides the input's."""
        del part
        return self.frames

    @abstractmethod
    def losses(
        self,
        call: Any,
        states: Tensor,
        cond: Mapping[str, Any],
        part: int,
        rank: int,
        *,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Returns the mean loss of rows of a forward pass, and the losses for the log, (columns).

        Arguments:
            call: The student, as prepared for its devices.
            states: The recorded states, (B, 1 + S, \*), the input's first.
            cond: The conditions.
            part: The number of the forward pass, from which its draws follow.
            rank: The number of the process.
            first: The first of these rows, if they are some of those of the pass.
            count: The rows of the pass; left out, these.
        """

    @abstractmethod
    def errors(self, student: Any, states: Tensor, cond: Mapping[str, Any]) -> Tensor:
        r"""Returns mean squared errors, (B, number of measurements); the last is the one to read.

        Arguments:
            student: The student.
            states: The recorded states, (B, 1 + S, \*), of :attr:`frames`.
            cond: The conditions.
        """


class FrameObjective(Objective):
    r"""The states at M times: :math:`\frac1M \sum_m \lambda_m d(\hat x(t_m), x(t_m))`.

    Unless the recipe fixes them, number and times of the frames are drawn for each forward pass; the losses
    for the log are then that of all frames but the last, and that of the last.

    Arguments:
        student: The student.
        recipe: The recipe.
        distance: The distance of states.
        stored: The stored times.
        frames: The frames of the finished student.
    """

    def __init__(
        self,
        student: TrajectoryOperator,
        recipe: DistillRecipe,
        distance: Distance,
        stored: Sequence[float],
        frames: list[int],
    ) -> None:
        self.student, self.recipe, self.distance = student, recipe, distance
        self.stored, self.frames = list(stored), frames
        self.counts = recipe.frame_counts
        self.columns = len(frames) if self.counts is None else 2
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self.weights(frames)  # refuses weights that do not fit, before the first step

    def weights(self, frames: Sequence[int]) -> Tensor:
        """Returns the weights of frames, with a mean of 1, float32."""
        key = tuple(frames)
        if key not in self._weights:
            recipe = self.recipe
            values = loss_weights(
                self.student.schedule,
                [self.stored[i] for i in frames],
                recipe.weights if len(self.frames) > 1 else "uniform",
                lambda_max=recipe.lambda_max,
            )
            self._weights[key] = (values / values.mean()).float()
        return self._weights[key]

    def drawn(self, part: int) -> list[int]:
        if self.counts is None:
            return self.frames
        most = self.frames[-1] - 1  # the stored states between the input and the sample
        low, high = (min(n, most + 1) for n in self.counts)
        draw = generator(self.recipe.seed, "frames", part)
        count = int(torch.randint(low, high + 1, (1,), generator=draw))
        between = torch.randperm(most, generator=draw)[: count - 1] + 1
        return [*sorted(between.tolist()), self.frames[-1]]

    def losses(
        self,
        call: Any,
        states: Tensor,
        cond: Mapping[str, Any],
        part: int,
        rank: int,
        *,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        del rank, first, count  # all rows have the same frames
        frames = self.drawn(part)
        if self.counts is not None:
            self.student.set_times([self.stored[i] for i in frames])
        each = distances(self.distance, call(states[:, 0], **cond), states[:, 1:])
        weights = self.weights(frames).to(each.device)
        loss = (weights * each).mean()
        if self.counts is None:
            return loss, each.detach()
        before = each[:-1].mean() if len(each) > 1 else each[-1]
        return loss, torch.stack([before, each[-1]]).detach()

    def errors(self, student: Any, states: Tensor, cond: Mapping[str, Any]) -> Tensor:
        student.set_times([self.stored[i] for i in self.frames])
        outputs = student(states[:, 0], **cond)
        return (outputs.float() - states[:, 1:]).square().flatten(2).mean(2)


class FlowMapObjective(Objective):
    r"""The mean slopes between pairs of knots, :math:`d(F(x_t, t, s), \frac{y_s - y_t}{\kappa_s - \kappa_t})`.

    Each trajectory of a batch has its own pair. With ``pairs="steps"`` a budget is drawn, then a step of it, then
    whether it goes to the next knot or to the last, as with fresh noise; so each budget has an equal share
    of the training. With ``"all"`` each pair is equally likely.

    Arguments:
        student: The student.
        recipe: The recipe.
        distance: The distance of slopes.
        frames: The indices of the knots among the stored times, the input's left out.
    """

    def __init__(
        self, student: FlowMap, recipe: DistillRecipe, distance: Distance, frames: list[int]
    ) -> None:
        self.student, self.recipe, self.distance = student, recipe, distance
        self.frames = frames
        self.columns = 1
        self.paths = [student.path(n) for n in student.layout.budgets]

    def pairs(self, count: int, part: int, rank: int) -> tuple[Tensor, Tensor]:
        """Returns the first and the second knots of a batch, (B) each, drawn for a forward pass."""
        draw = generator(self.recipe.seed, "pairs", part, rank)
        last = len(self.frames)
        if self.recipe.pairs == "all":
            every = torch.triu_indices(last + 1, last + 1, 1)
            chosen = every[:, torch.randint(every.shape[1], (count,), generator=draw)]
            return chosen[0], chosen[1]
        shares = torch.rand(3, count, generator=draw, dtype=torch.float64)
        first, second = [], []
        for budget, step, end in shares.T.tolist():
            path = self.paths[int(budget * len(self.paths))]
            place = int(step * (len(path) - 1))
            first.append(path[place])
            second.append(last if end < 0.5 else path[place + 1])
        return torch.tensor(first), torch.tensor(second)

    def losses(
        self,
        call: Any,
        states: Tensor,
        cond: Mapping[str, Any],
        part: int,
        rank: int,
        *,
        first: int = 0,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(states), device=states.device)
        pairs = self.pairs(count or len(states), part, rank)
        start, end = (k[first : first + len(states)].to(states.device) for k in pairs)
        x = states[rows, start]
        keep, gain = self.student.coefficients(start, end, x)
        target = mean_slope(x, states[rows, end], keep, gain)
        outputs = call(x, start, end, **cond)
        each = distances(self.distance, outputs[:, None], target[:, None])
        return each.mean(), each.detach()

    def errors(self, student: Any, states: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Returns the mean squared errors of the samples of each budget, that of the fewest evaluations last."""
        values = []
        for path in reversed(self.paths):
            x = states[:, 0]
            for first, second in pairwise(path):
                x = student.step(x, first, second, **cond).float()
            values.append((x - states[:, -1]).square().flatten(1).mean(1))
        return torch.stack(values, 1)


def objective_of(
    student: Operator,
    recipe: DistillRecipe,
    distance: Distance,
    stored: Sequence[float],
    frames: list[int],
) -> Objective:
    """Returns the objective of a student.

    Raises:
        ValueError: If the weights of its frames do not fit.
    """
    if isinstance(student, FlowMap):
        return FlowMapObjective(student, recipe, distance, frames)
    assert isinstance(student, TrajectoryOperator)
    return FrameObjective(student, recipe, distance, stored, frames)


def distances(distance: Distance, states: Tensor, target: Tensor) -> Tensor:
    """Returns the mean distance of each frame of states (B, M, *), with shape (M).

    Raises:
        ValueError: If the distance does not return one number per state.
    """
    batch, frames = states.shape[:2]
    each = distance(states.float().flatten(0, 1), target.flatten(0, 1))
    if each.shape != (batch * frames,):
        raise ValueError(
            f"a distance returns one number per state, shape ({batch * frames},), got "
            f"{tuple(each.shape)}"
        )
    return each.unflatten(0, (batch, frames)).mean(0)

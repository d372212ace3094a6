r"""What a student is trained on: the states of a forward pass, its loss, and its measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.models.conditions import select
from fewstep.operators.correctors import Corrector, Draws
from fewstep.operators.flow_map import FlowMap
from fewstep.operators.losses import Distance, loss_weights, mean_slope
from fewstep.operators.operator import Operator, TrajectoryOperator
from fewstep.operators.students import DistillRecipe
from fewstep.training.checkpoints import generator


class Rows(NamedTuple):
    r"""Rows of a forward pass in training.

    Attributes:
        states: The recorded states, (B, 1 + S, \*), the input's first.
        cond: The conditions.
        part: The number of the forward pass, from which its draws follow.
        places: The places of these rows in the batch of all processes.
        total: The rows of that batch.
    """

    states: Tensor
    cond: Mapping[str, Any]
    part: int
    places: Sequence[int]
    total: int


class Objective(ABC):
    """The loss of a student on recorded trajectories.

    Attributes:
        columns: The number of losses that are logged.
        frames: The indices of the stored states that it measures with, the input's left out.
        corrector: The corrector that it uses, or ``None``.
    """

    columns: int
    frames: list[int]
    corrector: Corrector | None = None

    def drawn(self, part: int) -> list[int]:
        """Returns the indices of the stored states that the forward pass of that number needs, besides the input's."""
        del part
        return self.frames

    @abstractmethod
    def losses(self, call: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        r"""Returns the mean loss of rows of a forward pass, and the losses for the log, (columns).

        What is drawn for a row depends on its place alone, not on the other rows of the call.

        Arguments:
            call: The student, as prepared for its devices.
            rows: The rows.
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

    def losses(self, call: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        frames = self.drawn(rows.part)
        if self.counts is not None:
            self.student.set_times([self.stored[i] for i in frames])
        outputs = call(rows.states[:, 0], **rows.cond)
        each = distances(self.distance, outputs, rows.states[:, 1:])
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

    Three options, each off by default, change shares of the pairs or add to their loss:

    - ``own_states``: the step starts from the student's own state at t, reached by the steps of the drawn budget,
      and its target goes to the recorded state. So later steps are trained on what they are given in use.
    - ``consistency``: the target is the student's own way from t to s through a knot r between, such that it is
      trained on both steps.
    - a corrector, for the pairs that go to the last knot, whose states are samples.

    The student's own states and targets have no gradient.

    Arguments:
        student: The student.
        recipe: The recipe.
        distance: The distance of slopes.
        frames: The indices of the knots among the stored times, the input's left out.
        corrector: The corrector of the recipe, or ``None``.
    """

    def __init__(
        self,
        student: FlowMap,
        recipe: DistillRecipe,
        distance: Distance,
        frames: list[int],
        corrector: Corrector | None = None,
    ) -> None:
        self.student, self.recipe, self.distance = student, recipe, distance
        self.frames, self.corrector = frames, corrector
        self.columns = 1 + (0 if corrector is None else corrector.columns)
        self.paths = [student.path(n) for n in student.layout.budgets]

    def steps(self, count: int, part: int) -> list[tuple[list[int], int]]:
        """Returns the pairs of a batch, drawn for a forward pass: the knots from 0 to the first, and the second."""
        draw = generator(self.recipe.seed, "pairs", part, 0)
        last = len(self.frames)
        if self.recipe.pairs == "all":
            every = torch.triu_indices(last + 1, last + 1, 1)
            chosen = every[:, torch.randint(every.shape[1], (count,), generator=draw)]
            return [([0, i] if i else [0], j) for i, j in chosen.T.tolist()]
        shares = torch.rand(3, count, generator=draw, dtype=torch.float64)
        steps = []
        for budget, step, end in shares.T.tolist():
            path = self.paths[int(budget * len(self.paths))]
            place = int(step * (len(path) - 1))
            steps.append((path[: place + 1], last if end < 0.5 else path[place + 1]))
        return steps

    def way(self, first: int, second: int, share: float) -> list[int]:
        """Returns the knots of a way in two steps that are both trained, or the pair itself if there is none.

        Arguments:
            first: The first knot.
            second: The second knot.
            share: A uniform number, which chooses the knot between.
        """
        last = len(self.frames)
        trained = {(knot, last) for path in self.paths for knot in path}
        trained |= {pair for path in self.paths for pair in pairwise(path)}
        between = [
            r
            for r in range(first + 1, second)
            if self.recipe.pairs == "all" or {(first, r), (r, second)} <= trained
        ]
        middle = between[int(share * len(between))] if between else None
        return [first, second] if middle is None else [first, middle, second]

    def pairs(self, count: int, part: int) -> tuple[Tensor, Tensor]:
        """Returns the first and the second knots of a batch, (B) each, drawn for a forward pass."""
        steps = self.steps(count, part)
        return torch.tensor([way[-1] for way, _ in steps]), torch.tensor([s for _, s in steps])

    def losses(self, call: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        states, cond, part, places, total = rows
        recipe, device = self.recipe, states.device
        drawn = self.steps(total, part)
        steps = [drawn[place] for place in places]
        draws = Draws(recipe.seed, part, total, places, device)
        each = torch.arange(len(states), device=device)
        start = torch.tensor([way[-1] for way, _ in steps], device=device)
        end = torch.tensor([second for _, second in steps], device=device)
        x, later = states[each, start], states[each, end]
        if recipe.own_states:
            ways = [way for way, _ in steps]
            chosen = (draws.uniform("own states") < recipe.own_states) & (start > 0)
            x = self._walked(states[:, 0], x, ways, chosen, cond)
        if recipe.consistency:
            shares = draws.uniform("knot between").tolist()
            ways = [
                self.way(at[-1], to, share) for (at, to), share in zip(steps, shares, strict=True)
            ]
            longer = torch.tensor([len(way) == 3 for way in ways], device=device)
            chosen = (draws.uniform("consistency") < recipe.consistency) & longer
            later = self._walked(x, later, ways, chosen, cond)
        keep, gain = self.student.coefficients(start, end, x)
        outputs = call(x, start, end, **cond)
        slopes = mean_slope(x, later, keep, gain)
        loss = distances(self.distance, outputs[:, None], slopes[:, None])
        log = loss.detach()
        if self.corrector is not None:
            more, numbers = self._corrected(
                keep * x + gain * outputs, start, end, cond, part, draws
            )
            # What is logged is the loss on recorded trajectories; of the others the gradients matter.
            loss, log = loss + more - more.detach(), torch.cat([log, numbers])
        return loss.mean(), log

    @torch.no_grad()
    def _walked(
        self,
        x: Tensor,
        otherwise: Tensor,
        ways: list[list[int]],
        chosen: Tensor,
        cond: Mapping[str, Any],
    ) -> Tensor:
        r"""Returns the student's own states at the ends of ways of knots, for the chosen rows; the others' as they are.

        Arguments:
            x: The states at the beginnings, with shape (B, \*).
            otherwise: The states of rows that are not chosen, with shape (B, \*).
            ways: The knots of each row.
            chosen: Whether each row is chosen, with shape (B).
            cond: The conditions.
        """
        result = torch.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, otherwise)
        picked = [i for i, is_chosen in enumerate(chosen.tolist()) if is_chosen]
        for step in range(max((len(ways[i]) - 1 for i in picked), default=0)):
            active = [i for i in picked if len(ways[i]) > step + 1]
            at, to = (
                torch.tensor([ways[i][k] for i in active], device=x.device)
                for k in (step, step + 1)
            )
            now = result[active]
            keep, gain = self.student.coefficients(at, to, now)
            slope = self.student(now, at, to, **select(cond, active))
            result[active] = keep * now + gain * slope.to(now.dtype)
        return result

    def _corrected(
        self,
        x: Tensor,
        start: Tensor,
        end: Tensor,
        cond: Mapping[str, Any],
        part: int,
        draws: Draws,
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean loss of the corrector over all rows, and its numbers for the log, (columns)."""
        corrector = self.corrector
        assert corrector is not None
        chosen = (end == len(self.frames)).nonzero().flatten()
        if not len(chosen):
            return torch.zeros((), device=x.device), torch.zeros(
                corrector.columns, device=x.device
            )
        own = select(cond, chosen)
        loss, second, numbers = corrector.losses(x[chosen], start[chosen], own, draws.of(chosen))
        # Its own network is trained alone first.
        step = part // self.recipe.accumulate
        weight = self.recipe.corrector_weight if step >= self.recipe.warmup else 0.0
        return (weight * loss + second).sum() / len(x), numbers.sum(0).float() / len(x)

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
    corrector: Corrector | None = None,
) -> Objective:
    """Returns the objective of a student.

    Arguments:
        student: The student.
        recipe: The recipe.
        distance: The distance of states, or of slopes.
        stored: The stored times.
        frames: The frames of the finished student.
        corrector: The corrector of the recipe, or ``None``.

    Raises:
        ValueError: If the weights of its frames do not fit.
    """
    if isinstance(student, FlowMap):
        return FlowMapObjective(student, recipe, distance, frames, corrector)
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

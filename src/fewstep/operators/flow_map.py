r"""Flow maps: a network with two times that goes from any knot of a trajectory to any later one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.operators.insertion import Site
from fewstep.operators.layout import SECOND_TIME, Layout, output_map
from fewstep.operators.operator import Operator, TrajectoryOperator
from fewstep.operators.second_time import noise_angle, second_times, time_sites
from fewstep.sampling.protocol import budgets_text


class FlowMap(Operator):
    r"""Maps the state at a knot t to the state at a later knot s, in one evaluation.

    In the coordinates :math:`y = x / \sigma`, :math:`\kappa = \alpha / \sigma` the probability-flow
    ODE is :math:`dy / d\kappa = x_0(x, t)`. The network is a copy of a denoiser's, conditioned on both times;
    its output, converted to data :math:`F` with the coefficients of t, is the mean slope of the solution,

    .. math:: F(x_t, t, s) = \frac{y_s - y_t}{\kappa_s - \kappa_t}, \qquad
        \hat x_s = \frac{\sigma_s}{\sigma_t} x_t
        + \left( \alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t} \right) F(x_t, t, s)

    so that :math:`s = t` is the identity for any output, and one network makes steps of any length.
    The embedding of the second time starts at zero: the untrained map is one step of DDIM
    from t to s. At :math:`\sigma_s = 0` the state is F, the sample.

    Cost: one evaluation a step, at the cost of the teacher's.

    References:
        | CMT: Mid-Training for Efficient Learning of Consistency, Mean Flow, and Flow Map Models (Hu et al., 2025)
        | https://arxiv.org/abs/2509.24526

    Arguments:
        teacher: The denoiser; it is copied, never changed.
        layout: The knots (``start`` and ``times``), and the numbers of evaluations (``budgets``).
        example: Conditions of one sample, for the evaluation that infers the channels of named sites.
        sites: The sites that the layout names, if their channels are known.
    """

    labels: Tensor
    second: Tensor
    keep: Tensor
    gain: Tensor
    shift: Tensor
    factor: Tensor

    @staticmethod
    def _known_sites(network: nn.Module) -> list[Site]:
        return time_sites(network)

    def __init__(
        self,
        teacher: Denoiser,
        layout: Layout,
        *,
        example: dict[str, Any] | None = None,
        sites: Sequence[Site] | None = None,
    ) -> None:
        super().__init__(teacher, layout, example=example, sites=sites)
        self.embeddings = second_times(self.network)
        self._lay_out()

    @property
    def knots(self) -> tuple[float, ...]:
        """The K + 1 times between which it maps, decreasing; the first is the initial state's."""
        return (self.layout.start, *self.layout.times)

    def path(self, nfe: int) -> list[int]:
        """Returns the numbers of the knots of a budget: 0, nfe - 1 between, spread evenly, and K.

        Raises:
            ValueError: If the budget is not one of ``layout.budgets``.
        """
        if nfe not in self.layout.budgets:
            raise ValueError(f"this operator makes {budgets_text(self.layout.budgets)}, not {nfe}")
        return spread(len(self.layout.times), nfe)

    def _lay_out(self) -> None:
        """Computes the factors of each pair of knots, (K, K + 1), and of each first time, (K)."""
        like, layout = next(self.parameters()), self.layout
        knots = torch.tensor(self.knots, dtype=torch.float64)
        alpha, sigma = self.schedule.scales(knots)
        ratio = sigma / sigma[:-1, None]
        gain = alpha - alpha[:-1, None] * ratio
        # At t itself with a last time of zero noise: state = keep x + gain (shift x + factor output).
        single = [
            output_map(self.schedule, self.model.native, [self.knots[-1]], t, layout)
            for t in self.knots[:-1]
        ]
        whole = gain[:, -1]
        tables = {
            "labels": torch.cat([one["labels"] for one in single]),
            "second": noise_angle(alpha, sigma),
            "keep": ratio,
            "gain": gain,
            "shift": (torch.cat([one["keep"] for one in single]) - ratio[:, -1]) / whole,
            "factor": torch.cat([one["gain"] for one in single]) / whole,
        }
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name, value in tables.items():
            setattr(self, name, value.to(device=like.device, dtype=kind))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlowMap:
        # Times and factors keep their precision for any type of weights.
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def forward(self, x: Tensor, first: Tensor, second: Tensor, **cond: Any) -> Tensor:
        r"""Returns the mean slope F, (B, \*), in the units of data.

        Arguments:
            x: The states at the first knots, with shape (B, \*).
            first: The numbers of the first knots, from 0, int64 with shape (B).
            second: The numbers of the second knots, each later than the first.
            cond: The conditions.
        """
        self._set_times(self.second[first], self.second[second])
        value = self.model.raw(x, self.labels[first], **cond)
        column = (-1, *[1] * (x.ndim - 1))
        shift = self.shift[first].to(x.dtype).reshape(column)
        factor = self.factor[first].to(x.dtype).reshape(column)
        return shift * x + factor * value.to(x.dtype)

    def predicted_data(self, x: Tensor, t: Tensor, knot: Tensor, **cond: Any) -> Tensor:
        r"""Returns the predicted data at any times, (B, \*): the network as a denoiser that knows a knot besides.

        Arguments:
            x: The states, with shape (B, \*).
            t: Their times in the schedule's units, with shape (B).
            knot: The number of a knot, whose time is the second time, int64 with shape (B).
            cond: The conditions.
        """
        alpha, sigma = self.schedule.scales(t.double().cpu())
        self._set_times(noise_angle(alpha, sigma).to(self.second), self.second[knot])
        return self.model(x, t, prediction=Prediction.X0, **cond)

    def _set_times(self, first: Tensor, second: Tensor) -> None:
        """Sets the two times of the next evaluation, as angles, (B) each."""
        times = torch.stack([first, second], -1)
        for block in self.embeddings:
            block.times = times

    def coefficients(self, first: Tensor, second: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the factors of state and slope, :math:`\hat x_s = a x_t + b F`, for states like these."""
        column = (-1, *[1] * (like.ndim - 1))
        keep, gain = self.keep[first, second], self.gain[first, second]
        return keep.to(like.dtype).reshape(column), gain.to(like.dtype).reshape(column)

    def step(self, x: Tensor, first: int, second: int, **cond: Any) -> Tensor:
        r"""Returns the states at a later knot, (B, \*); one evaluation.

        Arguments:
            x: The states at the first knot, with shape (B, \*).
            first: The number of their knot.
            second: The number of the later knot.
            cond: The conditions.
        """
        at = [torch.full((len(x),), k, device=x.device) for k in (first, second)]
        keep, gain = self.coefficients(at[0], at[1], x)
        return keep * x + gain * self(x, at[0], at[1], **cond)


def spread(intervals: int, steps: int) -> list[int]:
    """Returns the numbers of steps + 1 of the knots of so many intervals, spread evenly, with both ends."""
    return [round(k * intervals / steps) for k in range(steps + 1)]


def operator_of(
    teacher: Denoiser,
    layout: Layout,
    *,
    example: dict[str, Any] | None = None,
    sites: Sequence[Site] | None = None,
) -> Operator:
    """Returns the operator of a layout: a :class:`FlowMap` or a :class:`TrajectoryOperator`."""
    kind: Callable[..., Operator] = FlowMap if layout.extra == SECOND_TIME else TrajectoryOperator
    return kind(teacher, layout, example=example, sites=sites)

r"""Times as parameters: always decreasing, always within range, exactly the given ones at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.grids import TimeGrid

COORDINATES = ("time", "lambda")
LEAST_SHARE = 1e-3
"""No step gets shorter than this share of its length at the start: near-coincident nodes have huge weights."""


class LearnedTimes(nn.Module):
    r"""The knots of a grid as parameters; the first time and the end stay.

    In the coordinate u (time, or :math:`\lambda`), with the lengths :math:`g_i` of the start and logits
    :math:`\theta_i = 0` there,

    .. math:: u_i = u_0 + (u_K - u_0) \sum_{j \le i} \left( (1 - \epsilon) \frac{g_j e^{\theta_j}}{\sum_k g_k e^{\theta_k}}
        + \epsilon \frac{g_j}{\sum_k g_k} \right)

    A grid that ends at :math:`\sigma = 0` keeps that end; the time of its last evaluation moves above
    the smallest time of the schedule.

    Arguments:
        grid: The grid at the start.
        coordinate: ``"time"`` or ``"lambda"``.
    """

    knots: Tensor
    edges: Tensor

    def __init__(self, grid: TimeGrid, coordinate: str = "time") -> None:
        super().__init__()
        if coordinate not in COORDINATES:
            raise ValueError(f"coordinate must be 'time' or 'lambda', got {coordinate!r}")
        self.schedule, self.coordinate = grid.schedule, coordinate
        self.ends_at_zero = grid.ends_at_zero
        self.register_buffer("knots", grid.times.detach().clone())
        moving = self.knots[:-1] if grid.ends_at_zero else self.knots
        floor = torch.tensor([grid.schedule.t_min], dtype=torch.float64)
        if grid.ends_at_zero and float(moving[-1]) > float(floor):
            moving = torch.cat([moving, floor])
        self.free = max(0, len(moving) - 2)
        self.register_buffer(
            "edges", moving if coordinate == "time" else self.schedule.lam(moving)
        )
        self.logits = nn.Parameter(torch.zeros(max(0, len(moving) - 1), dtype=torch.float64))

    def forward(self) -> Tensor:
        """Returns the knots, float64, shape (K + 1)."""
        if not self.free:
            return self.knots
        lengths = self.edges.diff()
        raw = lengths * self.logits.exp()
        total = lengths.sum()
        # Written as a change of the lengths, which is exactly zero at the start.
        change = (1 - LEAST_SHARE) * (raw * (total / raw.sum()) - lengths)
        inner = self.edges[1:-1] + change.cumsum(0)[:-1]
        if self.coordinate == "lambda":
            inner = self.schedule.time(inner)
        end = self.knots[1 + len(inner) :]
        return torch.cat([self.knots[:1], inner, end])


class Shifts(nn.Module):
    r"""Shifts of the conditioning timesteps: :math:`\xi_k = h_k \tanh w_k`, zero at the start.

    :math:`h_k` is half of the smaller gap to a neighbouring time (above: the schedule's largest,
    below: its smallest), so that conditioning timesteps keep their order and their range.

    Arguments:
        evaluations: The number of network evaluations.
        top: The largest time of the schedule.
        bottom: The smallest.
    """

    def __init__(self, evaluations: int, top: float, bottom: float) -> None:
        super().__init__()
        self.top, self.bottom = top, bottom
        self.raw = nn.Parameter(torch.zeros(evaluations, dtype=torch.float64))

    def forward(self, times: Tensor) -> Tensor:
        """Returns the shifts of the times (K), decreasing or with repeats."""
        above = torch.cat([times.new_tensor([self.top]), times[:-1]]) - times
        below = times - torch.cat([times[1:], times.new_tensor([self.bottom])])
        room = torch.minimum(above, below).clamp(min=0) / 2
        return room * torch.tanh(self.raw)

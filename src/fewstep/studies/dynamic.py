r"""The best grid by dynamic programming on measured local errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy
import torch
from torch import Tensor

from fewstep.diffusion.quadrature import gauss_legendre
from fewstep.studies.local_errors import Path


@dataclass(frozen=True)
class BestGrid:
    """The result of dynamic programming.

    Attributes:
        times: Its times, from the start to the end, float64, shape (K + 1).
        head: Whether it begins with an analytic head start.
        cost: The root of the sum of the squared errors that remain at the end.
    """

    times: Tensor
    head: bool
    cost: float


class Costs(Protocol):
    """The squared errors that are left at the end of steps between nodes of a path.

    Attributes:
        path: The reference path.
        degree: The number of earlier nodes that a step uses besides its own, 0 to 2.
        size: The number of nodes.
    """

    path: Path
    degree: int
    size: int

    def zero(self) -> Tensor:
        """Returns the costs of first steps, by (i, j); infinite unless j comes after i."""
        ...

    def one(self, h: int) -> Tensor:
        """Returns the costs of steps with node h before, by (i, j)."""
        ...

    def two(self, h: int) -> Tensor:
        """Returns the costs of steps with nodes g, h before, by (g, i, j)."""
        ...


class StepCosts:
    r"""The squared error of each step of exponential Adams–Bashforth that remains at the end.

    A step from node i to node j with polynomial degree r in time through node i and r earlier ones
    loses :math:`\alpha_j \| y_j - y_i - \int_{\rho_i}^{\rho_j} P_r \, d\rho \|` with :math:`y = x / \alpha`; the
    cost is its square times the squared gain at j.

    Arguments:
        path: The reference path.
        degree: The highest degree, 0 to 2; the first steps have less history.
    """

    def __init__(self, path: Path, degree: int = 2) -> None:
        if degree not in (0, 1, 2):
            raise ValueError(f"degree must be 0, 1 or 2, got {degree!r}")
        s = path.schedule
        self.path, self.degree = path, degree
        self.size = len(path.times)
        alpha = s.alpha(path.times)
        self.t = path.times / path.times[0]
        self.weight = (alpha * path.gain).square()
        self.moments = _moments(path, self.t)
        y = path.x / alpha[:, None]
        # [i, j, R]: the error of the step of degree 0
        self.base = y[None] - y[:, None] - self.moments[..., 0, None] * path.eps[:, None]
        gaps = self.t[:, None] - self.t[None]
        gaps = torch.where(gaps == 0, torch.ones_like(gaps), gaps)
        # Newton's divided difference over (i, h).
        self.first = (path.eps[:, None] - path.eps[None]) / gaps[..., None]

    def zero(self) -> Tensor:
        """Returns the costs of first steps, by (i, j); infinite unless j comes after i."""
        cost = self.base.square().sum(-1) * self.weight
        order = torch.arange(self.size)
        return cost.masked_fill(order[:, None] >= order, math.inf)

    def one(self, h: int) -> Tensor:
        """Returns the costs of steps of degree 1 with node h before, by (i, j)."""
        m1 = self.moments[..., 1, None]
        lost = self.base - m1 * self.first[:, h][:, None]
        return self._masked(lost.square().sum(-1) * self.weight, h)

    def two(self, h: int) -> Tensor:
        """Returns the costs of steps of degree 2 with nodes g, h before, by (g, i, j)."""
        cost = torch.full((self.size,) * 3, math.inf, dtype=torch.float64)
        # Only g < h < i < j are steps: a twelfth of the cube, over all h.
        later = slice(h + 1, None)
        m1, m2 = self.moments[later, later, 1], self.moments[later, later, 2]
        lost = self.base[later, later] - m1[..., None] * self.first[later, h][:, None]
        gaps = self.t[later, None] - self.t[None, :h]
        # Newton's second difference over (i, h, g), by (i, g).
        second = (self.first[later, h][:, None] - self.first[h, :h][None]) / gaps[..., None]
        factor = m2 + (self.t[later] - self.t[h])[:, None] * m1
        # |lost - factor * second|^2, multiplied out: one product of matrices for all g.
        crossed = torch.bmm(lost, second.transpose(1, 2)).permute(2, 0, 1)
        sizes = second.square().sum(-1).T[..., None]
        square = lost.square().sum(-1) - 2 * factor * crossed + factor.square() * sizes
        cost[:h, later, later] = square.clamp_min(0) * self.weight[later]
        return self._masked(cost, h)

    def _masked(self, cost: Tensor, h: int) -> Tensor:
        order = torch.arange(self.size)
        wrong = (order[:, None] >= order) | (order[:, None] <= h)
        return cost.masked_fill(wrong, math.inf)


class FittedStepCosts:
    r"""The squared error that is left at the end of each step whose weights are fitted to the path.

    A step from node i to node j takes the state and the predictions at node i and up to ``degree`` earlier
    nodes h, with the weights of :func:`fewstep.studies.multistep.fit_multistep`:

    .. math::
        \min_{v, w} \left\| x_j - v \frac{\alpha_j}{\alpha_i} x_i
            - \left( \sigma_j - \frac{\alpha_j}{\alpha_i} \sigma_i \right) \sum_h w_h \varepsilon_h \right\|^2

    Where a polynomial through the predictions is far off (few steps, a rough network) the best times
    are others than those of :class:`StepCosts`.

    Cost: no evaluations; some 100,000 systems of four equations for 41 nodes.

    Arguments:
        path: The reference path.
        degree: How many earlier predictions a step uses, 0 to 2.
        ridge: The ridge penalty of the weights, as in ``fit_multistep``.
    """

    def __init__(self, path: Path, degree: int = 2, *, ridge: float = 1e-4) -> None:
        if degree not in (0, 1, 2):
            raise ValueError(f"degree must be 0, 1 or 2, got {degree!r}")
        self.path, self.degree, self.ridge = path, degree, ridge
        self.size = len(path.times)
        vectors = torch.cat([path.x, path.eps])
        self.gram = vectors @ vectors.T
        alpha, sigma = path.schedule.alpha(path.times), path.schedule.sigma(path.times)
        self.ratio = alpha[None] / alpha[:, None]  # by (i, j)
        self.span = sigma[None] - self.ratio * sigma[:, None]

    def zero(self) -> Tensor:
        """Returns the costs of first steps, by (i, j); infinite unless j comes after i."""
        return self._table(2)

    def one(self, h: int) -> Tensor:
        """Returns the costs of steps with node h before, by (i, j)."""
        return self._ones[h]

    def two(self, h: int) -> Tensor:
        """Returns the costs of steps with nodes g, h before, by (g, i, j)."""
        return self._twos[:, h]

    @cached_property
    def _ones(self) -> Tensor:
        return self._table(3)

    @cached_property
    def _twos(self) -> Tensor:
        return self._table(4)

    def _table(self, nodes: int) -> Tensor:
        """Returns the costs by ``nodes`` increasing nodes, infinite for all others."""
        # torch.combinations walks all tuples, which are 24 times as many for four nodes.
        places = torch.tensor(list(itertools.combinations(range(self.size), nodes)))
        table = torch.full((self.size,) * nodes, math.inf, dtype=torch.float64)
        table[places.unbind(1)] = torch.cat([self._costs(part) for part in places.split(1 << 15)])
        return table

    def _costs(self, places: Tensor) -> Tensor:
        """Returns the costs of the steps from the last but one node to the last, shape (N)."""
        i, j, earlier = places[:, -2], places[:, -1], places[:, :-2].flip(1)
        ratio, span = self.ratio[i, j], self.span[i, j]
        # The vectors that occur: x_j, x_i, and the predictions at i and before.
        used = torch.stack([j, i, i + self.size, *(earlier + self.size).unbind(1)], 1)
        gram = self.gram[used[:, :, None], used[:, None, :]]
        # In these: what a DDIM step lacks, and what the weights multiply (as in fit_multistep).
        lacks = gram.new_zeros(used.shape)
        lacks[:, 0], lacks[:, 1], lacks[:, 2] = 1, -ratio, -span
        parts = gram.new_zeros((len(i), used.shape[1] - 1, used.shape[1]))
        parts[:, 0, 1], parts[:, 1, 2] = ratio, span
        for k in range(2, parts.shape[1]):
            parts[:, k, k + 1], parts[:, k, 2] = span, -span
        inner = parts @ gram @ parts.transpose(1, 2)
        right = (parts @ gram @ lacks[..., None])[..., 0]
        square = (lacks[:, None] @ gram @ lacks[..., None])[:, 0, 0]
        diagonal = inner.diagonal(dim1=1, dim2=2)
        tiny = 1e-18 * (1 + diagonal.amax(1, keepdim=True))
        weights = torch.linalg.solve(inner + (self.ridge * diagonal + tiny).diag_embed(), right)
        fitted = (weights[:, None] @ inner @ weights[..., None])[:, 0, 0]
        left = square - 2 * (weights * right).sum(1) + fitted
        return left.clamp_min(0) * self.path.gain[j].square()


def _moments(path: Path, t: Tensor) -> Tensor:
    r"""Returns :math:`\int_{\rho_i}^{\rho_j} (t - t_i)^p \, d\rho` for p = 0, 1, 2, shape (S, S, 3)."""
    s, (x, w) = path.schedule, gauss_legendre(8)
    u = -s.lam(path.times)
    middle, half = (u[1:] + u[:-1])[:, None] / 2, (u[1:] - u[:-1])[:, None] / 2
    points = middle + half * x
    time = s.time(-points.flatten()).reshape(points.shape) / path.times[0]
    weights = half * w * points.exp()
    size = len(t)
    moments = torch.zeros((size, size, 3), dtype=torch.float64)
    for i in range(size - 1):
        away = time[i:] - t[i]
        for p in range(3):
            moments[i, i + 1 :, p] = (weights[i:] * away**p).sum(1).cumsum(0)
    return moments


def best_grids(
    costs: Costs, most: int, *, head: bool = False, free_end: bool = True
) -> dict[int, BestGrid]:
    """Returns the best grid for each number of steps up to ``most``.

    Exact over all grids of nodes, for the sum of squared local errors that remain at the end.

    Arguments:
        costs: The costs of steps.
        most: The largest number of steps.
        head: Whether grids may begin with an analytic head start at any node.
        free_end: Whether they may end before the last node; the error of the end is counted.

    Raises:
        ValueError: If there are fewer nodes than steps.
    """
    if not 0 < most < costs.size:
        raise ValueError(f"{costs.size} nodes allow 1 to {costs.size - 1} steps, not {most}")
    path = costs.path
    starts = torch.full((costs.size,), math.inf, dtype=torch.float64)
    starts[0] = 0.0
    if head and path.head is not None:
        starts[1:] = (path.head * path.gain)[1:].square()
    ends = (path.x - path.x[-1]).square().sum(1)
    if not free_end:
        ends[:-1] = math.inf
    tables = _Tables(costs)
    best: dict[int, BestGrid] = {}
    layers = [tables.begin(starts)]
    for steps in range(1, most + 1):
        if steps > 1:
            layers.append(tables.extend(layers[-1]))
        nodes, cost = tables.read(layers, ends)
        best[steps] = BestGrid(
            path.times[nodes].clone(), bool(nodes[0] != 0) and head, math.sqrt(cost)
        )
    return best


@dataclass(frozen=True)
class _Layer:
    """The least cost of reaching each history, and the node before it on that path."""

    cost: Tensor
    before: Tensor


class _Tables:
    """Histories are tuples of ``degree + 1`` nodes (fewer at the start), the newest last."""

    def __init__(self, costs: Costs) -> None:
        self.costs, size = costs, costs.size
        self.zero = costs.zero()
        if costs.degree >= 1:
            self.one = torch.stack([costs.one(h) for h in range(size)])
        if costs.degree == 2:
            # Nodes increase, so of the cube for h only what is before and after it is kept.
            self.two = [costs.two(h)[:h, h + 1 :, h + 1 :].clone() for h in range(size)]

    def begin(self, starts: Tensor) -> _Layer:
        cost = starts[:, None] + self.zero
        if self.costs.degree == 0:
            best = cost.min(0)
            return _Layer(best.values, best.indices)
        return _Layer(cost, torch.zeros(0))

    def extend(self, last: _Layer) -> _Layer:
        cost = last.cost
        if self.costs.degree == 0:
            best = (cost[:, None] + self.zero).min(0)
            return _Layer(best.values, best.indices)
        if self.costs.degree == 1:
            best = (cost[:, :, None] + self.one).min(0)
            return _Layer(best.values, best.indices)
        if cost.ndim == 2:  # the second step: degree 1, and the history becomes full
            return _Layer(cost[:, :, None] + self.one, torch.zeros(0))
        values = torch.full_like(self.one, math.inf)
        before = torch.zeros(self.one.shape, dtype=torch.int64)
        for h, two in enumerate(self.two):
            if two.numel():
                best = (cost[:h, h, h + 1 :, None] + two).min(0)
                values[h, h + 1 :, h + 1 :] = best.values
                before[h, h + 1 :, h + 1 :] = best.indices
        return _Layer(values, before)

    def read(self, layers: list[_Layer], ends: Tensor) -> tuple[list[int], float]:
        """Returns the best grid's nodes, and its cost."""
        total = layers[-1].cost + ends
        flat = int(total.argmin())
        history = [int(k) for k in numpy.unravel_index(flat, total.shape)]
        cost, nodes = float(total.flatten()[flat]), list(history)
        for layer in reversed(layers):
            if not layer.before.numel():
                break
            before = int(layer.before[tuple(history)])
            nodes.insert(0, before)
            history = [before, *history[:-1]]
        return nodes, cost

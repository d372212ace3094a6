r"""Numerical integration in float64: Gauss–Legendre, Lagrange bases, :math:`\varphi`-functions.

Every function is differentiable in its tensor arguments, end points included, so that time
grids can be learned through the coefficients that are computed here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Returns the nodes and weights on [-1, 1], float64, exact up to degree ``2 * nodes - 1``."""
    x, w = numpy.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(x), torch.from_numpy(w)


def integrate(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    *,
    nodes: int = 24,
    breaks: Tensor | None = None,
) -> Tensor:
    r"""Returns :math:`\int_{start}^{end} f(u) \, du` by composite Gauss–Legendre.

    Arguments:
        function: Takes points with shape (M), returns values with shape (..., M).
        start: The lower end, a scalar.
        end: The upper end, a scalar; if it is below ``start``, the sign is that of the reversed integral.
        nodes: The number of nodes in each piece.
        breaks: Points between the ends, ordered from start to end, where the integrand has a
            kink: the rule is applied piece by piece.
    """
    x, w = gauss_legendre(nodes)
    edges = torch.stack([start, end])
    if breaks is not None and breaks.numel():
        edges = torch.cat([start[None], breaks, end[None]])
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    half = (edges[1:] - edges[:-1])[:, None] / 2
    points, weights = (middle + half * x).reshape(-1), (half * w).reshape(-1)
    return (function(points) * weights).sum(-1)


def lagrange(nodes: Sequence[Tensor], points: Tensor) -> Tensor:
    r"""Returns the Lagrange basis :math:`\ell_j` of the nodes at the points.

    Arguments:
        nodes: The q distinct nodes, scalars.
        points: The points, with shape (M).

    Returns:
        The values :math:`\ell_j(u_m) = \prod_{k \ne j} (u_m - v_k) / (v_j - v_k)`, shape (q, M).
    """
    rows = []
    for j, node in enumerate(nodes):
        row = torch.ones_like(points)
        for k, other in enumerate(nodes):
            if k != j:
                row = row * (points - other) / (node - other)
        rows.append(row)
    return torch.stack(rows)


ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of the Adams–Bashforth methods of order 1 to 4 on an even grid, newest first."""


def phi(order: int, z: Tensor) -> Tensor:
    r"""Returns :math:`\varphi_k(z)`, :math:`\varphi_0 = e^z`, :math:`\varphi_{k+1} = (\varphi_k - 1/k!) / z`.

    Stable for small arguments, where the recursion cancels and the Taylor series
    :math:`\sum_n z^n / (n + k)!` is summed instead.
    """
    if order == 0:
        return z.exp()
    if isinstance(z, float):
        return type(z)(_phi(order, float(z)))
    small = z.abs() < 1.0
    safe = torch.where(small, torch.ones_like(z), z)
    value = torch.expm1(safe) / safe
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / safe
    near = torch.where(small, z, torch.zeros_like(z))
    series = torch.zeros_like(z)
    for n in reversed(range(20)):
        series = series * near + 1 / math.factorial(n + order)
    return torch.where(small, series, value)


def _phi(order: int, z: float) -> float:
    if abs(z) < 1.0:
        series = 0.0
        for n in reversed(range(20)):
            series = series * z + 1 / math.factorial(n + order)
        return series
    value = math.expm1(z) / z
    for k in range(1, order):
        value = (value - 1 / math.factorial(k)) / z
    return value

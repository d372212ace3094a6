"""Interpolation between a few times, as a matrix that applies to states of any shape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fewstep.diffusion.quadrature import lagrange


def spline_matrix(knots: Tensor, points: Tensor) -> Tensor:
    """Returns the matrix that maps values at knots to a cubic spline's values at points.

    The ends are not-a-knot; with 2 or 3 knots it is the line or the parabola through them.

    Arguments:
        knots: The n distinct knots, float64, shape (n), increasing or decreasing.
        points: Where the spline is evaluated, float64, shape (P).

    Returns:
        The matrix, float64, shape (P, n).

    Raises:
        ValueError: If there are fewer than 2 knots, or they are not in strict order.
    """
    if knots.ndim != 1 or len(knots) < 2:
        raise ValueError(f"a spline needs at least 2 knots, got shape {tuple(knots.shape)}")
    knots, points = knots.double(), points.double()
    if bool((knots.diff() < 0).all()):
        knots, points = -knots, -points
    if not bool((knots.diff() > 0).all()):
        raise ValueError("the knots of a spline must increase or decrease strictly")
    n = len(knots)
    if n <= 3:
        return lagrange(list(knots.unbind()), points).T
    slopes = _slopes(tuple(knots.tolist()))
    place = torch.searchsorted(knots, points.contiguous(), right=True).clamp(1, n - 1) - 1
    h = knots.diff()[place]
    u = (points - knots[place]) / h
    eye = torch.eye(n, dtype=torch.float64)
    left, right = eye[place], eye[place + 1]
    u, h = u[:, None], h[:, None]
    return (
        (1 + 2 * u) * (1 - u) ** 2 * left
        + u**2 * (3 - 2 * u) * right
        + u * (1 - u) ** 2 * h * slopes[place]
        + u**2 * (u - 1) * h * slopes[place + 1]
    )


def spline_slopes(knots: Tensor) -> Tensor:
    """Returns the matrix that maps values at knots to the slopes there of the spline of :func:`spline_matrix`.

    Arguments:
        knots: The n increasing knots, at least 4, float64, shape (n).

    Raises:
        ValueError: If there are fewer than 4 knots, or they do not increase strictly.
    """
    if len(knots) < 4 or not bool((knots.diff() > 0).all()):
        raise ValueError(f"slopes need at least 4 increasing knots, got {knots.tolist()!r:.60}")
    return _slopes(tuple(knots.tolist()))


@functools.lru_cache(16)
def _slopes(places: tuple[float, ...]) -> Tensor:
    """Returns the matrix that maps values at knots to the spline's slopes there, (n, n)."""
    knots = torch.tensor(places, dtype=torch.float64)
    n, h = len(knots), knots.diff()
    eye = torch.eye(n, dtype=torch.float64)
    chord = (eye[1:] - eye[:-1]) / h[:, None]
    left = torch.zeros((n, n), dtype=torch.float64)
    right = torch.zeros((n, n), dtype=torch.float64)
    inner = torch.arange(1, n - 1)
    left[inner, inner - 1] = h[1:]
    left[inner, inner] = 2 * (h[:-1] + h[1:])
    left[inner, inner + 1] = h[:-1]
    right[1:-1] = 3 * (h[1:, None] * chord[:-1] + h[:-1, None] * chord[1:])
    for row, near, far, a, b in ((0, 0, 1, 0, 1), (n - 1, n - 1, n - 2, n - 2, n - 3)):
        d = h[a] + h[b]
        left[row, near], left[row, far] = h[b], d
        right[row] = ((h[a] + 2 * d) * h[b] * chord[a] + h[a] ** 2 * chord[b]) / d
    return torch.linalg.solve(left, right)

"""Quadrature, Lagrange bases and phi-functions against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.quadrature import ADAMS_BASHFORTH, gauss_legendre, integrate, lagrange, phi


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("nodes", [1, 2, 5, 8, 16, 32])
def test_gauss_legendre_is_exact_up_to_its_degree_and_not_above(nodes: int) -> None:
    x, w = gauss_legendre(nodes)
    for degree in (0, 1, 2 * nodes - 2, 2 * nodes - 1):
        exact = 2 / (degree + 1) if degree % 2 == 0 else 0.0
        assert float((w * x**degree).sum()) == pytest.approx(exact, abs=1e-14)
    if nodes <= 8:
        missed = float((w * x ** (2 * nodes)).sum()) - 2 / (2 * nodes + 1)
        assert abs(missed) > 1e-12


def test_the_sign_follows_the_direction() -> None:
    down = integrate(torch.exp, scalar(1.0), scalar(-2.0))
    assert float(down) == pytest.approx(math.exp(-2) - math.exp(1), abs=1e-14)


def test_kinks_are_integrated_piece_by_piece() -> None:
    def kinked(u: Tensor) -> Tensor:
        return (u - 0.3).abs() + (u + 0.2).abs()

    exact = 0.5 * (1.3**2 + 0.7**2) + 0.5 * (0.8**2 + 1.2**2)
    breaks = torch.tensor([-0.2, 0.3], dtype=torch.float64)
    ends = scalar(-1.0), scalar(1.0)
    assert float(integrate(kinked, *ends, nodes=2, breaks=breaks)) == pytest.approx(
        exact, abs=1e-14
    )
    assert abs(float(integrate(kinked, *ends, nodes=8)) - exact) > 1e-4
    assert float(integrate(kinked, *ends[::-1], nodes=2, breaks=breaks.flip(0))) == pytest.approx(
        -exact, abs=1e-14
    )


def test_several_functions_at_once() -> None:
    both = integrate(lambda u: torch.stack([u, u.square()]), scalar(0.0), scalar(2.0), nodes=2)
    assert torch.allclose(both, torch.tensor([2.0, 8 / 3], dtype=torch.float64), rtol=1e-14)


def test_integrals_are_differentiable_in_their_ends() -> None:
    ends = [scalar(0.3).requires_grad_(), scalar(1.7).requires_grad_()]
    value = integrate(torch.sin, *ends)
    low, high = torch.autograd.grad(value, ends)
    assert float(low) == pytest.approx(-math.sin(0.3), abs=1e-12)
    assert float(high) == pytest.approx(math.sin(1.7), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_lagrange_basis_reproduces_polynomials(count: int) -> None:
    nodes = [scalar(v) for v in (0.9, 0.31, -0.2, -1.4)[:count]]
    points = torch.linspace(-2, 2, 17, dtype=torch.float64)
    basis = lagrange(nodes, points)
    assert torch.allclose(basis.sum(0), torch.ones_like(points), rtol=1e-12)
    for degree in range(count):
        values = torch.stack(nodes) ** degree
        assert torch.allclose(values @ basis, points**degree, rtol=1e-12, atol=1e-12)
    at_nodes = lagrange(nodes, torch.stack(nodes))
    assert torch.allclose(at_nodes, torch.eye(count, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_adams_bashforth_is_the_integral_of_the_lagrange_basis(count: int) -> None:
    """Nodes 0, -1, -2, ... with step 1: the textbook weights, from the general routine."""
    nodes = [scalar(-float(j)) for j in range(count)]
    weights = integrate(lambda u: lagrange(nodes, u), scalar(0.0), scalar(1.0), nodes=4)
    expected = torch.tensor(ADAMS_BASHFORTH[count - 1], dtype=torch.float64)
    assert torch.allclose(weights, expected, rtol=1e-13)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "z", [-30.0, -3.0, -1.01, -0.99, -1e-3, -1e-9, 1e-9, 0.5, 0.999, 1.001, 6.0]
)
def test_phi_is_its_integral(order: int, z: float) -> None:
    r""":math:`\varphi_k(z) = \int_0^1 e^{(1 - s) z} s^{k - 1} / (k - 1)! \, ds`."""
    from scipy.integrate import quad

    if order == 0:
        expected = math.exp(z)
    else:
        factor = math.factorial(order - 1)
        expected = quad(
            lambda s: math.exp((1 - s) * z) * s ** (order - 1) / factor, 0, 1, epsabs=1e-14
        )[0]
    assert float(phi(order, scalar(z))) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_phi_at_zero_and_its_gradient(order: int) -> None:
    """phi_k(0) = 1 / k!, phi_k'(0) = 1 / (k + 1)!: regular, also for autograd."""
    z = scalar(0.0).requires_grad_()
    value = phi(order, z)
    (gradient,) = torch.autograd.grad(value, z)
    assert float(value.detach()) == pytest.approx(1 / math.factorial(order), rel=1e-15)
    assert float(gradient) == pytest.approx(1 / math.factorial(order + 1), rel=1e-14)
    for point in (-4.0, -0.3, 1.2):
        assert torch.autograd.gradcheck(lambda u: phi(order, u), (scalar(point).requires_grad_(),))

r"""Generalised Gaussian diffusion models (GGDM): tables of coefficients, their marginals, special cases.

States are counted from the noise: :math:`y_0` is the initial state, :math:`y_K` the sample, and
the network is evaluated at :math:`y_0 \dots y_{K-1}`. A table stands for

.. math:: q(y_n | y_{<n}, x_0) = N\left(\mu_{n,0} x_0 + \sum_{u<n} \mu_{n,u} y_u, \; s_n^2 I\right), \qquad
    y_0 = \alpha x_0 + \sigma z

and the sampler substitutes :math:`\hat x_0(y_{n-1})` for :math:`x_0`. The last row may be the
plain :math:`y_K = \hat x_0` (weights 1, 0, ..., 0; no noise) or any other.

References:
    | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
    | https://arxiv.org/abs/2202.05830
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan


class Table(NamedTuple):
    r"""The coefficients of a GGDM with K evaluations, float64.

    Attributes:
        data: The weights :math:`\mu_{n,0}` of the data, shape (K + 1); the first is that of
            :math:`y_0`.
        states: The weights :math:`\mu_{n,u}` of earlier states, shape (K + 1, K + 1), strictly
            lower triangular.
        noise: The step noises :math:`s_n`, shape (K + 1); the first is that of :math:`y_0`. The sign
            of a step noise has no effect.
    """

    data: Tensor
    states: Tensor
    noise: Tensor


def marginals(table: Table) -> tuple[Tensor, Tensor]:
    r"""Returns (a, v), each (K + 1): :math:`q(y_n | x_0) = N(a_n x_0, v_n I)`, Theorem 1 of the paper.

    In the form of matrices: with :math:`y_n = a_n x_0 + L_n z`,

    .. math:: a_n = \mu_{n,0} + \sum_{u<n} \mu_{n,u} a_u, \qquad
        L_n = s_n e_n + \sum_{u<n} \mu_{n,u} L_u, \qquad v_n = \|L_n\|^2

    Differentiable. Cost: of the order of K³ multiplications.
    """
    count = len(table.data)
    units = torch.eye(count, dtype=torch.float64)
    a, rows = [table.data[0]], [table.noise[0] * units[0]]
    for n in range(1, count):
        weights = table.states[n, :n]
        a.append(table.data[n] + weights @ torch.stack(a))
        rows.append(table.noise[n] * units[n] + weights @ torch.stack(rows))
    return torch.stack(a), torch.stack(rows).square().sum(1)


def markov(data: Tensor, previous: Tensor, noise: Tensor) -> Table:
    r"""Returns the table of a chain: :math:`y_n = \mu_{n,0} x_0 + \mu_{n,n-1} y_{n-1} + s_n z`.

    Arguments:
        data: The weights of the data, shape (K + 1), the first of the initial state.
        previous: The weights of the state before, shape (K).
        noise: The step noises, shape (K + 1).
    """
    return Table(data, torch.diag(previous, -1), noise)


def ddim_table(grid: TimeGrid, noise: Tensor) -> Table:
    r"""Returns the chain that preserves the marginals of the diffusion, given its step noises.

    .. math:: \mu_{n,n-1} = \sqrt{\sigma_n^2 - s_n^2} / \sigma_{n-1}, \qquad
        \mu_{n,0} = \alpha_n - \alpha_{n-1} \mu_{n,n-1}

    Arguments:
        grid: The K steps.
        noise: The noises :math:`s_1 \dots s_K`, shape (K), none above :math:`\sigma_n`.
    """
    alpha, sigma = grid.alpha, grid.sigma
    left = (sigma[1:].square() - noise.square()).clamp(min=0)
    # At sigma = 0 the root is zero and has no derivative.
    root = torch.where(left > 0, left, torch.ones_like(left)).sqrt()
    previous = torch.where(left > 0, root, torch.zeros_like(root)) / sigma[:-1]
    data = alpha[1:] - alpha[:-1] * previous
    return markov(torch.cat([alpha[:1], data]), previous, torch.cat([sigma[:1], noise]))


def vars_table(variances: Tensor) -> Table:
    r"""Returns DDPM whose marginal variances are free: VARS.

    .. math:: r_n = 1 - \frac{1 - v_{n-1}}{1 - v_n}, \quad \mu_{n,0} = \sqrt{1 - v_n} \frac{r_n}{v_{n-1}}, \quad
        \mu_{n,n-1} = \sqrt{\frac{1 - v_{n-1}}{1 - v_n}} \frac{v_n}{v_{n-1}}, \quad s_n^2 = r_n \frac{v_n}{v_{n-1}}

    (n counts from the noise, so :math:`v_{n-1} > v_n`).

    Arguments:
        variances: :math:`v_0 > v_1 > \dots > v_K`, shape (K + 1), in [0, 1); the last may be 0.
    """
    before, after = variances[:-1], variances[1:]
    ratio = (1 - before) / (1 - after)
    share = 1 - ratio
    data = (1 - after).sqrt() * share / before
    previous = ratio.sqrt() * after / before
    variance = share * after / before
    safe = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()
    noise = torch.where(variance > 0, safe, torch.zeros_like(safe))
    return markov(
        torch.cat([(1 - variances[:1]).sqrt(), data]),
        previous,
        torch.cat([variances[:1].sqrt(), noise]),
    )


def matched_table(states: Tensor, alpha: Tensor, sigma: Tensor) -> Table:
    r"""Returns the GGDM with these weights of states whose marginals are the diffusion's.

    With :math:`c_n = \sum_u \mu_{n,u} L_u`: :math:`s_n^2 = \sigma_n^2 - |c_n|^2` and
    :math:`\mu_{n,0} = \alpha_n - \sum_u \mu_{n,u} \alpha_u`. A row with :math:`|c_n| > \sigma_n` is
    scaled down to :math:`\sigma_n`.

    Arguments:
        states: The weights of earlier states, shape (K + 1, K + 1), strictly lower triangular.
        alpha: The scales of the data at the states, shape (K + 1).
        sigma: The scales of the noise, shape (K + 1).
    """
    count = len(alpha)
    units = torch.eye(count, dtype=torch.float64)
    rows, weights, noise = [sigma[0] * units[0]], [torch.zeros_like(states[0])], [sigma[0]]
    data = [alpha[0]]
    for n in range(1, count):
        c = states[n, :n] @ torch.stack(rows)
        most, length = sigma[n], c.square().sum()
        outside = length > most.square()
        # Rows at the limit stay there: rounding must not add noise.
        inside = length < most.square() * (1 - 1e-12)
        shrink = torch.where(
            outside, most / torch.where(outside, length, torch.ones_like(length)).sqrt(), 1.0
        )
        room = torch.where(inside, most.square() - length, torch.ones_like(length)).sqrt()
        s = torch.where(inside, room, torch.zeros_like(room))
        row = states[n] * shrink
        weights.append(row)
        noise.append(s)
        rows.append(c * shrink + s * units[n])
        data.append(alpha[n] - row[:n] @ alpha[:n])
    return Table(torch.stack(data), torch.stack(weights), torch.stack(noise))


def table_of(plan: Plan) -> Table:
    r"""Returns the GGDM that is the same sampler as a plan: its rows by back-substitution.

    Each state is a combination of the initial state, the predictions :math:`\hat x_0(y_j)` and draws;
    the prediction before the last is eliminated by the row of the state after it, and so on down.
    Differentiable in the plan's values.

    Arguments:
        plan: Any plan that starts with an evaluation at the initial state and in which each state
            but the first depends on the prediction just before, with at most one draw of its own.

    Raises:
        ValueError: If the plan does not have that form; the message names the state.
    """
    flat = convert_plan(plan, Prediction.X0).flat()
    if float(flat.a[0].detach()) != 1 or bool(flat.C[0].detach().any()):
        raise ValueError(f"{plan.name} changes the initial state before the first evaluation")
    rows = torch.cat([flat.a[:, None], flat.B], 1)
    count, size = plan.nfe + 1, float(rows.detach().abs().max())
    zero = torch.zeros((), dtype=torch.float64)
    alpha, sigma = plan.scales[0]
    data, states, noise = [alpha], [[zero] * count], [sigma]
    latest = -1
    for n in range(1, count):
        rest, draws = rows[n], flat.C[n]
        weights = [zero] * count
        data.append(rest[n])
        for u in range(n - 1, 0, -1):
            if abs(float(rows[u, u].detach())) < 1e-12 * size:
                raise ValueError(
                    f"state {u} of {plan.name} does not depend on the prediction before"
                )
            weight = rest[u] / rows[u, u]
            weights[u] = weight
            rest, draws = rest - weight * rows[u], draws - weight * flat.C[u]
        weights[0] = rest[0]
        states.append(weights)
        new = (draws.detach().abs() > 1e-9).nonzero().flatten().tolist()
        if len(new) > 1 or (new and new[0] != latest + 1):
            raise ValueError(f"state {n} of {plan.name} has not one draw of its own")
        latest = new[0] if new else latest
        noise.append(draws[latest] if new else zero)
    return Table(
        torch.stack(data), torch.stack([torch.stack(r) for r in states]), torch.stack(noise)
    )

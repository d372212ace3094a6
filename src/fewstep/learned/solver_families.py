r"""Families over a solver: learned times, conditioning timesteps and corrections of coefficients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.learned.learned_plan import Base, LearnedPlan, Numbers, structure_of
from fewstep.learned.learned_residual import LearnedResidual
from fewstep.learned.moving import LearnedTimes, Shifts
from fewstep.plans.plan import Plan
from fewstep.sampling.residual import Residual


class SolverFamily(LearnedPlan):
    r"""A solver with learned times, shifts of the conditioning timesteps, and corrections.

    .. math:: y_{n+1} = (A_n(\tau) + dA_n) \, y_n + \sum_{j \le n} (C_{nj}(\tau) + dC_{nj}) \, m_j + \dots, \qquad
        m_j = D(y_j, \tau_j + \xi_j)

    A and C are the solver's coefficients on the times :math:`\tau`, computed anew in each step of
    the search; everything else is zero at the start, where the sampler equals the solver to rounding.

    With ``noise`` each step but one onto the data draws noise, in an amount of its own:

    .. math:: y_{n+1} \mathrel{-}= \sigma_{n+1} (1 - \operatorname{sech} w_n) \, \varepsilon_n, \qquad
        y_{n+1} \mathrel{+}= \sigma_{n+1} \tanh(w_n) \, z_n

    so that a share of the predicted noise is replaced by as much fresh noise, as in DDIM with
    :math:`\eta`: the marginals stay. The sign of w has no effect, so that at w = 0 only the noise of
    the gradient moves it; an endpoint loss, whose target has no fresh noise, leaves it there.

    References:
        | Learning to Discretize Denoising Diffusion ODEs (Tong et al., 2024): times and shifts (``ld3``)
        | https://arxiv.org/abs/2405.15506
        | GAS: Improving Discretization of Diffusion ODEs via Generalized Adversarial Solver (Oganov et al., 2025): and corrections (``gs``)
        | https://arxiv.org/abs/2510.17699
        | Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models (Shaul et al., 2024) (``free``)
        | https://arxiv.org/abs/2403.01329
        | Denoising Diffusion Implicit Models (Song et al., 2021): amounts of noise, here one a step
        | https://arxiv.org/abs/2010.02502

    Arguments:
        base: The solver and its grid.
        times: Whether the times are learned.
        shifts: Whether the shifts :math:`\xi` of the conditioning timesteps are.
        corrections: Whether the corrections dA, dC are.
        noise: Whether the amounts w of fresh noise are; for deterministic solvers of one evaluation
            per step.
        residual: Whether a spatial residual corrects the predictions: tiny convolutions, for images and 2 to 4
            evaluations; they are not part of the plan and are stored beside the recipe.
        theory: Whether the solver's coefficients follow the times; if not they are those of the
            start (and the learned times are conditioning timesteps alone).
        coordinate: The coordinate in which times are learned: ``"time"`` or ``"lambda"``.
    """

    frozen: Tensor

    def __init__(
        self,
        base: Base,
        *,
        times: bool = True,
        shifts: bool = False,
        corrections: bool = False,
        noise: bool = False,
        residual: bool = False,
        theory: bool = True,
        coordinate: str = "time",
    ) -> None:
        super().__init__()
        if base.integer_times and (times or shifts):
            raise ValueError(
                "this network takes integer timesteps only, so times cannot be learned; use a family "
                "without learned times (ggdm, ggdm+pred, vars, ddim-sigma), or gs with "
                "times=false and shifts=false"
            )
        self.base, self.theory = base, theory
        plan = base.plan()
        self.learns_times, self.learns_conditioning = times, times or shifts
        self.times = LearnedTimes(base.grid, coordinate) if times else None
        schedule = base.schedule
        self.shifts = Shifts(plan.nfe, schedule.t_max, schedule.t_min) if shifts else None
        self._draws: dict[int, tuple[int, ...]] | None = None
        noisy = _noisy_steps(base, plan) if noise else 0
        if corrections or noise or not theory:
            self._draws = {n: (n,) for n in range(noisy)} if noise else _draws(plan)
            self.structure = structure_of(
                plan.prediction,
                plan.nfe,
                all_states=False,
                all_outputs=True,
                draws=self._draws,
                knots=plan.nfe == base.grid.steps,
            )
            start = self._stepwise(plan).detach()
        else:
            self.structure, start = plan.structure, plan.values.detach()
        self.register_buffer("frozen", start)
        self.corrector = LearnedResidual(plan.nfe, base.shape) if residual else None
        self.amounts = nn.Parameter(torch.zeros(noisy, dtype=torch.float64)) if noise else None
        self.corrections = None
        if corrections:
            counts = [n + 2 for n in range(plan.nfe)]
            self.corrections = nn.Parameter(torch.zeros(sum(counts), dtype=torch.float64))

    def residual(self) -> Residual | None:
        return None if self.corrector is None else self.corrector()

    def numbers(self) -> Numbers:
        knots = self.base.grid.times if self.times is None else self.times()
        times, values = knots[: self.structure.nfe], self.frozen
        if self.theory or self.structure.nfe != self.base.grid.steps:
            plan = self.base.plan(knots)
            times = plan.times
            if self.theory:
                values = plan.values if self._draws is None else self._stepwise(plan)
        if self.shifts is not None:
            times = times + self.shifts(times)
        if self.amounts is not None:
            values = values + self._noise(knots, self.amounts)
        if self.corrections is not None:
            values = values + self._corrections(self.corrections)
        return Numbers(values, times, knots)

    def _stepwise(self, plan: Plan) -> Tensor:
        """Returns a plan's coefficients in the structure's order; those of learned noise are zero."""
        assert self._draws is not None
        return stepwise(plan, self._draws, learned_noise=not plan.n_noise)

    def _noise(self, knots: Tensor, amounts: Tensor) -> Tensor:
        """Returns what fresh noise adds to the coefficients, in the structure's order."""
        grid = replace(self.base.grid, times=knots)
        prediction, count = self.structure.prediction, self.structure.nfe
        parts = list[Tensor]()
        for n in range(count):
            row = amounts.new_zeros(n + 2 + (n < len(amounts)))
            if n < len(amounts):
                alpha, sigma = grid.alpha[n], grid.sigma[n]
                a, b = coefficients(prediction, Prediction.EPS, alpha=alpha, sigma=sigma)
                less = grid.sigma[n + 1] * (1 - 1 / amounts[n].cosh())
                change = torch.stack([-less * a, -less * b, grid.sigma[n + 1] * amounts[n].tanh()])
                row = row.index_put((torch.tensor([0, n + 1, n + 2]),), change)
            parts.append(row)
        return torch.cat(parts)

    def _corrections(self, corrections: Tensor) -> Tensor:
        """Returns corrections in the structure's order, zero for the coefficients of draws."""
        assert self._draws is not None
        if not self._draws:
            return corrections
        parts = list[Tensor]()
        offset = 0
        for n in range(self.structure.nfe):
            parts.append(corrections[offset : offset + n + 2])
            parts.append(corrections.new_zeros(len(self._draws.get(n, ()))))
            offset += n + 2
        return torch.cat(parts)


def _noisy_steps(base: Base, plan: Plan) -> int:
    """Returns the number of steps that can draw noise: all but one that ends at zero noise."""
    if plan.n_noise:
        raise ValueError(
            f"{base.solver.name} draws noise already; amounts of noise are learned from a deterministic "
            "solver, or by the families ggdm and ddim-sigma"
        )
    if plan.nfe != base.grid.steps:
        raise ValueError(
            f"{base.solver.name} has {plan.nfe} evaluations in {base.grid.steps} steps; amounts of "
            "noise are learned for solvers with one evaluation per step"
        )
    noisy = plan.nfe - 1 if base.grid.ends_at_zero else plan.nfe
    if not noisy:
        raise ValueError("one step onto the data draws no noise; use a family without it")
    return noisy


def _draws(plan: Plan) -> dict[int, tuple[int, ...]]:
    """Returns the draws that enter each state n + 1 beyond those in state n."""
    _, _, noise = _steps(plan)
    return {
        n: tuple(new)
        for n, row in enumerate(noise)
        if (new := (row.detach().abs() > 1e-12).nonzero().flatten().tolist())
    }


def _steps(plan: Plan) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    r"""Returns A_n, C_n and D_n of :math:`y_{n+1} = A_n y_n + \sum_j C_{nj} m_j + \sum_k D_{nk} z_k`."""
    flat = plan.flat()
    a = flat.a.detach()
    if float(a[0]) != 1 or bool(flat.C[0].detach().any()):
        raise ValueError(
            f"{plan.name} changes the initial state before the first evaluation, so its coefficients "
            "cannot be corrected; use the family schedule or ld3"
        )
    if bool((a[:-1].abs() < 1e-12).any()):
        raise ValueError(
            f"{plan.name} evaluates the network at a state in which the initial state has no weight, "
            "so its coefficients cannot be corrected; use the family schedule or ld3"
        )
    scale, outputs, noise = list[Tensor](), list[Tensor](), list[Tensor]()
    for n in range(plan.nfe):
        ratio = flat.a[n + 1] / flat.a[n]
        scale.append(ratio)
        outputs.append(flat.B[n + 1] - ratio * flat.B[n])
        noise.append(flat.C[n + 1] - ratio * flat.C[n])
    return scale, outputs, noise


def stepwise(
    plan: Plan, draws: dict[int, tuple[int, ...]], *, learned_noise: bool = False
) -> Tensor:
    """Returns a plan's coefficients in the order of a structure of one state and all outputs.

    Arguments:
        plan: The plan.
        draws: The draws that the row of each state n + 1 reads.
        learned_noise: Whether these draws are not the plan's own: their coefficients are zero.
    """
    scale, outputs, noise = _steps(plan)
    parts = list[Tensor]()
    for n in range(plan.nfe):
        parts += [scale[n][None], outputs[n][: n + 1]]
        if n in draws:
            own = noise[n].new_zeros(len(draws[n])) if learned_noise else noise[n][list(draws[n])]
            parts.append(own)
    return torch.cat(parts)

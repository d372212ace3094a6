r"""Families over GGDM: learned weights of states, step noises and variances."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction
from fewstep.learned.ggdm import Table, ddim_table, marginals, matched_table, table_of, vars_table
from fewstep.learned.learned_plan import Base, LearnedPlan, Numbers, Start, structure_of
from fewstep.learned.moving import LearnedTimes
from fewstep.solvers import Solver
from fewstep.solvers.ddim import DDIM, DDPM

ROUNDING = 1e-9
"""What is left of weights of the order of 1 that cancel."""


class StateFamily(LearnedPlan):
    r"""Common part of the families over GGDM: a table, and how :math:`\hat x_0` is predicted.

    .. math:: y_{n+1} = \mu_{n+1,0} (p_n y_n - q_n \varepsilon_n) + \sum_{u \le n} \mu_{n+1,u} y_u + s_{n+1} z

    A subclass gives the table of its parameters, :meth:`table`.

    Arguments:
        base: The training-free sampler at the start.
        time: Whether the conditioning timesteps are learned (the table does not follow them).
        coordinate: The coordinate in which times are learned, ``"time"`` or ``"lambda"``.
        noisy: The indices of the states with a step noise.
    """

    default_start: ClassVar[Start] = Start("ddim")

    def __init__(self, base: Base, *, time: bool, coordinate: str, noisy: list[int]) -> None:
        super().__init__()
        if base.integer_times and time:
            raise ValueError(
                "this network takes integer timesteps only, so times cannot be learned; use the "
                "family without +time"
            )
        self.base = base
        self.learns_times = self.learns_conditioning = time
        self.times = LearnedTimes(base.grid, coordinate) if time else None
        self.noisy = noisy
        self.evaluations = base.grid.steps
        self.structure = structure_of(
            Prediction.EPS,
            self.evaluations,
            all_states=True,
            all_outputs=False,
            draws={n - 1: (index,) for index, n in enumerate(noisy)},
        )

    def table(self, knots: Tensor) -> Table:
        """Returns the present table."""
        raise NotImplementedError

    def weights(self, table: Table) -> tuple[Tensor, Tensor]:
        """Returns p and q, each (K); here by Theorem 1."""
        a, v = marginals(table)
        return 1 / a[:-1], v[:-1].sqrt() / a[:-1]

    def numbers(self) -> Numbers:
        knots = self.base.grid.times if self.times is None else self.times()
        table = self.table(knots)
        p, q = self.weights(table)
        parts = list[Tensor]()
        for n in range(self.evaluations):
            data = table.data[n + 1]
            row = torch.cat(
                [table.states[n + 1, :n], (table.states[n + 1, n] + data * p[n])[None]]
            )
            parts += [row, (-data * q[n])[None]]
            if n + 1 in self.noisy:
                parts.append(table.noise[n + 1][None])
        return Numbers(torch.cat(parts), knots[: self.evaluations], knots)


def _is_variance_preserving(base: Base) -> bool:
    t = base.grid.times[: base.grid.steps].detach()
    total = base.schedule.alpha(t).square() + base.schedule.sigma(t).square()
    return bool(torch.isclose(total, torch.ones_like(total), atol=1e-9).all())


class Variances(nn.Module):
    r"""Increasing variances in (0, 1) as parameters: cumulative sums of a softmax.

    Arguments:
        base: The grid; the variances start at its :math:`\sigma^2`.
    """

    shares: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__()
        if not _is_variance_preserving(base):
            raise ValueError(
                f"this family needs a schedule that preserves variance, {base.schedule.name!r} does "
                "not; use ggdm, ggdm+pred-free, or a family over a solver"
            )
        grid = base.grid
        self.ends_at_zero = grid.ends_at_zero
        v = grid.sigma.detach().square().flip(0)  # from the sample to the noise
        # The last share is alpha^2; computed as 1 - v it would lose half the digits.
        signal = grid.alpha.detach()[:1].square()
        inner = v.diff() if grid.ends_at_zero else torch.cat([v[:1], v.diff()])
        self.register_buffer("shares", torch.cat([inner, signal]))
        self.logits = nn.Parameter(torch.zeros(len(inner), dtype=torch.float64))

    def forward(self) -> Tensor:
        r"""Returns :math:`v_0 > \dots > v_K`, shape (K + 1)."""
        raw = self.shares * torch.cat([self.logits, self.logits.new_zeros(1)]).exp()
        v = (raw / raw.sum())[:-1].cumsum(0).flip(0)
        return torch.cat([v, v.new_zeros(1)]) if self.ends_at_zero else v


class DDIMSigma(StateFamily):
    r"""DDIM with learned step noises :math:`s_n = \sigma_n \tanh w_n`; the marginals are preserved.

    The hyperbolic tangent instead of a sigmoid, because DDIM itself (no noise) is then a point of
    the family with a gradient.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830

    Arguments:
        base: A grid with ``ddim``, of any eta.
        time: Whether the conditioning timesteps are learned.
        coordinate: The coordinate in which times are learned.
    """

    @classmethod
    def accepts(cls, solver: Solver, **options: Any) -> bool:
        return isinstance(solver, DDIM)

    def __init__(self, base: Base, *, time: bool = False, coordinate: str = "time") -> None:
        if not self.accepts(base.solver):
            raise ValueError(f"ddim-sigma starts from ddim, got {base.solver.name!r}")
        noisy = _noisy(base)
        super().__init__(base, time=time, coordinate=coordinate, noisy=noisy)
        start = table_of(base.plan()).noise[noisy] / base.grid.sigma[noisy]
        self.raw = nn.Parameter(torch.atanh(start.detach().clamp(max=1 - 1e-9)))

    def table(self, knots: Tensor) -> Table:
        del knots
        grid = self.base.grid
        noise = torch.zeros(self.evaluations, dtype=torch.float64)
        index = torch.tensor([n - 1 for n in self.noisy], dtype=torch.long)
        noise = noise.index_put((index,), grid.sigma[self.noisy] * torch.tanh(self.raw))
        return ddim_table(grid, noise)


class Vars(StateFamily):
    """DDPM with learned marginal variances.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830

    Arguments:
        base: A grid with ``ddpm``.
        time: Whether the conditioning timesteps are learned.
        coordinate: The coordinate in which times are learned.
    """

    default_start: ClassVar[Start] = Start("ddpm")

    @classmethod
    def accepts(cls, solver: Solver, **options: Any) -> bool:
        return isinstance(solver, DDPM) and solver.variance == "small"

    def __init__(self, base: Base, *, time: bool = False, coordinate: str = "time") -> None:
        if not self.accepts(base.solver):
            raise ValueError(f"vars starts from ddpm, got {base.solver.name!r}")
        super().__init__(base, time=time, coordinate=coordinate, noisy=_noisy(base))
        self.variances = Variances(base)

    def table(self, knots: Tensor) -> Table:
        del knots
        return vars_table(self.variances())

    def weights(self, table: Table) -> tuple[Tensor, Tensor]:
        del table
        return _from_variances(self.variances()[:-1])


def _from_variances(v: Tensor) -> tuple[Tensor, Tensor]:
    return 1 / (1 - v).sqrt(), (v / (1 - v)).sqrt()


def _noisy(base: Base) -> list[int]:
    """Returns the states with a step noise: all between, and the sample if the base adds noise there."""
    between = list(range(1, base.grid.steps))
    noisy_sample = base.plan().n_noise == base.grid.steps
    return [*between, base.grid.steps] if noisy_sample else between


class GGDM(StateFamily):
    r"""All weights of states free, and the step noises.

    The table is that of the base plus a residual that is zero at the start. Without ``pred`` the
    weights of :math:`\hat x_0` follow from the table by Theorem 1; with it they are parameters:

    - ``"vars"``: :math:`p = (1 - v)^{-1/2}, \; q = (v / (1 - v))^{1/2}` with learned variances,
    - ``"free"``: :math:`p = p^0 (1 + d), \; q = q^0 (1 + e)`. Relative, because at the noisy end
      :math:`p^0 = 1 / \alpha` is in the hundreds.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830

    Arguments:
        base: Any solver whose plan is a GGDM (see :func:`fewstep.learned.ggdm.table_of`).
        pred: ``None``, ``"vars"`` or ``"free"``.
        time: Whether the conditioning timesteps are learned.
        noise: Whether step noises are learned; if not they are the base's.
        matched: Whether the marginals stay those of the diffusion.
        theory: Whether the table of the base is computed anew from the learned times.
        coordinate: The coordinate in which times are learned.
    """

    lower: Tensor
    p: Tensor
    q: Tensor
    start_data: Tensor
    start_states: Tensor
    start_noise: Tensor

    @classmethod
    def accepts(cls, solver: Solver, **options: Any) -> bool:
        # With weights of its own for the prediction no marginals are needed.
        own = options.get("pred") is not None and not options.get("matched")
        return not solver.stochastic and (solver.exact or own)

    def __init__(
        self,
        base: Base,
        *,
        pred: str | None = None,
        time: bool = False,
        noise: bool = True,
        matched: bool = False,
        theory: bool = False,
        coordinate: str = "time",
    ) -> None:
        plan = base.plan()
        if plan.nfe != base.grid.steps:
            raise ValueError(
                f"{base.solver.name} has {plan.nfe} evaluations in {base.grid.steps} steps; GGDM "
                "starts from solvers with one evaluation per step"
            )
        if not (base.solver.exact or pred):
            raise ValueError(
                f"{base.solver.name} does not preserve the marginals, so x0 cannot be predicted by Theorem 1; "
                "start from ddim, tab3, dpmpp-2m, unipc3 or another exact solver, or use ggdm+pred"
            )
        start = Table(*(part.detach() for part in table_of(plan)))
        own = [n for n in range(1, plan.nfe + 1) if float(start.noise[n]) != 0]
        noisy = _noisy(base) if noise and not matched else own
        if matched:
            noisy = list(range(1, plan.nfe if base.grid.ends_at_zero else plan.nfe + 1))
        super().__init__(base, time=time, coordinate=coordinate, noisy=noisy)
        if pred not in (None, "vars", "free"):
            raise ValueError(f"pred must be None, 'vars' or 'free', got {pred!r}")
        self.pred, self.matched, self.theory = pred, matched, theory
        if matched and pred is not None:
            raise ValueError(
                "a GGDM that preserves the marginals predicts by Theorem 1; omit pred"
            )
        for key, tensor in zip(Table._fields, start, strict=True):
            self.register_buffer(f"start_{key}", tensor)
        count = plan.nfe
        last = torch.cat([start.data[-1:] - 1, start.states[-1], start.noise[-1:]])
        # A last row that is the prediction of x0 alone, up to rounding, has no parameters.
        rows = count + int(bool((last.abs() > ROUNDING).any()))
        lower = torch.tril_indices(rows, rows, -1)
        self.register_buffer("lower", lower, persistent=False)
        self.d_states = nn.Parameter(torch.zeros(lower.shape[1], dtype=torch.float64))
        if not matched:
            # The weights of the first state matter to Theorem 1 only.
            first = 0 if pred is None else 1
            self.d_data = nn.Parameter(torch.zeros(rows - first, dtype=torch.float64))
            learned = noisy if noise else []
            self.d_noise = nn.Parameter(torch.zeros(len(learned) + 1 - first, dtype=torch.float64))
        grid = base.grid
        self.register_buffer("p", (1 / grid.alpha[:-1]).detach())
        self.register_buffer("q", grid.rho[:-1].detach())
        self.variances = Variances(base) if pred == "vars" else None
        if pred == "free":
            self.d_p = nn.Parameter(torch.zeros(count, dtype=torch.float64))
            self.d_q = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def table(self, knots: Tensor) -> Table:
        start = Table(self.start_data, self.start_states, self.start_noise)
        if self.theory and self.learns_times:
            start = table_of(self.base.plan(knots))
        states = start.states.index_put(
            (self.lower[0], self.lower[1]),
            self.d_states,
            accumulate=True,
        )
        if self.matched:
            return matched_table(states, self.base.grid.alpha, self.base.grid.sigma)
        first = 0 if self.pred is None else 1
        data, noise = self._spread(self.d_data, first), start.noise
        # The weights of the first state are relative: that of the data may be 0.006.
        scale = torch.ones_like(start.data).index_fill(
            0, torch.tensor([0]), float(start.data[0].detach())
        )
        if self.d_noise.numel():
            where = [0] * (1 - first) + self.noisy[: self.d_noise.numel() - 1 + first]
            noise = noise.index_put((torch.tensor(where),), self.d_noise, accumulate=True)
        return Table(start.data + scale * data, states, noise)

    def _spread(self, values: Tensor, first: int) -> Tensor:
        total = self.evaluations + 1
        parts = [values.new_zeros(first), values, values.new_zeros(total - first - len(values))]
        return torch.cat(parts)

    def weights(self, table: Table) -> tuple[Tensor, Tensor]:
        if self.variances is not None:
            return _from_variances(self.variances()[:-1])
        if self.pred == "free":
            return self.p * (1 + self.d_p), self.q * (1 + self.d_q)
        return super().weights(table)

"""How fast each sampler converges: orders of the DEIS family, slopes of the accelerated ones.

Usage: python benchmarks/convergence.py [--only deis,accelerated] [--figures docs/figures]

Exact models, float64, no network. Part one: the smooth mixture in the plane, vp-linear, three
grids; RMS error of x(t_end) against a fine rho-rk4 run from the same 256 draws. Part two: a
mixture of three on the line, levels A from 0.01 to 0.97 uniform in log-SNR ("LS"), or times
uniform from 1 to 0.05 ("VP"), started from the exact law; the total variation between the law of the samples and
the truth, by change of variables (deterministic samplers) or by following the density on a grid
(stochastic ones). Nothing is estimated from draws, so there are no error bars.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fewstep
from _common import (
    FIGURES,
    figure,
    legend_beside,
    print_table,
    printed_to,
    rms,
    say_what_runs,
    slope,
    ticks,
)
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.noise import NoiseSource
from fewstep.models.exact import GaussianMixture
from fewstep.plans.checks import gaussian_moments
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Lin
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.protocol import Run
from fewstep.solvers import SOLVERS

DEIS = {
    "euler": 1, "ei-score": 1, "ddim": 1, "tab1": 2, "tab2": 3, "tab3": 4, "rhoab1": 2,
    "rhoab2": 3, "rhoab3": 4, "logrhoab1": 2, "logrhoab2": 3, "logrhoab3": 4, "rho-heun": 2,
    "rho-midpoint": 2, "rho-kutta3": 3, "rho-rk4": 4, "ipndm": 2,
}  # fmt: skip
"""The DEIS family, with the order that theory gives."""
FULL_ORDER = {name: {"lower_final": False} for name in ("logrhoab2", "logrhoab3")}
"""By default their order falls in the last steps, which pays at few evaluations and caps it at 2."""
CALLS = (12, 24, 48, 96, 192, 384, 768)
DETERMINISTIC = {
    "ddim-theory": 1, "ddim": 1, "accelerated-ddim-theory": 2, "accelerated-ddim-lagged": 2,
    "accelerated-ddim": 2, "dpm2": 2, "heun": 2, "dpmpp-2m": 2,
}  # fmt: skip
STOCHASTIC = (
    ("ddpm-theory", {}),
    ("ddim", {"eta": 1.0}),
    ("ddim", {"eta": 0.5}),
    ("accelerated-ddpm", {"variant": "inside"}),
    ("accelerated-ddpm", {"variant": "readme"}),
    ("accelerated-ddpm", {"variant": "cifar-code"}),
    ("accelerated-ddpm", {"variant": "fork"}),
)
STEPS = (16, 32, 64, 128, 256)
POINTS = torch.linspace(-5.0, 5.0, 601, dtype=torch.float64)
WIDTH = float(POINTS[1] - POINTS[0])


def run(denoiser: GaussianMixture, plan: Plan, x: Tensor) -> Tensor:
    """Returns where a plan takes states."""
    return PlanSampler(plan, denoiser).run(x, Run(NoiseSource(0, range(len(x))))).x


def deis(figures: Path) -> None:
    """Prints and draws the orders of the DEIS family."""
    model = fewstep.load("mixture-smooth")
    assert isinstance(model, GaussianMixture)
    x = torch.randn((256, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth, other = (
        run(model, fewstep.plan("rho-rk4", model.schedule, steps=k, grid="log-rho"), x)
        for k in (1500, 1000)
    )
    print(
        f"Orders of the DEIS family; RMS of the reference to a coarser one {rms(truth - other):.1e}\n"
    )
    curves: dict[str, dict[str, list[float]]] = {}
    for grid in ("quadratic", "log-rho", "karras"):
        curves[grid] = {}
        for name in DEIS:
            per_step = fewstep.plan(name, model.schedule, steps=12).nfe // 12
            errors = []
            for calls in CALLS:
                steps, options = calls // per_step, FULL_ORDER.get(name, {})
                plan = fewstep.plan(name, model.schedule, steps=steps, grid=grid, **options)
                errors.append(rms(run(model, plan, x) - truth))
            curves[grid][name] = errors
    head = ["solver", "theory"]
    for grid in curves:
        head += [f"{grid}: 12 evaluations", "96 evaluations", "768 evaluations", "order"]
    rows = []
    for name, order in DEIS.items():
        row = [name, str(order)]
        for found in curves.values():
            e = found[name]
            row += [*(f"{e[CALLS.index(k)]:.1e}" for k in (12, 96, 768)), f"{slope(e, CALLS):.2f}"]
        rows.append(row)
    print_table(head, rows)
    shown = ("euler", "ei-score", "ddim", "tab1", "tab2", "tab3", "rho-rk4", "ipndm")
    with figure("convergence-deis", figures, columns=2, sharey=True) as axes:
        for ax, grid in zip(axes, ("quadratic", "log-rho"), strict=True):
            for name in shown:
                ax.loglog(CALLS, curves[grid][name], marker="o", markersize=3, label=name)
            ax.set(xlabel="network evaluations", title=f"{grid} grid")
        axes[0].set_ylabel("RMS error")
        axes[1].legend(ncols=2, loc="lower left")


def levels(model: GaussianMixture, kind: str, steps: int) -> TimeGrid:
    """Returns the grid LS or VP of the accelerated samplers."""
    if kind == "VP":
        return fewstep.grid("uniform", model.schedule, steps, t_start=1.0, t_end=0.05)
    ends = torch.tensor([0.01, 0.97], dtype=torch.float64)
    start, end = model.schedule.time(0.5 * torch.logit(ends)).tolist()
    return fewstep.grid("log-rho", model.schedule, steps, t_start=start, t_end=end)


def law(model: GaussianMixture, t: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the density of the noised data at a time."""
    return lambda x: model.log_prob(x[:, None], t).exp()


def total_variation(model: GaussianMixture, plan: Plan, grid: TimeGrid) -> float:
    """Returns the total variation of a deterministic sampler started from the exact law.

    The sampler is a monotone map f of the line, so that the density of the samples at f(u) is
    p(u) / f'(u); the derivative is a central difference of fourth order on 8,001 points.
    """
    u = torch.linspace(-6, 6, 8_001, dtype=torch.float64)
    x = run(model, plan, u[:, None])[:, 0]
    start, end = (law(model, grid.times[k]) for k in (0, -1))
    if not bool((x.diff() > 0).all()):
        return float("nan")
    width = (8 * (x[3:-1] - x[1:-3]) - (x[4:] - x[:-4])) / 12
    density = start(u[2:-2]) * float(u[1] - u[0]) / width
    return 0.5 * float(((density - end(x[2:-2])).abs() * width).sum())


def followed(model: GaussianMixture, plan: Plan, grid: TimeGrid) -> float:
    """Returns the total variation of a stochastic sampler, its density followed on a grid.

    Each row of the plan is read as: noise added to a state, or a function of a state (and its
    network output) plus noise.
    """

    def through(density: Tensor, centres: Tensor, std: float) -> Tensor:
        kernel = torch.exp(-(POINTS[:, None] - centres).square() / (2 * std * std))
        return kernel @ density * (WIDTH / (std * math.sqrt(2 * math.pi)))

    density = law(model, grid.times[0])(POINTS)
    eps, register = torch.zeros(0), 0
    kinds = {0: "state"}
    step = 0
    for row in plan.structure.rows:
        register += 1
        if not isinstance(row, Lin):
            kinds[register] = "draw" if type(row).__name__ == "Noise" else "eps"
            if kinds[register] == "eps":
                eps = model(POINTS[:, None], grid.times[step])[:, 0]
                step += 1
            continue
        kinds[register] = "state"
        values = plan.values[row.offset : row.offset + len(row.terms)].tolist()
        weight = {"state": 0.0, "eps": 0.0, "draw": 0.0}
        for of, value in zip(row.terms, values, strict=True):
            kind = kinds[of]
            weight[kind] = math.hypot(weight[kind], value) if kind == "draw" else value
        centres = weight["state"] * POINTS + (weight["eps"] * eps if weight["eps"] else 0.0)
        density = through(density, centres, weight["draw"])
    truth = law(model, grid.times[-1])(POINTS)
    return 0.5 * float((density - truth).abs().sum() * WIDTH)


def gaussian(plan: Plan, grid: TimeGrid) -> float:
    """Returns the total variation on data N(0.4, 0.5^2), from the exact moments."""
    got = gaussian_moments(plan, 0.4, 0.5)
    a, s = grid.alpha[-1], grid.sigma[-1]
    truth = (a * 0.4, (a * 0.5).square() + s.square())
    x = torch.linspace(-6, 7, 20_001, dtype=torch.float64)

    def density(m: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-(x - m).square() / (2 * v)) / (2 * math.pi * v).sqrt()

    return 0.5 * float((density(*got) - density(*truth)).abs().sum() * (x[1] - x[0]))


def accelerated(figures: Path) -> None:
    """Prints and draws the slopes of the accelerated samplers."""
    schedule = fewstep.schedule("vp-linear")
    model = GaussianMixture([[-1.3], [0.35], [1.6]], [0.35, 0.25, 0.45], [0.3, 0.5, 0.2], schedule)
    plans: dict[str, dict[str, list[float]]] = {"LS": {}, "VP": {}}
    labels = [
        f"{name}({', '.join(map(str, options.values()))})" if options else name
        for name, options in STOCHASTIC
    ]
    for kind, found in plans.items():
        for name in DETERMINISTIC:
            grids = [levels(model, kind, k) for k in STEPS]
            found[name] = [total_variation(model, SOLVERS[name]().plan(g), g) for g in grids]
        for label, (name, options) in zip(labels, STOCHASTIC, strict=True):
            found[label] = []
            for k in STEPS:
                grid = levels(model, kind, k)
                found[label].append(followed(model, SOLVERS[name](**options).plan(grid), grid))
    print("Accelerated samplers: total variation at 16, 64 and 256 steps, order from 128 to 256\n")
    rows = [
        [name, *(cell for found in plans.values() for cell in shown(found[name]))]
        for name in plans["LS"]
    ]
    head = ["rule", *(c for k in plans for c in (f"{k}: 16", "64", "256", "order"))]
    print_table(head, rows)
    print("The same on Gaussian data, N(0.4, 0.5^2), LS: the rule (24) is of second order there\n")
    rows = []
    for label, (name, options) in zip(labels, STOCHASTIC, strict=True):
        found = []
        for k in STEPS:
            grid = levels(model, "LS", k)
            found.append(gaussian(SOLVERS[name](**options).plan(grid), grid))
        rows.append([label, *shown(found)])
    print_table(["rule", "LS: 16", "64", "256", "order"], rows)
    with figure("convergence-accelerated", figures, columns=2, sharey=True) as axes:
        for ax, (kind, found) in zip(axes, plans.items(), strict=True):
            for name, errors in found.items():
                if "code" in name or "readme" in name or "0.5" in name or name == "dpm2":
                    continue
                style = "--" if name not in DETERMINISTIC else "-"
                ax.loglog(STEPS, errors, style, marker="o", markersize=3, label=name)
            ax.set(xlabel="steps", title=f"{kind} levels")
            ticks(ax, STEPS)
        axes[0].set_ylabel("total variation")
        legend_beside(axes[1])


def shown(errors: list[float]) -> list[str]:
    """Returns the cells of a row."""
    picked = [f"{errors[STEPS.index(k)]:.1e}" for k in (16, 64, 256)]
    return [*picked, f"{slope(errors, STEPS):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="deis,accelerated")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say_what_runs("Exact models in float64; seed 0; no sampling error.")
    for part in arguments.only.split(","):
        with printed_to(f"convergence-{part}", seed=0):
            {"deis": deis, "accelerated": accelerated}[part](arguments.figures)


if __name__ == "__main__":
    main()

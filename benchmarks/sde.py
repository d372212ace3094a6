"""How much noise is worth: the lambda family of reverse equations at equal numbers of evaluations.

Usage: python benchmarks/sde.py [--only gaussian,line,mixtures,fashion] [-n 100] [--draws 5000]
           [--seed 4000] [--figures docs/figures]

`gddim` (lambda 0 is DDIM, lambda 1 is stochastic DDIM with eta = 1) and `euler-maruyama` (lambda
0 is Euler on the probability flow), all on the quadratic grid, and Euler-Maruyama on the uniform
grid too, as it is mostly run. Gaussian data: the 2-Wasserstein distance of the samples to the
truth from exact moments. Mixtures on the line: the exact total variation, by following the
density. Mixtures in the plane: sliced Wasserstein and kernel distance (Gaussian kernel) of samples
to as many exact draws, with 95 % jackknife intervals; "exact draws" is the floor. `fashion`: KID
to real images with 95 % intervals, and the share of samples whose asked class a classifier finds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import FIGURES, figure, legend_beside, print_table, printed_to, say_what_runs
from convergence import followed, total_variation
from fewstep import metrics
from fewstep.models.exact import GaussianMixture
from fewstep.plans.checks import gaussian_moments

MEMBERS: tuple[tuple[str, float, str], ...] = (
    ("gddim", 0.0, "quadratic"),
    ("gddim", 0.3, "quadratic"),
    ("gddim", 0.6, "quadratic"),
    ("gddim", 1.0, "quadratic"),
    ("euler-maruyama", 0.0, "quadratic"),
    ("euler-maruyama", 0.5, "quadratic"),
    ("euler-maruyama", 1.0, "quadratic"),
    ("euler-maruyama", 1.0, "uniform"),
)
BUDGETS = (10, 20, 50, 100, 200)
FEW_BUDGETS = (10, 20, 40)
FEW = (0, 3, 6, 7)
"""The members that are tried on the network."""


def label_of(member: tuple[str, float, str]) -> str:
    """Returns the name of a member."""
    grid = "" if member[2] == "quadratic" else f", {member[2]}"
    return f"{member[0]}, λ = {member[1]:g}{grid}"


def arguments(member: tuple[str, float, str]) -> dict[str, Any]:
    """Returns the arguments of `fewstep.sample` for a member."""
    return {"solver": member[0], "grid": member[2], "options": {"lam": member[1]}}


def draw(ax: Any, curves: dict[str, list[float]], budgets: tuple[int, ...], title: str) -> None:
    """Draws a family of curves, the one of Euler-Maruyama dashed."""
    for name, values in curves.items():
        style = "--" if name.startswith("euler") else "-"
        ax.loglog(budgets, values, style, marker="o", markersize=3, label=name)
    ax.set(xlabel="network evaluations", title=title)


def gaussian(options: argparse.Namespace) -> None:
    """Exact distances on Gaussian data."""
    schedule = fewstep.schedule("vp-linear")
    with figure("sde-gaussian", options.figures, columns=2, sharey=True) as axes:
        for ax, std in zip(axes, (0.3, 0.05), strict=True):
            curves: dict[str, list[float]] = {}
            for member in MEMBERS:
                name, lam, grid = member
                curves[label_of(member)] = []
                for nfe in BUDGETS:
                    plan = fewstep.plan(name, schedule, nfe=nfe, grid=grid, lam=lam)
                    got, t = gaussian_moments(plan, 0.4, std), plan.knots[-1]
                    a, s = schedule.alpha(t), schedule.sigma(t)
                    spread = (a.square() * std**2 + s.square()).sqrt()
                    far = (got.mean - a * 0.4).square() + (got.variance.sqrt() - spread).square()
                    curves[label_of(member)].append(float(far.sqrt()))
            print(f"Data N(0.4, {std}^2): exact 2-Wasserstein distance of the samples\n")
            rows = [[name, *(f"{v:.2e}" for v in values)] for name, values in curves.items()]
            print_table(["member", *map(str, BUDGETS)], rows)
            draw(ax, curves, BUDGETS, f"N(0.4, {std}²)")
        axes[0].set_ylabel("2-Wasserstein distance")
        legend_beside(axes[-1])


def line(options: argparse.Namespace) -> None:
    """Exact distances on mixtures on the line: the density is followed, nothing is drawn."""
    schedule, means, weights = (
        fewstep.schedule("vp-linear"),
        [[-1.3], [0.35], [1.6]],
        [0.3, 0.5, 0.2],
    )
    with figure("sde-line", options.figures, columns=2, sharey=True) as axes:
        for ax, stds in zip(axes, ([0.35, 0.25, 0.45], [0.05, 0.05, 0.05]), strict=True):
            model = GaussianMixture(means, stds, weights, schedule)
            curves: dict[str, list[float]] = {}
            for member in MEMBERS:
                name, lam, kind = member
                curves[label_of(member)] = []
                for nfe in BUDGETS:
                    grid = fewstep.grid(kind, schedule, nfe, t_start=1.0, t_end=0.05)
                    plan = fewstep.plan(name, schedule, grid=grid, lam=lam)
                    far = followed if lam else total_variation
                    curves[label_of(member)].append(far(model, plan, grid))
            print(
                f"Three modes on the line, stds {stds}, t from 1 to 0.05: exact total variation\n"
            )
            rows = [[name, *(f"{v:.2e}" for v in values)] for name, values in curves.items()]
            print_table(["member", *map(str, BUDGETS)], rows)
            draw(ax, curves, BUDGETS, f"stds {', '.join(map(str, stds))}")
        axes[0].set_ylabel("total variation")
        legend_beside(axes[-1])


def mixtures(options: argparse.Namespace) -> None:
    """Distances with intervals on the exact mixtures in the plane."""
    n = options.draws
    for name in ("mixture-smooth", "mixture-sharp"):
        model = fewstep.load(name)
        assert isinstance(model, GaussianMixture)
        end = model.schedule.t_min
        truth = model.draw(n, t=end, seed=options.seed)
        floor = cells(model.draw(n, t=end, seed=options.seed + 1), truth)
        rows = [["exact draws", *[floor[0]] * len(BUDGETS), floor[1]]]
        for member in MEMBERS:
            found = [
                cells(
                    fewstep.sample(
                        model, n, nfe=k, seed=options.seed, batch_size=n, **arguments(member)
                    ),
                    truth,
                )
                for k in BUDGETS
            ]
            rows.append([label_of(member), *(far for far, _ in found), found[-1][1]])
        print(
            f"{name}, {n} samples: sliced 2-Wasserstein distance, 95 %; MMD² at {BUDGETS[-1]} evaluations\n"
        )
        print_table(["member", *map(str, BUDGETS), "10³ MMD²"], rows)


def cells(x: Tensor, truth: Tensor) -> tuple[str, str]:
    """Returns two distances with intervals, as text."""
    far = metrics.sliced_wasserstein(x, truth, projections=64)
    some = slice(0, 1500)
    kernel = metrics.kid(x[some], truth[some], kernel="gaussian")
    width = 1e3 * (kernel.high - kernel.low) / 2
    return (
        f"{far.value:.4f} ± {(far.high - far.low) / 2:.4f}",
        f"{1e3 * kernel.value:.2f} ± {width:.2f}",
    )


def fashion(options: argparse.Namespace) -> None:
    """The embedded model, with few samples."""
    model, real = fewstep.load("fashion"), metrics.Reference.load("fashion")
    look = metrics.Features.load("fashion")
    labels = torch.arange(options.n) % 10
    rows, curves = [], {}
    for member in (MEMBERS[i] for i in FEW):
        row, values = [label_of(member)], []
        for nfe in FEW_BUDGETS:
            x = fewstep.sample(
                model,
                options.n,
                nfe=nfe,
                seed=options.seed,
                class_labels=labels,
                **arguments(member),
            )
            found = metrics.kid(x, real, heldout=True)
            share = float((look.classify(x) == labels).double().mean())
            row.append(f"{found.value:.2f} ± {(found.high - found.low) / 2:.2f} ({share:.0%})")
            values.append((found.value, found.low, found.high))
            print(row[0], nfe, row[-1], flush=True)
        rows.append(row)
        curves[row[0]] = values
    print(f"\nfashion, {options.n} samples, classes in turn: KID (share of asked classes found)\n")
    print_table(["member", *map(str, FEW_BUDGETS)], rows)
    with figure("sde-fashion", options.figures) as axes:
        for name, values in curves.items():
            middle, low, high = torch.tensor(values).T
            style = "--" if name.startswith("euler") else "-"
            bars = torch.stack([middle - low, high - middle]).numpy()
            axes[0].errorbar(FEW_BUDGETS, middle, bars, linestyle=style, capsize=2, label=name)
        axes[0].set(xlabel="network evaluations", ylabel="KID", title="fashion", yscale="symlog")
        legend_beside(axes[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="gaussian,line,mixtures,fashion")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=4000)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    say_what_runs(f"Seed {options.seed}.")
    parts = {"gaussian": gaussian, "line": line, "mixtures": mixtures, "fashion": fashion}
    for part in options.only.split(","):
        with printed_to(f"sde-{part}", seed=options.seed):
            parts[part](options)


if __name__ == "__main__":
    main()

"""The pages of the solvers: formula, order drawn from runs on closed-form models, and cost."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from html import escape

import torch
from docstrings import Links, markdown

import fewstep
from fewstep.base.aliases import ALIASES
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.noise import NoiseSource
from fewstep.models.exact import GaussianMixture, smooth
from fewstep.plans.checks import gaussian_moments
from fewstep.plans.plan import Plan
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.protocol import Run
from fewstep.solvers import SOLVERS, Solver

STEPS = (6, 12, 24, 48, 96)
START, END = -1.2, 0.2
"""The interval of the half log-SNR of the plots: neither the end of the data nor the flat region near the prior."""

MEAN, STD = 0.7, 0.6
COLORS = ("#4051b5", "#c2410c", "#047857", "#7e22ce", "#b91c1c", "#0369a1")


def solver_class(name: str) -> type[Solver]:
    """Returns the class of a solver's name."""
    build = SOLVERS[name]
    return getattr(build, "func", build)  # type: ignore[return-value]


def by_class() -> dict[str, list[str]]:
    """Returns the names of each class, in the order of the registry."""
    found: dict[str, list[str]] = {}
    for name in SOLVERS:
        found.setdefault(solver_class(name).__name__, []).append(name)
    return found


@functools.cache
def interval(steps: int) -> TimeGrid:
    """A grid of the interval, even in the half log-SNR but finer at its start."""
    schedule = fewstep.schedule("vp-linear")
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64).square()
    at = schedule.time(START + (END - START) * share)
    return fewstep.grid("explicit", schedule, None, times=at.tolist())


def _run(model: GaussianMixture, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    return PlanSampler(plan, model).run(x, Run(NoiseSource(0, range(len(x))))).x


@functools.cache
def _truth() -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    model = smooth(fewstep.schedule("vp-linear"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((32, 2), generator=generator, dtype=torch.float64)
    return model, x, _run(model, SOLVERS["rho-rk4"]().plan(interval(400)), x)


def errors(name: str) -> list[tuple[int, float]]:
    """Returns evaluations and error for each number of steps.

    A deterministic solver: the RMS to a fine Runge–Kutta solution on a Gaussian mixture in the plane. A stochastic one: the
    errors of mean and variance, in closed form, on Gaussian data.
    """
    solver, result = SOLVERS[name](), []
    for steps in STEPS:
        grid = interval(steps)
        plan = solver.plan(grid)
        if solver.stochastic:
            found = gaussian_moments(plan, MEAN, STD)
            a, s = grid.alpha[-1], grid.sigma[-1]
            variance = (a * STD).square() + s.square()
            error = float((found.mean - a * MEAN).abs() + (found.variance - variance).abs())
        else:
            model, x, truth = _truth()
            error = float((_run(model, plan, x) - truth).square().mean().sqrt())
        result.append((plan.nfe, max(error, 1e-13)))
    return result


def plot(curves: dict[str, Sequence[tuple[int, float]]], orders: dict[str, int], what: str) -> str:
    """Returns a plot with logarithmic axes as SVG: the curves, and a dashed line of each order."""
    width, height, left, bottom, top, right = 620, 300, 56, 40, 12, 150
    points = [point for curve in curves.values() for point in curve]
    x0, x1 = (math.log10(f(p[0] for p in points)) for f in (min, max))
    y0 = math.floor(math.log10(min(p[1] for p in points)))
    y1 = max(math.ceil(math.log10(max(p[1] for p in points))), y0 + 1)

    def place(nfe: float, error: float) -> str:
        x = left + (math.log10(nfe) - x0) / (x1 - x0) * (width - left - right)
        y = top + (y1 - math.log10(error)) / (y1 - y0) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    label = f"{what} against network evaluations: " + "; ".join(
        f"{name} from {curve[0][1]:.1e} at {curve[0][0]} to {curve[-1][1]:.1e} at {curve[-1][0]}"
        for name, curve in curves.items()
    )
    out = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        'font-size="12" fill="currentColor">'
    ]
    every = max(1, (y1 - y0) // 6)
    for power in range(y0, y1 + 1, every):
        y = place(10**x0, 10.0**power).split(",")[1]
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">1e{power}</text>'
        )
    for nfe in sorted({p[0] for p in points} if len(curves) == 1 else {c[0] for c in points}):
        if len({p[0] for p in points}) > 6 and nfe not in [
            p[0] for p in next(iter(curves.values()))
        ]:
            continue
        x = place(nfe, 10.0**y0).split(",")[0]
        out.append(f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{nfe}</text>')
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">network evaluations</text>'
    )
    for k, (name, curve) in enumerate(curves.items()):
        color = COLORS[k % len(COLORS)]
        line = " ".join(place(*point) for point in curve)
        out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            '<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*place(*point).split(","), color)
            for point in curve
        ]
        y = top + 8 + 18 * k
        out.append(
            f'<line x1="{width - right + 12}" x2="{width - right + 30}" y1="{y}" y2="{y}" stroke="{color}" '
            f'stroke-width="2"/><text x="{width - right + 36}" y="{y}" dominant-baseline="middle">{name}</text>'
        )
    drawn = set()
    for name, curve in curves.items():
        order = orders[name]
        if order < 1 or order in drawn:
            continue
        drawn.add(order)
        (n0, e0), n1 = curve[0], curve[-1][0]
        end = e0 * (n0 / n1) ** order
        if math.log10(end) < y0:  # the line leaves the plot at its bottom
            n1, end = n0 * (e0 / 10.0**y0) ** (1 / order), 10.0**y0
        a, b = place(n0, e0).split(","), place(n1, end).split(",")
        out.append(
            f'<line x1="{a[0]}" y1="{a[1]}" x2="{b[0]}" y2="{b[1]}" stroke="currentColor" opacity=".5" '
            f'stroke-dasharray="4 4"><title>order {order}</title></line>'
        )
    out.append("</svg>")
    return "".join(out)


def cost(solver: Solver, steps: int) -> str:
    """Returns the number of evaluations in a number of steps on the default grid."""
    if solver.adaptive:
        return "as the tolerance needs"
    to_zero = bool(solver.default_grid[1].get("to_zero", False))
    return str(solver.nfe(steps, ends_at_zero=to_zero))


def _grid(solver: Solver) -> str:
    if solver.adaptive:
        return "its own"
    name, options = solver.default_grid
    return f"`{name}`" + "".join(f", {k}={v}" for k, v in options.items())


def _others(names: Sequence[str]) -> str:
    rows = [
        f"| `{row.name}` | {', '.join(row.where)} | `{name}`"
        + "".join(f", {k}={v}" for k, v in row.options.items())
        + f" | {row.match} |"
        for name in names
        for row in ALIASES
        if (row.kind, row.ours) == ("solver", name)
    ]
    if not rows:
        return ""
    head = "## Names elsewhere\n\n| there | where | here | |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def page(title: str, names: Sequence[str], links: Links) -> str:
    """Returns the page of a class of solvers."""
    solvers: dict[str, Solver] = {name: SOLVERS[name]() for name in names}
    doc = inspect.getdoc(solver_class(names[0])) or ""
    rows = "\n".join(
        f"| `{name}` | {s.order_text if s.order else '–'} | {' | '.join(cost(s, k) for k in (5, 10, 20))} | "
        f"{_grid(s)} | {'yes' if s.stochastic else ''} |"
        for name, s in solvers.items()
    )
    text = f"""# {title}

{markdown(doc, links)}

## Cost and grid

| name | order | evaluations in 5 steps | 10 | 20 | default grid | stochastic |
|---|---|---|---|---|---|---|
{rows}

"""
    shown = {n: s for n, s in solvers.items() if not s.adaptive and s.order}
    if shown:
        stochastic = any(s.stochastic for s in shown.values())
        what = "Error of mean and variance" if stochastic else "RMS error"
        how = (
            "in closed form on Gaussian data"
            if stochastic
            else "to a fine Runge–Kutta solution on a mixture of Gaussians in the plane"
        )
        curves = {name: errors(name) for name in shown}
        text += f"""## Order

{what} {how}, with {", ".join(map(str, STEPS))} steps from a half log-SNR of {START} to {END}, default options;
drawn when these pages were built. Dashed: the declared order. The first steps are short here, so that it is that of the steps inside.

{plot(curves, {n: s.order for n, s in shown.items()}, what)}

"""
    return text + _others(names)


def pages(links: Links) -> dict[str, str]:
    """Returns the page of each class, by file name, and their index."""
    result, rows = {}, []
    for title, names in by_class().items():
        file = f"{title.lower()}.md"
        result[file] = page(title, names, links)
        doc = inspect.getdoc(solver_class(names[0])) or ""
        first = doc.split("\n\n")[0].replace("\n", " ")
        for name in names:
            solver = SOLVERS[name]()
            rows.append(
                f"| [`{name}`]({file}) | {solver.order_text if solver.order else '–'} | {'yes' if solver.stochastic else ''} | "
                f"{cost(solver, 10)} | {markdown(first, links)} |"
            )
    result["index.md"] = """# Solvers

Each page has the formula, the paper, the cost, and a plot of its order that was drawn when the pages were built. `fewstep solvers` prints
the same list, and names of other libraries are understood ([coming from](../coming-from.md)). What belongs together, and when to take which:
[the methods, by family](../families/index.md).

| solver | order | stochastic | evaluations in 10 steps | |
|---|---|---|---|---|
""" + "\n".join(rows)
    return result

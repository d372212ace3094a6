"""Plans as pictures: the times of their evaluations on the axis of noise, and their coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.plans.plan import Plan
from fewstep.reporting.figures import COLORS, PALE, WIDTH, label, style_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SHOWN = 24
"""The most evaluations of a plan whose coefficients are drawn: there would be nothing to see."""

FAINTEST = 0.07
"""The opacity of the smallest coefficient that is not zero."""


def plans_figure(plans: Mapping[str, Plan]) -> Figure:
    r"""Returns a figure of one or several plans.

    Above, the noise levels :math:`\sigma / \alpha` at which each plan evaluates the network, and that of its sample. Below, for each
    plan the table of its normal form (:meth:`fewstep.Plan.flat`): row k are the weights of the initial state x and
    of the model outputs before in the input of evaluation k, the last row those in the sample. Blue is
    positive, orange negative; the opacity is the square root of the size in units of the largest of the row, without x.

    Arguments:
        plans: The plans by name; of more than 24 evaluations only the times are drawn.

    Raises:
        ValueError: If there is no plan, or matplotlib is not installed.
    """
    if not plans:
        raise ValueError("give at least one plan to draw")
    tables = {name: plan for name, plan in plans.items() if plan.nfe <= MOST_SHOWN}
    columns = min(2, len(tables)) or 1
    rows = -(-len(tables) // columns)
    height = 0.95 + 0.26 * len(plans)
    each = 2.35 if columns == 2 else 3.2
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH * 1.15, height + each * rows), layout="constrained")
        parts = figure.add_gridspec(
            1 + rows, columns, height_ratios=[height, *[each] * rows], hspace=0.06
        )
        draw_times(figure.add_subplot(parts[0, :]), plans)
        for place, (name, plan) in enumerate(tables.items()):
            axes = figure.add_subplot(parts[1 + place // columns, place % columns])
            draw_table(axes, plan, name)
    return figure


def draw_times(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """Draws the noise levels of the evaluations of plans, one line for each."""
    lowest = math.inf
    for row, plan in enumerate(plans.values()):
        style = style_of(row)
        ratios = [sigma / alpha for alpha, sigma in plan.scales.detach().tolist() if alpha > 0]
        lowest = min(lowest, *ratios)
        axes.plot(ratios, [row] * len(ratios), color=style["color"], lw=0.8, alpha=0.5)
        axes.plot(ratios, [row] * len(ratios), color=style["color"], ls="", marker="o", ms=4.5)
        alpha, sigma = (float(v[-1].detach()) for v in (plan.grid.alpha, plan.grid.sigma))
        if sigma > 0:
            lowest = min(lowest, sigma / alpha)
            axes.plot([sigma / alpha], [row], color=style["color"], marker="|", ms=11)
    label(axes, "noise level σ/α", "", log_x=True)
    axes.invert_xaxis()
    axes.set_yticks(range(len(plans)), list(plans))
    axes.set_ylim(len(plans) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_table(axes: Axes, plan: Plan, title: str) -> None:
    """Draws the coefficients of a plan: a square for each weight that is not zero."""
    from matplotlib.patches import Rectangle

    flat = plan.flat()
    initial, outputs = flat.a.detach().tolist(), flat.B.detach().tolist()
    for row, (first, weights) in enumerate(zip(initial, outputs, strict=True)):
        largest = max((abs(v) for v in weights), default=0.0)
        for column, value in enumerate([first, *weights]):
            scale = max(abs(first), 1e-12) if column == 0 else largest
            if value == 0 or scale == 0:
                continue
            opacity = max(FAINTEST, math.sqrt(min(1.0, abs(value) / scale)))
            color = COLORS[0] if value > 0 else COLORS[1]
            corner = (column - 0.46, row - 0.46)
            axes.add_patch(Rectangle(corner, 0.92, 0.92, color=color, alpha=opacity, linewidth=0))
    count = plan.nfe
    axes.axvline(0.5, color=PALE, lw=0.7)
    axes.set_xlim(-0.6, count + 0.6)
    axes.set_ylim(count + 0.6, -0.6)
    axes.set_aspect("equal")
    step = 1 if count <= 8 else 2 if count <= 14 else 5
    numbers = list(range(0, count, step))
    below = numbers if count <= 14 else numbers[1:]  # beside x there is no room for a 0
    axes.set_xticks([0, *(k + 1 for k in below)], ["x", *map(str, below)])
    axes.set_yticks([*numbers, count], [*map(str, numbers), "sample"])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("model output of evaluation")

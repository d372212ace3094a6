"""Figures and pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import interpolate

from fewstep.comparison.running import Comparison
from fewstep.comparison.scores import BETTER_HIGH, RMS, TITLES
from fewstep.comparison.store import Cell
from fewstep.reporting.figures import (
    INK,
    Series,
    add_legend,
    label,
    legend_height,
    line_plot,
    new_figure,
    style_of,
    styled,
)
from fewstep.reporting.plots import image_grid, scatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

NAMES = {
    **TITLES,
    "fid": "FID to the data",
    "kid": "KID to the data",
    RMS: "RMS distance to the reference",
}
"""The names of measures in sentences."""

MOST_LINES = 9
"""The most samplers that have a colour of their own; the others are grey."""

TILE, MOST_PIXELS = 64, 128
"""The side to which small images are magnified, by a whole factor, and the largest side that is shown."""

POINT_SIZE, POINT_COLUMNS = 236, 3


def styles(comparison: Comparison, measure: str) -> dict[str, int | None]:
    """Returns a style for each of the samplers that are best on average over budgets, ``None`` for the others."""
    names = list(dict.fromkeys(cell.name for cell in comparison.cells))
    if len(names) <= MOST_LINES:
        return {name: place for place, name in enumerate(names)}
    sign = -1 if measure in BETTER_HIGH else 1
    ranks: dict[str, list[int]] = {name: [] for name in names}
    for nfe in {cell.nfe for cell in comparison.cells}:
        column = [c for c in comparison.cells if c.nfe == nfe and measure in c.scores]
        column.sort(key=lambda cell: sign * cell.scores[measure].value)
        for place, cell in enumerate(column):
            ranks[cell.name].append(place)
    mean = {name: sum(r) / len(r) if r else len(names) for name, r in ranks.items()}
    best = set(sorted(names, key=lambda name: mean[name])[:MOST_LINES])
    place = {name: i for i, name in enumerate(n for n in names if n in best)}
    return {name: place.get(name) for name in names}


def against_nfe(comparison: Comparison, measure: str) -> Figure:
    """Returns the figure of a measure against the number of evaluations, with bands."""
    style_by_name = styles(comparison, measure)
    series = []
    for name, style in style_by_name.items():
        cells = sorted(
            (c for c in comparison.cells if c.name == name and measure in c.scores),
            key=lambda cell: cell.nfe,
        )
        if not cells:
            continue
        scores = [cell.scores[measure] for cell in cells]
        series.append(
            Series(
                name,
                [cell.nfe for cell in cells],
                [s.value for s in scores],
                [s.low for s in scores],
                [s.high for s in scores],
                style=style,
                muted=style is None,
            )
        )
    values = [v for s in series for v in s.y]
    return line_plot(
        sorted(series, key=lambda s: not s.muted),
        x_label="network evaluations",
        y_label=TITLES[measure],
        log_x=True,
        log_y=_logarithmic(measure, values),
        x_ticks=sorted({cell.nfe for cell in comparison.cells}),
    )


def against_seconds(comparison: Comparison, measure: str, front: Sequence[Cell]) -> Figure:
    """Returns the figure of a measure against seconds for one sample, with the Pareto front."""
    style_by_name = styles(comparison, measure)
    names = [name for name, style in style_by_name.items() if style is not None]
    figure, axes = new_figure(height=3.3 + legend_height(names))
    with styled():
        axes.plot(
            [1e3 * cell.seconds[0] for cell in front],
            [cell.scores[measure].value for cell in front],
            color=INK,
            lw=1.0,
            alpha=0.6,
            drawstyle="steps-post",
            zorder=1.8,
        )
        for name, style in style_by_name.items():
            cells = [c for c in comparison.cells if c.name == name and measure in c.scores]
            x = [1e3 * cell.seconds[0] for cell in cells]
            y = [cell.scores[measure].value for cell in cells]
            if style is None:
                axes.plot(x, y, ".", color="#9a9aa5", ms=4, alpha=0.6, zorder=1.6)
                continue
            line = style_of(style)
            axes.plot(x, y, ls="", marker=line["marker"], color=line["color"], ms=5.5, label=name)
        values = [
            cell.scores[measure].value for cell in comparison.cells if measure in cell.scores
        ]
        label(
            axes,
            "milliseconds for one sample",
            TITLES[measure],
            log_x=True,
            log_y=_logarithmic(measure, values),
        )
        add_legend(figure, names)
    return figure


def _logarithmic(measure: str, values: Sequence[float]) -> bool:
    """Whether values suit a logarithmic axis; shares do not."""
    return measure not in BETTER_HIGH and min(values) > 0 and max(values) > 4 * min(values)


def samples_picture(comparison: Comparison, nfe: int) -> Image.Image | None:
    """Returns a picture of samples at a budget: images by row, or points on those of the reference."""
    cells = [cell for cell in comparison.cells if cell.nfe == nfe]
    target = comparison.store.tensors(comparison.reference)["shown"]
    shown = [comparison.store.tensors(cell)["shown"] for cell in cells]
    if target.ndim == 2 and target.shape[1] >= 2:
        return _planes(cells, shown, target)
    if target.ndim != 4 or target.shape[1] not in (1, 3):
        return None
    title = f"reference\n{comparison.reference.nfe} evaluations"
    images = torch.cat([target, *shown])
    side = max(images.shape[2:])
    if side > MOST_PIXELS:
        images = interpolate(images, scale_factor=MOST_PIXELS / side, mode="area")
    return image_grid(
        images,
        columns=len(target),
        scale=max(1, round(TILE / side)),
        row_labels=[title, *(_broken(cell.name) for cell in cells)],
        column_labels=[f"sample {i}" for i in range(len(target))],
    )


def _planes(
    cells: Sequence[Cell], shown: Sequence[torch.Tensor], target: torch.Tensor
) -> Image.Image:
    from PIL import Image

    limit = float(target[:, :2].abs().max()) * 1.15
    tiles = [
        scatter(target[:, :2], x[:, :2], limit=limit, size=POINT_SIZE, title=cell.name)
        for cell, x in zip(cells, shown, strict=True)
    ]
    columns = min(POINT_COLUMNS, len(tiles))
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place % columns * width, place // columns * height))
    return canvas


def _broken(name: str) -> str:
    """Returns a name with its options on lines of their own."""
    return name.replace("diffusers:", "diffusers:\n").replace("+", "\n+").replace("@", "\n@")

"""Figures: lines with bands and points with names, drawn with matplotlib, and SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from fewstep.base.extras import install_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, PALE, GRID = "#18181c", "#60606c", "#e0e0e6"
"""The colours of text, axes and grid; on a page they follow its light or dark theme."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a7a85")
"""Colours that are distinct for the colour-blind (Okabe and Ito's), on light and dark ground."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fewstep",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "axes.unicode_minus": True,
}
DECADES = 1000.0
"""Over more than this, a logarithmic axis has no room for numbers between powers of ten."""

WIDTH = 4.8
"""The width of a figure in inches, at which its text can still be read on a phone."""


@dataclass(frozen=True)
class Series:
    """A line of a figure.

    Attributes:
        name: Its name in the legend; an empty one is left out.
        x: The places.
        y: The values.
        low: The lower ends of a band, or ``None``.
        high: The upper ends.
        style: The number of its colour, marker and dash; left out, its place among the lines.
        muted: Whether it stays in the background: thin, grey, without a band or a name.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int | None = None
    muted: bool = False


@contextmanager
def styled() -> Iterator[None]:
    """Within the block, figures of matplotlib have the style of these reports.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ValueError(f"figures need matplotlib: {install_hint('report')}") from None
    with rc_context(STYLE):  # type: ignore[arg-type]
        yield


def new_figure(rows: int = 1, columns: int = 1, *, height: float = 3.6) -> tuple[Figure, Any]:
    """Returns a figure and its axes (one, or an array of them), without pyplot."""
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns)


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    markers: bool = True,
    height: float | None = None,
) -> Figure:
    """Returns a figure of lines, with a band where a series has one.

    Arguments:
        series: The lines.
        x_label: The text at the horizontal axis.
        y_label: The text at the vertical axis.
        title: The title, if any.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is; values that are not positive are then left out.
        x_ticks: The places of the ticks, if they are to be those of the data.
        markers: Whether to mark the points.
        height: The height in inches; left out, as the legend needs.
    """
    names = [s.name for s in series if s.name and not s.muted]
    figure, axes = new_figure(height=height or 3.3 + legend_height(names))
    with styled():
        # On a logarithmic axis a band that reaches below zero ends below the lowest point.
        floor = min((y for s in series for y in s.y if y > 0), default=1.0) / 3 if log_y else None
        draw_lines(axes, series, markers=markers, floor=floor)
        label(axes, x_label, y_label, title, log_x=log_x, log_y=log_y, x_ticks=x_ticks)
        add_legend(figure, names)
    return figure


def draw_lines(
    axes: Axes, series: Sequence[Series], *, markers: bool = True, floor: float | None = None
) -> None:
    """Draws lines with their bands, whose lower ends are not below the floor."""
    for place, one in enumerate(series):
        if one.muted:
            axes.plot(one.x, one.y, label="_", lw=0.8, color=PALE, alpha=0.45, zorder=1.5)
            continue
        line = style_of(place if one.style is None else one.style)
        if not markers:
            line["marker"] = ""
        axes.plot(one.x, one.y, label=one.name or "_", lw=1.6, ms=4.5, **line)
        if one.low is not None and one.high is not None:
            low = one.low if floor is None else [max(v, floor) for v in one.low]
            high = one.high if floor is None else [max(v, floor) for v in one.high]
            axes.fill_between(one.x, low, high, color=line["color"], alpha=0.16, linewidth=0)


def style_of(style: int) -> dict[str, Any]:
    """Returns colour, marker and dash of a number; the first 224 are all different."""
    return {
        "color": COLORS[style % len(COLORS)],
        "marker": MARKERS[(style + style // len(COLORS)) % len(MARKERS)],
        "linestyle": DASHES[style // len(COLORS) % len(DASHES)],
    }


def label(
    axes: Axes,
    x_label: str,
    y_label: str,
    title: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> None:
    """Writes titles and sets scales; ticks are plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, loc="left")
    for on, axis, scale in (
        (log_x, axes.xaxis, axes.set_xscale),
        (log_y, axes.yaxis, axes.set_yscale),
    ):
        if on:
            scale("log", nonpositive="mask")
            axis.set_major_formatter(_plain)
            axis.set_minor_formatter(partial(_leading, axis))
    if x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(x_ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(_plain)
    axes.margins(x=0.04)


def legend_columns(names: Sequence[str]) -> int:
    """Returns how many names stand side by side below the axes."""
    longest = max((len(name) for name in names), default=1)
    return max(1, min(3, len(names), 66 // (longest + 8)))


def legend_height(names: Sequence[str]) -> float:
    """Returns the height of a legend in inches."""
    return 0.17 * -(-len(names) // legend_columns(names)) if len(names) > 1 else 0.0


def add_legend(figure: Figure, names: Sequence[str]) -> None:
    """Writes one legend below the axes, if more than one line has a name."""
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=legend_columns(names), handlelength=2.6)


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def _leading(axis: Axis, value: float, _: object = None) -> str:
    """Between powers of ten a few numbers are written: the more, the less the axis spans."""
    low, high = sorted(axis.get_view_interval())
    if high > DECADES * low:
        return ""
    digits = "25" if high > 30 * low else "2357" if high > 5 * low else "23456789"
    head = f"{value:e}"
    return f"{value:g}" if head[0] in digits and head[1:8] == ".000000" else ""


def svg(figure: Figure, *, alt: str, prefix: str) -> str:
    """Returns a figure as an SVG element for a page: the same for the same figure.

    Arguments:
        figure: The figure.
        alt: Its content in words.
        prefix: The beginning of its ids, so that two figures of a page share none.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # In a page neither the namespaces nor a size in points are needed.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    head, _, body = text.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    for colour, name in ((INK, "--ink"), (PALE, "--pale"), (GRID, "--line")):
        body = body.replace(colour, f"var({name})")
    return f'{head} role="img" aria-label="{escape(alt)}">{body.strip()}'

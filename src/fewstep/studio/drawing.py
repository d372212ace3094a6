"""Pictures for the studio: states and samples as PNG on no ground, plans and errors as SVG that follows a theme."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.reporting.plots import image_grid, picture, scatter

if TYPE_CHECKING:
    from PIL import Image

_drawing = threading.Lock()
"""The style of matplotlib is of the whole process: one figure at a time."""


def png(image: Image.Image) -> bytes:
    """Returns a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_address(image: bytes) -> str:
    """Returns a PNG as an address that needs no server."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def visible(samples: Tensor, model: Denoiser, *, decode: bool = True) -> Tensor:
    r"""Returns samples as pictures in [-1, 1], or unchanged if they are none.

    Arguments:
        samples: Samples or states, (n, \*).
        model: The model: its range of data, and the decoder of a latent model.
        decode: Whether latents are decoded, at the cost of the decoder.
    """
    decoder = getattr(model, "decode", None)
    if decoder is not None and decode:
        with torch.no_grad():
            return decoder(samples).float().cpu()
    low, high = getattr(model, "data_range", None) or (-1.0, 1.0)
    plain = samples.float().cpu()
    return (
        plain if plain.ndim != 4 or decoder is not None else (plain - low) * (2 / (high - low)) - 1
    )


def tiles(
    samples: Tensor, model: Denoiser, *, decode: bool = True, beside: Tensor | None = None
) -> bytes:
    r"""Returns samples as PNG without a margin and without a ground, for a page of any colour.

    Arguments:
        samples: Samples or states, (n, \*).
        model: The model.
        decode: Whether latents are decoded; else their first three channels are shown as colours.
        beside: Of vectors, the points that they are compared with, drawn in another colour.
    """
    shown = visible(samples, model, decode=decode)
    if shown.ndim == 2:
        sets = [_plane(shown)]
        limit = None
        if beside is not None:
            sets.insert(0, _plane(beside))
            limit = float(sets[0].abs().max()) * 1.25 + 0.1
        return png(scatter(*sets, limit=limit, size=300, ground=None))
    if shown.ndim == 4 and shown.shape[1] not in (1, 3):
        shown = shown[:, : 3 if shown.shape[1] > 3 else 1]
        size = shown.flatten(2).abs().amax(-1)[..., None, None].clamp_min(1e-12)
        shown = shown / size
    if shown.ndim != 4:
        return png(picture(shown.flatten(1)))
    return png(image_grid(shown, margin=0, ground=None))


def side_by_side(
    rows: Mapping[str, Tensor],
    model: Denoiser,
    *,
    title: str,
    columns: Sequence[str] | None = None,
) -> bytes:
    """Returns one picture of the samples of several samplers, a row or a colour for each.

    Arguments:
        rows: The samples by name.
        model: The model.
        title: A text above them.
        columns: The texts above the samples.
    """
    shown = {name: visible(samples, model) for name, samples in rows.items()}
    first = next(iter(shown.values()))
    if first.ndim == 2:
        points = [_plane(part) for part in shown.values()]
        return png(scatter(*points, labels=list(shown), title=title))
    if first.ndim != 4 or first.shape[1] not in (1, 3):
        return png(picture(torch.cat(list(shown.values())), title=title))
    grid = image_grid(
        torch.cat(list(shown.values())),
        columns=len(first),
        row_labels=list(shown),
        column_labels=columns,
        title=title,
    )
    return png(grid)


def plans_svg(plans: Mapping[str, Plan], *, prefix: str) -> str:
    """Returns the plans of samplers as SVG: see :func:`fewstep.reporting.plan_figures.plans_figure`."""
    from fewstep.reporting.figures import svg
    from fewstep.reporting.plan_figures import plans_figure

    with _drawing:
        words = "; ".join(f"{name}: {plan.nfe} evaluations" for name, plan in plans.items())
        return svg(plans_figure(plans), alt=f"Times and coefficients of {words}", prefix=prefix)


def errors_svg(series: Sequence[Any], *, prefix: str) -> str:
    """Returns errors against NFE as SVG; the series are those of :mod:`fewstep.reporting.figures`."""
    from fewstep.reporting.figures import line_plot, svg

    with _drawing:
        figure = line_plot(
            series,
            x_label="network evaluations (NFE)",
            y_label="RMS distance",
            log_x=True,
            log_y=True,
            x_ticks=sorted({x for one in series for x in one.x}),
        )
        names = ", ".join(one.name for one in series)
        return svg(figure, alt=f"Error against NFE of {names}", prefix=prefix)


def _plane(points: Tensor) -> Tensor:
    """Returns the first two coordinates of vectors; the second is 0 if there is none."""
    flat = points.flatten(1).float().cpu()
    return torch.nn.functional.pad(flat[:, :2], (0, max(0, 2 - flat.shape[1])))

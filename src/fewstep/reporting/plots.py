r"""Pictures of samples, drawn with Pillow alone: grids of images, and points in the plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MARGIN, GAP = 16, 4
SMALLEST = 72
"""The side in pixels to which small images are magnified, by a whole factor."""
INK, PALE, FRAME = (24, 24, 27), (113, 113, 122), (212, 212, 216)
COLORS = ((37, 99, 235), (220, 38, 38), (22, 163, 74), (217, 119, 6), (124, 58, 237))

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_uint8(images: Tensor) -> Tensor:
    r"""Returns images in [-1, 1] as bytes: :math:`127.5 (x + 1)`, rounded and clamped.

    Arguments:
        images: Any floating tensor; NaN becomes 0.
    """
    import torch

    scaled = (images.detach().cpu().float() + 1) * 127.5
    return scaled.nan_to_num(0.0, 255.0, 0.0).round().clamp(0, 255).to(torch.uint8)


def image_grid(
    images: Tensor,
    *,
    columns: int | None = None,
    scale: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
    margin: int = MARGIN,
    ground: str | None = "white",
) -> Image.Image:
    r"""Returns one picture of many images, row by row.

    Arguments:
        images: The images in [-1, 1], with shape (N, C, H, W), C being 1 or 3.
        columns: The number of columns; left out, about as many as rows.
        scale: The whole factor of magnification (nearest neighbour); left out, what brings
            small images to about 72 pixels.
        row_labels: One text for each row, written at its left; may have several lines.
        column_labels: One text for each column, written above it; may have several lines.
        title: A text above all.
        margin: The width of the margin in pixels.
        ground: The colour between the images; ``None`` for none, so that the page shows.

    Raises:
        ValueError: If shapes or the number of labels do not fit.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            f"images must have shape (N, 1 or 3, H, W) and N >= 1, got {tuple(images.shape)}"
        )
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    for name, labels, expected in (
        ("row_labels", row_labels, rows),
        ("column_labels", column_labels, columns),
    ):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"{name} must have {expected} texts, got {len(labels)}")
    scale = scale or max(1, round(SMALLEST / max(height, width)))
    tile_w, tile_h = width * scale, height * scale

    size = 13 if tile_w < 120 else 15
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(size + 5)
    left = margin + (max(_width(t, font) for t in row_labels) + 12 if row_labels else 0)
    top = margin + (_height(title, title_font) + 12 if title else 0)
    pitch = tile_w + GAP
    if column_labels:
        pitch = max(pitch, max(_width(t, font) for t in column_labels) + 6)
    head = max(_height(t, font) for t in column_labels) + 8 if column_labels else 0
    full_w = left + columns * pitch - (pitch - tile_w) + margin
    if column_labels:
        full_w += (pitch - tile_w) // 2
        left += (pitch - tile_w) // 2
    if title:
        full_w = max(full_w, 2 * margin + _width(title, title_font))
    full_h = top + head + rows * (tile_h + GAP) - GAP + margin

    canvas = _canvas((full_w, full_h), ground)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((margin, margin), title, fill=INK, font=title_font)
    for column, text in enumerate(column_labels or ()):
        x = left + column * pitch + tile_w / 2
        y = top + head - 8 - _height(text, font)
        draw.multiline_text((x, y), text, fill=INK, font=font, anchor="ma", align="center")
    for row, text in enumerate(row_labels or ()):
        y = top + head + row * (tile_h + GAP) + (tile_h - _height(text, font)) / 2
        draw.multiline_text((margin, y), text, fill=INK, font=font)
    pixels = to_uint8(images)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        tile = _picture(image).resize((tile_w, tile_h), Image.Resampling.NEAREST)
        canvas.paste(tile, (left + column * pitch, top + head + row * (tile_h + GAP)))
    return canvas


def scatter(
    *points: Tensor,
    labels: Sequence[str] | None = None,
    limit: float | None = None,
    size: int = 640,
    title: str | None = None,
    ground: str | None = "white",
) -> Image.Image:
    r"""Returns a picture of points in the plane, a colour for each set.

    Arguments:
        points: Sets of points, each with shape (N, 2); points that are not finite are left out.
        labels: The names of the sets, for a legend.
        limit: Half the side of the square that is shown, around the origin; left out, what
            holds all points.
        size: The side of the square, in pixels.
        title: A text above it.
        ground: The colour behind the points; ``None`` for none, so that the page shows.

    Raises:
        ValueError: If shapes or the number of labels do not fit.
    """
    import torch

    for part in points:
        if part.ndim != 2 or part.shape[1] != 2:
            raise ValueError(f"points must have shape (N, 2), got {tuple(part.shape)}")
    if not points:
        raise ValueError("give at least one set of points")
    if labels is not None and len(labels) != len(points):
        raise ValueError(f"labels must have {len(points)} texts, got {len(labels)}")
    sets = [p.detach().cpu().double() for p in points]
    sets = [p[torch.isfinite(p).all(1)] for p in sets]
    if limit is None:
        reach = max((float(p.abs().max()) for p in sets if len(p)), default=1.0)
        limit = max(reach * 1.06, 1e-9)
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be a positive number, got {limit!r}")

    # Drawn three times as large and shrunk: Pillow's dots have no soft edges of their own.
    over = 3
    font, title_font = ImageFont.load_default(13), ImageFont.load_default(18)
    side = size * over
    field = _canvas((side, side), ground)
    draw = ImageDraw.Draw(field)
    step = _tick(limit)
    ticks = [k * step for k in range(-int(limit / step), int(limit / step) + 1)]

    def place(value: float) -> float:
        return (value / limit + 1) / 2 * side

    for tick in ticks:
        at, color = place(tick), _line(ground, axis=not tick)
        draw.line((at, 0, at, side), fill=color, width=over)
        draw.line((0, side - at, side, side - at), fill=color, width=over)
    largest = max(len(p) for p in sets)
    radius = over * min(3.5, max(1.2, 60 / math.sqrt(largest + 1)))
    for index, part in enumerate(sets):
        color = COLORS[index % len(COLORS)]
        edge = tuple(c // 2 for c in color)
        for x, y in part.tolist():
            u, v = place(x), side - place(y)
            box = (u - radius, v - radius, u + radius, v + radius)
            draw.ellipse(box, fill=color, outline=edge, width=1)
    field = field.resize((size, size), Image.Resampling.LANCZOS)

    texts = [f"{tick:g}" for tick in ticks]
    left = MARGIN + max(_width(t, font) for t in texts) + 6
    top = MARGIN + (_height(title, title_font) + 12 if title else 0)
    legend = 24 if labels else 0
    bottom = 22 + legend
    canvas = _canvas((left + size + MARGIN, top + size + bottom + MARGIN), ground)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, fill=INK, font=title_font)
    canvas.paste(field, (left, top))
    draw.rectangle((left, top, left + size - 1, top + size - 1), outline=FRAME)
    for tick, text in zip(ticks, texts, strict=True):
        at = place(tick) / over
        draw.text((left + at, top + size + 6), text, fill=PALE, font=font, anchor="ma")
        draw.text((left - 6, top + size - at), text, fill=PALE, font=font, anchor="rm")
    x = left
    for index, text in enumerate(labels or ()):
        y = top + size + bottom - 6
        draw.ellipse((x, y - 4, x + 8, y + 4), fill=COLORS[index % len(COLORS)])
        draw.text((x + 14, y), text, fill=INK, font=font, anchor="lm")
        x += 14 + _width(text, font) + 20
    return canvas


def picture(samples: Tensor, *, title: str | None = None) -> Image.Image:
    r"""Returns the picture that suits samples: a grid of images, or points.

    Arguments:
        samples: Images (N, C, H, W); with a number of channels other than 1 and 3 (latents), each
            channel is shown by itself, scaled to its own range. Or vectors (N, D), of which the
            first two coordinates are shown (the second is 0 if there is none).
        title: A text above it.

    Raises:
        ValueError: If the samples have another shape.
    """
    import torch

    if samples.ndim == 2:
        plane = torch.nn.functional.pad(samples[:, :2], (0, max(0, 2 - samples.shape[1])))
        return scatter(plane, title=title)
    if samples.ndim != 4:
        raise ValueError(
            f"samples must have shape (N, C, H, W) or (N, D), got {tuple(samples.shape)}"
        )
    channels = samples.shape[1]
    if channels in (1, 3):
        return image_grid(samples, title=title)
    planes = samples.detach().cpu().float().nan_to_num()
    low, high = planes.amin((0, 2, 3), keepdim=True), planes.amax((0, 2, 3), keepdim=True)
    planes = (planes - low) / (high - low).clamp_min(1e-12) * 2 - 1
    return image_grid(
        planes.flatten(0, 1)[:, None],
        columns=channels,
        column_labels=[f"channel {c}" for c in range(channels)],
        title=title,
    )


def _canvas(size: tuple[int, int], ground: str | None) -> Image.Image:
    """Returns an empty picture, of a colour or of none."""
    return Image.new("RGBA", size) if ground is None else Image.new("RGB", size, ground)


def _line(ground: str | None, *, axis: bool) -> tuple[int, ...]:
    """Returns the colour of a line of the grid; on no ground it is grey, and lets the page through."""
    if ground is None:
        return (128, 128, 136, 130 if axis else 60)
    return (200, 200, 205) if axis else (228, 228, 231)


def _picture(image: torch.Tensor) -> Image.Image:
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy()).convert("RGB")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _box(text: str, font: _Font) -> tuple[float, float, float, float]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return draw.multiline_textbbox((0, 0), text, font=font)


def _width(text: str, font: _Font) -> int:
    return math.ceil(_box(text, font)[2])


def _height(text: str, font: _Font) -> int:
    return math.ceil(_box(text, font)[3])


def _tick(limit: float) -> float:
    """Returns a round distance (1, 2 or 5 times a power of ten) with about 3 ticks a side."""
    power = 10.0 ** math.floor(math.log10(limit / 3))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= limit / 3.5)

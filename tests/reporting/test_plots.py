from __future__ import annotations

import pytest
import torch
from PIL import Image

from fewstep.reporting.plots import GAP, MARGIN, image_grid, picture, scatter, to_uint8


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 1 / 127.5, 0.999, 1.0, 7.0, float("nan")])
    # 127.5 rounds to the even 128; 128.5 to the even 128; 254.87 to 255.
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255, 255, 0]


def test_a_grid_has_every_image_in_its_place_on_white():
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    images = levels[:, None, None, None].expand(5, 1, 4, 6)
    result = image_grid(images, columns=3, scale=5)
    assert result.size == (2 * MARGIN + 3 * 30 + 2 * GAP, 2 * MARGIN + 2 * 20 + GAP)
    for index, level in enumerate(to_uint8(levels).tolist()):
        row, column = divmod(index, 3)
        left, top = MARGIN + column * (30 + GAP), MARGIN + row * (20 + GAP)
        tile = result.crop((left, top, left + 30, top + 20))
        assert tile.getextrema() == ((level, level),) * 3
    missing = result.crop(
        (MARGIN + 2 * (30 + GAP), MARGIN + 20 + GAP, result.width, result.height)
    )
    assert missing.getextrema() == ((255, 255),) * 3
    assert result.getpixel((0, 0)) == (255, 255, 255)


def test_magnification_is_nearest_and_colours_keep_their_channels():
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 0, 0, 1] = 1.0
    image[0, 2, 1, 0] = 1.0
    result = image_grid(image, scale=8)
    actual = {color for _, color in result.crop((16, 16, 32, 32)).getcolors()}
    assert actual == {(0, 0, 0), (255, 0, 0), (0, 0, 255)}
    assert result.getpixel((16 + 15, 16)) == (255, 0, 0)
    assert result.getpixel((16, 16 + 15)) == (0, 0, 255)


def _ink(image: Image.Image) -> int:
    return sum(count for count, color in image.getcolors(100_000) if color != (255, 255, 255))


def test_labels_and_title_are_written_beside_and_not_over_the_images():
    images = torch.ones(4, 1, 8, 8)  # white tiles: all ink is text
    plain = image_grid(images, columns=2)
    assert _ink(plain) == 0
    rows, columns = ["first row", "second"], ["a", "a much longer label\nof two lines"]
    result = image_grid(
        images - 2, columns=2, row_labels=rows, column_labels=columns, title="a title"
    )
    white = image_grid(images, columns=2, row_labels=rows, column_labels=columns, title="a title")
    assert result.size == white.size
    assert _ink(white) > 500
    # Black tiles hide no text: each tile is black all over, and text plus tiles is all ink.
    side = 8 * 9
    assert _ink(result) == _ink(white) + 4 * side * side


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 2, 4, 4), {}, "1 or 3"),
        (torch.zeros(4, 4), {}, "1 or 3"),
        (torch.zeros(0, 1, 4, 4), {}, "N >= 1"),
        (torch.zeros(2, 1, 4, 4), {"columns": 0}, "columns must be a positive integer"),
        (torch.zeros(2, 1, 4, 4), {"scale": 1.5}, "scale must be a positive integer"),
        (torch.zeros(4, 1, 4, 4), {"columns": 2, "row_labels": ["a"]}, "2 texts, got 1"),
        (torch.zeros(4, 1, 4, 4), {"columns": 2, "column_labels": ["a"] * 3}, "2 texts, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def test_points_are_where_they_should_be():
    result = scatter(torch.tensor([[1.0, 0.5], [float("inf"), 0.0]]), limit=2.0, size=400)
    blue = [
        (x, y)
        for x in range(result.width)
        for y in range(result.height)
        if result.getpixel((x, y)) == (37, 99, 235)
    ]
    left = result.width - MARGIN - 400  # the field ends a margin before the right edge
    x = sum(p[0] for p in blue) / len(blue) - left
    y = sum(p[1] for p in blue) / len(blue) - MARGIN
    assert x == pytest.approx((1.0 / 2 + 1) / 2 * 400, abs=1.5)
    assert y == pytest.approx(400 - (0.5 / 2 + 1) / 2 * 400, abs=1.5)


def test_sets_of_points_have_colours_and_a_legend():
    one, two = torch.tensor([[0.5, 0.5]]), torch.tensor([[-0.5, -0.5]])
    result = scatter(one, two, labels=["ours", "truth"], title="two sets", limit=1.0)
    colors = {color for _, color in result.getcolors(1_000_000)}
    assert {(37, 99, 235), (220, 38, 38)} <= colors
    assert result.height > scatter(one, two, limit=1.0).height
    with pytest.raises(ValueError, match="2 texts, got 1"):
        scatter(one, two, labels=["ours"])
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        scatter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least one"):
        scatter()


def test_picture_suits_the_samples():
    assert picture(torch.zeros(4, 1, 8, 8)).size == image_grid(torch.zeros(4, 1, 8, 8)).size
    line = picture(torch.tensor([[0.5], [1.0]]))
    assert line.size == scatter(torch.tensor([[0.5, 0.0], [1.0, 0.0]])).size
    latents = picture(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert latents.width > latents.height  # four channels side by side, two samples
    with pytest.raises(ValueError, match=r"\(N, C, H, W\) or \(N, D\)"):
        picture(torch.zeros(2, 3, 4))

"""``fewstep sample --image --mask``, and pictures as images of models of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A picture, and a mask whose right half is new."""
    values = (np.arange(28 * 28) % 256).astype(np.uint8).reshape(28, 28)
    mask = np.zeros((28, 28), np.uint8)
    mask[:, 14:] = 255
    for name, pixels in (("image", values), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path / "image.png", tmp_path / "mask.png"


def test_the_picture_is_kept_where_the_mask_is_black(
    files: tuple[Path, Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    image, mask = files
    common = (
        "sample",
        "fashion",
        "--solver",
        "ddim",
        "--nfe",
        2,
        "-n",
        2,
        "--option",
        "to_zero=true",
    )
    text = command(*common, "--image", image, "--mask", mask, "--out", tmp_path / "a")
    assert f"--mask {mask}" in text
    samples = load_file(tmp_path / "a" / "samples.safetensors")["samples"]
    pixels = torch.from_numpy(np.asarray(Image.open(image)).copy()).float() / 127.5 - 1
    outside = samples[:, 0, :, :14]
    torch.testing.assert_close(outside, pixels[:, :14].expand_as(outside), rtol=0, atol=1e-4)
    assert float((samples[0, 0, :, 14:] - samples[1, 0, :, 14:]).abs().mean()) > 1e-3
    tensor = tmp_path / "mask.safetensors"
    save_file({"mask": torch.cat([torch.zeros(1, 28, 14), torch.ones(1, 28, 14)], 2)}, tensor)
    command(*common, "--image", image, "--mask", tensor, "--out", tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b" / "samples.safetensors")["samples"], samples)


def test_what_does_not_fit_is_said(
    files: tuple[Path, Path], tmp_path: Path, command: Callable[..., str]
) -> None:
    image, mask = files
    out = ("--out", tmp_path / "a")
    assert "give --image too" in command("sample", "fashion", "--mask", mask, *out, code=2)
    both = ("--image", image, "--mask", tmp_path / "no.png")
    assert "is not a file" in command("sample", "fashion", *both, *out, code=2)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"mask": torch.ones(5)}, wrong)
    text = command("sample", "fashion", "--image", image, "--mask", wrong, *out, code=2)
    assert "mask must broadcast to a sample" in text

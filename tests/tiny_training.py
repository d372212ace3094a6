"""A training run of a few steps."""

import torch

from fewstep.training.data import ImageData
from fewstep.training.recipe import TrainRecipe

RECIPE = TrainRecipe(
    network={"channels": [8, 8], "blocks": [1, 1], "attention": [1]},
    schedule={"name": "vp-linear"},
    steps=6,
    batch_size=4,
    warmup=2,
    precision="float32",
)


def images(classes=2, n=12):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % classes if classes else None
    return ImageData(pixels, labels, tuple(f"class {i}" for i in range(classes)) or None)

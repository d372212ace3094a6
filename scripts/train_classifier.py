"""Trains a classifier that ships as a feature extractor, and tests it.

Usage: python scripts/train_classifier.py DATA OUT [--epochs 8] [--seed 0]                       (fashion)
       python scripts/train_classifier.py DATA OUT --robust --label-smoothing 0 --seed 1  (fashion-robust)

DATA is a folder with the four idx files of Fashion-MNIST (or any data set in its format).

With ``--robust`` it learns from images with noise (standard deviation 0.4 u^2, u uniform on [0, 1])
and, every second batch, blurred (Gaussian, 0 to 1 pixel): features that see what survives both, as
a person does, while a network that saw clean images alone also reacts to what nobody can see.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.metrics.features import Features, write_features
from fewstep.models.networks.classifier import SmallClassifier
from fewstep.training.data import ImageData, read_images


def _test_images(folder: Path) -> ImageData:
    for suffix in (".gz", ""):
        file = folder / f"t10k-images-idx3-ubyte{suffix}"
        if file.exists():
            return read_images(file)
    raise SystemExit(f"error: {folder} has no t10k-images-idx3-ubyte")


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves a batch by up to 2 pixels, background filled."""
    dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
    padded = functional.pad(images, (2, 2, 2, 2), value=-1.0)
    height, width = images.shape[-2:]
    return padded[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]


def _disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Adds noise of a level of its own to each image, and blurs every second batch."""
    blurred, width = torch.rand(2, generator=generator).tolist()
    if blurred < 0.5:
        distance = torch.arange(-3.0, 4.0)
        kernel = torch.exp(-0.5 * (distance / max(width, 0.05)) ** 2)
        kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, 7)
        padded = functional.pad(images, (3, 3, 3, 3), value=-1.0)
        for weight in (kernel, kernel.transpose(-1, -2)):
            padded = functional.conv2d(padded, weight, groups=images.shape[1])
        images = padded
    level = 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator).square()
    return images + level * torch.randn(images.shape, generator=generator)


def main() -> None:
    """Trains, tests, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--robust", action="store_true")
    options = parser.parse_args()

    data, test = read_images(options.data), _test_images(options.data)
    assert data.labels is not None
    assert test.labels is not None
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = SmallClassifier(in_channels=data.event_shape[0], num_classes=data.num_classes or 1)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    batch, total = 128, options.epochs * (len(data) // 128)
    step = 0
    for epoch in range(options.epochs):
        order = torch.randperm(len(data), generator=generator)
        network.train()
        for index in order[: len(data) // batch * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / total))
            images = _shifted(data.floats(index), generator)
            if options.robust:
                images = _disturbed(images, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images.to(memory_format=torch.channels_last))
            loss = functional.cross_entropy(
                logits.float(), data.labels[index], label_smoothing=options.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}", flush=True)

    training = {"epochs": options.epochs, "seed": options.seed, "images": len(data)}
    training |= {"label_smoothing": options.label_smoothing, "robust": options.robust}
    write_features(options.out, network, training)
    stored = Features.load(options.out)
    accuracy = float((stored.classify(test.floats()) == test.labels).double().mean())
    write_features(options.out, network, {**training, "test_accuracy": accuracy})
    print(f"accuracy on {len(test)} test images: {accuracy:.4f}; written to {options.out}")


if __name__ == "__main__":
    main()

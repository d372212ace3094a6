"""The small classifier whose inner layer is the feature extractor ``fashion``; torch alone."""

from __future__ import annotations

from torch import Tensor, nn


class SmallClassifier(nn.Module):
    r"""A convolutional classifier of small images; its penultimate layer returns features.

    Arguments:
        in_channels: The channels of an image.
        width: The channels after the first layer; the features have 4 times as many.
        num_classes: The number of classes.
    """

    def __init__(self, *, in_channels: int = 1, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "width": width, "num_classes": num_classes}
        self.body = nn.Sequential(
            *_layer(in_channels, width),
            nn.MaxPool2d(2),
            *_layer(width, 2 * width),
            *_layer(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *_layer(2 * width, 4 * width),
            *_layer(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Returns the features, (B, 4 * width), of images (B, C, H, W) in [-1, 1]."""
        return self.body(x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the input of every convolution, (B, C, H, W) each."""
        stages = []
        for part in self.body:
            x = part(x)
            if isinstance(part, nn.ReLU):
                stages.append(x)
        return stages

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits, (B, classes)."""
        return self.head(self.features(x).relu())


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

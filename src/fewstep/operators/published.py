r"""The two published operators, network and temporal blocks, as presets, for parameter counts and for their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.operators.temporal import TemporalConv


@dataclass(frozen=True)
class Preset:
    """The options of a published operator.

    Attributes:
        size: The height and width of an image.
        width: The channels at the first level.
        multiples: The channels of each level, in multiples of ``width``.
        blocks: The residual blocks of a level of the encoder; the decoder has one more.
        attention: The resolutions that have self-attention.
        head: The channels of a head; ``None`` is one head.
        embedding: The width of the time embedding.
        classes: The number of classes, or ``None``.
        modes: The number of temporal modes.
    """

    size: int
    width: int
    multiples: tuple[int, ...]
    attention: tuple[int, ...]
    embedding: int
    head: int | None = None
    blocks: int = 3
    classes: int | None = None
    modes: int = 2


PRESETS = {
    "cifar10": Preset(32, 256, (1, 1, 1), attention=(16, 8), embedding=1024),
    "imagenet64": Preset(
        64, 192, (1, 2, 3, 4), attention=(32, 16, 8), embedding=768, head=64, classes=1000
    ),
}


class _Res(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = _norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm_out = _norm(outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self._resized(functional.silu(self.norm_in(x)))
        h = self.conv_in(h)
        scale, shift = self.modulate(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        return self.skip(self._resized(x)) + self.conv_out(functional.silu(h))

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(x, 2)
        if self.resample == "up":
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


class _Attention(nn.Module):
    def __init__(self, channels: int, head: int | None) -> None:
        super().__init__()
        self.heads = 1 if head is None else channels // head
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v = tokens.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(x.shape))


class _Unit(nn.Module):
    """Residual block, attention, temporal block."""

    def __init__(
        self, inputs: int, outputs: int, preset: Preset, *, attend: bool, compat: bool
    ) -> None:
        super().__init__()
        self.block = _Res(inputs, outputs, preset.embedding)
        self.attention = _Attention(outputs, preset.head) if attend else nn.Identity()
        self.temporal = TemporalConv(outputs, preset.modes, init="published", compat=compat)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.temporal(self.attention(self.block(x, embedding)))


class PublishedOperator(nn.Module):
    r"""The U-Net of progressive distillation with a temporal block after every unit.

    Arguments:
        preset: ``"cifar10"`` or ``"imagenet64"``, or a :class:`Preset`.
        compat: Whether the temporal parameters are as published, including the unused quarter.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449
        | Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022)
        | https://arxiv.org/abs/2202.00512
    """

    def __init__(self, preset: str | Preset = "cifar10", *, compat: bool = True) -> None:
        super().__init__()
        options = PRESETS[preset] if isinstance(preset, str) else preset
        self.preset = options
        width, embedding = options.width, options.embedding
        self.embed_time = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.embed_class = nn.Linear(options.classes, embedding) if options.classes else None
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current, side = [width], width, options.size
        last = len(options.multiples) - 1
        for level, multiple in enumerate(options.multiples):
            for _ in range(options.blocks):
                attend = side in options.attention
                unit = _Unit(current, multiple * width, options, attend=attend, compat=compat)
                self.down.append(unit)
                current = multiple * width
                skips.append(current)
            if level < last:
                self.down.append(_Res(current, current, embedding, "down"))
                skips.append(current)
                side //= 2
        self.middle = _Unit(current, current, options, attend=True, compat=compat)
        self.middle_out = _Res(current, current, embedding)
        for level, multiple in reversed(list(enumerate(options.multiples))):
            for _ in range(options.blocks + 1):
                inputs = current + skips.pop()
                attend = side in options.attention
                self.up.append(
                    _Unit(inputs, multiple * width, options, attend=attend, compat=compat)
                )
                current = multiple * width
            if level:
                self.up.append(_Res(current, current, embedding, "up"))
                side *= 2
        self.norm_out = _norm(current)
        self.conv_out = nn.Conv2d(current, 3, 3, padding=1)

    def temporal_parameters(self) -> int:
        """Returns the number of parameters of the temporal blocks."""
        blocks = [m for m in self.modules() if isinstance(m, TemporalConv)]
        return sum(p.numel() for block in blocks for p in block.parameters())

    def forward(self, x: Tensor, labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        r"""Returns the states (B, M, C, H, W).

        Arguments:
            x: The noise, with shape (B, C, H, W).
            labels: The times u in [0, 1] of the frames, with shape (M): for the cosine schedule
                the time itself, else :math:`\frac{2}{\pi} \arctan e^{-\lambda}`.
            class_labels: The classes, with shape (B).
        """
        frames = len(labels)
        for module in self.modules():
            if isinstance(module, TemporalConv):
                module.set_frames(frames)
        half = self.preset.width // 2
        rate = torch.exp(
            -math.log(10_000.0) / (half - 1) * torch.arange(half, device=x.device, dtype=x.dtype)
        )
        angle = 1000 * labels.to(x)[:, None] * rate
        embedding = self.embed_time(torch.cat([angle.sin(), angle.cos()], dim=-1))[None]
        embedding = embedding.expand(len(x), -1, -1)
        if self.embed_class is not None and class_labels is not None:
            hot = functional.one_hot(class_labels, self.embed_class.in_features).to(x)
            embedding = embedding + self.embed_class(hot)[:, None]
        embedding = embedding.flatten(0, 1)
        h = self.conv_in(x).repeat_interleave(frames, 0)
        skips = [h]
        for unit in self.down:
            h = unit(h, embedding)
            skips.append(h)
        h = self.middle_out(self.middle(h, embedding), embedding)
        for unit in self.up:
            h = unit(torch.cat([h, skips.pop()], 1) if isinstance(unit, _Unit) else h, embedding)
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return h.unflatten(0, (-1, frames))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)

"""The small U-Net of the embedded models and of ``fewstep train``; torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class ResBlock(nn.Module):
    """Two convolutions around a scale and shift by the time embedding; identity at the start."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(_groups(inputs), inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm_out = nn.GroupNorm(_groups(outputs), outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        _silence(self.conv_out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(functional.silu(h))


class Attention(nn.Module):
    """Self-attention over the pixels; identity at the start."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        _silence(self.out)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.qkv(self.norm(x)).reshape(
            batch, 3, self.heads, channels // self.heads, height * width
        )
        q, k, v = tokens.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(batch, channels, height, width))


class Stage(nn.Module):
    """A residual block and, optionally, attention: the unit after which other code may add hooks."""

    def __init__(self, inputs: int, outputs: int, embedding: int, *, heads: int) -> None:
        super().__init__()
        self.block = ResBlock(inputs, outputs, embedding)
        self.attention = Attention(outputs, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


class SmallUNet(nn.Module):
    r"""A class-conditional U-Net for small images.

    Arguments:
        in_channels: The channels of an image.
        patch: The side of the squares of pixels that are folded into channels at the input
            (and unfolded at the output); 2 makes the network four times cheaper. It must divide
            the height and the width.
        channels: The width at each level; each further level halves the resolution.
        blocks: The number of stages at each level, in the encoder and in the decoder.
        attention: The levels (from 0) that have self-attention.
        num_classes: The number of classes, or ``None`` for an unconditional network. Label
            ``num_classes`` is the null label of classifier-free guidance.
        time_scale: The factor of a time before the sinusoidal embedding, so that it
            covers about 0 to 1000.
        input_skip: Whether the input is added to the output, times a factor that depends on the time.
            At high noise ``eps`` is almost the input, to an accuracy that normalised features do not
            have; it matters where :math:`\sigma / \alpha` is large and ``eps`` is predicted.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        patch: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (1, 2, 2),
        attention: Sequence[int] = (2,),
        num_classes: int | None = None,
        time_scale: float = 1.0,
        input_skip: bool = False,
    ) -> None:
        super().__init__()
        _check("in_channels", in_channels)
        _check("patch", patch)
        if num_classes is not None:
            _check("num_classes", num_classes, 1_000_000)
        for name, many, low in (
            ("channels", channels, 1),
            ("blocks", blocks, 1),
            ("attention", attention, 0),
        ):
            if not isinstance(many, (list, tuple)) or len(many) > 16:
                raise ValueError(f"{name} must be a list of at most 16 integers, got {many!r:.60}")
            for value in many:
                _check(name, value, low=low)
        if not channels or len(channels) != len(blocks) or sum(blocks) > 1000:
            raise ValueError(
                "channels and blocks must have one entry for each level, and blocks add up to "
                f"at most 1000; got {channels!r:.60} and {blocks!r:.60}"
            )
        if channels[0] < 2 or not isinstance(time_scale, (int, float)) or not 0 < time_scale < 1e9:
            raise ValueError(
                "the first of channels must be at least 2 and time_scale positive, got "
                f"{channels[0]} and {time_scale!r:.40}"
            )
        self.config = {
            "in_channels": in_channels,
            "patch": patch,
            "channels": list(channels),
            "blocks": list(blocks),
            "attention": list(attention),
            "num_classes": num_classes,
            "time_scale": time_scale,
        }
        if not isinstance(input_skip, bool):
            raise ValueError(f"input_skip must be true or false, got {input_skip!r:.40}")
        if input_skip:  # absent in older files
            self.config["input_skip"] = True
        self.checkpointing = False
        self.patch = patch
        self.time_scale = time_scale
        self.num_classes = num_classes
        width = 4 * channels[0]
        self.frequencies = channels[0]
        self.embed_time = nn.Sequential(
            nn.Linear(2 * self.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.embed_class = nn.Embedding(num_classes + 1, width) if num_classes else None

        heads = [max(1, c // 32) if i in attention else 0 for i, c in enumerate(channels)]
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        current, skips = channels[0], []
        for level, (c, n) in enumerate(zip(channels, blocks, strict=True)):
            stages = nn.ModuleList()
            for _ in range(n):
                stages.append(Stage(current, c, width, heads=heads[level]))
                current = c
                skips.append(c)
            self.down.append(stages)
            last = level == len(channels) - 1
            self.shrink.append(nn.Identity() if last else nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.middle = Stage(current, current, width, heads=heads[-1])
        for level in reversed(range(len(channels))):
            stages = nn.ModuleList()
            for _ in range(blocks[level]):
                stages.append(
                    Stage(current + skips.pop(), channels[level], width, heads=heads[level])
                )
                current = channels[level]
            self.up.append(stages)
            self.grow.append(
                nn.Conv2d(current, channels[level - 1], 3, padding=1) if level else nn.Identity()
            )
            current = channels[level - 1] if level else current
        self.norm_out = nn.GroupNorm(_groups(current), current)
        self.conv_out = nn.Conv2d(current, in_channels * patch**2, 3, padding=1)
        _silence(self.conv_out)
        self.skip_factor = nn.Linear(width, 1) if input_skip else None
        if self.skip_factor is not None:
            nn.init.zeros_(self.skip_factor.weight)
            nn.init.ones_(self.skip_factor.bias)

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing: the backward pass computes the stages again."""
        self.checkpointing = True

    def _call(self, stage: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, embedding, use_reentrant=False)
        return stage(h, embedding)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        r"""Returns the prediction.

        Arguments:
            x: The noisy images, with shape (B, C, H, W).
            t: The times, with shape (B,).
            class_labels: The classes, integers with shape (B,); left out, the null label.
        """
        h, embedding, skips = self.encode(x, t, class_labels)
        h = self._call(self.middle, h, embedding)
        for stages, grow in zip(self.up, self.grow, strict=True):
            for stage in stages.children():
                h = self._call(stage, torch.cat([h, skips.pop()], dim=1), embedding)
            if skips:
                h = grow(functional.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        h = self.conv_out(functional.silu(self.norm_out(h)))
        output = functional.pixel_shuffle(h, self.patch)
        if self.skip_factor is None:
            return output
        return output + self.skip_factor(embedding)[:, :, None, None] * x

    def encode(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the output of the encoder, the embedding of times, and the features of each stage.

        Arguments:
            x: As for :meth:`forward`.
            t: As for :meth:`forward`.
            class_labels: As for :meth:`forward`.
        """
        embedding = self.embed_time(_sinusoid(t * self.time_scale, self.frequencies).to(x.dtype))
        if self.embed_class is not None:
            if class_labels is None:
                null = self.embed_class.num_embeddings - 1
                class_labels = torch.full((x.shape[0],), null, device=x.device)
            embedding = embedding + self.embed_class(class_labels)
        embedding = functional.silu(embedding)

        h = self.conv_in(functional.pixel_unshuffle(x, self.patch))
        skips = []
        for stages, shrink in zip(self.down, self.shrink, strict=True):
            for stage in stages.children():
                h = self._call(stage, h, embedding)
                skips.append(h)
            h = shrink(h)
        return h, embedding, skips


def _silence(layer: nn.Conv2d) -> None:
    """Initialises a layer to return zeros."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check(name: str, value: object, most: int = 65_536, *, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= most:
        raise ValueError(f"{name} must be an integer from {low} to {most}, got {value!r:.40}")


def _groups(channels: int) -> int:
    return math.gcd(channels, max(1, min(16, channels // 4)))


def _sinusoid(t: Tensor, frequencies: int) -> Tensor:
    # Times have at least float32: in bfloat16 999 would become 1000.
    t = t if t.dtype == torch.float64 else t.float()
    rate = torch.arange(frequencies, device=t.device, dtype=t.dtype) / frequencies
    angle = t[:, None] * torch.exp(-math.log(10_000.0) * rate)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def build(config: dict[str, Any]) -> SmallUNet:
    """Returns the network that :attr:`SmallUNet.config` describes."""
    return SmallUNet(**config)


def lay_out(network: nn.Module) -> nn.Module:
    """Sets the memory format in which the network is fastest; returns it.

    channels_last: a fifth faster on a CPU, attention too, and the layout of tensor cores.
    """
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

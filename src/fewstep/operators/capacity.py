"""Blocks without time: controls of equal size or cost that replace temporal blocks."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional


class Pointwise(nn.Module):
    r"""Two matrices on the channels of each place: :math:`x + B \, \mathrm{silu}(A x)`; the identity at initialisation.

    Arguments:
        channels: The number C of channels.
        hidden: The width between; :math:`2 C \cdot` hidden parameters.
        tokens: Whether features are (B, L, C) instead of (B, C, \*).
    """

    def __init__(self, channels: int, hidden: int, *, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.enter = nn.Linear(channels, hidden, bias=False)
        self.leave = nn.Linear(hidden, channels, bias=False)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return x + self.leave(functional.silu(self.enter(x)))
        places = x.flatten(2).transpose(1, 2)
        added = self.leave(functional.silu(self.enter(places)))
        return x + added.transpose(1, 2).reshape(x.shape)


class Deeper(nn.Module):
    """Further residual blocks of two convolutions each; the identity at initialisation.

    Arguments:
        channels: The number of channels.
        depth: The number of blocks.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Residual(channels) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(channels, max(1, min(16, channels // 4)))
        self.norm_in, self.norm_out = (nn.GroupNorm(groups, channels) for _ in range(2))
        self.conv_in, self.conv_out = (
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)
        )
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        return x + self.conv_out(functional.silu(self.norm_out(h)))

"""Blocks without time: controls of equal size or cost that replace temporal blocks."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolutions by the dimensions of features besides batch and channels."""


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
        places = x if self.tokens else x.movedim(1, -1)
        added = self.leave(functional.silu(self.enter(places)))
        return x + (added if self.tokens else added.movedim(-1, 1))


class Deeper(nn.Module):
    """Further residual blocks of two convolutions each; the identity at initialisation.

    Arguments:
        channels: The number of channels.
        depth: The number of blocks.
        dims: The dimensions of features besides batch and channels: 1, 2 or 3.
    """

    def __init__(self, channels: int, depth: int, dims: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Residual(channels, dims) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Residual(nn.Module):
    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        groups = math.gcd(channels, max(1, min(16, channels // 4)))
        self.norm_in, self.norm_out = (nn.GroupNorm(groups, channels) for _ in range(2))
        kind = CONVOLUTIONS[dims]
        self.conv_in, self.conv_out = (kind(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        return x + self.conv_out(functional.silu(self.norm_out(h)))

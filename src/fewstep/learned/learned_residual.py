r"""A spatial residual as parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise import generator_at
from fewstep.learned.judges import IMAGE
from fewstep.sampling.residual import INPUTS, MOST_BYTES, Residual

WIDTH = 16
"""The channels between the two convolutions."""
BUDGETS = range(2, 5)
"""The numbers of evaluations for which a residual is worth its cost."""


class LearnedResidual(nn.Module):
    r"""The tensors of a :class:`~fewstep.sampling.residual.Residual` as parameters, zero at the start.

    The first convolution begins at fixed random weights, of which the parameters are changes; the last
    begins at zero, so that nothing is corrected.

    It closes what a linear combination of states and predictions cannot reach at 2 to 4 evaluations. The form is
    ours, not published.

    Arguments:
        evaluations: The number of evaluations, 2 to 4.
        shape: The shape (C, H, W) of a sample; ``None`` if it is not known.

    Raises:
        ValueError: If a residual is not made for such samples or such a budget.
    """

    start: Tensor

    def __init__(self, evaluations: int, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        if shape is None or len(shape) != IMAGE:
            raise ValueError(
                "a spatial residual is a convolution over images (C, H, W); the model's samples have "
                f"shape {shape}: leave residual out"
            )
        if evaluations not in BUDGETS:
            raise ValueError(
                f"a spatial residual is for {BUDGETS[0]} to {BUDGETS[-1]} evaluations, where linear "
                f"combinations are not enough, got {evaluations}: leave residual out"
            )
        c, k = shape[0], evaluations
        generator = generator_at("search", "residual", k, c)
        start = torch.randn((k, WIDTH, INPUTS * c, 3, 3), generator=generator).double()
        self.register_buffer("start", start / (9 * INPUTS * c) ** 0.5, persistent=False)
        for name, size in (
            ("first", start.shape),
            ("first_bias", (k, WIDTH)),
            ("last", (k, c, WIDTH, 3, 3)),
            ("last_bias", (k, c)),
        ):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=torch.float64)))
        if self().bytes > MOST_BYTES:
            raise ValueError(
                f"a spatial residual for {c} channels has {self().bytes} bytes, more than {MOST_BYTES}: "
                "leave residual out"
            )

    def forward(self) -> Residual:
        """Returns the residual of the present parameters, differentiable."""
        first, bias, last, last_bias = self.parameters()
        return Residual(self.start + first, bias, last, last_bias)

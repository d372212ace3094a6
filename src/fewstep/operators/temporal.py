r"""The temporal block: a convolution along the frames of a trajectory, in real arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BASES = ("dft", "dct", "dense")
INITS = ("zero", "published")


class TemporalConv(nn.Module):
    r"""Lets the M frames of each trajectory exchange information: :math:`T u = u + \varsigma(K u)`.

    K mixes the channels of the first J coefficients of u along the frames and drops the others;
    :math:`\varsigma` is the leaky rectifier. With the basis ``dft``, phase
    :math:`p = 2 \pi j m / M` and complex matrices :math:`R_j = A_j + i B_j`,

    .. math:: a_j = \sum_m \cos(p) u_m, \quad b_j = -\sum_m \sin(p) u_m, \quad
        k_j = a_j A_j - b_j B_j, \quad l_j = a_j B_j + b_j A_j

    .. math:: (K u)_m = \sum_j \frac{w_j}{M} (\cos(p) k_j - \sin(p) l_j), \quad
        w_0 = w_{M/2} = 1, \text{ else } 2

    which is the inverse real Fourier transform of :math:`R \cdot F u`. The imaginary parts that
    the inverse transform discards (of the mean, and of j = M/2) are not parameters here. The basis
    ``dct`` uses :math:`\cos(\pi j (m + \frac12) / M)`, which does not wrap around, with one matrix
    per mode; ``dense`` mixes every frame into every other, with :math:`M^2` matrices.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023), section 3
        | https://arxiv.org/abs/2211.13449

    Cost: per pixel and trajectory :math:`(4 J - 3) C^2` multiplications (``dft``), :math:`J C^2`
    (``dct``) or :math:`M^2 C^2` (``dense``).

    Arguments:
        channels: The number C of channels.
        modes: The number J of coefficients; at most as many as M frames have.
        frames: The number M of frames; it can be changed by :meth:`set_frames`, except of
            ``dense``.
        basis: ``"dft"``, ``"dct"`` or ``"dense"``.
        slope: The slope of the leaky rectifier below zero.
        init: ``"zero"``, the identity exactly, or ``"published"``, uniform on
            :math:`[0, 1 / C^2)`.
        compat: Whether to keep the parameters as they were published: one tensor (C, C, J, 2)
            with its unused part. Only with ``dft``.
        tokens: Whether features are (B, L, C) instead of (B, C, \*).

    Raises:
        ValueError: If an argument is not one of these.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(
        self,
        channels: int,
        modes: int = 2,
        *,
        frames: int = 4,
        basis: str = "dft",
        slope: float = 0.01,
        init: str = "zero",
        compat: bool = False,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("modes", modes), ("frames", frames)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 65_536:
                raise ValueError(f"{name} must be a positive integer, got {value!r:.40}")
        if basis not in BASES:
            raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r:.40}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r:.40}")
        if compat and basis != "dft":
            raise ValueError(f"the published layout has the basis dft, got {basis!r}")
        self.channels, self.basis, self.slope = channels, basis, float(slope)
        self.compat, self.tokens = compat, tokens
        square = (channels, channels)
        if basis == "dense":
            self.modes = frames
            self.weight = nn.Parameter(torch.empty(frames, frames, *square))
        elif basis == "dct":
            self.modes = min(modes, frames)
            self.weight = nn.Parameter(torch.empty(self.modes, *square))
        elif compat:
            self.modes = modes
            self.weight = nn.Parameter(torch.empty(*square, modes, 2))
        else:
            self.modes = min(modes, frames // 2 + 1)
            self.real = nn.Parameter(torch.empty(self.modes, *square))
            self.imag = nn.Parameter(torch.empty(min(self.modes - 1, (frames - 1) // 2), *square))
        for parameter in self.parameters():
            if init == "zero":
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, 0, 1 / channels**2)
        self.frames = 0
        self.set_frames(frames)

    def set_frames(self, frames: int) -> None:
        """Sets the number of frames and computes the transforms for it.

        Raises:
            ValueError: If the basis is ``dense``, which has one number of frames.
        """
        if frames == self.frames:
            return
        if self.basis == "dense" and self.frames:
            raise ValueError(
                f"the basis dense has a fixed number of frames, {self.frames}, got {frames}"
            )
        self.frames = frames
        self._lay_out()

    def _lay_out(self) -> None:
        if self.basis != "dense":
            like = next(self.parameters())
            there, back = transforms(self.basis, self.modes, self.frames)
            self.analysis = there.to(device=like.device, dtype=like.dtype)
            self.synthesis = back.to(device=like.device, dtype=like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemporalConv:
        # The transforms are not part of the state; they follow the parameters to device and type.
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def forward(self, x: Tensor) -> Tensor:
        r"""Returns the features after the exchange between frames.

        Arguments:
            x: Features (B M, C, \*), or (B M, L, C) of tokens; the frames of a trajectory follow
                each other.
        """
        # Channels last, so that the matrices multiply contiguous rows.
        places = x if self.tokens else x.movedim(1, -1)
        u = places.reshape(-1, self.frames, places[0].numel())
        if self.basis == "dense":
            split = u.unflatten(2, (-1, self.channels))
            mixed = torch.einsum("bnsc,nmco->bmso", split, self.weight)
        else:
            coefficients = (self.analysis @ u).unflatten(2, (-1, self.channels))
            mixed = self.synthesis @ self._mix(coefficients).flatten(2)
        added = functional.leaky_relu(mixed, self.slope).reshape(places.shape).to(x.dtype)
        return x + (added if self.tokens else added.movedim(-1, 1))

    def _mix(self, u: Tensor) -> Tensor:
        """Mixes the channels of coefficients (B, Q, S, C)."""
        if self.basis == "dct":
            return torch.stack([u[:, j] @ self.weight[j] for j in range(u.shape[1])], 1)
        real, imag = self._complex()
        count = min(self.modes, self.frames // 2 + 1)
        cosines, sines = [u[:, 0] @ real[0]], []
        for j in range(1, count):
            a, k = u[:, j], u[:, j] @ real[j]
            if count + j <= u.shape[1]:  # the mode has a sine: all but j = M / 2
                b, l = u[:, count + j - 1], u[:, count + j - 1] @ real[j]  # noqa: E741
                if j <= len(
                    imag
                ):  # with more frames than initially, a mode may lack its imaginary part
                    k, l = k - b @ imag[j - 1], l + a @ imag[j - 1]  # noqa: E741
                sines.append(l)
            cosines.append(k)
        if not sines and imag.numel() and imag.requires_grad:
            # Two frames have no sines: the parameter gets a gradient of zero all the same, for which processes
            # that train together wait.
            cosines[0] = cosines[0] + 0 * imag.sum()
        return torch.stack([*cosines, *sines], 1)

    def _complex(self) -> tuple[Tensor, Tensor]:
        """Returns the real parts (J, C, C) and the imaginary parts of the modes from 1 on."""
        if not self.compat:
            return self.real, self.imag
        parts = self.weight.permute(2, 3, 0, 1)
        return parts[:, 0], parts[1:, 1]

    @torch.no_grad()
    def load_published(self, weight: Tensor) -> None:
        """Loads the published parameters (C, C, J, 2), input channel first, real part first.

        Raises:
            ValueError: If their shape is not this block's.
        """
        expected = (self.channels, self.channels, self.modes, 2)
        if self.basis != "dft" or tuple(weight.shape) != expected:
            raise ValueError(
                f"published parameters of this block have basis dft and shape {expected}, "
                f"got {tuple(weight.shape)} for the basis {self.basis}"
            )
        if self.compat:
            self.weight.copy_(weight)
            return
        parts = weight.permute(2, 3, 0, 1)
        self.real.copy_(parts[:, 0])
        self.imag.copy_(parts[1 : len(self.imag) + 1, 1])

    def extra_repr(self) -> str:
        return f"{self.channels}, modes={self.modes}, frames={self.frames}, basis={self.basis!r}"


def transforms(basis: str, modes: int, frames: int) -> tuple[Tensor, Tensor]:
    r"""Returns the real transforms of frames: analysis (Q, M) and synthesis (M, Q), float64.

    The rows of ``dft`` are the cosines of the modes, and then minus the sines of those that have one.

    Arguments:
        basis: ``"dft"`` or ``"dct"``.
        modes: The number J of modes; at most as many as M frames have.
        frames: The number M of frames.
    """
    m = torch.arange(frames, dtype=torch.float64)
    if basis == "dct":
        j = torch.arange(min(modes, frames), dtype=torch.float64)
        there = torch.cos(math.pi / frames * j[:, None] * (m + 0.5))
        weight = (2 - (j == 0).double()) / frames
        return there, (weight[:, None] * there).T
    count = min(modes, frames // 2 + 1)
    waves = min(count - 1, (frames - 1) // 2)
    j = torch.arange(count, dtype=torch.float64)
    phase = 2 * math.pi / frames * j[:, None] * m
    there = torch.cat([phase.cos(), -phase[1 : waves + 1].sin()])
    whole = (j == 0) | (2 * j == frames)
    weight = (2 - whole.double()) / frames
    weight = torch.cat([weight, weight[1 : waves + 1]])
    return there, (weight[:, None] * there).T


def published_parameters(
    levels: list[tuple[int, int]], modes: int = 2, *, device: str = "meta"
) -> int:
    """Returns the number of published temporal parameters, including the unused ones.

    Arguments:
        levels: (channels, number of blocks) for each level.
        modes: The number of modes.
        device: The device of the blocks; on ``"meta"`` nothing is allocated.
    """
    with torch.device(device):
        blocks = [
            TemporalConv(channels, modes, compat=True) for channels, n in levels for _ in range(n)
        ]
    return sum(p.numel() for block in blocks for p in block.parameters())

r"""The power spectrum of trajectories over time: how many modes and frames an operator needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.studies.spline import spline_matrix

ENERGY = 0.999
"""The share of the energy that the suggested modes hold."""

RECONSTRUCTION = 1e-3
"""The relative mean square error that the suggested frames may leave."""

FRAMES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The numbers of frames to try."""

CHUNK = 64


@dataclass(frozen=True)
class Basis:
    """The distribution of the energy over one basis in time.

    Attributes:
        name: ``"dft"`` (periodic) or ``"dct"`` (even extension: no jump from the end to the start).
        energy: The share of each mode, float64, sums to 1.
        modes_99: The least number of modes with 99 % of the energy.
        modes: The least number of modes with 99.9 %: the suggested J.
        frames: The suggested M: at least 2 J, and enough for the spline.
    """

    name: str
    energy: Tensor
    modes_99: int
    modes: int
    frames: int


@dataclass(frozen=True)
class Spectrum:
    r"""The result of :func:`time_spectrum`.

    Attributes:
        variable: The variable in which the frames are even: ``"t"`` or ``"sqrt"``.
        resampled: Whether the states were interpolated onto even places first.
        trajectories: Their number.
        dft: The periodic basis.
        dct: The cosine basis.
        spline: For each number M of frames, the relative mean square error of a cubic spline
            through M + 1 states.
        spline_frames: The least M whose spline is good to 1e-3, or ``None``.
        schedule_residual: The relative residual of the best fit by
            :math:`\alpha_t a + \sigma_t b`, or ``None`` without a schedule.
    """

    variable: str
    resampled: bool
    trajectories: int
    dft: Basis
    dct: Basis
    spline: dict[int, float]
    spline_frames: int | None
    schedule_residual: float | None

    def to_record(self) -> dict[str, Any]:
        """Returns the numbers as a JSON object."""

        def basis(item: Basis) -> dict[str, Any]:
            return {
                "energy": item.energy.tolist(),
                "modes_99": item.modes_99,
                "modes": item.modes,
                "frames": item.frames,
            }

        return {
            "variable": self.variable,
            "resampled": self.resampled,
            "trajectories": self.trajectories,
            "dft": basis(self.dft),
            "dct": basis(self.dct),
            "spline": {str(m): error for m, error in self.spline.items()},
            "spline_frames": self.spline_frames,
            "schedule_residual": self.schedule_residual,
        }


def time_spectrum(
    states: Tensor,
    times: Tensor,
    *,
    variable: str = "t",
    schedule: NoiseSchedule | None = None,
) -> Spectrum:
    r"""Returns the power spectrum of trajectories over time.

    With K states at even places, :math:`F_k = \frac1K \sum_n u_n e^{-2 \pi i k n / K}` for each
    coordinate; the energy is :math:`|F_k|^2`, doubled for :math:`0 < k < K / 2`, averaged over
    coordinates and samples, divided by its sum. The same of the even extension
    :math:`[u, \text{reversed } u]` (the DCT-II): of a signal that is not periodic the plain
    transform decays as :math:`k^{-2}` however smooth it is, because of the jump from its end to its start.

    States that are not evenly spaced in the variable are interpolated by a cubic spline, and ``resampled`` is true.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449

    Arguments:
        states: The trajectories, with shape (B, S, \*); 256 of 128 states or more are advised.
        times: The times of the states, float64, shape (S), in strict order.
        variable: The variable in which the frames of the operator will be even: ``"t"``, or ``"sqrt"``.
        schedule: The schedule, to compare with the basis :math:`\{\alpha_t, \sigma_t\}`.

    Raises:
        ValueError: If shapes do not fit, there are fewer than 4 states, or all of them are 0.
    """
    if variable not in ("t", "sqrt"):
        raise ValueError(f"variable must be 't' or 'sqrt', got {variable!r}")
    if states.ndim < 3 or times.shape != states.shape[1:2]:
        raise ValueError(
            f"states must have shape (B, S, *) and times (S), got {tuple(states.shape)} and "
            f"{tuple(times.shape)}"
        )
    if len(times) < 4 or not len(states):
        raise ValueError(f"a spectrum needs at least 4 states, got {len(times)}")
    times = times.detach().double().cpu()
    place = times if variable == "t" else times.clamp_min(0).sqrt()
    even = torch.linspace(float(place[0]), float(place[-1]), len(place), dtype=torch.float64)
    resampled = bool((place - even).abs().max() > 0.02 * (even[0] - even[1]).abs())
    onto = spline_matrix(place, even) if resampled else None
    tried = [m for m in FRAMES if 2 * m < len(even)]
    gram = _gram(states, onto)
    total = float(gram.diagonal().sum())
    if not total > 0:
        raise ValueError("the states are all 0, or not finite: there is no spectrum")
    spline = {m: _spline_error(gram, even, m) / total for m in tried}
    frames = next((m for m, error in spline.items() if error <= RECONSTRUCTION), None)
    return Spectrum(
        variable,
        resampled,
        len(states),
        _basis("dft", _dft_energy(gram), frames),
        _basis("dct", _dct_energy(gram), frames),
        spline,
        frames,
        None if schedule is None else _schedule_residual(gram, even, variable, schedule) / total,
    )


def _gram(states: Tensor, onto: Tensor | None) -> Tensor:
    """Returns the sum over samples and coordinates of the products of two times, (K, K).

    Everything below is quadratic in the trajectories, so these products are sufficient.
    """
    size = states.shape[1]
    gram = torch.zeros((size, size), dtype=torch.float64)
    for part in states.split(CHUNK):
        flat = part.detach().cpu().double().flatten(2).transpose(0, 1).flatten(1)
        gram += flat @ flat.T
    return gram if onto is None else onto @ gram @ onto.T


def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """Returns the energy of each row of a transform matrix, (R)."""
    return ((rows @ gram) * rows).sum(1).clamp_min(0)


def _dft_energy(gram: Tensor) -> Tensor:
    size = len(gram)
    k = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None]
    phase = 2 * torch.pi * k * torch.arange(size, dtype=torch.float64) / size
    energy = _quadratic(phase.cos(), gram) + _quadratic(phase.sin(), gram)
    twice = torch.full_like(energy, 2.0)
    twice[0] = 1.0
    if size % 2 == 0:
        twice[-1] = 1.0
    energy = energy * twice
    return energy / energy.sum()


def _dct_energy(gram: Tensor) -> Tensor:
    size = len(gram)
    k = torch.arange(size, dtype=torch.float64)[:, None]
    phase = torch.pi * k * (torch.arange(size, dtype=torch.float64) + 0.5) / size
    energy = 2 * _quadratic(phase.cos(), gram)
    energy[0] /= 2
    return energy / energy.sum()


def _basis(name: str, energy: Tensor, spline_frames: int | None) -> Basis:
    held = energy.cumsum(0)
    few, most = (int((held < share - 1e-12).sum()) + 1 for share in (0.99, ENERGY))
    return Basis(name, energy, few, most, max(2 * most, spline_frames or 0))


def _spline_error(gram: Tensor, even: Tensor, frames: int) -> float:
    """Returns the squared error of the spline through frames + 1 states, over all states."""
    size = len(even)
    indices = torch.linspace(0, size - 1, frames + 1, dtype=torch.float64).round().long()
    back = torch.zeros((size, size), dtype=torch.float64)
    back[:, indices] = spline_matrix(even[indices], even)
    return float(_quadratic(torch.eye(size, dtype=torch.float64) - back, gram).sum())


def _schedule_residual(
    gram: Tensor, even: Tensor, variable: str, schedule: NoiseSchedule
) -> float:
    times = even if variable == "t" else even.square()
    columns = torch.stack([schedule.alpha(times), schedule.sigma(times)], 1)
    q, _ = torch.linalg.qr(columns)
    left = torch.eye(len(even), dtype=torch.float64) - q @ q.T
    return float(_quadratic(left, gram).sum())

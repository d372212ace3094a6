r"""Operators: networks that map a state of a trajectory to others, in one evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.conditions import repeat
from fewstep.models.denoiser import Denoiser
from fewstep.operators.capacity import Deeper, Pointwise
from fewstep.operators.insertion import (
    Site,
    Sites,
    TimeAxis,
    attach,
    blocks,
    detach,
    is_known,
    known_sites,
)
from fewstep.operators.layout import SECOND_TIME, Layout, check_times, output_map
from fewstep.operators.second_time import (
    SecondTime,
    noise_angle,
    second_times,
    time_host,
    time_sites,
)
from fewstep.operators.temporal import TemporalConv


class Operator(nn.Module):
    """A copy of a denoiser whose network has blocks, and its layout; what all operators share.

    Attributes:
        times: The times of its frames (of a flow map: of its knots), decreasing, without the input's.
        sites: The sites of its blocks.

    Arguments:
        teacher: The denoiser; it is copied, never changed.
        layout: Times, labels, blocks.
        example: Conditions of one sample, for the evaluation that infers the channels of named sites.
        sites: The sites that the layout names, if their channels are known: then nothing is evaluated.

    Raises:
        TypeError: If the teacher is not a denoiser.
        ValueError: If it has no parameters, or is wrapped (guidance, clipping).
    """

    def __init__(
        self,
        teacher: Denoiser,
        layout: Layout,
        *,
        example: dict[str, Any] | None = None,
        sites: Sequence[Site] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, Denoiser):
            raise TypeError(
                f"an operator needs a Denoiser as its teacher, got {type(teacher).__name__}"
            )
        if not any(True for _ in teacher.parameters()):
            raise ValueError(
                "this denoiser has no parameters to train; an operator needs a network"
            )
        if getattr(teacher, "inner", None) is not None:
            raise ValueError(
                f"an operator needs the model itself, not {type(teacher).__name__}; "
                "guidance and clipping are part of the recorded trajectories"
            )
        self.model = copy.deepcopy(teacher)
        self.layout, self.times = layout, layout.times
        self.host = self._find_host(self.model, layout.sites)
        self.sites: list[Site] = []
        if layout.extra != "none":
            with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
                self.sites = attach(
                    self.network,
                    lambda site: _block(site, layout),
                    sites=layout.sites if sites is None else sites,
                    known=self._known_sites,
                    example=lambda _: self._example(example or {}),
                )

    @staticmethod
    def _known_sites(network: nn.Module) -> list[Site]:
        """Returns the sites of this kind of operator in a network; raises ``ValueError`` if they are not known."""
        return known_sites(network)

    def _find_host(self, model: Denoiser, sites: Sites) -> str:
        """Returns the name of the module with the blocks: the first with known sites, or the whole model."""
        if sites is not None:
            return "network" if isinstance(getattr(model, "network", None), nn.Module) else ""
        named = model.named_modules()
        return next((name for name, module in named if is_known(module, self._known_sites)), "")

    def teacher(self) -> Denoiser:
        """Returns a copy of the model without the blocks; its weights are the student's."""
        model = copy.deepcopy(self.model)
        detach(model)
        return model

    @property
    def network(self) -> nn.Module:
        """The module with the blocks."""
        return self.model.get_submodule(self.host)

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's schedule."""
        return self.model.schedule

    def overhead(self) -> tuple[int, int]:
        """Returns the parameters of the network and those of its blocks."""
        own = sum(p.numel() for b in blocks(self.network).values() for p in b.parameters())
        return sum(p.numel() for p in self.model.parameters()) - own, own

    @torch.no_grad()
    def _example(self, cond: dict[str, Any]) -> None:
        like = next(self.parameters())
        shape = self.model.event_shape
        if shape is None:
            raise ValueError(
                "the shape of a sample is not known; Denoiser.wrap(..., event_shape=)"
            )
        x = torch.zeros((1, *shape), device=like.device)
        t = torch.full((1,), float(self.layout.start), device=like.device)
        self.model.raw(x, t, **self.model.prepare(1, cond))


class TrajectoryOperator(Operator):
    r"""Maps :math:`x_T` to the states at M times, in one evaluation of a network.

    The network is a copy of a denoiser's, with the input repeated M times, each with the label of
    its frame, and blocks in which the frames exchange information. The model output, converted to
    data :math:`F_m`, gives the state that is consistent with it,

    .. math:: \hat x(t_m) = \frac{\sigma_m}{\sigma_T} x_T
        + \left( \alpha_m - \alpha_T \frac{\sigma_m}{\sigma_T} \right) F_m(x_T)

    so that :math:`\hat x(T) = x_T` for any model output, and with a label T and one frame
    the operator starts as one step of DDIM. At :math:`\sigma_m = 0` the frame is
    :math:`F_m`. Where the noise level of a label is below that of the input, the input is scaled to the size
    of states at that label (a factor of 1 for variance-preserving schedules).

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449

    Arguments:
        teacher: The denoiser; it is copied, never changed.
        layout: Times, labels, blocks.
        example: Conditions of one sample, for the evaluation that infers the channels of named sites.
        sites: The sites that the layout names, if their channels are known.
    """

    labels: Tensor
    second: Tensor
    keep: Tensor
    gain: Tensor
    scale: Tensor

    def __init__(
        self,
        teacher: Denoiser,
        layout: Layout,
        *,
        example: dict[str, Any] | None = None,
        sites: Sequence[Site] | None = None,
    ) -> None:
        super().__init__(teacher, layout, example=example, sites=sites)
        if layout.labels == "both":
            host = time_host(self.network) or self.network
            with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
                attach(host, lambda site: SecondTime(site.channels), known=time_sites)
        self.embeddings = second_times(self.network)
        self.axis = TimeAxis(self.network, len(layout.times))
        self.set_times(layout.times)

    @property
    def frames(self) -> int:
        """The number M of frames."""
        return len(self.times)

    def set_times(self, times: Sequence[float]) -> None:
        """Sets the times of the frames; other times than those of training are allowed, with unknown quality."""
        check_times(times, self.layout.start)
        self.times = tuple(float(t) for t in times)
        self.axis.frames = len(times)
        self._lay_out()

    def _lay_out(self) -> None:
        like = next(self.parameters())
        layout = output_map(
            self.schedule, self.model.native, self.times, self.layout.start, self.layout
        )
        times = torch.tensor([self.layout.start, *self.times], dtype=torch.float64)
        angles = noise_angle(*self.schedule.scales(times))
        layout["second"] = torch.stack([angles[:1].expand(self.frames), angles[1:]], -1)
        for name, value in layout.items():
            kind = torch.float64 if like.dtype == torch.float64 else torch.float32
            setattr(self, name, value.to(device=like.device, dtype=kind))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrajectoryOperator:
        # Times and factors of the output map keep their precision for any type of weights.
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def forward(self, x: Tensor, **cond: Any) -> Tensor:
        r"""Returns the states (B, M, \*).

        Arguments:
            x: The initial states, with shape (B, \*).
            cond: The conditions; tensors and lists of B values are repeated for the frames.
        """
        batch, frames = len(x), len(self.times)
        column = (-1, *[1] * (x.ndim - 1))
        rows = x.repeat_interleave(frames, 0) if frames > 1 else x
        scale = self.scale.to(x.dtype).repeat(batch).reshape(column)
        repeated = repeat(cond, frames)
        for block in self.embeddings:
            block.times = self.second.repeat(batch, 1)
        value = self.model.raw(rows * scale, self.labels.repeat(batch), **repeated)
        keep = self.keep.to(x.dtype).repeat(batch).reshape(column)
        gain = self.gain.to(x.dtype).repeat(batch).reshape(column)
        return (keep * rows + gain * value.to(x.dtype)).unflatten(0, (batch, frames))


def _block(site: Site, layout: Layout) -> nn.Module:
    if layout.extra == SECOND_TIME:
        if site.dims:
            raise ValueError(
                f"the module {site.name!r} returns features of {site.dims + 2} dimensions; a flow map needs the module "
                "that embeds the time, with an output (batch, channels)"
            )
        return SecondTime(site.channels)
    if layout.extra == "temporal":
        return TemporalConv(
            site.channels,
            layout.modes,
            frames=len(layout.times),
            basis=layout.basis,
            slope=layout.slope,
            tokens=site.tokens,
        )
    if layout.extra == "deeper" and not site.tokens and site.dims:
        return Deeper(site.channels, max(1, round(layout.size)), site.dims)
    # A residual block of two convolutions costs as much as a hidden width of nine channels.
    hidden = layout.size * site.channels * (9 if layout.extra == "deeper" else 1)
    return Pointwise(site.channels, max(1, round(hidden)), tokens=site.tokens)

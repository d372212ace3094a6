r"""The operator: a network that maps initial noise to the states of a trajectory in one evaluation."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.operators.capacity import Deeper, Pointwise
from fewstep.operators.insertion import Site, Sites, TimeAxis, attach, blocks, is_known
from fewstep.operators.temporal import TemporalConv
from fewstep.prediction import Prediction, coefficients
from fewstep.sampling import Run, Trajectory
from fewstep.schedules import NoiseSchedule

OUTPUTS = ("convert", "direct")
LABELS = ("target", "start")
EXTRAS = ("none", "temporal", "pointwise", "deeper")


@dataclass(frozen=True)
class Layout:
    r"""What an operator is, besides its weights.

    Attributes:
        times: The times of the M frames, decreasing; the last is the sample's.
        start: The time of the input.
        labels: The label of a frame: ``"target"``, its own time, or ``"start"``, the noise level
            of the input.
        output: ``"convert"``: the network's answer is converted to data with the coefficients of
            the label, so that the start is the teacher; ``"direct"``: the answer is the data.
        extra: What is attached to the network: ``"temporal"`` blocks, ``"none"``, or in their
            place ``"pointwise"`` or ``"deeper"`` blocks that know no time.
        modes: The modes J of temporal blocks.
        basis: Their basis.
        slope: The slope of their rectifier.
        size: The hidden width (a multiple of the channels) of pointwise blocks, or the number of
            residual blocks of deeper ones.
        sites: The names of the hosts; ``None`` if the network is known.
    """

    times: tuple[float, ...]
    start: float
    labels: str = "target"
    output: str = "convert"
    extra: str = "temporal"
    modes: int = 2
    basis: str = "dft"
    slope: float = 0.01
    size: float = 1.0
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("labels", self.labels, LABELS),
            ("output", self.output, OUTPUTS),
            ("extra", self.extra, EXTRAS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.40}")
        check_times(self.times, self.start)
        if isinstance(self.size, bool) or not isinstance(self.size, (int, float)):
            raise ValueError(f"size must be a number, got {self.size!r:.40}")
        if not 0 < self.size <= 1024:
            raise ValueError(f"size must be positive and at most 1024, got {self.size!r:.40}")


def check_times(times: Sequence[float], start: float) -> None:
    """Raises unless times decrease from below the start.

    Raises:
        ValueError: With what is wrong.
    """
    if not times or len(times) > 4096:
        raise ValueError(f"an operator has 1 to 4096 frames, got {len(times)} times")
    for value in (start, *times):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"times must be numbers, got {value!r:.40}")
        if not math.isfinite(value):
            raise ValueError(f"times must be finite, got {value!r:.40}")
    if any(a <= b for a, b in zip((start, *times), times, strict=False)):
        raise ValueError(f"times must decrease from below the start {start:g}, got {list(times)}")


class TrajectoryOperator(nn.Module):
    r"""Maps :math:`x_T` to the states at M times, in one evaluation of a network.

    The network is a copy of a denoiser's, with the input repeated M times, each with the label
    of its frame, and blocks between which the frames meet. Its answer, converted to data
    :math:`F_m`, gives the state that is consistent with it,

    .. math:: \hat x(t_m) = \frac{\sigma_m}{\sigma_T} x_T
        + \left( \alpha_m - \alpha_T \frac{\sigma_m}{\sigma_T} \right) F_m(x_T)

    so that :math:`\hat x(T) = x_T` whatever the network says, and with a label T and one frame
    the operator starts as one step of DDIM. At :math:`\sigma_m = 0` the frame is
    :math:`F_m`. Where a label asks for less noise than there is, the input is scaled to the size
    that the network knows at that label (a factor of 1 for variance-preserving schedules).

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449

    Arguments:
        teacher: The denoiser; it is copied, never changed.
        layout: Times, labels, blocks.
        example: Conditions of one sample for a call that learns the channels of named sites.
    """

    labels: Tensor
    keep: Tensor
    gain: Tensor
    scale: Tensor

    def __init__(
        self, teacher: Denoiser, layout: Layout, *, example: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(teacher, Denoiser):
            raise TypeError(f"an operator is made of a Denoiser, got {type(teacher).__name__}")
        if not any(True for _ in teacher.parameters()):
            raise ValueError(
                "this denoiser has no parameters to train; an operator needs a network"
            )
        if getattr(teacher, "inner", None) is not None:
            raise ValueError(
                f"an operator is made of the model itself, not of {type(teacher).__name__}; "
                "guidance and clipping are part of the recorded trajectories"
            )
        self.model = copy.deepcopy(teacher)
        self.layout = layout
        self.host = _host(self.model, layout.sites)
        if layout.extra != "none":
            attach(
                self.network,
                lambda site: _block(site, layout),
                sites=layout.sites,
                example=lambda _: self._example(example or {}),
            )
        self.axis = TimeAxis(self.network, len(layout.times))
        self.set_times(layout.times)

    @property
    def network(self) -> nn.Module:
        """The module that has the blocks."""
        return self.model.get_submodule(self.host)

    @property
    def schedule(self) -> NoiseSchedule:
        """The teacher's schedule."""
        return self.model.schedule

    @property
    def frames(self) -> int:
        """The number M of frames."""
        return len(self.times)

    def set_times(self, times: Sequence[float]) -> None:
        """Sets the times of the frames; other ones than trained are allowed, not promised."""
        check_times(times, self.layout.start)
        self.times = tuple(float(t) for t in times)
        self.axis.frames = len(times)
        self._lay_out()

    def _lay_out(self) -> None:
        like = next(self.parameters())
        layout = output_map(
            self.schedule, self.model.native, self.times, self.layout.start, self.layout
        )
        for name, value in layout.items():
            kind = torch.float64 if like.dtype == torch.float64 else torch.float32
            setattr(self, name, value.to(device=like.device, dtype=kind))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrajectoryOperator:
        # Times and numbers of the output map stay precise whatever the type of the weights.
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
        repeated = {k: _repeat(v, batch, frames) for k, v in cond.items()}
        value = self.model.raw(rows * scale, self.labels.repeat(batch), **repeated)
        keep = self.keep.to(x.dtype).repeat(batch).reshape(column)
        gain = self.gain.to(x.dtype).repeat(batch).reshape(column)
        return (keep * rows + gain * value.to(x.dtype)).unflatten(0, (batch, frames))

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


def output_map(
    schedule: NoiseSchedule,
    native: Prediction,
    times: Sequence[float],
    start: float,
    layout: Layout,
) -> dict[str, Tensor]:
    r"""Returns labels, and the numbers with which a frame is ``keep * x_T + gain * answer``; float64.

    Arguments:
        schedule: The schedule.
        native: What the network predicts.
        times: The times of the frames, with shape (M).
        start: The time of the input.
        layout: How labels and outputs are taken.
    """
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = scales(schedule, t)
    (alpha_0,), (sigma_0,) = scales(schedule, torch.tensor([start], dtype=torch.float64))
    told = t if layout.labels == "target" else torch.full_like(t, start)
    told = told.clamp(schedule.t_min, schedule.t_max)
    alpha_l, sigma_l = schedule.alpha(told), schedule.sigma(told)
    scale = torch.sqrt(
        (alpha_l.square() + sigma_l.square()) / (alpha_0.square() + sigma_0.square())
    )
    ratio = sigma / sigma_0
    data = alpha - alpha_0 * ratio
    if layout.output == "direct":
        return {"labels": told, "keep": ratio, "gain": data, "scale": scale}
    shift, factor = coefficients(native, Prediction.X0, alpha=alpha_l, sigma=sigma_l)
    return {
        "labels": told,
        "keep": ratio + data * shift * scale,
        "gain": data * factor,
        "scale": scale,
    }


def scales(schedule: NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`\alpha, \sigma` at times, 1 and 0 where a grid has ended at :math:`\sigma = 0`."""
    end = times <= schedule.t_zero
    inside = torch.where(end, torch.full_like(times, schedule.t_min), times)
    alpha = torch.where(end, torch.ones_like(times), schedule.alpha(inside))
    return alpha, torch.where(end, torch.zeros_like(times), schedule.sigma(inside))


def _host(model: Denoiser, sites: Sites) -> str:
    """Returns the name of the module that has the blocks: the first that is known, or all."""
    if sites is not None:
        return "network" if isinstance(getattr(model, "network", None), nn.Module) else ""
    return next((name for name, module in model.named_modules() if is_known(module)), "")


def _block(site: Site, layout: Layout) -> nn.Module:
    if layout.extra == "temporal":
        return TemporalConv(
            site.channels,
            layout.modes,
            frames=len(layout.times),
            basis=layout.basis,
            slope=layout.slope,
            tokens=site.tokens,
        )
    if layout.extra == "deeper" and not site.tokens:
        return Deeper(site.channels, max(1, round(layout.size)))
    # A residual block of two convolutions costs as much as a hidden width of nine channels.
    hidden = layout.size * site.channels * (9 if layout.extra == "deeper" else 1)
    return Pointwise(site.channels, max(1, round(hidden)), tokens=site.tokens)


def _repeat(value: Any, batch: int, frames: int) -> Any:
    if frames == 1:
        return value
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value.repeat_interleave(frames, 0)
    if isinstance(value, list) and len(value) == batch:
        return [item for item in value for _ in range(frames)]
    return value


class OperatorModel(Denoiser):
    r"""An operator as a model: it brings its own sampler, of one evaluation.

    :func:`fewstep.sample` takes it with its default arguments; it predicts nothing at other
    times than its own, so other solvers are an error.

    Attributes:
        operator: The operator.
        class_names: The names of the classes, or ``None``.
        about: Where it comes from; for readers.
    """

    def __init__(
        self, operator: TrajectoryOperator, *, about: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.operator = operator
        inner = operator.model
        self.schedule, self.native = inner.schedule, Prediction.X0
        self.event_shape = inner.event_shape
        self.class_names = getattr(inner, "class_names", None)
        self.about = about or {}

    @property
    def network(self) -> Any:
        """The network inside."""
        return self.operator.network

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        raise ValueError(ONE_CALL)

    def prepare(self, n: int, cond: Any) -> dict[str, Any]:
        return self.operator.model.prepare(n, cond)

    def own_sampler(self) -> OperatorSampler:
        """Returns the sampler of one evaluation."""
        return OperatorSampler(self)

    def fingerprint(self) -> str:
        """Returns a SHA-256 of weights, schedule, shape, and the times and labels of the frames."""
        about = [super().fingerprint(), self.operator.times, repr(self.operator.layout)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


ONE_CALL = (
    "this model is an operator: it maps noise to the sample in one evaluation and predicts nothing "
    "in between; leave the solver out, or take the model that it was distilled from"
)


@dataclass(frozen=True)
class OperatorSampler:
    """Runs an operator: one evaluation, the whole trajectory.

    Attributes:
        denoiser: The model.
    """

    denoiser: OperatorModel

    @property
    def nfe(self) -> int:
        """The number of network calls, 1, although each works on M frames."""
        return 1

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns :math:`\sigma_T z`."""
        operator = self.denoiser.operator
        return operator.schedule.prior_std(operator.layout.start) * noise

    def run(self, x: Tensor, run: Run) -> Trajectory:
        """Returns the samples; with states the initial one and the M frames."""
        operator = self.denoiser.operator
        with torch.no_grad():
            frames = operator(x, **run.cond)
        if run.on_call is not None:
            run.on_call()
        last = frames[:, -1]
        if not bool(last.isfinite().all()):
            rows = (~last.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"the operator returned NaN or infinity for sample {run.noise.samples[rows[0]]} "
                f"and {len(rows) - 1} others"
            )
        times = torch.tensor(operator.times, dtype=torch.float64)
        if not run.save:
            return Trajectory(last, times[-1:], None, self.nfe)
        start = torch.tensor([operator.layout.start], dtype=torch.float64)
        states = torch.cat([x[None], frames.transpose(0, 1)])
        return Trajectory(last, torch.cat([start, times]), states, self.nfe)

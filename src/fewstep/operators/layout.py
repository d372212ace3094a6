r"""An operator without its weights: times, labels, blocks, and the map from model outputs to states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import NoiseSchedule

OUTPUTS = ("convert", "direct")
LABELS = ("target", "start", "both")
SECOND_TIME = "second-time"
EXTRAS = ("none", "temporal", "pointwise", "deeper", SECOND_TIME)


@dataclass(frozen=True)
class Layout:
    r"""The description of an operator, without its weights.

    Attributes:
        times: The times of the M frames, decreasing; the last is the sample's.
        start: The time of the input.
        labels: The label of a frame: ``"target"``, its own time; ``"start"``, the noise level
            of the input; or ``"both"``, the latter and its own time as a second one, as flow maps have.
        output: ``"convert"``: the model output is converted to data with the coefficients of the
            label, so that the start is the teacher; ``"direct"``: the model output is the data.
        extra: The blocks inserted into the network: ``"temporal"``, ``"none"``, or instead
            ``"pointwise"`` or ``"deeper"`` blocks without time; ``"second-time"`` for a flow map, whose
            times are its knots.
        modes: The modes J of temporal blocks.
        basis: Their basis.
        slope: The slope of their rectifier.
        size: The hidden width (a multiple of the channels) of pointwise blocks, or the number of
            residual blocks of deeper ones.
        sites: The names of the hosts; ``None`` for the known sites.
        budgets: The numbers of evaluations that it makes; (1,) but for a flow map.
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
    budgets: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("labels", self.labels, LABELS),
            ("output", self.output, OUTPUTS),
            ("extra", self.extra, EXTRAS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.40}")
        check_times(self.times, self.start)
        check_budgets(self.budgets, len(self.times) if self.extra == SECOND_TIME else 1)
        if isinstance(self.size, bool) or not isinstance(self.size, (int, float)):
            raise ValueError(f"size must be a number, got {self.size!r:.40}")
        if not 0 < self.size <= 1024:
            raise ValueError(f"size must be positive and at most 1024, got {self.size!r:.40}")


def check_times(times: Sequence[float], start: float) -> None:
    """Raises unless times decrease from below the start.

    Raises:
        ValueError: If they do not.
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


def check_budgets(budgets: Sequence[int], most: int) -> None:
    """Raises unless budgets are increasing numbers of evaluations, at most one for each interval.

    Raises:
        ValueError: If they are not.
    """
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in budgets)
    if not budgets or not whole or sorted(set(budgets)) != list(budgets) or budgets[0] < 1:
        raise ValueError(f"budgets are increasing numbers of evaluations, got {budgets!r:.60}")
    if budgets[-1] > most:
        raise ValueError(
            f"{budgets[-1]} evaluations need as many intervals between times, and there are {most}"
        )


def output_map(
    schedule: NoiseSchedule,
    native: Prediction,
    times: Sequence[float],
    start: float,
    layout: Layout,
) -> dict[str, Tensor]:
    r"""Returns labels, and the factors of a frame ``keep * x_T + gain * output``; float64, shape (M).

    Arguments:
        schedule: The schedule.
        native: What the network predicts.
        times: The times of the frames, with shape (M).
        start: The time of the input.
        layout: The kinds of labels and outputs.
    """
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.scales(t)
    (alpha_0,), (sigma_0,) = schedule.scales(torch.tensor([start], dtype=torch.float64))
    labels = t if layout.labels == "target" else torch.full_like(t, start)
    labels = labels.clamp(schedule.t_min, schedule.t_max)
    alpha_l, sigma_l = schedule.alpha(labels), schedule.sigma(labels)
    scale = torch.sqrt(
        (alpha_l.square() + sigma_l.square()) / (alpha_0.square() + sigma_0.square())
    )
    ratio = sigma / sigma_0
    data = alpha - alpha_0 * ratio
    if layout.output == "direct":
        return {"labels": labels, "keep": ratio, "gain": data, "scale": scale}
    shift, factor = coefficients(native, Prediction.X0, alpha=alpha_l, sigma=sigma_l)
    return {
        "labels": labels,
        "keep": ratio + data * shift * scale,
        "gain": data * factor,
        "scale": scale,
    }


def well_posed_output(
    schedule: NoiseSchedule,
    native: Prediction,
    times: Sequence[float],
    start: float,
    labels: str,
) -> str:
    r"""Returns ``"convert"`` if it neither attenuates nor amplifies the network's output, else ``"direct"``.

    A v-network's output enters the data with a factor :math:`\sigma` of the label, from an
    :math:`\varepsilon`-network by :math:`\sigma / \alpha`. For a frame labelled with hardly any noise
    the model output would be multiplied by a tiny factor (0.01 for ``ddpm-linear``), and the
    student could not learn; an :math:`\varepsilon`-network at pure noise would be amplified (by 157).

    Arguments:
        schedule: The schedule.
        native: What the network predicts.
        times: The times of the frames.
        start: The time of the input.
        labels: The labels of the frames, as in :class:`Layout`.
    """
    t = torch.tensor(times if labels == "target" else [start], dtype=torch.float64)
    t = t.clamp(schedule.t_min, schedule.t_max)
    _, factor = coefficients(
        native, Prediction.X0, alpha=schedule.alpha(t), sigma=schedule.sigma(t)
    )
    size = factor.abs()
    return "convert" if bool(((size > 0.1) & (size < 10)).all()) else "direct"

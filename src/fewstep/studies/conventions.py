"""Hypotheses about a network: its prediction, schedule, conditioning timesteps, and the range of its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.base.memory import is_out_of_memory
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import SCHEDULES, NoiseSchedule, schedule
from fewstep.models.denoiser import Denoiser, WrappedNetwork
from fewstep.models.kept import KeptEvaluations
from fewstep.models.splitting import evaluated

AS_CLAIMED = "as claimed"

NEGATED = (Prediction.V, Prediction.FLOW)
"""The predictions that some networks have with the other sign: velocities from noise to data."""

Convention = Callable[[NoiseSchedule, Tensor], Tensor]
"""Takes a schedule and its times (B), float64, returns the conditioning timesteps of the network."""


def _span(s: NoiseSchedule) -> float:
    return s.t_max if s.discrete else 1.0


CONVENTIONS: Mapping[str, tuple[Convention, str]] = {
    "t": (lambda s, t: t, "lambda t: t"),
    "t / t_max": (lambda s, t: t / s.t_max, "lambda t: t / {top:g}"),
    "1000 t": (lambda s, t: 1000 * t, "lambda t: 1000 * t"),
    "999 t": (lambda s, t: 999 * t, "lambda t: 999 * t"),
    "t_max - t": (lambda s, t: _span(s) - t, "lambda t: {top:g} - t"),
    "1 - t / t_max": (lambda s, t: 1 - t / s.t_max, "lambda t: 1 - t / {top:g}"),
    "999 (1 - t)": (lambda s, t: 999 * (1 - t), "lambda t: 999 * (1 - t)"),
    "log(sigma) / 4": (
        lambda s, t: -s.lam(t) / 4,
        "lambda t: -schedule.lam(t.double()).to(t) / 4",
    ),
    "sigma": (lambda s, t: s.rho(t), "lambda t: schedule.rho(t.double()).to(t)"),
    "lambda": (lambda s, t: s.lam(t), "lambda t: schedule.lam(t.double()).to(t)"),
}
"""Conditioning timesteps of networks, with the ``to_model_time`` of each."""

_OF_INDICES = ("t / t_max", "1 - t / t_max")
_OF_FRACTIONS = ("1000 t", "999 t", "999 (1 - t)")

RANGES: Mapping[str, tuple[float, float]] = {
    "[-1, 1]": (1.0, 0.0),
    "[0, 1]": (0.5, 0.5),
    "[-0.5, 0.5]": (0.5, 0.0),
    "[0, 255]": (127.5, 127.5),
}
"""The ranges of data, with scale and shift from [-1, 1]."""


def conventions_for(s: NoiseSchedule) -> list[str]:
    """Returns the conventions that are possible for a schedule's times, each once."""
    left_out = _OF_FRACTIONS if s.discrete else _OF_INDICES
    return [AS_CLAIMED, *(name for name in CONVENTIONS if name not in left_out)]


def range_of(data: Tensor) -> str | None:
    """Returns the likely range of data, or ``None`` if it is not a usual one."""
    low, high = float(data.min()), float(data.max())
    if low < -1.05 or high > 255.5 or high <= low:
        return None
    if low < -0.02:
        return "[-1, 1]" if max(-low, high) > 0.52 and high < 1.05 else "[-0.5, 0.5]"
    return "[0, 255]" if high > 2 else "[0, 1]" if high < 1.05 else None


def between(one: str, two: str) -> tuple[float, float]:
    """Returns scale and shift that map data from one range to another."""
    (a, b), (c, d) = RANGES[one], RANGES[two]
    return c / a, d - b * c / a


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis about a network.

    Attributes:
        prediction: What the network predicts.
        schedule: Its schedule.
        time: A name in :data:`CONVENTIONS`, or ``"as claimed"``.
        range: A name in :data:`RANGES`, or ``"as claimed"``.
        negated: Whether the network predicts the negative of it: a velocity from noise to data.
    """

    prediction: Prediction
    schedule: NoiseSchedule
    time: str = AS_CLAIMED
    range: str = AS_CLAIMED
    negated: bool = False

    @property
    def sign(self) -> float:
        """-1 if the output is the negative of the prediction, else 1."""
        return -1.0 if self.negated else 1.0

    def model_time(self, t: Tensor) -> Tensor:
        """Returns the conditioning timesteps of the network at schedule times (B), float64."""
        return CONVENTIONS[self.time][0](self.schedule, t)

    def to_model_time(self) -> str:
        """Returns the argument ``to_model_time`` for these conditioning timesteps."""
        return CONVENTIONS[self.time][1].format(top=_span(self.schedule))

    def describe(self, other: Hypothesis) -> str:
        """Returns the differences to another hypothesis, as arguments that a user would write."""
        reversed_flow = self.negated and self.time == "t_max - t" and self.schedule.name == "flow"
        if reversed_flow and self.prediction is Prediction.FLOW:
            same = replace(self, negated=other.negated, time=other.time).describe(other)
            return ", ".join(part for part in ("time_reversed=True", same) if part)
        parts = []
        if (self.prediction, self.negated) != (other.prediction, other.negated):
            sign = "the negative of " if self.negated else ""
            parts.append(f"{sign}prediction={self.prediction.value!r}")
        if self.schedule != other.schedule:
            parts.append(f"schedule=fewstep.schedule({self.schedule.name!r})")
        if self.time != other.time:
            same = self.time == AS_CLAIMED
            parts.append("the claimed times" if same else f"to_model_time={self.to_model_time()}")
        if self.range != other.range:
            parts.append(f"data in {self.range}")
        return ", ".join(parts)

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {
            "prediction": self.prediction.value,
            "negated": self.negated,
            "schedule": self.schedule.name,
            "time": self.time,
            "range": self.range,
        }


def schedules_to_try(claimed: NoiseSchedule) -> list[NoiseSchedule]:
    """Returns the claimed schedule and all others that need no further data."""
    schedules = [claimed]
    for name in SCHEDULES:
        if name != "tabulated":
            other = schedule(name)
            if other not in schedules:
                schedules.append(other)
    return schedules


class Probe:
    """A denoiser's network, evaluated under hypotheses other than the claimed one.

    Arguments:
        denoiser: The denoiser; guidance and clipping around it are removed.
        cond: The conditions, ready for the batch.
        kept: Keeps the evaluations of an interrupted check.
    """

    def __init__(
        self, denoiser: Denoiser, cond: Mapping[str, Any], kept: KeptEvaluations | None = None
    ) -> None:
        while isinstance(inner := getattr(denoiser, "inner", None), Denoiser):
            denoiser = inner
        self.claimed, self.cond = denoiser, cond
        self.network = denoiser
        if isinstance(denoiser, WrappedNetwork):
            self.network = denoiser.as_called()
        self.whole = denoiser.integer_times
        kept = kept or KeptEvaluations(None)
        self._raw = kept.wrapped(denoiser.raw)
        self._as_called = kept.wrapped(self.network.raw, "as called")

    def output(self, hypothesis: Hypothesis, x: Tensor, t: float) -> Tensor | None:
        r"""Returns the network's output at a state (B, \*) and a time, or ``None`` if it raises an error."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        times = torch.full((len(x),), t, dtype=torch.float64)
        with torch.no_grad():
            if hypothesis.time == AS_CLAIMED:
                return evaluated(self._raw, x, times.to(x.device, dtype), self.cond)
            given = hypothesis.model_time(times)
            if self.whole and hypothesis.time in ("t", "t_max - t"):
                given = given.round().long()
            else:
                given = given.to(dtype)
            try:
                value = evaluated(self._as_called, x, given.to(x.device), self.cond)
            except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                return None  # for example a network of integer timesteps that is given fractions
        return value if bool(value.isfinite().all()) else None

    def conditioning(self, hypothesis: Hypothesis, t: Tensor) -> Tensor:
        """Returns the conditioning timesteps of the network at schedule times (B), float64.

        Hypotheses with the same timesteps are equal, whatever the names of their conventions.
        """
        if hypothesis.time != AS_CLAIMED:
            given = hypothesis.model_time(t)
            return given.round() if self.whole and hypothesis.time in ("t", "t_max - t") else given
        if not isinstance(self.claimed, WrappedNetwork):
            return t
        return torch.as_tensor(self.claimed.model_time(t)).double()

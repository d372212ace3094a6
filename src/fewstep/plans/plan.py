r"""The plan: a sampler as data. A straight-line program over states, evaluations and noises.

Which registers meet is the :class:`~fewstep.plans.structure.Structure` (integers, hashable: what a
compiled run depends on); with which numbers is ``values`` and ``times`` (float64 vectors that may be
parameters).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.base.files import loads_json, read_json
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.plans.serial import Fields, PlanRecord, check_scales, from_record, to_record
from fewstep.plans.structure import Eval, Lin, Noise, Structure


class FlatPlan(NamedTuple):
    r"""The normal form :math:`Y = a \, x_T + B F + C Z`.

    Rows 0 to K - 1 are the inputs of the network evaluations, row K is the sample; F are the model
    outputs and Z the draws.

    Attributes:
        a: The weights of the initial state, shape (K + 1).
        B: The weights of the model outputs, shape (K + 1, K), strictly lower triangular.
        C: The weights of the draws, shape (K + 1, M).
    """

    a: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    r"""A sampler as data.

    A straight-line program over registers, of which the first is the initial state (B, \*) and one is the sample:

    .. math:: r_i = \sum_j c_{ij} \, r_j, \qquad r_i = D(r_j, \tau_k), \qquad r_i = z_m \sim N(0, I)

    with coefficients c, evaluations of the network D in the plan's prediction at times :math:`\tau`, and draws z.

    Cost: a run makes :attr:`nfe` network evaluations for each sample.

    Attributes:
        structure: Which registers meet.
        values: Every coefficient, in row order, float64, shape (C). May require gradients.
        times: The times of the network evaluations, float64, shape (K). May require gradients.
        knots: The times of the states, from the first (of the initial state) to the last (of the
            sample), float64, shape (S + 1); ``Lin.state`` counts in it.
        schedule: The schedule for which the coefficients hold.
        head: Whether the initial state is drawn from the Gaussian that has the mean and the
            variance of the data at ``knots[0]``, and not from the prior (an analytic head start).
        name: The solver's name, for display.
        ends_at_zero: Whether the sample has :math:`\sigma = 0`: the last knot is then the label
            ``schedule.t_zero``, at which no function of the schedule is evaluated.

    Example:
        >>> plan = fewstep.plan("ddim", fewstep.schedule("vp-linear"), nfe=2)
        >>> plan
        Plan(ddim: 2 evaluations, 0 draws, t 0.5 -> 0.001, eps, vp-linear)
        >>> same = fewstep.Plan.from_json(plan.to_json())
        >>> torch.equal(same.values, plan.values)
        True
    """

    structure: Structure
    values: Tensor
    times: Tensor
    knots: Tensor
    schedule: NoiseSchedule
    head: bool = False
    name: str = ""
    ends_at_zero: bool = False

    def __post_init__(self) -> None:
        for name, expected in (
            ("values", self.structure.n_values),
            ("times", self.structure.nfe),
        ):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float64:
                raise TypeError(f"the {name} of a plan are float64, got {tensor.dtype}")
            if tuple(tensor.shape) != (expected,):
                raise ValueError(
                    f"the plan's {name} have shape {tuple(tensor.shape)}, its rows need ({expected},)"
                )
            if not bool(tensor.detach().isfinite().all()):
                raise ValueError(f"the plan's {name} are not all finite numbers")
        if self.knots.ndim != 1 or self.knots.numel() < 2:
            raise ValueError("a plan has at least two knots, its first and its last time")
        if self.knots.dtype != torch.float64:
            raise TypeError(f"the knots of a plan are float64, got {self.knots.dtype}")
        if not bool((self.knots.detach().diff() < 0).all()):
            raise ValueError("the knots of a plan must be numbers that decrease strictly")
        if not self.structure.nfe:
            raise ValueError("a plan evaluates the network at least once; this one never does")
        states = [
            r.state for r in self.structure.rows if isinstance(r, Lin) and r.state is not None
        ]
        for state in states:
            if not 0 < state < self.knots.numel():
                raise ValueError(
                    f"a row is state {state}, but the plan has {self.knots.numel()} knots"
                )

    @property
    def prediction(self) -> Prediction:
        """The prediction that the coefficients are written for."""
        return self.structure.prediction

    @property
    def nfe(self) -> int:
        """The number of network evaluations (NFE)."""
        return self.structure.nfe

    @property
    def n_noise(self) -> int:
        """The number of normal draws after the initial one."""
        return self.structure.n_noise

    @property
    def stochastic(self) -> bool:
        """Whether the plan draws noise after the initial state."""
        return self.n_noise > 0

    @functools.cached_property
    def grid(self) -> TimeGrid:
        """The knots as a grid, with the scales of data and noise at each."""
        return TimeGrid(self.schedule, self.knots, self.ends_at_zero)

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """The values as Python numbers, for runs without gradients."""
        return tuple(self.values.detach().tolist())

    @functools.cached_property
    def scales(self) -> Tensor:
        r"""The :math:`(\alpha, \sigma)` at the evaluations, shape (K, 2)."""
        return torch.stack([self.schedule.alpha(self.times), self.schedule.sigma(self.times)], 1)

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """Cached results: buffer schedules, and the plan rewritten for other predictions."""
        return {}

    def flat(self) -> FlatPlan:
        r"""Returns the normal form; for inspection and tests, as its size grows with the square of the NFE."""
        k, m = self.nfe, self.n_noise
        width = 1 + k + m
        registers: list[Tensor] = [_unit(0, width)]
        inputs: list[Tensor] = []
        for row in self.structure.rows:
            match row:
                case Lin():
                    weights = self.values[row.offset : row.offset + len(row.terms)]
                    terms = torch.stack([registers[r] for r in row.terms])
                    registers.append(weights @ terms)
                case Eval():
                    inputs.append(registers[row.of])
                    registers.append(_unit(1 + row.at, width))
                case Noise():
                    registers.append(_unit(1 + k + row.draw, width))
        table = torch.stack([*inputs, registers[self.structure.result]])
        return FlatPlan(table[:, 0], table[:, 1 : 1 + k], table[:, 1 + k :])

    def with_values(self, values: Tensor, times: Tensor | None = None) -> Plan:
        """Returns the plan with other numbers on the same structure."""
        return replace(self, values=values, times=self.times if times is None else times)

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        r"""Checks that the plan was built for this schedule.

        Raises:
            ValueError: If :math:`\alpha` or :math:`\sigma` differ at an evaluation; the message
                has the first such time.
        """
        if schedule == self.schedule:
            return
        times = self.times.detach()
        theirs = torch.stack([schedule.alpha(times), schedule.sigma(times)], 1)
        ours = self.scales.detach()
        wrong = ~torch.isclose(theirs, ours, rtol=1e-5, atol=1e-7).all(dim=1)
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"The plan was built for alpha = {ours[k, 0]:.4g}, sigma = {ours[k, 1]:.4g} at "
                f"t = {times[k]:.4g} ({self.schedule.name}), the denoiser's schedule "
                f"({schedule.name}) has {theirs[k, 0]:.4g} and {theirs[k, 1]:.4g}. "
                "Rebuild the plan with denoiser.schedule."
            )

    def _record(self) -> PlanRecord:
        fields = Fields(
            self.structure,
            self.values,
            self.times,
            self.knots,
            self.schedule,
            self.head,
            self.name,
            self.ends_at_zero,
        )
        return to_record(fields, self.scales)

    def to_record(self) -> dict[str, Any]:
        """Returns the plan as a JSON object, from which it comes back bit for bit."""
        return self._record().to_record()

    @classmethod
    def from_record(cls, content: Any) -> Plan:
        """Returns the plan of a JSON object; raises as :meth:`from_json`."""
        fields, stored = from_record(content)
        plan = cls(**fields._asdict())
        check_scales(stored, plan.scales, plan.times)
        return plan

    def to_json(self) -> str:
        """Returns the plan as JSON text, from which it comes back bit for bit."""
        return json.dumps(self.to_record(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Returns the plan that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not such a plan; the message says where.
        """
        return cls.from_record(loads_json(text, what="the plan"))

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON, atomically and with a checksum; returns the path."""
        return self._record().save(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan from a file.

        Raises:
            ValueError: If the file is missing or damaged, or is not a plan.
        """
        content = read_json(path, what="plan")
        try:
            return cls.from_record(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"plan {str(path)!r}: {error}") from None

    def __repr__(self) -> str:
        start, end = float(self.knots[0]), float(self.knots[-1])
        return (
            f"Plan({self.name or 'unnamed'}: {self.nfe} evaluations, {self.n_noise} draws, "
            f"t {start:g} -> {end:g}, {self.prediction.value}, {self.schedule.name})"
        )


def _unit(place: int, width: int) -> Tensor:
    row = torch.zeros(width, dtype=torch.float64)
    row[place] = 1.0
    return row

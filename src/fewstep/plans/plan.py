r"""The plan: a sampler as data. A straight-line program over states, evaluations and noises.

Register 0 is the initial state; each row defines the next register:

- ``Lin``: :math:`r_i = \sum_j c_j r_j` over earlier registers,
- ``Eval``: :math:`r_i = D(r_j, t_k)`, the network in the plan's prediction,
- ``Noise``: :math:`r_i = z_m \sim N(0, I)`.

Which registers meet is the :class:`Structure` (integers, hashable: what a compiled run depends
on); with which numbers is ``values`` and ``times`` (float64 vectors that may be parameters).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.base.files import loads_json, write_atomic
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record

FORMAT, VERSION = "fewstep.plan", 1
MOST_ROWS = 200_000
"""The most rows that a stored plan may have; a guard against hostile files."""


class Lin(NamedTuple):
    """A linear row: the registers that it adds up, the place of its first coefficient, the knot."""

    terms: tuple[int, ...]
    offset: int
    state: int | None = None


class Eval(NamedTuple):
    """A network call: at which register, at which of the plan's times."""

    of: int
    at: int


class Noise(NamedTuple):
    """A normal draw: which one."""

    draw: int


Row = Lin | Eval | Noise


@dataclass(frozen=True)
class Structure:
    """The integers of a plan.

    Attributes:
        prediction: What the network is asked for.
        rows: The rows, defining registers 1, 2, ...
        result: The register that is the sample.
        dies: For each row, the registers that nobody reads after it.
    """

    prediction: Prediction
    rows: tuple[Row, ...]
    result: int
    # Not a cached property: their lock (Python 3.11) cannot be traced by torch.compile.
    dies: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    @functools.cached_property
    def nfe(self) -> int:
        """The number of network calls."""
        return sum(isinstance(row, Eval) for row in self.rows)

    @functools.cached_property
    def n_noise(self) -> int:
        """The number of normal draws after the initial one."""
        return sum(isinstance(row, Noise) for row in self.rows)

    @functools.cached_property
    def n_values(self) -> int:
        """The number of coefficients."""
        return sum(len(row.terms) for row in self.rows if isinstance(row, Lin))

    def _deaths(self) -> tuple[tuple[int, ...], ...]:
        last = {self.result: len(self.rows)}
        for i, row in reversed(list(enumerate(self.rows))):
            for register in reads(row):
                last.setdefault(register, i)
        ends: list[list[int]] = [[] for _ in self.rows]
        for register, i in last.items():
            if i < len(self.rows):
                ends[i].append(register)
        for i in range(len(self.rows)):  # a register that nobody reads dies where it is made
            if i + 1 not in last:
                ends[i].append(i + 1)
        return tuple(tuple(sorted(row)) for row in ends)

    def __post_init__(self) -> None:
        evaluations = noises = offset = 0
        for i, row in enumerate(self.rows, start=1):
            for register in reads(row):
                if not 0 <= register < i:
                    raise ValueError(
                        f"row {i} reads register {register}, which is not defined before it"
                    )
            match row:
                case Lin():
                    if not row.terms:
                        raise ValueError(f"row {i} adds up nothing")
                    if len(set(row.terms)) != len(row.terms):
                        raise ValueError(f"row {i} names a register twice")
                    if row.offset != offset:
                        raise ValueError(f"row {i} must start at coefficient {offset}")
                    offset += len(row.terms)
                case Eval():
                    if row.at != evaluations:
                        raise ValueError(
                            f"row {i} calls the network at time {row.at}, expected {evaluations}: "
                            "calls use the plan's times in order"
                        )
                    evaluations += 1
                case Noise():
                    if row.draw != noises:
                        raise ValueError(
                            f"row {i} draws noise {row.draw}, expected {noises}: draws are in order"
                        )
                    noises += 1
        if not 0 <= self.result <= len(self.rows):
            raise ValueError(f"the result is register {self.result} of {len(self.rows) + 1}")
        object.__setattr__(self, "dies", self._deaths())


def reads(row: Row) -> tuple[int, ...]:
    """Returns the registers that a row reads."""
    match row:
        case Lin():
            return row.terms
        case Eval():
            return (row.of,)
        case Noise():
            return ()


class FlatPlan(NamedTuple):
    r"""The normal form :math:`Y = a \, x_T + B F + C Z`.

    Rows 0 to K - 1 are the inputs of the network calls, row K is the sample; F are the network's
    answers and Z the draws.

    Attributes:
        a: The weights of the initial state, shape (K + 1).
        B: The weights of the answers, shape (K + 1, K), strictly lower triangular.
        C: The weights of the draws, shape (K + 1, M).
    """

    a: Tensor
    B: Tensor
    C: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    r"""A sampler as data.

    Attributes:
        structure: Which registers meet.
        values: Every coefficient, in row order, float64, shape (C). May require gradients.
        times: Where the network is called, float64, shape (K). May require gradients.
        knots: The times of the states, from the first (of the initial state) to the last (of the
            sample), float64, shape (S + 1); ``Lin.state`` counts in it.
        schedule: The schedule for which the coefficients hold.
        head: Whether the initial state is drawn from the Gaussian that has the mean and the
            variance of the data at ``knots[0]``, and not from the prior (an analytic head start).
        name: The solver's name, for people.
    """

    structure: Structure
    values: Tensor
    times: Tensor
    knots: Tensor
    schedule: NoiseSchedule
    head: bool = False
    name: str = ""

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
            raise ValueError("a plan calls the network at least once; this one never does")
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
        """What the network is asked for."""
        return self.structure.prediction

    @property
    def nfe(self) -> int:
        """The number of network calls."""
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
    def numbers(self) -> tuple[float, ...]:
        """The values as Python numbers, for runs without gradients."""
        return tuple(self.values.detach().tolist())

    @functools.cached_property
    def scales(self) -> Tensor:
        r"""The :math:`(\alpha, \sigma)` at the calls, shape (K, 2)."""
        return torch.stack([self.schedule.alpha(self.times), self.schedule.sigma(self.times)], 1)

    @functools.cached_property
    def layouts(self) -> dict[Any, Any]:
        """What runs have worked out of the rows beforehand; see :mod:`fewstep.plans.buffers`."""
        return {}

    def flat(self) -> FlatPlan:
        r"""Returns the normal form; for analysis, as its size grows with the square of the calls."""
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
        r"""Checks that the plan was made for this schedule.

        Raises:
            ValueError: If :math:`\alpha` or :math:`\sigma` differ at a call; the message has the
                first such time.
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

    def to_json(self) -> str:
        """Returns the plan as JSON; floats are written so that they come back bit for bit."""
        values, rows = self.values.tolist(), []
        for row in self.structure.rows:
            match row:
                case Lin():
                    pairs = zip(row.terms, values[row.offset :], strict=False)
                    entry: dict[str, Any] = {"lin": [[r, c] for r, c in pairs]}
                    if row.state is not None:
                        entry["state"] = row.state
                    rows.append(entry)
                case Eval():
                    rows.append({"eval": [row.of, row.at]})
                case Noise():
                    rows.append({"noise": row.draw})
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "prediction": self.prediction.value,
            "schedule": self.schedule.to_record(),
            "knots": self.knots.tolist(),
            "times": self.times.tolist(),
            "scales": self.scales.tolist(),
            "rows": rows,
            "result": self.structure.result,
        }
        if self.head:
            content["head"] = True
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Returns the plan that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is not such a plan; the message says where.
        """
        content = loads_json(text, what="the plan")
        return cls.from_record(content)

    @classmethod
    def from_record(cls, content: Any) -> Plan:
        if not isinstance(content, Mapping):
            raise ValueError(f"a plan is a JSON object, got {type(content).__name__}")
        if content.get("format") != FORMAT:
            raise ValueError(
                f"not a plan: its format is {content.get('format')!r}, not {FORMAT!r}"
            )
        if content.get("version") != VERSION:
            raise ValueError(
                f"the plan has version {content.get('version')!r}; this fewstep reads version {VERSION}"
            )
        required = {
            "format",
            "version",
            "prediction",
            "schedule",
            "times",
            "scales",
            "rows",
            "result",
        }
        optional = {"knots", "name", "head"}
        if missing := sorted(required - set(content)):
            raise ValueError(f"the plan has no {missing[0]!r}")
        if unknown := sorted(set(content) - required - optional):
            raise ValueError(f"the plan has an unknown key {unknown[0]!r}")
        rows, values = _rows_from(content["rows"])
        structure = Structure(
            Prediction.of(content["prediction"]), rows, _integer(content["result"], "result")
        )
        schedule = schedule_from_record(content["schedule"])
        times = _numbers(content["times"], "times")
        if "knots" in content:
            knots = _numbers(content["knots"], "knots")
        else:
            knots = torch.cat([times, torch.tensor([schedule.t_min], dtype=torch.float64)])
        head, name = content.get("head", False), content.get("name", "")
        if not isinstance(head, bool) or not isinstance(name, str):
            raise ValueError("'head' of a plan is true or false, and 'name' a text")
        for t in [float(knots[0]), *times.tolist()] if len(knots) else ():
            if not schedule.t_zero < t <= schedule.t_max * (1 + 1e-9):
                raise ValueError(
                    f"the plan calls the network at t = {t:g}, outside of the times of "
                    f"{schedule.name!r} ({schedule.t_min:g} to {schedule.t_max:g})"
                )
        plan = cls(
            structure,
            torch.tensor(values, dtype=torch.float64),
            times,
            knots,
            schedule,
            head,
            name,
        )
        scales = content["scales"]
        if not isinstance(scales, list) or len(scales) != plan.nfe:
            raise ValueError(f"the plan's scales must be {plan.nfe} pairs")
        stored = torch.stack([_numbers(pair, "scales", length=2) for pair in scales])
        if not torch.allclose(stored, plan.scales, rtol=1e-9, atol=1e-12):
            k = int(
                (~torch.isclose(stored, plan.scales, rtol=1e-9, atol=1e-12)).any(1).nonzero()[0]
            )
            raise ValueError(
                f"the plan's scales at t = {times[k]:g} are {stored[k].tolist()}, its schedule "
                f"has {plan.scales[k].tolist()}: the file was changed, or is of another version"
            )
        return plan

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON, whole or not at all; returns the path."""
        return write_atomic(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a plan from a file.

        Raises:
            ValueError: If the file is missing or is not a plan.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"plan {str(path)!r}: {error}") from None

    def __repr__(self) -> str:
        start, end = float(self.knots[0]), float(self.knots[-1])
        return (
            f"Plan({self.name or 'unnamed'}: {self.nfe} calls, {self.n_noise} draws, "
            f"t {start:g} -> {end:g}, {self.prediction.value}, {self.schedule.name})"
        )


def _unit(place: int, width: int) -> Tensor:
    row = torch.zeros(width, dtype=torch.float64)
    row[place] = 1.0
    return row


def _integer(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_ROWS:
        raise ValueError(f"{what} must be an integer from 0 to {MOST_ROWS}, got {value!r:.40}")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number, got {value!r:.40}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, got {value!r:.40}")
    return number


def _numbers(value: object, what: str, length: int | None = None) -> Tensor:
    if not isinstance(value, list) or len(value) > MOST_ROWS:
        raise ValueError(f"the plan's {what} must be a list of numbers, got {value!r:.40}")
    if length is not None and len(value) != length:
        raise ValueError(f"each of the plan's {what} must be {length} numbers, got {value!r:.40}")
    return torch.tensor(
        [_number(v, f"each of the plan's {what}") for v in value], dtype=torch.float64
    )


def _rows_from(content: object) -> tuple[tuple[Row, ...], list[float]]:
    if not isinstance(content, list) or len(content) > MOST_ROWS:
        raise ValueError(f"the plan's rows must be a list of at most {MOST_ROWS}")
    rows: list[Row] = []
    values: list[float] = []
    for i, entry in enumerate(content, start=1):
        keys = set(entry) if isinstance(entry, dict) else set()
        if keys == {"eval"} and isinstance(entry["eval"], list) and len(entry["eval"]) == 2:
            of, at = (_integer(v, f"row {i}: eval") for v in entry["eval"])
            rows.append(Eval(of, at))
        elif keys == {"noise"}:
            rows.append(Noise(_integer(entry["noise"], f"row {i}: noise")))
        elif keys in ({"lin"}, {"lin", "state"}) and isinstance(entry["lin"], list):
            pairs = entry["lin"]
            if not pairs or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
                raise ValueError(f"row {i}: lin must be a list of [register, coefficient]")
            terms = tuple(_integer(p[0], f"row {i}: a register") for p in pairs)
            state = _integer(entry["state"], f"row {i}: state") if "state" in entry else None
            rows.append(Lin(terms, len(values), state))
            values += [_number(p[1], f"row {i}: a coefficient") for p in pairs]
        else:
            raise ValueError(
                f"row {i} must be one of {{'lin': ...}}, {{'eval': [register, time]}}, "
                f"{{'noise': number}}, got {entry!r:.60}"
            )
    return tuple(rows), values

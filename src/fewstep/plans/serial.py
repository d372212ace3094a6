r"""Plans as JSON: what is written, and how every entry of a file is checked when it is read.

Format ``fewstep.plan``, version 1::

    {"format": "fewstep.plan", "version": 1, "name": "tab3", "prediction": "eps",
     "schedule": {"name": "vp-linear", "beta_min": 0.1, "beta_max": 20.0},
     "knots": [1.0, ...], "ends_at_zero": false, "times": [1.0, ...], "scales": [[alpha, sigma], ...],
     "rows": [{"eval": [0, 0]}, {"lin": [[0, 5.33], [1, -4.33]], "state": 1}, {"noise": 0}, ...],
     "result": 20, "head": true}

Numbers come back bit for bit. ``knots``, ``ends_at_zero``, ``name`` and ``head`` may be left out: the files of
early versions lack some of them. ``scales`` are redundant on purpose: a file whose schedule was edited
does not agree with them and is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from fewstep.base.records import Check, Record
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure

MOST_ROWS = 200_000
"""The most rows that a stored plan may have; a guard against hostile files."""

Numbers = Annotated[
    list[float],
    Check(lambda value: len(value) <= MOST_ROWS, f"a list of at most {MOST_ROWS} numbers"),
]


class PlanRecord(Record, name="fewstep.plan", version=1, what="plan"):
    """The file of a plan; see the module."""

    name: str = ""
    prediction: str
    schedule: dict[str, Any]
    knots: Numbers | None = None
    ends_at_zero: bool | None = None
    times: Numbers
    scales: list[list[float]]
    rows: list[Any]
    result: int
    head: bool = False


class Fields(NamedTuple):
    """The fields of a plan, as :class:`~fewstep.plans.plan.Plan` has them."""

    structure: Structure
    values: Tensor
    times: Tensor
    knots: Tensor
    schedule: NoiseSchedule
    head: bool
    name: str
    ends_at_zero: bool


def to_record(fields: Fields, scales: Tensor) -> PlanRecord:
    r"""Returns the record of a plan, as it is stored.

    Arguments:
        fields: The fields of the plan.
        scales: Its :math:`(\alpha, \sigma)` at the evaluations, shape (K, 2).
    """
    values, rows = fields.values.tolist(), []
    for row in fields.structure.rows:
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
    return PlanRecord(
        name=fields.name,
        prediction=fields.structure.prediction.value,
        schedule=fields.schedule.to_record(),
        knots=fields.knots.tolist(),
        ends_at_zero=fields.ends_at_zero,
        times=fields.times.tolist(),
        scales=scales.tolist(),
        rows=rows,
        result=fields.structure.result,
        head=fields.head,
    )


def from_record(content: Any) -> tuple[Fields, Tensor]:
    """Returns the fields of a stored plan, and the scales stored with it, shape (K, 2).

    Raises:
        ValueError: If the content is not a plan; the message names the place.
    """
    record = PlanRecord.from_record(content)
    rows, values = _rows(record.rows)
    result = _integer(record.result, "result")
    structure = Structure(Prediction.of(record.prediction), rows, result)
    schedule = schedule_from_record(record.schedule)
    times = _vector(record.times)
    knots = _vector([*record.times, schedule.t_min] if record.knots is None else record.knots)
    for t in [float(knots[0]), *times.tolist()] if len(knots) else ():
        if not schedule.t_zero < t <= schedule.t_max * (1 + 1e-9):
            raise ValueError(
                f"the plan evaluates the network at t = {t:g}, outside of the times of "
                f"{schedule.name!r} ({schedule.t_min:g} to {schedule.t_max:g})"
            )
    ends = _ends_at_zero(record, schedule, knots)
    numbers = torch.tensor(values, dtype=torch.float64)
    fields = Fields(structure, numbers, times, knots, schedule, record.head, record.name, ends)
    if len(record.scales) != structure.nfe or any(len(pair) != 2 for pair in record.scales):
        raise ValueError(f"the plan's scales must be {structure.nfe} pairs of numbers")
    return fields, torch.tensor(record.scales, dtype=torch.float64).reshape(-1, 2)


def check_scales(stored: Tensor, scales: Tensor, times: Tensor) -> None:
    """Raises a ValueError if the scales in a file are not those of its schedule."""
    wrong = ~torch.isclose(stored, scales, rtol=1e-9, atol=1e-12)
    if bool(wrong.any()):
        k = int(wrong.any(1).nonzero()[0])
        raise ValueError(
            f"the plan's scales at t = {times[k]:g} are {stored[k].tolist()}, its schedule "
            f"has {scales[k].tolist()}: the file was changed, or is of another version"
        )


def _ends_at_zero(record: PlanRecord, schedule: NoiseSchedule, knots: Tensor) -> bool:
    """Returns whether the plan ends at zero noise; for files without the entry, by their last time."""
    last = float(knots[-1]) if knots.numel() else schedule.t_min
    ends = record.ends_at_zero
    if ends is None:
        return schedule.is_zero(last)
    if ends and last >= schedule.t_min:
        raise ValueError(
            f"the plan says that it ends at sigma = 0, but its last knot is {last:g}, a time of "
            f"{schedule.name!r}; there the last knot is {schedule.t_zero:g}"
        )
    return ends


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


def _vector(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _rows(content: list[Any]) -> tuple[tuple[Row, ...], list[float]]:
    if len(content) > MOST_ROWS:
        raise ValueError(f"the plan must have at most {MOST_ROWS} rows, got {len(content)}")
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

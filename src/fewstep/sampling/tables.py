r"""Tables of noise levels as other tools have them: read, checked, and written.

A table is a list of noise levels ("sigmas": :math:`\sigma / \alpha`, of a rectified flow its time), as
ComfyUI, k-diffusion, LD3 and the papers have them, or of timesteps, as diffusers and GITS have them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.base.files import read_limited
from fewstep.diffusion.grids import MOST_STEPS, TimeGrid
from fewstep.diffusion.schedules import Flow, NoiseSchedule
from fewstep.plans.plan import Plan
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve_plan

Kind = Literal["sigmas", "timesteps", "times"]
KINDS: tuple[Kind, ...] = ("sigmas", "timesteps", "times")
MOST_TABLE = 1 << 20
"""The most bytes of a file with a table."""

FORMS = ("sigmas", "timesteps", "diffusers")

NEAR = 1e-2
"""Ends of a table agree with those of a schedule within this share."""


@dataclass(frozen=True)
class Table:
    """A table as it was given.

    Attributes:
        kind: ``"sigmas"``, ``"timesteps"`` or ``"times"``: shares of the schedule, 1 for its noisiest end, as DPM-Solver's
            code and the lists of LD3 and GITS have them. On a table of N training timesteps t is the timestep N t - 1; on other
            schedules it is their own time.
        values: Its numbers. A table of timesteps has one for each step, and the last step goes on to sigma = 0; one
            of sigmas or times has the end too.
    """

    kind: Kind
    values: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """What is wrong with a table.

    Attributes:
        kind: ``"order"``, ``"wasted"``, ``"range"``, ``"start"`` or ``"end"``.
        text: The finding, in words.
        fatal: Whether no sampler can follow the table; else it can, with the fault.
    """

    kind: str
    text: str
    fatal: bool = False


def read_table(source: str | Path, kind: Kind | None = None) -> Table:
    """Reads a table: a file or a text of numbers, or JSON with a list, or with ``sigmas``, ``timesteps`` or ``times``.

    Arguments:
        source: A path, or the numbers themselves, e.g. ``"14.615, 6.475, 0"``.
        kind: What plain numbers are; left out, sigmas.

    Raises:
        ValueError: If there are no numbers, or other things beside them.
    """
    text = str(source)
    if "\n" not in text and len(text) < 4096 and Path(text).is_file():
        try:
            text = read_limited(text, what=f"table {text!r:.80}", most=MOST_TABLE).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{text!r:.80} is not a text file of numbers") from None
    elif not re.search(r"\d", text) or re.search(r"\.(json|txt|csv)\s*$", text):
        raise ValueError(f"{text!r:.80} is neither a file nor a list of numbers")
    try:
        content: Any = json.loads(text)
    except RecursionError:
        raise ValueError(f"a table is a list of numbers, got {text!r:.80}") from None
    except ValueError:
        parts = [part for part in re.split(r"[\s,;\[\]()]+", text) if part]
        try:
            content = [float(part) for part in parts]
        except ValueError:
            raise ValueError(f"a table is a list of numbers, got {text!r:.80}") from None
    if isinstance(content, dict):
        kinds: list[Kind] = [name for name in KINDS if name in content]
        if len(kinds) != 1 and kind not in kinds:
            raise ValueError(
                f"a table in JSON has 'sigmas', 'timesteps' or 'times', got the keys {', '.join(map(str, content))!r:.80}"
            )
        kind = kind if kind in kinds else kinds[0]
        content = content[kind]
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        content = [content]
    if not isinstance(content, list) or not content or len(content) > MOST_STEPS:
        raise ValueError(f"a table is a list of 1 to {MOST_STEPS} numbers, got {content!r:.80}")
    for k, value in enumerate(content):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ValueError(
                f"number {k} of the table is {value!r:.40}; a table has finite numbers"
            )
    return Table(kind or "sigmas", tuple(float(v) for v in content))


def check_table(table: Table, schedule: NoiseSchedule) -> list[Finding]:
    """Returns what is wrong with a table for a schedule; an empty list if nothing is."""
    values, findings = list(table.values), list[Finding]()
    sigmas = table.kind == "sigmas"
    if table.kind == "times":
        if schedule.discrete and max(values) > 1:
            text = f"out of range: time 0 is {max(values):g}; times are shares of the schedule, 1 for its noisiest end"
            return [Finding("range", text, fatal=True)]
        values = _timesteps(table, schedule)
    for k, (one, two) in enumerate(itertools.pairwise(values)):
        if two > one:
            text = f"levels out of order: number {k} is {one:g}, number {k + 1} is {two:g}, which is noisier"
            findings.append(Finding("order", text, fatal=True))
        elif two == one or (two > 0 and one / two < 1 + 1e-6):
            text = (
                f"a wasted evaluation: step {k} goes from {one:g} to {two:g} and changes nothing"
            )
            findings.append(Finding("wasted", text, fatal=True))
    top, bottom = _ends(schedule, sigmas)
    name = "sigma" if sigmas else "timestep"
    for k, value in enumerate(values):
        below = value < 0 if sigmas else value < schedule.t_min
        if below or value > top * (1 + NEAR):
            text = f"out of range: {name} {k} is {value:g}; {schedule.name!r} has {bottom:g} to {top:g}"
            findings.append(Finding("range", text, fatal=True))
            break
    if values[0] < top * (1 - NEAR):
        text = (
            f"a start for another schedule: the table begins at {name} {values[0]:g}, {schedule.name!r} at "
            f"{top:g}; samples would begin with too much noise"
        )
        findings.append(Finding("start", text))
    if table.kind != "timesteps" and len(values) == 1:
        findings.append(
            Finding("order", "one level makes no step; the end is missing", fatal=True)
        )
    elif sigmas and values[-1] > bottom * (1 + NEAR):
        text = (
            f"noise left at the end: the last sigma is {values[-1]:g}, {schedule.name!r} goes down to {bottom:g}; "
            "end with 0"
        )
        findings.append(Finding("end", text))
    elif table.kind == "times" and not findings:
        left, lowest = (
            float(schedule.rho(torch.tensor(t, dtype=torch.float64)))
            for t in (values[-1], schedule.t_min)
        )
        if left > lowest * (1 + NEAR):
            text = (
                f"noise left at the end: the last time is {table.values[-1]:g}, of sigma {left:g}; {schedule.name!r} "
                f"goes down to {lowest:g}"
            )
            findings.append(Finding("end", text))
    return findings


def _timesteps(table: Table, schedule: NoiseSchedule) -> list[float]:
    """Returns the schedule's own times of a table of times; a rounding beyond an end is that end."""
    if not schedule.discrete:
        return list(table.values)
    levels = schedule.t_max + 1
    inside = (levels * t - 1 for t in table.values)
    return [min(max(t, 0.0), schedule.t_max) if -1e-3 < t else t for t in inside]


def check_plan(plan: Plan) -> list[Finding]:
    """Returns what is wrong with a plan: a start or an end elsewhere than its schedule's, wasted evaluations."""
    kinds = ("end",) if plan.head else ("start", "end")  # a head start begins where it is meant to
    table = Table("sigmas", tuple(_levels(plan)))
    findings = [f for f in check_table(table, plan.schedule) if f.kind in kinds]
    unused = (plan.flat().B == 0).all(dim=0).nonzero().flatten().tolist()
    for k in unused:
        text = f"a wasted evaluation: the output of evaluation {k} has no weight anywhere"
        findings.append(Finding("wasted", text))
    return findings


def recipe_of_table(
    table: Table,
    schedule: NoiseSchedule,
    solver: str = "unipc3",
    *,
    options: dict[str, Any] | None = None,
    force: bool = False,
) -> SamplerRecipe:
    """Returns the recipe of a solver on the levels of a table.

    Arguments:
        table: The table.
        schedule: The schedule of the model.
        solver: The solver.
        options: Its options.
        force: Whether a table that begins or ends elsewhere is taken.

    Raises:
        ValueError: With the findings, if it is no table for this schedule.
    """
    findings = check_table(table, schedule)
    fatal = [f for f in findings if f.fatal]
    if fatal or (findings and not force):
        hint = "" if fatal else "; to take it all the same: force=True (--force)"
        raise ValueError("; ".join(f.text for f in fatal or findings) + hint)
    values = list(table.values)
    if table.kind == "timesteps":
        times, to_zero = values, True
    elif table.kind == "times":
        times, to_zero = _timesteps(table, schedule), False
    else:
        to_zero = values[-1] == 0
        times = [_time(schedule, value) for value in (values[:-1] if to_zero else values)]
    knots = [*times, schedule.t_zero] if to_zero else times
    grid = TimeGrid(schedule, torch.tensor(knots, dtype=torch.float64), to_zero)
    planned = resolve_plan(schedule, SamplerRequest(solver, grid=grid, options=options or {}))
    if planned.name is None:
        raise ValueError(f"a recipe has the name of a solver, got {solver!r}")
    return SamplerRecipe(
        name=planned.name,
        nfe=planned.plan.nfe,
        grid="explicit",
        options={**planned.options, "times": knots},
        schedule=schedule.to_record(),
    )


def export(plan: Plan, form: str) -> str:
    """Returns the levels of a plan as other tools take them.

    ===============  ====================================================================================
    ``sigmas``       ``14.615, 6.475, 0``: sigma / alpha of the knots (of a flow its time), for ComfyUI and k-diffusion
    ``timesteps``    the times of the steps, for ``pipe(timesteps=...)`` of diffusers
    ``diffusers``    both in JSON, for ``pipe(sigmas=...)``, which wants the last 0, but not of a flow
    ===============  ====================================================================================

    The levels are those of the steps: a solver elsewhere makes its own of them.

    Raises:
        ValueError: If the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"a table is exported as {', '.join(FORMS)}, got {form!r}")
    sigmas = _levels(plan)
    times = plan.knots.detach().tolist()[:-1]
    if form == "sigmas":
        return ", ".join(f"{value:.10g}" for value in sigmas)
    if form == "timesteps":
        return ", ".join(f"{value:.10g}" for value in times)
    inner = sigmas[:-1] if plan.ends_at_zero and isinstance(plan.schedule, Flow) else sigmas
    return json.dumps({"sigmas": inner, "timesteps": times}, indent=1)


def _levels(plan: Plan) -> list[float]:
    """Returns the noise levels of the knots."""
    rho = plan.grid.rho.detach()
    return (rho / (1 + rho) if isinstance(plan.schedule, Flow) else rho).tolist()


def _ends(schedule: NoiseSchedule, sigmas: bool) -> tuple[float, float]:
    """Returns the noisiest and the cleanest level, or time, of a schedule."""
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    if sigmas and not isinstance(schedule, Flow):
        ends = schedule.rho(ends)
    return float(ends[0]), float(ends[1])


def _time(schedule: NoiseSchedule, sigma: float) -> float:
    """Returns the time of a level; a rounding above the noisiest one is that one."""
    if isinstance(schedule, Flow):
        return min(sigma, schedule.t_max)
    time = float(schedule.time(-torch.tensor(sigma, dtype=torch.float64).log()))
    return min(time, schedule.t_max)

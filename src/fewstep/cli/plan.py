"""``fewstep plan``: show, check, compare and make plans."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from fewstep.base.options import parse_options
from fewstep.cli._common import Flag, Options, console, exists, read_plan, say, say_result
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.plans.plan import Plan

plan_app = App(name="plan", help="Read, check, compare and make plans (samplers as data).")

MOST_FLAT = 2000
"""The most evaluations and draws of a plan whose flat form, which is quadratic, is computed here."""
MOST_TERMS = 6
STDS = (1.0, 0.5, 0.1)


@plan_app.command
def show(file: Path, *, steps: int | None = None) -> None:
    """Show a plan: its evaluations, their times and weights, and its exact result on Gaussian data.

    Args:
        file: A plan, a recipe with its schedule, or a scheduler of diffusers (see `diff`).
        steps: The number of steps of a scheduler.
    """
    from rich.table import Table

    plan = read_plan(file, steps)
    say_result(
        f"{plan.name or 'plan'}: {plan.nfe} evaluations, {plan.n_noise} noise draws"
        f"{', analytic head start' if plan.head else ''}"
    )
    say_result(f"prediction {plan.prediction.value}, schedule {plan.schedule.to_record()!r:.200}")
    say_result(f"from t = {float(plan.knots[0]):.6g} to t = {float(plan.knots[-1]):.6g}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("evaluation", "t", "alpha", "sigma", "log-SNR/2"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("its input: weights of x (initial state), F (model outputs), Z (draws)")
    weights = _weights(plan)
    for k in range(plan.nfe):
        alpha, sigma = plan.scales[k].tolist()
        half = math.log(alpha / sigma) if alpha > 0 and sigma > 0 else math.inf
        numbers = (f"{v:.6g}" for v in (float(plan.times[k]), alpha, sigma, half))
        table.add_row(f"F{k}", *numbers, weights[k])
    table.add_row("sample", *[""] * 4, weights[plan.nfe])
    console(result=True).print(table)
    for line in _defects(plan):
        say_result(line)
    if steps is None:
        say_result(f"\nnext: {command('sample', 'MODEL', recipe=file, out='samples')}")


@plan_app.command
def check(*files: Path) -> int:
    """Check plans: whether they are intact, and exact on data that are a single point.

    The exit code is 1 if one of them is damaged.

    Args:
        files: Plans, or recipes with their schedules.
    """
    if not files:
        raise ValueError("give at least one FILE to check")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is not a file")
    damaged = 0
    for file in files:
        try:
            plan = read_plan(file)
            changed = _changed(plan)
        except (ValueError, TypeError) as error:
            changed = str(error)
            plan = None
        if changed or plan is None:
            damaged += 1
            say_result(f"{file}: DAMAGED: {changed}")
        else:
            say_result(
                f"{file}: ok: {plan.name or 'plan'}, {plan.nfe} evaluations, {plan.n_noise} draws, "
                f"point-mass defect {_point_defect(plan):.2g}"
            )
    return 1 if damaged else 0


@plan_app.command
def diff(a: Path, b: Path, *, steps: int | None = None, tolerance: float | None = None) -> int:
    """Compare two plans or schedulers: their flat tables, evaluation by evaluation.

    The exit code is 0 if they are the same sampler, and 1 if they are not.

    Args:
        a: A plan, a recipe with its schedule, or a scheduler of diffusers: diffusers:NAME, a
            scheduler_config.json, or the folder of a pipeline.
        b: Another.
        steps: The number of steps of schedulers.
        tolerance: The largest difference, relative to the size of the table, of equal plans; left
            out, 1e-9, and 1e-5 if one is a scheduler, which computes in float32.
    """
    from fewstep.adapters.diffusers.sources import names_scheduler
    from fewstep.plans.rewriting import convert_plan

    if tolerance is None:
        tolerance = 1e-5 if names_scheduler(a) or names_scheduler(b) else 1e-9
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance must be a number that is not negative, got {tolerance}")
    first, second = read_plan(a, steps), read_plan(b, steps)
    _check_size(first, second)
    if first.prediction is not second.prediction:
        say_result(
            f"B is written for {second.prediction.value}, A for {first.prediction.value}: "
            "B is converted, exactly"
        )
        second = convert_plan(second, first.prediction)
    for letter, plan in (("A", first), ("B", second)):
        for k in _wasted(plan):
            say_result(
                f"evaluation {k} of {letter} (t = {float(plan.times[k]):.6g}) changes nothing: "
                "its output has no weight in any later row"
            )
    if (first.nfe, first.n_noise) != (second.nfe, second.n_noise):
        say_result(
            f"the plans differ: A makes {first.nfe} evaluations and {first.n_noise} draws, "
            f"B {second.nfe} and {second.n_noise}"
        )
        return 1
    return _compare(first, second, tolerance)


@plan_app.command
def make(
    solver: str,
    *,
    schedule: str,
    nfe: int | None = None,
    steps: int | None = None,
    out: Path,
    grid: str | None = None,
    profile: Path | None = None,
    integer_times: Flag = False,
    option: Options = None,
    schedule_option: Annotated[list[str] | None, Parameter(negative="")] = None,
    head_start: float | None = None,
    overwrite: Flag = False,
) -> None:
    """Make the plan of a solver and write it to a file.

    Args:
        solver: A solver (see `fewstep solvers`), or auto.
        schedule: The name of a noise schedule, for example vp-linear or ddpm-linear.
        nfe: The number of network evaluations; or
        steps: the number of steps.
        out: The file to write.
        grid: The name of a time grid, or auto:FILE for the times of a profile; left out, the solver's own.
        profile: The profile of a model (`fewstep fit`), for auto.
        integer_times: Round the grid to training timesteps.
        option: An option of solver or grid as key=value; can be repeated.
        schedule_option: An option of the schedule as key=value; can be repeated.
        head_start: The time above which the Gaussian solution replaces evaluations.
        overwrite: Replace an existing file.
    """
    from fewstep.diffusion.schedules import schedule as make_schedule
    from fewstep.sampling.request import SamplerRequest
    from fewstep.sampling.resolve import resolve_plan

    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out must be a file")
    if out.exists() and not overwrite:
        raise exists(out)
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        steps=steps,
        grid=grid,
        head_start=head_start,
        options=parse_options(option),
        profile=profile,
    )
    on = make_schedule(schedule, **parse_options(schedule_option))
    planned = resolve_plan(on, request, integer_times=integer_times)
    if planned.chosen is not None:
        say(f"auto chose {planned.chosen}")
    plan = planned.plan
    plan.save(out)
    say(f"wrote {out}: {plan.nfe} evaluations, {plan.n_noise} noise draws")
    say(f"next: {command('plan show', out)}")


def _check_size(*plans: Plan) -> None:
    for plan in plans:
        if plan.nfe + plan.n_noise > MOST_FLAT:
            raise ValueError(
                f"the plan has {plan.nfe} evaluations and {plan.n_noise} draws; tables are computed up to "
                f"{MOST_FLAT}"
            )


def _weights(plan: Plan) -> list[str]:
    """Returns the nonzero weights of each row of the flat form, as texts."""
    _check_size(plan)
    flat = plan.flat()
    lines = []
    for row in range(plan.nfe + 1):
        terms = [("x", float(flat.a[row]))]
        terms += [(f"F{k}", v) for k, v in enumerate(flat.B[row].tolist())]
        terms += [(f"Z{m}", v) for m, v in enumerate(flat.C[row].tolist())]
        shown = [f"{v:+.4g} {name}" for name, v in terms if v != 0.0]
        if len(shown) > MOST_TERMS:
            # The first is the initial state; the last ones are the most recent.
            left = len(shown) - MOST_TERMS
            shown = [shown[0], f"… {left} more …", *shown[-(MOST_TERMS - 1) :]]
        lines.append("  ".join(shown) or "0")
    return lines


def _end(plan: Plan) -> tuple[float, float]:
    """Returns the scales of data and noise at the last knot."""
    return float(plan.grid.alpha[-1].detach()), float(plan.grid.sigma[-1].detach())


def _point_defect(plan: Plan) -> float:
    import torch

    from fewstep.plans.checks import point_mass_defect

    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in _end(plan))
    return point_mass_defect(plan, alpha, sigma)


def _changed(plan: Plan) -> str | None:
    """Returns why a plan cannot be of the solver in its name, or nothing."""
    from fewstep.solvers import SOLVERS

    _check_size(plan)
    defect = _point_defect(plan)
    if not math.isfinite(defect):
        return "its weights overflow"
    if plan.name in SOLVERS:
        build = SOLVERS[plan.name]
        size = max(1.0, float(plan.values.detach().abs().max()) if plan.values.numel() else 1.0)
        if getattr(build, "func", build).exact and defect > 1e-8 * size:  # type: ignore[attr-defined]
            return (
                f"{plan.name} is exact on a point mass, this plan is off by {defect:.3g}: "
                "its coefficients were changed"
            )
    return None


def _defects(plan: Plan) -> list[str]:
    from fewstep.plans.checks import gaussian_moments

    alpha, sigma = _end(plan)
    lines = [f"on a point mass: off by {_point_defect(plan):.3g}"]
    for std in STDS:
        moments = gaussian_moments(plan, 1.0, std)
        truth = math.sqrt(alpha**2 * std**2 + sigma**2)
        got = math.sqrt(max(0.0, float(moments.variance)))
        lines.append(
            f"on Gaussian data N(1, {std:g}²): mean off by {float(moments.mean) - alpha:+.3g}, "
            f"standard deviation {got:.5g} instead of {truth:.5g} ({got / truth - 1:+.3%})"
        )
    return lines


def _wasted(plan: Plan) -> list[int]:
    """Returns the evaluations whose outputs have no weight anywhere."""
    unused = (plan.flat().B == 0).all(dim=0)
    return unused.nonzero().flatten().tolist()


def _compare(first: Plan, second: Plan, tolerance: float) -> int:
    import torch
    from rich.table import Table

    one, two = (torch.cat([f.a[:, None], f.B, f.C], dim=1) for f in (first.flat(), second.flat()))
    size = max(1.0, float(one.abs().max()), float(two.abs().max()))
    gap = (one - two).abs()
    names = ["x", *(f"F{k}" for k in range(first.nfe)), *(f"Z{m}" for m in range(first.n_noise))]
    times = (first.times - second.times).abs()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("row", "t of A", "t of B", "largest difference", "at", "weight in A", "in B"):
        table.add_column(column, justify="left" if column in ("row", "at") else "right")
    apart: list[str] = []
    for row in range(first.nfe + 1):
        last = row == first.nfe
        worst = int(gap[row].argmax())
        label = "sample" if last else f"evaluation {row}"
        ours, theirs = (
            ["", ""] if last else [f"{float(p.times[row]):.6g}" for p in (first, second)]
        )
        table.add_row(
            label,
            ours,
            theirs,
            f"{float(gap[row, worst]):.3g}",
            names[worst],
            f"{float(one[row, worst]):.6g}",
            f"{float(two[row, worst]):.6g}",
        )
        moved = not last and float(times[row]) > tolerance * max(1.0, float(first.times[row]))
        if float(gap[row, worst]) > tolerance * size or moved:
            apart.append(label)
    console(result=True).print(table)
    if first.schedule != second.schedule:
        say_result(f"the schedules differ: {first.schedule.name} and {second.schedule.name}")
        apart.append("schedule")
    if first.head != second.head:
        say_result("one of them has an analytic head start, the other has none")
        apart.append("head start")
    if not apart:
        say_result(f"the same sampler: the largest difference is {float(gap.max()):.3g}")
        return 0
    say_result(
        f"the plans differ, first at {apart[0]}; the largest difference is {float(gap.max()):.3g}"
    )
    return 1

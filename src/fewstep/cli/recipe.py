"""``fewstep recipe``: show and check recipes, and tables of noise levels of other tools, to and fro."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from fewstep.base.options import parse_options
from fewstep.cli._common import Flag, Options, exists, read_plan, say, say_result
from fewstep.cli.plan import show as show_plan
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.diffusion.schedules import NoiseSchedule
    from fewstep.sampling.tables import Kind

recipe_app = App(
    name="recipe", help="Show, check, import and export recipes and tables of levels."
)

recipe_app.command(show_plan, name="show")

ScheduleOptions = Annotated[list[str] | None, Parameter(negative="")]


@recipe_app.command
def check(
    table: str,
    *,
    schedule: str | None = None,
    timesteps: Flag = False,
    times: Flag = False,
    schedule_option: ScheduleOptions = None,
) -> int:
    """Check a recipe, a plan, or a table of noise levels for a schedule.

    It finds noise that is left at the end, evaluations that change nothing, levels out of order or range, and
    a start of another schedule. The exit code is 1 if there is one.

    Args:
        table: A recipe or a plan; or with --schedule numbers (`14.615,6.475,0`) or a file of them.
        schedule: The name of the noise schedule of the model, for a table.
        timesteps: The numbers are timesteps and no sigmas.
        times: The numbers are times from 1 down to the end, as those of LD3 and DPM-Solver.
        schedule_option: An option of the schedule as key=value; can be repeated.
    """
    from fewstep.sampling.tables import check_plan, check_table, read_table

    if schedule is None:
        findings = check_plan(read_plan(Path(table)))
    else:
        on = _schedule(schedule, schedule_option)
        findings = check_table(read_table(table, _kind(timesteps, times)), on)
    for finding in findings:
        say_result(finding.text)
    if not findings:
        say_result("nothing wrong was found")
    return 1 if findings else 0


@recipe_app.command(name="import")
def import_(
    table: str,
    *,
    schedule: str,
    out: Path,
    solver: str = "unipc3",
    timesteps: Flag = False,
    times: Flag = False,
    option: Options = None,
    schedule_option: ScheduleOptions = None,
    force: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Make a recipe of a table: published levels, sigmas of ComfyUI, timesteps of diffusers, times of LD3 or GITS.

    Args:
        table: Numbers (`14.615,6.475,0`), a file of them, or JSON with sigmas, timesteps or times.
        schedule: The name of the noise schedule of the model, for example ddpm-scaled-linear.
        out: The file to write.
        solver: The solver (see `fewstep solvers`).
        timesteps: The numbers are timesteps and no sigmas.
        times: The numbers are times from 1 down to the end, as those of LD3 and DPM-Solver.
        option: An option of the solver as key=value; can be repeated.
        schedule_option: An option of the schedule as key=value; can be repeated.
        force: Take a table that begins or ends elsewhere than the schedule.
        overwrite: Replace an existing file.
    """
    from fewstep.sampling.tables import read_table, recipe_of_table

    if out.exists() and not overwrite:
        raise exists(out)
    on = _schedule(schedule, schedule_option)
    recipe = recipe_of_table(
        read_table(table, _kind(timesteps, times)),
        on,
        solver,
        options=parse_options(option),
        force=force,
    )
    recipe.save(out)
    say(f"wrote {out}: {recipe.name}, {recipe.nfe} evaluations")
    say(f"next: {command('sample', 'MODEL', recipe=out, out='samples')}")


@recipe_app.command
def export(
    file: Path, *, form: str = "sigmas", out: Path | None = None, overwrite: Flag = False
) -> None:
    """Print the levels of a recipe or a plan for another tool, or write them to a file.

    Args:
        file: A recipe with its schedule, or a plan.
        form: sigmas (ComfyUI, k-diffusion), timesteps (diffusers), or diffusers (both in JSON).
        out: The file to write; left out, they are printed.
        overwrite: Replace an existing file.
    """
    from fewstep.base.files import write_atomic
    from fewstep.sampling.tables import export as exported

    text = exported(read_plan(file), form)
    if out is None:
        say_result(text)
        return
    if out.exists() and not overwrite:
        raise exists(out)
    write_atomic(out, f"{text}\n".encode())
    say(f"wrote {out}")


def _kind(timesteps: bool, times: bool) -> Kind | None:
    if timesteps and times:
        raise ValueError("--timesteps and --times both say what the numbers are; give one of them")
    return "timesteps" if timesteps else "times" if times else None


def _schedule(name: str, options: list[str] | None) -> NoiseSchedule:
    from fewstep.diffusion.schedules import schedule

    return schedule(name, **parse_options(options))

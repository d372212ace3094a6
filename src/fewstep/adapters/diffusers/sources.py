"""Schedulers of diffusers from where users have them: a name, a configuration file, a saved pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fewstep.adapters.diffusers.probing import NOT_AFFINE
from fewstep.adapters.diffusers.scheduler_plans import plan_from_scheduler
from fewstep.base.extras import install_hint
from fewstep.base.files import read_json
from fewstep.plans.plan import Plan

PREFIX = "diffusers:"
"""What stands before the name of a scheduler."""

CONFIGURATION = "scheduler_config.json"


def names_scheduler(source: str | Path) -> bool:
    """Returns whether this is a scheduler's name, configuration file, or folder with one."""
    if str(source).startswith(PREFIX):
        return True
    file = _file(Path(source))
    if file is None:
        return False
    if file.name == CONFIGURATION:
        return True
    try:
        content = read_json(file, what="file", infinite=True, foreign=True)
    except ValueError:
        return False
    return isinstance(content, dict) and str(content.get("_class_name")).endswith("Scheduler")


def scheduler_from(source: str | Path) -> Any:
    """Returns a scheduler of diffusers.

    Arguments:
        source: ``diffusers:NAME`` (with clipping off, as it has no plan with it), or a
            configuration that diffusers wrote, or a folder of a scheduler or of a pipeline.

    Raises:
        ValueError: If diffusers is not installed, or there is no such scheduler.
    """
    try:
        import diffusers.schedulers as home
    except ImportError:
        raise ValueError(
            f"schedulers of diffusers need it installed: {install_hint('diffusers')}"
        ) from None
    if str(source).startswith(PREFIX):
        from fewstep.adapters.diffusers.peers import scheduler_class

        name = str(source).removeprefix(PREFIX)
        exact = name if name.endswith("Scheduler") else f"{name}Scheduler"
        kind = getattr(home, exact, None) or scheduler_class(name)
        known = inspect.signature(kind.__init__).parameters
        return kind(**{option: False for option in NOT_AFFINE if option in known})
    file = _file(Path(source))
    if file is None:
        raise ValueError(f"{str(source)!r} has no {CONFIGURATION}")
    config = read_json(file, what="scheduler's configuration", infinite=True, foreign=True)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name == "PlanScheduler":
        raise ValueError(
            f"{str(file)!r} is a PlanScheduler: its plan is made with fewstep plan make, or is its recipe"
        )
    kind = getattr(home, str(name), None)
    if kind is None or not str(name).endswith("Scheduler"):
        raise ValueError(f"{str(file)!r} is the configuration of no scheduler: {name!r:.60}")
    return kind.from_config(config)


def plan_of_source(source: str | Path, steps: int | None) -> Plan:
    """Returns the plan of a scheduler for a number of its steps.

    Raises:
        ValueError: If the number is missing, or the scheduler has no plan.
    """
    scheduler = scheduler_from(source)
    if steps is None:
        raise ValueError(f"{str(source)!r} is a scheduler, whose plan needs a number of --steps")
    return plan_from_scheduler(scheduler, steps)


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".json" else None
    for file in (path / CONFIGURATION, path / "scheduler" / CONFIGURATION):
        if file.is_file():
            return file
    return None

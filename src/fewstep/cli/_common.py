"""Shared code of the commands: consoles, options, models, output folders."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.progress import SILENT, Progress
from fewstep.base.registry import unknown
from fewstep.base.urls import shown

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fewstep.models.denoiser import Denoiser
    from fewstep.plans.plan import Plan
    from fewstep.sampling.protocol import Sampler
    from fewstep.sampling.recipe import SamplerRecipe

Options = Annotated[list[str] | None, Parameter(name="--option", negative="")]
Flag = Annotated[bool, Parameter(negative="")]

WIDTH = 120
"""The width of tables that do not go to a terminal."""


class _Verbosity:
    quiet = False
    log: logging.Handler | None = None


def set_verbosity(*, quiet: bool = False, verbose: bool = False) -> None:
    """Sets the verbosity of the following output.

    Arguments:
        quiet: Whether to print only a command's results, warnings and errors.
        verbose: Whether to print the log too, on the error stream.

    Raises:
        ValueError: If both are given.
    """
    logger = logging.getLogger("fewstep")
    if _Verbosity.log is not None:
        logger.removeHandler(_Verbosity.log)
        logger.setLevel(logging.NOTSET)
        _Verbosity.log = None
    _Verbosity.quiet = quiet
    if quiet and verbose:
        raise ValueError("give --quiet or --verbose, not both")
    if verbose:
        _Verbosity.log = logging.StreamHandler(sys.stderr)
        logger.addHandler(_Verbosity.log)
        logger.setLevel(logging.INFO)


def is_verbose() -> bool:
    """Whether the log is printed."""
    return _Verbosity.log is not None


def follows() -> bool:
    """Whether progress is shown."""
    return not _Verbosity.quiet


def console(*, result: bool = False) -> Console:
    """Returns the console for output; with --quiet it is silent, except for results."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    quiet = _Verbosity.quiet and not result
    return Console(
        width=wide, highlight=False, markup=False, emoji=False, soft_wrap=False, quiet=quiet
    )


def say(text: str) -> None:
    """Writes a line about the run; it is not wrapped, so that paths can be copied."""
    console().print(shown(text), soft_wrap=True)


def say_result(text: str) -> None:
    """Writes a line that is the result of a command, with --quiet too."""
    console(result=True).print(text, soft_wrap=True)


def fail(text: str, *, kind: str = "error") -> None:
    """Writes one red line to the error stream."""
    from rich.console import Console

    line = " ".join(shown(text).split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    line = line.encode("utf-8", "replace").decode()
    Console(stderr=True, highlight=False, markup=False, emoji=False).print(
        f"{kind}: {line}", style="red", soft_wrap=True
    )


def check_device(name: str) -> str:
    """Returns the name of an available device; ``auto`` becomes CUDA, MPS or the CPU.

    Raises:
        ValueError: If there is none of that name.
    """
    from fewstep.base.devices import find_device

    return str(find_device(name))


DTYPES = ("float32", "float16", "bfloat16")
"""The types of weights."""


def load_model(
    name: str, device: str, dtype: str | None = None, *, download: bool = False
) -> Denoiser:
    """Returns the model of that name, on an available device, with weights of a type."""
    import torch

    from fewstep.loading import load

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(unknown("--dtype", dtype, list(DTYPES)))
    kind = None if dtype is None else getattr(torch, dtype)
    return load(name, device=device, dtype=kind, download=download)


def draw(
    sampler: Sampler,
    numbers: Sequence[int],
    *,
    seed: int,
    cond: dict[str, Any],
    image: Tensor | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """Returns the samples of these numbers in one batch, float32 on the CPU.

    They are those of :func:`fewstep.sample`: sample i depends on ``(seed, i)`` alone.
    """
    from fewstep.diffusion.noise import NoiseSource
    from fewstep.sampling.batches import run_batch

    model = sampler.denoiser
    event_shape(model)
    conditions = model.prepare(len(numbers), cond)
    source = NoiseSource(seed, numbers)
    return (
        run_batch(sampler, source, conditions, image=image, on_evaluation=progress.tick)
        .x.float()
        .cpu()
    )


def event_shape(denoiser: Denoiser) -> tuple[int, ...]:
    """Returns the shape of one sample.

    Raises:
        ValueError: If the model has no ``event_shape``.
    """
    if denoiser.event_shape is None:
        raise ValueError("this model has no event_shape; sample it from Python, with noise=")
    return tuple(denoiser.event_shape)


def positive(name: str, value: int | None) -> None:
    """Raises unless a number is positive or left out."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")


def saved_files(folder: Path, pattern: str, what: str) -> str | None:
    """Returns in words the number of saved files of an interrupted run, for :func:`keeping`."""
    count = len(list(folder.glob(pattern)))
    return f"{count} {what} {'is' if count == 1 else 'are'} saved" if count else None


def output_folder(out: Path) -> Path:
    """Returns the folder, which need not exist yet; a file of that name is an error."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; --out must be a folder")
    return out


def refuse_existing(out: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Raises if one of the files that a command will write exists already."""
    existing = next((name for name in names if (out / name).exists()), None)
    if existing is not None and not overwrite:
        raise exists(out)


def exists(out: Path) -> ValueError:
    """Returns the error for a result that would be overwritten."""
    return ValueError(f"{str(out)!r} exists; give --overwrite or another --out")


def read_plan(path: Path, steps: int | None = None) -> Plan:
    """Returns the plan in a file: a plan, a recipe with its schedule, or a scheduler's."""
    from fewstep.adapters.diffusers.sources import names_scheduler, plan_of_source
    from fewstep.sampling.recipe import SamplerRecipe

    if names_scheduler(path):
        return plan_of_source(path, steps)
    recipe = SamplerRecipe.load(path)
    return recipe_plan(recipe, path)


def recipe_plan(recipe: SamplerRecipe, path: Path) -> Plan:
    """Returns the plan of a recipe.

    Raises:
        ValueError: If it has none beforehand; the message has the reason.
    """
    from fewstep.diffusion.schedules import schedule_from_record

    if (own := recipe.plan_alone()) is not None:
        return own
    if recipe.kind == "adaptive":
        raise ValueError(
            f"{str(path)!r} is a recipe of {recipe.name!r}, which has no plan beforehand"
        )
    if recipe.schedule is None:
        raise ValueError(
            f"{str(path)!r} is a recipe for any schedule; make a plan from it with "
            f"fewstep plan make {recipe.name} --schedule NAME --nfe {recipe.nfe} --out FILE"
        )
    integer = recipe.about.get("integer_times") is True
    return recipe.plan_for(schedule_from_record(recipe.schedule), integer_times=integer)

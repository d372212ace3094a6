r"""``tune``: from a model and a budget to a sampler that was searched for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.files import read_json, write_json
from fewstep.diffusion.grids import TimeGrid
from fewstep.learned.problem import Problem
from fewstep.learned.problem import TunedSampler as TunedSampler
from fewstep.learned.search import Event
from fewstep.learned.settings import Search
from fewstep.learned.unrolled import frozen
from fewstep.metrics.features import FeatureMap
from fewstep.metrics.reference import Reference
from fewstep.models.denoiser import Denoiser
from fewstep.solvers import Solver

SETTINGS = "search.json"


def tune(
    denoiser: Denoiser,
    *,
    nfe: int,
    family: str = "gs",
    objective: str = "auto",
    data: str | Path | Tensor | Reference | None = None,
    features: FeatureMap = None,
    solver: str | Solver | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    options: Mapping[str, Any] | None = None,
    family_options: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    search: Search | Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
    **cond: Any,
) -> TunedSampler:
    r"""Searches a sampler of ``nfe`` network calls for this model; the model itself stays as it is.

    Arguments:
        denoiser: The model.
        nfe: The number of network calls of the sampler.
        family: Which numbers are learned, a name in :data:`fewstep.learned.FAMILIES`.
        objective: ``"endpoint"``, ``"trajectory"``, ``"mmd"``, weighted sums (``"mmd+0.1*endpoint"``)
            and stages (``"endpoint,mmd"``); ``"auto"`` is ``"endpoint,mmd"`` with data and
            ``"endpoint"`` without.
        data: Real data, needed by ``mmd``: an embedded name (``"fashion"``), a folder of images, an
            idx or npz file, a tensor of samples, or a :class:`~fewstep.metrics.Reference`. Exact
            mixtures bring their own.
        features: The features of ``mmd``; left out, those of the embedded classifier for images
            of its shape, a random network's for other images, and the samples themselves else.
        solver: The solver to start from; left out, the best training-free one for this kind of
            schedule, ``"auto"`` (but ``ddim`` or ``ddpm`` for the families over GGDM).
        grid: The grid to start from, as of :func:`fewstep.plan`.
        head_start: The time of an analytic head start.
        options: Options of solver and grid.
        family_options: Options of the family, e.g. ``{"coordinate": "lambda"}``.
        guidance: The scale of classifier-free guidance; it becomes part of the recipe.
        search: Settings of the search, see :class:`~fewstep.learned.settings.Search`.
        seed: The seed of everything random.
        out: The file of the recipe. Beside it, in a folder, are the checkpoints: the same call
            goes on where an interrupted one stopped, with the same result.
        overwrite: Whether to start anew and replace what is there.
        on_event: Called with progress.
        cond: Conditions; of a list each sample takes one value. A model with classes that
            fewstep trained takes all its classes if none are given.

    Raises:
        ValueError, TypeError: Before the first network call, if anything does not fit.
    """
    problem = Problem.of(
        denoiser,
        nfe=nfe,
        family_name=family,
        objective=objective,
        data=data,
        features=features,
        solver=solver,
        grid=grid,
        head_start=head_start,
        options=options or {},
        family_options=family_options or {},
        guidance=guidance,
        search=Search.of(search),
        seed=seed,
        cond=cond,
    )
    file = None if out is None else Path(out)
    folder = None if file is None else _folder(file, problem, overwrite=overwrite)
    with frozen(denoiser):
        made = problem.solve(folder, on_event or (lambda event: None))
    if file is not None:
        made.save(file)
    return made


def checkpoint_folder(file: Path) -> Path:
    """Returns the folder of the checkpoints of a recipe's file."""
    return file.with_suffix(".search")


def _folder(file: Path, problem: Problem, *, overwrite: bool) -> Path:
    folder = checkpoint_folder(file)
    if overwrite:
        file.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    if file.exists():
        raise ValueError(f"{str(file)!r} exists; give overwrite (--overwrite) or another file")
    # Through JSON, as it will come back.
    about = json.loads(json.dumps(problem.about()))
    if (folder / SETTINGS).exists():
        if read_json(folder / SETTINGS, what="the settings of a search") != about:
            raise ValueError(
                f"{str(folder)!r} has the checkpoints of another search; give the same call to go "
                "on, overwrite (--overwrite), or another file"
            )
    else:
        write_json(folder / SETTINGS, about)
    return folder

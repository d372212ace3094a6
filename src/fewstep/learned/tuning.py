r"""``tune``: searches a sampler of few evaluations for one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.files import read_json
from fewstep.base.paths import check_path
from fewstep.base.progress import Progress, progress_of
from fewstep.base.runs import RunFolder, difference
from fewstep.diffusion.grids import TimeGrid
from fewstep.learned.problem import Problem
from fewstep.learned.problem import TunedSampler as TunedSampler
from fewstep.learned.search_state import STATE
from fewstep.learned.settings import Search
from fewstep.learned.unrolled import frozen
from fewstep.metrics.features import FeatureMap
from fewstep.metrics.reference import Reference
from fewstep.models.denoiser import Denoiser
from fewstep.solvers import Solver
from fewstep.training.parallel import team

logger = logging.getLogger("fewstep")

SETTINGS = "search.json"

OUTPUTS = ("teacher-*.safetensors", STATE, "report.html")
"""The files in the folder of checkpoints besides the settings."""


def tune(
    denoiser: Denoiser,
    *,
    nfe: int,
    family: str = "gs",
    objective: str = "auto",
    data: str | Path | Tensor | Reference | None = None,
    features: FeatureMap = None,
    unseen: Sequence[FeatureMap] = (),
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
    keep_worse: bool = False,
    progress: Progress | bool | None = None,
    **cond: Any,
) -> TunedSampler:
    r"""Searches a sampler of ``nfe`` network evaluations for one model, whose weights do not change.

    .. math:: \min_\psi \; \sum_i \frac{w_i}{|L_i(0)|} L_i(x_\psi), \qquad
        x_\psi = \mathrm{plan}_\psi(x_T, z), \qquad \psi = 0 \text{ is a training-free sampler}

    by Adam over the parameters :math:`\psi` of a family (tens of numbers), with gradients through
    all ``nfe`` evaluations. Every ``evaluate_every`` steps the moving average of the parameters is evaluated on
    held-out noise, and the best is the result: by the distance to a teacher, the same model with
    many evaluations, or by the discrepancy from real data in features that no loss uses; candidates
    that lose recall are rejected. If the best is then further from the data than the start in the features of the
    selection or of the loss, the result goes only a part of the way to it, or stays at the start. Start and result are then scored on seeds and real samples that were
    not used before, in at least two kinds of features that neither loss nor selection uses; a result that is not
    better there, or loses recall or the variety of a class, is not called better, and not written.

    Several processes of one launch (``torchrun``, ``accelerate launch``) each run a part of every batch; all
    return the result, which is that of one process up to rounding.

    Cost: in network evaluations of one sample, by default and with N ``pairs``, T ``teacher_nfe``,
    B ``batch_size``, S ``steps``: (N + heldout + test) T for the teacher, some 3 S B ``nfe`` for the
    search (4 with ``remat``), (S / evaluate_every) heldout ``nfe`` for judgements, 2 to 5 test ``nfe`` for the check at the end, 2 test ``nfe`` for
    scores; twice all that with guidance.

    References:
        | Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality (Watson et al., 2022)
        | https://arxiv.org/abs/2202.05830
        | Learning to Discretize Denoising Diffusion ODEs (Tong et al., 2024)
        | https://arxiv.org/abs/2405.15506
        | GAS: Improving Discretization of Diffusion ODEs via Generalized Adversarial Solver (Oganov et al., 2025)
        | https://arxiv.org/abs/2510.17699

    Arguments:
        denoiser: The model; samples have its ``event_shape``.
        nfe: The number of network evaluations of the sampler.
        family: The parameters that are learned, a name in :data:`fewstep.learned.FAMILIES`.
        objective: Names in :data:`fewstep.learned.OBJECTIVES` (``"endpoint"``, ``"trajectory"``,
            ``"perceptual"``, ``"mmd"``, ``"adversarial"``, ``"adversarial-data"``, ``"reward"``), weighted sums (``"mmd+0.1*endpoint"``) and stages (``"endpoint,mmd"``);
            ``"auto"`` is with data ``"endpoint+perceptual"`` for images, ``"endpoint,mmd"`` for vectors; without ``"endpoint"``.
        data: Real data, needed by ``mmd``: an embedded name (``"fashion"``), a folder of images, an
            idx or npz file, a tensor of samples (n, \*), or a :class:`~fewstep.metrics.Reference`.
            Exact mixtures have their own.
        features: The features of ``perceptual`` and ``mmd``; left out, those of the embedded classifier for images
            of its shape, a random network's for other images, and the samples themselves else.
        unseen: Further features for the final scores alone, beside at least two of our own; neither the loss
            nor the selection of candidates uses them.
        solver: The solver to start from; left out, the family's own: that of the model's profile, or else
            the best training-free one for this kind of schedule (``"auto"``), or ``ddim`` or
            ``ddpm`` for the families over GGDM.
        grid: The grid to start from, as of :func:`fewstep.plan`.
        head_start: The time of an analytic head start.
        options: Options of solver and grid.
        family_options: Options of the family, e.g. ``{"coordinate": "lambda"}``.
        guidance: The scale of classifier-free guidance; it becomes part of the recipe.
        search: Settings of the search, see :class:`~fewstep.learned.settings.Search`.
        seed: The seed of all random draws.
        out: The file of the recipe. Beside it, in the folder :func:`checkpoint_folder`, are the
            checkpoints: the same call resumes an interrupted one, with the same result.
        overwrite: Whether to start again and replace existing files.
        keep_worse: Whether to write a result that is not shown to be better than its start; else
            ``out`` is not written, and a warning with the reason is logged.
        progress: ``True`` for bars, or an object with ``stage`` and ``tick``.
        cond: Conditions; of a list each sample gets one value. A model with classes gets all its
            classes if none are given.

    Returns:
        The tuned sampler; ``.verdict`` is whether it is better than its start.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if an argument does not fit, a
            file exists, or the checkpoints are those of another search.

    Example:
        >>> search = {"pairs": 8, "heldout": 8, "test": 8, "teacher_nfe": 8, "steps": 2, "batch_size": 4}
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> tuned = fewstep.tune(denoiser, nfe=3, objective="endpoint", search=search)
        >>> tuned.plan.nfe
        3
    """
    check_path(out, "out")
    if family_options is not None and not isinstance(family_options, Mapping):
        raise TypeError(
            f"family_options must be a mapping such as {{'coordinate': 'lambda'}}, got {family_options!r:.40}"
        )
    problem = Problem.of(
        denoiser,
        nfe=nfe,
        family_name=family,
        objective=objective,
        data=data,
        features=features,
        unseen=unseen,
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
    least, device = min(stage.batch_size for stage in problem.stages), problem.source.device
    folder = None if file is None else checkpoint_folder(file)
    with progress_of(progress) as shown, frozen(denoiser), team(least, device, folder) as together:
        problem = replace(problem, source=replace(problem.source, team=together))
        if file is None:
            return problem.solve(None, shown)
        return _in_folder(problem, file, shown, overwrite=overwrite, keep_worse=keep_worse)


def _in_folder(
    problem: Problem, file: Path, progress: Progress, *, overwrite: bool, keep_worse: bool
) -> TunedSampler:
    """Runs a search with checkpoints and writes its result, unless it is worse.

    Of several processes the first prepares the folder, and writes.
    """
    together = problem.source.team
    first, folder = together.own.first, checkpoint_folder(file)
    run = RunFolder(folder, "run of fewstep tune", outputs=OUTPUTS, state=SETTINGS)

    def changed(before: Any, now: Mapping[str, Any]) -> str | None:
        words = "to be overwritten" if overwrite else difference(before, now)
        if words is not None and not overwrite:
            raise ValueError(
                f"{str(folder / SETTINGS)!r} is of another search ({words}); give the same call to resume it, "
                "overwrite (--overwrite), or another file"
            )
        return words

    def check() -> None:
        if file.exists() and not overwrite:
            raise ValueError(f"{str(file)!r} exists; give overwrite (--overwrite) or another file")

    if first:
        check()  # before a folder is made
    with ExitStack() as stack:
        if first:
            running = run.running(
                problem.inputs(),
                overwrite=overwrite,
                changed=changed,
                earlier=lambda: _early(folder / SETTINGS),
                progress=progress,
            )
            stack.enter_context(running)
            check()
            if overwrite:
                file.unlink(missing_ok=True)
        together.any(first)  # the others read the folder once it is prepared
        tuned = problem.solve(folder, progress)
        if not first:
            return tuned
        if tuned.verdict.better or keep_worse:
            tuned.save(file)
        else:
            logger.warning("%s was not written: %s", file, tuned.verdict.sentence)
    return tuned


def _early(file: Path) -> Any:
    """Returns the settings of a search of an early version, without a format; ``None`` for others."""
    if not file.exists():
        return None
    before = read_json(file, what="search")
    return None if isinstance(before, dict) and "format" in before else before


def checkpoint_folder(file: Path) -> Path:
    """Returns the folder of the checkpoints of a recipe's file."""
    return file.with_suffix(".search")

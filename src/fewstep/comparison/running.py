"""Runs a comparison: every sampler at every budget from the same noise, cell by cell."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.callables import callable_digest
from fewstep.base.paths import check_path
from fewstep.base.processes import processes
from fewstep.base.progress import Progress, progress_of
from fewstep.base.runs import locked
from fewstep.comparison.cells import Job, Runner, Setting
from fewstep.comparison.entries import Entry, identity, read_entries, read_entry
from fewstep.comparison.scores import METRICS, check_metrics
from fewstep.comparison.store import REFERENCE, Cell, Store
from fewstep.diffusion.noise import NoiseSource
from fewstep.metrics import Reference
from fewstep.metrics.features import extractor
from fewstep.models.conditions import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.sampling.request import Contradiction

logger = logging.getLogger("fewstep")


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        store: Its folder.
        question: The inputs that determine all numbers.
        cells: The cells, by sampler in the order given, then by budget.
        reference: The reference as a cell.
        refused: Sampler, budget and reason of the impossible cells.
        entries: The samplers.
        setting: The settings that all cells share.
    """

    store: Store
    question: Mapping[str, Any]
    cells: Sequence[Cell]
    reference: Cell
    refused: Sequence[tuple[str, int, str]]
    entries: Sequence[Entry]
    setting: Setting = field(repr=False)


def compare(
    denoiser: Denoiser,
    samplers: Any,
    *,
    nfe: Sequence[int],
    folder: str | Path,
    n: int = 256,
    seed: int = 0,
    data: Reference | None = None,
    metrics: Sequence[str] | None = None,
    reference: str = "auto",
    reference_nfe: int = 200,
    guidance: float | None = None,
    cond: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    shown: int = 8,
    extend: bool = True,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Comparison:
    r"""Runs samplers at budgets from the same noise, and measures their samples.

    Each cell (a sampler at a budget) is written to the folder when it is done, so an interrupted run
    is resumed, within a cell batch by batch; only features are stored, not
    the samples. Several processes of one launch (``torchrun``, ``srun``) share the batches; each returns
    the whole, with the same numbers except the seconds. The distance of each sample to the reference is the root mean square over its values.
    Libraries end differently, at the lowest level of the schedule or at :math:`\sigma = 0`; a
    sampler is compared with the reference at either end (the second by one more evaluation),
    and the smaller distance counts.

    Cost: the sum of all budgets and ``reference_nfe``, in network evaluations for each of n samples.

    Arguments:
        denoiser: The model.
        samplers: As :func:`fewstep.compare` takes them.
        nfe: The budgets: numbers of network evaluations. A sampler that cannot meet one of them
            has no cell there, and one with its own number runs at that.
        folder: The folder for the results.
        n: The number of samples.
        seed: The seed; sample i starts from the noise of (seed, i) with every sampler.
        data: The real data to compare with; left out, only the distance to the reference is
            measured.
        metrics: Which of ``"fid"``, ``"kid"``, ``"precision-recall"``, ``"sliced-wasserstein"``; all of them if
            there are data and this is left out.
        reference: The sampler of the reference.
        reference_nfe: Its number of evaluations.
        guidance: The scale of classifier-free guidance.
        cond: The conditions, one value or n each.
        batch_size: The samples in one network evaluation.
        shown: The images of each cell that are stored for pictures.
        extend: Whether to add cells to a finished comparison in the folder.
        overwrite: Whether to replace a comparison in the folder.
        progress: Follows the evaluations: ``True`` for a bar, or an object that is called.

    Raises:
        ValueError: Before the first evaluation: if a sampler is not known or can meet no budget, if
            the folder has a comparison with other settings, or a number is out of range.

    Example:
        >>> from fewstep.comparison import compare
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> result = compare(denoiser, "ddim,tab3", nfe=[4], folder="comparison", n=16, reference_nfe=20)
        >>> [cell.name for cell in result.cells]
        ['ddim', 'tab3']
    """
    check_path(folder, "folder")
    budgets = _checked(nfe, n, batch_size, shown, reference_nfe)
    names = check_metrics(METRICS if metrics is None else metrics)
    if metrics and data is None:
        raise ValueError(
            f"the metrics {', '.join(metrics)} compare with real data; give data= (--data), or leave metrics out"
        )
    NoiseSource(seed, ())
    if denoiser.built_in_sampler() is not None:
        raise ValueError(
            "this model is an operator of one evaluation; compare the model that it was distilled "
            "from, with the operator's folder among the samplers"
        )
    if denoiser.event_shape is None:
        raise ValueError(
            "the shape of a sample is not known; give it with Denoiser.wrap(..., event_shape=)"
        )
    if guidance is not None and guidance != 1:
        denoiser = Guided(denoiser, guidance)
    conditions = Conditions.of(denoiser, n, cond or {})
    parts = read_entries(samplers)
    jobs, refused = _jobs(parts, budgets, denoiser)
    setting = Setting(denoiser, n, seed, conditions, data, batch_size, shown)
    for name, count in {(j.entry.name, _trained_noises(j, setting)) for j in jobs}:
        if count:
            logger.warning(
                "%s: %d of its %d samples are from noises that it was trained on; give another seed",
                name, count, n,
            )  # fmt: skip
    target = _reference_job(reference, reference_nfe, denoiser)
    question = _question(setting, target, guidance)
    store, team = Store(folder), processes()
    if overwrite and team.several:
        raise ValueError(
            "--overwrite with several processes could delete what another has begun; remove the folder first"
        )
    every = [(REFERENCE, target.nfe, target.identity)]
    every += [(job.entry.name, job.nfe, job.identity) for job in jobs]
    with progress_of(progress) as shown_progress, ExitStack() as whole:

        def hold() -> AbstractContextManager[object]:
            return locked(store.folder, progress=shown_progress, wait=team.several)

        # Alone it has the folder to itself; processes of a launch lock it only to begin and to end.
        if not team.several:
            whole.enter_context(hold())
        with hold() if team.several else nullcontext():
            store.open(question, every, extend=extend, overwrite=overwrite, join=team.several)
        total = len(setting.batches()) * (target.nfe + sum(job.nfe for job in jobs))
        shown_progress.stage("comparing", total)
        runner = Runner(setting, store, names, target, shown_progress)
        runner.run(jobs, team)
        with hold() if team.several else nullcontext():
            base = runner.reference()
            cells = [runner.cell(job) for job in jobs]
    return Comparison(store, question, cells, base, refused, parts, setting)


def _jobs(
    parts: Sequence[Entry], budgets: Sequence[int], denoiser: Denoiser
) -> tuple[list[Job], list[tuple[str, int, str]]]:
    """Builds every sampler at every budget.

    Raises:
        ValueError: If one of them can meet no budget.
    """
    jobs: list[Job] = []
    refused: list[tuple[str, int, str]] = []
    for part in parts:
        possible, reasons = list[Job](), list[tuple[str, int, str]]()
        for nfe in [part.nfe] if part.nfe is not None else budgets:
            try:
                built = part.build(denoiser, nfe)
                if built.nfe != nfe:
                    raise ValueError(f"it makes {built.nfe} evaluations, not {nfe}")
            except Contradiction:
                raise
            except ValueError as error:
                reasons.append((part.name, nfe, str(error)))
                continue
            possible.append(Job(part, nfe, built, identity(built)))
        if not possible:
            raise ValueError(f"{part.name}: {reasons[0][2]}")
        jobs += possible
        refused += reasons
    return jobs, refused


def _trained_noises(job: Job, setting: Setting) -> int:
    """Returns how many samples of a comparison an operator was trained on."""
    known = getattr(job.sampler.denoiser, "trained_noises", None)
    return 0 if known is None else min(setting.n, known(setting.seed))


def _reference_job(text: str, nfe: int, denoiser: Denoiser) -> Job:
    part = read_entry(text)
    try:
        sampler = part.build(denoiser, nfe)
    except Contradiction:
        raise
    except ValueError as error:
        raise ValueError(f"the reference {text!r}: {error}") from None
    return Job(part, nfe, sampler, identity(sampler))


def _checked(nfe: Sequence[int], n: int, batch_size: int, shown: int, most: int) -> list[int]:
    if not isinstance(nfe, (list, tuple, range)):
        raise TypeError(f"nfe must be a list of budgets, for example [5, 10], got {nfe!r:.40}")
    numbers = {"n": n, "batch_size": batch_size, "shown": shown, "reference_nfe": most}
    for name, value in [*numbers.items(), *(("nfe", one) for one in nfe)]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r:.40}")
    if n < 2:
        raise ValueError("n must be at least 2: one sample has no interval")
    if not nfe:
        raise ValueError("give at least one budget, for example nfe=[5, 10]")
    return sorted(set(nfe))


def _question(setting: Setting, target: Job, guidance: float | None) -> dict[str, Any]:
    data, digest = setting.data, hashlib.sha256()
    for name, value in sorted(setting.conditions.values.items()):
        values = value.tolist() if isinstance(value, Tensor) else value
        digest.update(f"{name}={values!r};".encode())
    return {
        "model": setting.denoiser.fingerprint(),
        "n": setting.n,
        "seed": setting.seed,
        "conditions": digest.hexdigest() if setting.conditions.values else None,
        "guidance": None if guidance == 1 else guidance,
        "data": None if data is None else {"sha256": data.sha256, "files": data.files},
        "features": None
        if data is None
        else data.features_sha256 or callable_digest(extractor(data.extractor)),
        "reference": target.entry.name,
        "reference_identity": target.identity,
        "reference_nfe": target.nfe,
        "batch_size": setting.batch_size,
        "device": setting.denoiser.device.type,
    }

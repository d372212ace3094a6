"""``fewstep.compare``: which sampler is best for a model at a budget, and with what significance."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.paths import check_path
from fewstep.base.processes import processes
from fewstep.base.progress import Progress
from fewstep.base.runs import locked
from fewstep.base.tables import Column, Table
from fewstep.comparison import Cell, Comparison
from fewstep.comparison import compare as run
from fewstep.comparison.results import Invocation
from fewstep.comparison.scores import RMS, TITLES, check_metrics
from fewstep.comparison.store import CELLS, REPORT, RESULTS, STATE, Store
from fewstep.comparison.verdicts import Verdict, best_recipe, judge, measure_of
from fewstep.diffusion.noise import NoiseSource
from fewstep.loading import load
from fewstep.metrics import Estimate, Reference
from fewstep.metrics.features import FeatureMap
from fewstep.metrics.real import order
from fewstep.metrics.reference import check_data_range
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.workflows.files import EXACT, check_report, check_tensor, name_of, prepared_folder

SOLVERS = ("auto", "tab3", "ddim", "dpmpp-2m", "unipc3")
"""The default samplers."""

EXACT_DRAWS, STORED = 100_000, 2000
"""The numbers of draws for the statistics of an exact model's data, and of stored draws."""


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison with its verdicts.

    Attributes:
        comparison: The cells with their scores, and the files that hold their samples' features.
        verdicts: For each budget the order of the samplers, best first, and which are ties.
        invocation: The names of model and data, for reports.
        paths: The files that have been written, the report first; empty if there is no folder.
    """

    comparison: Comparison = field(repr=False)
    verdicts: Sequence[Verdict] = field(repr=False)
    invocation: Invocation = field(default=Invocation(""), repr=False)
    paths: Sequence[Path] = ()

    @property
    def cells(self) -> Sequence[Cell]:
        """The cells: a sampler at a budget, with its scores."""
        return self.comparison.cells

    @property
    def refused(self) -> Sequence[tuple[str, int, str]]:
        """Sampler, budget and reason of what could not be run."""
        return self.comparison.refused

    @cached_property
    def recipes(self) -> dict[int, SamplerRecipe]:
        """The best sampler of each budget that can be written as a recipe."""
        best = {verdict.nfe: best_recipe(self.comparison, verdict) for verdict in self.verdicts}
        return {nfe: one[1] for nfe, one in best.items() if one is not None}

    def table(self) -> Table:
        """Returns the order at each budget: sampler, scores with 95 % intervals, seconds, best or tie."""
        measure = measure_of(self.comparison)
        names = list(dict.fromkeys([measure, RMS]))
        rows = [
            {
                "nfe": cell.nfe,
                "sampler": cell.name,
                **{name: cell.scores[name] for name in names},
                "milliseconds": 1e3 * cell.seconds[0],
                "verdict": "best"
                if cell is verdict.best
                else "tie"
                if cell in verdict.ties
                else "",
            }
            for verdict in self.verdicts
            for cell in verdict.order
        ]
        return Table(
            rows,
            [
                Column("nfe", "NFE"),
                Column("sampler", left=True),
                *(Column(name, TITLES[name], show_estimate) for name in names),
                Column("milliseconds", "ms/sample", "{:.3g}".format),
                Column("verdict", "", left=True),
            ],
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes what the command writes: report.html, results.json, best-NFE.json and pictures.

        The cells are written too, so ``fewstep.compare(..., out=folder)`` adds to them.

        Arguments:
            folder: The folder.
            overwrite: Whether to replace a comparison in it.

        Returns:
            The path of the report.

        Raises:
            ValueError: If there is a comparison in the folder, or what draws the report is not installed.
        """
        check_path(folder, "folder")
        check_report()
        source, store = self.comparison.store.folder, Store(folder)
        if source.resolve() != store.folder.resolve():
            prepared_folder(store.folder, [STATE, REPORT, RESULTS, CELLS], overwrite=overwrite)
            if overwrite:
                store.clear()
            store.folder.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source / CELLS, store.folder / CELLS)
        return self._write(replace(self.comparison, store=self.comparison.store.moved(folder)))[0]

    def _write(self, comparison: Comparison) -> list[Path]:
        from fewstep.comparison.page import write_report

        return write_report(comparison, self.invocation, self.verdicts)


def compare(
    denoiser: Denoiser,
    solvers: Any = SOLVERS,
    *,
    nfe: Sequence[int] = (5, 10, 20),
    data: str | Path | Tensor | Reference | None = None,
    n: int = 256,
    seed: int = 0,
    features: FeatureMap = "fashion",
    metrics: Sequence[str] | None = None,
    reference: str = "auto",
    reference_nfe: int = 200,
    guidance: float | None = None,
    batch_size: int = 64,
    out: str | Path | None = None,
    extend: bool = True,
    overwrite: bool = False,
    invocation: Invocation | None = None,
    progress: Progress | bool | None = False,
    **cond: Any,
) -> ComparisonResult:
    r"""Compares samplers at several budgets from the same noise, as ``fewstep compare`` does.

    Every sampler starts from the noise of (seed, i) for sample i, so two are compared sample by sample:
    if the interval of their difference includes zero, they tie. They are ordered by FID if there are
    data, else by the distance to a fine reference of the same model.

    Cost: the sum of all budgets and ``reference_nfe``, in network evaluations for each of n samples.

    Arguments:
        denoiser: The model.
        solvers: The samplers: one, several in a list, or a mapping from names for tables. Each is a text as in the
            command (``"tab3"``, ``"unipc3@karras"``, ``"ddim+eta=0.5"``,
            ``"diffusers:UniPC+solver_order=3"``, the path of a recipe); a pair (solver, grid); a
            :class:`fewstep.Solver`, :class:`fewstep.SamplerRequest`, :class:`fewstep.Profile`,
            :class:`fewstep.SamplerRecipe`, :class:`fewstep.Plan`, :class:`fewstep.TunedSampler`; or a sampler;
            in a mapping also a function (denoiser, nfe) -> sampler.
        nfe: The budgets: numbers of network evaluations. A sampler that cannot meet one of them has no
            cell there; recipes, plans and samplers run at their own number.
        data: Real data: an embedded name (``"fashion"``), a folder of images, an idx or npz file, the
            name of an exact model, a tensor (m, \*) of samples in the model's range, or a
            :class:`fewstep.metrics.Reference`. Left out, only the distance to the reference is measured.
        n: The number of samples of each.
        seed: The seed.
        features: The features of FID for data by a name or path: the name of an extractor, or one; samples in a
            tensor are compared as they are, unless they have the shape of the extractor's images.
        metrics: Which of ``"fid"``, ``"kid"``, ``"precision-recall"``, ``"sliced-wasserstein"``; all if left out.
        reference: The sampler of the reference.
        reference_nfe: Its number of evaluations.
        guidance: The scale of classifier-free guidance; 1 is none.
        batch_size: The samples in one network evaluation.
        out: The folder for report and results, in which an interrupted comparison is resumed by the
            same call; left out, there is none: :meth:`ComparisonResult.save` writes them.
        extend: Whether to add to a finished comparison in the folder.
        overwrite: Whether to replace one.
        invocation: The names of model and data and the command, for reports.
        progress: ``True`` for a bar, or a :class:`fewstep.base.progress.Progress`.
        cond: The conditions, one value or n each.

    Raises:
        ValueError, TypeError: Before the first evaluation: if a sampler is not known or can meet no
            budget, its arguments contradict each other, the folder has another comparison, or a number is
            out of range.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> result = fewstep.compare(denoiser, ["ddim", "tab2"], nfe=[4], n=16, reference_nfe=20)
        >>> result.verdicts[0].best.name
        'tab2'
        >>> result.recipes[4].nfe
        4
    """
    check_path(out, "out")
    if out is not None:
        check_report()
        prepared_folder(Path(out))
    elif overwrite:
        raise ValueError(
            "overwrite replaces what is in a folder; give out=, or leave overwrite out"
        )
    NoiseSource(seed, ())
    metrics = [metrics] if isinstance(metrics, str) else metrics
    if metrics is not None:
        check_metrics(metrics)
    if data is None and (metrics or features != "fashion"):
        raise ValueError(
            f"{'metrics' if metrics else 'features'} compare samples with data; give data, or leave "
            f"{'metrics' if metrics else 'features'} out"
        )
    settings = {
        "nfe": nfe,
        "n": n,
        "seed": seed,
        "data": None if data is None else real_data(data, features, denoiser),
        "metrics": metrics,
        "reference": reference,
        "reference_nfe": reference_nfe,
        "guidance": guidance,
        "cond": cond,
        "batch_size": min(n, batch_size) if isinstance(n, int) and n > 0 else batch_size,
        "progress": progress,
    }
    named = invocation or Invocation(name_of(denoiser), "" if data is None else _data_name(data))
    if out is not None:
        comparison = run(
            denoiser, solvers, folder=out, extend=extend, overwrite=overwrite, **settings
        )
        return _reported(comparison, named)
    folder = Path(tempfile.mkdtemp(prefix="fewstep-compare-"))
    try:
        comparison = run(denoiser, solvers, folder=folder, **settings)
        result = ComparisonResult(comparison, judge(comparison), named)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The files go with the last object that reads them, at the latest when the process ends.
    weakref.finalize(comparison.store, shutil.rmtree, folder, ignore_errors=True)
    return result


def _reported(comparison: Comparison, invocation: Invocation) -> ComparisonResult:
    """Writes the report; of several processes whoever is ready first, so that nobody waits for a lost one."""
    team, folder = processes(), comparison.store.folder
    with locked(folder, wait=True):
        written = team.several and comparison.store.is_finished()
        result = ComparisonResult(comparison, judge(comparison), invocation)
        paths = [folder / REPORT, folder / RESULTS, *sorted(folder.glob("best-*.json"))]
        if not written:
            paths = result._write(comparison)
    return replace(result, paths=paths)


def real_data(
    source: str | Path | Tensor | Reference, features: FeatureMap, denoiser: Denoiser
) -> Reference:
    """Returns the real data as a reference; of an exact model by its name, draws from it.

    Raises:
        ValueError, TypeError: If they are of another shape or type, or missing.
    """
    shape = tuple(denoiser.event_shape or ())
    if isinstance(source, str) and source in EXACT:
        drawn: Any = load(source, device="cpu")
        points = drawn.draw(EXACT_DRAWS, seed=1).float()
        return replace(
            Reference.of(points, points[-STORED:], name=source),
            features=points[:STORED],
            event_shape=drawn.event_shape,
        )
    check_data_range(denoiser)
    if isinstance(source, Reference):
        real = source
    elif isinstance(source, (str, Path)):
        real = Reference.load(source, features)
    else:
        samples = check_tensor(source, shape, least=20)
        mixed = order(len(samples))
        cut = len(samples) // 5
        images = len(shape) == 3 and (features != "fashion" or shape == (1, 28, 28))
        own = features if images else None
        real = Reference.of(samples[mixed[cut:]], samples[mixed[:cut]], features=own)
    if real.event_shape is not None and tuple(real.event_shape) != shape:
        raise ValueError(
            f"the data have shape {tuple(real.event_shape)}, the model's samples {shape}"
        )
    return real


def _data_name(data: str | Path | Tensor | Reference) -> str:
    return str(data) if isinstance(data, (str, Path)) else getattr(data, "name", "data")


def show_estimate(value: Estimate) -> str:
    """Returns an estimate with its interval as text."""
    return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})"

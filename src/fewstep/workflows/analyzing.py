"""``fewstep.analyze``: where a model's error comes from, and which sampler that suggests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.files import read_json, write_json
from fewstep.base.options import MOST_MEASURED
from fewstep.base.paths import check_path
from fewstep.base.processes import processes
from fewstep.base.progress import SILENT, Progress, progress_of
from fewstep.base.runs import RunFolder, hash_inputs
from fewstep.base.tables import Column, Table
from fewstep.comparison.results import Invocation
from fewstep.diffusion.noise import NoiseSource
from fewstep.loading import EMBEDDED, load
from fewstep.models.conditions import Conditions, classes_in_turn
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.sampling.profile import Profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.studies import Advice, Subject, fitted_grids, share_study, study
from fewstep.studies.reference import digest_input
from fewstep.training.data import read_images
from fewstep.workflows.files import EXACT, check_report, check_tensor, name_of, prepared_folder

BUDGETS = (5, 6, 8, 10, 15, 20)
"""The default numbers of evaluations."""

REPORT, RESULTS, GRID = "report.html", "results.json", "grid.json"

DRAWS = 4096
"""The number of points drawn as the data of an exact model."""


@dataclass(frozen=True)
class Analysis:
    """A finished study of a model.

    Attributes:
        results: All numbers, as a JSON object.
        advice: For each budget the recommended sampler, the static default and the others that were tried.
        profile: The times fitted to the model: ``fewstep.sample(..., profile=analysis.profile)``.
        recipes: The recommended samplers by their number of evaluations.
        command: The command or call that reproduces it.
    """

    results: Mapping[str, Any] = field(repr=False)
    advice: Sequence[Advice] = field(repr=False)
    profile: Profile = field(repr=False)
    recipes: Mapping[int, SamplerRecipe] = field(repr=False)
    command: str = ""

    @property
    def verdict(self) -> str:
        """What the check of the model's description found, in a sentence."""
        return self.results["check"]["verdict"]

    @property
    def enough(self) -> int | None:
        """The least budget whose error is below 5 % of the data's deviation, or ``None``."""
        return self.results["enough"]

    @cached_property
    def shown(self) -> int:
        """The budget that suits best: :attr:`enough`, or else the one nearest to 10."""
        return self.results["enough"] or self.results["shown"]

    def table(self) -> Table:
        """Returns for each budget the recommended sampler, its distance to the reference and the default's."""
        rows = []
        for item in self.advice:
            best, default = item.best, item.default
            change = None
            if default.held_out and best.held_out is not None:
                change = best.held_out / default.held_out - 1
            rows.append(
                {
                    "nfe": item.nfe,
                    "solver": best.solver,
                    "grid": best.grid,
                    "predicted": best.predicted,
                    "held_out": best.held_out,
                    "default": default.held_out,
                    "change": change,
                }
            )
        four = "{:.4f}".format
        return Table(
            rows,
            [
                Column("nfe", "NFE"),
                Column("solver", left=True),
                Column("grid", left=True),
                Column("predicted", show=four),
                Column("held_out", "RMS, held out", four),
                Column("default", show=four),
                Column("change", "", "{:+.0%}".format),
            ],
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes what the command writes: report.html, results.json, grid.json and recipe-NFE.json.

        Arguments:
            folder: The folder.
            overwrite: Whether to replace results in it.

        Returns:
            The path of the report.

        Raises:
            ValueError: If there are results in the folder, or what draws the report is not installed.
        """
        check_path(folder, "folder")
        check_report()
        names = outputs(list(self.recipes))
        place = prepared_folder(Path(folder), names, overwrite=overwrite)
        return self._write(place)

    def _write(self, folder: Path) -> Path:
        from fewstep.studies.page import write_page

        for nfe, recipe in self.recipes.items():
            recipe.save(folder / f"recipe-{nfe}.json")
        self.profile.save(folder / GRID)
        write_json(folder / RESULTS, dict(self.results))
        return write_page(self.results, folder / REPORT, command=self.command)


def outputs(nfe: Sequence[int]) -> list[str]:
    """Returns the names of the files of a study."""
    return [REPORT, RESULTS, GRID, *(f"recipe-{k}.json" for k in nfe)]


def analyze(
    denoiser: Denoiser,
    *,
    data: str | Path | Tensor | None = None,
    nfe: Sequence[int] = BUDGETS,
    n: int = 32,
    budget: float = 15.0,
    guidance: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    invocation: Invocation | None = None,
    progress: Progress | bool | None = False,
    **cond: Any,
) -> Analysis:
    r"""Finds where a model's error comes from and which sampler suits it, as ``fewstep analyze`` does.

    The model's description is checked; trajectories of many steps are followed; local errors along them
    say where steps cost most, and which solver on which grid is best at each budget. Nothing is trained.

    Cost: some 500 network evaluations for each of 2 n trajectories.

    Arguments:
        denoiser: The model.
        data: The data that the model was trained on: a folder of images, an idx or npz file, the name of
            an exact model, or a tensor (m, \*) of samples in the model's range. Left out, the fitting error
            is not computed.
        nfe: The numbers of network evaluations to advise on, from 2 to 40.
        n: The number of trajectories to study, at least 4; as many others are used for the selection.
        budget: Minutes after which no more grids are polished.
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed.
        out: The folder for report, results and recipes, in which an interrupted study is resumed by the
            same call; left out, there is none: :meth:`Analysis.save` writes them.
        overwrite: Whether to replace results in the folder. The processes of one launch (``torchrun``,
            ``srun``) share the parts of a study with ``out``, and each returns the same.
        invocation: The names of model and data and the command, for the report.
        progress: ``True`` for a bar, or a :class:`fewstep.base.progress.Progress`.
        cond: The conditions, one value for all or 2 n. A class-conditional model without given
            classes gets its classes in turn.

    Raises:
        ValueError, TypeError: Before the first evaluation, if anything does not fit or the folder has
            results.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> analysis = fewstep.analyze(denoiser, nfe=[3], n=4, budget=0)
        >>> [row["nfe"] for row in analysis.table()]
        [3]
        >>> fewstep.sample(denoiser, 8, recipe=analysis.recipes[3]).shape
        torch.Size([8, 2])
    """
    check_path(out, "out")
    budgets = _checked(denoiser, nfe, n, budget)
    NoiseSource(seed, ())
    team = processes()
    if overwrite and team.several:
        raise ValueError(
            "--overwrite with several processes could replace what another has finished; remove the folder first"
        )
    if out is not None:
        check_report()
        prepared_folder(Path(out))
    points, labels = (None, None) if data is None else real_samples(data, denoiser)
    cond = classes_in_turn(denoiser, 2 * n, cond)
    scale = None if guidance == 1 else guidance
    if scale is not None:
        denoiser = Guided(denoiser, scale)
    conditions = Conditions.of(denoiser, 2 * n, cond)
    fingerprint = denoiser.fingerprint()
    source = str(data) if isinstance(data, (str, Path)) else None
    named = invocation or Invocation(name_of(denoiser), source or "")
    settings = {
        "model": named.model,
        "fingerprint": fingerprint,
        "data": source if data is None or source else "samples in memory",
        "nfe": budgets,
        "n": n,
        "class_labels": named.class_labels,
        "guidance": guidance,
        "seed": seed,
        "device": denoiser.device.type if team.several else str(denoiser.device),
        "budget": budget,
    }
    inputs = {
        **settings,
        "files": hash_inputs(source),
        "samples": None if source else digest_input(points),
        "conditions": {k: digest_input(v) for k, v in sorted(conditions.values.items())},
    }
    folder = Path(tempfile.mkdtemp(prefix="fewstep-analyze-")) if out is None else Path(out)
    run = RunFolder(folder, "run of fewstep analyze", outputs=outputs(budgets))
    subject = Subject(denoiser, points, labels, cond, settings)
    command = named.command or "fewstep.analyze, from Python"

    def analysis(shown: Progress) -> Analysis:
        results, advice = study(
            subject, run, nfe=budgets, n=n, seed=seed, minutes=budget, progress=shown
        )
        recipes = {
            item.nfe: _recipe(item, denoiser, guidance, fingerprint, named.model)
            for item in advice
        }
        profile = fitted_grids(denoiser, advice, fingerprint=fingerprint)
        results["inputs"] = run.digest
        found = Analysis(results, advice, profile, recipes, command)
        if out is not None:
            found._write(folder)
        run.finish()
        return found

    try:
        with progress_of(progress) as shown:
            if out is None or not team.several:
                with run.running(inputs, overwrite=overwrite, progress=shown):
                    return analysis(shown)
            if run.join(inputs, finished=lambda own: _is_of(folder, own), progress=shown):
                share_study(
                    subject,
                    run,
                    team,
                    nfe=budgets,
                    n=n,
                    seed=seed,
                    minutes=budget,
                    progress=shown,
                )
            with run.finishing(progress=shown) as left:
                return analysis(SILENT) if left else _written(folder, command)
    finally:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_of(folder: Path, inputs: str) -> bool:
    """Returns whether the results in a folder are those of inputs with this digest."""
    return read_json(folder / RESULTS, what="results").get("inputs") == inputs


def _written(folder: Path, command: str) -> Analysis:
    """Returns the analysis that another process of the launch has written."""
    results = read_json(folder / RESULTS, what="results")
    advice = [Advice.from_record(item) for item in results["advice"]]
    recipes = {a.nfe: SamplerRecipe.load(folder / f"recipe-{a.nfe}.json") for a in advice}
    return Analysis(results, advice, Profile.load(folder / GRID), recipes, command)


def _checked(denoiser: Denoiser, nfe: Sequence[int], n: int, budget: float) -> list[int]:
    given = [nfe] if isinstance(nfe, int) else nfe
    right = isinstance(given, Iterable) and all(
        type(k) is int and 2 <= k <= MOST_MEASURED for k in given
    )
    budgets = sorted(set(given)) if right else []
    if not budgets:
        raise ValueError(
            f"nfe is integers from 2 to {MOST_MEASURED}, for example [5, 10]; got {nfe!r:.60}"
        )
    if not isinstance(n, int) or isinstance(n, bool) or n < 4:
        raise ValueError(f"n must be at least 4, got {n!r:.20}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget < 1e6:
        raise ValueError(f"budget must be a number of minutes, got {budget!r:.20}")
    if denoiser.event_shape is None:
        raise ValueError(
            "the shape of a sample is not known; give it with Denoiser.wrap(..., event_shape=)"
        )
    return budgets


def real_samples(source: str | Path | Tensor, denoiser: Denoiser) -> tuple[Tensor, Tensor | None]:
    """Returns real samples in the model's range with their classes; of an exact model, draws from it.

    Raises:
        ValueError, TypeError: If they are of another shape or type, or missing.
    """
    shape = tuple(denoiser.event_shape or ())
    if not isinstance(source, (str, Path)):
        return check_tensor(source, shape, least=2), None
    if str(source) in EXACT:
        drawn: Any = load(source, device="cpu")
        points, labels = drawn.draw(DRAWS, seed=1), None
    else:
        if str(source) in EMBEDDED and not Path(source).exists():
            raise ValueError(
                f"{str(source)!r} has statistics of its images, not the images; give their folder, "
                "idx or npz file, or leave --data out"
            )
        if len(shape) != 3:
            raise ValueError(f"this model makes no images (its samples have shape {shape})")
        size = shape[1] if shape[1] == shape[2] else None
        images = read_images(source, size=size)
        data_range = getattr(denoiser, "data_range", (-1.0, 1.0))
        points, labels = images.floats(data_range=data_range), images.labels
    if tuple(points.shape[1:]) != shape:
        raise ValueError(
            f"the data have shape {tuple(points.shape[1:])}, the model's samples {shape}"
        )
    return points, labels


def _recipe(
    item: Advice, denoiser: Denoiser, guidance: float | None, fingerprint: str, model: str
) -> SamplerRecipe:
    best = item.best
    return SamplerRecipe(
        name=best.solver,
        nfe=item.nfe,
        grid="explicit",
        options={
            "times": list(best.times),
            **({"weights": [list(row) for row in best.weights]} if best.weights else {}),
        },
        head_start=best.times[0] if best.head else None,
        schedule=denoiser.schedule.to_record(),
        guidance=guidance,
        about={
            "from": "fewstep analyze",
            "model": model,
            "fingerprint": fingerprint,
            "grid": best.grid,
            "rms_held_out": best.held_out,
            "rms_held_out_default": item.default.held_out,
        },
    )

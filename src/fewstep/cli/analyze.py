"""``fewstep analyze``: where a model's error comes from, and which sampler that suggests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.files import write_json
from fewstep.base.interrupts import keeping
from fewstep.base.progress import progress_of
from fewstep.base.runs import RunFolder, hash_inputs
from fewstep.cli._common import (
    Flag,
    budgets_of,
    check_device,
    console,
    event_shape,
    follows,
    kept_files,
    left_to_first,
    load_model,
    output_folder,
    parse_labels,
    positive,
    say,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.models.denoiser import Denoiser
    from fewstep.studies import Advice

REPORT, RESULTS, GRID = "report.html", "results.json", "grid.json"
EXACT = ("mixture-smooth", "mixture-sharp")
DRAWS = 4096
"""The number of points drawn as the data of an exact model."""


def analyze(
    model: str,
    *,
    out: Path,
    data: str | None = None,
    nfe: str = "5,6,8,10,15,20",
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 32,
    budget: float = 15.0,
    class_labels: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Find where a model's error comes from and which sampler suits it: OUT/report.html.

    Also OUT/results.json (all numbers), OUT/grid.json (time grids fitted to this model, for
    `--grid auto:FILE`) and OUT/recipe-NFE.json (the recommended samplers, for
    `fewstep sample --recipe`). Nothing is trained. Each stage is saved in OUT: an interrupted run
    is resumed by the same command.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The folder to write.
        data: The data that the model was trained on: a folder of images, an idx or npz file, or
            the name of an exact model; left out, the fitting error is not computed.
        nfe: The numbers of network evaluations to advise on, with commas between.
        n: The number of trajectories to study; as many others are used for the selection.
        budget: Minutes after which no more grids are polished; the others are those of
            dynamic programming, or named ones.
        class_labels: One class (3), classes in turn (0,1,2), or all classes in turn (all), which is
            the default for a model with classes.
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Replace existing results.
    """
    if left_to_first("analyze"):
        return
    budgets = budgets_of(nfe)
    positive("-n", n)
    if n < 4:
        raise ValueError(f"-n must be at least 4, got {n}")
    if not 0 <= budget < 1e6:
        raise ValueError(f"--budget must be a number of minutes, got {budget}")
    output_folder(out)
    _check_report()
    given_device, device = device, check_device(device)
    denoiser = load_model(model, device)
    event_shape(denoiser)
    if class_labels is None and "class_labels" in denoiser.null_condition:
        class_labels = "all"
    points, labels = (None, None) if data is None else _data(data, denoiser)
    if guidance not in (None, 1):
        from fewstep.models.wrappers import Guided

        denoiser = Guided(denoiser, guidance)  # type: ignore[arg-type]

    from fewstep.diffusion.noise import NoiseSource
    from fewstep.studies import fitted_grids
    from fewstep.studies.stages import Subject, study

    NoiseSource(seed, ())

    chosen = parse_labels(class_labels, denoiser, 2 * n)
    cond = {} if chosen is None else {"class_labels": chosen}
    denoiser.prepare(2 * n, cond)
    fingerprint = denoiser.fingerprint()
    settings = {
        "model": model,
        "fingerprint": fingerprint,
        "data": data,
        "nfe": budgets,
        "n": n,
        "class_labels": class_labels,
        "guidance": guidance,
        "seed": seed,
        "device": device,
        "budget": budget,
    }
    inputs = {**settings, "files": hash_inputs(data)}
    outputs = [REPORT, RESULTS, GRID, *(f"recipe-{k}.json" for k in budgets)]
    run = RunFolder(out, "run of fewstep analyze", outputs=outputs)
    with (
        keeping(lambda: kept_files(out, "parts/*", "parts")),
        progress_of(follows()) as progress,
        run.running(inputs, overwrite=overwrite, progress=progress),
    ):
        results, advice = study(
            Subject(denoiser, points, labels, cond, settings),
            run,
            nfe=budgets,
            n=n,
            seed=seed,
            minutes=budget,
            progress=progress,
        )
        from fewstep.studies.page import write_page

        grids = fitted_grids(denoiser, advice, fingerprint=fingerprint)
        recipes = [_recipe(item, denoiser, guidance, fingerprint, model) for item in advice]
        for item, recipe in zip(advice, recipes, strict=True):
            recipe.save(out / f"recipe-{item.nfe}.json")
        grids.save(out / GRID)
        write_json(out / RESULTS, results)
        again = _command(model, data, nfe, n, class_labels, guidance, seed, out)
        write_page(results, out / REPORT, command=again)
        run.finish()
    say(results["check"]["verdict"])
    _table(advice)
    if results["enough"] is not None:
        say(
            f"{results['enough']} evaluations come within 5 % of the data's deviation of the reference"
        )
    say(f"wrote {out / REPORT}, {out / RESULTS}, {out / GRID} and {len(recipes)} recipes")
    shown = results["enough"] or results["shown"]
    recipe, on = out / f"recipe-{shown}.json", None if given_device == "auto" else given_device
    again = command(
        "sample", model, recipe=recipe, class_labels=class_labels, device=on, out=f"{out}-samples"
    )
    say(f"next: {again}")


def _check_report() -> None:
    """Raises early if the report could not be written at the end."""
    from importlib.util import find_spec

    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise ValueError(f"the report needs {missing[0]}: pip install fewstep[report]")


def _data(source: str, denoiser: Denoiser) -> tuple[Tensor, Tensor | None]:
    """Returns real data in the model's range with their classes; of an exact model, draws from it."""
    shape = tuple(denoiser.event_shape or ())
    if source in EXACT:
        drawn: Any = load_model(source, "cpu")
        points, labels = drawn.draw(DRAWS, seed=1), None
    else:
        from fewstep.loading import EMBEDDED
        from fewstep.training.data import read_images

        if source in EMBEDDED and not Path(source).exists():
            raise ValueError(
                f"{source!r} has statistics of its images, not the images; give their folder, "
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
) -> Any:
    from fewstep.sampling.recipe import SamplerRecipe

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


def _table(advice: Sequence[Advice]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("NFE", "solver", "grid", "predicted", "RMS, held out", "default", ""):
        left = title in ("solver", "grid", "")
        table.add_column(title, justify="left" if left else "right")
    for item in advice:
        best, default = item.best, item.default
        change = "" if not default.held_out else f"{best.held_out / default.held_out - 1:+.0%}"  # type: ignore[operator]
        table.add_row(
            str(item.nfe),
            best.solver,
            best.grid,
            f"{best.predicted:.4f}",
            f"{best.held_out:.4f}",
            f"{default.held_out:.4f}",
            change,
        )
    console().print(table)


def _command(
    model: str,
    data: str | None,
    nfe: str,
    n: int,
    class_labels: str | None,
    guidance: float | None,
    seed: int,
    out: Path,
) -> str:
    return command(
        "analyze",
        model,
        data=data,
        nfe=nfe,
        n=n,
        class_labels=class_labels,
        guidance=guidance,
        seed=seed,
        out=out,
    )

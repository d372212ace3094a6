"""``fewstep analyze``: where a model's error comes from, and which sampler that suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import budgets_of, parse_labels
from fewstep.base.processes import processes
from fewstep.cli._common import (
    Flag,
    event_shape,
    follows,
    load_model,
    positive,
    saved_files,
    say,
)
from fewstep.reporting.commands import command


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
    budgets = budgets_of(nfe)
    positive("-n", n)
    if n < 4:
        raise ValueError(f"-n must be at least 4, got {n}")
    if not 0 <= budget < 1e6:
        raise ValueError(f"--budget must be a number of minutes, got {budget}")

    from fewstep.comparison.results import Invocation
    from fewstep.workflows.analyzing import GRID, REPORT, RESULTS
    from fewstep.workflows.analyzing import analyze as run
    from fewstep.workflows.files import check_report, prepared_folder

    prepared_folder(out)
    check_report()
    denoiser = load_model(model, device)
    event_shape(denoiser)
    if class_labels is None and "class_labels" in denoiser.null_condition:
        class_labels = "all"
    labels = parse_labels(class_labels, denoiser, 2 * n)
    conditions: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    invocation = Invocation(
        model=model,
        data=data or "",
        command=_command(model, data, nfe, n, class_labels, guidance, seed, out),
        class_labels=class_labels,
    )
    with keeping(lambda: saved_files(out, "parts/*", "parts")):
        analysis = run(
            denoiser,
            data=data,
            nfe=budgets,
            n=n,
            budget=budget,
            guidance=guidance,
            seed=seed,
            out=out,
            overwrite=overwrite,
            invocation=invocation,
            progress=follows(),
            **conditions,
        )
    if not processes().first:
        return
    say(analysis.verdict)
    say(str(analysis))
    if analysis.enough is not None:
        say(
            f"{analysis.enough} evaluations come within 5 % of the data's deviation of the reference"
        )
    count = len(analysis.recipes)
    say(f"wrote {out / REPORT}, {out / RESULTS}, {out / GRID} and {count} recipes")
    recipe, on = out / f"recipe-{analysis.shown}.json", None if device == "auto" else device
    again = command(
        "sample", model, recipe=recipe, class_labels=class_labels, device=on, out=f"{out}-samples"
    )
    say(f"next: {again}")


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

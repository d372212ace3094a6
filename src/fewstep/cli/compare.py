"""``fewstep compare``: which sampler is best for a model at a budget, and with what significance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.processes import processes
from fewstep.base.runs import locked
from fewstep.cli._common import (
    Flag,
    console,
    follows,
    kept_files,
    load_model,
    output_folder,
    parse_labels,
    positive,
    say,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.comparison import Comparison
    from fewstep.comparison.verdicts import Verdict
    from fewstep.metrics import Reference
    from fewstep.models.denoiser import Denoiser

SOLVERS = "auto,tab3,ddim,dpmpp-2m,unipc3"
"""The default samplers."""

EXACT = ("mixture-smooth", "mixture-sharp")
"""The models that are their own data."""

EXACT_DRAWS, KEPT = 100_000, 2000
"""The numbers of draws for the statistics of an exact model's data, and of stored draws."""


def compare(
    model: str,
    *,
    out: Path,
    solvers: str = SOLVERS,
    nfe: str = "5,10,20",
    data: str | None = None,
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 256,
    features: str = "fashion",
    metrics: str | None = None,
    reference_nfe: int = 200,
    class_labels: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 64,
    extend: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Compare samplers at several budgets from the same noise: OUT/report.html.

    Also OUT/results.json (all numbers), OUT/best-NFE.json (the best sampler of each budget as a
    recipe for `fewstep sample --recipe`) and pictures. Each cell (a sampler at a budget) is saved
    in OUT when it is done: an interrupted run is resumed by the same command. Started several times together
    (torchrun, accelerate launch, srun) the processes share the batches.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The folder to write.
        solvers: The samplers, with commas between. The syntax of one is
            NAME[@GRID[:VALUE]][+OPTION=VALUE]..., for example tab3, tab3@power:1.5,
            unipc3@karras, ddim+eta=0.5, tab3@auto:FILE; a scheduler of diffusers as
            diffusers:NAME[+OPTION=VALUE]..., for example
            diffusers:DPMSolverMultistep+use_karras_sigmas=true; a recipe, a plan or a tuned
            sampler by its path (.json); the recommendations of `fewstep analyze`, or an operator, by
            the path of its folder.
        nfe: The numbers of network evaluations, with commas between.
        data: Real data to compare with: an embedded name, a folder of images, an idx or npz file;
            left out, only the distance to a fine reference is measured.
        n: The number of samples of each.
        features: The feature extractor of FID: an embedded one, a TorchScript file, or pixels.
        metrics: Which of fid, kid, precision-recall and sliced-wasserstein; all if left out.
        reference_nfe: The number of evaluations of the reference.
        class_labels: One class (3), classes in turn (0,1,2), or all classes in turn (all).
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed; sample i starts from the noise of (seed, i) with every sampler.
        device: Where to run: auto, cpu, cuda, mps.
        batch_size: The samples in one network evaluation.
        extend: Add to the finished comparison in OUT: its cells are reused, its report is replaced.
        overwrite: Replace existing results.
    """
    given = _command(locals())
    positive("-n", n)
    positive("--batch-size", batch_size)
    positive("--reference-nfe", reference_nfe)
    budgets = _numbers(nfe)
    output_folder(out)
    _check_report()
    denoiser = load_model(model, device)
    labels = parse_labels(class_labels, denoiser, n)
    cond = {} if labels is None else {"class_labels": labels}

    from fewstep.comparison import compare as run
    from fewstep.comparison.page import write_report
    from fewstep.comparison.results import Invocation
    from fewstep.comparison.store import REPORT, RESULTS
    from fewstep.comparison.verdicts import judge

    chosen = None if metrics is None else [m.strip() for m in metrics.split(",") if m.strip()]
    real = None if data is None else _data(data, features, denoiser)
    with keeping(lambda: kept_files(out, "cells/*.json", "finished cells")):
        comparison = run(
            denoiser,
            solvers,
            nfe=budgets,
            folder=out,
            n=n,
            seed=seed,
            data=real,
            metrics=chosen,
            reference_nfe=reference_nfe,
            guidance=guidance,
            cond=cond,
            batch_size=min(n, batch_size),
            extend=extend,
            overwrite=overwrite,
            progress=follows(),
        )
    invocation = Invocation(
        model=model,
        data=data or "",
        command=given,
        class_labels=class_labels,
        device=None if device == "auto" else device,
    )
    team = processes()
    with locked(out, wait=True) if team.several else nullcontext():
        # Whoever is ready first writes the report, so that nobody waits for a lost process.
        written = team.several and comparison.store.is_finished()
        if written and not team.first:
            return
        verdicts = judge(comparison)
        paths = [out / REPORT, out / RESULTS, *sorted(out.glob("best-*.json"))]
        if not written:
            paths = write_report(comparison, invocation, verdicts)
    if not team.first:
        return
    _table(comparison, verdicts)
    say(f"\nwrote {', '.join(str(path) for path in paths[:2])}")
    recipes = [path for path in paths if path.name.startswith("best-")]
    if recipes:
        say(f"and the best of each budget: {', '.join(str(path) for path in recipes)}")
        say(
            f"next: {command('sample', model, recipe=recipes[0], class_labels=class_labels, device=invocation.device, out=f'{out}-samples')}"
        )


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [p for p in parts if not (p.isascii() and p.isdigit() and 0 < len(p) < 6 and int(p))]
    if wrong or not parts:
        raise ValueError(
            f"--nfe is one or more positive integers, for example 5,10,20; got {text!r:.40}"
        )
    return [int(part) for part in parts]


def _check_report() -> None:
    """Raises early if the report could not be written at the end."""
    from importlib.util import find_spec

    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise ValueError(f"the report needs {missing[0]}: pip install fewstep[report]")


def _data(source: str, features: str, denoiser: Denoiser) -> Reference:
    """Returns the real data; of an exact model by its name, draws from it."""
    from dataclasses import replace

    from fewstep.metrics import Reference
    from fewstep.metrics.reference import check_data_range

    shape = denoiser.event_shape or ()
    if source in EXACT:
        drawn: Any = load_model(source, "cpu")
        points = drawn.draw(EXACT_DRAWS, seed=1).float()
        return replace(
            Reference.of(points, points[-KEPT:], name=source),
            features=points[:KEPT],
            event_shape=drawn.event_shape,
        )
    check_data_range(denoiser)
    reference = Reference.load(source, features)
    if reference.event_shape is not None and tuple(reference.event_shape) != tuple(shape):
        raise ValueError(
            f"the data have shape {tuple(reference.event_shape)}, the model's samples {tuple(shape)}"
        )
    return reference


def _command(given: dict[str, Any]) -> str:
    """Returns the given command, without defaults."""
    defaults = {
        "data": None,
        "features": "fashion",
        "metrics": None,
        "reference_nfe": 200,
        "class_labels": None,
        "guidance": None,
        "device": "auto",
        "batch_size": 64,
    }
    always = {name: given[name] for name in ("solvers", "nfe", "n", "seed")}
    more = {name: given[name] for name, value in defaults.items() if given[name] != value}
    return command("compare", given["model"], **always, **more, out=given["out"])


def _table(comparison: Comparison, verdicts: Sequence[Verdict]) -> None:
    """Prints the order at each budget."""
    from rich.table import Table

    from fewstep.comparison.scores import RMS, TITLES
    from fewstep.comparison.verdicts import measure_of

    measure = measure_of(comparison)
    names = [measure, *([RMS] if measure != RMS else [])]
    table = Table(box=None, pad_edge=False)
    for title in ("NFE", "sampler", *(TITLES[name] for name in names), "ms/sample", ""):
        table.add_column(title, justify="left" if title in ("sampler", "") else "right")
    for verdict in verdicts:
        for cell in verdict.order:
            word = "best" if cell is verdict.best else "tie" if cell in verdict.ties else ""
            scores = [cell.scores[name] for name in names]
            table.add_row(
                str(cell.nfe),
                cell.name,
                *(f"{s.value:.4g} ({s.low:.4g} to {s.high:.4g})" for s in scores),
                f"{1e3 * cell.seconds[0]:.3g}",
                word,
            )
    console().print(table)
    for name, nfe, reason in comparison.refused:
        say(f"left out: {name} with {nfe}: {reason}")

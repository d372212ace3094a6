"""``fewstep compare``: which sampler is best for a model at a budget, and with what significance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import parse_labels
from fewstep.base.processes import processes
from fewstep.cli._common import Flag, follows, load_model, positive, saved_files, say
from fewstep.reporting.commands import command

SOLVERS = "auto,tab3,ddim,dpmpp-2m,unipc3"
"""The default samplers."""


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

    from fewstep.comparison.results import Invocation
    from fewstep.workflows.comparing import compare as run
    from fewstep.workflows.files import check_report, prepared_folder

    prepared_folder(out)
    check_report()
    denoiser = load_model(model, device)
    labels = parse_labels(class_labels, denoiser, n)
    conditions: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    invocation = Invocation(
        model=model,
        data=data or "",
        command=given,
        class_labels=class_labels,
        device=None if device == "auto" else device,
    )
    with keeping(lambda: saved_files(out, "cells/*.json", "finished cells")):
        result = run(
            denoiser,
            solvers,
            nfe=budgets,
            data=data,
            n=n,
            seed=seed,
            features=features,
            metrics=None
            if metrics is None
            else [m for m in map(str.strip, metrics.split(",")) if m],
            reference_nfe=reference_nfe,
            guidance=guidance,
            batch_size=batch_size,
            out=out,
            extend=extend,
            overwrite=overwrite,
            invocation=invocation,
            progress=follows(),
            **conditions,
        )
    if not processes().first:
        return
    say(str(result.table()))
    for name, budget, reason in result.refused:
        say(f"left out: {name} with {budget}: {reason}")
    paths = result.paths
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

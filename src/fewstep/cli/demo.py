"""``fewstep demo``: five samplers from the same noise, with a fine reference."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.base.files import write_atomic, write_json
from fewstep.base.progress import Progress, progress_of
from fewstep.cli._common import (
    Flag,
    check_device,
    console,
    draw,
    event_shape,
    follows,
    load_model,
    output_folder,
    refuse_existing,
    say,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.models.denoiser import Denoiser
    from fewstep.sampling.protocol import Sampler

PICTURE, RESULTS = "demo.png", "results.json"
SAMPLES = 16
BUDGETS = (5, 10)
SOLVERS = ("ddim", "tab3", "accelerated-ddim", "dpmpp-2m", "accelerated-ddpm")
REFERENCE, REFERENCE_NFE, REFERENCE_GRID = "tab2", 200, "log-rho"


class Row(NamedTuple):
    """One sampler at one budget."""

    solver: str
    nfe: int
    stochastic: bool
    distance: float
    seconds: float
    samples: Tensor


def demo(
    *,
    out: Path,
    model: str = "fashion",
    seed: int = 0,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Compare samplers at 5 and 10 evaluations with a reference at 200: a table and a picture.

    Args:
        out: The folder to write: demo.png and results.json.
        model: An embedded name (see `fewstep models`), or a folder; a model of images.
        seed: The seed; all samplers start from the same noise.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Replace existing results.
    """
    from fewstep.diffusion.noise import NoiseSource

    output_folder(out)
    refuse_existing(out, (PICTURE, RESULTS), overwrite=overwrite)
    NoiseSource(seed, ())
    given_device, device = device, check_device(device)
    denoiser = load_model(model, device)
    shape = event_shape(denoiser)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"the demo shows images, {model!r} has samples of shape {shape}; "
            f"see it with: {command('sample', model, out='samples')}"
        )
    classes = getattr(getattr(denoiser, "network", None), "num_classes", None)
    labels = [i % classes for i in range(SAMPLES)] if classes else None
    cond = {} if labels is None else {"class_labels": labels}

    reference = _sampler(denoiser, REFERENCE, REFERENCE_NFE, REFERENCE_GRID)
    rows = [(name, nfe, _sampler(denoiser, name, nfe)) for name in SOLVERS for nfe in BUDGETS]
    evaluations = REFERENCE_NFE + len(SOLVERS) * sum(BUDGETS)
    with progress_of(follows()) as progress:
        progress.stage("sampling", evaluations)
        target, spent = _timed(reference, seed, cond, progress)
        results = []
        for name, nfe, sampler in rows:
            samples, seconds = _timed(sampler, seed, cond, progress)
            distance = float((samples - target).double().square().mean().sqrt())
            stochastic = sampler.plan.stochastic  # type: ignore[attr-defined]
            results.append(Row(name, nfe, stochastic, distance, seconds, samples))
    results.insert(0, Row(REFERENCE, REFERENCE_NFE, False, 0.0, spent, target))

    columns = _columns(denoiser, labels)
    _write(out, results, columns, model=model, seed=seed, device=device, labels=labels)
    _table(results)
    say(f"\nwrote {out / PICTURE} and {out / RESULTS}")
    more = {
        "class_labels": "all" if classes else None,
        "device": None if given_device == "auto" else given_device,
    }
    say(f"next: {command('sample', model, **more, out='samples')}")


def _sampler(denoiser: Denoiser, solver: str, nfe: int, grid: str | None = None) -> Sampler:
    from fewstep.sampling.sample import sampler

    return sampler(denoiser, solver=solver, nfe=nfe, grid=grid)


def _timed(
    sampler: Sampler, seed: int, cond: dict[str, Any], progress: Progress
) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    samples = draw(sampler, range(SAMPLES), seed=seed, cond=cond, progress=progress)
    return samples, time.perf_counter() - begin


def _columns(denoiser: Denoiser, labels: list[int] | None) -> list[str]:
    names = getattr(denoiser, "class_names", None)
    heads = [f"sample {i}" for i in range(SAMPLES)]
    if labels is None:
        return heads
    classes = [names[k] if names else f"class {k}" for k in labels]
    return [f"{head}\n{text[:14]}" for head, text in zip(heads, classes, strict=True)]


def _label(row: Row, *, reference: bool) -> str:
    kind = "\nreference" if reference else "\nstochastic" if row.stochastic else ""
    return f"{row.solver}\n{row.nfe} evaluations{kind}"


def _write(out: Path, rows: list[Row], columns: list[str], *, model: str, **settings: Any) -> None:
    import io

    import torch

    from fewstep import __version__
    from fewstep.reporting.plots import image_grid

    image = image_grid(
        torch.cat([row.samples for row in rows]),
        columns=SAMPLES,
        row_labels=[_label(row, reference=not i) for i, row in enumerate(rows)],
        column_labels=columns,
        title=f"{Path(model).name}: the same noise through each sampler (seed {settings['seed']})",
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(out / PICTURE, buffer.getvalue())
    reference, *others = rows
    write_json(
        out / RESULTS,
        {
            "model": model,
            **settings,
            "samples": SAMPLES,
            "reference": {
                "solver": reference.solver,
                "grid": REFERENCE_GRID,
                "nfe": reference.nfe,
                "seconds": reference.seconds,
            },
            "results": [
                {
                    "solver": row.solver,
                    "nfe": row.nfe,
                    "stochastic": row.stochastic,
                    "rms_distance": row.distance,
                    "seconds": row.seconds,
                }
                for row in others
            ],
            "versions": {"fewstep": __version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        },
    )


def _table(rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("solver", no_wrap=True)
    for column in ("NFE", "RMS distance", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for i, row in enumerate(rows):
        note = "the reference" if not i else "stochastic"
        distance = "0" if not i else f"{row.distance:.4f}"
        table.add_row(
            row.solver,
            str(row.nfe),
            distance,
            f"{row.seconds:.2f}",
            note if row.stochastic or not i else "",
        )
    console().print(table)

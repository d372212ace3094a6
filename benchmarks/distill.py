"""What distilling into few evaluations is worth: quality and cost.

Usage:
    python benchmarks/distill.py quality --student endpoint=DIR [--student path=DIR] [--tuned FILE]
        [-n 2000] --out CELLS
        (with --model FOLDER --data IMAGES --features FOLDER,FOLDER --name NAME: of another model)
    python benchmarks/distill.py picture FILE.png --rows "student endpoint;ddim 4" --student endpoint=DIR --out CELLS
    python benchmarks/distill.py speed --student endpoint=DIR ...

Each cell is a file in CELLS; an interrupted run is resumed. ``quality``: FID to the training
images, in the features of two classifiers, of a network with random weights and of wavelets, recall, RMS distance to the
teacher's sampler (`auto` with 10 evaluations) from the same noise, FLOPs and the CPU time of one sample alone, beside
solvers; and a picture, a row each. ``picture``: some of the rows. ``speed``:
one evaluation of student and teacher, in turn. Which parts of DSNO matter: ``benchmarks/dsno.py``.
A flow map is measured at each of its budgets, along the trajectory and with fresh noise between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import about, print_table, say_what_runs
from fewstep import metrics
from fewstep.base.files import read_tensors, sha256, write_json, write_tensors
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.learned.judges import random_features
from fewstep.learned.unseen import wavelets
from fewstep.metrics.features import EMBEDDED
from fewstep.operators import DistillRecipe, FlowMap, OperatorModel, TrajectoryOperator, flops
from fewstep.operators.continued import continued
from fewstep.operators.students import make_student
from fewstep.reporting.plots import image_grid
from fewstep.sampling.plan_sampler import PlanSampler
from quality import MODEL, REFERENCE, REFERENCE_NFE, SEED, Subject, build, gather

TEACHER = "auto 10"
"""What the distance is measured to: the best sampler of as many evaluations as the recorded one has."""

BESIDE = "ddim 1,ddim 2,ddim 4,auto 2,auto 4,auto 5,profile 4,profile 5,auto 20"
"""The samplers that students are compared with, as in benchmarks/quality.py: ``profile`` is ``auto`` with the model's profile."""

UNSEEN = 2
"""The seed of random features that neither a loss nor a choice of settings has seen, as in benchmarks/tune.py."""

SHOWN = 16
"""The samples of each row of the picture."""

TIMED = 5
"""The runs of one sample of which the median is the time of a cell."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "picture", "speed"))
    parser.add_argument("file", type=Path, nargs="?", help="for picture")
    parser.add_argument("--rows", default="", help="the rows of a picture, as 'ddim 4;auto 4'")
    parser.add_argument("--student", action="append", default=[], help="name=folder")
    parser.add_argument("--tuned", action="append", default=[], help="name=recipe file")
    parser.add_argument("--solvers", default=BESIDE, help="names and budgets")
    parser.add_argument(
        "--continued", default="", help="'KNOT SOLVER NFE' of flow maps and solvers from there"
    )
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("distill-cells"))
    parser.add_argument(
        "--model", default=MODEL, help="the teacher: an embedded model, or a folder"
    )
    parser.add_argument("--data", default=MODEL, help="its real images")
    parser.add_argument("--features", default=",".join(EMBEDDED), help="two feature extractors")
    parser.add_argument("--name", default=MODEL, help="the model's name in the result")
    parser.add_argument(
        "--samples", type=Path, help="samples of solvers: DIR of benchmarks/quality.py"
    )
    parser.add_argument("--teacher", default=TEACHER, help="what the distance is measured to")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    if options.samples is not None and options.seed != SEED:
        parser.error(f"the samples of benchmarks/quality.py have seed {SEED}")
    if options.what == "picture" and options.file is None:
        parser.error("the file of the picture is needed")
    {"quality": quality, "picture": picture, "speed": speed}[options.what](options)


def pairs(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


# Quality of a model's students.


@dataclass(frozen=True)
class Row:
    """One sampler of the table.

    Attributes:
        cost: Of one sample, in evaluations of the teacher's network, counted in FLOPs.
        file: The name of the file of its samples.
        run: Samples, from noise and labels.
        cell: Its name and budget in a comparison of benchmarks/quality.py, whose noise and labels are the same.
    """

    cost: float
    file: str
    run: Callable[[Tensor, Tensor], Tensor]
    cell: tuple[str, int] | None = None


def quality(options: argparse.Namespace) -> None:
    clean, robust = options.features.split(",")
    subject = Subject(options.name, options.model, options.data, (clean, robust))
    model = fewstep.load(subject.model)
    shape = model.event_shape
    assert shape is not None
    looks = [*subject.features, random_features(shape, seed=UNSEEN), wavelets(shape)]
    references = {_named(look): subject.real(look) for look in looks}
    own = references[_named(clean)]
    n, labels = options.n, labels_of(options.n)
    noise = noise_of(options, model)
    say_what_runs(f"{subject.name}, n = {n}, seed {options.seed}, labels in turn, no guidance.")
    cells = rows_of(options, model)
    samples = {name: drawn(row, options, model) for name, row in cells.items()}
    whole = solver_row(options.teacher, model)
    teacher = drawn(whole, options, model)
    one, rows, results = one_call(model), [], {}
    for name, row in cells.items():
        x = samples[name]
        found = {look: metrics.fid(x, reference) for look, reference in references.items()}
        rms = (x - teacher).square().flatten(1).mean(1).sqrt()
        half = 1.96 * float(rms.std()) / n**0.5
        guessed = own.extractor.classify(x)  # type: ignore[union-attr]
        right = float((guessed == labels).double().mean())
        recall = metrics.precision_recall(x, own).recall
        seconds = alone(lambda row=row: row.run(noise[:1], labels[:1]))
        results[name] = {
            "cost": row.cost,
            "GFLOP": row.cost * one / 1e9,
            "seconds": seconds,
            "fid": {look: [f.value, f.low, f.high] for look, f in found.items()},
            "rms": float(rms.mean()),
            "right": right,
            "recall": [recall.value, recall.low, recall.high],
        }
        rows.append(
            (
                name,
                f"{row.cost:.2f}",
                f"{1e3 * seconds:.0f}",
                *(f"{f.value:.3g} ({f.low:.3g} to {f.high:.3g})" for f in found.values()),
                f"{float(rms.mean()):.4f} ± {half:.4f}",
                f"{right:.3f}",
                f"{recall.value:.3f}",
            )
        )
    head = (
        "sampler",
        "cost",
        "CPU ms",
        *(f"FID (95 %), {look}" for look in references),
        "RMS to the teacher",
        "class found",
        "recall",
    )
    print_table(head, rows)
    save_picture(samples, options.out / "samples.png")
    print("\ncost: in evaluations of the teacher's network, counted in FLOPs.")
    if options.json:
        origin = about(n=n, seed=options.seed, teacher=model.fingerprint(), model=subject.name)
        compared = {"rms to": options.teacher, "FLOPs": one}
        write_json(options.json, {"about": origin | compared, "cells": results})


def picture(options: argparse.Namespace) -> None:
    """Draws some rows of the table, from the same noise."""
    model = fewstep.load(options.model)
    cells = rows_of(options, model)
    rows = options.rows.split(";") if options.rows else list(cells)
    if unknown := [name for name in rows if name not in cells]:
        raise ValueError(f"there is no row {unknown[0]!r}; there are {', '.join(cells)}")
    save_picture({name: drawn(cells[name], options, model) for name in rows}, options.file)


def save_picture(samples: dict[str, Tensor], file: Path) -> None:
    """Saves the first samples of each row."""
    shown = torch.cat([x[:SHOWN] for x in samples.values()])
    image_grid(shown, columns=SHOWN, row_labels=list(samples)).save(file)


def labels_of(n: int) -> Tensor:
    """Returns the class of each sample: 0 to 9, over and over."""
    return torch.arange(n) % 10


def noise_of(options: argparse.Namespace, model: fewstep.Denoiser) -> Tensor:
    """Returns the initial noise of all samples."""
    assert model.event_shape is not None
    return NoiseSource(options.seed, range(options.n)).draw(INITIAL, model.event_shape)


def drawn(row: Row, options: argparse.Namespace, model: fewstep.Denoiser) -> Tensor:
    """Returns the samples of a row, from its file if they have been drawn."""
    file, n = options.out / f"{row.file}-{options.seed}.safetensors", options.n
    if not file.exists() or len(read_tensors(file)["x"]) < n:
        known = None
        if options.samples is not None and row.cell is not None:
            known = gather(*row.cell, options.samples, model.fingerprint(), n)
        x = row.run(noise_of(options, model), labels_of(n)) if known is None else known[0][:n]
        write_tensors(file, {"x": x.half()})
        print(row.file, flush=True)
    return read_tensors(file)["x"][:n].float()


def rows_of(options: argparse.Namespace, model: fewstep.Denoiser) -> dict[str, Row]:
    """Returns the samplers that are asked for, by title: students, solvers and tuned samplers."""
    cells: dict[str, Row] = {}
    base = one_call(model)
    for name, folder in pairs(options.student).items():
        student = fewstep.load(folder)
        assert isinstance(student, OperatorModel)
        operator, mark = student.operator, student.fingerprint()[:8]
        cost = flops(operator, {"class_labels": 0}) / base

        def add(title: str, cost: float, source: fewstep.Denoiser, mark: str, **how: Any) -> None:
            cells[title] = Row(
                cost, f"{title.replace(',', '').replace(' ', '-')}-{mark}", run_of(source, how)
            )

        if isinstance(operator, FlowMap):
            for nfe in operator.layout.budgets:
                for fresh in (False, True)[: 1 + (nfe > 1)]:
                    title = f"student {name}, {nfe}{' with fresh noise' * fresh}"
                    how: dict[str, Any] = {"nfe": nfe, "options": {"fresh": fresh}}
                    add(title, nfe * cost, student, mark, **how)
            for text in filter(None, options.continued.split(",")):
                frame, solver, nfe = text.split()
                whole = continued(student, model, int(frame), solver=solver)
                title = f"student {name} to knot {frame}, then {solver}, {nfe}"
                add(title, int(nfe) - 1 + cost, whole, mark, nfe=int(nfe))
            continue
        assert isinstance(operator, TrajectoryOperator)
        trained = operator.frames
        for frames in (trained, *(m for m in (2, 4, 8) if trained > 1 and m != trained)):
            title = f"student {name}" if frames == trained else f"student {name}, run at {frames}"
            again = student
            if frames != trained:
                again = fewstep.load(folder)
                assert isinstance(again, OperatorModel)
                at: Any = again.operator
                start = at.layout.start
                at.set_times([start * (1 - k / frames) ** 2 for k in range(1, frames + 1)])
                cost = flops(at, {"class_labels": 0}) / base
            add(title, cost, again, mark)
    for name in filter(None, options.solvers.split(",")):
        cells[name] = solver_row(name, model)
    for name, file in pairs(options.tuned).items():
        recipe = fewstep.SamplerRecipe.load(file)
        nfe = recipe.plan.nfe if recipe.plan is not None else recipe.nfe
        mark = sha256(file)[:8]
        run = run_of(model, {"recipe": recipe})
        cells[f"tuned {name}"] = Row(float(nfe or 0), f"tuned-{name}-{mark}", run)
    return cells


def run_of(source: fewstep.Denoiser, how: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns what samples from noise and labels."""
    return lambda noise, labels: fewstep.sample(
        source, noise=noise, class_labels=labels, batch_size=100, **how
    )


def solver_row(name: str, model: fewstep.Denoiser) -> Row:
    """Returns the row of a name and budget such as ``"ddim 4"``."""
    solver, _, nfe = name.rpartition(" ")
    run = run_of(model, solver_of(name, model))
    cell = solver, int(nfe)
    if cell == (REFERENCE, REFERENCE_NFE):
        cell = "reference", REFERENCE_NFE
    return Row(float(nfe), name.replace(" ", "-"), run, cell)


def alone(run: Callable[[], Tensor]) -> float:
    """Returns the CPU seconds of one sample, the median of some runs."""
    spent = []
    for _ in range(TIMED + 1):
        begun = time.process_time()
        run()
        spent.append(time.process_time() - begun)
    return statistics.median(spent[1:])


def _named(look: str | metrics.Features) -> str:
    return Path(look if isinstance(look, str) else look.name).name


def solver_of(name: str, model: fewstep.Denoiser) -> dict[str, Any]:
    """Returns the arguments of :func:`fewstep.sample` for a name and budget such as ``"ddim 4"``.

    Raises:
        ValueError: If there is no such solver, or it cannot meet the budget.
    """
    solver, _, nfe = name.rpartition(" ")
    if not solver or not nfe.isdigit():
        raise ValueError(f"a sampler is a name and a budget, as 'ddim 4', got {name!r}")
    made = build(solver, model, int(nfe))
    if not isinstance(made, PlanSampler):
        raise ValueError(f"{solver!r} has no plan; name a solver of fewstep")
    return {"plan": made.plan}


def one_call(model: fewstep.Denoiser) -> int:
    """The FLOPs of one evaluation of the teacher."""
    recipe = DistillRecipe(mode="endpoint")
    return flops(make_student(model, recipe, [model.schedule.t_max, 0.0]), {"class_labels": 0})


# Latency and throughput.


def speed(options: argparse.Namespace) -> None:
    model = fewstep.load("fashion")
    say_what_runs(
        "Milliseconds of one evaluation, medians of rounds in turn (on a noisy machine)."
    )
    with torch.no_grad():
        rows = []
        for batch, rounds in ((1, 40), (64, 5)):
            x, y = torch.randn(batch, 1, 28, 28), torch.arange(batch) % 10
            t = torch.full((batch,), 500.0)
            runs: dict[str, Any] = {"teacher": lambda: model.raw(x, t, class_labels=y)}  # noqa: B023
            for name, folder in pairs(options.student).items():
                runs[name] = once(folder, x, y)
            for frames in (1, 2, 4, 8):
                stored = [999.0, *[999.0 * (1 - k / frames) ** 2 for k in range(1, frames + 1)]]
                kind = "dsno" if frames > 1 else "endpoint"
                made = make_student(model, DistillRecipe(mode=kind, frames=frames), stored)
                runs[f"untrained {kind}, {frames} frames"] = lambda o=made: o(x, class_labels=y)  # noqa: B023
            knots = [999.0, 435.0, 0.0]
            flow: Any = make_student(model, DistillRecipe(mode="flow-map"), knots)
            runs["untrained flow map"] = lambda o=flow: o.step(x, 0, 2, class_labels=y)  # noqa: B023
            spent: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds + 1):
                for name, run in runs.items():
                    start = time.process_time()
                    run()
                    spent[name].append(time.process_time() - start)
            base = statistics.median(spent["teacher"][1:])
            for name, values in spent.items():
                middle = statistics.median(values[1:])
                rows.append(
                    (
                        name,
                        batch,
                        f"{1e3 * middle:.1f}",
                        f"{batch / middle:.0f}",
                        f"{middle / base:.2f}",
                    )
                )
    print_table(("network", "batch", "CPU ms", "samples/s of CPU", "of the teacher"), rows)


def once(folder: str, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Returns one evaluation of a student."""
    student = fewstep.load(folder)
    assert isinstance(student, OperatorModel)
    operator: Any = student.operator
    if isinstance(operator, FlowMap):
        return lambda: operator.step(x, 0, len(operator.layout.times), class_labels=labels)
    return lambda: operator(x, class_labels=labels)


if __name__ == "__main__":
    main()

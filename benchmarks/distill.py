"""What distilling into one evaluation is worth: quality, cost, and which parts of the method matter.

Usage:
    python benchmarks/distill.py quality --student endpoint=DIR [--student path=DIR] [--tuned FILE]
        [-n 2000] --out CELLS
    python benchmarks/distill.py speed --student endpoint=DIR ...
    python benchmarks/distill.py ablation --data FASHION_MNIST --out CELLS [--seeds 0,1]

Each cell is a file in CELLS; an interrupted run is resumed. ``quality``: FID to the training
images, in the features of both embedded extractors, and RMS distance to the teacher's sampler
(`auto` with 10 evaluations) from the same noise, beside solvers; and a picture, a row each. ``speed``:
one evaluation of student and teacher, in turn. ``ablation``: a small teacher of 14x14 images and
students of equal training cost (``--cells`` chooses, ``--seconds`` stops, and the same command resumes).
A flow map is measured at each of its budgets, along the trajectory and with fresh noise between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import about, print_table, say_what_runs
from fewstep import metrics
from fewstep.base.files import read_json, read_tensors, write_json, write_tensors
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.metrics.features import EMBEDDED
from fewstep.operators import DistillRecipe, FlowMap, OperatorModel, TrajectoryOperator, flops
from fewstep.operators.continued import continued
from fewstep.operators.distillation import distill
from fewstep.operators.students import make_student
from fewstep.reporting.plots import image_grid
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.training.data import read_images
from fewstep.training.train import TrainRecipe, train
from quality import build

TEACHER = "auto 10"
"""What the distance is measured to: the best sampler of as many evaluations as the recorded one has."""

BESIDE = "ddim 1,ddim 2,ddim 4,auto 2,auto 4,auto 5,profile 4,profile 5,auto 20"
"""The samplers that students are compared with, as in benchmarks/quality.py: ``profile`` is ``auto`` with the model's profile."""

SHOWN = 16
"""The samples of each row of the picture."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "speed", "ablation"))
    parser.add_argument("--student", action="append", default=[], help="name=folder")
    parser.add_argument("--tuned", action="append", default=[], help="name=recipe file")
    parser.add_argument("--solvers", default=BESIDE, help="names and budgets")
    parser.add_argument(
        "--continued", default="", help="'KNOT SOLVER NFE' of flow maps and solvers from there"
    )
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("distill-cells"))
    parser.add_argument("--recall", action="store_true", help="measure recall too (--json)")
    parser.add_argument("--cells", help="names of ablation cells with ; between; all if left out")
    parser.add_argument("--trajectories", type=int, default=8192)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument(
        "--seconds", type=float, help="stop after so many; resumed when given again"
    )
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--frames", type=int, default=131_072, help="trained frames of a cell")
    options = parser.parse_args()
    {"quality": quality, "speed": speed, "ablation": ablation}[options.what](options)


def pairs(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


# Quality of the embedded model's students.


def quality(options: argparse.Namespace) -> None:
    model = fewstep.load("fashion")
    references = [metrics.Reference.load("fashion", look) for look in EMBEDDED]
    assert model.event_shape is not None
    n, labels = options.n, torch.arange(options.n) % 10
    noise = NoiseSource(options.seed, range(n)).draw(INITIAL, model.event_shape)
    say_what_runs(f"n = {n}, seed {options.seed}, labels in turn, no guidance.")

    def drawn(name: str, source: fewstep.Denoiser, **how: Any) -> Tensor:
        file = options.out / f"{name.replace(' ', '-')}-{options.seed}.safetensors"
        if not file.exists() or len(read_tensors(file)["x"]) < n:
            x = fewstep.sample(source, noise=noise, class_labels=labels, batch_size=100, **how)
            write_tensors(file, {"x": x.half()})
        return read_tensors(file)["x"][:n].float()

    cells: dict[str, tuple[float, Tensor]] = {}
    base = one_call(model)
    for name, folder in pairs(options.student).items():
        student = fewstep.load(folder)
        assert isinstance(student, OperatorModel)
        operator, mark = student.operator, student.fingerprint()[:8]
        cost = flops(operator, {"class_labels": 0}) / base
        if isinstance(operator, FlowMap):
            for nfe in operator.layout.budgets:
                for fresh in (False, True)[: 1 + (nfe > 1)]:
                    title = f"student {name}, {nfe}{' with fresh noise' * fresh}"
                    how: dict[str, Any] = {"nfe": nfe, "options": {"fresh": fresh}}
                    samples = drawn(f"{title.replace(',', '')}-{mark}", student, **how)
                    cells[title] = (nfe * cost, samples)
            for text in filter(None, options.continued.split(",")):
                frame, solver, nfe = text.split()
                whole = continued(student, model, int(frame), solver=solver)
                title = f"student {name} to knot {frame}, then {solver}, {nfe}"
                samples = drawn(f"{title.replace(',', '')}-{mark}", whole, nfe=int(nfe))
                cells[title] = (int(nfe) - 1 + cost, samples)
            continue
        assert isinstance(operator, TrajectoryOperator)
        trained = operator.frames
        for frames in (trained, *(m for m in (2, 4, 8) if trained > 1 and m != trained)):
            title = f"student {name}" if frames == trained else f"student {name}, run at {frames}"
            if frames != trained:
                start = operator.layout.start
                operator.set_times([start * (1 - k / frames) ** 2 for k in range(1, frames + 1)])
                cost = flops(operator, {"class_labels": 0}) / base
            cells[title] = (cost, drawn(f"{title.replace(',', '')}-{mark}", student))
    chosen = [name for name in options.solvers.split(",") if name]
    for name, how in {name: solver_of(name, model) for name in chosen}.items():
        cells[name] = (float(name.rpartition(" ")[2]), drawn(name, model, **how))
    for name, file in pairs(options.tuned).items():
        recipe = fewstep.SamplerRecipe.load(file)
        nfe = recipe.plan.nfe if recipe.plan is not None else recipe.nfe
        cells[f"tuned {name}"] = (float(nfe or 0), drawn(f"tuned-{name}", model, recipe=recipe))
    teacher = (
        cells[TEACHER][1]
        if TEACHER in cells
        else drawn(TEACHER, model, **solver_of(TEACHER, model))
    )
    rows, results = [], {}
    for name, (cost, x) in cells.items():
        found = [metrics.fid(x, reference) for reference in references]
        rms = (x - teacher).square().flatten(1).mean(1).sqrt()
        half = 1.96 * float(rms.std()) / n**0.5
        guessed = references[0].extractor.classify(x)  # type: ignore[union-attr]
        right = float((guessed == labels).double().mean())
        recall = metrics.precision_recall(x, references[0]).recall if options.recall else None
        results[name] = {
            "cost": cost,
            "fid": {
                features: [f.value, f.low, f.high]
                for features, f in zip(EMBEDDED, found, strict=True)
            },
            "rms": float(rms.mean()),
            "right": right,
            "recall": None if recall is None else [recall.value, recall.low, recall.high],
        }
        rows.append(
            (
                name,
                f"{cost:.2f}",
                *(f"{f.value:.2f} ({f.low:.2f} to {f.high:.2f})" for f in found),
                f"{float(rms.mean()):.4f} ± {half:.4f}",
                f"{right:.3f}",
            )
        )
    head = (
        "sampler",
        "cost",
        "FID (95 %), fashion",
        "FID (95 %), robust",
        "RMS to the teacher",
        "class found",
    )
    print_table(head, rows)
    shown = {name: x[:SHOWN] for name, (_, x) in cells.items()}
    picture = image_grid(torch.cat(list(shown.values())), columns=SHOWN, row_labels=list(shown))
    picture.save(options.out / "samples.png")
    print("\ncost: in evaluations of the teacher's network, counted in FLOPs.")
    if options.json:
        origin = about(n=n, seed=options.seed, teacher=model.fingerprint())
        write_json(options.json, {"about": origin, "cells": results})


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


# What matters: students of a small teacher at equal training cost.

SMALL = {"channels": [16, 32], "blocks": [1, 1], "attention": [1], "patch": 2, "num_classes": 10}
FIXED = {"mode": "dsno", "drawn": "fixed"}
CELLS: dict[str, tuple[dict[str, Any], float]] = {
    # recipe, frames of a trajectory (its cost; with drawn frames their mean)
    "endpoint": ({"mode": "endpoint"}, 1),
    "flow map": ({"mode": "flow-map"}, 1),
    "flow map, all pairs": ({"mode": "flow-map", "pairs": "all"}, 1),
    "dsno, drawn frames": ({"mode": "dsno"}, 5),
    "dsno, drawn frames, cap 20": ({"mode": "dsno", "lambda_max": 20.0}, 5),
    "dsno, drawn frames, dct": ({"mode": "dsno", "basis": "dct", "modes": 3}, 5),
    "folded, drawn frames": ({"mode": "folded"}, 5),
    "dsno, cap 1e4": (FIXED, 4),
    "dsno, cap 20": ({**FIXED, "lambda_max": 20.0}, 4),
    "dsno, uniform weights": ({**FIXED, "weights": "uniform"}, 4),
    "folded, cap 1e4": ({**FIXED, "mode": "folded"}, 4),
    "folded, cap 20": ({**FIXED, "mode": "folded", "lambda_max": 20.0}, 4),
    "folded, uniform weights": ({**FIXED, "mode": "folded", "weights": "uniform"}, 4),
    "same parameters": ({"mode": "same-parameters"}, 1),
    "same FLOPs": ({"mode": "same-flops"}, 4),
    "dsno, M = 2": ({**FIXED, "frames": 2}, 2),
    "dsno, M = 8": ({**FIXED, "frames": 8}, 8),
    "dsno, uniform grid": (FIXED, 4),
    "dsno, dct": ({**FIXED, "basis": "dct", "modes": 3}, 4),
    "dsno, l2": ({**FIXED, "loss": "l2"}, 4),
}
HELDOUT = 512


def ablation(options: argparse.Namespace) -> None:
    out, limit = options.out, Limit(options.seconds)
    if not (out / "teacher" / "model.json").exists():
        images = read_images(options.data, size=14)
        recipe = TrainRecipe(
            network=SMALL,
            schedule={"name": "ddpm-linear"},
            steps=options.teacher_steps,
            batch_size=128,
            learning_rate=2e-3,
            precision="float32",
        )
        train(images, out / "teacher", recipe, progress=limit)
    model, n = fewstep.load(out / "teacher"), options.trajectories
    chosen = [name for name in CELLS if not options.cells or name in options.cells.split(";")]
    stores = {}
    for name, keep in (("quadratic", 8), ("uniform", "uniform:4")):
        if any((name == "uniform") == ("uniform grid" in cell) for cell in chosen):
            fewstep.record(
                model,
                out / name,
                n=n,
                solver="unipc3",
                nfe=16,
                keep=keep,
                seed=1,
                batch_size=256,
                class_labels=torch.arange(n) % 10,
                progress=limit,
            )
            stores[name] = fewstep.TrajectoryStore.open(out / name)
    say_what_runs(
        f"14x14 images, a teacher of {sum(p.numel() for p in model.parameters()):,} parameters, {n} "
        f"trajectories (unipc3, 16 evaluations); every cell is trained on {options.frames:,} frames "
        f"(forward passes of the network), {HELDOUT} trajectories are held out."
    )
    results: dict[str, Any] = {"frames": options.frames, "trajectories": n, "cells": {}}
    for name in chosen:
        change, cost = CELLS[name]
        found = []
        for seed in map(int, options.seeds.split(",")):
            mark = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{options.frames}"
            file, run = out / "cells" / f"{mark}.json", out / "runs" / mark
            if not file.exists():
                store = stores["uniform" if "uniform grid" in name else "quadratic"]
                write_json(file, cell(model, store, run, change, cost, seed, options, limit))
            found.append(read_json(file))
        results["cells"][name] = found
    rows = [row(name, found) for name, found in results["cells"].items()]
    print_table(
        ("student", "parameters", "FLOPs", "sample", "Fréchet", "at its times", "in other ways"),
        rows,
    )
    print(
        "\nsample, times: mean squared error over the variance of the target, by seed; in other ways: the "
        "error of the sample with other numbers of evaluations or frames."
    )
    if options.json:
        write_json(options.json, {"about": about(), **results})


class Limit:
    """A progress that ends the command after some seconds; given again it resumes.

    Arguments:
        seconds: The most seconds, or ``None`` for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def stage(self, name: str, total: float | None = None, *, done: float = 0) -> None:
        """Does nothing."""

    def tick(self, amount: float = 1, note: str = "") -> None:
        """Raises ``KeyboardInterrupt``, on which a run saves its last step, when the time is over."""
        if self.end is not None and time.monotonic() > self.end:
            raise KeyboardInterrupt("the time of --seconds is over; give the same command again")


def cell(
    model: fewstep.Denoiser,
    store: fewstep.TrajectoryStore,
    run: Path,
    change: dict[str, Any],
    cost: float,
    seed: int,
    options: argparse.Namespace,
    limit: Limit,
) -> dict[str, Any]:
    """Trains and measures one student."""
    frames = {} if change["mode"] == "flow-map" else {"frames": 4}
    recipe = DistillRecipe(
        steps=options.frames // 256,
        batch_size=int(256 / cost),
        learning_rate=1e-3,
        warmup=50,
        decay=0.5,
        ema=0.99,
        heldout=HELDOUT,
        seed=seed,
        **{**frames, **change},
    )
    student = distill(model, store, run, recipe=recipe, checkpoint_every=200, progress=limit)
    operator = student.operator
    rows = range(len(store) - HELDOUT, len(store))
    read = store.read(list(rows))
    cond: dict[str, Any] = dict(read.conditions)
    x = read.states[:, 0]
    noise = x / model.schedule.prior_std(float(store.times[0]))
    stored, target = store.times.tolist(), read.states[:, -1]
    result: dict[str, Any] = {
        "parameters": sum(operator.overhead()),
        "flops": flops(operator, {"class_labels": 0}),
        "other": {},
    }
    if isinstance(operator, FlowMap):
        made = {
            f"{nfe}{' fresh' * fresh}": fewstep.sample(
                student, noise=noise, nfe=nfe, options={"fresh": fresh}, **cond
            )
            for nfe in operator.layout.budgets
            for fresh in (False, True)
            if not (fresh and nfe == 1)
        }
        result["frechet"] = metrics.fid(made["1"].flatten(1), target.flatten(1)).value
        result["errors"] = errors(made["1"][:, None], target[:, None])
        for name, samples in made.items():
            result["other"][name] = errors(samples[:, None], target[:, None])[0]
        return result
    assert isinstance(operator, TrajectoryOperator)
    ready = operator.model.prepare(len(rows), cond)
    with torch.no_grad():
        states = operator(x, **ready)
        index = [min(range(len(stored)), key=lambda i: abs(stored[i] - t)) for t in operator.times]
        result["errors"] = errors(states, read.states[:, index])
        result["frechet"] = metrics.fid(states[:, -1].flatten(1), target.flatten(1)).value
        for count in (2, 4, 8) if operator.frames > 1 and len(stored) == 9 else ():
            index = [round(k * 8 / count) for k in range(1, count + 1)]
            operator.set_times([stored[i] for i in index])
            result["other"][f"M = {count}"] = errors(operator(x, **ready), read.states[:, index])
    return result


def errors(states: Tensor, target: Tensor) -> list[float]:
    """The mean squared error of each frame, over the variance of its target."""
    error = (states - target).square().flatten(2).mean((0, 2))
    spread = target - target.mean(0)
    return (error / spread.square().flatten(2).mean((0, 2))).tolist()


def row(name: str, found: list[dict[str, Any]]) -> tuple[Any, ...]:
    first = found[0]
    other = [
        f"{key}: {value if isinstance(value, float) else value[-1]:.4f}"
        for key, value in first["other"].items()
    ]
    return (
        name,
        f"{first['parameters']:,}",
        f"{first['flops'] / 1e6:.1f} M",
        " / ".join(f"{f['errors'][-1]:.4f}" for f in found),
        " / ".join(f"{f['frechet']:.2f}" for f in found),
        " ".join(f"{v:.3f}" for v in first["errors"]),
        ", ".join(other),
    )


if __name__ == "__main__":
    main()

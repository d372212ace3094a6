"""DSNO on a small teacher: students of the same trajectories at equal trained frames, and what helps them.

Usage:
    python benchmarks/dsno.py --data FASHION_MNIST --out FOLDER --json FILE
        [--seeds 0,1,2] [--frames N] [--size 14] [--cells "NAME;NAME"] [--seconds N]

A small teacher on small images (``--size``) is trained, trajectories are recorded, and each cell is a student for
each seed (the order of the trajectories and what is drawn). A frame is one pass of the network, forward and backward: a
trajectory costs a student of M frames M of them. Measured on held-out trajectories: the error of each frame at M = 1, 2,
4 and 8 over the variance of its target, the Frechet distance of samples to the teacher's (in pixels), and the errors when
a solver continues from a frame, beside the solver alone. Each cell is a file: an interrupted run is resumed, also inside
a training, and a folder of other trajectories or recipes is refused; ``--json`` is written after each cell.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import about, print_table, say_what_runs
from fewstep import metrics
from fewstep.base.files import read_json, write_json
from fewstep.operators import DistillRecipe, OperatorModel, TrajectoryOperator, flops
from fewstep.operators.continued import continued
from fewstep.operators.distillation import distill
from fewstep.training.data import read_images
from fewstep.training.train import TrainRecipe, train

SMALL = {"channels": [16, 32], "blocks": [1, 1], "attention": [1], "patch": 2, "num_classes": 10}
"""The teacher's network."""

SOLVER, RECORDED = "unipc3", 16
"""The solver of the trajectories and its evaluations; it also continues from frames."""

HELDOUT = 512
COUNTS = (1, 2, 4, 8)
"""The numbers of frames at which students are measured."""

BATCH = 256
"""The frames of a training step."""

CONTINUED = ("dsno", "dsno, 2 frames", "folded, 2 to 8 frames")
"""The students whose samples are also taken by the solver from their frames."""

AFTER = (1, 2, 3, 4)
"""The evaluations of the solver from a frame; alone it has up to twice as many."""

DSNO: dict[str, Any] = {"mode": "dsno", "lambda_max": 20.0}
FOLDED = {**DSNO, "mode": "folded"}
PUBLISHED: dict[str, Any] = {"mode": "dsno", "labels": "target"}
FIXED = {"drawn": "fixed", "frames": 4}
CELLS: dict[str, tuple[dict[str, Any], float]] = {
    # the recipe, and the frames of a trajectory (of drawn ones the mean)
    "dsno": (DSNO, 2.5),
    "dsno, 2 to 8 frames": ({**DSNO, "drawn": [2, 8]}, 5),
    "folded, 2 to 8 frames": ({**FOLDED, "drawn": [2, 8]}, 5),
    "endpoint": ({"mode": "endpoint"}, 1),
    "dsno, 4 frames": ({**DSNO, **FIXED}, 4),
    "folded, 4 frames": ({**FOLDED, **FIXED}, 4),
    "dsno, 4 frames, published labels": ({**PUBLISHED, **FIXED}, 4),
    "folded, 4 frames, published labels": ({**PUBLISHED, **FIXED, "mode": "folded"}, 4),
    "dsno, 2 frames": ({**DSNO, **FIXED, "frames": 2}, 2),
    "dsno, 8 frames": ({**DSNO, **FIXED, "frames": 8}, 8),
    "same FLOPs": ({"mode": "same-flops"}, 4),
    "dsno, 2 to 8 frames, cap 10,000": ({**DSNO, "drawn": [2, 8], "lambda_max": 1e4}, 5),
}
"""The students. Drawn frames are 1 to 4 unless a name says otherwise. Published are a frame's own time as its label, and a cap of 10,000 on the weights."""


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dsno-cells"))
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cells", help="names of cells with ; between; all if left out")
    parser.add_argument("--frames", type=int, default=262_144, help="trained frames of a cell")
    parser.add_argument("--trajectories", type=int, default=16_384)
    parser.add_argument("--size", type=int, default=14, help="the side of the images")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument(
        "--seconds", type=float, help="stop after so many; resumed when given again"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit = Limit(options.seconds)
    model = teacher(options, limit)
    store = trajectories(model, options, limit)
    chosen = [name for name in CELLS if not options.cells or name in options.cells.split(";")]
    sizes = {"size": options.size, "parameters": sum(p.numel() for p in model.parameters())}
    say_what_runs(
        f"{options.size}x{options.size} images, a teacher of {sizes['parameters']:,} parameters, {len(store):,} "
        f"trajectories ({SOLVER}, {RECORDED} evaluations); {options.frames:,} frames a cell, {HELDOUT} held out."
    )
    result: dict[str, Any] = {
        "about": about(frames=options.frames, trajectories=len(store), heldout=HELDOUT, **sizes),
        "solver": alone(model, store),
        "cells": {},
    }
    for seed in map(int, options.seeds.split(",")):  # a run that is cut off has whole seeds
        for name in chosen:
            mark = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{options.frames}"
            file = options.out / "cells" / f"{mark}.json"
            recipe = recipe_of(name, seed, options.frames)
            if not file.exists():
                write_json(file, cell(name, model, store, options.out / mark, recipe, limit))
            found = read_json(file)
            inputs = found.pop("inputs", None)
            if inputs != inputs_of(model, store, recipe):
                raise ValueError(
                    f"{file} is of another teacher, other trajectories or another recipe; "
                    "delete it, or give another --out"
                )
            result["cells"].setdefault(name, []).append(found)
            if options.json:
                write_json(options.json, result)
    print_table(
        ("student", "FLOPs", *(f"sample, M = {m}" for m in COUNTS), "Frechet"),
        [row(name, found) for name, found in result["cells"].items()],
    )


def teacher(options: argparse.Namespace, limit: Limit) -> fewstep.Denoiser:
    """Returns the teacher, trained if it is not there."""
    folder = options.out / "teacher"
    if not (folder / "model.json").exists():
        recipe = TrainRecipe(
            network=SMALL,
            schedule={"name": "ddpm-linear"},
            steps=options.teacher_steps,
            batch_size=128,
            learning_rate=2e-3,
            precision="float32",
        )
        train(read_images(options.data, size=options.size), folder, recipe, progress=limit)
    return fewstep.load(folder)


def trajectories(
    model: fewstep.Denoiser, options: argparse.Namespace, limit: Limit
) -> fewstep.TrajectoryStore:
    """Returns the trajectories, recorded if they are not there: 9 states, quadratic in time."""
    n = options.trajectories
    fewstep.record(
        model,
        options.out / "quadratic",
        n=n,
        solver=SOLVER,
        nfe=RECORDED,
        keep=8,
        seed=1,
        batch_size=256,
        class_labels=torch.arange(n) % 10,
        progress=limit,
    )
    return fewstep.TrajectoryStore.open(options.out / "quadratic")


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


class Heldout:
    """The held-out trajectories.

    Attributes:
        times: The stored times, the input's first.
        states: The states, (n, 9, 1, H, W).
        cond: The conditions.
        noise: The initial draws.
    """

    def __init__(self, model: fewstep.Denoiser, store: fewstep.TrajectoryStore) -> None:
        read = store.read(list(range(len(store) - HELDOUT, len(store))))
        self.times, self.states = store.times.tolist(), read.states
        self.cond: dict[str, Any] = dict(read.conditions)
        self.noise = self.states[:, 0] / model.schedule.prior_std(self.times[0])

    def frames(self, count: int) -> list[int]:
        """Returns the numbers of so many stored states, spread evenly, the sample's last."""
        most = len(self.times) - 1
        return [round(k * most / count) for k in range(1, count + 1)]


def alone(model: fewstep.Denoiser, store: fewstep.TrajectoryStore) -> dict[str, float]:
    """Returns the errors of the solver alone, by its evaluations."""
    held = Heldout(model, store)
    found = {}
    for nfe in range(1, 2 * max(AFTER) + 2):
        samples = fewstep.sample(model, noise=held.noise, solver=SOLVER, nfe=nfe, **held.cond)
        found[str(nfe)] = errors(samples[:, None], held.states[:, -1:])[0]
    return found


def recipe_of(name: str, seed: int, frames: int) -> DistillRecipe:
    """Returns the recipe of a student."""
    change, cost = CELLS[name]
    return DistillRecipe(
        steps=frames // BATCH,
        batch_size=int(BATCH / cost),
        learning_rate=1e-3,
        warmup=50,
        decay=0.5,
        ema=0.99,
        heldout=HELDOUT,
        seed=seed,
        **change,
    )


def inputs_of(
    model: fewstep.Denoiser, store: fewstep.TrajectoryStore, recipe: DistillRecipe
) -> dict[str, Any]:
    """Returns what a cell was made from, as a JSON object."""
    made = {"teacher": model.fingerprint(), "trajectories": len(store), **asdict(recipe)}
    return json.loads(json.dumps(made))


def cell(
    name: str,
    model: fewstep.Denoiser,
    store: fewstep.TrajectoryStore,
    run: Path,
    recipe: DistillRecipe,
    limit: Limit,
) -> dict[str, Any]:
    """Trains and measures one student; a finished run is not trained again."""
    student = distill(model, store, run, recipe=recipe, checkpoint_every=256, progress=limit)
    held = Heldout(model, store)
    inputs = inputs_of(model, store, recipe)
    result = {"seed": recipe.seed, "inputs": inputs, **measure(student, held)}
    if name in CONTINUED:
        result["continued"] = went_on(student, model, held)
    return result


def measure(student: OperatorModel, held: Heldout) -> dict[str, Any]:
    """Returns the errors of a student, by its number of frames."""
    operator: Any = student.operator
    result: dict[str, Any] = {
        "parameters": sum(operator.overhead()),
        "flops": flops(operator, {"class_labels": 0}),
        "own": operator.frames,
        "frames": {},
    }
    target = held.states[:, -1]
    assert isinstance(operator, TrajectoryOperator)
    ready = operator.model.prepare(len(target), held.cond)
    own = operator.frames
    for count in COUNTS if own > 1 else (1,):
        index = held.frames(count)
        operator.set_times([held.times[i] for i in index])
        with torch.no_grad():
            states = operator(held.states[:, 0], **ready)
        result["frames"][str(count)] = errors(states, held.states[:, index])
        if count == own:
            given, aim = states[:, -1].flatten(1), target.flatten(1)
            result["frechet"] = metrics.fid(given, aim).value
    return result


def went_on(student: OperatorModel, model: fewstep.Denoiser, held: Heldout) -> dict[str, Any]:
    """Returns the errors of samples when the solver goes on from a frame, by 'M FRAME' and its evaluations."""
    operator: Any = student.operator
    found: dict[str, Any] = {}
    for count in (2, 4):
        operator.set_times([held.times[i] for i in held.frames(count)])
        for frame in range(1, count):
            whole = continued(student, model, frame, solver=SOLVER)
            found[f"{count} {frame}"] = {
                str(after): errors(
                    fewstep.sample(whole, noise=held.noise, nfe=1 + after, **held.cond)[:, None],
                    held.states[:, -1:],
                )[0]
                for after in AFTER
            }
    return found


def errors(states: Tensor, target: Tensor) -> list[float]:
    """Returns the mean squared error of each frame, over the variance of its target."""
    error = (states - target).square().flatten(2).mean((0, 2))
    spread = target - target.mean(0)
    return (error / spread.square().flatten(2).mean((0, 2))).tolist()


def row(name: str, found: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Returns the row of a student in the printed table: its errors by seed."""
    samples = [
        " / ".join(f"{one['frames'][m][-1]:.4f}" for one in found if m in one["frames"])
        for m in (str(count) for count in COUNTS)
    ]
    distance = " / ".join(f"{one['frechet']:.2f}" for one in found if "frechet" in one)
    return (name, f"{found[0]['flops'] / 1e6:.1f} M", *samples, distance)


if __name__ == "__main__":
    main()

"""The networks that defaults and fits are chosen and judged on, and the training of the small ones.

Usage:
    python benchmarks/zoo.py list [--shared ../shared]
    python benchmarks/zoo.py train [--shared ../shared] [--runs zoo-runs] [--slice 240] [NAME...]
    python benchmarks/zoo.py export [--shared ../shared] [--runs zoo-runs] [NAME...]

``train`` trains each small network that is missing in benchmarks/models by its recipe,
recipes/zoo-NAME.json, in turns of ``--slice`` seconds, so that all advance together; a run that was
stopped is resumed by the same command, and a finished one is exported. ``export`` writes what the
unfinished runs have: the moving average of the weights in their last checkpoint. Training took some
15 minutes of one CPU core for each network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.base.files import read_json
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.training.data import ImageData, read_images
from fewstep.training.recipe import TrainRecipe
from fewstep.training.train import export_checkpoint, train

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
RECIPES = HERE.parent / "recipes"
SHARED = HERE.parent.parent / "shared"
"""Where the data and the larger models are: beside the repository."""

SMALL: dict[str, tuple[str, str]] = {
    "eps-cosine": ("fashion-mnist", "eps, cosine table of 300 levels, 14x14 grey, 10 classes"),
    "eps-rough": ("fashion-mnist", "eps, linear, data in [-0.5, 0.5], 28x28 grey, short training"),
    "flow": ("fashion-mnist", "rectified flow, 14x14 grey, 10 classes"),
    "edm": ("cifar10", "EDM's preconditioning and noise levels, 16x16 colour, unconditional"),
    "v-pixels": ("cifar10", "v, continuous VP, 16x16 colour, unconditional"),
}
"""The small networks: the data of each, and what it is."""

MIXTURES = ("mixture-smooth", "mixture-sharp")
LARGE = ("fashion", "cifar10")
GUIDED = ("eps-cosine", "flow")
"""The small networks that are judged with guidance 3 besides 1."""

SCALE = 3.0


@dataclass(frozen=True)
class Entry:
    """A network of the zoo under one guidance.

    Attributes:
        name: Its name; ``NAME+3`` is NAME with guidance 3.
        load: Returns the denoiser, without guidance.
        classes: The number of its classes, or ``None``.
        guidance: The scale of guidance, or ``None``.
    """

    name: str
    load: Callable[[], Denoiser]
    classes: int | None = None
    guidance: float | None = None

    def conditions(self, n: int) -> dict[str, Any]:
        """Returns the conditions of n samples, the classes in turn, and the guidance if any.

        They are keyword arguments of ``fewstep.sample`` and the like.
        """
        if self.classes is None:
            return {}
        labels: dict[str, Any] = {"class_labels": [i % self.classes for i in range(n)]}
        return labels if self.guidance is None else {**labels, "guidance": self.guidance}

    def cost(self) -> float:
        """Returns the cost of one evaluation and sample in GFLOP; an exact mixture costs next to 0."""
        from torch.utils.flop_counter import FlopCounterMode

        denoiser = self.load()
        if self.guidance is not None:
            denoiser = Guided(denoiser, self.guidance)
        assert denoiser.event_shape is not None
        cond = self.conditions(1)
        cond.pop("guidance", None)
        x = torch.zeros(1, *denoiser.event_shape)
        labels = {name: torch.tensor(value) for name, value in cond.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            denoiser.raw(x, torch.full((1,), denoiser.schedule.t_max), **labels)
        return counter.get_total_flops() / 1e9


def zoo(shared: Path = SHARED, *, names: Sequence[str] | None = None) -> list[Entry]:
    """Returns the networks for choosing and judging.

    They are ``fashion`` and ``cifar10`` of ``shared/models`` (left out if that folder is missing), two
    exact mixtures, and the small networks of benchmarks/models that are there, two of them with
    guidance 1 and 3.

    Arguments:
        shared: The folder with ``models`` and ``data``.
        names: The entries wanted; left out, all.

    Raises:
        ValueError: If a wanted entry is not there.
    """
    found: list[Entry] = []
    for name in LARGE:
        if (shared / "models" / name / "model.json").exists():
            found.append(Entry(name, _loader(shared / "models" / name), 10))
    found += [Entry(name, _loader(name)) for name in MIXTURES]
    for name in SMALL:
        if not (MODELS / name / "model.json").exists():
            continue
        classes = read_json(MODELS / name / "model.json", what="model")["network"]["num_classes"]
        load = _loader(MODELS / name)
        if name in GUIDED:
            found.append(Entry(name, load, classes, 1.0))
            found.append(Entry(f"{name}+{SCALE:g}", load, classes, SCALE))
        else:
            found.append(Entry(name, load, classes))
    if names is None:
        return found
    missing = sorted(set(names) - {entry.name for entry in found})
    if missing:
        known = ", ".join(entry.name for entry in found)
        raise ValueError(f"the zoo has no network {missing[0]!r} here; it has {known}")
    return [entry for entry in found if entry.name in names]


def _loader(source: str | Path) -> Callable[[], Denoiser]:
    return lambda: fewstep.load(source)


class Pause(Exception):
    """The turn of a network is over; its checkpoint was just written."""


class Turn:
    """Follows a training run, prints now and then, and ends it at a checkpoint once its time is over."""

    def __init__(self, name: str, seconds: float, every: int) -> None:
        self.name, self.every = name, every
        self.end = time.monotonic() + seconds

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Takes the step at which the run is resumed."""
        self.step, self.total, self.first, self.begin = done, total, done, time.monotonic()

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Counts a step."""
        self.step += amount
        if self.step % self.every:
            return
        speed = (self.step - self.first) / (time.monotonic() - self.begin)
        clock = time.strftime("%H:%M:%S")
        print(
            f"{clock} {self.name} {self.step}/{self.total} {note} {speed:.2f} steps/s", flush=True
        )
        if time.monotonic() > self.end and self.step != self.total:
            raise Pause


def images(name: str, shared: Path, runs: Path, size: int | None) -> ImageData:
    """Returns the images of a small network; CIFAR-10 is unpacked into the folder of the runs once."""
    source = shared / "data" / SMALL[name][0]
    if SMALL[name][0] == "cifar10":
        unpacked = runs / "cifar10.npz"
        if not unpacked.exists():
            runs.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(source / "unpack.py"), str(source), str(runs)]
            subprocess.run(command, check=True)
        source = unpacked
    return read_images(source, size=size)


def recipe_of(name: str) -> TrainRecipe:
    """Returns the training recipe of a small network."""
    return TrainRecipe.from_record(read_json(RECIPES / f"zoo-{name}.json", what="training recipe"))


def train_missing(names: Sequence[str], shared: Path, runs: Path, seconds: float) -> None:
    """Trains the small networks that are missing, in turns; see the usage."""
    data: dict[tuple[str, int | None], ImageData] = {}
    waiting = [name for name in names if not (MODELS / name / "model.json").exists()]
    while waiting:
        for name in list(waiting):
            recipe = recipe_of(name)  # read again each turn: its steps may be changed meanwhile
            key = SMALL[name][0], recipe.size
            if key not in data:
                data[key] = images(name, shared, runs, recipe.size)
            turn = Turn(name, seconds, every=50)
            try:
                train(data[key], runs / name, recipe, checkpoint_every=50, progress=turn)
            except Pause:
                continue
            export_checkpoint(data[key], runs / name, MODELS / name)
            waiting.remove(name)
            print(f"exported {MODELS / name}", flush=True)


def export(names: Sequence[str], shared: Path, runs: Path) -> None:
    """Exports what the runs have, for those networks that are missing."""
    for name in names:
        if (MODELS / name / "model.json").exists():
            continue
        checkpoint = runs / name / "checkpoint.json"
        if not checkpoint.exists():
            print(f"{name}: no checkpoint in {runs / name} yet")
            continue
        data = images(name, shared, runs, recipe_of(name).size)
        export_checkpoint(data, runs / name, MODELS / name)
        print(f"{name}: exported {MODELS / name}")


def main() -> None:
    """Lists, trains or exports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("list", "train", "export"))
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--runs", type=Path, default=Path("zoo-runs"))
    parser.add_argument("--slice", type=float, default=240.0, help="seconds of a turn")
    options = parser.parse_args()
    names = options.names or list(SMALL)
    if unknown := sorted(set(names) - set(SMALL)):
        parser.error(f"there is no small network {unknown[0]!r}; there are {', '.join(SMALL)}")
    if options.what == "list":
        for entry in zoo(options.shared):
            print(f"{entry.name:16} guidance {entry.guidance}  {entry.cost():8.4f} GFLOP")
    elif options.what == "train":
        train_missing(names, options.shared, options.runs, options.slice)
    else:
        export(names, options.shared, options.runs)


if __name__ == "__main__":
    main()

"""The table of ``tune.py``: tuned samplers over the best training-free ones, with intervals.

A cell is one sampler at one budget: the features of its samples, in a file of its own. All cells have the same
noise and labels, so that ratios are paired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import about, print_table
from fewstep.base.files import read_json, read_tensors, write_json, write_tensors
from fewstep.comparison.store import REFERENCE
from fewstep.learned.condition_pool import ConditionPool
from fewstep.learned.judges import random_features
from fewstep.learned.unseen import wavelets
from fewstep.metrics.features import EMBEDDED, Features
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.intervals import Estimate, jackknife
from fewstep.metrics.reference import Reference, unused_images
from fewstep.metrics.statistics import Statistics
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.batches import run_batches
from quality import REFERENCE_NFE, build, gather, labels

SEED, CHUNK, TEACHER = 5000, 50, ("tab3", 40)
OURS = ("profile", "auto")
PEERS = ("diffusers:dpmpp-2m-karras", "diffusers:unipc-2", "diffusers:deis-3")
"""The training-free samplers of which the best is taken by default, in each feature space by itself: those that are
the best in one at some budget of `fashion` in benchmarks/quality.py."""
LIBRARIES = ("diffusers:", "azula:")
"""How the names of peers begin."""
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without start": {"profile": False},
    "without endpoint": {"objective": "perceptual"},
    "without perceptual": {"objective": "endpoint"},
    "with mmd": {"objective": "endpoint+perceptual,mmd"},
    "mmd alone": {"objective": "mmd"},
    "without times": {"family_options": {"times": False}},
    "without shifts": {"family_options": {"shifts": False}},
    "without corrections": {"family": "ld3"},
    "with adversarial": {"objective": "endpoint+perceptual+0.1*adversarial"},
    "with rate 0.02": {"search": {"learning_rate": 2e-2}},
    "with noise": {"family": "gs+noise"},
    "with residual": {"family_options": {"residual": True}},
    "ggdm": {
        "family": "ggdm+pred+time",
        "objective": "mmd",
        "search": {"kernel": "cubic", "steps": 60, "batch_size": 32, "heldout": 500},
    },
    "ggdm with rate 0.001": {
        "family": "ggdm+pred+time",
        "objective": "mmd",
        "search": {
            "kernel": "cubic",
            "steps": 60,
            "batch_size": 32,
            "heldout": 500,
            "learning_rate": 1e-3,
        },
    },
}
"""The default search, and the same without or with one ingredient."""


COMMAND = "python benchmarks/tune.py table --out DIR"
"""What makes the cells; where they lie is of no interest."""


class TimeIsUp(Exception):
    """The seconds are used up; what was begun is resumed by the next run."""


class Deadline:
    """A progress that stops a search when the time is up; its checkpoints remain."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        self.tick()

    def tick(self, amount: int = 1, note: str = "") -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise TimeIsUp


def spaces(data: str, features: Sequence[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns feature extractors with the statistics of real images, by name.

    The first of ``features`` is that of the loss; of `fashion` the second selects candidates. The others are never
    seen by a search.
    """
    named = [Features.load(name) for name in (EMBEDDED if data == "fashion" else features)]
    named += [random_features(shape, seed=2), wavelets(shape)]
    found = {}
    for extract in named:
        if data == "fashion" and extract.name in EMBEDDED:
            known = Reference.load(data, extract).statistics
        elif data == "fashion":
            known = Statistics.of(extract(unused_images(data)).double())
        else:
            known = Reference.load(data, extract, size=shape[1]).statistics
        found[Path(extract.name).name] = (extract, known)
    return found


class Shared:
    """A progress that copies the teacher's samples of another search before they are sampled.

    They are checked, and sampled again if they are of other inputs.
    """

    def __init__(self, deadline: Deadline, out: Path, folder: Path) -> None:
        self.deadline, self.out, self.folder = deadline, out, folder
        self.tick = deadline.tick

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        self.deadline.stage(name, total, done=done)
        if name != "teacher":
            return
        for pairs in sorted(self.out.glob("default.*.search/teacher-*.safetensors")):
            own = self.folder / pairs.name
            if not own.exists():
                own.write_bytes(pairs.read_bytes())


def draw(
    denoiser: Denoiser, sampler: Any, n: int, looked: dict[str, Any], deadline: Deadline
) -> dict[str, Tensor]:
    """Returns the features of n samples in each space."""
    made = sampler.build(denoiser) if isinstance(sampler, fewstep.SamplerRecipe) else sampler
    pool = ConditionPool.of(denoiser, {"class_labels": labels(range(10))})
    parts: dict[str, list[Tensor]] = {name: [] for name in looked}
    for _, part in run_batches(made, n, seed=SEED, conditions=pool, batch_size=CHUNK):
        for name, (extract, _) in looked.items():
            parts[name].append(extract(part.x.float()))
        deadline.tick()
    return {name: torch.cat(each) for name, each in parts.items()}


def stored(samples: Path, name: str, nfe: int, n: int, fingerprint: str) -> Tensor | None:
    """Returns the first n samples of a cell of benchmarks/quality.py, which have the same noise and labels."""
    found = gather(name, nfe, samples, fingerprint, n)
    return None if found is None else found[0][:n]


def table(
    model: str,
    data: str,
    features: Sequence[str],
    out: Path,
    budgets: Sequence[int],
    variants: Sequence[str],
    *,
    name: str,
    free: Sequence[str],
    samples: Path | None,
    n: int,
    search: dict[str, Any],
    seconds: float | None,
) -> None:
    """Draws the cells that are missing, until the time is up."""
    denoiser, deadline = fewstep.load(model, device="cpu"), Deadline(seconds)
    assert denoiser.event_shape is not None
    looked = spaces(data, features, tuple(denoiser.event_shape))
    second = ("selected with",) if data == "fashion" else ("unseen",)
    roles = ["trained on", *second, *["unseen"] * (len(looked) - 2)]
    write_json(out / "about.json", {"model": name, "data": Path(data).name, "n": n,
                                    "search": search, "features": list(looked), "roles": roles})  # fmt: skip
    known = {name: {"mean": s.mean, "covariance": s.covariance} for name, (_, s) in looked.items()}
    write_tensors(
        out / "real.safetensors",
        {f"{name}.{key}": value for name, each in known.items() for key, value in each.items()},
    )

    def cell(name: str, nfe: int, make: Callable[[], Any], drawn: str = "") -> None:
        file = out / f"{name.replace(':', '_')}.{nfe}.safetensors"
        if samples is not None and drawn and not file.exists():
            x = stored(samples, drawn, nfe, n, denoiser.fingerprint())
            if x is not None:
                with torch.no_grad():
                    write_tensors(file, {key: extract(x) for key, (extract, _) in looked.items()})
        if not file.exists():
            begun = time.process_time()
            try:
                sampler = make()
            except (ImportError, ValueError) as error:
                print(f"{name} {nfe}: {error}"[:150], flush=True)
                return
            write_tensors(file, draw(denoiser, sampler, n, looked, deadline))
            print(name, nfe, f"{time.process_time() - begun:.0f} CPU s", flush=True)

    def tuned(name: str, nfe: int) -> fewstep.SamplerRecipe:
        given = {**VARIANTS[name]}
        own = fewstep.load(model, device="cpu")
        if given.pop("profile", True) is False:
            own.profile = None
        file = out / f"{name.replace(' ', '-')}.{nfe}.json"
        begun = time.process_time()
        if not file.exists():
            options = {
                "data": data,
                "features": None if data == "fashion" else features[0],
                **given,
            }
            options["search"] = {**search, **given.get("search", {})}
            shared = Shared(deadline, out, file.with_suffix(".search"))
            made = fewstep.tune(
                own, nfe=nfe, out=file, keep_worse=True, progress=shared, **options
            )  # fmt: skip
            print(name, nfe, made.verdict.sentence[:400], flush=True)
            write_json(file.with_suffix(".cpu"), {"seconds": time.process_time() - begun})
        return fewstep.SamplerRecipe.load(file)

    try:
        many = TEACHER[1] if samples is None else REFERENCE_NFE
        cell("teacher", many, lambda: build(TEACHER[0], denoiser, many), REFERENCE)
        for nfe in budgets:  # the first result after a few minutes
            for name in free:
                make = lambda name=name, k=nfe: build(name, denoiser, k)  # noqa: E731
                cell(f"free {name}", nfe, make, name)
            if "default" in variants:
                cell("default", nfe, lambda k=nfe: tuned("default", k))
        for nfe in budgets:
            for name in variants:
                cell(name, nfe, lambda name=name, k=nfe: tuned(name, k))
    except TimeIsUp:
        print("the time is up; the same command goes on", flush=True)


def ratio(a: Tensor, b: Tensor, real: Statistics, teacher: Tensor | None = None) -> Estimate:
    """Returns FID of a over that of b, paired; with a teacher the ratio of what is above its FID.

    FID of n samples is biased upwards alike for all, which draws ratios towards 1.
    """
    sides = [side.double() for side in (a, b, *(() if teacher is None else (teacher,)))]

    def statistic(i: Tensor, _: Tensor) -> Tensor:
        values = [frechet_distance(Statistics.of(side[i]), real) for side in sides]
        least = values[2] if teacher is not None else 0.0
        return ((values[0] - least) / (values[1] - least))[None]

    return jackknife(statistic, (len(a), real.n), fixed=(False, True), blocks=10)[0]


def show(out: Path, write: Path | None, mixtures: Path | None = None) -> None:
    """Prints the table of the cells that there are."""
    settings = read_json(out / "about.json")
    stored = read_tensors(out / "real.safetensors")
    cells: dict[tuple[str, int], dict[str, Tensor]] = {}
    for file in sorted(out.glob("*.*.safetensors")):
        name, nfe = file.name.removesuffix(".safetensors").rsplit(".", 1)
        if nfe.isdigit():
            cells[name, int(nfe)] = read_tensors(file)
    teacher = next((each for (name, _), each in cells.items() if name == "teacher"), None)
    command = f"{COMMAND} --name {settings['model']}, then ratios"
    result: dict[str, Any] = {"about": about(command=command), **settings, "cells": {}, "free": {}}
    roles = dict(zip(settings["features"], settings["roles"], strict=True))
    print(
        f"{settings['model']}: {settings['n']} samples of seed {SEED}, FID against all real images\n"
    )
    for space in settings["features"]:
        real = Statistics(stored[f"{space}.mean"], stored[f"{space}.covariance"], 10**6)

        def value(
            features: dict[str, Tensor], real: Statistics = real, space: str = space
        ) -> float:
            return float(frechet_distance(Statistics.of(features[space].double()), real))

        rows = []
        for nfe in sorted({k for name, k in cells if name != "teacher"}):
            free = {
                n: each for (n, k), each in cells.items() if k == nfe and n.startswith("free ")
            }
            if not free:
                continue
            for n, each in free.items():
                result["free"].setdefault(f"{n[5:]} {nfe}", {})[space] = value(each)
            best = min(free, key=lambda n: value(free[n]))
            peer = min((n for n in free if is_peer(n[5:])), key=lambda n: value(free[n]))
            for (name, k), each in cells.items():
                if k != nfe or name.startswith("free "):
                    continue
                over = [ratio(each[space], free[n][space], real) for n in (peer, best)]
                strides = [n for n in free if n.startswith("free ddim")]
                plain = min(strides, key=lambda n: value(free[n]), default=None)
                above = None
                if teacher is not None:
                    above = ratio(each[space], free[best][space], real, teacher[space])
                rows.append(
                    [nfe, name, f"{value(each):.3g}", f"{value(free[peer]):.3g} {peer[5:]}", _text(over[0]),
                     f"{value(free[best]):.3g} {best[5:]}", _text(over[1]), "" if above is None else _text(above)]
                )  # fmt: skip
                result["cells"].setdefault(f"{name} {nfe}", {})[space] = {
                    "FID": value(each), "peer": peer[5:], "peer FID": value(free[peer]),
                    "best": best[5:], "best FID": value(free[best]),
                    "teacher FID": None if teacher is None else value(teacher),
                    "over the peer": _record(over[0]), "over the best": _record(over[1]),
                    "excess": None if above is None else _record(above),
                }  # fmt: skip
                if plain is not None:
                    result["cells"][f"{name} {nfe}"][space] |= {
                        "DDIM": plain[5:],
                        "DDIM FID": value(free[plain]),
                        "over DDIM": _record(ratio(each[space], free[plain][space], real)),
                    }
        least = "" if teacher is None else f"; teacher {value(teacher):.3g}"
        print(f"{space} ({roles[space]}){least}\n")
        print_table(
            ["K", "search", "FID", "best peer", "ratio", "best training-free", "ratio",
             "ratio above the teacher"], rows,
        )  # fmt: skip
    for file in sorted(out.glob("*.json")):
        if file.name != "about.json":
            made = read_json(file)["about"]
            name, _, nfe = file.stem.rpartition(".")
            cell = result["cells"].setdefault(f"{name.replace('-', ' ')} {nfe}", {})
            cell["verdict"], cell["start"] = made["verdict"], made["base"]["origin"]
            cell |= {key: made[key] for key in ("share", "learning_rates") if key in made}
            if (seconds := file.with_suffix(".cpu")).exists():
                cell["CPU seconds"] = read_json(seconds)["seconds"]
    if mixtures is not None:
        cells_of = sorted(mixtures.glob("ingredients.*.json"))
        result["mixture"] = {
            file.name.removeprefix("ingredients.").removesuffix(".json"): read_json(file)
            for file in cells_of
        }
    if write is not None:
        write_json(write, rounded(result))


def is_peer(name: str) -> bool:
    """Whether a training-free sampler is of another library; in files a colon is an underscore."""
    return name.replace("_", ":", 1).startswith(LIBRARIES)


def rounded(value: Any) -> Any:
    """Returns numbers with five digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _record(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]

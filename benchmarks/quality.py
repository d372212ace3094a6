"""Quality at equal numbers of evaluations: every solver of ours and the peers', in one comparison.

Usage: python benchmarks/quality.py draw --out DIR [--names tab3,unipc3,...] [--nfe 5,6,8,10,15,20,50]
       python benchmarks/quality.py score --out DIR [--samples 1000]
       python benchmarks/quality.py grow --out DIR --samples N --start DIR [--names ...] [--nfe ...]
       python benchmarks/quality.py picture FILE.png --out DIR --cells "auto 5,diffusers:ddim 5"
       python benchmarks/quality.py show [FILE]
       (with --model FOLDER --data IMAGES --features FOLDER,FOLDER --name NAME: of another model)

A name is that of a solver (``ddim``, or on another grid than its own ``ddim@quadratic``), ``auto``, ``profile``,
``diffusers:NAME`` or ``azula:NAME``. ``draw`` runs `fewstep.comparison` on the embedded model, or another: every sampler and budget from the same noise and the same
labels, cell by cell, in DIR; it can be interrupted and given again, and other names or budgets are added to what is
there. ``grow`` takes over the whole batches of a comparison of fewer samples, whose noise and labels are the same; draw then
adds the rest. ``score`` prints the table of all cells and writes it: FID to the real images in the features of two
classifiers (the first saw clean images, the second noisy and blurred ones) and of a third with random weights, KID and
inception score of the first, with 95 % intervals, and the RMS distance to the reference. ``picture`` draws samples of the same noise, a cell a row, and the reference as the last. ``show`` prints the table of such a file, by default the one in
benchmarks/results. FID depends on the number of samples, so compare within one table only.

The reference is ``tab3`` with 100 evaluations. Libraries end differently, at the schedule's last level (sigma = 0.01) or
at sigma = 0; a sampler is compared with the reference at either end, and the smaller distance counts. FID is compared
in pairs: the same noise and labels, so that the interval of a difference is much narrower than those of its parts;
``tie`` says that the interval of the difference to the best of the column contains 0.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep
from _common import RESULTS, about, say_what_runs
from fewstep.adapters.diffusers.peers import diffusers_sampler
from fewstep.base.files import read_json, read_tensors, write_json
from fewstep.base.progress import Progress
from fewstep.comparison import Cell, Comparison, compare
from fewstep.comparison.scores import less_fid, same_place
from fewstep.comparison.store import STATE, Store
from fewstep.metrics import Estimate, Features, Reference, fid, inception_score
from fewstep.metrics.features import EMBEDDED, FeatureMap
from fewstep.metrics.reference import unused_images
from fewstep.models.denoiser import Denoiser
from fewstep.models.networks.classifier import SmallClassifier
from fewstep.reporting.plots import image_grid
from fewstep.sampling.protocol import Sampler
from fewstep.sampling.sample import sampler

MODEL, SEED, N, CHUNK = "fashion", 5000, 1000, 100
RANDOM_WIDTH = 16
BUDGETS = (5, 6, 8, 10, 15, 20, 50)
REFERENCE, REFERENCE_NFE = "tab3", 100

MEASURED = ("fid", "robust", "random", "kid", "inception", "rms")


@dataclass(frozen=True)
class Subject:
    """What is sampled and what it is compared with.

    Attributes:
        name: The name in the result's file.
        model: An embedded model, or a folder.
        data: The real images: embedded, or a file or folder of images.
        features: Two classifiers as feature extractors: of clean images, of noisy and blurred ones.
    """

    name: str = MODEL
    model: str = MODEL
    data: str = MODEL
    features: tuple[str, str] = EMBEDDED

    def file(self, n: int) -> Path:
        """Returns the file of the scores of n samples."""
        return RESULTS / f"quality-{self.name}-{n}.json"

    def real(self, features: FeatureMap) -> Reference:
        """Returns the statistics of the real images in some features."""
        if not isinstance(features, str) and self.data == MODEL:
            # What is embedded has its features only: the images themselves are needed for others.
            unused = unused_images(self.data)
            return Reference.of(unused, unused, features=features, name=self.data)
        return Reference.load(self.data, features)


def random_features(channels: int) -> Features:
    """Returns an untrained classifier as extractor: features that no training has shaped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallClassifier(in_channels=channels, width=RANDOM_WIDTH)
        for part in network.modules():  # features of the scale of the pixels
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(part.weight)
    network.eval().requires_grad_(False)
    digest = f"random weights, seed 0, {channels} channels, width {RANDOM_WIDTH}"
    return Features(network.features, name="random", sha256=digest, module=network)


DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers:ddim": ("DDIM", {}),
    "diffusers:ddim-trailing": ("DDIM", {"timestep_spacing": "trailing"}),
    "diffusers:deis-2": ("DEIS", {"solver_order": 2}),
    "diffusers:deis-3": ("DEIS", {"solver_order": 3}),
    "diffusers:dpmpp-2m": ("DPMSolver", {"solver_order": 2}),
    "diffusers:dpmpp-2m-karras": ("DPMSolver", {"solver_order": 2, "use_karras_sigmas": True}),
    "diffusers:dpmpp-3m": ("DPMSolver", {"solver_order": 3}),
    "diffusers:dpmpp-3m-karras": ("DPMSolver", {"solver_order": 3, "use_karras_sigmas": True}),
    "diffusers:unipc-2": ("UniPC", {"solver_order": 2}),
    "diffusers:unipc-3": ("UniPC", {"solver_order": 3}),
    "diffusers:heun": ("Heun", {}),
    "diffusers:euler": ("Euler", {}),
    "diffusers:pndm": ("PNDM", {}),
    "diffusers:plms": ("PNDM", {"skip_prk_steps": True}),
    "diffusers:lms": ("LMS", {}),
}
"""The schedulers of diffusers with their options; what is not named is their default."""

FIRST = (
    "auto",
    "profile",
    "unipc3",
    "tab3",
    "ddim",
    "ipndm",
    "dpmpp-2m",
    "dpmpp-3m",
    "unipc2",
    "tab2",
)
"""What is drawn first, if time is short."""


def names() -> list[str]:
    """Returns the samplers that there are, the most telling first."""
    peers = [*DIFFUSERS, *_azula()]
    rest = [n for n, build in fewstep.SOLVERS.items() if n not in FIRST and not build().adaptive]
    return [*FIRST, *peers, *rest]


def _azula() -> list[str]:
    try:
        from _azula import NAMES
    except ImportError:
        return []
    return list(NAMES)


def build(name: str, denoiser: Denoiser, nfe: int) -> Sampler:
    """Returns a sampler by name and budget.

    Raises:
        ValueError: If it cannot meet the budget.
    """
    if name.startswith("azula:"):
        from _azula import AzulaSampler

        return AzulaSampler(name, denoiser, nfe)
    if name in DIFFUSERS:
        kind, options = DIFFUSERS[name]
        return diffusers_sampler(denoiser, kind, nfe, **options)
    if name == "profile":
        return sampler(denoiser, solver="auto", nfe=nfe)
    if name == "auto":  # without the profile that the model brings
        return sampler(denoiser, plan=fewstep.plan("auto", denoiser.schedule, nfe=nfe))
    solver, _, grid = name.partition("@")  # ddim@quadratic: on another grid than its own
    return sampler(denoiser, solver=solver, nfe=nfe, **({"grid": grid} if grid else {}))


def labels(rows: Iterable[int]) -> Tensor:
    """Returns the class of each sample: 0 to 9, over and over."""
    return torch.tensor([i % 10 for i in rows])


def run(
    asked: Sequence[str],
    budgets: Sequence[int],
    folder: Path,
    denoiser: Denoiser,
    n: int,
    subject: Subject | None = None,
    progress: Progress | bool = True,
) -> Comparison:
    """Runs the cells that are missing; the samples of all are stored with them."""
    subject = subject or Subject()
    samplers = {}
    for name in asked:
        reasons = []
        for nfe in budgets:
            try:
                build(name, denoiser, nfe)
            except ValueError as error:
                reasons.append(str(error))
        if len(reasons) < len(budgets):
            samplers[name] = lambda model, nfe, name=name: build(name, model, nfe)
        else:
            print(f"{name}: left out: {reasons[0]}", flush=True)
    return compare(
        denoiser,
        samplers,
        nfe=budgets,
        folder=folder,
        n=n,
        seed=SEED,
        data=subject.real(subject.features[0]),
        metrics=("fid", "kid"),
        reference=REFERENCE,
        reference_nfe=REFERENCE_NFE,
        cond={"class_labels": labels(range(n))},
        batch_size=min(n, CHUNK),
        shown=n,
        progress=progress,
    )


class Begun(Exception):
    """The folder of a comparison has its settings, before the first evaluation."""


class Begin:
    """A progress that ends a comparison as soon as it has begun."""

    def stage(self, name: str, total: int | None = None, *, done: int = 0) -> None:
        """Does nothing."""

    def tick(self, amount: int = 1, note: str = "") -> None:
        """Raises :exc:`Begun`."""
        raise Begun


def grow(start: Path, folder: Path, asked: Sequence[str], budgets: Sequence[int], n: int) -> int:
    """Writes the whole batches of a smaller comparison into a begun one; returns their number.

    Sample i of both has the same noise and labels, and a cell's identity is that of its sampler.
    """
    smaller, larger = Store(start), Store(folder)
    cells = [cell for cell in smaller.all() if cell.name == "reference"]
    cells += [c for c in smaller.all() if c.name in asked and c.nfe in budgets]
    base, count, written = cells[0], min(n, CHUNK), 0
    for cell in cells:
        tensors = smaller.tensors(cell)
        for first in range(0, len(tensors["shown"]) - count + 1, count):
            rows = slice(first, first + count)
            known = smaller.part("reference", base.nfe, base.identity, first)
            reference = read_tensors(known)
            part = {
                "seconds": torch.full((count,), cell.seconds[1], dtype=torch.float64),
                "draws": torch.full((count,), cell.stochastic),
                **{key: tensors[key][rows].contiguous() for key in ("shown", "features")},
            }
            x = part["shown"]
            if cell is base:
                part |= {key: reference[key] for key in ("x", "zero")}
            else:
                ends = [same_place(x, reference[key].to(x.dtype)) for key in ("x", "zero")]
                part["squares"] = torch.stack(ends, 1)
            larger.write_part(larger.part(cell.name, cell.nfe, cell.identity, first), part)
            written += 1
    return written


def gather(
    name: str, nfe: int, folder: Path, fingerprint: str, n: int = N
) -> tuple[Tensor, float] | None:
    """Returns the samples of a cell and the seconds that they took, or ``None`` if it is not there.

    Raises:
        ValueError: If the folder has samples of another model, or no comparison.
    """
    store = Store(folder)
    about = read_json(folder / STATE, what="the state of a comparison")["question"]
    if about["model"] != fingerprint:
        raise ValueError(f"{folder} has samples of another model; give another folder")
    cell = {cell.key: cell for cell in store.all()}.get((name, nfe))
    if cell is None:
        return None
    samples = store.tensors(cell)["shown"]
    return (samples, cell.seconds[1] * len(samples)) if len(samples) >= n else None


def score_record(cell: Cell, more: Mapping[str, Estimate], n: int) -> dict[str, Any]:
    """Returns the scores of a cell as a JSON object."""
    scores = {**cell.scores, **more}
    record: dict[str, Any] = {"name": cell.name, "nfe": cell.nfe, "seconds": cell.seconds[1] * n}
    values = {key: scores[key] for key in MEASURED if key in scores}
    return record | {key: [e.value, e.low, e.high] for key, e in values.items()}


def score(found: Comparison, n: int, subject: Subject) -> dict[str, Any]:
    """Returns all scores, with the differences to the best of each budget in pairs."""
    clean, robust = (subject.real(features) for features in subject.features)
    classifier = Features.load(subject.features[0])
    channels = found.store.tensors(found.reference)["shown"].shape[1]
    untrained = subject.real(random_features(channels))

    def record(cell: Cell) -> dict[str, Any]:
        samples = found.store.tensors(cell)["shown"]
        more = {
            "robust": fid(samples, robust),
            "random": fid(samples, untrained),
            "inception": inception_score(samples, classifier),
        }
        return score_record(cell, more, n)

    rows = []
    for nfe in sorted({cell.nfe for cell in found.cells}):
        column = [cell for cell in found.cells if cell.nfe == nfe]
        column.sort(key=lambda cell: cell.scores["fid"].value)
        features = [found.store.tensors(cell)["features"] for cell in column]
        more = less_fid(features[1:], features[0], clean) if len(column) > 1 else []
        rows.append(record(column[0]) | {"more": [0.0, 0.0, 0.0], "tie": True})
        for cell, e in zip(column[1:], more, strict=True):
            rows.append(record(cell) | {"more": [e.value, e.low, e.high], "tie": e.low <= 0})
    reference = record(found.reference) | {"rms": [0.0, 0.0, 0.0]}
    origin = {"n": n, "seed": SEED, "model": found.question["model"], "name": subject.name}
    return {"about": about(), **origin, "reference": reference, "cells": rows}


def show(scores: Mapping[str, Any]) -> None:
    """Prints the tables of a file of scores, budget by budget, best first."""
    top = scores["reference"]
    fids = ", ".join(f"{key} {top[key][0]:.2f}" for key in ("fid", "robust", "kid"))
    print(
        f"{scores['n']} samples, seed {scores['seed']}; reference, {top['nfe']} evaluations: {fids}\n"
    )
    for nfe in sorted({row["nfe"] for row in scores["cells"]}):
        print(f"{nfe} evaluations")
        print(
            f"  {'sampler':26} {'FID (95 %)':>22} {'more than the best':>24} {'FID, robust':>22}"
            f" {'random':>8} {'RMS':>8} {'KID':>10} {'IS':>6}"
        )
        column = sorted((r for r in scores["cells"] if r["nfe"] == nfe), key=lambda r: r["fid"][0])
        for place, row in enumerate(column):
            (a, b, c), (d, e, f), (g, h, i) = row["fid"], row["more"], row["robust"]
            more = f"{d:.2f} ({e:.2f} to {f:.2f}){' tie' if row['tie'] else ''}"
            print(
                f"  {row['name']:26} {a:7.2f} ({b:5.2f} to {c:5.2f}) {more if place else 'best':>24}"
                f" {g:8.2f} ({h:5.2f} to {i:5.2f}) {row['random'][0]:8.3f} {row['rms'][0]:8.4f}"
                f" {row['kid'][0]:10.3f} {row['inception'][0]:6.2f}"
            )
        print(flush=True)


def picture(file: Path, folder: Path, cells: Sequence[str], columns: int) -> None:
    """Draws the first samples of some cells, a row each, and those of the reference.

    Raises:
        ValueError: If a cell has not been drawn.
    """
    store = Store(folder)
    drawn = {f"{cell.name} {cell.nfe}": cell for cell in store.all()}
    last = f"reference {REFERENCE_NFE}"
    missing = [name for name in (*cells, last) if name not in drawn]
    if missing:
        raise ValueError(f"not drawn yet: {', '.join(missing)}; there are {', '.join(drawn)}")
    rows = [store.tensors(drawn[name])["shown"][:columns] for name in (*cells, last)]
    image_grid(torch.cat(rows), columns=columns, row_labels=[*cells, last]).save(file)


def main() -> None:
    """Draws, scores or shows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("draw", "grow", "score", "picture", "show"))
    parser.add_argument(
        "file", type=Path, nargs="?", default=Subject().file(N), help="for show, picture"
    )
    parser.add_argument("--out", type=Path, help="the folder, for draw and score")
    parser.add_argument(
        "--names", default="", help="samplers, separated by commas; all if left out"
    )
    parser.add_argument("--nfe", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--start", type=Path, help="the folder of a smaller comparison, for grow")
    parser.add_argument("--samples", type=int, default=N)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL, help="an embedded model, or a folder")
    parser.add_argument("--data", default=MODEL, help="its real images")
    parser.add_argument("--features", default=",".join(EMBEDDED), help="two feature extractors")
    parser.add_argument("--cells", default="", help="the rows of a picture, as 'auto 5,ddim 10'")
    parser.add_argument("--columns", type=int, default=16, help="the samples of a row")
    parser.add_argument("--name", default=MODEL, help="the model's name in the result's file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "show":
        show(read_json(arguments.file, what="scores"))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    if arguments.what == "picture":
        cells = arguments.cells.split(",")
        picture(arguments.file, arguments.out, cells, arguments.columns)
        return
    n = arguments.samples
    features = arguments.features.split(",")
    if len(features) != 2:
        parser.error(f"--features takes two extractors, got {len(features)}")
    subject = Subject(arguments.name, arguments.model, arguments.data, (features[0], features[1]))
    what = f"{subject.name}, {n} samples, classes in turn, seed {SEED}."
    say_what_runs(what, ("diffusers", "azula"))
    denoiser = fewstep.load(subject.model)
    asked = [name for name in arguments.names.split(",") if name]
    budgets = [int(k) for k in arguments.nfe.split(",")]
    if arguments.what == "draw":
        run(asked or names(), budgets, arguments.out, denoiser, n, subject)
        return
    if arguments.what == "grow":
        if arguments.start is None:
            parser.error("grow needs --start")
        with contextlib.suppress(Begun):
            run(asked, budgets, arguments.out, denoiser, n, subject, progress=Begin())
        print(f"{grow(arguments.start, arguments.out, asked, budgets, n)} batches taken over")
        return
    # Scored is what was drawn: nothing is run again, and nothing that is missing.
    drawn = dict[str, list[int]]()
    for cell in Store(arguments.out).all():
        if cell.name != "reference" and (not asked or cell.name in asked) and cell.nfe in budgets:
            drawn.setdefault(cell.name, []).append(cell.nfe)
    alike = dict[tuple[int, ...], list[str]]()
    for name, at in drawn.items():
        alike.setdefault(tuple(sorted(at)), []).append(name)
    parts = [run(some, at, arguments.out, denoiser, n, subject) for at, some in alike.items()]
    cells = [cell for part in parts for cell in part.cells]
    scores = score(replace(parts[-1], cells=cells), n, subject)
    show(scores)
    file = subject.file(n)
    write_json(file, scores)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

"""Quality at equal numbers of network calls: every solver of ours and the peers', in one run.

Usage: python benchmarks/quality.py draw --out DIR [--names tab3,unipc3,...] [--nfe 5,6,8,10,15,20,50]
       python benchmarks/quality.py score --out DIR [--samples 2000]

``draw`` makes the samples of each sampler and budget from the same noise and the same labels, and
keeps them in DIR; it can be interrupted, and several may run side by side on the same folder
(each takes what no other has begun). ``score`` prints the table: FID to the real images in the
features of two classifiers (``fashion``, which saw clean images, and ``fashion-robust``, which saw
noisy and blurred ones), KID, with 95 % intervals, and the RMS distance to the reference. With
``--samples 500`` only the first samples of each cell are drawn and scored; FID depends on their
number, so compare within one table only.

The reference is ``tab3`` with 100 calls. Libraries end differently: at the schedule's last level
(sigma = 0.01) or at sigma = 0. So a sampler is compared with the reference at either end, the
latter by one more denoising call, and the smaller distance counts. FID is compared in pairs: the
same noise and labels, so that the interval of a difference is much narrower than those of its
parts; ``tie`` says that the interval of the difference to the best of the column contains 0.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep import metrics
from fewstep.adapters.diffusers.peers import diffusers_sampler
from fewstep.base.files import read_metadata, read_tensors, write_json, write_tensors
from fewstep.diffusion.noise import INITIAL, NoiseSource
from fewstep.metrics import Estimate, Features, Reference, Statistics
from fewstep.metrics.features import EMBEDDED
from fewstep.metrics.intervals import jackknife
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.protocol import Run, Sampler
from fewstep.sampling.sample import sampler

MODEL, SEED, N, CHUNK = "fashion", 5000, 2000, 100
BUDGETS = (5, 6, 8, 10, 15, 20, 50)
REFERENCE, REFERENCE_CALLS = "reference", 100
RECOMMENDED = Path(__file__).parent.parent / "recipes" / "fashion-grid.json"
"""What ``fewstep analyze`` wrote for the model: solvers and times, fitted on other seeds."""


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
    "recommended",
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
    return [REFERENCE, *FIRST, *peers, *rest]


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
    if name == "recommended":
        return sampler(denoiser, solver="auto", grid=f"auto:{RECOMMENDED}", nfe=nfe)
    return sampler(denoiser, solver="tab3" if name == REFERENCE else name, nfe=nfe)


def labels(rows: range) -> Tensor:
    """Returns the class of each sample: 0 to 9, over and over."""
    return torch.tensor([i % 10 for i in rows])


def draw(name: str, nfe: int, folder: Path, denoiser: Denoiser, n: int) -> None:
    """Draws what is missing of one cell, piece by piece."""
    made, fingerprint = build(name, denoiser, nfe), denoiser.fingerprint()
    for start in range(0, n, CHUNK):
        file = folder / f"{name.replace(':', '_')}-{nfe}-{start}.safetensors"
        if file.exists() or not _claim(file):
            continue
        rows = range(start, start + CHUNK)
        source = NoiseSource(SEED, rows)
        assert denoiser.event_shape is not None
        z = source.draw(INITIAL, denoiser.event_shape)
        cond = denoiser.prepare(CHUNK, {"class_labels": labels(rows)})
        begun = time.perf_counter()
        x = made.run(made.start(z), Run(source, cond)).x
        seconds = time.perf_counter() - begun
        about = {"fingerprint": fingerprint, "seconds": f"{seconds:.3f}"}
        write_tensors(file, {"samples": x.contiguous()}, metadata=about)
        _lock(file).unlink()


def _lock(file: Path) -> Path:
    return file.with_suffix(f".{os.uname().nodename}.lock")


def _claim(file: Path) -> bool:
    """Returns whether this process may make a file: nobody else who still lives has claimed it."""
    lock = _lock(file)
    try:
        with lock.open("x") as handle:
            handle.write(str(os.getpid()))
    except FileExistsError:
        owner = lock.read_text() or "0"
        if Path(f"/proc/{owner}").exists():
            return False
        lock.write_text(str(os.getpid()))
    return True


def gather(
    name: str, nfe: int, folder: Path, fingerprint: str, n: int = N
) -> tuple[Tensor, float] | None:
    """Returns the samples of a cell and the seconds that they took, or ``None`` if incomplete."""
    parts, seconds = [], 0.0
    for start in range(0, n, CHUNK):
        file = folder / f"{name.replace(':', '_')}-{nfe}-{start}.safetensors"
        if not file.exists():
            return None
        about = read_metadata(file)
        if about["fingerprint"] != fingerprint:
            raise ValueError(f"{file} was drawn with another model; give another --out")
        parts.append(read_tensors(file)["samples"])
        seconds += float(about["seconds"])
    return torch.cat(parts), seconds


MEASURED = ("fid", "robust", "kid", "rms")


@dataclass(frozen=True)
class Score:
    """What is told of a cell."""

    name: str
    nfe: int
    fid: Estimate
    robust: Estimate
    kid: Estimate
    rms: Estimate
    seconds: float
    features: Tensor

    def to_json(self) -> dict[str, Any]:
        """Returns it without the features."""
        values = {key: getattr(self, key) for key in MEASURED}
        told: dict[str, Any] = {"name": self.name, "nfe": self.nfe, "seconds": self.seconds}
        return told | {key: [e.value, e.low, e.high] for key, e in values.items()}


def score_all(
    asked: list[str], budgets: list[int], folder: Path, denoiser: Denoiser, n: int
) -> None:
    """Prints the tables of what was drawn, and writes them as JSON."""
    print_header(n)
    fingerprint = denoiser.fingerprint()
    real, robust = (Reference.load(MODEL, features) for features in EMBEDDED)
    found = gather(REFERENCE, REFERENCE_CALLS, folder, fingerprint, n)
    if found is None:
        raise SystemExit("the reference is not drawn yet: draw --names reference")
    ends = [found[0], _denoised(denoiser, found[0])]
    scores = []
    for name, nfe in cells(asked, budgets):
        drawn = gather(name, nfe, folder, fingerprint, n)
        if drawn is not None:
            scores.append(_score(name, nfe, *drawn, ends, real, robust))
    top = max((s for s in scores if s.name == REFERENCE), key=lambda s: s.nfe)
    print(f"reference, {top.nfe} calls: FID {top.fid}, robust {top.robust}, KID {top.kid}\n")
    rows = []
    for nfe in budgets:
        column = [s for s in scores if s.nfe == nfe and s.name != REFERENCE]
        rows += _column(nfe, column, real)
    file = folder / ("quality.json" if n == N else f"quality-{n}.json")
    write_json(
        file,
        {"n": n, "seed": SEED, "model": fingerprint, "reference": top.to_json(), "cells": rows},
    )
    print(f"wrote {file}")


def _score(
    name: str,
    nfe: int,
    x: Tensor,
    seconds: float,
    ends: list[Tensor],
    real: Reference,
    robust: Reference,
) -> Score:
    look = real.extractor
    assert isinstance(look, Features)
    features = look(x)
    rms = min((metrics.rms(x, end) for end in ends), key=float)
    fid, kid = metrics.fid(features, real), metrics.kid(features, real)
    return Score(name, nfe, fid, metrics.fid(x, robust), kid, rms, seconds, features)


def _denoised(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Returns the data that the model sees in states at the last level."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(x), CHUNK):
            rows = range(start, start + CHUNK)
            t, cond = denoiser.schedule.t_min, {"class_labels": labels(rows)}
            parts.append(denoiser(x[start : rows.stop], t, prediction="x0", **cond))
    return torch.cat(parts)


def _column(nfe: int, column: list[Score], real: Reference) -> list[dict[str, Any]]:
    """Prints one budget, best first; returns its rows."""
    if not column:
        return []
    column = sorted(column, key=lambda s: s.fid.value)
    best = column[0]
    print(f"{nfe} calls")
    print(
        f"  {'sampler':26} {'FID (95 %)':>22} {'more than the best':>24} {'FID, robust':>22}"
        f" {'RMS':>8} {'KID':>10}"
    )
    rows = []
    for score in column:
        more = _difference(score, best, real)
        tie = score is best or more.low <= 0
        told = "best" if score is best else f"{more.value:.2f} ({more.low:.2f} to {more.high:.2f})"
        print(
            f"  {score.name:26} {score.fid.value:7.2f} ({score.fid.low:5.2f} to {score.fid.high:5.2f})"
            f" {told + (' tie' if tie and score is not best else ''):>24}"
            f" {score.robust.value:8.2f} ({score.robust.low:5.2f} to {score.robust.high:5.2f})"
            f" {score.rms.value:8.4f} {score.kid.value:10.3f}"
        )
        rows.append(score.to_json() | {"more": [more.value, more.low, more.high], "tie": tie})
    print(flush=True)
    return rows


def _difference(score: Score, best: Score, real: Reference) -> Estimate:
    """Returns how much larger the FID is than that of the best, in pairs."""
    if score is best:
        return Estimate(0.0, 0.0, 0.0, 0.95, "itself", (0, 0))

    def statistic(i: Tensor, _: Tensor) -> Tensor:
        sides = (Statistics.of(s.features[i].double()) for s in (score, best))
        a, b = (metrics.frechet_distance(side, real.statistics) for side in sides)
        return (a - b)[None]

    sizes = (len(score.features), real.statistics.n)
    return jackknife(statistic, sizes, fixed=(False, True))[0]


def cells(asked: list[str], budgets: list[int]) -> list[tuple[str, int]]:
    """Returns samplers with budgets, budget by budget; the reference comes first."""
    first = [(REFERENCE, REFERENCE_CALLS)] if REFERENCE in asked else []
    return first + [(name, nfe) for nfe in budgets for name in asked if name != REFERENCE]


def draw_all(
    asked: list[str], budgets: list[int], folder: Path, denoiser: Denoiser, n: int
) -> None:
    """Draws what is missing."""
    for name, nfe in cells(asked, budgets):
        begun = time.perf_counter()
        try:
            draw(name, nfe, folder, denoiser, n)
            told = f"done in {time.perf_counter() - begun:.0f} s"
        except ValueError as error:
            told = f"left out: {error}"
        print(f"{name} {nfe}: {told}", flush=True)


def print_header(n: int) -> None:
    """Says what is run."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "diffusers", "azula"))
    print(
        f"{date.today()}, fewstep {fewstep.__version__}, {versions}; {MODEL}, {n} samples,",
        end=" ",
    )
    print(f"classes in turn, seed {SEED}\n")


def main() -> None:
    """Draws or scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("draw", "score"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--names", default="", help="samplers, separated by commas; all if left out"
    )
    parser.add_argument("--nfe", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--samples", type=int, default=N, help=f"a multiple of {CHUNK}")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = [n for n in arguments.names.split(",") if n] or names()
    budgets = [int(k) for k in arguments.nfe.split(",")]
    job = {"draw": draw_all, "score": score_all}[arguments.what]
    job(asked, budgets, arguments.out, fewstep.load(MODEL), arguments.samples)


if __name__ == "__main__":
    main()

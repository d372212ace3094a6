"""Regret of what fewstep takes by itself, on every network of the zoo: ``auto``, a measured profile, own default grids.

Usage: python benchmarks/defaults.py measure [--networks flow,edm] [--only auto,ddim]; python benchmarks/defaults.py show

``measure`` runs one network after the other (a cell that is in the result file is not run again) and writes
``benchmarks/results/defaults.json``; ``show`` prints the tables from it and exits with 1 where a claim does not hold;
``make results`` puts them into docs/choosing.md.

Errors are root mean squares over samples and coordinates to the model's own many-step solution (tab3, 257
evaluations) from the same noise. Seeds: 0 for the profile, 5000 for choosing the defaults, 9000 for everything that is judged. A peer is a scheduler of
diffusers by its own steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from _common import print_table, rms, say_what_runs
from fewstep.adapters.diffusers.peers import diffusers_sampler
from fewstep.base.files import read_json, write_json
from fewstep.diffusion.noise import NoiseSource
from fewstep.models.conditions import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.sampling.protocol import Run
from fewstep.studies.reference import draw_noise, follow
from zoo import SHARED, Entry, zoo

RESULTS = Path(__file__).parent / "results" / "defaults.json"
SEED, JUDGED = 0, 9000
BUDGETS = (5, 6, 8, 10, 15, 20)

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIM", {}),
    "DEIS-2": ("DEISMultistep", {"solver_order": 2}),
    "DEIS-3": ("DEISMultistep", {"solver_order": 3}),
    "DPM++2M": ("DPMSolverMultistep", {}),
    "DPM++2M Karras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "UniPC-2": ("UniPCMultistep", {}),
    "UniPC-3": ("UniPCMultistep", {"solver_order": 3}),
}
TWINS = {
    "ddim": "DDIM",
    "logrhoab1": "DEIS-2",
    "logrhoab2": "DEIS-3",
    "dpmpp-2m": "DPM++2M",
    "unipc2": "UniPC-2",
    "unipc3": "UniPC-3",
}
"""The same method in diffusers at its defaults."""

NAMED = ("tab3", "ipndm", *TWINS)
GRIDS = ("uniform", "logistic")
PROFILE_LIMITS = {5: (0.8, 0.9), 10: (0.6, 0.75), 20: (0.35, 0.5)}
"""For each budget the most that a profile may have of the best peer: in the geometric mean, and anywhere."""


def samples_of(name: str) -> int:
    """Returns how many samples a network is judged on.

    A few samples near the border of two basins of attraction make most of the error of a flow under
    guidance: of 24 there are one or two.
    """
    many = {"mixture-smooth": 4096, "mixture-sharp": 4096, "flow": 256, "flow+3": 128}
    return {"cifar10": 8, "fashion": 32, "eps-rough": 192, **many}.get(name, 48)


def peer(model: Denoiser, name: str, nfe: int, noise: Tensor, cond: dict[str, Any]) -> Tensor:
    """Returns the samples of a scheduler of diffusers."""
    kind, options = PEERS[name]
    made = diffusers_sampler(model, kind, nfe, **options)
    return made.run(made.start(noise), Run(NoiseSource(JUDGED, range(len(noise))), cond)).x


def measure(entry: Entry, found: dict[str, Any], only: frozenset[str]) -> None:
    """Measures a network; with ``only`` those solvers again, and the rest stays."""
    base, n = entry.load(), samples_of(entry.name)
    given = entry.conditions(n)
    given.pop("guidance", None)
    scale = entry.guidance if entry.guidance not in (None, 1.0) else None
    model = base if scale is None else Guided(base, scale)
    noise, cond = draw_noise(model, n, JUDGED), Conditions.of(model, n, given).at(range(n))
    profile_given = entry.conditions(16)
    profile_given.pop("guidance", None)
    base.profile = None  # auto is the static default here
    fine = 64 if entry.name == "cifar10" else 128
    end = follow(model, noise, cond, intervals=fine).end
    if only:
        old = found[entry.name]
        if old["samples"] != n:
            raise SystemExit(f"{entry.name} was measured on {old['samples']} samples, not {n}")
        if "profile" in only:
            profile = fewstep.fit(base, seed=SEED, guidance=scale, **profile_given)
            old["evaluations"] = profile.about["evaluations"]
            old["chosen"] = {str(row["nfe"]): row["solver"] for row in profile.table()}
            for nfe in BUDGETS:
                x = fewstep.sample(
                    base, noise=noise, guidance=scale, nfe=nfe, profile=profile, **given
                )
                old["errors"][f"{nfe} profile"] = rms(x - end)
        for key in old["errors"]:
            nfe, solver, *grid = key.replace("@", " ").split()
            if solver in only and solver != "profile":
                options = {"grid": grid[0]} if grid else {}
                x = fewstep.sample(
                    base,
                    noise=noise,
                    guidance=scale,
                    nfe=int(nfe),
                    solver=solver,
                    **options,
                    **given,
                )
                old["errors"][key] = rms(x - end)
        return
    began = time.monotonic()
    profile = fewstep.fit(base, seed=SEED, guidance=scale, **profile_given)
    seconds = time.monotonic() - began
    errors: dict[str, float] = {}

    def sampled(**options: Any) -> float:
        x = fewstep.sample(base, noise=noise, guidance=scale, **options, **given)
        return rms(x - end)

    for nfe in BUDGETS:
        errors[f"{nfe} auto"] = sampled(nfe=nfe)
        errors[f"{nfe} profile"] = sampled(nfe=nfe, profile=profile)
        for name in PEERS:
            try:
                errors[f"{nfe} {name}"] = rms(peer(model, name, nfe, noise, cond) - end)
            except (ValueError, IndexError) as error:  # the scheduler's own, on few levels
                print(f"  {entry.name}, {name} at {nfe}: {error}")
        for solver in NAMED:
            errors[f"{nfe} {solver}"] = sampled(nfe=nfe, solver=solver)
            # The largest network is run on own grids only, for time.
            for grid in GRIDS if nfe in PROFILE_LIMITS and entry.name != "cifar10" else ():
                errors[f"{nfe} {solver}@{grid}"] = sampled(nfe=nfe, solver=solver, grid=grid)
    found[entry.name] = {
        "samples": n,
        "evaluations": profile.about["evaluations"],
        "seconds": round(seconds, 1),
        "errors": errors,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "chosen": {str(row["nfe"]): row["solver"] for row in profile.table()},
    }


def best_peer(errors: dict[str, float], nfe: int) -> tuple[float, str]:
    """Returns the least error of a peer, and which it is."""
    there = [(errors[f"{nfe} {name}"], name) for name in PEERS if f"{nfe} {name}" in errors]
    return min(there)


def mean(values: list[float]) -> float:
    """Returns the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def show(found: dict[str, Any]) -> bool:
    """Prints the tables; returns whether all claims hold."""
    print(
        "Share of the best peer's error: auto without a measurement / with the model's profile.\n"
    )
    rows, shares = [], {(who, k): list[float]() for who in ("auto", "profile") for k in BUDGETS}
    for name, entry in found.items():
        row = [name, entry["samples"], entry["evaluations"], entry["seconds"]]
        for nfe in BUDGETS:
            least, who = best_peer(entry["errors"], nfe)
            pair = [entry["errors"][f"{nfe} {w}"] / least for w in ("auto", "profile")]
            for w, value in zip(("auto", "profile"), pair, strict=True):
                shares[w, nfe].append(value)
            row.append(f"{pair[0]:.2f} / {pair[1]:.2f} ({who} {least:.4f})")
        rows.append(row)
    means = [f"{mean(shares['auto', k]):.2f} / {mean(shares['profile', k]):.2f}" for k in BUDGETS]
    rows.append(["geometric mean", "", "", "", *means])
    head = ["network", "samples", "evaluations of fit", "seconds", *map(str, BUDGETS)]
    print_table(head, rows)
    claims: list[tuple[str, bool, str]] = []
    cells = [value for k in BUDGETS for value in shares["auto", k]]
    worst, share = max(cells), sum(v <= 1 for v in cells) / len(cells)
    claims.append(
        ("auto is nowhere worse than 1.1 of the best peer", worst <= 1.1, f"{worst:.2f}")
    )
    claims.append(("auto is at or below it on four cells of five", share >= 0.8, f"{share:.2f}"))
    for nfe, (typical, limit) in PROFILE_LIMITS.items():
        values = shares["profile", nfe]
        text = f"a profile at {nfe}: at most {typical} in the mean, {limit} anywhere"
        held = mean(values) <= typical and max(values) <= limit
        claims.append((text, held, f"{mean(values):.2f}, {max(values):.2f}"))
    over = []
    for name, entry in found.items():
        for nfe in PROFILE_LIMITS:
            pairs = [name for s in NAMED for name in (s, *(f"{s}@{grid}" for grid in GRIDS))]
            own = [v for p in pairs if (v := entry["errors"].get(f"{nfe} {p}")) is not None]
            over.append((entry["errors"][f"{nfe} profile"] / min(own), f"{name} at {nfe}"))
    claims.append(
        (
            "a profile is never above the best named pair by more than 3 %",
            max(over)[0] <= 1.03,
            f"{max(over)[0]:.2f} ({max(over)[1]})",
        )
    )
    print("Own default grids: error over that of the same method in diffusers at its defaults.\n")
    rows, ratios = [], []
    for solver, twin in TWINS.items():
        row = [solver, twin]
        for name, entry in found.items():
            errors = entry["errors"]
            cell = []
            for nfe in PROFILE_LIMITS:
                if f"{nfe} {twin}" in errors:
                    ratio = errors[f"{nfe} {solver}"] / errors[f"{nfe} {twin}"]
                    ratios.append((ratio, f"{solver} on {name} at {nfe}"))
                    cell.append(f"{ratio:.2f}")
            row.append(" ".join(cell))
        rows.append(row)
    print_table(["solver", "in diffusers", *found], rows)
    worst_ratio = max(ratios)
    claims.append(
        (
            "own default grids: at most 1.1 of the same method in diffusers",
            worst_ratio[0] <= 1.1,
            f"{worst_ratio[0]:.2f} ({worst_ratio[1]})",
        )
    )
    print_table(
        ["claim", "holds", "measured"],
        [[text, "yes" if held else "NO", figure] for text, held, figure in claims],
    )
    return all(held for _, held, _ in claims)


def main() -> None:
    """Measures or shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "show"])
    parser.add_argument("--networks", default="")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--again", action="store_true", help="measure what is there again")
    parser.add_argument("--only", default="", help="of what is there, these solvers again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    say_what_runs("Regret of the defaults on the zoo.", ["diffusers"])
    found: dict[str, Any] = read_json(RESULTS, what="results") if RESULTS.exists() else {}
    found.pop("content_sha256", None)
    if options.what == "measure":
        names = [name for name in options.networks.split(",") if name]
        for entry in zoo(options.shared, names=names or None):
            only = frozenset(filter(None, options.only.split(",")))
            if options.again or only or entry.name not in found:
                print(entry.name, flush=True)
                measure(entry, found, only)
                write_json(RESULTS, found)
    sys.exit(0 if show(found) else 1)


if __name__ == "__main__":
    main()

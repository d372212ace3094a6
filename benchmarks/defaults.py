"""Which solver, grid and head start is best at which budget: the measurement behind ``auto``.

Usage: python benchmarks/defaults.py [--model fashion] [-n 64] [--nfe 5,6,8,10,15,20] [--seed 1000]

For each budget it prints the combinations with the smallest RMS distance to a 200-call reference
from the same noise. Seeds are not those of the tests or the demo.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json

import torch

from _common import Setting
from fewstep.sampling.auto import choose

SOLVERS = (
    "ddim",
    "tab1",
    "tab2",
    "tab3",
    "rhoab1",
    "rhoab2",
    "logrhoab1",
    "logrhoab2",
    "ipndm",
    "accelerated-ddim",
    "dpmpp-2m",
    "dpmpp-3m",
    "unipc2",
    "unipc3",
    "rho-midpoint",
    "dpm2",
    "heun",
)
GRIDS: tuple[tuple[str, dict[str, float]], ...] = (
    ("uniform", {}),
    ("quadratic", {}),
    ("power", {"power": 1.5}),
    ("log-rho", {}),
    ("karras", {}),
    ("karras", {"rho": 4.0}),
    ("karras", {"rho": 12.0}),
)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--nfe", default="5,6,8,10,15,20")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--starts", default="", help="head starts, times separated by commas")
    parser.add_argument("--ends", default="", help="last times, separated by commas")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--out", default="")
    options = parser.parse_args()

    setting = Setting.of(options.model, options.n, options.seed)
    reference = setting.reference()
    print(
        f"{options.model}, {options.n} samples, seed {options.seed}, "
        f"{datetime.date.today()}, torch {torch.__version__}"
    )
    starts = [None, *(float(t) for t in options.starts.split(",") if t)]
    ends = [None, *(float(t) for t in options.ends.split(",") if t)]
    found = []
    for nfe in (int(k) for k in options.nfe.split(",")):
        rows = []
        for name, (grid, extra), start, end, zero in itertools.product(
            SOLVERS, GRIDS, starts, ends, (False, True)
        ):
            settings = {**extra, "to_zero": zero} | ({"t_end": end} if end is not None else {})
            try:
                x = setting.sample(
                    solver=name, nfe=nfe, grid=grid, head_start=start, options=settings
                )
            except ValueError:  # the budget cannot be met by this method
                continue
            error = float((x - reference).square().mean().sqrt())
            rows.append((error, name, grid, settings, start))
        rows.sort(key=lambda row: row[0])
        for row in rows[: options.top]:
            print(nfe, f"{row[0]:.4f}", *row[1:], flush=True)
        found += [(nfe, *row) for row in rows]
        x = setting.sample(solver="auto", nfe=nfe)
        error = float((x - reference).square().mean().sqrt())
        print(nfe, f"{error:.4f}", "auto:", choose(setting.denoiser.schedule, nfe), flush=True)
    if options.out:
        with open(options.out, "w") as stream:
            json.dump(found, stream)


if __name__ == "__main__":
    main()

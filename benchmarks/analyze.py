"""What `fewstep analyze` recommends beside the best named grids, on seeds that it has not seen.

Usage: fewstep analyze fashion --data IMAGES --out DIR
       python benchmarks/analyze.py [DIR/grid.json] [-n 64] [--nfe 5,6,8,10,15,20] [--seed 9000] [--cells FOLDER]

It prints the RMS distance to a 200-call reference (tab2, log-rho) from the same noise with 95 %
intervals, and beside the recommended sampler's the difference to the better of the two others in
pairs (the same samples). Without a file only the others are measured. Cells are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from _common import Setting
from fewstep.base.files import read_tensors, sha256, write_tensors
from fewstep.metrics.intervals import jackknife
from fewstep.sampling.profile import Profile

OTHERS = ("unipc3", "tab3")
"""The best on the power grid with power 1.5, which was the best named one."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="?", default="")
    parser.add_argument("--model", default="fashion")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--nfe", default="5,6,8,10,15,20")
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--cells", default="")
    options = parser.parse_args()

    setting = Setting.of(options.model, options.n, options.seed)
    cells = _Cells(options.cells, f"{options.model}-{options.seed}-{options.n}")
    reference = cells.get("reference", setting.reference)
    print(
        f"{options.model}, {options.n} samples, seed {options.seed}, {datetime.date.today()}, "
        f"torch {torch.__version__}"
    )
    print("NFE  " + "  ".join(f"{name}, power 1.5".ljust(26) for name in OTHERS) + "  recommended")
    mark = sha256(options.grids)[:12] if options.grids else ""
    found = Profile.load(options.grids) if options.grids else None
    for nfe in (int(k) for k in options.nfe.split(",")):
        errors = []
        for name in OTHERS:

            def run(name: str = name, nfe: int = nfe) -> Tensor:
                return setting.sample(solver=name, nfe=nfe, grid="power", options={"power": 1.5})

            errors.append(_squares(cells.get(f"{name}-{nfe}", run), reference))
        line = f"{nfe:<5}" + "  ".join(_rms(e).ljust(26) for e in errors)
        if found is not None:

            def ours(nfe: int = nfe) -> Tensor:
                return setting.sample(nfe=nfe, grid=f"auto:{options.grids}")

            mine = _squares(cells.get(f"recommended-{mark}-{nfe}", ours), reference)
            rival = min(errors, key=lambda e: float(e.mean()))
            line += f"  {found.solver_for(nfe)}: {_rms(mine)}; {_change(mine, rival)}"
        print(line, flush=True)


class _Cells:
    """Samples that were drawn before."""

    def __init__(self, folder: str, prefix: str) -> None:
        self.folder, self.prefix = Path(folder) if folder else None, prefix

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        file = self.folder / f"{self.prefix}-{name}.safetensors" if self.folder else None
        if file is not None and file.exists():
            return read_tensors(file)["samples"]
        samples = make()
        if file is not None:
            write_tensors(file, {"samples": samples})
        return samples


def _squares(x: Tensor, reference: Tensor) -> Tensor:
    return (x - reference).double().flatten(1).square().mean(1)


def _rms(squares: Tensor) -> str:
    (found,) = jackknife(
        lambda kept, _: squares[kept].mean().sqrt()[None], (len(squares), len(squares))
    )
    middle = float(squares.median().sqrt())
    return f"{found.value:.4f} ± {found.value - found.low:.4f} (median {middle:.4f})"


def _change(mine: Tensor, rival: Tensor) -> str:
    (found,) = jackknife(
        lambda kept, _: (mine[kept].mean() / rival[kept].mean()).sqrt()[None] - 1,
        (len(mine), len(mine)),
    )
    better = int((mine < rival).sum())
    return f"{found.value:+.0%} ({found.low:+.0%} to {found.high:+.0%}), nearer for {better} of {len(mine)}"


if __name__ == "__main__":
    main()

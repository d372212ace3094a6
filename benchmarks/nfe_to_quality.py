"""Network evaluations needed to come within 5 % of the FID of many evaluations, for each sampler.

Usage: python benchmarks/nfe_to_quality.py --results DIR [--names tab3,diffusers:unipc-3,...]
           [--nfe 5,6,8,10,15,20,50] [--within 0.05] [--draw] [--figures docs/figures]

DIR holds the samples that `benchmarks/quality.py draw` made, or is the folder of a `fewstep compare`;
nothing is drawn again, and what is missing is drawn (by quality.py) only with `--draw`. The
target is the FID of the reference with many evaluations (`--target NAME-NFE` takes another cell).
FID is interpolated linearly over log(calls). "As good" is where it first is at most (1 + within)
times the target; "settled" is from where on it stays within that share on either side: with few
calls FID can be lower than that of the exact flow of the network. All samplers start from the same noise, so
each difference to the target has a paired jackknife interval (95 %), and the interval of a result is
where the two ends of that band meet zero. "<" and ">" say that this is beyond the budgets
measured. If DIR has the `quality-fashion-1000.json` of `quality.py score`, a third column says where the RMS
distance to the reference, interpolated in logarithms, first is below `--rms`. What is printed is stored for docs/results too.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

import fewstep
import quality
from _common import FIGURES, figure, legend_beside, print_table, printed_to, say_what_runs, ticks
from fewstep.base.files import read_json
from fewstep.comparison.store import Store
from fewstep.metrics import Estimate, Reference, Statistics, frechet_distance
from fewstep.metrics.intervals import jackknife
from fewstep.models.denoiser import Denoiser

SHOWN = (
    "auto", "profile", "tab3", "unipc3", "ddim", "diffusers:ddim", "diffusers:deis-3", "diffusers:dpmpp-2m-karras",
    "diffusers:unipc-3",
)  # fmt: skip
"""What the figure has."""


def features(name: str, nfe: int, folder: Path) -> Tensor | None:
    """Returns the features of a cell, or ``None`` if it is not there."""
    store = Store(folder)
    cell = {cell.key: cell for cell in store.all()}.get((name, nfe))
    return None if cell is None else store.tensors(cell)["features"].double()


def differences(
    cells: list[Tensor], target: Tensor, real: Statistics, within: float
) -> tuple[list[Estimate], list[Estimate]]:
    """Returns how far the FID of each cell is above the upper, and below the lower mark, in pairs."""

    def fid(side: Tensor) -> Tensor:
        return frechet_distance(Statistics.of(side), real)

    def statistic(i: Tensor, _: Tensor) -> Tensor:
        aim, found = fid(target[i]), torch.stack([fid(cell[i]) for cell in cells])
        return torch.cat([found - (1 + within) * aim, (1 - within) * aim - found])

    made = jackknife(statistic, (len(target), real.n), fixed=(False, True))
    return made[: len(cells)], made[len(cells) :]


def crossing(budgets: list[int], above: list[float]) -> float:
    """Returns where a curve first comes down to zero: 0 if it starts there, infinity if it never does."""
    if above[0] <= 0:
        return 0.0
    for i in range(1, len(budgets)):
        if above[i] <= 0:
            share = above[i - 1] / (above[i - 1] - above[i])
            low, high = math.log(budgets[i - 1]), math.log(budgets[i])
            return math.exp(low + share * (high - low))
    return math.inf


def settling(budgets: list[int], outside: list[float]) -> float:
    """Returns from where on a curve stays at or below zero."""
    for i in reversed(range(len(budgets))):
        if outside[i] > 0:
            return math.inf if i == len(budgets) - 1 else crossing(budgets[i:], outside[i:])
    return 0.0


def crossing_cells(at: list[int], above: list[Estimate], below: list[Estimate]) -> list[str]:
    """Returns the cells of both results: each with its interval."""
    good, settled = [], []
    for end in ("value", "low", "high"):
        over, under = ([getattr(e, end) for e in side] for side in (above, below))
        good.append(text_of(crossing(at, over), at))
        settled.append(
            text_of(settling(at, [max(a, b) for a, b in zip(over, under, strict=True)]), at)
        )
    return [f"{v} ({low} to {high})" for v, low, high in (good, settled)]


def close(name: str, budgets: list[int], limit: float) -> str:
    """Returns where the RMS to the reference comes below a limit, from the scores of quality.py."""
    scores = quality.Subject().file(quality.N)
    if not scores.exists():
        return ""
    cells = read_json(scores, what="scores")["cells"]
    found = {c["nfe"]: c["rms"][0] for c in cells if c["name"] == name and c["nfe"] in budgets}
    at = sorted(found)
    return text_of(crossing(at, [math.log(found[k] / limit) for k in at]), at) if at else ""


def text_of(calls: float, budgets: list[int]) -> str:
    """Returns a number of evaluations as text."""
    if calls == 0:
        return f"< {budgets[0]}"
    return f"> {budgets[-1]}" if calls == math.inf else f"{calls:.1f}"


def target_cell(options: argparse.Namespace) -> tuple[str, Tensor]:
    """Returns the name and the features of the cell that sets the mark.

    Raises:
        SystemExit: If it is not there.
    """
    name, _, nfe = (options.target or f"reference-{quality.REFERENCE_NFE}").rpartition("-")
    found = features(name, int(nfe), options.results)
    if found is None:
        raise SystemExit(
            f"error: {options.results} has no complete cell {name}-{nfe}; draw it first"
        )
    return f"{name}, {nfe} calls", found


def measure(options: argparse.Namespace, denoiser: Denoiser) -> None:
    """Prints the table and draws the figure."""
    budgets = [int(k) for k in options.nfe.split(",")]
    asked = [n for n in options.names.split(",") if n] or quality.names()
    real = Reference.load(quality.MODEL)
    if options.draw:
        quality.run(asked, budgets, options.results, denoiser, quality.N)
    name, target = target_cell(options)
    best = float(frechet_distance(Statistics.of(target), real.statistics))
    print(f"target: FID {best:.3f} of {name}, {len(target)} samples\n")
    rows, curves = [], {}
    for sampler in asked:
        found = {k: features(sampler, k, options.results) for k in budgets}
        there = {k: f for k, f in found.items() if f is not None}
        if len(there) < 2:
            continue
        at = list(there)
        sides = differences(list(there.values()), target, real.statistics, options.within)
        above = [e.value + (1 + options.within) * best for e in sides[0]]
        curves[sampler] = (at, sides[0])
        fids = {k: f"{value:.2f}" for k, value in zip(at, above, strict=True)}
        near = close(sampler, budgets, options.rms)
        cells = [*crossing_cells(at, *sides), near, *(fids.get(k, "") for k in budgets)]
        rows.append((sum(above) / len(above), [sampler, *cells]))
    rows.sort(key=lambda row: row[0])
    share = f"{100 * options.within:g} %"
    head = ["sampler", f"as good, {share}", f"settled, {share}", f"RMS < {options.rms:g}"]
    print_table([*head, *(f"FID at {k}" for k in budgets)], [row for _, row in rows])
    if curves:
        draw(curves, options, best)


def draw(
    curves: dict[str, tuple[list[int], list[Estimate]]], options: argparse.Namespace, best: float
) -> None:
    """Draws FID over calls beside the mark."""
    mark = (1 + options.within) * best
    with figure("nfe-to-quality", options.figures, size=(5.5, 3.6)) as axes:
        for name in [n for n in SHOWN if n in curves] or list(curves)[:8]:
            at, above = curves[name]
            style = "--" if ":" in name else "-"
            middle, low, high = (
                [getattr(e, end) + mark for e in above] for end in ("value", "low", "high")
            )
            axes[0].plot(at, middle, style, marker="o", markersize=3, label=name)
            axes[0].fill_between(at, low, high, alpha=0.12)
        axes[0].axhspan((1 - options.within) * best, mark, color="black", alpha=0.12)
        # Intervals reach down to 0, where a logarithm has no end.
        least = min(e.value + mark for _, above in curves.values() for e in above)
        axes[0].set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="FID")
        axes[0].set_ylim(bottom=least / 2)
        ticks(axes[0], sorted({k for at, _ in curves.values() for k in at}))
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_locator(NullLocator())
        legend_beside(axes[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument(
        "--names", default="", help="samplers, separated by commas; all if left out"
    )
    parser.add_argument("--nfe", default=",".join(map(str, quality.BUDGETS)))
    parser.add_argument("--within", type=float, default=0.05)
    parser.add_argument("--rms", type=float, default=0.05)
    parser.add_argument("--target", default="", help="NAME-NFE of the cell that sets the mark")
    parser.add_argument("--draw", action="store_true", help="draw what is missing")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    say_what_runs(
        f"{quality.MODEL}, {quality.N} samples, classes in turn, seed {quality.SEED}.",
        ("diffusers", "azula"),
    )
    with printed_to("nfe-to-quality"):
        measure(options, fewstep.load(quality.MODEL))


if __name__ == "__main__":
    main()

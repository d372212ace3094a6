"""The four papers: their published rows beside the same rows measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from result_pages import frames
from result_pages.parts import (
    BENCHMARKS,
    cells_of,
    printed,
    remade,
    table,
)
from result_pages.tuning import searched_ggdm

from fewstep.base.files import read_json

APART = 1.5
"""A ratio comes out if it is within this factor of the published one."""


def published(paper: str) -> dict[str, Any]:
    """Returns the published figures of a paper: ``fid`` by method and budget, ``base``, ``source``."""
    return read_json(BENCHMARKS / "published.json", what="published figures")[paper]


def beside(paper: str, result: Mapping[str, Any] | None, key: str = "fid") -> str:
    """Returns a table of one score: ours and its ratio to the base's, the published ones behind the bar."""
    told, cells = published(paper), cells_of(result)
    base, rows, apart = told["base"], list[list[str]](), list[str]()
    budgets = sorted({int(k) for row in told[key].values() for k in row})
    budgets = [k for k in budgets if any(nfe == k for _, nfe in cells)] or budgets
    for method, theirs in told[key].items():
        shown = []
        for nfe in budgets:
            paper_value, paper_base = theirs.get(str(nfe)), told[key][base].get(str(nfe))
            own, own_base = cells.get((method, nfe)), cells.get((base, nfe))
            left = right = "–"
            if own and own_base:
                ratio = own[key][0] / own_base[key][0]
                left = f"{own[key][0]:.3g} ({ratio:.2f})"
            if paper_value and paper_base:
                right = f"{paper_value:.4g} ({paper_value / paper_base:.2f})"
                if own and own_base:
                    off = ratio / (paper_value / paper_base)
                    if not 1 / APART <= off <= APART:
                        apart.append(f"{method} at {nfe}")
            shown.append("" if left == right else f"{left} \\| {right}")
        if any(shown):
            rows.append([method, *shown])
    words = f"Ratios further than a factor of {APART} from the published: {', '.join(apart) if apart else 'none'}."
    more = f"{words} {told.get('remark', '')} Published: {told['source']}.\n"
    return f"{table(['', *map(str, budgets)], rows)}\n{more}"


def _cells(title: str, paper: str, key: str = "fid") -> str:
    result = remade()
    if result is None:
        return f"{title}: not measured yet: `python benchmarks/quality.py draw --model cifar10`.\n"
    return f"{title} behind the bar ({result['n']} samples):\n\n{beside(paper, result, key)}"


def deis() -> str:
    """The first paper: orders and ingredients."""
    return f"""# DEIS (Zhang, Chen, 2023): orders and ingredients

## The table on CIFAR-10

{_cells("FID on `cifar10` and its ratio to that of ddim, the paper's", "deis")}
{_cells("The same with its discrete network", "deis-discrete")}
{_cells("Ingredients, uniform grid", "ablation")}
## Orders

{printed("convergence-deis", script="python benchmarks/convergence.py --only deis")}
## The ingredients: exponential integrator, epsilon, polynomial, grid

{printed("ingredients-mixtures", "ingredients-fashion", script="python benchmarks/deis_ingredients.py")}
## How much noise

{printed("sde-line", script="python benchmarks/sde.py --only line")}"""


def ddss() -> str:
    """The third paper: strides of DDPM and DDIM beside the searched sampler."""
    return f"""# DDSS (Watson et al., 2022): searched samplers

{_cells("FID on `cifar10` and its ratio to DDIM with quadratic stride, the paper's", "ddss")}
{_cells("Inception score (our classifier's; the paper's is Inception's) and its ratio, the paper's", "ddss", "inception")}
{searched_ggdm()}
What our own search brings: [tuning](tuning.md).
"""


def dsno() -> str:
    """The fourth paper: students of one evaluation."""
    told = published("dsno")
    base = told["fid"]["teacher's trajectories, 512 evaluations"]
    rows = [[name, value, f"{value / base:.2f}"] for name, value in told["fid"].items()]
    return f"""# DSNO (Zheng et al., 2023): students of one evaluation

Published FID on CIFAR-10, and its ratio to that of the teacher's trajectories ({told["source"]}):

{table(["student", "FID", "ratio"], rows)}
{frames.section()}
What students of `fashion` and `cifar10` give at 1, 2 and 4 evaluations: [students](students.md). How they are trained, what they cost, where they fail: [distilling](../distilling.md).
"""


def accelerated() -> str:
    """The second paper: slopes."""
    return f"""# Provably accelerated DDIM and DDPM (Li et al., 2024): slopes

The orders that the theorems state are measured against the exact law; quality on a network of CIFAR-10.

{_cells("FID on `cifar10`, the ratio to plain DDIM, and the authors' figures", "accelerated")}
{_accelerated_rows()}
{printed("convergence-accelerated", script="python benchmarks/convergence.py --only accelerated")}"""


def _accelerated_rows() -> str:
    cells = cells_of(remade())
    names = [
        "ddim@uniform",
        "accelerated-ddim",
        "ddim@quadratic",
        "accelerated-ddim@quadratic",
        "ddpm",
        "accelerated-ddpm",
    ]
    budgets = sorted({nfe for name, nfe in cells if name in names})
    if not budgets:
        return ""
    rows = [
        [name, *(_fid_and_rms(cells.get((name, nfe))) for nfe in budgets)]
        for name in names
        if any((name, nfe) in cells for nfe in budgets)
    ]
    return f"""FID, and RMS to the reference, plain beside accelerated:

{table(["", *map(str, budgets)], rows)}
![12 seeds: plain and accelerated DDIM with 5, 10, 15 and 20 evaluations, and the reference](../figures/accelerated-cifar10.png)
"""


def _fid_and_rms(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['fid'][0]:.3g}; {row['rms'][0]:.3f}"

"""The four papers: their published rows beside the same rows measured here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from result_pages import frames
from result_pages.parts import (
    BENCHMARKS,
    cells_of,
    interval,
    load,
    origin,
    printed,
    qualities_of,
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


def _remade() -> dict[str, Any] | None:
    """Returns the table with the most of the papers' rows, which need not be that of the most samples."""
    return max(qualities_of("cifar10"), key=lambda found: len(found["cells"]), default=None)


def _cells(title: str, paper: str, key: str = "fid") -> str:
    result = _remade()
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
## Students of `fashion`

{_students()}
How they are trained, what they cost, where they fail: [distilling](../distilling.md).
"""


def _students() -> str:
    result = load("distill")
    if result is None:
        return "Ours: not measured yet: `python benchmarks/distill.py quality`.\n"
    cells = result["cells"]
    many = max(cells, key=lambda name: cells[name]["cost"])
    base = cells[many]
    looks = list(base["fid"])
    before = result["about"].get("earlier")
    earlier = "" if before is None else f" {before['rows']}: {origin(before)}, the same noise."
    rows = [
        [
            name,
            f"{row['cost']:.3g}",
            *(interval(row["fid"][key], 3 if key == "random-2" else 2) for key in looks),
            " / ".join(f"{row['fid'][key][0] / base['fid'][key][0]:.2f}" for key in looks),
            "" if row["recall"] is None else f"{row['recall'][0]:.3f}",
            f"{row['rms']:.3f}",
            f"{row['right']:.2f}",
        ]
        for name, row in cells.items()
    ]
    head = [
        "sampler",
        "evaluations",
        *(FEATURES[key] for key in looks),
        f"ratios to {many}",
        "recall",
        "RMS",
        "right",
    ]
    return f"""{origin(result["about"])}; {result["about"]["n"]} samples. The last columns: RMS to ten evaluations of `auto`, and the share of samples
that a classifier finds of the requested class. {SEEN}{earlier}

{table(head, rows)}{options_of_flow_maps()}"""


FEATURES = {
    "fashion": "FID",
    "fashion-robust": "FID, robust",
    "random-2": "FID, random",
}
"""The names of the features in a head."""

SEEN = """Robust are the features of the student's loss. Those of the first column its loss did not see, but the noise levels
of its corrector were chosen with them, in part on these very samples."""
"""What students have seen of the features."""


def options_of_flow_maps() -> str:
    """What each option of the trainer of flow maps gives, or nothing before it is measured."""
    result = load("flow-map-options")
    if result is None:
        return ""
    about, cells = result["about"], result["cells"]
    budgets = list(cells["the start"]["budgets"])
    rows = [
        [
            name,
            f"{row['seconds'] / about['steps']:.2f}" if row["seconds"] else "",
            *(
                f"{cell['fid']['fashion'][0]:.2f} / {cell['fid']['fashion-robust'][0]:.2f} / {cell['recall'][0]:.3f}"
                for cell in (row["budgets"][nfe] for nfe in budgets)
            ),
        ]
        for name, row in cells.items()
    ]
    half = max(
        (cell["fid"]["fashion"][2] - cell["fid"]["fashion"][1]) / 2
        for row in cells.values()
        for cell in row["budgets"].values()
    )
    return f"""
Options of the trainer of flow maps, one by one: {about["steps"]} steps of 32 trajectories each from the first stage of `fashion-1step`, the same trajectories in the same
order ({origin(about)}; {about["n"]} samples, the same noise for all; each FID has an interval of up to ± {half:.1f} of its own, of which the rows share most).

{table(["option", "CPU seconds a step", *(f"{nfe}: FID / robust / recall" for nfe in budgets)], rows)}"""


def students_in_short() -> str:
    """The table of students and solvers of the page about distilling."""
    result = load("distill")
    assert result is not None
    rows = [
        [
            name,
            f"{row['cost']:.0f}",
            "{:.1f} ({:.1f} to {:.1f})".format(*row["fid"]["fashion"]),
            f"{row['rms']:.3f}",
        ]
        for name, row in result["cells"].items()
    ]
    return table(["", "evaluations", "FID", "RMS"], rows)


def accelerated() -> str:
    """The second paper: slopes."""
    return f"""# Provably accelerated DDIM and DDPM (Li et al., 2024): slopes

The orders that the theorems state are measured against the exact law; quality on a network of CIFAR-10.

{_cells("FID on `cifar10`, the ratio to plain DDIM, and the authors' figures", "accelerated")}
{_accelerated_rows()}
{printed("convergence-accelerated", script="python benchmarks/convergence.py --only accelerated")}"""


def _accelerated_rows() -> str:
    cells = cells_of(_remade())
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

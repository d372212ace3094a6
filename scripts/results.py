"""Writes docs/results: one page for each question, its tables from benchmarks/results/*.json.

Usage: python scripts/results.py (or: make results)

No figure is typed here: what a page says in figures comes from a JSON file, which a script under benchmarks/
has written, and ``tests/test_results.py`` fails where page and file differ. A file that is not there leaves a
line that names the script.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from fewstep.base.files import read_json, write_atomic

ROOT = Path(__file__).parent.parent
RESULTS, PAGES_FOLDER = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

from papers import beside, cells_of, published, quality_of, table  # noqa: E402

JUDGED = (5, 10, 20)
"""The budgets of the tables on the first page."""

SAMPLED = ("fashion", "cifar10")
"""The models with tables of quality."""


def load(name: str) -> dict[str, Any] | None:
    """Returns a result, or ``None`` if it has not been measured."""
    path = RESULTS / f"{name}.json"
    return read_json(path, what="result") if path.exists() else None


def printed(*names: str, script: str) -> str:
    """Returns what a script has printed, with its origin; or that it has not been run."""
    parts = []
    for name in names:
        result = load(name)
        if result is None:
            parts.append(f"Not measured yet: `{script}` ({name}).\n")
            continue
        parts.append(f"{origin(result['about'])}\n\n{result['printed'].strip()}\n")
    return "\n".join(parts)


def origin(about: Mapping[str, Any]) -> str:
    """Returns where a result comes from, in a line."""
    shown = [about.get(key) for key in ("date", "commit", "machine")]
    return f"`{about['command']}` ({', '.join(str(value) for value in shown if value)})"


def shares(found: Mapping[str, Any], who: str, nfe: int) -> dict[str, float]:
    """Returns the error of a choice over that of the best peer, for each network."""
    from defaults import best_peer

    return {
        name: entry["errors"][f"{nfe} {who}"] / best_peer(entry["errors"], nfe)[0]
        for name, entry in found.items()
    }


def networks() -> dict[str, Any]:
    """Returns the results of ``benchmarks/defaults.py``, by network."""
    return {k: v for k, v in (load("defaults") or {}).items() if isinstance(v, dict)}


def readme() -> str:
    """The table of the README: the error beside that of the best peer."""
    from defaults import mean

    found = networks()
    rows = []
    for who, what in (("profile", "fewstep, measured once"), ("auto", "fewstep, default")):
        row = [what]
        for nfe in (5, 10):
            values = shares(found, who, nfe)
            row.append(f"{mean(list(values.values())):.2f} (worst {max(values.values()):.2f})")
        rows.append(row)
    rows.append(["best of seven samplers of diffusers, for each network and budget", "1", "1"])
    return f"""Error (RMS to the model's own many-step solution, same noise), geometric mean over {len(found)} networks; [all results](docs/results/index.md):

{table(["sampler", "5 evaluations", "10"], rows)}"""


def with_table(text: str) -> str:
    """Returns the README with its table."""
    begin, end = "<!-- results -->", "<!-- end of results -->"
    return f"{text.split(begin)[0]}{begin}\n{readme()}{end}{text.split(end)[1]}"


# The pages.


def index() -> str:
    """How far ahead, of whom, on what, at what cost, and where behind."""
    from defaults import mean

    found = networks()
    rows = []
    for who, what in (
        ("profile", "measured once (`fewstep fit`)"),
        ("auto", "the default, `auto`"),
    ):
        for nfe in JUDGED:
            values = shares(found, who, nfe)
            worst = max(values, key=lambda name: values[name])
            rows.append(
                [
                    what,
                    nfe,
                    f"{mean(list(values.values())):.2f}",
                    f"{values[worst]:.2f} ({worst})",
                    f"{sum(v <= 1 for v in values.values())} of {len(values)}",
                ]
            )
    cost = max(entry["evaluations"] for entry in found.values())
    text = f"""# What was measured

**How far ahead.** The distance (RMS) to a model's own many-step solution from the same noise, over that of the best of seven samplers of diffusers
*chosen for each network and budget* (DDIM, DEIS-2/3, DPM++2M, DPM++2M Karras, UniPC-2/3), on {len(found)} networks:

{table(["sampler", "evaluations", "share of the best peer's error, mean", "worst network", "at or below it"], rows)}
The measurement costs {cost:,} evaluations of one image, once a model. All networks, budgets and the own grids of each solver: [distance](distance.md).

{_quality_summary()}
{_behind(found)}
| question | page |
| --- | --- |
{_list_of_pages()}
Each page is written by `make results` from `benchmarks/results/*.json` and names the command; date, commit and seeds where the file has them. Machines were
noisy, so ratios and counts are what to read. Nothing here was run on a GPU.
"""
    return text


def _list_of_pages() -> str:
    lines = [f"| {PAGES[name][0]} | [{name}]({name}.md) |" for name in PAGES if name != "index"]
    return "\n".join(lines) + "\n"


def _quality_summary() -> str:
    parts = []
    for model in SAMPLED:
        result = quality_of(model)
        if result is None:
            continue
        cells = cells_of(result)
        rows = []
        for nfe in JUDGED:
            peers = [row for (name, k), row in cells.items() if k == nfe and ":" in name]
            if not peers or ("profile", nfe) not in cells:
                continue
            best = min(peers, key=lambda row: row["fid"][0])
            rows.append(
                [
                    nfe,
                    *(_interval(cells[who, nfe]["fid"]) for who in ("profile", "auto")),
                    f"{_interval(best['fid'])} ({best['name'].partition(':')[2]})",
                ]
            )
        top = result["reference"]
        head = f"FID of `{model}` ({result['n']} samples; {top['nfe']} evaluations: {_interval(top['fid'])}), see [quality]({_page_of(model)}.md):"
        names = ["evaluations", "measured once", "`auto`", "best peer of that row"]
        parts.append(f"{head}\n\n{table(names, rows)}")
    return "\n".join(parts)


def _page_of(model: str) -> str:
    return "quality" if model == SAMPLED[0] else f"quality-{model}"


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:.2f} ± {(high - low) / 2:.2f}"


def _behind(found: Mapping[str, Any]) -> str:
    from defaults import BUDGETS

    lines = []
    for who in ("profile", "auto"):
        above = [
            f"{name} at {nfe} ({value:.2f})"
            for nfe in BUDGETS
            for name, value in shares(found, who, nfe).items()
            if value > 1
        ]
        if above:
            lines.append(
                f"- `{who}` has a larger error than the best peer on: {', '.join(above)}."
            )
    for model, nfe in itertools.product(SAMPLED, JUDGED):
        column = {
            name: row["fid"][0]
            for (name, k), row in cells_of(quality_of(model)).items()
            if k == nfe
        }
        peers = {name: value for name, value in column.items() if ":" in name}
        name = min(peers, key=lambda n: peers[n], default=None)
        if name is not None and peers[name] < column.get("profile", 0):
            lines.append(
                f"- FID of `{model}` at {nfe}: {name} {peers[name]:.2f}, the profile {column['profile']:.2f}."
            )
    for limit in (load("overhead") or {}).get("limits", []):
        if limit["worst"] > limit["most"]:
            lines.append(
                f"- {limit['name']}: {limit['worst']:.2f} ({limit['solver']}), wanted {limit['most']:g}."
            )
    cifar = quality_of("cifar10")
    lines.append(
        "- The papers' tables on CIFAR-10 have not been made again."
        if cifar is None
        else f"- The papers' tables are made again with {cifar['n']} samples of a network that two cores can sample, not 50,000 of theirs: "
        "ratios can be compared, values cannot."
    )
    return "**Where we are behind, or do not know.**\n\n" + "\n".join(lines) + "\n"


def distance() -> str:
    """The regret tables of ``benchmarks/defaults.py``."""
    from defaults import show

    with redirect_stdout(StringIO()) as text:
        show(networks())
    dates = sorted({entry["date"] for entry in networks().values()})
    return f"""# Distance to the model's own solution

`python benchmarks/defaults.py measure` ({", ".join(dates)}). Profiles are fitted on seed 0, defaults were chosen on seed 5000, everything is judged on seed 9000.
What follows from it for your model: [choosing](../choosing.md).

{text.getvalue().strip()}
"""


def quality(model: str = SAMPLED[0]) -> str:
    """FID of all samplers on a model."""
    head = f"# Quality beside the peers: `{model}`\n\n"
    result = quality_of(model)
    if result is None:
        return f"{head}Not measured yet: `python benchmarks/quality.py`.\n"
    return head + _quality_of(result) + (_evaluations_needed() if model == SAMPLED[0] else "")


def _evaluations_needed() -> str:
    script = "python benchmarks/nfe_to_quality.py --results DIR"
    return f"""
## Evaluations needed for the quality of many

{printed("nfe-to-quality", script=script)}
![FID against evaluations, with the band of the reference](../figures/nfe-to-quality.svg)
"""


def _quality_of(result: Mapping[str, Any]) -> str:
    cells = cells_of(result)
    budgets = sorted({nfe for _, nfe in cells})
    judged = JUDGED[1] if JUDGED[1] in budgets else budgets[0]
    names = sorted(
        {name for name, _ in cells},
        key=lambda name: (cells.get((name, judged), {"fid": [math.inf]})["fid"][0], name),
    )

    def cell(name: str, nfe: int) -> str:
        row = cells.get((name, nfe))
        if row is None:
            return ""
        values = " / ".join(f"{row[key][0]:.3g}" for key in ("fid", "robust", "random"))
        return f"{values}; {row['inception'][0]:.2f}; {row['rms'][0]:.3f}"

    def width(nfe: int) -> float:
        shown = [row["fid"] for (_, k), row in cells.items() if k == nfe]
        return sorted((high - low) / 2 for _, low, high in shown)[len(shown) // 2]

    rows = [[name, *(cell(name, nfe) for nfe in budgets)] for name in names]
    best = []
    for nfe in budgets:
        ties = [name for name in names if (name, nfe) in cells and cells[name, nfe]["tie"]]
        best.append([nfe, ", ".join(ties), f"{width(nfe):.2f}"])
    top = result["reference"]
    shown = " / ".join(f"{top[key][0]:.3g}" for key in ("fid", "robust", "random"))
    return f"""{origin(result["about"])}; {result["n"]} samples of seed {result["seed"]}, classes in turn. A cell has FID against the training images in three feature
spaces (a classifier, one that saw noisy and blurred images, one with random weights), inception score of the first, and RMS to the reference from the same
noise. FID is biased upwards by the number of samples, alike in a table. The reference ({top["nfe"]} evaluations of tab3) has {shown}; {top["inception"][0]:.2f}.
`profile` is `auto` with the model's measured profile, `auto` without it. Sorted by the first FID at {judged}.

{table(["sampler", *map(str, budgets)], rows)}
The best by the first FID, with those whose paired difference to it is within the 95 % interval; and the median half-width of a single interval:

{table(["evaluations", "best or tied", "±"], best)}"""


def speed() -> str:
    """Overhead, throughput, scale, long runs."""
    parts = ["# Speed, scale, long runs\n"]
    overhead = load("overhead")
    if overhead:
        rows = [
            [
                limit["name"],
                f"{limit['worst']:.2f}",
                limit["solver"],
                f"{limit['most']:g}",
                "yes" if limit["worst"] <= limit["most"] else "NO",
            ]
            for limit in overhead["limits"]
        ]
        settings = ", ".join(f"{k} {v}" for k, v in overhead["settings"].items())
        parts.append(f"**Overhead**, all solvers, `python benchmarks/overhead.py` ({settings}):\n")
        parts.append(table(["limit", "worst", "solver", "at most", "holds"], rows))
    for entry in read_json(RESULTS / "throughput.json", what="result"):
        settings = ", ".join(f"{k} {v}" for k, v in entry["settings"].items() if v is not None)
        rows = [
            [
                what,
                f"{row['evaluations_per_second']:.1f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_of_cpu']:.3f}",
            ]
            for what, row in entry["results"].items()
        ]
        parts.append(
            f"**Throughput**, `python benchmarks/throughput.py` ({entry['device']}; {settings}):\n"
        )
        head = ["what", "evaluations a second", "of the network's own rate", "in CPU seconds"]
        parts.append(table(head, rows))
    runs = load("long_runs") or {}
    rows = [[what, *row.values()] for what, row in runs.items() if isinstance(row, dict)]
    if rows:
        names = next(list(row) for row in runs.values() if isinstance(row, dict))
        parts.append("**Long runs**, `python benchmarks/long_runs.py`:\n")
        parts.append(table(["what", *names], rows))
    parts.append("A worked plan for 10⁹ trajectories: [scale](../scale.md).\n")
    return "\n".join(parts)


def faults() -> str:
    """What survives faults."""
    result = load("faults")
    if result is None:
        return "# Faults\n\nNot measured yet: `python benchmarks/faults.py`.\n"
    commit = result.get("commit", "several")
    commit = "several commits" if commit == "several" else f"commit `{commit}`"
    parts = [
        "# Faults\n",
        f"`python benchmarks/faults.py`, counts over several runs of it, on {commit}.\n",
    ]
    titles = {
        "kills": "SIGKILL at random moments, then the same command until it ends",
        "disk": "A disk that is full at some file operation, then again with space",
        "writers": "Two and six processes with one output",
        "damage": "Bits flipped, files cut, keys and tensors dropped, files swapped",
    }
    for key, title in titles.items():
        rows = result.get(key, {})
        heads = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = [[what, *(row.get(name, "") for name in heads)] for what, row in rows.items()]
        parts.append(f"**{title}**:\n")
        parts.append(table(["", *heads], cells))
    return "\n".join(parts)


def pipelines() -> str:
    """Pipelines of diffusers."""
    result = load("pipelines")
    assert result is not None
    families = result["families"]
    names = list(dict.fromkeys(key for row in families.values() for key in row))
    rows = [[name, *(_small(row.get(key, "")) for key in names)] for name, row in families.items()]
    refused = [[name, _small(reason)] for name, reason in result["refused"].items()]
    return f"""# Pipelines of diffusers

{origin(result)}; {result["steps"]} steps, tiny random networks. The largest difference of the pictures: `PlanScheduler` with the pipeline's own solver beside the
native scheduler; with `tab3` (another solver, so it differs); a saved pipeline loaded again; the folder loaded by `fewstep.load`.

{table(["family", *names], rows)}
Refused, with a reason:

{table(["family", "reason"], refused)}"""


def _small(value: float | str) -> str:
    if isinstance(value, str):
        return value if len(value) <= 110 else f"{value[:110]}…"
    return f"{value:.1e}"


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


def _cells(title: str, paper: str, key: str = "fid") -> str:
    result = quality_of("cifar10")
    if result is None:
        return f"{title}: not measured yet: `python benchmarks/quality.py draw --model cifar10`.\n"
    return f"{title} behind the bar ({result['n']} samples):\n\n{beside(paper, result, key)}"


def _accelerated_rows() -> str:
    cells = cells_of(quality_of("cifar10"))
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
![12 seeds: plain and accelerated DDIM with 5 and 10 evaluations, and the reference](../figures/accelerated-cifar10.png)
"""


def _fid_and_rms(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['fid'][0]:.3g}; {row['rms'][0]:.3f}"


def ddss() -> str:
    """The third paper: strides of DDPM and DDIM beside the searched sampler."""
    return f"""# DDSS (Watson et al., 2022): searched samplers

{_cells("FID on `cifar10` and its ratio to DDIM with quadratic stride, the paper's", "ddss")}
{_cells("Inception score (our classifier's; the paper's is Inception's) and its ratio, the paper's", "ddss", "inception")}
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
    rows = [
        [
            name,
            f"{row['cost']:.3g}",
            *(_interval(row["fid"][key]) for key in ("fashion", "fashion-robust")),
            " / ".join(
                f"{row['fid'][key][0] / base['fid'][key][0]:.2f}"
                for key in ("fashion", "fashion-robust")
            ),
            "" if row["recall"] is None else f"{row['recall'][0]:.3f}",
            f"{row['rms']:.3f}",
            f"{row['right']:.2f}",
        ]
        for name, row in cells.items()
    ]
    head = [
        "sampler",
        "evaluations",
        "FID",
        "FID, robust",
        f"ratios to {many}",
        "recall",
        "RMS",
        "right",
    ]
    return f"""Ours, on `fashion` ({origin(result["about"])}; {result["about"]["n"]} samples). The last columns: RMS to ten evaluations of `auto`, and the share of samples
that a classifier finds of the requested class.

{table(head, rows)}"""


def accelerated() -> str:
    """The second paper: slopes."""
    return f"""# Provably accelerated DDIM and DDPM (Li et al., 2024): slopes

The orders that the theorems state are measured against the exact law; quality on a network of CIFAR-10.

{_cells("FID on `cifar10`, the ratio to plain DDIM, and the authors' figures", "accelerated")}
{_accelerated_rows()}
{printed("convergence-accelerated", script="python benchmarks/convergence.py --only accelerated")}"""


TUNED_TARGETS = {4: 0.35, 5: 0.5, 6: 0.6, 10: 0.9}
"""What the FID of a tuned sampler over that of the best training-free sampler of a peer should be at most."""


def tuning() -> str:
    """What a search brings over training-free samplers, and what its ingredients do."""
    result = load("tune")
    if result is None:
        return "# Tuning\n\nNot measured yet: `python benchmarks/tune.py table`.\n"
    cells, spaces = result["cells"], result["features"]
    roles = ("trained on", "selected with", "unseen", "unseen")
    heads = [f"{space}, {role}" for space, role in zip(spaces, roles, strict=True)]
    budgets = sorted(int(name.split()[-1]) for name in cells if name.startswith("default "))
    tables = []
    for key, against in (("over the peer", "peer"), ("over the best", "best"), ("excess", "best")):
        rows = [
            [k, *(_ratio(cells[f"default {k}"][space], key, against) for space in spaces)]
            for k in budgets
        ]
        tables.append(table(["evaluations", *heads], rows))
    values = table(
        ["evaluations", "sampler", *heads],
        [
            [k, who, *(f"{cells[f'default {k}'][space][what]:.3g}" for space in spaces)]
            for k in budgets
            for who, what in (
                ("tuned", "FID"), ("best training-free", "best FID"), ("best peer", "peer FID")
            )
        ],
    )  # fmt: skip
    teacher = ", ".join(
        f"{cells[f'default {budgets[0]}'][space]['teacher FID']:.3g}" for space in spaces
    )
    verdicts = table(
        ["evaluations", "search", *heads, "CPU seconds", "starts from", "verdict of the search itself"],
        [
            [
                name.split()[-1], " ".join(name.split()[:-1]),
                *(f"{cell[space]['FID']:.3g}" if space in cell else "" for space in spaces),
                f"{cell.get('CPU seconds', math.nan):.0f}", cell.get("start", ""), _short_verdict(cell.get("verdict", "")),
            ]
            for name, cell in sorted(cells.items(), key=lambda c: (int(c[0].split()[-1]), c[0]))
            if not name.startswith("teacher")
        ],
    )  # fmt: skip
    return f"""# Tuning

{origin(result["about"])}

`{result["model"]}`, {result["n"]} samples, the same noise and classes for all; FID to all real images in four kinds of features. Of the search `fashion` was trained on, `fashion-robust`
chose candidates, a network with random weights and wavelets were never seen. FID of so few samples is too large, by about as much for all, which brings ratios nearer to 1: intervals are those
of pairs, 95 %. Searches smaller than the default ones: {_settings(result["search"])}. Peers: diffusers' DPM-Solver++(2M) Karras, UniPC-2, DEIS-3; ours: `auto` with and without the profile.

## The default search over the best training-free sampler

FID over that of the best **peer**, chosen in each kind of features by itself. Wanted at most {", ".join(f"{v:g} at {k}" for k, v in TUNED_TARGETS.items())}; {_met(cells, spaces, budgets)}

{tables[0]}
Over the best of all training-free samplers, ours included:

{tables[1]}
What is above the teacher's FID ({teacher}), over the same of the best training-free sampler; wanted at 5 at most 0.3:

{tables[2]}
FID itself:

{values}
## Ingredients

{verdicts}
{_mixture(result.get("mixture", {}))}"""


WIDEST = 3.0
"""The widest interval of a ratio that is shown: a wider one has a divisor near 0."""


def _ratio(cell: Mapping[str, Any], key: str, against: str) -> str:
    if cell.get(key) is None:
        return ""
    value, low, high = cell[key]
    if high - low > WIDEST:
        return "not resolved"
    return f"{value:.2f} ({low:.2f} to {high:.2f}), {cell[against].split(':')[-1].split('_')[-1]}"


def _met(cells: Mapping[str, Any], spaces: Sequence[str], budgets: Sequence[int]) -> str:
    """Returns in words in which unseen features the wanted ratios hold."""
    parts = []
    for k, wanted in TUNED_TARGETS.items():
        if k not in budgets:
            parts.append(f"at {k} not measured")
            continue
        values = [cells[f"default {k}"][space]["over the peer"][0] for space in spaces[2:]]
        met = sum(v <= wanted for v in values)
        parts.append(f"at {k} in {('none', 'one', 'both')[met]} of the unseen ones")
    return f"that holds {', '.join(parts)}."


def _settings(search: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in search.items())


def _short_verdict(text: str) -> str:
    return text.split(":")[0].removeprefix("the result is ")


def _mixture(cells: Mapping[str, Any]) -> str:
    """Returns the table of searches on a mixture whose law is known."""
    if not cells:
        return ""
    rows = []
    for key, cell in cells.items():
        nfe, family, objective = key.split(".", 2)
        rows.append(
            [
                nfe,
                family,
                objective,
                *(f"{1e3 * cell[k]:.3g}" for k in ("start", "score")),
                cell["verdict"],
            ]
        )
    rows.sort(key=lambda row: int(row[0]))
    return f"""On `mixture-sharp` the law is known: squared discrepancy from it on 3000 unused noises, x 1e-3, from tab3 on the quadratic grid, 300 steps, one seed (noise about 0.1).

{table(["evaluations", "family", "objective", "start", "result", "verdict"], rows)}"""


def deciding() -> str:
    """Measure, tune or distill: what each costs and what it gave."""
    from defaults import mean

    found = networks()
    evaluations = [entry["evaluations"] for entry in found.values()]
    seconds = sorted(entry["seconds"] for entry in found.values())

    def error(who: str) -> str:
        return ", ".join(
            f"{mean(list(shares(found, who, nfe).values())):.2f} at {nfe}" for nfe in JUDGED
        )

    searched, students = load("tune"), load("distill")
    gave = "not measured yet: `benchmarks/tune.py`"
    if searched is not None:
        cell, unseen = searched["cells"]["default 5"], searched["features"][2:]
        over = " and ".join(f"{cell[space]['over the peer'][0]:.2f}" for space in unseen)
        gave = (
            f"on `{searched['model']}` at 5 evaluations, from its profile: FID over the best peer's {over} in two kinds of features "
            "that the search did not see"
        )
    rows = [
        ["nothing: `auto`", "0", "0", f"error over the best peer's: {error('auto')}"],
        [
            "measure: `fewstep fit`",
            f"{min(evaluations):,} to {max(evaluations):,}, once a model",
            f"{seconds[0]:.0f} to {seconds[-1]:.0f} s on two cores, median {seconds[len(seconds) // 2]:.0f} s",
            f"error over the best peer's: {error('profile')}",
        ],
        [
            "tune: `fewstep tune`",
            "(pairs + held-out + test samples) of the teacher, and 3 × steps × batch × budget",
            "minutes to hours",
            gave,
        ],
    ]
    text = ""
    if students is not None:
        cells = students["cells"]
        one = next(name for name in cells if name.startswith("student"))
        fid = cells[one]["fid"]["fashion"][0]
        worse = [c["cost"] for k, c in cells.items() if k != one and c["fid"]["fashion"][0] > fid]
        rows.append(
            [
                "distill: `fewstep record`, `fewstep distill`",
                "as many as the teacher makes for each of some 10⁵ trajectories, then training",
                "hours",
                f"`{one.removeprefix('student ')}`: FID {fid:.1f} in one evaluation; solvers of up to {max(worse):.0f} evaluations have more",
            ]
        )
        text = f"""
FID of {
            students["about"][
                "n"
            ]:,} samples of `fashion` (features of its own extractor; with 95 % interval), {
            origin(students["about"])
        }:

{
            table(
                [
                    "sampler",
                    "evaluations",
                    "FID",
                    "of the class asked for",
                    "distance to the model's own solution",
                ],
                [
                    [
                        name,
                        f"{cell['cost']:.0f}",
                        f"{cell['fid']['fashion'][0]:.1f} ({cell['fid']['fashion'][1]:.1f} to {cell['fid']['fashion'][2]:.1f})",
                        f"{cell['right']:.0%}",
                        f"{cell['rms']:.3f}",
                    ]
                    for name, cell in sorted(
                        cells.items(), key=lambda item: item[1]["fid"]["fashion"][0]
                    )
                ],
            )
        }"""
    return f"""# Measure, tune or distill

What each costs before the first sample, and what it gave. All of it is about a model that exists: its weights do not change, except that distilling
trains a student beside it.

{table(["do", "network evaluations of one sample", "time", "gave"], rows)}
- **Start with nothing, then measure.** A measurement needs no data and no training; do it for every model that is used more than once.
- **Tune** when the budget is at most some 6 evaluations and the same budget is used for long. The result is a file of a few kilobytes.
- **Distill** when there must be one or two evaluations, and the hours are there. A student does not inherit guidance scales, other budgets or inversion.

The error is the distance (RMS) to a model's own many-step solution over that of the best of seven samplers of diffusers, chosen for each network and budget; the geometric
mean over {len(found)} networks ([distance](distance.md)). What a search brought in more detail: [tuning](tuning.md).
{text}"""


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "index": ("", index),
    "deciding": ("Measure, tune or distill: what does each cost and give?", deciding),
    "distance": (
        "How near to the model's own solution, on which networks, beside whom?",
        distance,
    ),
    "quality": ("What FID does that give on grey images of clothes?", quality),
    "quality-cifar10": ("What FID does that give on photographs?", partial(quality, "cifar10")),
    "speed": ("What does it cost beside the network? Does a long run stay flat?", speed),
    "faults": ("What survives kills, damage, full disks?", faults),
    "pipelines": ("Which pipelines of diffusers work?", pipelines),
    "tuning": ("What does a search bring?", tuning),
    "deis": ("DEIS: do the orders and the ingredients hold?", deis),
    "ddss": ("DDSS: do its ratios hold, and what beats it?", ddss),
    "dsno": ("DSNO: what are students of one evaluation worth?", dsno),
    "accelerated": ("Accelerated DDIM and DDPM: do the rates hold?", accelerated),
}
"""The question and the writer of each page."""


def main() -> None:
    """Writes all pages."""
    for name, (_, write) in PAGES.items():
        write_atomic(PAGES_FOLDER / f"{name}.md", write())
        print(f"wrote docs/results/{name}.md")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    write_atomic(ROOT / "README.md", with_table(text))


if __name__ == "__main__":
    main()

"""What a search brings, and what its ingredients do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from result_pages.parts import load, origin, table

TUNED_TARGETS = {4: 0.35, 5: 0.5, 6: 0.6, 10: 0.9}
"""What the FID of a tuned sampler over that of the best training-free sampler of a peer should be at most."""

DDSS_RATIOS = {5: 0.42, 10: 0.60}
"""What DDSS states of GGDM+PRED+TIME over the best stride of DDIM."""


FILES = {"fashion": "tune", "cifar10": "tune-cifar10"}
"""The file of results of each model."""

WIDEST = 3.0
"""The widest interval of a ratio that is shown: a wider one has a divisor near 0."""


def unseen_of(result: Mapping[str, Any]) -> list[str]:
    """Returns the kinds of features that the searches of a file did not see."""
    pairs = zip(result["features"], result["roles"], strict=True)
    return [space for space, role in pairs if role == "unseen"]


def tuning(name: str = "fashion") -> str:
    """What a search brings over training-free samplers for a model, and what its ingredients do."""
    result = load(FILES[name])
    if result is None:
        return f"# Tuning {name}\n\nNot measured yet: `python benchmarks/tune.py table --name {name}`.\n"
    cells, spaces = result["cells"], result["features"]
    roles = result["roles"]
    heads = [f"{space}, {role}" for space, role in zip(spaces, roles, strict=True)]
    unseen = unseen_of(result)
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
        [
            "evaluations", "search", *heads, "CPU seconds", "starts from", "way to the best candidate",
            "verdict of the search itself",
        ],
        [
            [
                name.split()[-1], " ".join(name.split()[:-1]),
                *(f"{cell[space]['FID']:.3g}" if space in cell else "" for space in spaces),
                f"{cell.get('CPU seconds', math.nan):.0f}", cell.get("start", ""), f"{cell['share']:.0%}" if "share" in cell else "",
                _short_verdict(cell.get("verdict", "")),
            ]
            for name, cell in sorted(cells.items(), key=lambda c: (int(c[0].split()[-1]), c[0]))
            if not name.startswith("teacher")
        ],
    )  # fmt: skip
    free = sorted({value for cell in cells.values() for space in spaces if space in cell
                   for value in (cell[space]["peer"], cell[space]["best"])})  # fmt: skip
    return f"""# Tuning `{result["model"]}`

{origin(result["about"])}

{result["n"]} samples, the same noise and classes for all; FID to all real images in {len(spaces)} kinds of features, each with what the search did with it: {", ".join(heads)}.
FID of so few samples is too large, by about as much for all, which brings ratios nearer to 1: intervals are those of pairs, 95 %. Searches smaller than the default ones:
{_settings(result["search"])}. The best training-free samplers were {", ".join(f"`{name.replace('_', ':', 1)}`" for name in free)}.

## The default search over the best training-free sampler

FID over that of the best **peer**, chosen in each kind of features by itself. Wanted at most {", ".join(f"{v:g} at {k}" for k, v in TUNED_TARGETS.items())}; {_met(cells, unseen, budgets)}

{tables[0]}
Over the best of all training-free samplers, ours included:

{tables[1]}
What is above the teacher's FID ({teacher}), over the same of the best training-free sampler; wanted at 5 at most 0.3:

{tables[2]}
FID itself:

{values}
## Ingredients

The way to the best candidate is how far the result goes from the start: all of it, unless held-out noise shows harm in the features of the loss or of the selection.

{verdicts}
{_mixture(result.get("mixture", {}))}"""


def in_short() -> str:
    """The table of the page about tuning: the default search over the best training-free samplers, in unseen features."""
    parts = []
    for model, file in FILES.items():
        result = load(file)
        if result is None:
            continue
        cells, unseen = result["cells"], unseen_of(result)
        looked = [space for space in result["features"] if space not in unseen]
        rows = []
        for k in sorted(int(name.split()[-1]) for name in cells if name.startswith("default ")):
            cell = cells[f"default {k}"]
            rows.append(
                [
                    k,
                    *(
                        ", ".join(f"{cell[space][key][0]:.2f}" for space in unseen)
                        for key in ("over the peer", "over the best")
                    ),
                    ", ".join(f"{cell[space]['over the best'][0]:.2f}" for space in looked),
                    _short_verdict(cell.get("verdict", "")),
                ]
            )
        head = [
            "evaluations",
            f"over the best of diffusers, in {', '.join(unseen)}",
            "over the best training-free one, ours included",
            f"the same in {', '.join(looked)}, which the search looked with",
            "its own verdict",
        ]
        parts.append(f"`{model}`, {result['n']} samples:\n\n{table(head, rows)}")
    return "\n".join(parts)


def ingredients(nfe: int = 5) -> str:
    """The table of the page about tuning: the default search, and with one ingredient more or less."""
    result = load(FILES["fashion"])
    assert result is not None
    cells, spaces = result["cells"], result["features"]
    heads = [f"{space}, {role}" for space, role in zip(spaces, result["roles"], strict=True)]
    names = [name for name in cells if name.endswith(f" {nfe}") and not name.startswith("ggdm")]
    names.sort(key=lambda name: (not name.startswith("default"), name))
    rows = [
        [
            f"`{name} {nfe}`, no search",
            *(f"{result['free'][f'{name} {nfe}'][space]:.3g}" for space in spaces),
            "",
        ]
        for name in ("profile", "auto")
    ]
    rows += [
        [
            name.rpartition(" ")[0],
            *(f"{cells[name][space]['FID']:.3g}" for space in spaces),
            f"{cells[name].get('CPU seconds', math.nan):.0f}",
        ]
        for name in names
    ]
    rows.append(
        ["the teacher", *(f"{cells[names[0]][space]['teacher FID']:.3g}" for space in spaces), ""]
    )
    return table(["search", *heads, "CPU seconds"], rows)


def searched_ggdm() -> str:
    """Returns the tables of GGDM+PRED+TIME, searched here, beside the ratios that DDSS states."""
    found = [result for file in FILES.values() if (result := load(file)) is not None]
    parts = [part for result in found if (part := _searched_ggdm(result))]
    if not parts:
        return (
            "Searched here: not measured yet: `python benchmarks/tune.py table --variants ggdm`.\n"
        )
    return f"""Searched here: FID, and its ratio to that of the best of three strides of DDIM with 95 % interval. Wanted: the paper's {", ".join(f"{v:.2f} at {k}" for k, v in DDSS_RATIOS.items())}.
GGDM starts from DDIM, with KID in the features of the loss (60 steps of 32; the paper's 50,000 of 512); roles are those of the default search.

{"".join(parts)}"""


def _searched_ggdm(result: Mapping[str, Any]) -> str:
    cells = result["cells"]
    searched = sorted(
        (int(cell.split()[-1]), cell.rpartition(" ")[0])
        for cell in cells
        if cell.startswith("ggdm ")
    )
    rows = []
    for k, name in [*searched, *((k, "default") for k in dict.fromkeys(k for k, _ in searched))]:
        cell = cells.get(f"{name} {k}", {})
        shown = [
            f"{cell[space]['FID']:.3g}: {_over(cell[space].get('over DDIM'))}"
            if space in cell
            else ""
            for space in result["features"]
        ]
        title = name.replace("ggdm", "GGDM+PRED+TIME, KID").replace("default", "gs, the default")
        seconds = f"{cell.get('CPU seconds', math.nan):.0f}"
        rows.append([k, title, *shown, seconds, _short_verdict(cell.get("verdict", ""))])
    rows.sort(key=lambda row: row[0])
    if not rows:
        return ""
    heads = [f"{f}, {r}" for f, r in zip(result["features"], result["roles"], strict=True)]
    return f"""`{result["model"]}`, {result["n"]} samples:

{table(["evaluations", "search", *heads, "CPU seconds", "verdict of the search itself"], rows)}
"""


def _over(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _ratio(cell: Mapping[str, Any], key: str, against: str) -> str:
    if cell.get(key) is None:
        return ""
    value, low, high = cell[key]
    if high - low > WIDEST:
        return "not resolved"
    return f"{value:.2f} ({low:.2f} to {high:.2f}), {cell[against].split(':')[-1].split('_')[-1]}"


def _met(cells: Mapping[str, Any], unseen: Sequence[str], budgets: Sequence[int]) -> str:
    """Returns in words in how many unseen features the wanted ratios hold."""
    parts = []
    for k, wanted in TUNED_TARGETS.items():
        if k not in budgets:
            parts.append(f"at {k} not measured")
            continue
        values = [cells[f"default {k}"][space]["over the peer"][0] for space in unseen]
        parts.append(
            f"at {k} in {sum(v <= wanted for v in values)} of the {len(values)} unseen ones"
        )
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

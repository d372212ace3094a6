"""What a search brings, and what its ingredients do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from result_pages.parts import load, origin, table

TUNED_TARGETS = {4: 0.35, 5: 0.5, 6: 0.6, 10: 0.9}
"""What the FID of a tuned sampler over that of the best training-free sampler of a peer should be at most."""


WIDEST = 3.0
"""The widest interval of a ratio that is shown: a wider one has a divisor near 0."""


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

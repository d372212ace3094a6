"""Students of one, two and four evaluations beside solvers and tuned samplers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from result_pages.parts import SAMPLED, interval, load, origin, table

FILES = {"fashion": "distill", "cifar10": "distill-cifar10"}
"""The file of results of each model."""

SEEN = {
    "fashion": """The second features are those of the student's loss. The first its loss did not see, but the noise levels
of its corrector were chosen with them, in part on these very samples. Random features and wavelets nothing looked with.""",
    "cifar10": """The second features are those of the student's loss; the others nothing looked with: all settings, the levels of the corrector too, are those of `fashion`.""",
}
"""What students have seen of the features."""


def students() -> str:
    """What students give at each budget, on each model."""
    parts = ["# Students of one, two and four evaluations\n"]
    for model in SAMPLED:
        result = load(FILES[model])
        parts.append(f"## `{model}`\n")
        parts.append(
            f"Not measured yet: `python benchmarks/distill.py quality --name {model}`.\n"
            if result is None
            else _table(model, result)
        )
    parts.append(options_of_flow_maps())
    parts.append(
        "How students are trained, what they cost, where they fail: [distilling](../distilling.md); students of several frames: [DSNO](dsno.md).\n"
    )
    return "\n".join(part for part in parts if part)


def _table(model: str, result: Mapping[str, Any]) -> str:
    about, cells = result["about"], result["cells"]
    many = max(cells, key=lambda name: cells[name]["cost"])
    base = cells[many]
    looks = list(base["fid"])
    rows = [
        [
            name.removeprefix("student "),
            f"{row['cost']:.3g}",
            f"{1e3 * row['seconds']:.0f}",
            *(interval(row["fid"][key], 3 if base["fid"][key][0] < 1 else 2) for key in looks),
            f"{row['recall'][0]:.3f}",
            f"{row['rms']:.3f}",
            f"{row['right']:.2f}",
        ]
        for name, row in cells.items()
    ]
    head = [
        "sampler",
        "evaluations",
        "CPU ms",
        *(f"FID, {key}" for key in looks),
        "recall",
        "RMS",
        "right",
    ]
    return f"""{origin(about)}; {about["n"]:,} samples from the same noise. An evaluation is {about["FLOPs"] / 1e9:.2g} GFLOP; CPU ms is the time of one sample alone on one thread, the median of runs beside other work.
The last columns: recall, RMS to `{about["rms to"]}`, and the share of samples that a classifier finds of the requested class. {SEEN[model]}

{table(head, rows)}
{_verdict(cells, many, looks)}"""


def _verdict(cells: Mapping[str, Any], many: str, looks: list[str]) -> str:
    """Returns in words whether one, two and four evaluations are below what they should be below."""
    finished = [name for name in cells if name.startswith("student ") and name.endswith(", 1")]
    lines = []
    for one in finished:
        title = one.removesuffix(", 1")
        ways = [one, *(name for k in (2, 4) if (name := f"{title}, {k}") in cells)]
        base = cells[many]
        ratio = " / ".join(f"{cells[one]['fid'][k][0] / base['fid'][k][0]:.2f}" for k in looks)
        below = []
        for name, others in (
            (one, _at(cells, ("tuned",), 4)),
            *((later, [earlier]) for earlier, later in itertools.pairwise(ways)),
            (ways[-1], _at(cells, ("tuned", "profile", "auto"), 4)),
        ):
            for other in others:
                held = [
                    key
                    for key in looks
                    if cells[name]["fid"][key][0] < cells[other]["fid"][key][0]
                ]
                below.append(
                    f"{name.removeprefix(title + ', ')} below {other.removeprefix(title + ', ')} in {len(held)}"
                )
        kept = cells[one]["recall"][0] / base["recall"][0]
        lines.append(
            f"- `{title.removeprefix('student ')}`: one evaluation over {many} (wanted: at most 1.5) {ratio}; recall {kept:.2f} of that; of the {len(looks)} kinds of features, {', '.join(below)}."
        )
    return "\n".join(lines) + "\n"


def _at(cells: Mapping[str, Any], kinds: tuple[str, ...], nfe: int) -> list[str]:
    """Returns the samplers of some kinds with a budget."""
    return [name for name in cells if name.split()[0] in kinds and name.split()[1] == str(nfe)]


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
    return f"""## Options of flow maps

Options of the trainer of flow maps, one by one: {about["steps"]} steps of 32 trajectories each from the first stage of `fashion-1step`, the same trajectories in the same
order ({origin(about)}; {about["n"]} samples, the same noise for all; each FID has an interval of up to ± {half:.1f} of its own, of which the rows share most).

{table(["option", "CPU seconds a step", *(f"{nfe}: FID / robust / recall" for nfe in budgets)], rows)}"""

"""Students of several frames of a small teacher: what temporal blocks, labels and drawn frames give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from result_pages.parts import BENCHMARKS, load, origin, table

from fewstep.base.files import read_json

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""The runs of each student, one for each seed."""

COUNTS = (1, 2, 4, 8)
"""The numbers of frames of the table; students are judged at all but the first."""
WITHIN = 1.15
"""How near errors at several numbers of frames should be to each other, and to those of students of one number."""

LABELS = ", published labels"
MORE = ("dsno-long", "dsno-28")
"""The files of more frames, and of larger images."""

DRAWN = ("dsno", "dsno, 2 to 8 frames")
"""The students with drawn frames."""


def section() -> str:
    """Returns the section of DSNO's page."""
    short, more = load("dsno"), longer_runs()
    if short is None:
        return (
            "Temporal blocks on a small teacher: not measured yet: `python benchmarks/dsno.py`.\n"
        )
    about, cells = short["about"], short["cells"]
    seeds = len(cells["endpoint"])
    return f"""## Temporal blocks, on a small teacher

{origin(about)}

A teacher of {about["parameters"]:,} parameters ({about["size"]} x {about["size"]} images) and {about["trajectories"]:,} trajectories, the same for all; {about["frames"]:,} trained frames each, {"one seed" if seeds == 1 else f"means over {seeds} seeds ± their deviation"}.
A frame is one pass of the network, so a student of M frames has seen 1/M as many trajectories. Errors are squared, over the variance of the target, on {about["heldout"]} held-out
trajectories; the cost of an evaluation is in those of `endpoint`. `dsno` draws 1 to 4 frames. Published labels: a frame's own time, with weights up to 10,000.

{students(short)}
{"".join(map(_longer, more))}{_verdicts(cells, more)}
### A solver from a frame

Error of the sample when `unipc3` goes on from a frame with 1 to 4 evaluations; in brackets the solver alone, with as many evaluations in all and with as many FLOPs (rounded up).

{continued(short)}"""


def students(result: Mapping[str, Any]) -> str:
    """Returns the table of errors of students."""
    cells: Cells = result["cells"]
    one = cells["endpoint"][0]["flops"]
    rows = []
    for name, found in cells.items():
        known = found[0]["frames"]
        at = [_spread(found, str(m)) if str(m) in known else "" for m in COUNTS]
        distance = mean([run["frechet"] for run in found])
        rows.append(
            [name, f"{found[0]['flops'] / one:.2g}", *at, f"{distance:.2f}", _before(found)]
        )
    head = ["student", "cost", *(f"M = {m}" for m in COUNTS), "Fréchet", "frames before, of 4"]
    return table(head, rows)


def _longer(result: Mapping[str, Any]) -> str:
    """Returns the table of more frames, or of larger images."""
    about = result["about"]
    seeds = len(result["cells"]["endpoint"])
    times = about["frames"] / _former_frames()
    return f"""{about["size"]} x {about["size"]} images, {about["parameters"]:,} parameters, {about["trajectories"]:,} trajectories, {about["frames"]:,} frames ({times:.3g} times those of the student of
four frames that was trained on `fashion` before), {seeds} seed{"s" * (seeds > 1)}: {origin(about)}

{students(result)}
"""


def longer_runs() -> list[dict[str, Any]]:
    """Returns the results of more frames or larger images that there are."""
    return [found for name in MORE if (found := load(name)) is not None]


def _former_frames() -> int:
    """Returns the frames that the recipe of the first student of several frames trains."""
    recipe = read_json(BENCHMARKS.parent / "recipes" / "fashion-path.json", what="recipe")
    return recipe["steps"] * recipe["batch_size"] * recipe["frames"]


def _verdicts(cells: Cells, more: Sequence[Mapping[str, Any]]) -> str:
    """Returns what the errors say of numbers of frames and of temporal blocks."""
    paper = read_json(BENCHMARKS / "published.json", what="published figures")["dsno"]["fid"]
    lines = [_invariance(cells)]
    for found in more:
        about = found["about"]
        lines.append(
            _invariance(
                found["cells"], f"{about['size']} x {about['size']}, {about['frames']:,} frames: "
            )
        )
        if {"folded, 4 frames", "dsno, 4 frames"} <= set(found["cells"]):
            lines[-1] += (
                f" Without temporal blocks over with them, four frames: {_gain(found['cells']):.2f}."
            )
    by_labels = _at(cells, f"folded, 4 frames{LABELS}", 4) / _at(cells, "folded, 4 frames", 4)
    lines.append(
        f"- Four frames, error without temporal blocks over that with them: {_gain(cells, LABELS):.2f} with the published labels (FID in the paper: "
        f"{paper['without temporal blocks, L1'] / paper['DSNO, L1']:.2f}), {_gain(cells):.2f} with the present ones, which alone divide the error of `folded` by {by_labels:.2f}.\n"
    )
    return "\n".join(lines)


def _invariance(cells: Cells, title: str = "") -> str:
    """Returns how near errors at 2, 4 and 8 frames are to each other, and to those of students of one number."""
    parts = []
    for name in DRAWN:
        if name not in cells:
            continue
        own = [_at(cells, name, m) for m in COUNTS[1:]]
        over = [
            f"{_at(cells, name, m) / _at(cells, f'dsno, {m} frames', m):.2f} at {m}"
            for m in COUNTS[1:]
            if f"dsno, {m} frames" in cells
        ]
        parts.append(
            f"`{name}`: {max(own) / min(own):.3f} between them, {', '.join(over)} over a student of that number alone"
        )
    return f"- {title}errors at 2, 4 and 8 frames (wanted: at most {WITHIN}): {'; '.join(parts)}."


def continued(result: Mapping[str, Any]) -> str:
    """Returns the table of samples that a solver goes on with from a frame."""
    cells, alone = result["cells"], result["solver"]
    one, rows = cells["endpoint"][0]["flops"], list[list[str]]()
    after = next(iter(cells[DRAWN[0]][0]["continued"].values()))
    for name, runs in cells.items():
        frame_cost = runs[0]["flops"] / one / runs[0]["own"]
        for key in runs[0].get("continued", {}):
            count, frame = map(int, key.split())
            if name != DRAWN[0] and count != 2:
                continue
            shown = []
            for n in map(int, after):
                error = mean([run["continued"][key][str(n)] for run in runs])
                equal = math.ceil(frame_cost * count + n)  # in favour of the solver alone
                shown.append(f"{error:.3f} ({alone[str(1 + n)]:.3f}, {alone[str(equal)]:.3f})")
            rows.append([f"{name}: {frame} of {count}", *shown])
    return table(["frame", *(f"+ {n}" for n in after)], rows)


def _values(found: Sequence[Mapping[str, Any]], count: str) -> list[float]:
    return [run["frames"][count][-1] for run in found]


def _spread(found: Sequence[Mapping[str, Any]], count: str) -> str:
    values = _values(found, count)
    more = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{more}"


def _before(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the errors of the frames before the sample at M = 4."""
    rows = [run["frames"]["4"][:-1] for run in found if "4" in run["frames"]]
    return ", ".join(f"{mean(column):.3f}" for column in zip(*rows, strict=True))


def _at(cells: Cells, name: str, count: int) -> float:
    return mean(_values(cells[name], str(count)))


def _gain(cells: Cells, labels: str = "") -> float:
    return _at(cells, f"folded, 4 frames{labels}", 4) / _at(cells, f"dsno, 4 frames{labels}", 4)


def in_short() -> str:
    """Returns the table of the page about distilling."""
    result = load("dsno")
    assert result is not None
    return f"{students(result)}\n{_verdicts(result['cells'], longer_runs())}\n{continued(result)}"

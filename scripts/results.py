"""Writes docs/results: one page for each question, its tables from benchmarks/results/*.json.

Usage: python scripts/results.py (or: make results)

No figure is typed here: what a page says in figures comes from a JSON file, which a script under benchmarks/
has written, and ``tests/test_results.py`` fails where page and file differ. A file that is not there leaves a
line that names the script. The pages are written by the modules of ``scripts/result_pages``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fewstep.base.files import write_atomic

ROOT = Path(__file__).parent.parent
PAGES_FOLDER = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

from blocks import filled  # noqa: E402
from result_pages import errors, first, frames, papers, quality, running, students, tuning  # noqa: E402

QUESTIONS = {
    "deciding": "Measure, tune or distill: what does each cost and give?",
    "distance": "How near to the model's own solution, on which networks, beside whom?",
    "quality": "What FID does that give on grey images of clothes?",
    "quality-cifar10": "What FID does that give on photographs?",
    "solvers": "Which of all solvers, ours and the peers'?",
    "speed": "What does it cost beside the network? Does a long run stay flat?",
    "faults": "What survives kills, damage, full disks?",
    "pipelines": "Which pipelines of diffusers work?",
    "tuning": "What does a search bring?",
    "tuning-cifar10": "What does a search bring on photographs?",
    "deis": "DEIS: do the orders and the ingredients hold?",
    "ddss": "DDSS: do its ratios hold, and what beats it?",
    "students": "What do students of 1, 2 and 4 evaluations give?",
    "dsno": "DSNO: what are students of one evaluation worth?",
    "accelerated": "Accelerated DDIM and DDPM: do the rates hold?",
}
"""The question of each page but the first."""

PAGES: dict[str, Callable[[], str]] = {
    "index": partial(first.index, QUESTIONS),
    "deciding": first.deciding,
    "distance": errors.distance,
    "quality": quality.quality,
    "quality-cifar10": partial(quality.quality, "cifar10"),
    "solvers": quality.solvers,
    "speed": running.speed,
    "faults": running.faults,
    "pipelines": running.pipelines,
    "tuning": tuning.tuning,
    "tuning-cifar10": partial(tuning.tuning, "cifar10"),
    "deis": papers.deis,
    "ddss": papers.ddss,
    "students": students.students,
    "dsno": papers.dsno,
    "accelerated": papers.accelerated,
}
"""The writer of each page."""

BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "results"): first.readme,
    ("docs/choosing.md", "defaults"): errors.tables,
    ("docs/tuning.md", "tuned"): tuning.in_short,
    ("docs/tuning.md", "ingredients"): tuning.ingredients,
    ("docs/distilling.md", "students"): students.students_in_short,
    ("docs/distilling.md", "frames"): frames.in_short,
}
"""The writer of each table in a page that people write, by file and name of the block."""


def with_blocks(file: str) -> str:
    """Returns a page that people write with its tables made again."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for (where, name), write in BLOCKS.items():
        text = filled(text, name, write()) if where == file else text
    return text


def main() -> None:
    """Writes all pages, and the tables in others."""
    for name, write in PAGES.items():
        write_atomic(PAGES_FOLDER / f"{name}.md", write())
        print(f"wrote docs/results/{name}.md")
    for file in dict.fromkeys(file for file, _ in BLOCKS):
        write_atomic(ROOT / file, with_blocks(file))


if __name__ == "__main__":
    main()

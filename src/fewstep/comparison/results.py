"""The numbers of a comparison as JSON, and what to do with them next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.comparison.running import Comparison
from fewstep.comparison.scores import to_json
from fewstep.comparison.store import FORMAT, VERSION, Cell
from fewstep.comparison.verdicts import Verdict, measure_of, pareto


@dataclass(frozen=True)
class Told:
    """What only the caller knows, for the report.

    Attributes:
        model: The model, as the commands name it.
        data: The data, as the commands name it; empty if none was given.
        command: The command that was given.
        notes: Further settings to list, name and value.
    """

    model: str
    data: str = ""
    command: str = ""
    notes: Sequence[tuple[str, str]] = field(default_factory=tuple)


def all_numbers(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    told: Told,
    when: str,
) -> dict[str, Any]:
    """Returns every number of a comparison as JSON."""
    measure = measure_of(comparison)
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": when,
        "command": told.command,
        "versions": versions(),
        "model": told.model,
        "data": told.data or None,
        **{"question": dict(comparison.question), "notes": dict(told.notes)},
        "measure": measure,
        "reference": comparison.reference.to_json(),
        "cells": [cell.to_json() for cell in comparison.cells],
        "refused": [
            {"sampler": name, "nfe": nfe, "reason": reason}
            for name, nfe, reason in comparison.refused
        ],
        "verdicts": [
            {
                "nfe": verdict.nfe,
                "best": verdict.best.name,
                "ties": [cell.name for cell in verdict.ties],
                "behind": {
                    cell.name: to_json(more)
                    for cell, more in zip(verdict.order, verdict.behind, strict=True)
                },
                "recipe": recipes[verdict.nfe][1].name if verdict.nfe in recipes else None,
            }
            for verdict in verdicts
        ],
        "pareto": [
            {"sampler": cell.name, "nfe": cell.nfe} for cell in pareto(comparison, measure)
        ],
    }


def next_commands(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    told: Told,
) -> list[tuple[str, str]]:
    """Returns what to do with the result: a sentence and a command each."""
    made = []
    for nfe, (_, path) in sorted(recipes.items())[:1]:
        command = [
            "fewstep",
            "sample",
            told.model,
            "--recipe",
            str(path),
            "--out",
            f"samples-{nfe}",
        ]
        made.append((f"Draw samples with the best at {nfe} evaluations:", shlex.join(command)))
    analyze = ["fewstep", "analyze", told.model, *(["--data", told.data] if told.data else [])]
    made.append(
        (
            "See where the error that is left comes from:",
            shlex.join([*analyze, "--out", "analysis"]),
        )
    )
    least = verdicts[0].nfe
    tune = ["fewstep", "tune", told.model, "--nfe", str(least), "--family", "gs"]
    tune += ["--objective", "endpoint", "--out", f"tuned-{least}.json"]
    made.append(
        (
            f"Fit coefficients to this model at {least} evaluations, and compare again:",
            shlex.join(tune),
        )
    )
    return made


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those that decide the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"fewstep": __version__}
    for name in ("torch", "diffusers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

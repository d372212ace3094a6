"""The numbers of a comparison as JSON, and commands for next steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.comparison.running import Comparison
from fewstep.comparison.scores import estimate_record
from fewstep.comparison.store import FORMAT, VERSION, Cell
from fewstep.comparison.verdicts import Verdict, measure_of, pareto
from fewstep.loading import EMBEDDED
from fewstep.reporting.commands import command


@dataclass(frozen=True)
class Invocation:
    """The arguments of a comparison's command, for its report and the next commands.

    Attributes:
        model: The model, as in the command.
        data: The data, as in the command; empty if none was given.
        command: The whole command.
        class_labels: The class labels, as in the command.
        prompt: The text of a text-to-image model.
        device: The device, unless it is the default.
    """

    model: str
    data: str = ""
    command: str = ""
    class_labels: str | None = None
    prompt: str | None = None
    device: str | None = None

    @property
    def notes(self) -> dict[str, str]:
        """Further settings to list."""
        named = {"class labels": self.class_labels, "prompt": self.prompt}
        return {name: value for name, value in named.items() if value is not None}


def all_numbers(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    recipes: dict[int, tuple[Cell, Path]],
    invocation: Invocation,
    when: str,
) -> dict[str, Any]:
    """Returns all numbers of a comparison as a JSON object."""
    measure = measure_of(comparison)
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": when,
        "command": invocation.command,
        "versions": versions(),
        "model": invocation.model,
        "data": invocation.data or None,
        **{"question": dict(comparison.question), "notes": invocation.notes},
        "measure": measure,
        "reference": comparison.reference.to_record(),
        "cells": [cell.to_record() for cell in comparison.cells],
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
                    cell.name: estimate_record(more)
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
    invocation: Invocation,
) -> list[tuple[str, str]]:
    """Returns commands for next steps, each with a sentence."""
    model, guidance = invocation.model, comparison.question["guidance"]
    if not invocation.command:
        return []  # from Python: there is no name of the model for a command
    conditions = {"class_labels": invocation.class_labels, "device": invocation.device}
    commands = []
    for nfe, (_, path) in sorted(recipes.items())[:1]:
        commands.append(
            (
                f"Draw samples with the best at {nfe} evaluations:",
                command(
                    "sample",
                    model,
                    recipe=path,
                    prompt=invocation.prompt,
                    **conditions,
                    out=f"{comparison.store.folder}-samples",
                ),
            )
        )
    if invocation.prompt is not None:
        return commands  # the other commands have no prompts
    # For an embedded name only statistics of its images ship; the analysis needs the images.
    statistics = invocation.data in EMBEDDED and not Path(invocation.data).exists()
    commands.append(
        (
            "See where the remaining error comes from:",
            command(
                "analyze",
                model,
                data=None if statistics else invocation.data or None,
                guidance=guidance,
                **conditions,
                out=f"{comparison.store.folder}-analysis",
            ),
        )
    )
    least = verdicts[0].nfe
    commands.append(
        (
            f"Fit a sampler to this model at {least} evaluations, and compare again:",
            command(
                "tune",
                model,
                nfe=least,
                family="gs",
                objective="endpoint",
                guidance=guidance,
                **conditions,
                out=f"{comparison.store.folder}-tuned-{least}.json",
            ),
        )
    )
    return commands


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those that affect the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    known = {"fewstep": __version__}
    for name in ("torch", "diffusers"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known

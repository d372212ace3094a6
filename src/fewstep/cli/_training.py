"""Shared code of the commands that train: resumable runs, and the final picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewstep.base.files import read_json
from fewstep.base.runs import difference
from fewstep.cli._common import draw

PICTURE = "samples.png"
SHOWN = 40


def begin(
    out: Path,
    recipe: Any,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    *,
    finished: bool,
    overwrite: bool,
) -> int:
    """Returns the step at which a run is resumed, 0 if it is new.

    With ``overwrite`` the files of a finished run, or of one that is damaged or has another recipe or other
    inputs, are deleted first.
    """
    from fewstep.training.checkpoints import is_intact

    damaged = overwrite and not is_intact(out)
    state = None if damaged else _checkpoint(out)
    other = state is not None and state.get("recipe") != json.loads(json.dumps(asdict(recipe)))
    if state is not None and "inputs" in state:
        other = other or difference(state["inputs"], inputs) is not None
    if overwrite and (finished or other or damaged):
        for name in names:
            (out / name).unlink(missing_ok=True)
        return 0
    step = (state or {}).get("step")
    return step if isinstance(step, int) else 0


def _checkpoint(out: Path) -> dict[str, Any] | None:
    if not (out / "checkpoint.json").exists():
        return None
    state = read_json(out / "checkpoint.json", what="checkpoint")
    return state if isinstance(state, dict) else {}


def kept_step(out: Path) -> str | None:
    """Returns in words the step of an interrupted run's checkpoint."""
    step = (_checkpoint(out) or {}).get("step")
    return f"the checkpoint of step {step} is saved" if step else None


def picture_of(sampler: Any, *, classes: int | None, seed: int, title: str) -> bytes:
    """Returns a PNG of samples, with the classes in turn."""
    from fewstep.reporting.plots import picture

    cond = {"class_labels": [i % classes for i in range(SHOWN)]} if classes else {}
    buffer = io.BytesIO()
    samples = draw(sampler, range(SHOWN), seed=seed, cond=cond)
    decode = getattr(sampler.denoiser, "decode", None)
    shown = samples if decode is None else decode(samples)
    picture(shown, title=title).save(buffer, "PNG")
    return buffer.getvalue()

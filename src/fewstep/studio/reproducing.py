"""The Python and the command lines that make the same samples as the studio."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fewstep.reporting.commands import command
from fewstep.studio.settings import (
    FitRequest,
    Reproduction,
    SampleRequest,
    SamplerSettings,
    keywords,
)

PROFILE = "profile.json"
"""The file that the commands write the measured profile to."""


def fit_reproduction(
    request: FitRequest, budgets: list[int], labels: list[int] | None
) -> Reproduction:
    """Returns the Python and the command that measure the same profile.

    Arguments:
        request: The request.
        budgets: Its numbers of evaluations.
        labels: Its class labels, one for each trajectory.
    """
    cond = _conditions(labels, request.prompt)
    given = {"n": request.n, "seed": request.seed, "guidance": request.guidance, **cond}
    python = [*_loading(request.model, request.device)]
    python.append(f"profile = fewstep.fit(denoiser, {tuple(budgets)!r}{keywords(given)})")
    line = command(
        "fit",
        request.model,
        nfe=",".join(map(str, budgets)),
        n=request.n,
        seed=request.seed,
        guidance=_exact(request.guidance),
        class_labels=request.class_labels or None,
        prompt=request.prompt or None,
        device=_device(request.device),
        out=PROFILE,
    )
    return Reproduction("\n".join(python), (line,))


def sample_reproduction(
    request: SampleRequest,
    settings: SamplerSettings,
    labels: list[int] | None,
    measured: Reproduction | None = None,
) -> Reproduction:
    """Returns the Python and the commands that make the samples of one sampler.

    Arguments:
        request: The request.
        settings: The settings of the sampler.
        labels: Its class labels, one for each sample.
        measured: How the profile of this session was measured, if the sampler uses it.
    """
    model = settings.source if settings.kind == "student" else request.model
    options = settings.parsed_options() if settings.kind in ("solver", "student") else {}
    by_name = settings.kind == "solver"
    common: dict[str, Any] = {"nfe": settings.nfe, "seed": request.seed}
    common["guidance"] = settings.guidance
    source: dict[str, Any] = {}
    if by_name:
        source = {"solver": settings.solver or None, "grid": settings.grid or None}
    elif settings.kind in ("recipe", "profile"):
        source = {settings.kind: settings.source or PROFILE}

    first = list(_loading(model, request.device))
    arguments: dict[str, Any] = {**source, "options": options, **common}
    text = keywords({**arguments, **_conditions(labels, settings.prompt)})
    commands: tuple[str, ...] = ()
    if settings.kind == "profile" and not settings.source and measured is not None:
        first = measured.python.splitlines()
        text = text.replace(f"profile={PROFILE!r}", "profile=profile")
        commands = measured.commands
    python = [*first, f"samples = fewstep.sample(denoiser, {request.n}{text})"]
    line = command(
        "sample",
        model,
        **source,
        **{**common, "guidance": _exact(settings.guidance)},
        option=[f"{key}={_value(value)}" for key, value in options.items()],
        class_labels=settings.class_labels or None,
        prompt=settings.prompt or None,
        device=_device(request.device),
        n=request.n,
        out="samples",
    )
    return Reproduction("\n".join(python), (*commands, line))


def _loading(model: str, device: str) -> tuple[str, ...]:
    place = keywords({"device": _device(device)})
    return ("import fewstep", "", f"denoiser = fewstep.load({model!r}{place})")


def _device(device: str) -> str | None:
    return None if device == "auto" else device


def _conditions(labels: list[int] | None, prompt: str) -> Mapping[str, Any]:
    shown: Any = labels
    if labels and len(set(labels)) == 1:
        shown = labels[0]
    return {"class_labels": shown, "prompt": prompt or None}


def _exact(value: float | None) -> str | None:
    """Returns a number as text without a loss of digits."""
    return None if value is None else repr(value)


def _value(value: Any) -> str:
    """Returns the value of an option as :func:`fewstep.base.options.parse_options` reads it."""
    return value if isinstance(value, str) else json.dumps(value)

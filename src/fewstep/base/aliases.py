"""The names that other libraries have for solvers and grids: one table, shown by ``fewstep solvers`` and ``grids``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

COMFY, KDIFF, DIFFUSERS = "ComfyUI", "k-diffusion", "diffusers"

EQUAL, NEAR, NONE = "equal", "nearest", "none"
"""How an entry matches a foreign name: equal numbers, the nearest method, or no counterpart."""


@dataclass(frozen=True)
class Alias:
    """A name of another library.

    Attributes:
        kind: ``"solver"`` or ``"grid"``.
        name: Its name in that library.
        ours: The entry of the registry; empty if there is none.
        options: The options with which it is equal to theirs.
        where: The libraries that have the name.
        match: Whether the two are equal (a test compares them), ours is the nearest, or there is none.
        note: The difference, or why there is none; empty if they are equal.
    """

    kind: Literal["solver", "grid"]
    name: str
    ours: str
    options: Mapping[str, Any] = field(default_factory=dict)
    where: tuple[str, ...] = (COMFY,)
    match: str = EQUAL
    note: str = ""


BOTH = (COMFY, KDIFF)

ALIASES: tuple[Alias, ...] = (
    Alias("grid", "normal", "normal", note="with the ends of the model"),
    Alias("grid", "linspace", "normal", where=(DIFFUSERS,), note="rounded to timesteps"),
    Alias("grid", "sgm_uniform", "sgm-uniform"),
    Alias("grid", "simple", "simple"),
    Alias("grid", "trailing", "simple", where=(DIFFUSERS,), match=NEAR, note="equal where K divides N; theirs rounds, ours rounds down"),
    Alias("grid", "ddim_uniform", "leading", note="where K divides N; else theirs has a step more"),
    Alias("grid", "karras", "karras", {"to_zero": True}, (COMFY, KDIFF, DIFFUSERS)),
    Alias("grid", "exponential", "exponential", {"to_zero": True}, (COMFY, KDIFF, DIFFUSERS)),
    Alias("grid", "polyexponential", "polyexponential", {"to_zero": True}, BOTH),
    Alias("grid", "beta", "beta"),
    Alias("grid", "beta57", "beta", {"alpha": 0.5, "beta": 0.7}),
    Alias("grid", "linear_quadratic", "linear-quadratic"),
    Alias("grid", "kl_optimal", "kl-optimal", {"to_zero": True}),
    Alias("grid", "bong_tangent", "bong-tangent"),
    Alias("grid", "vp", "uniform", where=(KDIFF,), note="on the schedule vp-linear, to_zero=True"),
    Alias("grid", "AlignYourStepsScheduler", "ays", where=(COMFY,)),
    Alias("grid", "ModelSamplingSD3", "flow-shift", where=(COMFY,), note="with the scheduler simple"),
    Alias("grid", "ModelSamplingFlux", "dynamic-shift", where=(COMFY,), note="with the scheduler simple"),
    Alias("grid", "laplace", "logistic", match=NEAR, note="quantiles of a Laplace distribution of log sigma, ours of a logistic one"),
    Alias("grid", "GITSScheduler", "", match=NONE, note="a table of times for one model: measure one with fewstep.fit"),
)  # fmt: skip


def aliases_of(kind: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Returns the aliases of a registry: foreign name → (entry, options)."""
    return {row.name: (row.ours, row.options) for row in ALIASES if row.kind == kind and row.ours}

r"""The request of a caller: a solver with a budget, or a plan, a recipe, a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from fewstep.diffusion.grids import GRIDS, TimeGrid
from fewstep.plans.plan import Plan
from fewstep.solvers import SOLVERS
from fewstep.solvers.base import Solver

UNSET: Final = None
"""The value of a field that was not given. ``None`` is no field's value, so given values differ from defaults."""


class Contradiction(ValueError):
    """A request with arguments that contradict each other or the sampler."""


@dataclass(frozen=True)
class SamplerRequest:
    """The sampler that a caller of :func:`fewstep.sample` or another entry point describes, unresolved.

    Fields that were not given are :data:`UNSET` (``None``), never a default value.
    :func:`fewstep.resolve` decides defaults and ``"auto"`` and checks for contradictions.

    Attributes:
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"``, or a solver. A name that another library has for it
            becomes ours, with the options that it stands for; so does that of a grid.
        nfe: The number of network evaluations; or
        steps: the number of steps.
        grid: A name in :data:`fewstep.GRIDS`, ``"auto:FILE"`` (the times of a profile), or a grid.
        head_start: The time above which the Gaussian solution replaces network evaluations.
        options: Options of solver and grid; an option that is ``None`` is not given.
        plan: A plan to run, instead of all of these; or
        recipe: a :class:`fewstep.SamplerRecipe`, or the path of one; or
        profile: a :class:`fewstep.Profile`, or the path of one, measured on the model.

    Raises:
        TypeError: If a value has another type.

    Example:
        >>> request = fewstep.SamplerRequest("ddim", nfe=10, options={"eta": 0.5})
        >>> request.nfe, request.grid
        (10, None)
    """

    solver: str | Solver | None = UNSET
    nfe: int | None = UNSET
    steps: int | None = UNSET
    grid: str | TimeGrid | None = UNSET
    head_start: float | None = UNSET
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = UNSET
    recipe: Any = UNSET
    profile: Any = UNSET

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise TypeError(
                f"options must be a mapping such as {{'eta': 0.5}}, got {self.options!r:.60}"
            )
        given = {str(k): v for k, v in self.options.items() if v is not None}
        for name, registry in (("solver", SOLVERS), ("grid", GRIDS)):
            value = getattr(self, name)
            if isinstance(value, str):
                ours, meant = registry.own(value)
                object.__setattr__(self, name, ours)
                given = {**meant, **given}
        object.__setattr__(self, "options", given)
        expected: dict[str, tuple[tuple[type, ...], str]] = {
            "solver": ((str, Solver), "a name or a solver"),
            "grid": ((str, TimeGrid), "a name or a grid"),
            "head_start": ((int, float), "a time"),
            "plan": ((Plan,), "a Plan"),
        }
        for name, (types, what) in expected.items():
            value = getattr(self, name)
            if value is not UNSET and (not isinstance(value, types) or isinstance(value, bool)):
                raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
        for name in ("nfe", "steps"):
            value = getattr(self, name)
            if value is not UNSET and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"{name} must be a positive integer, got {value!r:.40}")

    @property
    def given(self) -> list[str]:
        """The names of the given fields, options by their own names."""
        names = [item.name for item in fields(self) if item.name != "options"]
        return [*(n for n in names if getattr(self, n) is not UNSET), *self.options]


def as_text(names: list[str]) -> str:
    """Returns names as a text: ``a, b and c``."""
    return " and ".join(", ".join(names).rsplit(", ", 1))

"""What a user of the studio asks for, as values of form fields, and the requests of the library that they are."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fewstep.base.options import parse_options
from fewstep.base.registry import unknown
from fewstep.sampling.request import SamplerRequest

Kind = Literal["solver", "recipe", "profile", "student"]

KINDS: tuple[Kind, ...] = ("solver", "recipe", "profile", "student")
"""The kinds of samplers: by name, of a file, of a measurement, of another model with a built-in sampler."""

MOST_SAMPLERS = 4
"""The most samplers side by side."""

MOST_SAMPLES = 16
"""The most samples of each."""


@dataclass(frozen=True)
class SamplerSettings:
    """The settings of one sampler, as its form has them; what was not given is ``None`` or an empty text.

    Attributes:
        kind: One of :data:`KINDS`.
        solver: The name of a solver, or ``"auto"`` (of kind ``"solver"``).
        grid: The name of a time grid; empty for the solver's own.
        options: Options of solver and grid, ``"eta=0.5 t_end=0.01"``, quoted as in a shell.
        source: The file of a recipe or profile, or the name or folder of a student. Of kind ``"profile"`` an
            empty text is the profile that was measured in this session.
        nfe: The number of network evaluations.
        guidance: The scale of classifier-free guidance.
        class_labels: Class labels as text (:func:`fewstep.base.options.parse_labels`).
        prompt: The text, for a text-to-image model.
    """

    kind: Kind = "solver"
    solver: str = "auto"
    grid: str = ""
    options: str = ""
    source: str = ""
    nfe: int | None = None
    guidance: float | None = None
    class_labels: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("kind of sampler", self.kind, list(KINDS)))
        if self.kind in ("recipe", "student") and not self.source:
            what = "file of the recipe" if self.kind == "recipe" else "student: a name or a folder"
            raise ValueError(f"give the {what}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance!r}")

    def parsed_options(self) -> dict[str, Any]:
        """Returns the options.

        Raises:
            ValueError: If the text is not ``key=value`` pairs.
        """
        try:
            words = shlex.split(self.options)
        except ValueError as error:
            raise ValueError(
                f"the options cannot be read: {error}, got {self.options!r}"
            ) from None
        return parse_options(words)

    def request(self, profile: Any = None) -> SamplerRequest:
        """Returns the request that the library resolves.

        Arguments:
            profile: The profile that was measured in this session, or ``None``.

        Raises:
            ValueError: If a field does not fit.
        """
        if self.kind == "solver":
            return SamplerRequest(
                solver=self.solver or None,
                nfe=self.nfe,
                grid=self.grid or None,
                options=self.parsed_options(),
            )
        if self.kind == "recipe":
            return SamplerRequest(recipe=self.source, nfe=self.nfe)
        if self.kind == "student":
            return SamplerRequest(nfe=self.nfe, options=self.parsed_options())
        if not self.source and profile is None:
            raise ValueError(
                "no profile was measured yet: measure this model, or give the file of one"
            )
        return SamplerRequest(profile=self.source or profile, nfe=self.nfe)


@dataclass(frozen=True)
class SampleRequest:
    """Samplers to run from the same noise.

    Attributes:
        model: The name or folder of the model.
        samplers: Their settings, one to four.
        n: The number of samples of each.
        seed: The seed of all.
        device: The device, as :func:`fewstep.load` takes it.
        reference: Whether the model's many-step solution is computed, to measure distances to it.

    Raises:
        ValueError: If a number is out of range.
    """

    model: str
    samplers: tuple[SamplerSettings, ...]
    n: int = 4
    seed: int = 0
    device: str = "auto"
    reference: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.samplers) <= MOST_SAMPLERS:
            raise ValueError(f"give 1 to {MOST_SAMPLERS} samplers, got {len(self.samplers)}")
        check_number("the number of samples", self.n, 1, MOST_SAMPLES)
        check_number("the seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class FitRequest:
    """A measurement of a model: :func:`fewstep.fit`, and the peers on noise that it has not seen.

    Attributes:
        model: The name or folder of the model.
        nfe: The numbers of evaluations, ``"5,10,20"``.
        n: The number of trajectories.
        seed: The seed of their noise.
        device: The device.
        guidance: The scale of classifier-free guidance.
        class_labels: Class labels as text; empty for all classes in turn.
        prompt: The text, for a text-to-image model.

    Raises:
        ValueError: If a number is out of range.
    """

    model: str
    nfe: str = "5,8,10,15,20"
    n: int = 16
    seed: int = 0
    device: str = "auto"
    guidance: float | None = None
    class_labels: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        check_number("the number of trajectories", self.n, 4, 256)
        check_number("the seed", self.seed, 0, 2**63 - 1)


def check_number(what: str, value: object, low: int, high: int) -> None:
    """Raises ``ValueError`` unless a value is an integer in a range."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{what} must be an integer from {low} to {high}, got {value!r:.40}")


def integer(what: str, value: object) -> int | None:
    """Returns the integer in a form field, ``None`` if it is empty.

    Raises:
        ValueError: If it is something else.
    """
    number = real(what, value)
    if number is None:
        return None
    if number != int(number):
        raise ValueError(f"{what} must be an integer, got {value!s:.40}")
    return int(number)


def required(what: str, value: object) -> int:
    """Returns the integer in a form field.

    Raises:
        ValueError: If it is empty, or something else.
    """
    number = integer(what, value)
    if number is None:
        raise ValueError(f"give {what}")
    return number


def real(what: str, value: object) -> float | None:
    """Returns the finite number in a form field, ``None`` if it is empty.

    Raises:
        ValueError: If it is something else.
    """
    if value is None or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a number, got {value!s:.40}")
    return number


@dataclass(frozen=True)
class Reproduction:
    """The same samples without the studio.

    Attributes:
        python: Lines of Python that end with ``samples``.
        commands: Command lines, to run one after another.
    """

    python: str
    commands: tuple[str, ...] = field(default_factory=tuple)


def keywords(values: Mapping[str, Any]) -> str:
    """Returns keyword arguments as Python text, without those that are ``None`` or empty."""
    return "".join(f", {k}={v!r}" for k, v in values.items() if v is not None and v != {})

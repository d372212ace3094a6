"""Conditions of recorded trajectories: rules for the condition of trajectory i."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.models.conditions import converted

TYPES = {"int64": torch.int64, "float32": torch.float32}
"""The types in which conditions are stored."""

MOST_VALUES = 1_000_000
"""The most values that a rule in a manifest may list; a guard against hostile files."""


class Condition(ABC):
    """The values of one condition for all trajectories."""

    dtype: torch.dtype = torch.int64
    shape: tuple[int, ...] = ()

    @abstractmethod
    def at(self, rows: Sequence[int], *, seed: int, name: str) -> Tensor:
        r"""Returns the values for some trajectories, with shape (B, \*)."""

    @abstractmethod
    def rule(self) -> dict[str, Any]:
        """Returns the rule as a JSON object."""

    def examples(self) -> Tensor:
        """Returns representative values, for a check before the first network evaluation."""
        return self.at([0], seed=0, name="")

    def to_record(self) -> dict[str, Any]:
        """Returns the rule, with the type and shape of its values."""
        return {**self.rule(), "dtype": _name(self.dtype), "shape": list(self.shape)}


@dataclass(frozen=True)
class Constant(Condition):
    """The same number for every trajectory."""

    value: int | float

    def __post_init__(self) -> None:
        if isinstance(self.value, float):
            object.__setattr__(self, "dtype", torch.float32)

    def at(self, rows: Sequence[int], *, seed: int, name: str) -> Tensor:
        return torch.full((len(rows),), self.value, dtype=self.dtype)

    def rule(self) -> dict[str, Any]:
        return {"rule": "constant", "value": self.value}


@dataclass(frozen=True)
class Cycle(Condition):
    """Values in turn: trajectory i has ``values[i % len(values)]``."""

    values: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _labels(self.values))

    def at(self, rows: Sequence[int], *, seed: int, name: str) -> Tensor:
        return torch.tensor([self.values[i % len(self.values)] for i in rows], dtype=torch.int64)

    def rule(self) -> dict[str, Any]:
        return {"rule": "cycle", "values": list(self.values)}

    def examples(self) -> Tensor:
        return torch.tensor(self.values)


@dataclass(frozen=True)
class Uniform(Condition):
    """Values drawn evenly; that of trajectory i depends on (seed, i) and the name alone."""

    values: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _labels(self.values))

    def at(self, rows: Sequence[int], *, seed: int, name: str) -> Tensor:
        places = [
            int(torch.randint(len(self.values), (), generator=generator_at(seed, i, name)))
            for i in rows
        ]
        return torch.tensor([self.values[place] for place in places], dtype=torch.int64)

    def rule(self) -> dict[str, Any]:
        return {"rule": "uniform", "values": list(self.values)}

    def examples(self) -> Tensor:
        return torch.tensor(self.values)


@dataclass(frozen=True, eq=False)
class Given(Condition):
    """A tensor of values, one for each trajectory; the manifest has its checksum."""

    values: Tensor

    def __post_init__(self) -> None:
        values = self.values.detach().cpu()
        exact = values.to(torch.float32 if values.is_floating_point() else torch.int64)
        object.__setattr__(self, "values", exact.contiguous())
        object.__setattr__(self, "dtype", exact.dtype)
        object.__setattr__(self, "shape", tuple(exact.shape[1:]))

    def at(self, rows: Sequence[int], *, seed: int, name: str) -> Tensor:
        return self.values[torch.tensor(rows)]

    def rule(self) -> dict[str, Any]:
        return {"rule": "given", "sha256": hashlib.sha256(self.values.numpy().data).hexdigest()}

    def examples(self) -> Tensor:
        return self.values


def condition(name: str, value: Any, n: int) -> Condition:
    """Returns the rule of a value: of one number or row for all, of n values, or the rule itself.

    Values are converted as those of ``fewstep.sample`` (:func:`fewstep.models.conditions.converted`).

    Raises:
        ValueError, TypeError: If there is none.
    """
    if isinstance(value, Condition):
        return value
    value = converted(name, value)
    if isinstance(value, Tensor) and not value.ndim:
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Constant(value)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the condition {name!r} must be numbers, which a store can hold, got {value!r:.60}"
            " (for texts give their embeddings, a tensor with a row for each trajectory)"
        )
    if value.dtype == torch.bool:
        raise TypeError(f"the condition {name!r} must be numbers, got {value.dtype}")
    if len(value) not in (1, n):
        raise ValueError(
            f"the condition {name!r} has {len(value)} values for {n} trajectories; give one, a value "
            "for each, or a rule (Cycle, Uniform)"
        )
    if value.ndim == 1 and len(value) == 1:
        return Constant(value.item())
    return Given(value.expand(n, *value.shape[1:]))


def from_record(content: Mapping[str, Any]) -> Condition | None:
    """Returns the rule in a manifest; ``None`` for given values, which it does not contain."""
    match content["rule"]:
        case "constant":
            return Constant(content["value"])
        case "cycle":
            return Cycle(tuple(content["values"]))
        case "uniform":
            return Uniform(tuple(content["values"]))
    return None


def check_condition(name: str, content: Any) -> None:
    """Raises ``ValueError`` unless this is a valid condition of a manifest."""
    if not name.isidentifier():
        raise ValueError(f"{name!r:.60} cannot be the name of a condition")
    if not isinstance(content, dict):
        raise ValueError(f"the condition {name!r} must be an object, got {content!r:.60}")
    wanted = {"constant": "value", "cycle": "values", "uniform": "values", "given": "sha256"}
    rule = content.get("rule")
    if not isinstance(rule, str) or rule not in wanted:
        raise ValueError(f"the condition {name!r} has an unknown rule {rule!r:.60}")
    if set(content) != {"rule", "dtype", "shape", wanted[rule]}:
        raise ValueError(f"the condition {name!r} has the keys {sorted(content)!r:.100}")
    shape = content["shape"]
    if (
        not isinstance(content["dtype"], str)
        or content["dtype"] not in TYPES
        or not isinstance(shape, list)
        or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v for v in shape)
        or math.prod(shape) > MOST_VALUES
    ):
        raise ValueError(
            f"the condition {name!r} has an impossible type {content['dtype']!r:.40} or shape "
            f"{shape!r:.60}"
        )
    parsed = None if rule == "given" else from_record(content)
    if parsed is not None and parsed.to_record() != content:
        raise ValueError(f"the condition {name!r} is inconsistent: {content!r:.100}")


def _labels(values: Any) -> tuple[int, ...]:
    labels = tuple(values)
    if not labels or len(labels) > MOST_VALUES:
        raise ValueError(f"a rule needs from 1 to {MOST_VALUES} values, got {len(labels)}")
    if not all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**63 for v in labels):
        raise ValueError(f"the values of a rule are integers, got {values!r:.60}")
    return labels


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

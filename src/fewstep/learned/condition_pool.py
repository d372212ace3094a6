r"""The conditions of a search: values that are assigned to its samples in turn, or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import generator_at
from fewstep.models.conditions import AcceptedConditions, Conditions
from fewstep.models.denoiser import Denoiser


@dataclass(frozen=True)
class ConditionPool:
    """Conditions of which each numbered sample gets one value.

    Attributes:
        parts: The validated values of each condition, as many as were given.
    """

    parts: Mapping[str, Conditions] = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: Denoiser, cond: Mapping[str, Any]) -> ConditionPool:
        """Returns the pool of a model: a list, array or tensor has one value a row, else all share it.

        If nothing is given, a model with classes gets all its classes.

        Raises:
            ValueError, TypeError: As :meth:`Conditions.of`.
        """
        accepts = denoiser.accepts
        classes = accepts.num_classes
        if not cond and classes is not None and "class_labels" in denoiser.null_condition:
            cond = {"class_labels": list(range(classes))}
        accepts.check_names(list(cond))
        one = _One(
            replace(accepts, required=frozenset(), any_of=frozenset()),
            denoiser.null_condition,
            denoiser.device,
        )
        parts: dict[str, Conditions] = {}
        for name, value in cond.items():
            part = Conditions.of(one, _count(name, value), {name: value})
            if part.values:
                parts[name] = part
        return cls(parts)

    def at(self, rows: Sequence[int]) -> dict[str, Any]:
        """Returns the conditions of numbered samples: sample i gets value i modulo their number."""
        return {
            name: part.at([i % part.n for i in rows])[name] for name, part in self.parts.items()
        }

    def drawn(self, n: int, *address: int | str) -> dict[str, Any]:
        """Returns n conditions at random, the same for the same address."""
        values: dict[str, Any] = {}
        for name, part in self.parts.items():
            generator = generator_at(*address, name)
            index = torch.randint(part.n, (n,), generator=generator).tolist()
            values[name] = part.at(index)[name]
        return values

    def groups(self, n: int) -> Tensor | None:
        """Returns the class of each of n numbered samples: that of the condition with the fewest values.

        ``None`` if no condition has more than one value, or its values have fewer than 8 samples each.
        """
        counts = [part.n for part in self.parts.values() if 1 < part.n <= n // 8]
        return torch.arange(n) % min(counts) if counts else None

    def record(self) -> dict[str, Any]:
        """Returns the values as JSON values: themselves if simple, and else a digest."""
        return {name: _record(part.values[name]) for name, part in self.parts.items()}


@dataclass
class _One:
    """A model with conditions, as this module uses it."""

    accepts: AcceptedConditions
    null_condition: Mapping[str, Any]
    device: torch.device


def _count(name: str, value: Any) -> int:
    """Returns the number of values that are given for a condition."""
    if isinstance(value, Mapping):
        counts = {_count(name, inner) for inner in value.values()}
        return max(counts, default=1)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return 1
    if getattr(value, "ndim", 1) == 0:
        return 1
    if not len(value):
        raise ValueError(f"the condition {name!r} has no values to draw from")
    return len(value)


def _record(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim <= 1:
        value = value.tolist()
    values = value if isinstance(value, list) else [value]
    if all(isinstance(v, (int, float, str)) for v in values) and len(values) <= 1000:
        return values
    digest = hashlib.sha256()
    for v in values:
        digest.update(
            v.detach().cpu().contiguous().numpy().tobytes()
            if isinstance(v, Tensor)
            else repr(v).encode()
        )
    return {"values": len(value) if hasattr(value, "__len__") else 1, "sha256": digest.hexdigest()}

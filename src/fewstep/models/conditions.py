r"""Conditions: the arguments of a network besides the state and the time, for n numbered samples.

A condition is a keyword argument of the network: ``class_labels=``, ``prompt=``, ``encoder_hidden_states=``. A user's
value (a number, a list, a numpy array, a tensor on any device) is checked and converted here, once, before the first evaluation;
all other code only slices and repeats the result. In *ready* conditions a tensor with dimensions and a list have one row for each
sample; everything else (a number, a flag, a text, ``None``, a tensor without dimensions) is shared by all samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.base.registry import unknown
from fewstep.models.calling import NetworkCall

LABELS = ("class_labels", "class_label", "labels", "label", "y")
"""The names under which networks take class labels."""


@dataclass(frozen=True)
class AcceptedConditions:
    """The conditions that a network takes.

    Attributes:
        names: Their names; ``None`` if any name is accepted.
        required: The names without a default.
        plain: The names whose numbers are passed unchanged: parameters of the network with a
            number, a flag or a text as default or annotation (``num_frames=16``). Any other integer is
            a label, one for each sample.
        num_classes: The number of classes N, if it is known: labels are then from 0 to N - 1.
        any_of: If not empty, one of these must be given (guidance has nothing to guide otherwise).
        owner: The name of the network, for messages.
    """

    names: frozenset[str] | None = None
    required: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    num_classes: int | None = None
    any_of: frozenset[str] = frozenset()
    owner: str = "the network"

    @classmethod
    def of(
        cls, network: Callable[..., Any], *, num_classes: int | None = None
    ) -> AcceptedConditions:
        """Returns the conditions in the signature of ``network(x, t, **conditions)``."""
        if num_classes is None:
            own = getattr(network, "num_classes", None)
            num_classes = own if type(own) is int and own > 0 else None
        target = network.forward if isinstance(network, nn.Module) else network
        try:
            parameters = list(inspect.signature(target).parameters.values())
        except (TypeError, ValueError):
            return cls(num_classes=num_classes)
        after = parameters[2:] if _takes_two(parameters) else []
        named = [p for p in after if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if open_ended and isinstance(network, NetworkCall):  # it passes conditions on
            return cls.of(network.network, num_classes=num_classes)
        return cls(
            names=None if open_ended else frozenset(p.name for p in named),
            required=frozenset(p.name for p in named if p.default is p.empty),
            plain=frozenset(p.name for p in named if _is_plain(p)),
            num_classes=num_classes,
        )

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ``ValueError`` if a name is not known, or a required one is missing."""
        unknown_names = set(names) - (self.names or frozenset())
        if options := sorted(unknown_names & OPTIONS):
            raise ValueError(
                f"{options[0]} is an option of solvers and grids and no condition; give "
                f"options={{{options[0]!r}: ...}}"
            )
        if self.names is not None and (others := sorted(unknown_names)):
            if not self.names:
                raise ValueError(
                    f"{self.owner} takes no conditions, got {', '.join(others)}; leave them out"
                )
            hint = unknown("condition", others[0], sorted(self.names))
            raise ValueError(f"{self.owner} takes no condition {others[0]!r}. {hint}")
        if self.names is None and (others := sorted(set(names) & ARGUMENTS)):
            raise ValueError(
                f"this function has no argument {others[0]}, and {self.owner} takes any condition; leave "
                f"{others[0]} out, or, if it is a condition, name it in the network's signature"
            )
        if self.any_of and not any(name in self.any_of for name in names):
            raise ValueError(
                f"guidance needs a condition, one of: {', '.join(sorted(self.any_of))}"
            )
        if missing := sorted(self.required - set(names)):
            if missing[0] in ARGUMENTS | {"guidance"}:
                raise ValueError(_renamed(missing[0]))
            raise ValueError(
                f"{self.owner} needs the condition {missing[0]!r}; give {missing[0]}=..., one value "
                "or one for each sample"
            )

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an argument of sampling is given that is the network's condition too.

        Arguments:
            given: The values of arguments; ``None`` means not given.
        """
        for name, value in given.items():
            if value is not None and name in (self.names or ()):
                raise ValueError(_renamed(name))


def _renamed(name: str) -> str:
    return (
        f"{name!r} is a condition in the network's signature and an argument of fewstep.sample as well, which "
        "would not reach the network; give the condition another name: Denoiser.wrap(lambda x, t, "
        f"{name}_condition: network(x, t, {name}={name}_condition), ...)"
    )


OPTIONS = frozenset(
    {
        "statistics",
        "t_start",
        "t_end",
        "to_zero",
        "times",
        "strength",
        "power",
        "rho",
        "eta",
        "lam",
        "lower_final",
    }
)
"""Options of solvers and grids, which a network that takes any keyword would take for conditions, in silence."""

ARGUMENTS = frozenset(
    "solver nfe steps plan recipe profile grid head_start options force seed first batch_size save keep "
    "brownian compile overwrite progress dtype image mask noise".split()
)
"""Arguments that ``sample``, ``steps``, ``record`` or ``fit`` have and another of them lacks; the same."""


def _takes_two(parameters: Sequence[inspect.Parameter]) -> bool:
    return len(parameters) >= 2 and all(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters[:2]
    )


def _is_plain(parameter: inspect.Parameter) -> bool:
    kinds = (bool, int, float, str)
    annotation = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    words = set(annotation.replace("|", " ").split())
    return isinstance(parameter.default, kinds) or bool(words & {k.__name__ for k in kinds})


class Conditioned(Protocol):
    """The part of a denoiser that conditions need."""

    accepts: AcceptedConditions
    null_condition: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        ...


@dataclass(frozen=True)
class Conditions:
    """The validated conditions of n numbered samples.

    Attributes:
        n: The number of samples.
        values: The ready conditions of all of them.
        device: The device of the model.
        first: The number of the first sample.
    """

    n: int
    values: Mapping[str, Any]
    device: torch.device
    first: int = 0

    @classmethod
    def of(
        cls, denoiser: Conditioned, n: int, cond: Mapping[str, Any], *, first: int = 0
    ) -> Conditions:
        r"""Validates and converts the conditions of n samples.

        ====================================  =====================================================
        given                                 what the network gets for B samples
        ====================================  =====================================================
        an integer; a number with a null      a tensor (B), int64 or float32
        numbers in a list, a numpy array      a tensor (B, \*); integers int64, floats float32
        a tensor, on any device               the same, on the model's device, with its own dtype
        texts in a list, other objects        a list of B
        one text with a null condition        a list of B
        another text, float, flag, ``None``   the same, shared by all samples
        ====================================  =====================================================

        A list, array or tensor has one row, which is repeated, or n.

        Arguments:
            denoiser: The model: the names it takes, its classes, its null conditions.
            n: The number of samples.
            cond: The conditions as the user gave them.
            first: The number of the first sample.

        Raises:
            ValueError: If a name is unknown or missing, a number of rows is neither 1 nor n, or a
                label is not an integer or not one of the classes.
            TypeError: If a value cannot be converted.
        """
        accepts, null = denoiser.accepts, denoiser.null_condition
        # A condition that has a null value and is None is left out.
        cond = {k: v for k, v in cond.items() if not (v is None and k in null)}
        accepts.check_names(list(cond))
        values: dict[str, Any] = {}
        for name, value in cond.items():
            values[name] = _spread(name, converted(name, value), n, accepts, null)
            _check_labels(name, values[name], accepts, null)
        return cls(n, values, denoiser.device, first)

    def at(self, rows: Sequence[int], device: torch.device | str | None = None) -> dict[str, Any]:
        """Returns the ready conditions of some samples by their numbers, on the model's device or another."""
        device = self.device if device is None else torch.device(device)
        start = self.first
        if isinstance(rows, range):
            rows = range(rows.start - start, rows.stop - start, rows.step)
        elif start:
            rows = [i - start for i in rows]
        return {k: _moved(_rows(v, rows), device) for k, v in self.values.items()}


def select(cond: Mapping[str, Any], rows: Sequence[int] | Tensor) -> dict[str, Any]:
    """Returns ready conditions for some rows of their batch."""
    numbers = rows.tolist() if isinstance(rows, Tensor) else rows
    return {name: _rows(value, numbers) for name, value in cond.items()}


def repeat(cond: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Returns ready conditions with each row repeated, copies next to each other."""
    return {name: _repeated(value, times) for name, value in cond.items()}


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ready conditions of two parts of a batch, concatenated."""
    return {name: _joined(value, second[name]) for name, value in first.items()}


def is_label(name: str, null: Mapping[str, Any]) -> bool:
    """Returns whether a condition is a class label: by its name, or by an integer null value."""
    return type(null.get(name)) is int or name in LABELS


def converted(name: str, value: Any) -> Any:
    """Returns a user's value with numbers in lists and arrays as tensors, texts as a list, others unchanged.

    Raises:
        ValueError, TypeError: If it is empty, ragged, or neither real numbers nor texts.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_quantized:
            raise TypeError(f"the condition {name!r} must be real numbers, got {value.dtype}")
        return value
    if isinstance(value, Mapping):
        return {key: converted(f"{name}[{key!r}]", inner) for key, inner in value.items()}
    if hasattr(value, "__array__"):
        return _from_array(name, value)
    if isinstance(value, (list, tuple, range)):
        return _from_list(name, list(value))
    if isinstance(value, complex):
        raise TypeError(f"the condition {name!r} must be real numbers, got {value!r}")
    return value


def _from_array(name: str, value: Any) -> Any:
    import numpy as np

    array = np.asarray(value)
    if array.dtype.kind in "USO":
        return converted(name, array.tolist())
    if array.dtype.kind not in "biuf":
        raise TypeError(f"the condition {name!r} must be real numbers, got {array.dtype}")
    if not array.ndim:
        return array.item()
    # Copied: an array may be read-only or have negative strides. A float is a float32, as in a list.
    kind = np.float32 if array.dtype.kind == "f" else array.dtype
    if array.dtype.kind in "iu" and array.ndim == 1:
        kind = np.int64
    return torch.from_numpy(array.astype(kind, copy=True))


def _from_list(name: str, values: list[Any]) -> Any:
    if not values:
        raise ValueError(f"the condition {name!r} has no values")
    parts = [converted(name, v) for v in values]
    if all(isinstance(v, (bool, int, float)) for v in parts):
        if any(isinstance(v, bool) for v in parts) and not all(isinstance(v, bool) for v in parts):
            raise TypeError(f"the condition {name!r} mixes flags and numbers: {values!r:.60}")
        return torch.tensor(parts)
    if all(isinstance(v, Tensor) for v in parts):
        if len({v.shape for v in parts}) > 1:
            raise ValueError(
                f"the condition {name!r} has rows of different shapes: "
                f"{', '.join(str(tuple(v.shape)) for v in parts[:4])}"
            )
        return torch.stack(parts)
    return parts


def _spread(
    name: str, value: Any, n: int, accepts: AcceptedConditions, null: Mapping[str, Any]
) -> Any:
    """One row for each sample, or a value that all share."""
    if value is None:
        return value  # a condition that is left out
    if isinstance(value, Mapping):
        return {k: _spread(f"{name}[{k!r}]", v, n, accepts, {}) for k, v in value.items()}
    if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
        if len(value) not in (1, n):
            raise ValueError(
                f"the condition {name!r} has {len(value)} values for {n} samples; give 1 or {n}"
            )
        if len(value) == n:
            return value
        return value * n if isinstance(value, list) else value.expand(n, *value.shape[1:])
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() and value.dtype != torch.bool
    if name in null or is_label(name, null) or (whole and name not in accepts.plain):
        # One value for each sample: guidance appends the null value for each.
        if isinstance(value, Tensor):
            return value.expand(n)
        number = isinstance(value, (bool, int, float))
        return torch.full((n,), value) if number else [value] * n
    return value


def _check_labels(
    name: str, value: Any, accepts: AcceptedConditions, null: Mapping[str, Any]
) -> None:
    """Raises unless labels are among the classes, if those are known."""
    none = null.get(name)
    classes = accepts.num_classes
    if not is_label(name, null) or (classes is None and type(none) is not int):
        return
    if value is None and name not in accepts.required:
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be integers, got {value!r:.60}")
    if value.ndim > 1 and type(none) is not int and value.shape[1:] == (classes,):
        return  # one-hot, or weights of the classes
    if value.ndim != 1:
        raise ValueError(
            f"{name} must be one integer or {len(value)}, got shape {tuple(value.shape)}"
        )
    if value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {value.dtype}")
    if classes is None or value.is_meta:
        return
    low, high = int(value.min()), int(value.max())
    outside = (value < 0) | (value >= classes)
    if type(none) is int:
        outside &= value != none
    if bool(outside.any()):
        extra = f" ({none} is no class)" if type(none) is int else ""
        raise ValueError(
            f"{name} must be from 0 to {classes - 1}{extra}, got {low} to {high}"
            if low != high
            else f"{name} must be from 0 to {classes - 1}{extra}, got {low}"
        )


def _rows(value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, Mapping):
        return {k: _rows(v, rows) for k, v in value.items()}
    if isinstance(value, list):
        return [value[i] for i in rows]
    if isinstance(value, Tensor) and value.ndim:
        if isinstance(rows, range) and rows.step == 1:
            return value[rows.start : rows.stop]
        return value[torch.tensor(list(rows), device=value.device, dtype=torch.int64)]
    return value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _repeated(value: Any, times: int) -> Any:
    if times == 1:
        return value
    if isinstance(value, Mapping):
        return {k: _repeated(v, times) for k, v in value.items()}
    if isinstance(value, list):
        return [item for item in value for _ in range(times)]
    if isinstance(value, Tensor) and value.ndim:
        return value.repeat_interleave(times, 0)
    return value


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return {k: _joined(v, second[k]) for k, v in first.items()}
    if isinstance(first, list):
        return [*first, *second]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([first, second])
    return first


def classes_in_turn(denoiser: Any, n: int, cond: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the conditions; for a class-conditional model without given classes, all in turn."""
    accepts, labels = denoiser.accepts, "class_labels"
    named = accepts.names is not None and labels in accepts.names
    if cond or not named or not accepts.num_classes:
        return dict(cond)
    return {labels: [i % accepts.num_classes for i in range(n)]}

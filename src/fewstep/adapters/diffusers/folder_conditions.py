"""The conditions of a network that diffusers saved: the known and the missing ones, with hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fewstep.models.conditions import AcceptedConditions


@dataclass(frozen=True)
class FolderConditions(AcceptedConditions):
    """The conditions of a loaded network, with their descriptions.

    Attributes:
        meaning: The description and source of each condition, for messages.
        instead_of_prompt: The conditions that replace ``prompt``: all of them, or none with a prompt.
        no_prompt: Why there is no ``prompt``, if there is none.
    """

    meaning: Mapping[str, str] = field(default_factory=dict)
    instead_of_prompt: frozenset[str] = frozenset()
    no_prompt: str | None = None

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ``ValueError`` if a name is not known, one is missing, or two contradict each other."""
        given = set(names)
        if "prompt" in given and self.no_prompt is not None:
            raise ValueError(f"{self.no_prompt}; {self._give(sorted(self.instead_of_prompt))}")
        replacing = given & self.instead_of_prompt
        if "prompt" in given and replacing:
            raise ValueError(
                f"prompt= and {sorted(replacing)[0]}= say the same thing; give one of them"
            )
        missing = self.required - given
        if self.no_prompt is not None or replacing:
            missing |= self.instead_of_prompt - given
        if missing:
            raise ValueError(f"{self.owner} needs more: {self._give(sorted(missing))}")
        super().check_names(names)

    def _give(self, names: Sequence[str]) -> str:
        return "give " + ", and ".join(
            f"{name}= ({self.meaning[name]})" if name in self.meaning else f"{name}="
            for name in names
        )


def check_shape(name: str, value: object, shape: Sequence[int | None], n: int) -> Tensor:
    """Returns a condition that has n rows of a shape; ``None`` stands for any length.

    Raises:
        ValueError: If it does not have it.
    """
    fits = isinstance(value, Tensor) and value.ndim == len(shape) + 1 and len(value) == n
    if isinstance(value, Tensor) and fits:
        if all(
            want is None or got == want for got, want in zip(value.shape[1:], shape, strict=True)
        ):
            return value
    got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:60]
    want = ", ".join("any" if size is None else str(size) for size in (n, *shape))
    raise ValueError(f"{name} must be a tensor with shape ({want}), got {got}")

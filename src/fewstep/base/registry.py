"""Read-only registries: one mapping from name to factory, with near-match errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    r"""A read-only mapping from a public name to whatever makes the thing.

    Arguments:
        kind: What the entries are, in the words of an error message (``"solver"``).
        entries: The mapping itself, in the order in which it is listed to users.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        """Returns the entry of that name.

        Raises:
            ValueError: If there is no such entry; the message has the nearest names.
        """
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(unknown(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {list(self._entries)})"


def unknown(kind: str, name: object, known: Mapping[str, object] | list[str]) -> str:
    """Returns the message for an unknown name: what was got, near matches, what is known."""
    names = sorted(known)
    text = f"{name!s:.60}".lower().replace("_", "-")
    lowered = {known_name.lower(): known_name for known_name in names}
    close = [lowered[c] for c in difflib.get_close_matches(text, lowered, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown {kind} {name!r:.60}.{hint} Known: {', '.join(names)}."

"""Read-only registries: one mapping from name to factory, with near-match errors."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    r"""A read-only mapping from a public name to a factory.

    Arguments:
        kind: The kind of the entries, for error messages (``"solver"``).
        entries: The mapping itself, in the order of listings.
        aliases: The names of other libraries for entries, with their options. They are not listed;
            an entry of the same name has precedence.
        without: The names of other libraries that have no counterpart, each with the reason.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T],
        aliases: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
        without: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._without = dict(without or {})
        self._entries = dict(entries)
        self._aliases = {k: v for k, v in (aliases or {}).items() if k not in self._entries}
        for name, (ours, _) in self._aliases.items():
            if ours not in self._entries:
                raise AssertionError(f"the alias {name!r} is of {ours!r}, which is not a {kind}")

    def own(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """Returns the name of the entry, and the options of an alias."""
        if isinstance(name, str) and name not in self._entries and name in self._aliases:
            return self._aliases[name]
        return name, {}

    def __getitem__(self, name: str) -> T:
        """Returns the entry of that name.

        Raises:
            ValueError: If there is no such entry; the message has the nearest names.
        """
        try:
            ours, options = self.own(name)
            entry = self._entries[ours]
        except (KeyError, TypeError):
            if isinstance(name, str) and name in self._without:
                raise ValueError(
                    f"There is no {self.kind} for {name!r}: {self._without[name]}. "
                    f"Known: {', '.join(sorted(self._entries))}."
                ) from None
            known, others = list(self._entries), list(self._aliases)
            raise ValueError(unknown(self.kind, name, known, others)) from None
        return functools.partial(entry, **options) if options else entry  # type: ignore[return-value,operator]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in self._aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {list(self._entries)})"


def unknown(
    kind: str,
    name: object,
    known: Mapping[str, object] | list[str],
    aliases: Iterable[str] = (),
) -> str:
    """Returns the message for an unknown name: the name, near matches, the known names."""
    names = sorted(known)
    spelled = {_spelling(known_name): known_name for known_name in [*aliases, *names]}
    text = _spelling(f"{name!s:.60}")
    close = [spelled[c] for c in difflib.get_close_matches(text, spelled, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"Unknown {kind} {name!r:.60}.{hint} Known: {', '.join(names)}."


def _spelling(name: str) -> str:
    """Returns a name as ours are written: "DPM++ 2M Karras" is dpmpp-2m-karras."""
    return name.strip().lower().replace("+", "p").replace("_", "-").replace(" ", "-")


def check_options(
    what: str,
    build: Callable[..., Any],
    options: Iterable[str],
    *,
    without: Iterable[str] = (),
) -> None:
    """Raises unless a factory has these options, and all required ones are given.

    Arguments:
        what: The name of the object, for the message (``"solver 'ddim'"``).
        build: The factory.
        options: The given names.
        without: Arguments of the factory that are not options.

    Raises:
        TypeError: With the unknown or missing option, and the known ones.
    """
    parameters = _parameters(build)
    options = list(options)
    if parameters is None:
        return
    known = {name: needed for name, needed in parameters.items() if name not in set(without)}
    listed = f"its options: {', '.join(known)}" if known else "it has none"
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{what} has no option {name!r}; {listed}.{hint}")
    missing = [name for name, needed in known.items() if needed and name not in options]
    if missing:
        raise TypeError(f"{what} needs the option {missing[0]!r}; {listed}")


def check_numbers(what: str, build: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises unless the options of a factory whose defaults are numbers are numbers.

    Arguments:
        what: The name of the object, for the message.
        build: The factory.
        options: The given options.

    Raises:
        TypeError: With the first option that is none.
    """
    for name in _numbers(build) & options.keys():
        value = options[name]
        if isinstance(value, (bool, str, complex)) or not hasattr(value, "__float__"):
            raise TypeError(
                f"the option {name!r} of the {what} must be a number, got {value!r:.40}"
            )


@functools.lru_cache(maxsize=256)
def _numbers(build: Callable[..., Any]) -> frozenset[str]:
    """Returns the parameters of a factory whose defaults are numbers."""
    parameters = inspect.signature(build).parameters.values()
    return frozenset(p.name for p in parameters if type(p.default) in (int, float))


@functools.lru_cache(maxsize=256)
def _parameters(build: Callable[..., Any]) -> dict[str, bool] | None:
    """Returns the parameters of a factory and whether each is required; ``None`` if it accepts any."""
    parameters = inspect.signature(build).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default is p.empty for p in parameters}

"""Records: the typed contents of fewstep's JSON files, with their checks.

A file format is a class, which becomes a frozen dataclass::

    class Place(Record, name="fewstep.place", version=1, what="place"):
        title: str
        size: Positive
        tags: list[str] | None = None

The file has ``format`` and ``version`` and then the fields. A field without a default is required; a field
with its default value is omitted. Values in a file are never converted.

A type is ``Any``, ``None``, ``bool``, ``int``, ``float`` (a finite number, so also an integer), ``str``,
``dict`` (any object), ``list[T]``, ``Literal``, a union, or a type with a further :class:`Check`.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from fewstep.base.files import read_json, write_json


class Check(NamedTuple):
    """A condition on a value besides its type.

    Attributes:
        fits: Whether a value of the type fulfils it.
        wanted: Its description, for messages: "a positive integer".
    """

    fits: Callable[[Any], bool]
    wanted: str


MOST = 10**12
"""The largest count in a file; a guard against hostile files."""

Positive = Annotated[int, Check(lambda value: 0 < value <= MOST, "a positive integer")]
"""A count."""

Digest = Annotated[
    str,
    Check(
        lambda value: len(value) == 64 and set(value) <= set("0123456789abcdef"),
        "64 hexadecimal digits",
    ),
]
"""A SHA-256."""

WANTED = {
    Any: "anything",
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    dict: "an object",
    list: "a list",
}


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """A file format, see the module.

    Checks of several fields together belong in ``__post_init__``.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    WHAT: ClassVar[str]

    def __init_subclass__(cls, *, name: str, version: int, what: str) -> None:
        """Declares a format: its name in the file, its version, and its description for messages."""
        cls.FORMAT, cls.VERSION, cls.WHAT = name, version, what
        dataclass(frozen=True, kw_only=True)(cls)

    def to_record(self) -> dict[str, Any]:
        """Returns the JSON object."""
        content: dict[str, Any] = {"format": self.FORMAT, "version": self.VERSION}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if _is_required(field) or value != _default(field):
                content[field.name] = value
        return content

    @classmethod
    def from_record(cls, content: Any) -> Self:
        """Returns the record of a JSON object.

        Raises:
            ValueError: If the object is of another format or version, lacks a field, has an unknown
                one, or one of another type; the message names it.
        """
        what = f"the {cls.WHAT}"
        check_header(content, what, [cls.FORMAT], cls.VERSION)
        kinds = _kinds(cls)
        needed = [field.name for field in fields(cls) if _is_required(field)]  # type: ignore[arg-type]
        if missing := next((name for name in needed if name not in content), None):
            raise ValueError(f"{what} has no {missing!r}")
        values = {k: v for k, v in content.items() if k not in ("format", "version")}
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"{what} has an unknown key {name!r:.60}")
            if not _fits(value, kinds[name]):
                raise ValueError(
                    f"{name!r} of {what} must be {_wanted(kinds[name])}, got {value!r:.60}"
                )
        return cls(**values)

    def save(self, path: str | Path, *, new: bool = False) -> Path:
        """Writes the file atomically and with a checksum; returns its path.

        Raises:
            FileExistsError: If it should be ``new`` and exists.
        """
        return write_json(path, self.to_record(), new=new)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file.

        Raises:
            ValueError: If it is missing, damaged or not of this format; the message names it.
        """
        content = read_json(path, what=cls.WHAT)
        try:
            return cls.from_record(content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{cls.WHAT} {str(path)!r}: {error}") from None


def check_header(content: Any, what: str, names: Sequence[str], version: int) -> None:
    """Raises unless a JSON value is an object of a format and a version: the one reader of both.

    Arguments:
        content: The JSON value.
        what: What it should be, for messages.
        names: The names of the format; the first is the present one.
        version: The version that is read.

    Raises:
        ValueError: If it is not; the message has what it is.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {type(content).__name__}")
    if content.get("format") not in names:
        raise ValueError(f"{what} has the format {content.get('format')!r:.60}, not {names[0]!r}")
    if content.get("version") != version or content["version"] is True:
        raise ValueError(
            f"{what} has version {content.get('version')!r:.20}; this fewstep reads version {version}"
        )


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@functools.cache
def _kinds(cls: type[Record]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}  # type: ignore[arg-type]


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, inner[0]) and all(check.fits(value) for check in inner[1:])
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is Any:
        return True
    if kind is float:
        # The comparison is exact: it refuses NaN and integers too large for a float.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max and not math.isnan(value)
    plain = origin or kind
    return isinstance(value, plain) and (plain is bool or not isinstance(value, bool))


def _wanted(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return inner[-1].wanted
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list and inner[0] is not Any:
        return f"a list, each {_wanted(inner[0])}"
    return WANTED[origin or kind]

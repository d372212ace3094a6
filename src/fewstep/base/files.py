"""Files written whole or not at all, with checksums; no pickle anywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


MOST_NESTED = 64
"""The most levels of nesting that a JSON file may have."""


def write_atomic(path: str | Path, content: bytes | str, *, new: bool = False) -> Path:
    """Writes a file so that it is there whole or not at all: temporary file, fsync, rename.

    Raises:
        FileExistsError: If it should be ``new`` and is there: of many writers one succeeds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: on a shared folder another machine may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except OSError:
        # A file system without hard links: the best that can be done there.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def write_json(path: str | Path, value: Any, *, new: bool = False) -> Path:
    """Writes a JSON file whole; floats round-trip, NaN and infinity are refused."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n", new=new)


def read_json(path: str | Path, *, what: str = "file") -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: If it is missing, unreadable or not JSON; the message names the file.
    """
    try:
        return loads_json(Path(path).read_bytes(), what=f"{what} {str(path)!r}")
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None


def loads_json(text: str | bytes, *, what: str) -> Any:
    """Parses JSON, refusing NaN, infinity, repeated keys and absurd nesting with a clear error."""
    try:
        value = json.loads(
            text,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    layer = [value]
    for _ in range(MOST_NESTED):
        layer = [child for node in layer for child in _children(node)]
        if not layer:
            return value
    # Deeper values would overflow the stack of whoever prints or compares them.
    raise ValueError(f"{what} is not valid JSON: it is nested too deeply")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number that a file may hold")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a file may hold")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} is repeated")
        found[key] = value
    return found


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes a safetensors file whole."""
    from safetensors.torch import save

    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    return write_atomic(path, save(ready, metadata=dict(metadata or {})))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ValueError: If the file is missing or is not safetensors; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"file {str(path)!r} cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"file {str(path)!r} is not a safetensors file: {error}") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file.

    Raises:
        ValueError: If the file is missing or is not safetensors; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"file {str(path)!r} is not a safetensors file: {error}") from None


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

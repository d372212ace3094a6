"""The identity of a user's callable: weights, code and what it refers to, as far as these can be known."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEEPEST = 12
"""The depth of objects within objects to which contents are hashed."""


def callable_digest(value: Callable[..., Any]) -> str:
    """Returns a SHA-256 of a callable, so that a run that is resumed with another one can be refused.

    Of a function the code, the defaults, the closure and the globals that it names, if they are its own
    module's; of a module of torch the weights; of other objects the attributes. Code of libraries is not
    hashed.

    Arguments:
        value: The callable.
    """
    digest = hashlib.sha256()
    for part in _parts(value, {}, DEEPEST):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, seen: dict[int, Any], depth: int) -> Iterator[bytes]:
    """Yields the bytes that stand for a value; ``seen`` are the objects before, each of which counts once."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if id(value) in seen or not depth:
        yield b"..."
        return
    seen[id(value)] = value  # alive, so that no other object gets its number
    yield _name(value).encode()
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        return
    for inner in _contents(value):
        if isinstance(inner, bytes):
            yield inner
        else:
            yield from _parts(inner, seen, depth - 1)


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"


def _contents(value: Any) -> Iterator[Any]:
    """Yields the values that a value consists of."""
    if isinstance(value, types.FunctionType):
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
        yield from (_cell(cell) for cell in value.__closure__ or ())
        names = value.__code__.co_names
        found = [value.__globals__[name] for name in names if name in value.__globals__]
        yield from (v for v in found if _is_own(v, value.__module__))
    elif isinstance(value, types.CodeType):
        yield from (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield from (key, value[key])
    elif isinstance(value, (set, frozenset)):
        yield from sorted(value, key=repr)
    elif isinstance(value, (tuple, list)):
        yield from value
    else:
        yield from _of_object(value)


def _of_object(value: Any) -> Iterator[Any]:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype} {tuple(plain.shape)}".encode()
        yield plain.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, torch.nn.Module):
        yield value.state_dict()
        yield {k: v for k, v in vars(value).items() if isinstance(v, (bool, int, float, str))}
    else:
        yield getattr(type(value), "__call__", None)  # noqa: B004
        yield getattr(value, "__dict__", None)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _is_own(value: Any, module: str) -> bool:
    """Whether a global that a function names belongs to it: a value, or a function of its module."""
    if isinstance(value, (types.ModuleType, type)):
        return False
    return not isinstance(value, types.FunctionType) or value.__module__ == module

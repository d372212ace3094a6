r"""One evaluation of a user's network: handles types and devices, returns one tensor like the state.

Networks return tensors, tuples, dicts, objects with ``.sample`` and twice the channels; they have weights in half, single or double
precision, on another device, and may have been left in training mode. This module handles all of that.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction

logger = logging.getLogger("fewstep")

COMPUTING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types in which networks compute; weights of other types (quantised ones) are ignored."""

NAMES = {
    Prediction.EPS: ("eps", "epsilon", "noise"),
    Prediction.X0: ("x0", "pred_x0", "denoised"),
    Prediction.V: ("v", "velocity"),
    Prediction.SCORE: ("score",),
    Prediction.FLOW: ("flow", "velocity", "v"),
}
"""The keys of a prediction in a dict, besides ``sample``."""


MOST_FOLLOWED = 1000
"""The most objects that are followed in search of the modules of a function."""

PLAIN = (str, bytes, int, float, complex, type(None), Tensor)
"""The types of objects that refer to no module."""

LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy"}) - {"__main__"}
"""The packages whose functions run no modules but those in their arguments."""


class NetworkCall(nn.Module):
    """A module that adapts the arguments of a network and has no layers of its own.

    Attributes:
        network: The network inside.
    """

    network: Any


def innermost(network: Any) -> Any:
    """Returns the network inside of modules that only adapt its arguments."""
    while isinstance(network, NetworkCall):
        network = network.network
    return network


def modules_of(network: Any) -> list[nn.Module]:
    """Returns the modules that a callable visibly runs, those nearest to it first.

    It follows functions, bound methods, :func:`functools.partial` and objects to what they refer to: closures, globals,
    default values, and attributes by the names in their code, through lists and dicts. No code of theirs is run, so a
    module that is created or looked up during an evaluation is not seen.
    """
    found: dict[int, nn.Module] = {}
    # With the objects, as the ids of deleted ones return.
    seen: dict[tuple[int, frozenset[str]], Any] = {}
    waiting: deque[tuple[Any, frozenset[str]]] = deque([(network, frozenset())])
    while waiting and len(seen) < MOST_FOLLOWED:
        value, names = waiting.popleft()
        value = innermost(value)
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif (id(value), names) not in seen and not isinstance(value, PLAIN):
            seen[id(value), names] = value
            waiting.extend(_referred(value, names))
    return list(found.values())


def _referred(value: Any, names: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yields what an object refers to, each with the names of attributes that the code uses of it.

    Arguments:
        value: The object.
        names: The names in the code that it was reached from.
    """
    if isinstance(value, functools.partial):
        names |= _names(value.func)
        for part in (value.func, *value.args, *value.keywords.values()):
            yield part, names
    elif isinstance(value, types.MethodType):
        if _is_of_library(value.__func__):
            return
        names |= _names(value.__func__)
        yield value.__self__, names
        yield value.__func__, names
    elif isinstance(value, types.FunctionType):
        if _is_of_library(value):
            return
        names |= _names(value)
        for name in sorted(names & value.__globals__.keys()):
            yield value.__globals__[name], names
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a name that is not bound yet
                yield cell.cell_contents, names
        for part in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield part, names
    elif isinstance(value, (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
        for part in itertools.islice(parts, MOST_FOLLOWED):
            yield part, names
    elif isinstance(value, types.ModuleType):
        for name in sorted(names & vars(value).keys()):
            if isinstance(part := vars(value)[name], nn.Module):
                yield part, names
    else:
        yield from _attributes(value, names)


def _attributes(value: Any, names: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yields the attributes of an object or a class that code uses, and the functions of its class."""
    is_class = isinstance(value, type)
    own = {} if is_class else getattr(value, "__dict__", {})
    shared = _class_attributes(value if is_class else type(value))
    call = shared.get("__call__")
    if isinstance(call, types.FunctionType) and not is_class:
        names |= _names(call)
        yield call, names
        yield from ((part, names) for part in own.values())  # by whatever name it uses them
    used = names | {"__wrapped__"}  # of what functools caches
    for name in sorted(used & own.keys()):
        yield own[name], names
    for name in sorted((used & shared.keys()) - own.keys()):
        part = shared[name]
        part = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
        if isinstance(part, types.FunctionType):
            yield types.MethodType(part, value), names
        else:
            yield part, names


@functools.lru_cache(maxsize=256)
def _class_attributes(kind: type) -> dict[str, Any]:
    """Returns the attributes of a class and of those that it derives from, unbound; none of a library's."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not _is_of_library(base):
            found.update(vars(base))
    return found


def _is_of_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in LIBRARIES


def _names(function: Any) -> frozenset[str]:
    """Returns the names of globals and attributes in the code of a function and of those inside of it."""
    codes, names = [getattr(function, "__code__", None)], set[str]()
    while codes:
        code = codes.pop()
        if isinstance(code, types.CodeType):
            names.update(code.co_names)
            codes.extend(code.co_consts)
    return frozenset(names)


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Sets modules to eval mode (no dropout, fixed batch norms), and afterwards back to their modes."""
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def computing_dtype(network: Any) -> torch.dtype | None:
    """Returns the type of the first weights of a module; ``None`` for functions and modules without."""
    if not isinstance(network, nn.Module):
        return None
    # Run in each evaluation, where .parameters() is slow to start.
    for module in network.modules():
        for p in module._parameters.values():
            if p is not None and p.dtype in COMPUTING:
                return p.dtype
    return None


class NetworkCaller:
    """Evaluates a network on its device and in its type.

    The state and floating conditions are cast to the type of the network's weights, the output back
    to the state's. Times have at least single precision, unless the network fails with it.

    Arguments:
        network: The network.
        device: Its device; left out, that of the state.
        dtype: The type in which it computes; left out, that of its weights, for modules.
    """

    def __init__(
        self, network: Any, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self._taken: dict[torch.dtype, int] = {}
        # Weak references: a copy of a function runs the same modules, and only the function owns them.
        self._modules = [weakref.ref(m) for m in modules_of(network)]
        owner = getattr(network, "__self__", network)
        self._is_module = isinstance(innermost(owner), nn.Module)

    def modules(self, network: Any) -> list[nn.Module]:
        """Returns the modules that the network, or a copy of it, visibly runs."""
        if isinstance(inner := innermost(network), nn.Module):
            return [inner]
        return [m for ref in self._modules if (m := ref()) is not None]

    def __call__(
        self,
        network: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        cond: Mapping[str, Any],
        *,
        prediction: Prediction,
        training: bool = False,
    ) -> Tensor:
        r"""Returns the prediction, with the shape, type and device of the state.

        Arguments:
            network: The network, or a copy of it.
            x: The state, with shape (B, \*).
            t: The times, with shape (B), float32, float64 or int64.
            cond: The conditions, ready for the batch.
            prediction: The prediction, to select it from a dict.
            training: Whether a module in training mode stays in it.

        Raises:
            ValueError: If the output has another shape, or the network fails for a reason that an
                argument of :meth:`Denoiser.wrap` removes.
        """
        modules = self.modules(network)
        if modules and not training and any(m.training for m in modules):
            with evaluation_mode(modules):
                return self._call(network, x, t, cond, prediction)
        return self._call(network, x, t, cond, prediction)

    def _call(
        self,
        network: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        cond: Mapping[str, Any],
        prediction: Prediction,
    ) -> Tensor:
        if isinstance(network, NetworkCall):  # it evaluates its own network like this
            value = network(x, t, **cond)
        else:
            value = self._evaluate(network, x, t, cond)
        value = model_output(value, x, prediction)
        return value.to(device=x.device, dtype=x.dtype)

    def _evaluate(
        self, network: Callable[..., Any], x: Tensor, t: Tensor, cond: Mapping[str, Any]
    ) -> Any:
        """Evaluates with the first types that the network accepts, and uses these from then on."""
        types = self._types(network, x.dtype, t.dtype)
        first: Exception | None = None
        for place in range(self._taken.get(x.dtype, 0), len(types)):
            dtype, times = types[place]
            conditions = cond
            if dtype != x.dtype or self.device is not None:
                conditions = {k: _cast(v, self.device, dtype) for k, v in cond.items()}
            given = x.to(self.device, dtype), t.to(self.device, times)
            if (
                given[0] is x
                and not torch.compiler.is_compiling()
                and torch.is_inference_mode_enabled()
            ):
                given = x.clone(), given[1]  # writes are not counted in this mode
            version = _version(x)
            try:
                value = network(*given, **conditions)
            except (RuntimeError, IndexError, TypeError) as error:
                first = first or error
                if is_type_error(error) and place + 1 < len(types):
                    continue
                hint = _hint(str(first), t)
                if hint is None:
                    raise
                raise ValueError(f"the network failed: {first}. {hint}") from first
            if given[0] is x and _version(x) != version:  # what was cast is a copy
                raise ValueError(
                    "the network writes to its argument x in place, which the sampler still needs; give it a "
                    "copy: Denoiser.wrap(lambda x, t, **cond: network(x.clone(), t, **cond), ...)"
                )
            if place and x.dtype not in self._taken:
                logger.info("the network takes states in %s and times in %s", dtype, times)
            self._taken[x.dtype] = place
            return value
        raise AssertionError  # the last types return or raise

    def _types(
        self, network: Any, state: torch.dtype, times: torch.dtype
    ) -> list[tuple[torch.dtype, torch.dtype]]:
        """Returns the types of state and times in the order of trial."""
        if self._is_module or self.dtype:
            own = self.dtype or next(map(computing_dtype, self.modules(network)), None) or state
            return _types_to_try(own, (own,), times)
        # A function may cast for itself, and compute with the state in full precision before.
        inside = {computing_dtype(m) for m in self.modules(network)} - {None}
        own = inside.pop() if len(inside) == 1 else state
        return _types_to_try(own, (state,) if own in (None, state) else (state, own), times)


def _version(x: Tensor) -> int:
    """Returns how often a tensor was written to, as far as torch counts that."""
    # torch.compile restores the input of a network that writes to it.
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


@functools.cache
def _types_to_try(
    own: torch.dtype | None, kinds: tuple[torch.dtype, ...], times: torch.dtype
) -> list[tuple[torch.dtype, torch.dtype]]:
    if not times.is_floating_point:
        return [(k, times) for k in kinds]
    wide = torch.float64 if own == torch.float64 else times
    # Half precision rounds times, so it is the last resort.
    types = [(k, wide if k == own else times) for k in kinds] + [(kinds[-1], kinds[-1])]
    return list(dict.fromkeys(types))


def is_type_error(error: Exception) -> bool:
    """Returns whether an error is about tensors of different floating types."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "Long" not in text
        and any(word in text for word in ("dtype", "scalar type", "Input type", "input type"))
    )


def _cast(value: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _cast(v, device, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [_cast(v, device, dtype) for v in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def _hint(error: str, t: Tensor) -> str | None:
    """Returns which argument of ``Denoiser.wrap`` helps against an error, if one does."""
    if "positional argument" in error or "unexpected keyword argument" in error:
        return "It is evaluated as network(x, t, **conditions); wrap a function that takes these around it"
    if "same device" in error:
        return "If the network is on another device, give it: Denoiser.wrap(..., device='cuda')"
    whole = ("Long, Int", "scalar type Long", "used as indices must be", "only integer tensors")
    if t.is_floating_point() and any(text in error for text in whole):
        return (
            "If the network needs integer timesteps, as one with a table of embeddings does, give "
            "Denoiser.wrap(..., integer_times=True)"
        )
    if "dtype" in error or "expected scalar type" in error:
        return (
            "Give the type in which the network computes: Denoiser.wrap(..., dtype=torch.float16)"
        )
    if "index out of range" in error or "out of bounds" in error:
        return (
            "A label or a timestep is outside of the network's table; give num_classes= to "
            "Denoiser.wrap to have labels checked, and to_model_time= if its timesteps are others"
        )
    return None


def model_output(value: Any, x: Tensor, prediction: Prediction) -> Tensor:
    r"""Returns the prediction from a network's return value, with the state's shape.

    That is the tensor itself, the first element of a tuple or list, the attribute ``sample``, or an
    entry of a dict: ``sample``, the name of the prediction, or the only tensor. Of twice the
    channels, (B, 2C, \*), the first half is taken: the second is a learned variance.

    Raises:
        ValueError: If there is none, or its shape is another.
    """
    output = _tensor_in(value, prediction)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the network must return a tensor of the state's shape {tuple(x.shape)}, got "
            f"{_described(value)}; a tuple, a dict or an object with .sample that has one is accepted"
        )
    if not output.is_floating_point():
        raise ValueError(f"the network must return real numbers, got {output.dtype}")
    if output.shape == x.shape:
        return output
    shape, got = tuple(x.shape), tuple(output.shape)
    if output.ndim == x.ndim > 1 and got == (shape[0], 2 * shape[1], *shape[2:]):
        return output[:, : shape[1]]
    raise ValueError(
        f"the network must return a tensor of the state's shape {shape}, got {got}{_shape_hint(shape, got)}"
    )


def _tensor_in(value: Any, prediction: Prediction) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(getattr(value, "sample", None), Tensor):
        return value.sample
    if isinstance(value, Mapping):
        for key in ("sample", *NAMES[prediction]):
            if isinstance(value.get(key), Tensor):
                return value[key]
        tensors = {key: v for key, v in value.items() if isinstance(v, Tensor)}
        if len(tensors) != 1:
            return None
        ((key, only),) = tensors.items()
        others = [kind for kind, names in NAMES.items() if key in names]
        if others:
            raise ValueError(
                f"the network returned {key!r} alone, but it was described as predicting {prediction.value!r}; "
                f"give prediction={others[0].value!r}, or let it return its {prediction.value!r}"
            )
        return only
    return value[0] if isinstance(value, (tuple, list)) and value else None


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, value))
        return f"a {type(value).__name__} with the keys {keys:.100}, none of them 'sample'"
    if isinstance(value, (tuple, list)):
        kinds = ", ".join(type(v).__name__ for v in value)
        return f"a {type(value).__name__} of ({kinds:.100})"
    return type(value).__name__


def _shape_hint(shape: Sequence[int], got: Sequence[int]) -> str:
    batch, *event = shape
    if len(event) > 1 and list(got) == [batch, *event[1:], event[0]]:
        return "; its channels come last: return output.movedim(-1, 1)"
    if list(got) == event:
        return "; the dimension of the batch is missing"
    if len(got) == len(shape) > 1 and list(got[:1]) + list(got[2:]) == [batch, *event[1:]]:
        return (
            f"; it has {got[1]} channels instead of {event[0]}: return those of the prediction "
            "(twice as many are taken for a prediction and a learned variance)"
        )
    return "; check event_shape, and return the prediction alone"

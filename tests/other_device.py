"""A stand-in for another device: tensors that refuse to meet those of the CPU, as CUDA's do.

Their numbers are on the CPU, their ``device`` is called meta. Within :func:`other_device` tensors that are
made on, or moved to, that device are of this kind; :func:`on_other_device` moves a module there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

OTHER = torch.device("meta")
aten = torch.ops.aten

CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""Operations whose integer indices may be on the CPU."""


class OtherTensor(Tensor):
    """A tensor of the other device."""

    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain: Tensor) -> OtherTensor:
        result = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=OTHER,
            requires_grad=plain.requires_grad,
        )
        result.plain = plain.detach()
        return result

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OtherTensor({self.plain})"

    def tolist(self) -> Any:
        return self.plain.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """``torch.tensor(numbers, device="meta")`` leaves the numbers out; here they are moved."""

    def __torch_function__(  # type: ignore[override]
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        literal = func in (torch.tensor, torch.as_tensor)
        if literal and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _leaves(value: Any) -> list[Any]:
    """What arguments hold; torch's own pytree asks twice as much of each."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [value]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    return function(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = _leaves((args, kwargs))
    others = [a for a in flat if isinstance(a, OtherTensor)]
    target = kwargs.get("device")
    if not others and target is None:
        return func(*args, **kwargs)
    if others and func not in CROSSING:
        checked = _leaves((args[0], args[2:], kwargs)) if func in INDEXED else flat
        if func in INDEXED and not isinstance(args[0], OtherTensor):
            checked = flat
        strangers = [
            a
            for a in checked
            if isinstance(a, Tensor) and not isinstance(a, OtherTensor) and a.ndim
        ]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got {OTHER} and cpu"
            )
    by_inner = {id(a.plain): a for a in others}
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = _mapped(lambda a: a.plain if isinstance(a, OtherTensor) else a, (args, kwargs))
    result = func(*args, **kwargs)
    if target is not None:
        stays = torch.device(target) == OTHER
    elif func is aten.copy_.default:
        stays = bool(by_inner) and id(result) in by_inner
    else:
        stays = bool(others)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OtherTensor):
            return value
        if not stays:
            return value
        same = by_inner.get(id(value))
        return OtherTensor(value) if same is None else same

    return _mapped(wrapped, result)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Gives the device; within the block it can be allocated on and moved to."""
    with _Mode(), _Literals():
        yield OTHER


@contextmanager
def plain() -> Iterator[None]:
    """Within the block there is no other device: what is computed on the CPU costs what it costs there."""
    with _disable_current_modes(), _pop_mode_temporarily():
        yield


def both(here: Any, there: Any, work: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Returns what a function returns for a model on the CPU and for the same on the other device."""
    with plain():
        expected = work(here)
    return expected, work(there)


def on_other_device(module: nn.Module) -> nn.Module:
    """Moves parameters and buffers of a module to the other device, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                value = OtherTensor(parameter.detach())
                part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OtherTensor(buffer)
    return module


COPIES = {aten._to_copy.default, aten.copy_.default}


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for a CUDA device: reads, and copies from pageable memory."""

    def __init__(self):
        super().__init__()
        self.events, self.pinned = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):  # there is no pinned memory without CUDA
            self.pinned += 1
            kwargs["pin_memory"] = False
        on_device = any(isinstance(a, OtherTensor) for a in tree_flatten((args, kwargs))[0])
        if func is aten._local_scalar_dense.default and on_device:
            self.events.append("read")
        elif func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else kwargs.get("device")
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            if isinstance(source, OtherTensor) and target not in (None, OTHER):
                self.events.append("read")
            elif not isinstance(source, OtherTensor) and target == OTHER and waits:
                self.events.append("write")
        return func(*args, **kwargs)

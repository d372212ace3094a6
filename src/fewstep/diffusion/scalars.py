r"""Numbers that stand for 0-dimensional tensors, so that the same equations are cheap without gradients.

A solver's equations are arithmetic on single coefficients: :math:`\alpha_s / \alpha_t`, ``torch.expm1(-h)``.
With tensors each operation costs microseconds, a hundred times more than with numbers, and a plan has
thousands of them; tensors are needed only where gradients with respect to times are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def _logsigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _softplus(x: float) -> float:
    return x if x > 20 else math.log1p(math.exp(x))  # the threshold of torch


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else float(torch.tensor(x, dtype=torch.float64).exp())


def _log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


class Scalar(float):
    """A float64 number with the methods and the functions of a 0-dimensional tensor.

    Arithmetic and elementary functions are those of Python. Every other method or function of torch
    works on the tensor that it stands for.
    """

    __slots__ = ()

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return float(self) + other
        return Scalar(float.__add__(self, other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return float(self) - other
        return Scalar(float.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return Scalar(float.__rsub__(self, other))

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, float):
            return Scalar(float.__mul__(self, other))
        if isinstance(other, int):
            return Scalar(float.__mul__(self, float(other)))
        return float(self) * other if isinstance(other, Tensor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return float(self) / other
        # As tensors do, instead of an exception.
        return Scalar(float.__truediv__(self, other)) if other else _by_zero(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return Scalar(float.__rtruediv__(self, other)) if self else _by_zero(other, self)

    def __pow__(self, other: Any, modulo: None = None) -> Any:
        del modulo
        return Scalar(float(self) ** float(other))

    def __neg__(self) -> Scalar:
        return Scalar(float.__neg__(self))

    def __abs__(self) -> Scalar:
        return Scalar(float.__abs__(self))

    def abs(self) -> Scalar:
        return Scalar(float.__abs__(self))

    def neg(self) -> Scalar:
        return -self

    def square(self) -> Scalar:
        return Scalar(float.__mul__(self, self))

    def sqrt(self) -> Scalar:
        return Scalar(_sqrt(self))

    def exp(self) -> Scalar:
        return Scalar(_exp(self))

    def log(self) -> Scalar:
        return Scalar(_log(self))

    def detach(self) -> Scalar:
        return self

    def clamp(self, min: float | None = None, max: float | None = None) -> Scalar:
        low = self if min is None or self >= min else min
        return Scalar(low if max is None or low <= max else max)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.tensor(float(self), dtype=torch.float64), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        own = FUNCTIONS.get(func)
        if own is not None and len(args) == 1 and not kwargs:
            return Scalar(own(args[0]))
        options = {key: _tensors(value) for key, value in (kwargs or {}).items()}
        return func(*_tensors(args), **options)


FUNCTIONS: dict[Callable[..., Any], Callable[[float], float]] = {
    torch.exp: _exp,
    torch.expm1: lambda x: math.expm1(x) if x < 709.0 else math.inf,
    torch.log: _log,
    torch.log1p: lambda x: math.log1p(x) if x > -1 else (-math.inf if x == -1 else math.nan),
    torch.sqrt: _sqrt,
    torch.square: lambda x: x * x,
    torch.abs: abs,
    torch.sin: math.sin,
    torch.cos: math.cos,
    torch.atan: math.atan,
    torch.asinh: math.asinh,
    torch.asin: lambda x: math.asin(x) if abs(x) <= 1 else math.nan,
    torch.sigmoid: lambda x: math.exp(_logsigmoid(x)),
    torch.zeros_like: lambda _: 0.0,
    torch.ones_like: lambda _: 1.0,
    logsigmoid: _logsigmoid,
    softplus: _softplus,
}
"""The functions of torch that need no tensor."""


def _by_zero(above: float, zero: float) -> Scalar:
    if above == 0 or above != above:
        return Scalar(math.nan)
    return Scalar(math.copysign(math.inf, above) * math.copysign(1.0, zero))


def _tensors(value: Any) -> Any:
    if isinstance(value, Scalar):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, (list, tuple)):
        items = [_tensors(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


class Column(Tensor):
    """A float64 vector whose elements are :class:`Scalar`; in all other respects a tensor."""

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _numbers: list[float]

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            return Scalar(self._numbers[index])
        return super().__getitem__(index)


def column(values: Tensor) -> Tensor:
    """Returns a vector whose elements are numbers, unless gradients with respect to it are wanted."""
    if values.requires_grad or isinstance(values, Column):
        return values
    result = torch.Tensor._make_subclass(Column, values)
    result._numbers = values.tolist()
    return result


def vector(values: list[Any]) -> Tensor:
    """Returns the float64 vector of numbers, tensors or both."""
    if all(isinstance(v, float) for v in values):
        return torch.tensor([float(v) for v in values], dtype=torch.float64)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])

"""``torch.compile`` for the networks of a model while it samples; the modules stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewstep.models.denoiser import Denoiser, WrappedNetwork

MODES = ("default", "reduce-overhead", "max-autotune")
"""The modes of ``torch.compile``; the last two use CUDA graphs on CUDA."""

_calls: weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def compiled(denoiser: Denoiser, mode: bool | str | None = True) -> Iterator[None]:
    """Runs the networks of a model compiled within the block.

    A network is compiled in its first evaluation, for each shape of a batch anew at first; later blocks
    in the same process use it again. Predictions are those of the plain network to rounding, not to the bit.

    Arguments:
        denoiser: The model.
        mode: ``True``, or a mode in :data:`MODES`; ``None`` or ``False`` compiles nothing.

    Raises:
        ValueError: If the mode is unknown, the model has no module to compile, or the compiler fails.
    """
    name = check_mode(mode)
    if name is None:
        yield
        return
    networks = networks_of(denoiser)
    if not networks:
        raise ValueError("compile needs a network that is a torch.nn.Module; this model has none")
    before = [network._compiled_call_impl for network in networks]
    try:
        for network in networks:
            network._compiled_call_impl = _compiled_call(network, name)
        yield
    finally:
        for network, call in zip(networks, before, strict=True):
            network._compiled_call_impl = call


def check_mode(mode: bool | str | None) -> str | None:
    """Returns the mode of ``torch.compile`` that ``compile=`` stands for.

    Raises:
        ValueError: If there is no such mode.
    """
    if mode is None or mode is False:
        return None
    name = "default" if mode is True else mode
    if name not in MODES:
        raise ValueError(f"compile must be True or one of {', '.join(MODES)}, got {mode!r:.40}")
    return name


def networks_of(denoiser: Denoiser) -> list[nn.Module]:
    """Returns the modules that a model evaluates, without what only adapts their arguments."""
    modules: dict[int, nn.Module] = {}
    for part in denoiser.modules():
        if isinstance(part, WrappedNetwork):
            modules |= {id(module): module for module in part.networks()}
    return list(modules.values())


def _compiled_call(network: nn.Module, mode: str) -> Callable[..., Any]:
    known = _calls.setdefault(network, {})
    if mode not in known:
        own = weakref.ref(network)

        def plain(*args: Any, **kwargs: Any) -> Any:
            module = own()
            assert module is not None
            return module._call_impl(*args, **kwargs)

        # Late: its import takes a second.
        from torch._dynamo.exc import TorchDynamoException

        call = torch.compile(plain, mode=None if mode == "default" else mode)

        def run(*args: Any, **kwargs: Any) -> Any:
            if mode != "default":
                torch.compiler.cudagraph_mark_step_begin()
            try:
                value = call(*args, **kwargs)
            except TorchDynamoException as error:
                raise ValueError(
                    f"torch.compile failed: {str(error).strip().splitlines()[0]:.200}; leave compile "
                    "out, or look into the log of TORCH_LOGS=dynamo"
                ) from error
            # The next replay of a CUDA graph overwrites its outputs, which multistep solvers keep.
            return value if mode == "default" else tree_map(_cloned, value)

        known[mode] = run
    return known[mode]


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

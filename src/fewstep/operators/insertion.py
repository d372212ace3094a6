r"""Insertion of blocks into a network without changes to its code: submodules and forward hooks.

Frames are folded into the batch, so the network sees (B M, \*). Each host gets its block as a
submodule, ``host.temporal``, and a forward hook that applies it: devices, states, optimisers and
averages see it, and gradient checkpointing, which runs the host, computes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.networks.unet import SmallUNet, Stage
from fewstep.operators.temporal import TemporalConv

BLOCK = "temporal"
"""The name of the block in its host."""


@dataclass(frozen=True)
class Site:
    r"""A module after which a block is inserted.

    Attributes:
        name: The name of the host in the network.
        channels: The channels of its output.
        tokens: Whether it returns (B, L, C) instead of (B, C, \*).
        dims: The dimensions of its output besides batch and channels: 2 for images, 0 for (B, C).
    """

    name: str
    channels: int
    tokens: bool = False
    dims: int = 2

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (self.channels, self.dims))
        if not (whole and 0 < self.channels <= 65_536 and 0 <= self.dims <= 3):
            raise ValueError(
                f"a site has 1 to 65536 channels and 0 to 3 further dimensions, got {self.channels!r:.40} and "
                f"{self.dims!r:.40}"
            )


Sites = Sequence[str] | Sequence[Site] | Callable[[str, nn.Module], bool] | None
"""The sites of blocks: names of modules, sites, or a predicate of name and module; ``None`` for the known sites."""


class TimeAxis:
    """The number of frames, shared by the temporal blocks of a network.

    Arguments:
        network: The network; its blocks may be inserted later.
        frames: The number M of frames.
    """

    def __init__(self, network: nn.Module, frames: int) -> None:
        self.network = network
        self._frames = frames
        self.frames = frames

    @property
    def frames(self) -> int:
        """The number M of frames; an integer, never a tensor."""
        return self._frames

    @frames.setter
    def frames(self, value: int) -> None:
        for block in blocks(self.network).values():
            if isinstance(block, TemporalConv):
                block.set_frames(value)
        self._frames = value


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks that were attached, by the name of their host."""
    return {
        name: module._modules[BLOCK]  # type: ignore[misc]
        for name, module in network.named_modules()
        if getattr(module, "_block_hook", None) is not None
    }


def attach(
    network: nn.Module,
    make: Callable[[Site], nn.Module],
    *,
    sites: Sites = None,
    example: Callable[[nn.Module], Any] | None = None,
    known: Callable[[nn.Module], list[Site]] | None = None,
) -> list[Site]:
    r"""Inserts a block after each site of a network; returns the sites.

    Arguments:
        network: The network, changed in place.
        make: Returns the block of a site; it maps features of the host's output shape to the same shape.
        sites: Names of modules, a predicate of (name, module), or sites, whose channels are then known. Left out,
            the sites known for the network: after every unit of the levels of U-Nets (:class:`SmallUNet`,
            ``UNet2DModel``, ``UNet2DConditionModel``), after every block of ``DiT``.
        example: Evaluates the network once, to infer the channels of the caller's sites.
        known: Returns the sites if they are left out, instead of those above.

    Raises:
        ValueError: If the sites are not known, do not exist, or have a block already.
    """
    if sites is None:
        chosen = (known or known_sites)(network)
    elif isinstance(sites, Sequence) and all(isinstance(site, Site) for site in sites):
        chosen = [site for site in sites if isinstance(site, Site)]
    else:
        chosen = _named(network, sites, example)
    modules = dict(network.named_modules())
    _check_names(modules, [site.name for site in chosen])
    for site in chosen:
        host = modules[site.name]
        if BLOCK in host._modules or hasattr(host, BLOCK):
            raise ValueError(
                f"the module {site.name!r} has a {BLOCK!r} already; call detach(network) first"
            )
    for site in chosen:
        host = modules[site.name]
        like = next(network.parameters(), None)
        block = make(site)
        if like is not None:
            block = block.to(device=like.device, dtype=like.dtype)
        host.add_module(BLOCK, block)
        host._block_hook = host.register_forward_hook(_apply)  # type: ignore[assignment]
    return chosen


def detach(network: nn.Module) -> None:
    """Removes all attached blocks; the network is then as before."""
    for module in list(network.modules()):
        handle = getattr(module, "_block_hook", None)
        if handle is not None:
            handle.remove()
            del module._block_hook
            del module._modules[BLOCK]


def known_sites(network: nn.Module) -> list[Site]:
    """Returns the sites of a network for which they are known.

    Raises:
        ValueError: If they are not.
    """
    kind = type(network).__name__
    if isinstance(network, SmallUNet):
        return [
            Site(name, module.block.conv_out.out_channels)
            for name, module in network.named_modules()
            if isinstance(module, Stage)
        ]
    if kind in ("UNet2DModel", "UNet2DConditionModel"):
        return list(_units(network))
    if kind in ("DiTTransformer2DModel", "Transformer2DModel", "PixArtTransformer2DModel"):
        width = _width(network)
        count = len(network.transformer_blocks)  # type: ignore[arg-type]
        return [Site(f"transformer_blocks.{i}", width, True, 1) for i in range(count)]
    raise ValueError(
        f"the sites of temporal blocks in a {kind} are not known; name its modules: sites=[...] "
        "(see network.named_modules())"
    )


def is_known(network: nn.Module, sites: Callable[[nn.Module], list[Site]] = known_sites) -> bool:
    """Whether a function that returns sites, :func:`known_sites` if left out, knows the network."""
    try:
        sites(network)
    except ValueError:
        return False
    return True


def _width(network: Any) -> int:
    config = network.config
    return int(config.num_attention_heads) * int(config.attention_head_dim)


def _units(network: Any) -> Iterator[Site]:
    """The units of a U-Net of diffusers: the attention after a residual block, or the block."""
    for side in ("down_blocks", "up_blocks"):
        for level, block in enumerate(getattr(network, side)):
            for index, unit in enumerate(block.resnets):
                yield _unit(block, f"{side}.{level}", index, unit)
    middle = network.mid_block
    if middle is not None:
        yield _unit(middle, "mid_block", 0, middle.resnets[0])


def _unit(block: Any, path: str, index: int, unit: Any) -> Site:
    attentions = getattr(block, "attentions", None)
    kind = "resnets"
    if attentions is not None and index < len(attentions) and attentions[index] is not None:
        kind = "attentions"
    return Site(f"{path}.{kind}.{index}", int(unit.out_channels))


def _named(
    network: nn.Module, sites: Any, example: Callable[[nn.Module], Any] | None
) -> list[Site]:
    modules = dict(network.named_modules())
    if callable(sites):
        names = [name for name, module in modules.items() if name and sites(name, module)]
    else:
        names = list(sites)
    _check_names(modules, names)
    if example is None:
        raise ValueError(
            "to infer the channels of sites, give example=, which evaluates the network"
        )
    shapes: dict[str, tuple[int, ...]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            shapes[name] = tuple(_first(output).shape)

        return hook

    handles = [modules[name].register_forward_hook(recorder(name)) for name in names]
    try:
        with torch.no_grad():
            example(network)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in names if name not in shapes]:
        raise ValueError(f"the module {silent[0]!r} is not used by the network")
    return [_site(name, modules[name], shapes[name]) for name in names]


def _check_names(modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(
            f"the network has no module {unknown[0]!r}; see network.named_modules()"
            if unknown
            else "sites names no module of the network"
        )


def _site(name: str, module: nn.Module, shape: tuple[int, ...]) -> Site:
    """Returns the site of a module whose output has a shape."""
    if len(shape) < 2:
        raise ValueError(
            f"the module {name!r} returns {shape}; a site returns features (batch, channels, ...)"
        )
    tokens = len(shape) == 3 and _returns_tokens(module, shape)
    return Site(name, shape[2 if tokens else 1], tokens, len(shape) - 2)


def _returns_tokens(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether an output of three dimensions is (B, L, C), by the last layer that has its channels; else (B, C, L).

    Layers over sequences have the channels first, all others last.
    """
    tokens = True
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)) and layer.out_channels == shape[1]:
            tokens = False
        elif isinstance(layer, nn.Linear) and layer.out_features == shape[2]:
            tokens = True
    return tokens


def _first(output: Any) -> Tensor:
    """Returns the features of a module's output: a tensor, a tuple or an output dataclass."""
    if isinstance(output, Tensor):
        return output
    value = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"a host of a block returns features, got {type(value).__name__}")
    return value


def _apply(module: nn.Module, _args: object, output: Any) -> Any:
    block = module._modules[BLOCK]
    assert block is not None
    if isinstance(output, Tensor):
        return block(output)
    features = block(_first(output))
    if isinstance(output, tuple):
        return (features, *output[1:])
    output[next(iter(output.keys()))] = features
    return output

"""Parts of training runs: checkpoints that resume bit for bit, moving averages, addressed generators."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.files import (
    read_json,
    read_tensors_and_metadata,
    sweep,
    write_json,
    write_tensors,
)
from fewstep.base.runs import difference

CHECKPOINT = "checkpoint"


def generator(*address: int | str) -> torch.Generator:
    """Returns a generator on the CPU that depends on the address alone."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def new_average(network: nn.Module) -> dict[str, Tensor]:
    """Returns the initial moving average of the network's state."""
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


@torch.no_grad()
def update_average(
    average: Mapping[str, Tensor], network: nn.Module, step: int, decay: float
) -> None:
    """Moves an average towards the network; it follows more quickly during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = network.state_dict()
    floating = [key for key, value in weights.items() if value.is_floating_point()]
    # One launch for all tensors: for small networks on a GPU single launches would dominate.
    means, values = [average[k] for k in floating], [weights[k] for k in floating]
    torch._foreach_lerp_(means, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for key in weights.keys() - floating:
        average[key].copy_(weights[key])


def save_checkpoint(
    out: Path,
    about: Mapping[str, Any],
    *,
    step: int,
    loss: float,
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the state of a run after a step: the tensors, and a description with the recipe."""
    sweep(out)
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    metadata = {"step": str(step), "loss": repr(loss)}
    write_tensors(out / f"{CHECKPOINT}.safetensors", tensors, metadata)
    write_json(out / f"{CHECKPOINT}.json", {"step": step, "loss": loss, **about})


def read_checkpoint(out: Path) -> dict[str, Any] | None:
    """Returns the description of the checkpoint in a folder, or ``None`` if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    file = out / f"{CHECKPOINT}.json"
    if not (file.exists() and (out / f"{CHECKPOINT}.safetensors").exists()):
        return None
    state = read_json(file, what="checkpoint")
    if not isinstance(state, dict) or not {"recipe", "step"} <= set(state):
        raise ValueError(f"the checkpoint {str(file)!r} is damaged: it has no recipe or step")
    return state


def check_inputs(out: Path, state: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Checks that a checkpoint is of a run with these inputs: data, teacher, trajectories.

    Checkpoints of early versions, which lack them, are accepted.

    Raises:
        ValueError: If it has other inputs; the message names the first that changed.
    """
    changed = difference(state["inputs"], inputs) if "inputs" in state else None
    if changed is not None:
        raise ValueError(
            f"the folder {str(out)!r} has a run with other inputs ({changed}), at step "
            f"{state['step']}; give those to resume it, --overwrite, or another folder"
        )


def load_checkpoint(
    out: Path,
    *,
    steps: int,
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[int, float]:
    """Loads the state of a run from its checkpoint; returns its step and loss.

    Without an optimiser its moments are not loaded.

    Raises:
        ValueError: If it is damaged or of a longer run.
    """
    file = out / f"{CHECKPOINT}.safetensors"
    tensors, metadata = read_tensors_and_metadata(file)
    # If the process died between the two writes the tensors are newer: they hold their own step.
    try:
        step, loss = int(metadata.get("step", -1)), float(metadata.get("loss", "nan"))
    except ValueError:
        step, loss = -1, math.nan
    if not 0 < step <= steps:
        raise ValueError(f"the checkpoint {str(file)!r} is damaged: it has no step")
    part = lambda prefix: {  # noqa: E731
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
    }
    try:
        network.load_state_dict(part("network."))
        stored = part("average.")
        if missing := sorted(average.keys() - stored.keys()):
            raise KeyError(f"it has no average of {missing[0]}")
        for key, value in stored.items():
            average[key].copy_(value)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer.").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        if optimizer is not None:
            if not moments:
                raise KeyError("it has no state of the optimizer")
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint {str(file)!r} is damaged: {error}") from None
    return step, loss

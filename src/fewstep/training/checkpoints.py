"""Parts of training runs: checkpoints that resume bit for bit, moving averages, addressed generators."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.files import (
    read_json,
    read_tensors_and_metadata,
    write_json,
    write_tensors,
)
from fewstep.base.runs import difference, digest_of

CHECKPOINT = "checkpoint"

VARIES = ("steps", "cycles", "later_peak", "compile")
"""The settings of a recipe that a resumed run may change."""

BEGIN_AGAIN = (
    "give --overwrite or delete the files of the checkpoint to begin again, or give another folder"
)

logger = logging.getLogger("fewstep")


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
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the state of a run after a step: the tensors, and a description with the recipe.

    ``more`` are further tensors of the run, which :func:`load_checkpoint` returns.
    """
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    tensors |= {f"optimizer.{k}": v for k, v in moments_of(optimizer).items()}
    tensors |= {f"more.{k}": v for k, v in (more or {}).items()}
    metadata = {"step": str(step), "loss": repr(loss), "run": _run_digest(about)}
    metadata["tensors"] = digest_of(sorted(tensors))
    write_tensors(out / f"{CHECKPOINT}.safetensors", tensors, metadata)
    write_json(out / f"{CHECKPOINT}.json", {"step": step, "loss": loss, **about})


def _run_digest(about: Mapping[str, Any]) -> str:
    """Returns a digest of what all checkpoints of one run have in common."""
    recipe = {k: v for k, v in dict(about["recipe"]).items() if k not in VARIES}
    return digest_of([recipe, about.get("inputs")])


def read_checkpoint(out: Path, *, steps: int | None = None) -> dict[str, Any] | None:
    """Returns the description of the checkpoint in a folder, or ``None`` if there is none.

    Arguments:
        out: The folder.
        steps: The number of steps of the run that resumes it.

    Raises:
        ValueError: If it is damaged, or of a longer run.
    """
    file, tensors = out / f"{CHECKPOINT}.json", out / f"{CHECKPOINT}.safetensors"
    if not file.exists():
        if tensors.exists():  # the process died while it wrote the first checkpoint
            logger.warning("%s is not used: %s is missing; the run begins again", tensors, file)
        return None
    try:
        state = read_json(file, what="checkpoint")
        if not tensors.exists():
            raise ValueError(
                f"the checkpoint {str(file)!r} is damaged: {str(tensors)!r} is missing"
            )
        recipe = state.get("recipe") if isinstance(state, dict) else None
        if not isinstance(recipe, dict):
            raise ValueError(f"the checkpoint {str(file)!r} is damaged: it has no recipe")
        step, most = state.get("step"), recipe.get("steps")
        if type(step) is not int or type(most) is not int or not 0 < step <= most:
            raise ValueError(
                f"the checkpoint {str(file)!r} is damaged: its step is {step!r:.40} of {most!r:.40}"
            )
    except ValueError as error:
        raise ValueError(f"{error}; {BEGIN_AGAIN}") from None
    if steps is not None and step > steps:
        raise ValueError(
            f"the checkpoint {str(file)!r} is at step {step}, and the run shall have {steps}; give "
            "more steps, or another folder"
        )
    return state


def is_intact(out: Path) -> bool:
    """Returns whether a folder has no checkpoint, or one whose files are whole."""
    try:
        if read_checkpoint(out) is not None:
            read_tensors_and_metadata(out / f"{CHECKPOINT}.safetensors")
    except ValueError:
        return False
    return True


def earlier_inputs(
    out: Path, inputs: Mapping[str, Any], *, whole: bool = False
) -> dict[str, Any] | None:
    """Returns the inputs of the run whose checkpoint is in a folder, ``None`` if there is none.

    For a finished run, which may be made longer, and for one of an early version. Checkpoints without data,
    teacher and trajectories are of the earliest versions and taken to be of these.

    Arguments:
        out: The folder.
        inputs: The inputs of now, other than the recipe.
        whole: Whether to read the tensors too, since a damaged checkpoint is to be replaced.

    Raises:
        ValueError: If the checkpoint is damaged.
    """
    state = read_checkpoint(out)
    if state is None:
        return None
    if whole and not is_intact(out):
        raise ValueError(f"the checkpoint in {str(out)!r} is damaged")
    if "inputs" not in state:
        logger.warning(
            "the checkpoint in %s is of an early version and does not say what it was made from: make "
            "sure that data and models are the same",
            out,
        )
    return {**state.get("inputs", inputs), "recipe": state["recipe"]}


def changed_input(
    out: Path, changed_recipe: Callable[[Any, int], str | None]
) -> Callable[[Any, Mapping[str, Any]], None]:
    """Returns what compares the inputs of two runs: their recipes by a function, the others as they are.

    Arguments:
        out: The folder of the run.
        changed_recipe: Takes the earlier recipe and the step of its checkpoint; returns what has changed in words,
            or ``None``.
    """

    def check(before: Any, now: Mapping[str, Any]) -> None:
        step = (read_checkpoint(out) or {}).get("step", 0)
        changed = changed_recipe(before.get("recipe"), step)
        if changed is not None:
            raise ValueError(
                f"the folder {str(out)!r} has a run of another recipe, at step {step} ({changed}); give the "
                "same recipe to resume it, --overwrite, or another folder"
            )
        rest = ({k: v for k, v in each.items() if k != "recipe"} for each in (before, now))
        changed = difference(*rest)
        if changed is not None:
            raise ValueError(
                f"the folder {str(out)!r} has a run with other inputs ({changed}), at step {step}; give "
                "those to resume it, --overwrite, or another folder"
            )

    return check


def load_checkpoint(
    out: Path,
    state: Mapping[str, Any],
    *,
    steps: int,
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[int, float, dict[str, Tensor]]:
    """Loads the tensors of a run from its checkpoint; returns its step, its loss and further tensors.

    Arguments:
        out: The folder.
        state: The description of the checkpoint, from :func:`read_checkpoint`.
        steps: The number of steps of the run.
        network: The network, which gets its weights.
        average: The moving average, which is overwritten.
        optimizer: The optimiser; left out, its moments are not loaded.

    Raises:
        ValueError: If it is damaged, of another run or of a longer one.
    """
    file = out / f"{CHECKPOINT}.safetensors"
    try:
        return _load(file, state, steps, network, average, optimizer)
    except (RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(
            f"the checkpoint {str(file)!r} is damaged: {reason}; {BEGIN_AGAIN}"
        ) from None


def _load(
    file: Path,
    state: Mapping[str, Any],
    steps: int,
    network: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> tuple[int, float, dict[str, Tensor]]:
    tensors, metadata = read_tensors_and_metadata(file)
    # If the process died between the two writes the tensors are newer: they hold their own step.
    step, loss = int(metadata.get("step", -1)), float(metadata.get("loss", "nan"))
    if not 0 < step <= steps:
        raise ValueError(f"it is of step {step}, and the run shall have {steps}")
    if metadata.get("run", _run_digest(state)) != _run_digest(state):  # early versions have none
        raise ValueError(f"it is of another run than {CHECKPOINT}.json")
    part = lambda prefix: {  # noqa: E731
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
    }
    network.load_state_dict(part("network."))
    stored = part("average.")
    if stored.keys() != average.keys():
        raise KeyError(f"it has no average of {min(stored.keys() ^ average.keys())}")
    for key, value in stored.items():
        if value.shape != average[key].shape:
            raise ValueError(f"its average of {key} has shape {tuple(value.shape)}")
        average[key].copy_(value)
    if optimizer is not None:
        load_moments(optimizer, part("optimizer."))
    stored_names = digest_of(sorted(tensors))
    if metadata.get("tensors", stored_names) != stored_names:
        raise ValueError("some of its tensors are missing")
    return step, loss, part("more.")


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the moments of an optimizer, by the number of the parameter and their names."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, stored: Mapping[str, Tensor]) -> None:
    """Loads the moments of an optimizer: for each parameter all, each of the parameter's shape.

    Raises:
        KeyError: If some are missing or have another shape.
    """
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = set().union(*moments.values()) if moments else set()
    if not moments or set(moments) - set(range(len(parameters))):
        raise KeyError("it has no state of the optimizer")
    for index, moment in moments.items():
        for name in names:
            if name not in moment or moment[name].shape not in ((), parameters[index].shape):
                raise KeyError(f"it has no {name!r} of the optimizer for parameter {index}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})

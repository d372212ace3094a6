r"""Training of operators on recorded trajectories: ``fewstep distill``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.base.runs import locked
from fewstep.models.denoiser import Denoiser
from fewstep.operators.losses import Distance, distance_of
from fewstep.operators.model import OperatorModel
from fewstep.operators.students import DistillRecipe
from fewstep.operators.trainer import DistillEvent as DistillEvent
from fewstep.operators.trainer import Trainer, Trajectories


def distill(
    denoiser: Denoiser,
    folder: str | Path | Trajectories,
    out: str | Path,
    *,
    recipe: DistillRecipe | None = None,
    distance: Distance | None = None,
    sites: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    checkpoint_every: int = 250,
    tensorboard: bool = False,
    on_step: Callable[[DistillEvent], None] | None = None,
    **changes: Any,
) -> OperatorModel:
    r"""Trains a student that gives in one evaluation what the trajectories took many for.

    .. math:: L(\theta) = \frac1M \sum_m \lambda_m \, \frac1B \sum_b
        d \left( G_\theta(x_T^b)(t_m), x^b(t_m) \right)

    The student starts as the teacher; see :class:`TrajectoryOperator`. ``OUT`` holds the
    operator (``operator.json``, ``operator.safetensors``), which :func:`fewstep.load` reads,
    a checkpoint, and ``log.jsonl`` with the loss of each frame. The same call goes on with a run
    that was interrupted, bit for bit on a CPU.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449

    Arguments:
        denoiser: The model whose trajectories were recorded.
        folder: The folder that :func:`fewstep.record` wrote.
        out: The folder to write.
        recipe: What to train, how long, with which seed.
        distance: A distance of one's own (perceptual, say): takes two batches of states (N, \*)
            and returns (N).
        sites: The names of the modules behind which temporal blocks go, for a network that is
            not known.
        device: Where. Under ``accelerate launch`` each process takes its own.
        checkpoint_every: The steps between two checkpoints, and two measurements.
        tensorboard: Whether to write losses for TensorBoard as well.
        on_step: Called after each step.
        changes: Fields of the recipe, e.g. ``mode="endpoint"``, ``steps=2000``.

    Raises:
        ValueError: If trajectories and model do not belong together, or a setting does not fit.
    """
    recipe = replace(recipe or DistillRecipe(), **_known(changes))
    if distance is not None and recipe.loss != "custom":
        recipe = replace(recipe, loss="custom", features=None)
    store = _opened(folder)
    _check(denoiser, store)
    measure = distance_of(recipe.loss, distance, denoiser, recipe.features)
    run = Trainer(denoiser, store, Path(out), recipe, measure, sites, device)
    first = run.accelerator.is_main_process
    with locked(Path(out)) if first else contextlib.nullcontext():
        run.train(checkpoint_every, tensorboard, on_step)
        return run.finish()


def _known(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    if extra := sorted(set(changes) - set(DistillRecipe.__dataclass_fields__)):
        known = ", ".join(DistillRecipe.__dataclass_fields__)
        raise ValueError(f"distill has no setting {extra[0]!r}; it has {known}")
    return changes


def _opened(folder: str | Path | Trajectories) -> Trajectories:
    if not isinstance(folder, (str, Path)):
        return folder
    from fewstep.trajectories import TrajectoryStore

    return TrajectoryStore.open(folder)


def _check(denoiser: Denoiser, store: Trajectories) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"a Denoiser is needed, got {type(denoiser).__name__}")
    told = store.manifest.get("fingerprint")
    if told is not None and told != denoiser.fingerprint():
        raise ValueError(
            "the trajectories were recorded with another model (its fingerprint differs); "
            "a student must start from the model that made them"
        )
    if len(store) < 2:
        raise ValueError(f"at least 2 trajectories are needed, got {len(store)}")

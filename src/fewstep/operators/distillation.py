r"""Training of operators on recorded trajectories: ``fewstep distill``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.base.paths import check_path
from fewstep.base.progress import Progress, progress_of
from fewstep.base.runs import RunFolder
from fewstep.models.denoiser import Denoiser
from fewstep.operators.losses import CUSTOM, Distance, loss_of
from fewstep.operators.model import OperatorModel
from fewstep.operators.students import DistillRecipe
from fewstep.operators.trainer import (
    OUTPUTS,
    Trainer,
    Trajectories,
    changed_recipe,
    distill_inputs,
)
from fewstep.training.checkpoints import changed_input, earlier_inputs
from fewstep.training.parallel import keep_connected
from fewstep.training.ranks import watching


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
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    **changes: Any,
) -> OperatorModel:
    r"""Trains a student that returns the states of a many-step trajectory in one evaluation.

    .. math:: L(\theta) = \frac1M \sum_m \lambda_m \, \frac1B \sum_b
        d \left( G_\theta(x_T^b)(t_m), x^b(t_m) \right)

    for M frames at the stored times :math:`t_m` (or the sample alone), with a loss d of
    :data:`~fewstep.operators.losses.LOSSES` and the weights :math:`\lambda` of :func:`loss_weights`.
    The student starts as the teacher; see :class:`TrajectoryOperator`. ``OUT`` holds the operator
    (``operator.json``, ``operator.safetensors``), which :func:`fewstep.load` reads, a checkpoint, and
    ``log.jsonl`` with the loss of each frame. The same call resumes an interrupted run, bit for bit
    on a CPU.

    Cost: no evaluation of the teacher; a step is one forward and backward pass of the student for
    ``accumulate`` times ``batch_size`` trajectories, each of M frames. Afterwards a sample costs one
    evaluation, which works on M frames.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023)
        | https://arxiv.org/abs/2211.13449

    Arguments:
        denoiser: The teacher: the model whose trajectories were recorded.
        folder: The folder that :func:`fewstep.record` wrote, with states (n, S, \*).
        out: The folder to write.
        recipe: The student, the loss, the schedule of the training and the seed.
        distance: A custom loss (for example perceptual): takes two batches of states (N, \*)
            and returns (N), differentiable in the first.
        sites: The names of the modules after which temporal blocks are inserted, for a network
            without known sites.
        device: The device. Under ``accelerate launch`` each process takes its own.
        checkpoint_every: The steps between two checkpoints, and two measurements.
        tensorboard: Whether to write losses for TensorBoard as well.
        overwrite: Whether to replace a finished run, or one with another recipe, teacher or trajectories.
        progress: ``True`` for a bar, or an object with ``stage`` and ``tick``: the stage
            ``distilling``, whose units are steps.
        changes: Fields of the recipe, e.g. ``mode="endpoint"``, ``steps=2000``.

    Returns:
        The operator as a model, with its built-in sampler of one evaluation.

    Raises:
        ValueError: Before the first step, if the trajectories are not of this model, a
            setting does not fit, or the folder has a run of another recipe; later, if the loss is
            not finite.
        TypeError: If ``denoiser`` is not a denoiser, or ``recipe`` not a recipe.

    Example:
        >>> denoiser = fewstep.load("fashion", device="cpu")
        >>> store = fewstep.record(denoiser, "teacher", n=4, solver="ddim", nfe=1, keep=1, class_labels=3)
        >>> student = fewstep.distill(denoiser, store, "student", mode="endpoint", steps=1, batch_size=1)
        >>> fewstep.sample(student, 1, class_labels=3).shape
        torch.Size([1, 1, 28, 28])
    """
    if recipe is not None and not isinstance(recipe, DistillRecipe):
        raise TypeError(
            f"recipe is a DistillRecipe, got {type(recipe).__name__}; give its fields as arguments"
        )
    check_path(out, "out")
    recipe = replace(recipe or DistillRecipe(), **_known(changes))
    if distance is not None and recipe.loss != CUSTOM:
        recipe = replace(recipe, loss=CUSTOM, features=None)
    store = _opened(folder)
    _check(denoiser, store)
    loss = loss_of(recipe.loss, distance, denoiser, recipe.features)
    inputs = distill_inputs(denoiser, store, recipe, distance, sites)
    out = Path(out)
    run = RunFolder(out, "run of fewstep distill", outputs=OUTPUTS, forgets_empty=True)
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress_of(progress))
        ranks = stack.enter_context(watching(out))
        trainer = Trainer(denoiser, store, out, recipe, loss, sites, device, inputs)
        keep_connected()
        if ranks is not None:
            ranks.connected()
        if trainer.accelerator.is_main_process:
            running = run.running(
                {"recipe": asdict(recipe), **inputs},
                overwrite=overwrite,
                changed=changed_input(out, partial(changed_recipe, recipe)),
                earlier=lambda: earlier_inputs(out, inputs, whole=overwrite),
                progress=shown,
            )
            stack.enter_context(running)
        trainer.accelerator.wait_for_everyone()  # the first may have to delete files
        trainer.train(checkpoint_every, tensorboard, shown)
        student = trainer.finish()
        if trainer.accelerator.is_main_process:
            run.finish()
        return student


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
    if not hasattr(store, "settings"):
        raise TypeError(f"trajectories are a folder or a store, got {type(store).__name__}")
    recorded = store.settings.get("fingerprint")
    if recorded is not None and recorded != denoiser.fingerprint():
        raise ValueError(
            "the trajectories were recorded with another model (its fingerprint differs); "
            "a student must start from the model of its trajectories"
        )
    if len(store) < 2:
        raise ValueError(f"at least 2 trajectories are needed, got {len(store)}")

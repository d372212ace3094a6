r"""Training of a small diffusion model on the user's images: :func:`train`, ``fewstep train``."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.base.interrupts import unbroken
from fewstep.base.memory import MicroBatches, parts_of
from fewstep.base.paths import check_path
from fewstep.base.progress import Progress, progress_of
from fewstep.base.runs import RunFolder, difference
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.folder import write_model
from fewstep.models.networks.unet import SmallUNet, lay_out
from fewstep.training.batches import Batch, Batches
from fewstep.training.checkpoints import (
    changed_input,
    earlier_inputs,
    load_checkpoint,
    new_average,
    read_checkpoint,
    save_checkpoint,
    update_average,
)
from fewstep.training.data import ImageData, read_images
from fewstep.training.parallel import Team, team
from fewstep.training.recipe import TrainRecipe, default_recipe

AHEAD = 4
"""The number of batches that are prepared ahead."""

OUTPUTS = (
    "model.json",
    "model.safetensors",
    "checkpoint.json",
    "checkpoint.safetensors",
    "samples.png",
)
"""The files of a run, with the picture of the command."""

READ_EVERY = 20
"""The steps between two reads of the loss on an accelerator: each read waits for the device."""


def train(
    data: ImageData | str | Path,
    out: str | Path,
    recipe: TrainRecipe | None = None,
    *,
    device: str | torch.device = "cpu",
    checkpoint_every: int = 250,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Path:
    r"""Trains a small diffusion model and writes it as a folder that :func:`fewstep.load` reads.

    The loss is a weighted mean square of the error in the recipe's prediction,

    .. math:: E \, w(t) \, \| f_\theta(\alpha_t x_0 + \sigma_t \varepsilon, t) - y_t \|^2

    ============= ================================================== ====================================
    prediction    target :math:`y_t`                                 weight :math:`w(t)`
    ============= ================================================== ====================================
    ``eps``       :math:`\varepsilon`                                1: the simple loss of [1]
    ``v``         :math:`\alpha_t \varepsilon - \sigma_t x_0`        1: SNR + 1 on the data [2]
    ``x0``        :math:`x_0`                                        max(SNR, 1): truncated SNR [2]
    ``flow``      :math:`\varepsilon - x_0`                          1: conditional flow matching [3]
    EDM           :math:`(x_0 - c_\text{skip} x_t) / c_\text{out}`   1 on the raw network [4]
    ============= ================================================== ====================================

    with SNR = :math:`\alpha_t^2 / \sigma_t^2`. With EDM's preconditioning the raw network is given
    :math:`c_\text{in} x_t` and :math:`c_\text{noise}`; on the data its weight is
    :math:`1 / c_\text{out}^2 = (\sigma^2 + s^2) / (\sigma s)^2`. Times are drawn as
    :class:`TrainRecipe` says.

    Cost: one evaluation of the network and its gradient a step, for ``batch_size`` images.

    Out of memory, the gradients of half as many images at once are added.

    Several processes of one launch (``torchrun``, ``accelerate launch``) each take a part of every batch; the
    gradients are those of one process to rounding. The first writes.

    References:
        | [1] Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation 14
        | https://arxiv.org/abs/2006.11239
        | [2] Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), section 4, appendix D
        | https://arxiv.org/abs/2202.00512
        | [3] Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow (Liu et al., 2023)
        | https://arxiv.org/abs/2209.03003
        | [3] Flow Matching for Generative Modeling (Lipman et al., 2023)
        | https://arxiv.org/abs/2210.02747
        | [4] Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1
        | https://arxiv.org/abs/2206.00364

    Arguments:
        data: The images, and labels if the network has classes; or a folder or file for
            :func:`read_images`.
        out: The folder to write; if it holds a checkpoint of the same recipe, the run is resumed. On
            Ctrl-C the last completed step is saved. A finished run may be made longer.
        recipe: What to train, how long, with which seed; left out, :func:`default_recipe`.
        device: The device to train on.
        checkpoint_every: The steps between two checkpoints.
        overwrite: Whether to replace a finished run, or one of another recipe or other images.
        progress: ``True`` for a bar, or an object that is notified of each step, after its checkpoint
            if it has one; the note is the smoothed loss.

    Raises:
        ValueError: If recipe and data do not fit, the folder has a run of another recipe, or the
            loss is not finite.
    """
    check_path(out, "out")
    out, device = Path(out), torch.device(device)
    if not isinstance(data, ImageData):
        data = read_images(data, size=None if recipe is None else recipe.size)
    recipe = recipe or default_recipe(data, device=device.type)
    batches = Batches(data, recipe)
    network = build_network(data, recipe, batches).to(device)
    if device.type == "cpu":
        lay_out(network)
    average = new_average(network)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
    )
    run = RunFolder(out, "run of fewstep train", outputs=OUTPUTS, forgets_empty=True)
    inputs = data.inputs()
    identity = {"recipe": recipe.to_record(), **inputs}

    since: list[Tensor] = []  # losses that are still on the device

    def save() -> None:
        if not processes.own.first:
            return
        run.check()
        assert loss_mean is not None
        save_checkpoint(
            out,
            {"recipe": recipe.to_record(), "inputs": inputs},
            step=done,
            loss=loss_mean,
            network=network,
            average=average,
            optimizer=optimizer,
        )

    def gradients(batch: Batch, size: int, *, alone: bool = False) -> Tensor:
        """Sets the gradients of a batch, so many samples at once; returns its loss."""
        optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        slices = parts_of(len(batch), size)
        for rows in slices:
            part = batch if len(slices) == 1 else batch.part(rows)
            exchanged = rows is slices[-1] and not alone
            with nullcontext() if exchanged else processes.without_exchange(parallel):
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
                ):
                    predicted = evaluate(*part.inputs)
                loss = part.loss(predicted)
                if len(slices) > 1:
                    loss = loss * (len(part) / len(batch))
                processes.scaled(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    micro = MicroBatches()
    with ExitStack() as stack:
        shown = stack.enter_context(progress_of(progress))
        processes = stack.enter_context(team(recipe.batch_size, device, out))
        if processes.own.first:
            running = run.running(
                identity,
                overwrite=overwrite,
                changed=changed_input(out, partial(_changed_recipe, recipe)),
                earlier=lambda: earlier_inputs(out, inputs, whole=overwrite),
                progress=shown,
            )
            stack.enter_context(running)
        start, loss_mean = _restore(out, recipe, network, average, optimizer)
        done = saved = start
        prepared = stack.enter_context(
            _ahead(batches, range(start, recipe.steps), device, processes)
        )
        processes.check_step(start, device)
        parallel = processes.parallel(network, device)
        evaluate = torch.compile(parallel) if recipe.compile else parallel
        shown.stage("training", recipe.steps, done=start)
        try:
            for step, batch in prepared:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * recipe.rate(step)
                if step == start and processes.own.several:
                    # Not while gradients are exchanged, where the others wait.
                    micro(len(batch), partial(gradients, batch, alone=True))
                    micro.is_fixed = True
                loss = micro(len(batch), partial(gradients, batch))
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
                with unbroken():
                    optimizer.step()
                    update_average(average, network, step, recipe.ema)
                    since.append(loss)
                    done = step + 1
                saves = (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps
                if saves or device.type == "cpu" or len(since) == READ_EVERY:
                    losses = processes.total(torch.stack(since)).tolist()
                    loss_mean = _smoothed(loss_mean, losses, step)
                    since.clear()
                if saves:
                    save()
                    saved = done
                shown.tick(1, "" if loss_mean is None else f"loss {loss_mean:.4f}")
        except (KeyboardInterrupt, RuntimeError) as error:
            # Without the other processes the next step fails, and the last one is whole.
            if isinstance(error, RuntimeError) and not processes.own.several:
                raise
            if since:
                loss_mean = _smoothed(loss_mean, torch.stack(since).tolist(), done - 1)
            if done > saved:
                with unbroken():  # schedulers send SIGTERM more than once
                    save()
            raise
        if processes.own.first:
            _export(out, recipe, batches, network, average, loss_mean)
            run.finish()
    return out


def export_checkpoint(data: ImageData | str | Path, run: str | Path, out: str | Path) -> Path:
    """Writes the model of an unfinished run: the moving average of its last checkpoint.

    The folder of the run is not changed, so the run can still be resumed.

    Arguments:
        data: The images that it is trained on.
        run: The folder of the run.
        out: The folder to write, another than ``run``.

    Raises:
        ValueError: If there is no checkpoint, or the data do not fit its recipe.
    """
    check_path(run, "run")
    check_path(out, "out")
    run, out = Path(run), Path(out)
    if run.resolve() == out.resolve():
        raise ValueError(
            f"out must be another folder than that of the run, got {str(out)!r} for both"
        )
    state = read_checkpoint(run)
    if state is None:
        raise ValueError(f"the folder {str(run)!r} has no checkpoint to export")
    recipe = TrainRecipe.from_record(state["recipe"])
    if not isinstance(data, ImageData):
        data = read_images(data, size=recipe.size)
    batches = Batches(data, recipe)
    network = build_network(data, recipe, batches)
    average = new_average(network)
    step, loss, _ = load_checkpoint(
        run, state, steps=recipe.steps, network=network, average=average
    )
    return _export(out, recipe, batches, network, average, loss, step=step)


def build_network(data: ImageData, recipe: TrainRecipe, batches: Batches) -> SmallUNet:
    """Returns the network of a recipe with its initial weights, which depend on the seed alone.

    Raises:
        ValueError: If recipe and data do not fit.
    """
    channels, height, width = data.event_shape
    options = {"in_channels": channels, "num_classes": data.num_classes} | recipe.network
    if options["in_channels"] != channels:
        raise ValueError(
            f"the network has {options['in_channels']} channels, the images have {channels}"
        )
    patch = options.get("patch", 1)
    if not isinstance(patch, int) or patch < 1:
        raise ValueError(f"patch must be a positive integer, got {patch!r}")
    if height % patch or width % patch:
        raise ValueError(f"patch {patch} does not divide images of shape {data.event_shape}")
    options.setdefault("time_scale", 1000.0 / batches.conditioning_range)

    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
        torch.manual_seed(recipe.seed)
        try:
            network = SmallUNet(**options)
        except TypeError as error:
            raise ValueError(f"the network of the training recipe: {error}") from None
    classes = network.num_classes
    if classes is not None and (data.num_classes is None or data.num_classes > classes):
        raise ValueError(
            f"the network has {classes} classes, the images have {data.num_classes or 'none'}"
        )
    batches.null_label = classes
    return network


@contextmanager
def _ahead(
    batches: Batches, steps: range, device: torch.device, processes: Team
) -> Iterator[Iterator[tuple[int, Batch]]]:
    """Yields the steps with their batches, which threads prepare ahead.

    A batch depends on its step alone, so the order in which threads finish changes nothing.
    """
    accelerator = device.type != "cpu"
    workers = min(AHEAD, os.cpu_count() or 1) if accelerator else 1

    def prepare(step: int) -> Batch:
        batch = batches(step)
        if processes.own.several:
            batch = batch.part(processes.rows)
        return batch.pinned() if device.type == "cuda" else batch

    def generate() -> Iterator[tuple[int, Batch]]:
        waiting: deque[tuple[int, Future[Batch]]] = deque()
        upcoming = iter(steps)
        for step in upcoming:
            waiting.append((step, pool.submit(prepare, step)))
            if len(waiting) == AHEAD:
                break
        while waiting:
            step, batch = waiting.popleft()
            following = next(upcoming, None)
            if following is not None:
                waiting.append((following, pool.submit(prepare, following)))
            yield step, batch.result().to(device)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    try:
        yield generate()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _smoothed(mean: float | None, losses: list[float], step: int) -> float:
    """Returns the running mean of the losses (about 100 steps) after those up to ``step``."""
    for value in losses:
        if not -float("inf") < value < float("inf"):
            first = step + 1 - len(losses)
            where = f"step {step}" if len(losses) == 1 else f"one of the steps {first} to {step}"
            raise ValueError(f"the loss is {value} at {where}; lower learning_rate")
        mean = value if mean is None else 0.99 * mean + 0.01 * value
    assert mean is not None
    return mean


def _changed_recipe(recipe: TrainRecipe, before: Any, step: int) -> str | None:
    """Returns in words why a run up to a step is not one of the recipe, or ``None``."""
    stored = TrainRecipe.from_record(before)
    if stored.continues_as(recipe, step):
        return None
    varies = dict.fromkeys(("steps", "cycles", "later_peak", "compile"))
    changed = difference(stored.to_record() | varies, recipe.to_record() | varies)
    return changed or "other learning rates in the steps that are done"


def _restore(
    out: Path,
    recipe: TrainRecipe,
    network: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float | None]:
    state = read_checkpoint(out, steps=recipe.steps)
    if state is None:
        return 0, None
    return load_checkpoint(
        out, state, steps=recipe.steps, network=network, average=average, optimizer=optimizer
    )[:2]


def _export(
    out: Path,
    recipe: TrainRecipe,
    batches: Batches,
    network: SmallUNet,
    average: dict[str, Tensor],
    loss: float | None,
    *,
    step: int | None = None,
) -> Path:
    """Writes the model folder: the average in half precision, the statistics of the data."""
    data = batches.data
    mean, std = batches.statistics()
    weights = {key: value.half() for key, value in average.items()}
    schedule: NoiseSchedule = batches.schedule
    about = {"recipe": recipe.to_record(), "images": len(data), "loss": loss}
    return write_model(
        out,
        {**weights, "data.mean": mean.half(), "data.std": std.half()},
        network={"kind": "small-unet", **network.config},
        schedule=schedule,
        prediction=recipe.prediction,
        event_shape=data.event_shape,
        class_names=data.names if network.num_classes else None,
        preconditioning=batches.preconditioning_record(),
        data_range=recipe.range,
        training=about if step is None else {**about, "step": step},
    )

r"""The training loop of a student, and its files."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.base.progress import SILENT, Progress
from fewstep.base.runs import digest_of, hash_inputs
from fewstep.models.denoiser import Denoiser
from fewstep.operators.folder import read_operator, write_operator
from fewstep.operators.log import LossLog
from fewstep.operators.losses import Distance, loss_weights
from fewstep.operators.model import OperatorModel
from fewstep.operators.students import DistillRecipe, make_student, select_frames
from fewstep.training.checkpoints import (
    check_inputs,
    generator,
    load_checkpoint,
    new_average,
    read_checkpoint,
    save_checkpoint,
    update_average,
)

LOG_EVERY = 10
"""The steps between two rows of the log; losses stay on the device between them."""


class Trajectories(Protocol):
    """The training data: :class:`fewstep.trajectories.TrajectoryStore`, or an object of the same interface."""

    @property
    def times(self) -> Tensor:
        """The times of the stored states, the input's first."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Their origin; ``fingerprint`` is that of the model."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], *, frames: Sequence[int] | None = None) -> Any:
        r"""Returns a batch: ``states`` (B, S, \*) of these frames, ``conditions`` name to (B)."""
        ...


def distill_inputs(
    denoiser: Denoiser, store: Trajectories, recipe: DistillRecipe
) -> dict[str, Any]:
    """Returns the inputs of a run other than the recipe: teacher, trajectories, features."""
    stored = dict(store.settings)
    about = [stored, len(store), store.times.tolist()]
    features = hash_inputs(recipe.features) if isinstance(recipe.features, str) else None
    return {
        "teacher": denoiser.fingerprint(),
        "trajectories": digest_of(about),
        "features": None if features is None else features["sha256"],
    }


class Trainer:
    r"""One run: student, moving average, optimizer, and their folder.

    Arguments:
        denoiser: The teacher.
        store: The trajectories.
        out: The folder.
        recipe: The recipe.
        loss: The loss, (N, \*), (N, \*) to (N).
        sites: The modules after which temporal blocks are inserted; left out, the known sites.
        device: The device.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        store: Trajectories,
        out: Path,
        recipe: DistillRecipe,
        loss: Distance,
        sites: Sequence[str] | None,
        device: str | torch.device,
    ) -> None:
        self.inputs = distill_inputs(denoiser, store, recipe)
        self.store, self.out, self.recipe, self.state_loss = store, out, recipe, loss
        stored = store.times.tolist()
        self.frames = select_frames(stored, recipe)
        weights = loss_weights(
            denoiser.schedule,
            [stored[i] for i in self.frames],
            recipe.weights if len(self.frames) > 1 else "uniform",
            lambda_max=recipe.lambda_max,
        )
        self.accelerator = _accelerator(device)
        first = store.read([0])
        example = {name: value[:1] for name, value in first.conditions.items()}
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
            torch.manual_seed(recipe.seed)
            self.student = make_student(denoiser, recipe, stored, sites=sites, example=example)
        self.student = self.student.to(self.accelerator.device)
        self.network = self.student.network
        self.student.requires_grad_(False)
        self.network.requires_grad_(True)
        if recipe.checkpointing:
            _enable_checkpointing(self.network)
        self.weights = (weights / weights.mean()).float().to(self.accelerator.device)
        self.average = new_average(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        heldout = max(1, min(recipe.heldout, len(store) // 10))
        self.training = len(store) - heldout
        self.heldout: float | None = None
        self.loss: float | None = None
        self.rows: list[dict[str, Any]] | None = None

    def train(
        self,
        checkpoint_every: int,
        tensorboard: bool,
        progress: Progress = SILENT,
    ) -> None:
        """Runs the remaining steps, with checkpoints, log and progress.

        Raises:
            ValueError: If the folder has a run of another recipe, or the loss is not finite.
        """
        recipe, start = self.recipe, self._restore()
        progress.stage("distilling", recipe.steps, done=start)
        call: Any = self.accelerator.prepare(self.student)
        if recipe.compile:
            call = torch.compile(call)
        log = None
        if self.accelerator.is_main_process:
            log = LossLog(self.out, start, tensorboard, self.rows)
        pending: list[Tensor] = []
        for step in range(start, recipe.steps):
            pending.append(self._step(call, step))
            last = step + 1 == recipe.steps
            saving = (step + 1) % checkpoint_every == 0 or last
            if (step + 1) % LOG_EVERY == 0 or saving:
                each = torch.stack(pending).mean(0)
                pending.clear()
                row = self._log_row(each, step)
                if saving:
                    row["heldout"] = self.evaluate()
                    self.heldout = row["heldout"][-1]
                if log is not None:
                    log.write(row)
            if saving and self.accelerator.is_main_process:
                save_checkpoint(
                    self.out,
                    {
                        "recipe": asdict(recipe),
                        "inputs": self.inputs,
                        "heldout": self.heldout,
                        "log": [json.loads(line) for line in log.rows] if log is not None else [],
                    },
                    step=step + 1,
                    loss=self.loss if self.loss is not None else math.nan,
                    network=self.network,
                    average=self.average,
                    optimizer=self.optimizer,
                )
            progress.tick(1, self._note())
        if log is not None:
            log.close()
        self.accelerator.wait_for_everyone()

    def _note(self) -> str:
        if self.loss is None:
            return ""
        heldout = "" if self.heldout is None else f", held out {self.heldout:.4f}"
        return f"loss {self.loss:.4f}{heldout}"

    def _step(self, call: Any, step: int) -> Tensor:
        """Does one update; returns the loss of each frame, on the device."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(len(self.frames), device=self.accelerator.device)
        for part in range(recipe.accumulate):
            last = part + 1 == recipe.accumulate
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(call)
            with quiet:
                x, target, cond = self._batch(self._indices(step * recipe.accumulate + part))
                with self._autocast():
                    states = call(x, **cond)
                    each = self._distances(states, target)
                loss = (self.weights * each).mean() / recipe.accumulate
                self.accelerator.backward(loss)
            total += each.detach() / recipe.accumulate
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        self.optimizer.step()
        update_average(self.average, self.network, step, recipe.ema)
        return total

    def _distances(self, states: Tensor, target: Tensor) -> Tensor:
        """Returns the mean distance of each frame, with shape (M)."""
        batch, frames = states.shape[:2]
        each = self.state_loss(states.float().flatten(0, 1), target.flatten(0, 1))
        if each.shape != (batch * frames,):
            raise ValueError(
                f"a distance returns one number per state, shape ({batch * frames},), got "
                f"{tuple(each.shape)}"
            )
        return each.unflatten(0, (batch, frames)).mean(0)

    def _indices(self, part: int) -> list[int]:
        """Returns the trajectories of a forward pass: a slice of the epoch's permutation."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.recipe.batch_size * world
        per_epoch = max(1, self.training // size)
        epoch, place = divmod(part, per_epoch)
        order = torch.randperm(
            self.training, generator=generator(self.recipe.seed, "epoch", epoch)
        )
        return order[place * size : (place + 1) * size][rank::world].tolist()

    def _batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        read = self.store.read(indices, frames=[0, *self.frames])
        device = self.accelerator.device
        states = read.states.to(device)
        cond = self.student.model.prepare(len(indices), dict(read.conditions))
        ready = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}
        return states[:, 0], states[:, 1:], ready

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Returns the RMS error of each frame of the averaged student, on held-out trajectories."""
        indices = list(range(self.training, len(self.store)))
        total = torch.zeros(len(self.frames), dtype=torch.float64)
        with self._averaged():
            for start in range(0, len(indices), self.recipe.batch_size):
                rows = indices[start : start + self.recipe.batch_size]
                x, target, cond = self._batch(rows)
                with self._autocast():
                    states = self.student(x, **cond)
                error = (states.float() - target).square().flatten(2).mean(2)
                total += error.sum(0).double().cpu()
        return (total / len(indices)).sqrt().tolist()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        present = new_average(self.network)
        self.network.load_state_dict(self.average)
        try:
            yield
        finally:
            self.network.load_state_dict(present)

    def _log_row(self, each: Tensor, step: int) -> dict[str, Any]:
        """Returns the row of the log, and updates the smoothed loss."""
        whole: Any = self.accelerator.reduce(each, reduction="mean")
        loss = float((self.weights * whole).mean())
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate")
        self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
        return {
            "step": step + 1,
            "loss": loss,
            "losses": whole.tolist(),
            "rate": self.recipe.rate(step),
        }

    def _restore(self) -> int:
        state = read_checkpoint(self.out, steps=self.recipe.steps)
        if state is None:
            return 0
        stored, recipe = DistillRecipe.from_json(state["recipe"]), self.recipe
        varies = {"steps": 1, "compile": False}
        if (asdict(stored) | varies) != (json.loads(json.dumps(asdict(recipe))) | varies) or any(
            not math.isclose(stored.rate(k), recipe.rate(k)) for k in range(state["step"])
        ):
            raise ValueError(
                f"the folder {str(self.out)!r} has a run of another recipe, at step "
                f"{state['step']}; give the same recipe to resume it, or another folder"
            )
        check_inputs(self.out, state, self.inputs)
        step, self.loss = load_checkpoint(
            self.out,
            state,
            steps=recipe.steps,
            network=self.network,
            average=self.average,
            optimizer=self.optimizer,
        )
        self.heldout = state.get("heldout")
        # If the process died between the two writes the tensors are newer: then the file's rows are used.
        self.rows = state.get("log") if step == state["step"] else None
        return step

    def finish(self) -> OperatorModel:
        """Writes the operator with the averaged weights, reads it again and returns it."""
        if self.accelerator.is_main_process:
            about = {
                "recipe": asdict(self.recipe),
                "trajectories": len(self.store),
                "heldout_rms": self.heldout,
                "loss": self.loss,
                "teacher": self.store.settings.get("fingerprint"),
                "guidance": self.store.settings.get("guidance"),
            }
            write_operator(self.out, self.student, weights=self.average, training=about)
        self.accelerator.wait_for_everyone()
        return read_operator(self.out, teacher=self.student.teacher())


def _accelerator(device: str | torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ValueError("distill needs accelerate: pip install fewstep[distill]") from None
    return Accelerator(cpu=torch.device(device).type == "cpu")


def _enable_checkpointing(network: nn.Module) -> None:
    enable = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None:
        raise ValueError(
            f"a {type(network).__name__} has no enable_gradient_checkpointing(); leave "
            "checkpointing out"
        )
    enable()

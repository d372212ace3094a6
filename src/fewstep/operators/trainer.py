r"""The training loop of a student, and its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.base.callables import callable_digest
from fewstep.base.extras import install_hint
from fewstep.base.interrupts import unbroken
from fewstep.base.memory import MicroBatches, parts_of
from fewstep.base.processes import VARIABLES, processes
from fewstep.base.progress import SILENT, Progress
from fewstep.base.runs import difference, digest_of, hash_inputs
from fewstep.metrics.features import EMBEDDED, Features
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.operators.correctors import CORRECTORS, Corrector
from fewstep.operators.flow_map import FlowMap
from fewstep.operators.folder import read_operator, write_operator
from fewstep.operators.log import LossLog
from fewstep.operators.losses import Distance
from fewstep.operators.model import OperatorModel
from fewstep.operators.objectives import Rows, objective_of
from fewstep.operators.operator import Operator
from fewstep.operators.students import DistillRecipe, make_student, select_frames
from fewstep.training.checkpoints import (
    BEGIN_AGAIN,
    generator,
    load_checkpoint,
    load_moments,
    moments_of,
    new_average,
    read_checkpoint,
    save_checkpoint,
    update_average,
)
from fewstep.training.parallel import Team, check_address

CORRECTOR, MOMENTS = "corrector.network.", "corrector.optimizer."
"""What the names of a corrector's tensors in a checkpoint begin with."""

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


OUTPUTS = (
    "operator.json",
    "operator.safetensors",
    "checkpoint.json",
    "checkpoint.safetensors",
    "log.jsonl",
    "samples.png",
)
"""The files of a run, with the picture of the command."""


def distill_inputs(
    denoiser: Denoiser,
    store: Trajectories,
    recipe: DistillRecipe,
    distance: Distance | None = None,
    sites: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns the inputs of a run other than the recipe: teacher, trajectories, features, sites.

    Trajectories are known by their settings, and by the first and the last of them: a store's settings determine
    the rest. A custom distance is known by its code and its weights (:func:`callable_digest`).
    """
    ends = store.read([0, len(store) - 1])
    about = [dict(store.settings), len(store), store.times.tolist(), _digest({"x": ends.states})]
    inputs: dict[str, Any] = {"teacher": denoiser.fingerprint(), "trajectories": digest_of(about)}
    inputs["features"] = hash_inputs(recipe.features) if isinstance(recipe.features, str) else None
    if recipe.initial is not None:
        inputs["initial"] = read_operator(recipe.initial, teacher=denoiser).fingerprint()
    if recipe.features in EMBEDDED and inputs["features"] is None:
        inputs["features"] = {"sha256": Features.load(str(recipe.features)).sha256}
    if callable(distance):
        inputs["distance"] = callable_digest(distance)
    if sites is not None:
        inputs["sites"] = list(sites)
    return inputs


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        inputs: What determines the run besides the recipe, for its checkpoints.
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
        inputs: Mapping[str, Any],
    ) -> None:
        self.inputs = inputs
        self.store, self.out, self.recipe = store, out, recipe
        stored = store.times.tolist()
        self.frames = select_frames(stored, recipe)
        self.accelerator = _accelerator(device)
        first = store.read([0])
        example = {name: value[:1] for name, value in first.conditions.items()}
        with torch.random.fork_rng(devices=[]):  # leaves the caller's generator unchanged
            torch.manual_seed(recipe.seed)
            self.student = make_student(denoiser, recipe, stored, sites=sites, example=example)
        if recipe.initial is not None:
            load_initial(self.student, recipe.initial, denoiser)
        self.student = self.student.to(self.accelerator.device)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.student.parameters()):
            self.student = self.student.float()  # steps of the optimizer are below their rounding
        self.corrector = self._corrector(denoiser, example)
        self.objective = objective_of(
            self.student, recipe, loss, stored, self.frames, self.corrector
        )
        self.network = self.student.network
        self.student.requires_grad_(False)
        self.network.requires_grad_(True)
        if recipe.checkpointing:
            _enable_checkpointing(self.network)
        self.average = new_average(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=recipe.learning_rate)
        self.corrector_optimizer: torch.optim.Adam | None = None
        own = None if self.corrector is None else self.corrector.network
        if own is not None:
            self.corrector_optimizer = torch.optim.Adam(own.parameters(), lr=recipe.corrector_rate)
        self.corrector_network = own
        heldout = max(1, min(recipe.heldout, len(store) // 10))
        self.training = len(store) - heldout
        self.heldout: float | None = None
        self.loss: float | None = None
        self.rows: list[dict[str, Any]] | None = None
        self.micro = MicroBatches()
        self.pending: list[Tensor] = []  # losses of the frames since the last row of the log

    def _corrector(self, denoiser: Denoiser, example: Mapping[str, Any]) -> Corrector | None:
        """Returns the corrector of the recipe, for the teacher with the guidance of its trajectories."""
        if self.recipe.corrector is None:
            return None
        assert isinstance(self.student, FlowMap)  # as the recipe has checked
        scale = self.store.settings.get("guidance")
        teacher = denoiser if scale in (None, 1) else Guided(denoiser, float(scale))
        return CORRECTORS[self.recipe.corrector].build(teacher, self.student, example)

    def train(
        self,
        checkpoint_every: int,
        tensorboard: bool,
        progress: Progress = SILENT,
    ) -> None:
        """Runs the remaining steps, with checkpoints, log and progress.

        Interrupted, it saves the last completed step.

        Raises:
            ValueError: If the checkpoint is damaged, or the loss is not finite.
        """
        recipe, start = self.recipe, self._restore()
        Team(processes(), recipe.batch_size).check_step(start, self.accelerator.device)
        progress.stage("distilling", recipe.steps, done=start)
        call: Any = self.accelerator.prepare(self.student)
        if recipe.compile:
            call = torch.compile(call)
        log = None
        if self.accelerator.is_main_process:
            log = LossLog(self.out, start, tensorboard, self.rows)
        done = saved = start

        def save() -> None:
            if self.accelerator.is_main_process:
                more = {"losses": torch.stack(self.pending)} if self.pending else {}
                more |= self._corrector_state()
                save_checkpoint(
                    self.out,
                    {
                        "recipe": asdict(recipe),
                        "inputs": dict(self.inputs),
                        "heldout": self.heldout,
                        "log": log.records() if log is not None else [],
                    },
                    step=done,
                    loss=self.loss if self.loss is not None else math.nan,
                    network=self.network,
                    average=self.average,
                    optimizer=self.optimizer,
                    more=more,
                )

        try:
            if self.pending and self._is_logged(start, checkpoint_every):
                self._log(start, checkpoint_every, log)  # it was interrupted just before
            for step in range(start, recipe.steps):
                self._step(call, step)
                done = step + 1
                if self._is_logged(done, checkpoint_every):
                    self._log(done, checkpoint_every, log)
                if self._is_saved(done, checkpoint_every):
                    save()
                    saved = done
                progress.tick(1, self._note())
        except (KeyboardInterrupt, RuntimeError) as error:
            # Without the other processes the next step fails, and the last one is whole.
            if isinstance(error, RuntimeError) and self.accelerator.num_processes == 1:
                raise
            if done > saved:
                with unbroken():  # schedulers send SIGTERM more than once
                    save()
            raise
        if log is not None:
            log.close()
        self.accelerator.wait_for_everyone()

    def _is_saved(self, done: int, checkpoint_every: int) -> bool:
        return done % checkpoint_every == 0 or done == self.recipe.steps

    def _is_logged(self, done: int, checkpoint_every: int) -> bool:
        return done % LOG_EVERY == 0 or self._is_saved(done, checkpoint_every)

    def _log(self, done: int, checkpoint_every: int, log: LossLog | None) -> None:
        """Writes the row of the log after a step, with the measurement of a checkpoint."""
        row = self._log_row(torch.stack(self.pending).mean(0), done - 1)
        if self._is_saved(done, checkpoint_every):
            row["heldout"] = self.evaluate()
        with unbroken():
            self.pending.clear()
            self.loss = row["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * row["loss"]
            self.heldout = row["heldout"][-1] if "heldout" in row else self.heldout
            if log is not None:
                log.write(row)

    def _note(self) -> str:
        if self.loss is None:
            return ""
        heldout = "" if self.heldout is None else f", held out {self.heldout:.4f}"
        return f"loss {self.loss:.4f}{heldout}"

    def _step(self, call: Any, step: int) -> None:
        """Does one update, and notes the loss and the losses for the log, on the device."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        if self.accelerator.num_processes > 1 and not self.micro.is_fixed:
            # Not while gradients are exchanged, where the others wait.
            self.micro(recipe.batch_size, partial(self._gradients, call, step, alone=True))
            self.micro.is_fixed = True
        total = self.micro(recipe.batch_size, partial(self._gradients, call, step))
        networks = [self.network]
        if self.corrector_network is not None:
            networks.append(self.corrector_network)
            average_gradients(self.corrector_network, self.accelerator)
        if recipe.clip:
            for network in networks:
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        with unbroken():
            self.optimizer.step()
            if self.corrector_optimizer is not None:
                self.corrector_optimizer.step()
            update_average(self.average, self.network, step, recipe.ema)
            self.pending.append(total)

    def _gradients(self, call: Any, step: int, size: int, *, alone: bool = False) -> Tensor:
        """Sets the gradients of a step, so many trajectories at once; returns the loss and the losses for the log."""
        accumulate = self.recipe.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        if self.corrector_optimizer is not None:
            self.corrector_optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(1 + self.objective.columns, device=self.accelerator.device)
        for number in range(accumulate):
            part = step * accumulate + number
            whole = self._indices(part)
            places = range(len(whole))[self._rows]
            states, cond = self._batch(whole[self._rows], self.objective.drawn(part))
            count = len(states)
            slices = parts_of(count, size)
            for rows in slices:
                last = number + 1 == accumulate and rows is slices[-1] and not alone
                share = (rows.stop - rows.start) / count
                own = cond if len(slices) == 1 else select(cond, range(rows.start, rows.stop))
                with contextlib.nullcontext() if last else self.accelerator.no_sync(call):
                    with self._autocast():
                        given = Rows(states[rows], own, part, places[rows], len(whole))
                        loss, each = self.objective.losses(call, given)
                    self.accelerator.backward(loss * share / accumulate)
                total += torch.cat([loss.detach()[None], each]) * share / accumulate
        return total

    def _indices(self, part: int) -> list[int]:
        """Returns the trajectories of a forward pass of all processes: a slice of the epoch's permutation."""
        size = self.recipe.batch_size * self.accelerator.num_processes
        per_epoch = max(1, self.training // size)
        epoch, place = divmod(part, per_epoch)
        order = torch.randperm(
            self.training, generator=generator(self.recipe.seed, "epoch", epoch)
        )
        return order[place * size : (place + 1) * size].tolist()

    @property
    def _rows(self) -> slice:
        """The part of a batch of all processes that is this process's."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def _batch(
        self, indices: Sequence[int], frames: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the states of the input and of frames, and the conditions, on the device."""
        read = self.store.read(indices, frames=[0, *frames])
        device = self.accelerator.device
        cond = self.student.model.prepare(len(indices), dict(read.conditions))
        ready = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}
        return read.states.to(device), ready

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Returns the RMS errors of the averaged student on held-out trajectories; see :meth:`Objective.errors`."""
        indices = list(range(self.training, len(self.store)))
        values = []
        with self._averaged():
            for start in range(0, len(indices), self.recipe.batch_size):
                rows = indices[start : start + self.recipe.batch_size]
                states, cond = self._batch(rows, self.frames)
                with self._autocast():
                    errors = self.objective.errors(self.student, states, cond)
                values.append(errors.double().sum(0).cpu())
        return (torch.stack(values).sum(0) / len(indices)).sqrt().tolist()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        present = new_average(self.network)
        self.network.load_state_dict(self.average)
        try:
            yield
        finally:
            self.network.load_state_dict(present)

    def _log_row(self, each: Tensor, step: int) -> dict[str, Any]:
        """Returns the row of the log of a loss and its losses."""
        whole: Any = self.accelerator.reduce(each, reduction="mean")
        loss, *losses = whole.tolist()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate")
        return {
            "step": step + 1,
            "loss": loss,
            "losses": losses,
            "rate": self.recipe.rate(step),
        }

    def _restore(self) -> int:
        state = read_checkpoint(self.out, steps=self.recipe.steps)
        if state is None:
            return 0
        step, loss, more = load_checkpoint(
            self.out,
            state,
            steps=self.recipe.steps,
            network=self.network,
            average=self.average,
            optimizer=self.optimizer,
        )
        self.loss = None if math.isnan(loss) else loss
        self.heldout, self.rows = state.get("heldout"), state.get("log")
        if step != state["step"]:
            # The process died between the two writes: the tensors are newer.
            self.heldout, self.rows = self.evaluate()[-1], None
        if "losses" in more:
            self.pending = list(more["losses"].to(self.accelerator.device).unbind())
        self._restore_corrector(more)
        return step

    def _corrector_state(self) -> dict[str, Tensor]:
        """Returns the weights of the corrector's own network and their moments, for a checkpoint."""
        if self.corrector_network is None or self.corrector_optimizer is None:
            return {}
        state = {f"{CORRECTOR}{k}": v for k, v in self.corrector_network.state_dict().items()}
        return state | {
            f"{MOMENTS}{k}": v for k, v in moments_of(self.corrector_optimizer).items()
        }

    def _restore_corrector(self, more: Mapping[str, Tensor]) -> None:
        """Loads what :meth:`_corrector_state` returned.

        Raises:
            ValueError: If it is damaged.
        """
        if self.corrector_network is None or self.corrector_optimizer is None:
            return
        weights, moments = (
            {k.removeprefix(prefix): v for k, v in more.items() if k.startswith(prefix)}
            for prefix in (CORRECTOR, MOMENTS)
        )
        try:
            self.corrector_network.load_state_dict(weights)
            load_moments(self.corrector_optimizer, moments)
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"the checkpoint in {str(self.out)!r} is damaged: the corrector's network: {error}; "
                f"{BEGIN_AGAIN}"
            ) from None

    def finish(self) -> OperatorModel:
        """Writes the operator with the averaged weights, reads it again and returns it."""
        if self.accelerator.is_main_process:
            about = {
                "recipe": asdict(self.recipe),
                "trajectories": len(self.store),
                "heldout_rms": self.heldout,
                "loss": self.loss,
                "teacher": self.inputs["teacher"],
                "store": self.inputs["trajectories"],
                "initial": self.inputs.get("initial"),
                "extractor": (self.inputs.get("features") or {}).get("sha256"),
                "guidance": self.store.settings.get("guidance"),
                "seed": self.store.settings.get("seed"),
            }
            write_operator(self.out, self.student, weights=self.average, training=about)
        self.accelerator.wait_for_everyone()
        return read_operator(self.out, teacher=self.student.teacher())


def load_initial(student: Operator, folder: str, teacher: Denoiser) -> None:
    """Loads the weights of a finished student into one of the same layout.

    Raises:
        ValueError: If the folder is not a student's, or its layout is another.
    """
    initial = read_operator(folder, teacher=teacher).operator
    before = json.loads(json.dumps(asdict(initial.layout)))
    changed = difference(before, asdict(student.layout))
    if changed is not None:
        raise ValueError(
            f"the student {folder!r} has another layout than this run's ({changed}); start from one with the same "
            "kind, times and budgets, or leave initial out"
        )
    student.network.load_state_dict(initial.network.state_dict())


@torch.no_grad()
def average_gradients(network: nn.Module, accelerator: Any) -> None:
    """Sets the gradients of a network to their mean over the processes, where there are several."""
    if accelerator.num_processes == 1:
        return
    parameters = [p for p in network.parameters() if p.requires_grad]
    each = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in each]), reduction="mean")
    for p, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = gradient.reshape(p.shape).clone()


def changed_recipe(recipe: DistillRecipe, before: Any, step: int) -> str | None:
    """Returns in words why a run up to a step is not one of the recipe, or ``None``: the length may differ."""
    stored = DistillRecipe.from_json(before)
    varies = {"steps": 1, "compile": False}
    changed = difference(asdict(stored) | varies, json.loads(json.dumps(asdict(recipe))) | varies)
    if changed is None and any(
        not math.isclose(stored.rate(k), recipe.rate(k)) for k in range(step)
    ):
        changed = "other learning rates in the steps that are done"
    return changed


def _accelerator(device: str | torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ValueError(f"distill needs accelerate: {install_hint('distill')}") from None
    own = processes()
    check_address(own)
    if (
        own.several and "RANK" not in os.environ
    ):  # of Slurm, whose variables accelerate does not read
        numbers = (own.rank, own.count, own.local_rank)
        os.environ |= dict(zip(VARIABLES[0], map(str, numbers), strict=True))
    return Accelerator(cpu=torch.device(device).type == "cpu")


def _enable_checkpointing(network: nn.Module) -> None:
    enable = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None:
        raise ValueError(
            f"a {type(network).__name__} has no enable_gradient_checkpointing(); leave "
            "checkpointing out"
        )
    enable()

"""``fewstep distill``: an operator that returns a sample, or the whole trajectory, in one evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.files import loads_json, read_json, write_atomic
from fewstep.base.interrupts import keeping
from fewstep.base.processes import processes
from fewstep.base.progress import progress_of
from fewstep.cli._common import (
    Flag,
    check_device,
    exists,
    follows,
    load_model,
    output_folder,
    positive,
    say,
)
from fewstep.cli._training import Resumed, saved_step
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.operators.model import OperatorModel


def distill(
    model: str,
    trajectories: Path,
    *,
    out: Path,
    recipe: Path | None = None,
    mode: Annotated[str | None, Parameter(name=["--mode", "--student"])] = None,
    budgets: str | None = None,
    pairs: str | None = None,
    initial: str | None = None,
    own_states: float | None = None,
    consistency: float | None = None,
    corrector: str | None = None,
    corrector_weight: float | None = None,
    times: str | None = None,
    modes: int | None = None,
    basis: str | None = None,
    loss: str | None = None,
    features: str | None = None,
    weights: str | None = None,
    lambda_max: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    learning_rate: float | None = None,
    precision: str | None = None,
    compile: Flag = False,
    checkpointing: Flag = False,
    checkpoint_every: int = 250,
    tensorboard: Flag = False,
    seed: int | None = None,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Distill a model into one evaluation; OUT is then a MODEL for `fewstep sample`.

    The same command resumes an interrupted run.

    Args:
        model: The model whose trajectories were recorded: an embedded name, or a folder.
        trajectories: The folder that `fewstep record` wrote.
        out: The folder to write.
        recipe: A recipe of a distillation (JSON); the other arguments replace its fields.
        mode: dsno (the whole trajectory, temporal blocks), folded (without them), endpoint (the sample
            alone), same-parameters or same-flops (endpoint, as large or as costly as dsno), flow-map (1, 2
            or 4 evaluations with one network).
        budgets: The numbers of evaluations of a flow map; 1,2,4 if left out.
        pairs: The pairs of states that a flow map is trained on: steps (those of its budgets), or all.
        initial: The folder of a finished student of the same kind, to start from instead of the teacher.
        own_states: Of a flow map's steps from later states, the share that starts from its own states.
        consistency: Of a flow map's longer steps, the share whose target is its own way in two steps.
        corrector: A training signal for a flow map's samples beside the recorded ones: denoised (removes grain) or
            score-difference (distribution matching).
        corrector_weight: Its weight; 1 if left out.
        times: The number of frames (4), or their times among the stored ones (0.56,0.25,0).
        modes: The number J of temporal modes; 2 if left out.
        basis: dft, dct or dense.
        loss: l1, l2, huber, or features (l1, and the distance in features of a network).
        features: The feature extractor: fashion, fashion-robust, a folder or a TorchScript file;
            the model's own network if left out.
        weights: snr, uniform, or a number for each frame (1,2,4,20).
        lambda_max: The largest weight of snr; with the published 10000 the intermediate states are hardly
            learned.
        steps: The number of training steps.
        batch_size: The trajectories of a forward pass.
        accumulate: The forward passes of a step.
        learning_rate: The largest learning rate.
        precision: float32 or bfloat16.
        compile: Compile the student.
        checkpointing: Compute activations again in the backward pass, to save memory.
        checkpoint_every: The steps between two checkpoints.
        tensorboard: Write the losses for TensorBoard too.
        seed: The seed; left out, the recipe's, which is 0.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Replace an existing operator.
    """
    from fewstep.operators.distillation import distill as run
    from fewstep.operators.students import DistillRecipe
    from fewstep.trajectories import TrajectoryStore
    from fewstep.workflows.pictures import PICTURE, SHOWN, picture_of

    positive("--checkpoint-every", checkpoint_every)
    device = check_device(device)
    output_folder(out)
    finished = (out / "operator.json").exists() and (out / PICTURE).exists()
    if finished and not overwrite:
        raise exists(out)
    team = processes()
    if team.several and overwrite:
        raise ValueError(
            f"--overwrite with {team.count} processes could delete what another has begun; remove the "
            "folder first"
        )
    settings = DistillRecipe()
    if recipe is not None:
        settings = DistillRecipe.from_json(read_json(recipe, what="the recipe"))
    given: dict[str, Any] = {
        "mode": mode,
        "budgets": _budgets(budgets),
        "pairs": pairs,
        "initial": initial,
        "own_states": own_states,
        "consistency": consistency,
        "corrector": corrector,
        "corrector_weight": corrector_weight,
        "modes": modes,
        "basis": basis,
        "loss": loss,
        "features": features,
        "weights": _weights(weights),
        "lambda_max": lambda_max,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "precision": precision,
        "compile": compile or None,
        "checkpointing": checkpointing or None,
        "seed": seed,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    settings = replace(settings, **changes, **_times(times))
    teacher, store = load_model(model, device), TrajectoryStore.open(trajectories)
    first = team.first
    report = say if first else lambda _: None
    report(f"{len(store)} trajectories; {settings.mode}, {settings.steps} steps on {device}")
    unused = store.manifest.seed + 1  # noises of the trajectories show what was trained on
    with keeping(lambda: saved_step(out)), progress_of(follows()) as progress:
        student = run(
            teacher,
            store,
            out,
            recipe=settings,
            device=device,
            checkpoint_every=checkpoint_every,
            tensorboard=tensorboard,
            overwrite=overwrite,
            progress=Resumed(progress, report),
        )
    if first:
        own = student.built_in_sampler()
        sampler = own.configured(own.budgets[-1])  # the best picture
        cost = f"{sampler.nfe} evaluation{'s' * (sampler.nfe > 1)}"
        title = f"{settings.mode} after {settings.steps} steps · {cost}"
        rows = [i % len(store) for i in range(SHOWN)]
        conditions = store.read(rows, frames=[0]).conditions
        picture = picture_of(sampler, conditions=conditions, seed=unused, title=title)
        write_atomic(out / PICTURE, picture)
    own, added = student.operator.overhead()
    rms = student.about["training"]["heldout_rms"]
    more = f", {added:,} of them ({added / own:.1%}) more than the model" if added else ""
    report(f"{own + added:,} parameters{more}; RMS to the teacher, held out: {rms:.4f}")
    report(f"wrote the operator {out} and the picture {out / PICTURE}")
    labels = "all" if _classes(student) else None
    report(
        f"next: {command('sample', out, class_labels=labels, seed=unused, out=f'{out}-samples')}"
    )


def _times(text: str | None) -> dict[str, Any]:
    """Returns ``frames`` or ``times``: ``"4"`` is a number of frames, ``"0.5,0"`` are times."""
    if text is None:
        return {}
    # A number of frames replaces the times of a recipe, and vice versa.
    if text.strip().isdigit():
        return {"frames": int(text), "times": None}
    return {"times": _numbers("--times", text), "frames": None}


def _weights(text: str | None) -> str | list[float] | None:
    if text is None or text.strip().isalpha():
        return text
    return _numbers("--weights", text)


def _budgets(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--budgets takes whole numbers with commas between, got {text!r:.60}"
        ) from None


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(loads_json(part.strip(), what=name)) for part in text.split(",")]
    except (ValueError, TypeError):
        raise ValueError(f"{name} takes numbers with commas between, got {text!r:.60}") from None


def _classes(student: OperatorModel) -> int | None:
    classes = getattr(student.network, "num_classes", None)
    return classes if isinstance(classes, int) else None

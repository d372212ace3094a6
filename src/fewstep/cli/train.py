"""``fewstep train``: a small diffusion model of the user's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.files import read_json, write_atomic
from fewstep.base.interrupts import keeping
from fewstep.base.progress import progress_of
from fewstep.cli._common import (
    Flag,
    Options,
    check_device,
    exists,
    follows,
    output_folder,
    parse_options,
    positive,
    say,
)
from fewstep.cli._training import PICTURE, Resumed, kept_step, picture_of
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.training.recipe import TrainRecipe


def train(
    data: Path,
    *,
    out: Path,
    recipe: Path | None = None,
    prediction: str | None = None,
    schedule: str | None = None,
    option: Options = None,
    unconditional: Flag = False,
    flip: Flag = False,
    data_range: Annotated[tuple[float, float] | None, Parameter(name="--range")] = None,
    size: int | None = None,
    steps: int | None = None,
    checkpoint_every: int = 250,
    seed: int | None = None,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Train a small diffusion model on images; OUT is then a MODEL for the other commands.

    An interrupted run is resumed by the same command.

    Args:
        data: A folder of images (with a sub-folder for each class, or without), or an idx or npz file.
        out: The folder to write.
        recipe: A training recipe (JSON); left out, one that suits the images. The options below
            replace its fields.
        prediction: The network's prediction: eps, x0, v or flow.
        schedule: The noise schedule; edm and ve train a raw network in EDM's preconditioning, unless
            another prediction than x0 is given; flow predicts flow.
        option: An option of the schedule, key=value, for example levels=300; may be repeated.
        unconditional: Ignore the classes of the images.
        flip: Mirror images left to right at random.
        data_range: The values of black and white, for example -0.5 0.5; left out, -1 1.
        size: The height and width to which images are cropped and resized.
        steps: The number of training steps.
        checkpoint_every: The steps between two checkpoints.
        seed: The seed; left out, the recipe's, which is 0.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Replace an existing model.
    """
    from dataclasses import replace

    from fewstep.base.processes import processes
    from fewstep.training.data import read_images
    from fewstep.training.recipe import TrainRecipe, default_recipe, with_schedule
    from fewstep.training.train import train as run

    for name, value in (
        ("--size", size),
        ("--steps", steps),
        ("--checkpoint-every", checkpoint_every),
    ):
        positive(name, value)
    options = parse_options(option)
    if options and schedule is None:
        raise ValueError("--option is an option of the schedule; give --schedule too")
    device = check_device(device)
    output_folder(out)
    finished = (out / "model.json").exists() and (
        (out / PICTURE).exists() or not (out / "checkpoint.json").exists()
    )
    if finished and not overwrite:
        raise exists(out)
    team = processes()
    if team.several and overwrite:
        raise ValueError(
            f"--overwrite with {team.count} processes could delete what another has begun; remove the "
            "folder first"
        )
    report = say if team.first else lambda _: None
    given = None
    if recipe is not None:
        given = TrainRecipe.from_record(read_json(recipe, what="the training recipe"))
        size = size or given.size
    images = read_images(data, size=size)
    chosen = given or default_recipe(images, device=device)
    changes: dict[str, Any] = {"size": size}
    if unconditional:
        changes["network"] = {**chosen.network, "num_classes": None}
    if flip:
        changes["flip"] = True
    if data_range is not None:
        changes["range"] = list(data_range)
    if steps is not None:
        changes["steps"] = steps
    if seed is not None:
        changes["seed"] = seed
    chosen = replace(chosen, **changes)
    if schedule is not None:
        chosen = with_schedule(chosen, {"name": schedule, **options}, prediction=prediction)
    elif prediction is not None:
        chosen = replace(chosen, prediction=prediction)

    classes = images.num_classes
    if "num_classes" in chosen.network and chosen.network["num_classes"] is None:
        classes = None
    shape = "x".join(map(str, images.event_shape))
    report(
        f"{len(images)} images of {shape}, {'no' if classes is None else classes} classes; "
        f"{chosen.prediction}, {chosen.schedule['name']}; {chosen.steps} steps on {device}"
    )
    with keeping(lambda: kept_step(out)), progress_of(follows()) as progress:
        run(
            images,
            out,
            chosen,
            device=device,
            checkpoint_every=checkpoint_every,
            overwrite=overwrite,
            progress=Resumed(progress, report),
        )
        if team.first:
            _draw(out, chosen, classes, device=device)
    report(f"wrote the model {out} and the picture {out / PICTURE}")
    labels = "all" if classes else None
    report(f"next: {command('sample', out, class_labels=labels, out=f'{out}-samples')}")


def _draw(out: Path, recipe: TrainRecipe, classes: int | None, *, device: str) -> None:
    """Draws samples of the finished model."""
    from fewstep.loading import load
    from fewstep.sampling.request import SamplerRequest
    from fewstep.sampling.resolve import resolve

    model, nfe = load(out, device=device), 20
    resolved = resolve(model, SamplerRequest(nfe=nfe))
    name = resolved.recipe.name
    picture = picture_of(
        resolved.sampler,
        classes=classes,
        seed=recipe.seed,
        title=f"after {recipe.steps} steps · {name} · {nfe} evaluations",
    )
    write_atomic(out / PICTURE, picture)

"""``fewstep train``: a small diffusion model of the user's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import parse_options
from fewstep.base.progress import progress_of
from fewstep.cli._common import Flag, Options, check_device, exists, follows, positive, say
from fewstep.cli._training import Resumed, saved_step
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.training.data import ImageData
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
    from fewstep.base.processes import processes
    from fewstep.workflows.files import prepared_folder
    from fewstep.workflows.pictures import PICTURE
    from fewstep.workflows.training import train as run

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
    prepared_folder(out)
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

    def started(images: ImageData, chosen: TrainRecipe) -> None:
        classes = None if unconditional else images.num_classes
        shape = "x".join(map(str, images.event_shape))
        report(
            f"{len(images)} images of {shape}, {'no' if classes is None else classes} classes; "
            f"{chosen.prediction}, {chosen.schedule['name']}; {chosen.steps} steps on {device}"
        )

    with keeping(lambda: saved_step(out)), progress_of(follows()) as progress:
        trained = run(
            data,
            out,
            recipe,
            prediction=prediction,
            schedule=schedule,
            options=options,
            unconditional=unconditional,
            flip=flip,
            data_range=data_range,
            size=size,
            steps=steps,
            checkpoint_every=checkpoint_every,
            seed=seed,
            device=device,
            overwrite=overwrite,
            started=started,
            progress=Resumed(progress, report),
        )
    report(f"wrote the model {out} and the picture {out / PICTURE}")
    labels = "all" if trained.classes else None
    report(f"next: {command('sample', out, class_labels=labels, out=f'{out}-samples')}")

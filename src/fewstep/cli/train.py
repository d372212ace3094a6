"""``fewstep train``: a small diffusion model of the user's images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.base.files import read_json, write_atomic
from fewstep.base.progress import progress_of
from fewstep.cli._common import Flag, check_device, exists, output_folder, positive, say
from fewstep.cli._training import PICTURE, begin, picture_of

if TYPE_CHECKING:
    from fewstep.training.data import ImageData
    from fewstep.training.train import TrainRecipe

OURS = ("model.json", "model.safetensors", "checkpoint.json", "checkpoint.safetensors", PICTURE)
DEFAULT_STEPS = 4000


def train(
    data: Path,
    *,
    out: Path,
    recipe: Path | None = None,
    size: int | None = None,
    steps: int | None = None,
    checkpoint_every: int = 250,
    seed: int | None = None,
    device: str = "cpu",
    overwrite: Flag = False,
) -> None:
    """Train a small diffusion model on images; OUT is then a MODEL for the other commands.

    A run that was interrupted goes on when the same command is given again.

    Args:
        data: A folder of images (with a sub-folder for each class, or without), or an idx or npz file.
        out: The folder to write.
        recipe: A training recipe (JSON); left out, one that suits the images.
        size: The height and width to which images are cropped and resized.
        steps: The number of training steps.
        checkpoint_every: The steps between two checkpoints.
        seed: The seed; left out, the recipe's, which is 0.
        device: Where to run, for example cpu or cuda.
        overwrite: Replace the model that is there.
    """
    from dataclasses import replace

    from fewstep.training.data import read_images
    from fewstep.training.train import TrainEvent, TrainRecipe
    from fewstep.training.train import train as run

    for name, value in (
        ("--size", size),
        ("--steps", steps),
        ("--checkpoint-every", checkpoint_every),
    ):
        positive(name, value)
    check_device(device)
    output_folder(out)
    finished = (out / "model.json").exists() and (
        (out / PICTURE).exists() or not (out / "checkpoint.json").exists()
    )
    if finished and not overwrite:
        raise exists(out)
    given = None
    if recipe is not None:
        given = TrainRecipe.from_json(read_json(recipe, what="the training recipe"))
        size = size or given.size
    images = read_images(data, size=size)
    made = given or default_recipe(images, device=device)
    changes: dict[str, Any] = {"size": size}
    if steps is not None:
        changes["steps"] = steps
    if seed is not None:
        changes["seed"] = seed
    made = replace(made, **changes)

    before = begin(out, made, OURS, finished=finished, overwrite=overwrite)
    classes = "no classes" if images.num_classes is None else f"{images.num_classes} classes"
    shape = "x".join(map(str, images.event_shape))
    say(f"{len(images)} images of {shape}, {classes}; {made.steps} steps on {device}")
    if before:
        say(f"going on at step {before}")
    with progress_of(True) as progress:
        progress.stage("training", made.steps, done=before)

        def told(event: TrainEvent) -> None:
            progress.tick(1, f"loss {event.loss:.4f}")

        run(images, out, made, device=device, checkpoint_every=checkpoint_every, on_step=told)

    from fewstep.cli.sample import DEFAULT_NFE
    from fewstep.loading import load
    from fewstep.sampling.planning import choose
    from fewstep.sampling.recipe import SamplerRecipe

    model, nfe = load(out, device=device), 2 * DEFAULT_NFE
    name = choose(model.schedule, nfe).solver
    picture = picture_of(
        SamplerRecipe(name="auto", nfe=nfe).build(model),
        classes=images.num_classes,
        seed=made.seed,
        title=f"after {made.steps} steps · {name} · {nfe} evaluations",
    )
    write_atomic(out / PICTURE, picture)
    say(f"wrote the model {out} and the picture {out / PICTURE}")
    labels = " --class-labels all" if images.num_classes else ""
    say(f"next: fewstep sample {out}{labels} --out {out}-samples")


def default_recipe(images: ImageData, *, device: str) -> TrainRecipe:
    """Returns a recipe that suits the images: a small U-Net, v-prediction, ddpm-linear."""
    from fewstep.training.train import TrainRecipe

    _, height, width = images.event_shape
    patch = 2 if height % 2 == 0 and width % 2 == 0 and min(height, width) >= 16 else 1
    inside = min(height, width) // patch
    # A level for each halving down to about 8 pixels, at least 2, with attention on the last.
    levels = 2 if inside < 32 else 3
    channels = [64, 128, 128][:levels]
    network: dict[str, Any] = {
        "channels": channels,
        "blocks": [2] * levels,
        "attention": [levels - 1],
        "patch": patch,
        "num_classes": images.num_classes,
    }
    # Without hardware for it, bfloat16 is slower than float32 on a CPU.
    precision = "float32" if device.startswith("cpu") else "bfloat16"
    return TrainRecipe(
        network=network,
        schedule={"name": "ddpm-linear"},
        steps=DEFAULT_STEPS,
        batch_size=min(64, len(images)),
        precision=precision,
    )

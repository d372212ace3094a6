"""``fewstep.train``: a small diffusion model of the user's images."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.devices import find_device
from fewstep.base.files import read_json, write_atomic
from fewstep.base.paths import check_path
from fewstep.base.processes import processes
from fewstep.base.progress import Progress
from fewstep.base.tables import Column, Table
from fewstep.loading import load
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve
from fewstep.training.data import ImageData, read_images
from fewstep.training.recipe import TrainRecipe, default_recipe, with_schedule
from fewstep.training.train import OUTPUTS
from fewstep.training.train import train as run
from fewstep.workflows.files import prepared_folder
from fewstep.workflows.pictures import PICTURE, SHOWN, picture_of

SHOWN_NFE = 20
"""The network evaluations of the samples in the picture."""


@dataclass(frozen=True)
class TrainedModel:
    """A model that was trained, as :func:`fewstep.train` returns it.

    Attributes:
        recipe: How it was trained.
        images: The number of images that it was trained on.
        classes: The number of their classes, or ``None``.
        folder: Its folder; a temporary one, which goes with this object, if none was given.
        device: Where it was trained.
    """

    recipe: TrainRecipe = field(repr=False)
    images: int
    classes: int | None
    folder: Path
    device: torch.device

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model, ready to sample."""
        return load(self.folder, device=self.device)

    @cached_property
    def loss(self) -> float | None:
        """The mean loss of the last steps."""
        about = read_json(self.folder / "model.json", what="model").get("training") or {}
        return about.get("loss")

    def table(self) -> Table:
        """Returns what was trained, on what, and the loss, a row for each."""
        shape = "x".join(map(str, self.denoiser.event_shape or ()))
        rows = {
            "images": f"{self.images} of {shape}",
            "classes": "none" if self.classes is None else str(self.classes),
            "prediction": self.recipe.prediction,
            "schedule": str(self.recipe.schedule["name"]),
            "steps": str(self.recipe.steps),
            "loss": "" if self.loss is None else f"{self.loss:.4f}",
            "device": str(self.device),
        }
        return Table(
            [{"what": name, "value": value} for name, value in rows.items()],
            [Column("what", "", left=True), Column("value", "", left=True)],
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the folder of the model, with a picture of samples; returns its path.

        ``fewstep.load`` and all commands read it, and training is resumed there with more steps.

        Arguments:
            folder: The folder.
            overwrite: Whether to replace a model in it.

        Raises:
            ValueError: If there is a model in the folder.
        """
        check_path(folder, "folder")
        place = prepared_folder(Path(folder), OUTPUTS, overwrite=overwrite)
        if place.resolve() != self.folder.resolve():
            place.mkdir(parents=True, exist_ok=True)
            for name in OUTPUTS:
                if (self.folder / name).exists():
                    shutil.copyfile(self.folder / name, place / name)
        if not (place / PICTURE).exists():
            self.draw(place)
        return place

    def draw(self, folder: Path) -> Path:
        """Writes a picture of samples into a folder; returns its path."""
        resolved = resolve(self.denoiser, SamplerRequest(nfe=SHOWN_NFE))
        steps, name = self.recipe.steps, resolved.recipe.name
        classes = self.classes
        labels = {"class_labels": [i % classes for i in range(SHOWN)]} if classes else None
        picture = picture_of(
            resolved.sampler,
            conditions=labels,
            seed=self.recipe.seed,
            title=f"after {steps} steps · {name} · {SHOWN_NFE} evaluations",
        )
        return write_atomic(folder / PICTURE, picture)


def train(
    data: ImageData | str | Path | Tensor,
    out: str | Path | None = None,
    recipe: TrainRecipe | str | Path | None = None,
    *,
    labels: Tensor | None = None,
    prediction: str | None = None,
    schedule: str | None = None,
    options: Mapping[str, Any] | None = None,
    unconditional: bool = False,
    flip: bool = False,
    data_range: tuple[float, float] | None = None,
    size: int | None = None,
    steps: int | None = None,
    checkpoint_every: int = 250,
    seed: int | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    started: Callable[[ImageData, TrainRecipe], None] | None = None,
    progress: Progress | bool | None = False,
) -> TrainedModel:
    r"""Trains a small diffusion model of the user's images, as ``fewstep train`` does.

    :func:`fewstep.training.train.train` has the losses and their sources.

    Cost: one evaluation of the network and its gradient a step, for a batch of images.

    Arguments:
        data: A folder of images (with a sub-folder for each class, or without), an idx or npz file;
            a tensor or array of uint8 with shape (N, C, H, W) or (N, H, W); or the images as
            :func:`fewstep.training.data.read_images` reads them.
        out: The folder of the model, in which an interrupted run is resumed by the same call; left out,
            there is none: :meth:`TrainedModel.save` writes it.
        recipe: How to train, or the path of such a file; left out, a recipe that suits the images. The
            arguments below replace its fields.
        labels: The classes of images in a tensor, integers from 0 with shape (N).
        prediction: The network's prediction: ``"eps"``, ``"x0"``, ``"v"`` or ``"flow"``.
        schedule: The noise schedule; ``edm`` and ``ve`` train a raw network in EDM's preconditioning,
            unless another prediction than ``"x0"`` is given; ``flow`` predicts ``"flow"``.
        options: Options of the schedule.
        unconditional: Whether to ignore the classes of the images.
        flip: Whether to mirror images left to right at random.
        data_range: The values of black and white; left out, (-1, 1).
        size: The height and width to which images are cropped and resized.
        steps: The number of training steps.
        checkpoint_every: The steps between two checkpoints.
        seed: The seed; left out, the recipe's, which is 0.
        device: The device to train on; ``"auto"`` is CUDA, MPS or the CPU.
        overwrite: Whether to replace a model in the folder.
        started: Called once with the images and the recipe, before the first step.
        progress: ``True`` for a bar, or a :class:`fewstep.base.progress.Progress`.

    Raises:
        ValueError, TypeError: Before the first step, if anything does not fit; later, if the loss is not
            finite.

    Example:
        >>> pixels = torch.randint(0, 256, (40, 8, 8), dtype=torch.uint8)
        >>> network = {"channels": [8, 8], "blocks": [1, 1], "attention": []}
        >>> recipe = fewstep.TrainRecipe(network=network, schedule={"name": "flow"}, prediction="flow", steps=2)
        >>> trained = fewstep.train(pixels, recipe=recipe, device="cpu")
        >>> fewstep.sample(trained.denoiser, 4, nfe=3).shape
        torch.Size([4, 1, 8, 8])
    """
    check_path(out, "out")
    for name, value in (("size", size), ("steps", steps), ("checkpoint_every", checkpoint_every)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{name} must be a positive integer, got {value!r:.40}")
    if options and schedule is None:
        raise ValueError("options are those of the schedule; give schedule too")
    place = find_device(device)
    if recipe is not None and not isinstance(recipe, (TrainRecipe, str, Path)):
        raise TypeError(
            f"recipe must be a TrainRecipe or the path of one, got {type(recipe).__name__}"
        )
    if isinstance(recipe, (str, Path)):
        recipe = TrainRecipe.from_record(read_json(recipe, what="the training recipe"))
    if recipe is not None and size is None:
        size = recipe.size
    images = _images(data, labels, size)
    recipe = recipe or default_recipe(images, device=place.type)
    changes: dict[str, Any] = {"size": size}
    if unconditional:
        changes["network"] = {**recipe.network, "num_classes": None}
    if flip:
        changes["flip"] = True
    if data_range is not None:
        changes["range"] = list(data_range)
    if steps is not None:
        changes["steps"] = steps
    if seed is not None:
        changes["seed"] = seed
    recipe = replace(recipe, **changes)
    if schedule is not None:
        record = {"name": schedule, **(options or {})}
        recipe = with_schedule(recipe, record, prediction=prediction)
    elif prediction is not None:
        recipe = replace(recipe, prediction=prediction)
    team = processes()
    if out is None and team.several:
        raise ValueError(f"{team.count} processes train one model in a folder; give out=")
    folder = Path(tempfile.mkdtemp(prefix="fewstep-train-")) if out is None else Path(out)
    if started is not None:
        started(images, recipe)
    try:
        run(
            images,
            folder,
            recipe,
            device=place,
            checkpoint_every=checkpoint_every,
            overwrite=overwrite,
            progress=progress,
        )
        classes = recipe.network.get("num_classes", images.num_classes)
        trained = TrainedModel(recipe, len(images), classes, folder, place)
        if out is not None and team.first:
            trained.draw(folder)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(trained, shutil.rmtree, folder, ignore_errors=True)
    return trained


def _images(data: Any, labels: Tensor | None, size: int | None) -> ImageData:
    if isinstance(data, (str, Path, ImageData)):
        if labels is not None:
            raise ValueError("labels belong to images in a tensor; those of files come with them")
        return data if isinstance(data, ImageData) else read_images(data, size=size)
    if not isinstance(data, Tensor):
        if not hasattr(data, "__array__"):
            raise TypeError(
                f"data is a path, a tensor or array of images, or ImageData, got {type(data).__name__}"
            )
        data = torch.as_tensor(data.__array__())
    if data.ndim == 3:
        data = data[:, None]
    if size is not None and tuple(data.shape[2:]) != (size, size):
        raise ValueError(f"images in a tensor are not resized; they are {tuple(data.shape[2:])}")
    own = None if labels is None else torch.as_tensor(labels).cpu().long()
    return ImageData(data.cpu().contiguous(), own)

"""``fewstep sample``: samples, a picture of them, and the recipe that reproduces them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import parse_labels, parse_options
from fewstep.base.progress import progress_of
from fewstep.base.runs import RunFolder, hash_inputs
from fewstep.cli._common import (
    Flag,
    Options,
    check_device,
    event_shape,
    follows,
    load_model,
    output_folder,
    positive,
    say,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fewstep.models.denoiser import Denoiser
    from fewstep.sampling.recipe import SamplerRecipe

SAMPLES, PICTURE, RECIPE = "samples.safetensors", "grid.png", "recipe.json"
SINGLES = "images"
DEFAULT_N = 64
DEFAULT_BATCH = 64
LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in the grey of a picture (ITU-R BT.601)."""
MOST_SHOWN = 100
"""The most images in the picture."""
MOST_POINTS = 100_000
"""The most samples of other shapes in it."""


def sample(
    model: str,
    *,
    out: Path,
    solver: str | None = None,
    nfe: int | None = None,
    steps: int | None = None,
    n: Annotated[int, Parameter(name=["-n", "--n"])] = DEFAULT_N,
    recipe: Path | None = None,
    profile: Path | None = None,
    force: Flag = False,
    grid: str | None = None,
    option: Options = None,
    head_start: float | None = None,
    class_labels: str | None = None,
    prompt: str | None = None,
    guidance: float | None = None,
    image: Path | None = None,
    strength: float | None = None,
    mask: Path | None = None,
    from_frame: int | None = None,
    teacher: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    download: Flag = False,
    batch_size: int | None = None,
    singles: Flag = False,
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None,
    overwrite: Flag = False,
) -> None:
    """Draw samples: OUT/grid.png, OUT/samples.safetensors and OUT/recipe.json.

    Samples of a latent model are latents; the picture shows them decoded.

    An interrupted run is resumed by the same command. Started several times together (torchrun, accelerate
    launch, srun) the processes share the batches, and the files have the same bytes.

    Args:
        model: An embedded name (see `fewstep models`), a folder, or the id of a model on the Hugging
            Face hub (owner/name) that is in the local cache.
        out: The folder to write.
        solver: A solver (see `fewstep solvers`), or auto, which is the default.
        nfe: The number of network evaluations; 10 if left out.
        steps: The number of the solver's steps, instead.
        n: The number of samples.
        recipe: A file with a recipe, a plan or a tuned sampler, instead of a solver.
        profile: The profile of this model (`fewstep fit`), for auto.
        force: Use a recipe or profile although it was made for another model or schedule.
        grid: The name of a time grid, or auto:FILE for the times of a profile; left out, the solver's own.
        option: An option of solver or grid as key=value; can be repeated.
        head_start: The time above which the Gaussian solution replaces evaluations.
        class_labels: One class (3), classes in turn (0,1,2), or all classes in turn (all).
        prompt: The text, for a text-to-image model.
        guidance: The scale of classifier-free guidance; 1 is none.
        image: Start from this instead of noise: a picture, or samples of another run (safetensors);
            needs --strength, or --mask.
        strength: The share of the time grid that is run from the image, above 0 and at most 1; all
            evaluations are on it.
        mask: Inpainting: a picture, white where samples are new and black where they are --image; or a
            safetensors file with a tensor mask, 1 and 0. It needs no --strength.
        from_frame: MODEL is an operator (`fewstep distill`): it is evaluated once, up to this frame, and
            --solver continues from there with --teacher; --nfe counts all evaluations.
        teacher: The model that the operator was distilled from, for --from-frame.
        seed: The seed; sample i depends on (seed, i) alone.
        device: Where to run: auto, cpu, cuda, mps.
        dtype: The type of the weights: float32 (the default), float16 or bfloat16; samples are float32.
        download: Download a model of the hub that is not in the cache; without it nothing is downloaded.
        batch_size: The samples in one network evaluation; 64 if left out.
        singles: Write each image by itself too, OUT/images/000000.png and so on.
        compile: Compile the network with torch.compile in this mode: worth it for many samples, which then
            differ by rounding; the last two modes use CUDA graphs.
        overwrite: Replace existing results.
    """
    from fewstep.base.files import write_rows
    from fewstep.base.processes import processes
    from fewstep.base.sharing import Sharing
    from fewstep.diffusion.noise import NoiseSource
    from fewstep.loading import model_folder
    from fewstep.models.compiling import check_mode, compiled
    from fewstep.models.guidance import INPAINTING
    from fewstep.sampling.batches import ConditionsAt, batches_of, run_each
    from fewstep.sampling.request import SamplerRequest
    from fewstep.sampling.resolve import resolve
    from fewstep.sampling.sample import inpainting

    positive("-n", n)
    positive("--batch-size", batch_size)
    NoiseSource(seed, ())
    output_folder(out)
    mode, team = check_mode(compile), processes()
    if team.several and overwrite:
        raise ValueError(
            f"--overwrite with {team.count} processes could delete what another has begun; remove the "
            "folder first"
        )
    given_device, device = device, check_device(device)
    denoiser = load_model(model, device, dtype, download=download)
    options = parse_options(option)
    if (from_frame is None) != (teacher is None):
        raise ValueError(
            "--from-frame and --teacher belong together: the operator's frame, and the solver's model"
        )
    if from_frame is not None and teacher is not None:
        if recipe is not None and solver is None and not options:
            solver, options = _solver_of(recipe)
        denoiser = _continued(
            denoiser, load_model(teacher, device, dtype), from_frame, solver, options, force
        )
        solver, options = None, {}
    if strength is not None:
        if "strength" in options:
            raise ValueError("strength is given twice, as --strength and as --option strength")
        options["strength"] = strength
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        steps=steps,
        grid=grid,
        head_start=head_start,
        options=options,
        recipe=recipe,
        profile=profile,
    )
    if mask is not None and image is None:
        raise ValueError("--mask keeps a part of an image; give --image too")
    begins = image is not None and (mask is None or "strength" in options or "t_start" in options)
    resolved = resolve(denoiser, request, guidance=guidance, image=begins, force=force)
    chosen, sampler = resolved.recipe, resolved.sampler
    decode = getattr(denoiser, "decode", None)
    pictures = None
    if image is not None:
        pictures = _image(image, event_shape(denoiser), denoiser, n)
    if mask is not None:
        sampler = inpainting(sampler, pictures, _mask(mask, denoiser))
    if resolved.chosen is not None:
        say(f"auto chose {resolved.chosen}")
    labels = parse_labels(class_labels, denoiser, n)

    def conditions(rows: range) -> dict[str, Any]:
        texts: dict[str, Any] = {} if prompt is None else {"prompt": [prompt] * len(rows)}
        if mask is not None and pictures is not None:
            texts[INPAINTING] = pictures[rows.start : rows.stop]
        return (
            texts if labels is None else {"class_labels": labels[rows.start : rows.stop], **texts}
        )

    denoiser = sampler.denoiser  # with its guidance
    shape = event_shape(denoiser)
    if singles and decode is None and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(f"--singles are images, {model!r} has samples of shape {shape}")
    begin = pictures if begins else None
    denoiser.prepare(n, conditions(range(n)))

    size = min(n, batch_size or DEFAULT_BATCH)
    where = denoiser.device.type if team.several else device
    settings = _settings(chosen, model, denoiser, n, seed, class_labels, where, size)
    if prompt is not None:
        settings["prompt"] = prompt
    if dtype is not None:
        settings["dtype"] = dtype
    if from_frame is not None:
        settings |= {"from_frame": from_frame, "teacher": teacher}
    if image is not None:
        settings["image"] = str(image)
    if mask is not None:
        settings["mask"] = str(mask)
    if recipe is not None and (line := _not_taken(chosen.about, settings)):
        say(line)
    # A pipeline is more than its network: text encoders, decoder, configuration.
    files = None
    if settings["weights"] is None:
        files = hash_inputs(model_folder(model), without=out)
    inputs = {**settings, "fingerprint": denoiser.fingerprint(), "files": files}
    if image is not None:
        inputs["image_files"] = hash_inputs(image)
    if mask is not None:
        inputs["mask_files"] = hash_inputs(mask)
    if singles:
        inputs["singles"] = True
    if mode is not None:
        inputs["compile"] = mode  # the samples differ by rounding
    condition = prompt if class_labels is None else f"classes {class_labels}"
    title = _title(model, chosen, n, condition)
    run = RunFolder(
        out, "run of fewstep sample", outputs=[SAMPLES, PICTURE, RECIPE, f"{SINGLES}/*.png"]
    )
    batches = batches_of(range(n), size)
    given_rows = None if begin is None else (lambda rows: begin[rows[0] : rows[-1] + 1])

    def draw(chosen: Iterable[range]) -> None:
        """Draws batches; each is written by a thread while the next one is computed."""
        with ThreadPoolExecutor(1, thread_name_prefix="fewstep writer") as writer:
            written: Future[None] | None = None
            for rows, part in run_each(
                sampler,
                chosen,
                seed=seed,
                conditions=ConditionsAt(conditions),
                image=given_rows,
                progress=progress,
            ):
                tensors = {"samples": part.x.float().cpu()}
                if written is not None:
                    written.result()
                written = writer.submit(run.write_tensors, _name(rows), tensors)
            if written is not None:
                written.result()

    def parts() -> Iterator[Tensor]:
        for rows in batches:
            samples = (run.read_tensors(_name(rows)) or {}).get("samples")
            if samples is None:  # damaged since it was written
                draw([rows])
                samples = (run.read_tensors(_name(rows)) or {})["samples"]
            yield samples

    def write() -> None:
        write_rows(out / SAMPLES, "samples", (n, *shape), parts)
        about = {**settings, "inputs": run.digest}
        _write_results(out, parts(), chosen, about, title, decode)
        if singles:
            _write_singles(out / SINGLES, parts(), denoiser)
        run.finish()

    def saved() -> str | None:
        done = sum(run.tensors_file(_name(rows)).exists() for rows in batches)
        return f"{done} of {len(batches)} batches are saved" if done else None

    with keeping(saved), progress_of(follows()) as progress, compiled(denoiser, mode):
        evaluations = sampler.nfe or 0
        if team.several:
            if run.join(inputs, finished=_finished(out), progress=progress):
                # Of the parts that exist each process checks those that it reads.
                progress.stage(
                    "sampling", None if sampler.nfe is None else evaluations * len(batches)
                )
                with Sharing(
                    team.own_first(batches),
                    lambda rows: run.tensors_file(_name(rows)),
                    over=run.is_over,
                    progress=progress,
                ) as work:
                    while work.unfinished():
                        draw(work.claimed())
                with run.finishing(progress=progress) as left:
                    if left:
                        write()
        else:
            with run.running(inputs, overwrite=overwrite, progress=progress):
                missing = [rows for rows in batches if run.read_tensors(_name(rows)) is None]
                done = evaluations * (len(batches) - len(missing))
                total = None if sampler.nfe is None else evaluations * len(batches)
                progress.stage("sampling", total, done=done)
                draw(missing)
                write()
    if not team.first:
        return
    more = f", {out / SINGLES}" if singles else ""
    known = getattr(denoiser, "trained_noises", None)
    if known is not None and (trained := min(n, known(seed))):
        say(
            f"{trained} of these {n} samples are from noises that the operator was trained on; with another --seed "
            "there are none"
        )
    say(f"wrote {out / PICTURE}{more}, {out / SAMPLES} and {out / RECIPE}")
    again = command(
        "sample",
        model,
        recipe=out / RECIPE,
        n=None if n == DEFAULT_N else n,
        seed=seed + 1,
        class_labels=class_labels,
        prompt=prompt,
        image=image,
        mask=mask,
        from_frame=from_frame,
        teacher=teacher,
        device=None if given_device == "auto" else given_device,
        dtype=dtype,
        force=force,
        out=f"{out}-2",
    )
    say(f"next: {again}")


def _solver_of(recipe: Path) -> tuple[str | None, dict[str, Any]]:
    """Returns the solver with which a recipe goes on from a frame, and its options; if it does."""
    from fewstep.operators.model import SOLVER, SOLVER_OPTIONS
    from fewstep.sampling.recipe import SamplerRecipe

    options = SamplerRecipe.load(recipe).options
    return options.get(SOLVER), dict(options.get(SOLVER_OPTIONS) or {})


def _continued(
    student: Denoiser,
    teacher: Denoiser,
    frame: int,
    solver: str | None,
    options: Mapping[str, Any],
    force: bool,
) -> Denoiser:
    """Returns the model that continues from a frame of an operator."""
    from fewstep.operators.continued import continued
    from fewstep.operators.model import OperatorModel

    if not isinstance(student, OperatorModel):
        raise ValueError("--from-frame is for an operator (the folder of fewstep distill)")
    return continued(
        student, teacher, frame, solver=solver or "auto", options=options, force=force
    )


def _image(file: Path, shape: tuple[int, ...], denoiser: Denoiser, n: int) -> Tensor:
    """Returns the image in the model's range, n times; or n samples of another run."""
    import torch

    from fewstep.training.data import IMAGE_SUFFIXES, read_images

    if not file.is_file():
        raise ValueError(f"--image {str(file)!r} is not a file")
    if file.suffix == ".safetensors":
        tensor = _tensor(file, "samples")
        tensor = tensor[None] if tuple(tensor.shape) == shape else tensor
    elif file.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(
            f"--image is a picture ({', '.join(IMAGE_SUFFIXES)}) or .safetensors, got {str(file)!r}"
        )
    elif denoiser.latents:
        raise ValueError(
            "this model starts from latents; give --image the samples.safetensors of another run"
        )
    else:
        square = len(shape) == 3 and shape[1] == shape[2]
        images = read_images(file, size=shape[1] if square else None)
        tensor = images.floats(data_range=getattr(denoiser, "data_range", (-1.0, 1.0)))
        if len(shape) == 3 and (tensor.shape[1], shape[0]) == (3, 1):
            tensor = (tensor * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        elif len(shape) == 3 and (tensor.shape[1], shape[0]) == (1, 3):
            tensor = tensor.expand(-1, 3, -1, -1)
    if tuple(tensor.shape[1:]) != shape or len(tensor) not in (1, n):
        raise ValueError(
            f"{str(file)!r} has shape {tuple(tensor.shape)}; the model's samples are {shape}, and "
            f"there must be one of them or {n}"
        )
    return tensor.expand(n, *shape)


def _tensor(file: Path, name: str) -> Tensor:
    """Returns the tensor of that name in a file, or the only one, in float32."""
    from fewstep.base.files import read_tensors

    tensors = read_tensors(file)
    tensor = tensors.get(name, next(iter(tensors.values())) if len(tensors) == 1 else None)
    if tensor is None:
        raise ValueError(f"{str(file)!r} has no tensor {name!r}: {', '.join(tensors)}")
    return tensor.float()


def _mask(file: Path, denoiser: Denoiser) -> Tensor:
    """Returns a mask for the samples of a model: 1 where they are new."""
    from fewstep.training.data import IMAGE_SUFFIXES, read_images

    if not file.is_file():
        raise ValueError(f"--mask {str(file)!r} is not a file")
    if file.suffix == ".safetensors":
        return _tensor(file, "mask")
    shape = event_shape(denoiser)
    if file.suffix.lower() not in IMAGE_SUFFIXES or len(shape) != 3 or denoiser.latents:
        raise ValueError(
            f"--mask is a picture ({', '.join(IMAGE_SUFFIXES)}) for models of pictures, else .safetensors "
            f"with a tensor 'mask' for samples of shape {shape}; got {str(file)!r}"
        )
    size = shape[1] if shape[1] == shape[2] else None
    return read_images(file, size=size).floats(data_range=(0.0, 1.0)).mean(1)


def _not_taken(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Returns in a line the settings of a recipe's own run that are not part of a sampler and differ here."""
    names = ("n", "class_labels", "prompt", "image", "mask", "seed")
    other = {name: about.get(name) for name in names if about.get(name) != settings.get(name)}
    if not (other := {k: v for k, v in other.items() if v is not None}):
        return None
    options = (
        f"{'-n' if k == 'n' else '--' + k.replace('_', '-')} {v!s:.60}" for k, v in other.items()
    )
    here = (
        f"{k.replace('_', ' ')} {settings[k]!s:.60}" for k in other if settings.get(k) is not None
    )
    now = ", ".join(here) or "none of these"
    return f"not taken over from the recipe: {', '.join(options)}; this run has {now}"


def _name(rows: Sequence[int]) -> str:
    """Returns the name of a batch among the parts of the run."""
    return f"{rows[0]:09d}"


def _finished(out: Path) -> Callable[[str], bool]:
    """Returns what tells whether the results in the folder are of inputs with a digest."""

    def finished(digest: str) -> bool:
        from fewstep.base.files import read_json

        if not all((out / name).exists() for name in (SAMPLES, PICTURE, RECIPE)):
            return False
        recipe = read_json(out / RECIPE, what="recipe")
        about = recipe.get("about") if isinstance(recipe, dict) else None
        return isinstance(about, dict) and about.get("inputs") == digest

    return finished


def _write_singles(folder: Path, parts: Iterable[Tensor], denoiser: Denoiser) -> None:
    """Writes each image at its own size, without labels or enlargement."""
    import torch
    from PIL import Image

    from fewstep.base.files import write_atomic
    from fewstep.reporting.plots import to_uint8

    decode = getattr(denoiser, "decode", None)
    low, high = (-1.0, 1.0) if decode is not None else getattr(denoiser, "data_range", (-1.0, 1.0))
    number = 0
    for part in parts:
        with torch.no_grad():
            shown = part if decode is None else decode(part).cpu()
        pixels = to_uint8((shown - low) * (2 / (high - low)) - 1).permute(0, 2, 3, 1)
        for single in pixels.contiguous().numpy():
            flat = single[..., 0] if single.shape[-1] == 1 else single
            write_atomic(folder / f"{number:06d}.png", _png(Image.fromarray(flat)))
            number += 1


def _settings(
    recipe: SamplerRecipe,
    model: str,
    denoiser: Denoiser,
    n: int,
    seed: int,
    class_labels: str | None,
    device: str,
    batch_size: int,
) -> dict[str, Any]:
    """Returns the inputs of the samples, for the state file and the recipe."""
    import json

    inner = getattr(denoiser, "inner", denoiser)
    weights = getattr(inner, "about", {}).get("sha256")
    settings: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "n": n,
        "seed": seed,
        "class_labels": class_labels,
        "device": device,
        "batch_size": batch_size,
        "sampler": json.loads(recipe.to_json()),
    }
    if inner.integer_times:
        settings["integer_times"] = True
    return settings


def _write_results(
    out: Path,
    parts: Iterable[Tensor],
    recipe: SamplerRecipe,
    settings: dict[str, Any],
    title: str,
    decode: Callable[[Tensor], Tensor] | None,
) -> None:
    """Writes the recipe, and the picture of the first samples."""
    from dataclasses import replace

    import torch

    from fewstep import __version__
    from fewstep.base.files import write_atomic
    from fewstep.reporting.plots import picture

    about = {
        key: value for key, value in settings.items() if key != "sampler" and value is not None
    }
    about = {**recipe.about, **about, "fewstep": __version__}
    replace(recipe, about=about).save(out / RECIPE)
    shown, count = [], 0
    for part in parts:
        most = MOST_SHOWN if part.ndim == 4 else MOST_POINTS
        shown.append(part[: most - count])
        count += len(shown[-1])
        if count >= most:
            break
    first = torch.cat(shown)
    write_atomic(
        out / PICTURE, _png(picture(first if decode is None else decode(first).cpu(), title=title))
    )


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _title(model: str, recipe: SamplerRecipe, n: int, condition: str | None) -> str:
    nfe = recipe.plan.nfe if recipe.plan is not None else recipe.nfe
    count = f" · {nfe} evaluation{'s' * (nfe > 1)}" if nfe else ""
    shown = "" if condition is None else f" · {condition}"
    guided = f" · guidance {recipe.guidance:g}" if recipe.guidance is not None else ""
    return f"{Path(model).name} · {recipe.name or 'plan'}{count}{shown}{guided}"

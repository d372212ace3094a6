"""``fewstep sample``: samples, a picture of them, and the recipe that reproduces them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.progress import progress_of
from fewstep.base.runs import RunFolder, hash_inputs
from fewstep.cli._common import (
    Flag,
    Options,
    draw,
    event_shape,
    load_model,
    output_folder,
    parse_labels,
    parse_options,
    positive,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fewstep.models.denoiser import Denoiser
    from fewstep.sampling.recipe import SamplerRecipe

SAMPLES, PICTURE, RECIPE = "samples.safetensors", "grid.png", "recipe.json"
DEFAULT_BATCH = 64
MOST_SHOWN = 100
"""The most samples in the picture."""


def sample(
    model: str,
    *,
    out: Path,
    solver: str | None = None,
    nfe: int | None = None,
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 64,
    recipe: Path | None = None,
    profile: Path | None = None,
    force: Flag = False,
    grid: str | None = None,
    option: Options = None,
    head_start: float | None = None,
    class_labels: str | None = None,
    prompt: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int | None = None,
    overwrite: Flag = False,
) -> None:
    """Draw samples: OUT/grid.png, OUT/samples.safetensors and OUT/recipe.json.

    Samples of a latent model are latents; the picture shows what its autoencoder makes of them.

    A run that was interrupted is resumed when the same command is given again.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The folder to write.
        solver: A solver (see `fewstep solvers`), or auto, which is the default.
        nfe: The number of network evaluations; 10 if left out.
        n: How many samples.
        recipe: A file with a recipe, a plan or a tuned sampler, instead of a solver.
        profile: A file of what was measured of this model (`fewstep analyze`), for auto.
        force: Take a recipe or profile although it was made for another model or schedule.
        grid: The name of a time grid, or auto:FILE for the times of a profile; left out, the solver's own.
        option: An option of solver or grid as key=value; can be repeated.
        head_start: The time above which the Gaussian solution replaces evaluations.
        class_labels: One class (3), classes in turn (0,1,2), or all classes in turn (all).
        prompt: The text, for a text-to-image model.
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed; sample i depends on (seed, i) alone.
        device: Where to run, for example cpu or cuda.
        batch_size: How many samples go through the network at a time; 64 if left out.
        overwrite: Replace the results that are there.
    """
    import torch

    from fewstep.diffusion.noise import NoiseSource
    from fewstep.sampling.request import SamplerRequest
    from fewstep.sampling.resolve import resolve

    positive("-n", n)
    positive("--batch-size", batch_size)
    NoiseSource(seed, ())
    output_folder(out)
    denoiser = load_model(model, device)
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        grid=grid,
        head_start=head_start,
        options=parse_options(option),
        recipe=recipe,
        profile=profile,
    )
    resolved = resolve(denoiser, request, guidance=guidance, force=force)
    if resolved.chosen is not None:
        say(f"auto chose {resolved.chosen}")
    chosen, made = resolved.recipe, resolved.sampler
    labels = parse_labels(class_labels, denoiser, n)
    decode = getattr(denoiser, "decode", None)

    def conditions(rows: range) -> dict[str, Any]:
        texts = {} if prompt is None else {"prompt": [prompt] * len(rows)}
        return (
            texts if labels is None else {"class_labels": labels[rows.start : rows.stop], **texts}
        )

    denoiser = made.denoiser  # with its guidance
    event_shape(denoiser)
    denoiser.prepare(n, conditions(range(n)))

    size = min(n, batch_size or DEFAULT_BATCH)
    settings = _settings(chosen, model, denoiser, n, seed, class_labels, device, size)
    if prompt is not None:
        settings["prompt"] = prompt
    # A pipeline is more than its network: text encoders, decoder, configuration.
    files = hash_inputs(model, without=out) if settings["weights"] is None else None
    inputs = {**settings, "fingerprint": denoiser.fingerprint(), "files": files}
    asked = prompt if class_labels is None else f"classes {class_labels}"
    title = _title(model, chosen, n, asked)
    run = RunFolder(out, "run of fewstep sample", outputs=[SAMPLES, PICTURE, RECIPE])
    with (
        progress_of(True) as progress,
        run.running(inputs, overwrite=overwrite, progress=progress),
    ):
        progress.stage("sampling", None if made.nfe is None else made.nfe * -(-n // size))
        parts = []
        for start in range(0, n, size):
            rows = range(start, min(start + size, n))
            samples = (run.read_tensors(f"{start:09d}") or {}).get("samples")
            if samples is None:
                cond = conditions(rows)
                samples = draw(made, rows, seed=seed, cond=cond, progress=progress)
                run.write_tensors(f"{start:09d}", {"samples": samples})
            else:
                progress.tick(made.nfe or 0)
            parts.append(samples)
        _write_results(out, torch.cat(parts), chosen, settings, title, decode)
        run.finish()
    say(f"wrote {out / PICTURE}, {out / SAMPLES} and {out / RECIPE}")
    again = ["fewstep", "sample", model, "--recipe", str(out / RECIPE), "--seed", str(seed + 1)]
    if class_labels is not None:
        again += ["--class-labels", class_labels]
    if prompt is not None:
        again += ["--prompt", prompt]
    say(f"next: {shlex.join([*again, '--out', f'{out}-2'])}")


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
    """Returns what determines the samples, for the state file and the recipe."""
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
    samples: Tensor,
    recipe: SamplerRecipe,
    settings: dict[str, Any],
    title: str,
    decode: Callable[[Tensor], Tensor] | None,
) -> None:
    """Writes the samples, their picture and the recipe."""
    from dataclasses import replace

    from fewstep import __version__
    from fewstep.base.files import write_atomic, write_tensors
    from fewstep.reporting.plots import picture

    write_tensors(out / SAMPLES, {"samples": samples})
    about = {
        key: value for key, value in settings.items() if key != "sampler" and value is not None
    }
    about = {**recipe.about, **about, "fewstep": __version__}
    replace(recipe, about=about).save(out / RECIPE)
    shown = samples[:MOST_SHOWN] if samples.ndim == 4 else samples
    shown = shown if decode is None else decode(shown).cpu()
    write_atomic(out / PICTURE, _png(picture(shown, title=title)))


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _title(model: str, recipe: SamplerRecipe, n: int, asked: str | None) -> str:
    nfe = recipe.plan.nfe if recipe.plan is not None else recipe.nfe
    calls = f" · {nfe} evaluation{'s' * (nfe > 1)}" if nfe else ""
    shown = "" if asked is None else f" · {asked}"
    guided = f" · guidance {recipe.guidance:g}" if recipe.guidance is not None else ""
    return f"{Path(model).name} · {recipe.name or 'plan'}{calls}{shown}{guided}"

"""``fewstep tune``: a sampler searched for one model, as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.base.interrupts import keeping
from fewstep.base.options import chosen_labels, parse_options
from fewstep.base.processes import processes
from fewstep.cli._common import Flag, Options, follows, load_model, positive, saved_files, say
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.learned.tuning import TunedSampler


def tune(
    model: str,
    *,
    out: Path,
    nfe: int = 5,
    family: str = "gs",
    objective: str = "auto",
    data: str | None = None,
    features: str | None = None,
    unseen: list[str] | None = None,
    solver: str | None = None,
    grid: str | None = None,
    option: Options = None,
    head_start: float | None = None,
    family_option: list[str] | None = None,
    setting: list[str] | None = None,
    steps: int | None = None,
    optimizer: str | None = None,
    class_labels: str | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: Flag = False,
    keep_worse: Flag = False,
) -> int:
    """Search a sampler of few evaluations for a model: OUT is a recipe for sample, compare, diffusers.

    Started several times together (torchrun, accelerate launch) the processes share every batch.
    The same command resumes an interrupted run, to the same result; its checkpoints are in a folder
    beside OUT. If the result is not better than its start, in features, on seeds and on real images that
    the search did not use, or loses recall or the variety of a class, OUT is not written and the exit code
    is 3.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The file to write, for example tuned.json.
        nfe: The number of network evaluations of the sampler.
        family: The parameters that are learned: gs (times and corrections of a solver), ld3,
            schedule, free, ggdm, ggdm+pred+time and others.
        objective: endpoint, perceptual, trajectory, mmd; sums (mmd+0.1*endpoint), stages (endpoint,mmd);
            auto is endpoint+perceptual for images with data, endpoint,mmd for vectors, else endpoint.
        data: Real data: an embedded name (fashion), a folder of images, an idx or npz file.
        features: The features of perceptual and mmd: fashion, fashion-robust, pixels, or a folder or file.
        unseen: Further features for the final scores alone (a folder or file); can be repeated.
        solver: The solver to start from; left out, that of the model's profile or else the best for this
            kind of schedule (auto); ddim for the families ggdm.
        grid: The time grid to start from.
        option: An option of solver or grid as key=value; can be repeated.
        head_start: The time above which the Gaussian solution replaces evaluations.
        family_option: An option of the family as key=value (coordinate=lambda); can be repeated.
        setting: A setting of the search as key=value (batch_size=32); can be repeated.
        steps: The steps of each stage.
        optimizer: adam, with gradients, which is the default; or cmaes, an evolution strategy without (the extra
            search), for models that have none.
        class_labels: The classes to draw from: 3, or 0,1,2, or all; all if left out.
        prompt: The text, for a text-to-image model.
        prompts: A file with a text a line, for a text-to-image model: samples get them in turn.
        guidance: The scale of classifier-free guidance; it becomes part of the recipe.
        seed: The seed of all random draws.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Start again and replace existing files.
        keep_worse: Write the result even if it is not shown to be better than its start.
    """
    from fewstep.learned.settings import Search
    from fewstep.learned.tuning import checkpoint_folder
    from fewstep.learned.tuning import tune as run

    positive("--steps", steps)
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; --out must be a file, for example tuned.json")
    settings = parse_options(setting)
    for name, value in (("steps", steps), ("optimizer", optimizer)):
        if value is not None and name in settings:
            raise ValueError(f"{name} is given twice, as --{name} and as --setting {name}")
        if value is not None:
            settings[name] = value
    denoiser = load_model(model, device)
    cond: dict[str, Any] = {}
    if class_labels is not None:
        cond["class_labels"] = chosen_labels(class_labels, denoiser)
    texts = _prompts(prompt, prompts)
    if texts is not None:
        cond["prompt"] = texts
    with keeping(lambda: saved_files(checkpoint_folder(out), "state.safetensors", "checkpoint")):
        tuned = run(
            denoiser,
            nfe=nfe,
            family=family,
            objective=objective,
            data=data,
            features=features,
            unseen=unseen or (),
            solver=solver,
            grid=grid,
            head_start=head_start,
            options=parse_options(option),
            family_options=parse_options(family_option),
            guidance=guidance,
            search=Search.of(settings),
            seed=seed,
            out=out,
            overwrite=overwrite,
            keep_worse=keep_worse,
            progress=follows(),
            **cond,
        )
    if not processes().first:
        return 0 if tuned.verdict.better or keep_worse else 3
    say(str(tuned))
    folder = checkpoint_folder(out)
    page = _page(tuned, folder / "report.html")
    if not tuned.verdict.better and not keep_worse:
        more = f"; {page} shows the search" if page else ""
        say(f"{out} was not written{more}; to write it all the same, add --keep-worse")
        return 3
    more = f" and {page}" if page else ""
    say(f"wrote {out}{more}; the search's checkpoints are in {folder}")
    if class_labels is None and "class_labels" in denoiser.null_condition:
        class_labels = "all"
    device_ = None if device == "auto" else device
    again = command(
        "sample",
        model,
        recipe=out,
        class_labels=class_labels,
        prompt=None if texts is None else texts[0],
        device=device_,
        out=out.with_suffix(""),
    )
    say(f"next: {again}")
    return 0


def _prompts(prompt: str | None, prompts: Path | None) -> list[str] | None:
    """Returns the texts of the conditions: one, or the lines of a file that are not empty."""
    if prompts is None:
        return None if prompt is None else [prompt]
    if prompt is not None:
        raise ValueError("--prompt and --prompts both give texts; give one of them")
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(prompts)!r} cannot be read: {error}; give a text file") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{str(prompts)!r} has no texts; give a file with one a line")
    return texts


def _page(tuned: TunedSampler, path: Path) -> Path | None:
    """Writes the page of the search, if its libraries are installed."""
    try:
        from fewstep.learned.page import write_page

        return write_page(tuned, path)
    except ImportError:
        return None

"""``fewstep fit``: measures which sampler suits a model best."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import budgets_of, parse_labels
from fewstep.base.processes import processes
from fewstep.base.progress import progress_of
from fewstep.cli._common import (
    Flag,
    event_shape,
    exists,
    follows,
    load_model,
    positive,
    saved_files,
    say,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.models.denoiser import Denoiser


def fit(
    model: str,
    *,
    out: Path | None = None,
    nfe: str = "4,5,6,8,10,15,20",
    n: Annotated[int, Parameter(name=["-n", "--n"])] = 16,
    class_labels: str | None = None,
    prompt: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Measure which sampler suits a model best at each budget: OUT, a profile.

    At most 6,138 evaluations of one image for the seven budgets: a minute for a small model. The same
    command resumes an interrupted measurement; started several times together (torchrun, accelerate launch,
    srun) the processes share its parts. Nothing is trained and no data is needed. `fewstep
    sample MODEL --profile OUT` uses the profile; a profile in the model's own folder is used by default.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The file to write; left out, profile.json in the model's folder.
        nfe: The numbers of network evaluations to measure for, with commas between.
        n: The number of trajectories; five of eight to fit to, the others for the selection.
        class_labels: One class (3), classes in turn (0,1,2), or all classes in turn (all), which is
            the default for a model with classes.
        prompt: The text, for a text-to-image model.
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed of the noise.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Replace an existing file.
    """
    team = processes()
    if overwrite and team.several:
        raise ValueError(
            "--overwrite with several processes could replace what another has finished; remove the file first"
        )
    budgets = budgets_of(nfe)
    positive("-n", n)
    file = _file(model, out)
    if file.exists() and not overwrite and not team.several:
        raise exists(file)
    denoiser = load_model(model, device)
    event_shape(denoiser)
    labels = parse_labels(class_labels, denoiser, n)
    cond: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    if prompt is not None:
        cond["prompt"] = prompt

    from fewstep.studies.fit import fit as measure

    # A process that comes late finds the profile of the others.
    if file.exists() and not overwrite:
        if not _is_of(file, denoiser, budgets, n, seed, guidance):
            raise exists(file)
        return
    parts = file.with_name(f"{file.name}.parts")
    with (
        progress_of(follows()) as progress,
        keeping(lambda: saved_files(parts, "parts/*", "parts")),
    ):
        profile = measure(
            denoiser,
            budgets,
            n=n,
            seed=seed,
            guidance=guidance,
            folder=parts,
            out=file,
            overwrite=overwrite,
            progress=progress,
            **cond,
        )
    shutil.rmtree(parts, ignore_errors=True)
    if not team.first:
        return
    say(str(profile.table()))
    say(
        f"wrote {file} ({profile.about['evaluations']:,} evaluations, {profile.about['seconds']} s)"
    )
    again = command(
        "sample",
        model,
        nfe=min(budgets, key=lambda k: abs(k - 10)),
        profile=out,
        class_labels=class_labels,
        prompt=prompt,
        guidance=guidance,
        out="samples",
    )
    say(f"next: {again}")


def _is_of(
    file: Path,
    denoiser: Denoiser,
    budgets: Sequence[int],
    n: int,
    seed: int,
    guidance: float | None,
) -> bool:
    """Returns whether a profile is the result of this command."""
    from fewstep.sampling.profile import Profile

    profile = Profile.load(file)
    same = profile.fingerprint == denoiser.fingerprint() and profile.guidance == (guidance or 1.0)
    given = (profile.about.get("n"), profile.about.get("seed"), sorted(profile.recommended))
    return same and given == (n, seed, list(budgets))


def _file(model: str, out: Path | None) -> Path:
    if out is not None:
        return out
    if not Path(model).is_dir():
        raise ValueError(
            f"{model!r} is not a folder, so the profile cannot be written there; give --out FILE"
        )
    from fewstep.sampling.profile import PROFILE

    return Path(model) / PROFILE

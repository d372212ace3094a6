"""``fewstep record``: trajectories of a model on disk, to distill from; statistics and verification of such a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.base.interrupts import keeping
from fewstep.base.options import chosen_labels, parse_options
from fewstep.cli._common import (
    Flag,
    Options,
    console,
    follows,
    load_model,
    output_folder,
    positive,
    say,
    say_result,
)
from fewstep.reporting.commands import command

if TYPE_CHECKING:
    from fewstep.models.denoiser import Denoiser
    from fewstep.trajectories import TrajectoryStore

MANY, FEW = 4096, 16
"""The most trajectories that statistics read, and that are integrated again for a spectrum."""


def record(
    model: str | None = None,
    *,
    out: Path | None = None,
    n: Annotated[int | None, Parameter(name=["-n", "--n"])] = None,
    solver: str | None = None,
    nfe: int | None = None,
    recipe: Path | None = None,
    grid: str | None = None,
    option: Options = None,
    keep: str | None = None,
    dtype: str | None = None,
    class_labels: str | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    shard_size: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: Flag = False,
    verify: Path | None = None,
    stats: Path | None = None,
) -> int:
    """Record trajectories of a model in a folder: OUT/manifest.json and OUT/shard-*.safetensors.

    An interrupted run is resumed by the same command, or by `fewstep record MODEL --out OUT`. Several
    may run at once on one folder, also on several machines.

    Args:
        model: An embedded name (see `fewstep models`), or a folder.
        out: The folder to write.
        n: The number of trajectories.
        solver: A deterministic solver; auto if left out, dopri5 for any accuracy.
        nfe: The number of network evaluations; 20 if left out.
        recipe: A file with a recipe, a plan or a tuned sampler, instead of a solver.
        grid: The name of a time grid; left out, the solver's own.
        option: An option of solver or grid as key=value; can be repeated.
        keep: The states to record after the first: 4 (on the quadratic grid), uniform:8, all, knots
            of the plan (knots:5,10,20) or times (times:0.5,0.25); 4 if left out.
        dtype: The type of the states on disk: float16 (if left out), float32 or bfloat16.
        class_labels: One class (3), classes in turn (0,1,2), all in turn (all) or drawn (random).
        guidance: The scale of classifier-free guidance; 1 is none.
        seed: The seed; trajectory i depends on (seed, i) alone; 0 if left out.
        shard_size: The number of trajectories of a file; 1024 if left out.
        batch_size: The trajectories in one network evaluation; 64 if left out.
        device: Where to run: auto, cpu, cuda, mps.
        overwrite: Delete an existing store and begin again.
        verify: Check this store instead: checksums, and some trajectories integrated again.
        stats: Show statistics of this store instead, and the modes and frames they suggest.
    """
    settings = {
        **{"n": n, "solver": solver, "nfe": nfe, "recipe": recipe, "grid": grid},
        **{"option": option, "keep": keep, "dtype": dtype},
        **{"class_labels": class_labels, "guidance": guidance, "seed": seed},
        **{"shard_size": shard_size, "batch_size": batch_size},
    }
    given = {key: value for key, value in settings.items() if value is not None}
    if sum(path is not None for path in (out, verify, stats)) != 1:
        raise ValueError("give one of --out, --verify and --stats, with the folder of a store")
    if out is not None:
        if model is None:
            raise ValueError("give the model to record, for example: fewstep record fashion")
        return _record(model, out, given, device, overwrite=overwrite)
    if given or overwrite:
        name = next(iter(given), "overwrite").replace("_", "-")
        raise ValueError(f"--verify and --stats only read a store; leave --{name} out")
    if verify is not None:
        return _verify(model, verify, device)
    assert stats is not None
    return _stats(model, stats, device)


def _record(model: str, out: Path, given: dict[str, Any], device: str, *, overwrite: bool) -> int:
    from fewstep.base.processes import processes
    from fewstep.trajectories.store import store_bytes

    if overwrite and processes().several:
        raise ValueError(
            "--overwrite with several processes could delete what another has begun; remove the folder first"
        )
    for name in ("n", "shard_size", "batch_size"):
        positive("-n" if name == "n" else f"--{name.replace('_', '-')}", given.get(name))
    output_folder(out)
    if "n" not in given and (given or overwrite or not (out / "manifest.json").exists()):
        raise ValueError(
            "give -n, the number of trajectories (without any option a store is resumed)"
        )
    options = parse_options(given.pop("option", None))
    denoiser = load_model(model, device)
    with keeping(lambda: _saved(out)):
        store = _recorded(denoiser, out, given, options, model, overwrite=overwrite)
    size = store_bytes(store.folder, store.manifest)
    say(
        f"wrote {out}: {len(store)} trajectories, {len(store.times)} states each "
        f"({_size(size)}, {store.manifest.dtype})"
    )
    say(f"next: {command('distill', model, out, out=f'{out}-operator')}")
    return 0


def _recorded(
    denoiser: Denoiser,
    out: Path,
    given: dict[str, Any],
    options: dict[str, Any],
    model: str,
    *,
    overwrite: bool,
) -> TrajectoryStore:
    from fewstep.trajectories import record, resume

    if not given:
        return resume(denoiser, out, progress=follows())
    cond = _conditions(given.pop("class_labels", None), denoiser)
    if "keep" in given:
        given["keep"] = _keep(given["keep"])
    return record(
        denoiser,
        out,
        **given,
        options=options,
        overwrite=overwrite,
        about={"model": model},
        progress=follows(),
        **cond,
    )


def _saved(out: Path) -> str | None:
    """Returns in words the number of complete files of an interrupted store."""
    from fewstep.trajectories.manifest import read_manifest

    done, partial = (len(list(out.glob(f"{name}-*.safetensors"))) for name in ("shard", "partial"))
    if not done and not partial:
        return None
    manifest = read_manifest(out)
    more = f", and a part of {partial} more" if partial else ""
    return f"{done} of {-(-manifest.n // manifest.shard_size)} files are saved{more}"


def _verify(model: str | None, folder: Path, device: str) -> int:
    from fewstep.trajectories import verify

    denoiser, why = _model_of(model, folder, device)
    report = verify(folder, denoiser)
    if denoiser is None:
        say_result(f"nothing was integrated again: {why}")
    for shard in report.missing:
        say_result(f"shard {shard} is missing")
    for shard, problem in report.damaged.items():
        say_result(f"shard {shard} is damaged: {problem}")
    if report.error is not None:
        wrong = "" if report.error <= report.allowed else ": above the tolerance"
        say_result(
            f"trajectories {', '.join(map(str, report.integrated))} integrated again: relative "
            f"difference {report.error:.1e}, allowed {report.allowed:.1e}{wrong}"
        )
    if report.sound:
        say_result(f"{folder} is intact: {report.shards} shards, all checksums match")
        return 0
    if report.missing or report.damaged:
        name = model or _about(folder) or "MODEL"
        say_result(f"to record them again: {command('record', name, out=folder)}")
    return 1


def _stats(model: str | None, folder: Path, device: str) -> int:
    from rich.table import Table

    from fewstep.trajectories import TrajectoryStore, spectrum, statistics

    store = TrajectoryStore.open(folder)
    numbers = statistics(store, most=MANY)
    manifest = store.manifest
    say_result(
        f"{folder}: {len(store)} trajectories, {_size(numbers.bytes)}, {manifest.dtype}, by "
        f"{manifest.sampler.get('name') or 'a plan'}; of the first {numbers.trajectories}:"
    )
    table = Table(box=None)
    for title in ("frame", "t", "alpha", "sigma", "mean", "std", "smallest", "largest"):
        table.add_column(title, justify="right")
    rows = zip(
        numbers.times.tolist(),
        manifest.alpha,
        manifest.sigma,
        *(v.tolist() for v in (numbers.mean, numbers.std, numbers.smallest, numbers.largest)),
        strict=True,
    )
    for frame, row in enumerate(rows):
        table.add_row(str(frame), *(f"{value:.4g}" for value in row))
    console(result=True).print(table)
    denoiser, why = _model_of(model, folder, device)
    try:
        result = spectrum(store, denoiser, n=FEW)
    except ValueError as error:
        say_result(f"no spectrum: {error if denoiser is not None else why or error}")
        return 0
    _say_spectrum(store, result)
    return 0


def _say_spectrum(store: TrajectoryStore, result: Any) -> None:
    place = "t" if result.variable == "t" else "the square root of t"
    say_result(
        f"spectrum over {place}, {result.trajectories} trajectories of "
        f"{len(result.dct.energy)} states; the share of the energy outside the kept modes:"
    )
    for basis in (result.dct, result.dft):
        left = (1 - basis.energy.cumsum(0)).clamp_min(0)
        shown = ", ".join(f"J = {j}: {left[j - 1]:.1e}" for j in (1, 2, 3, 4) if j <= len(left))
        say_result(f"  {basis.name}: {shown}; 99.9 % in {basis.modes}")
    best = result.dct if result.dct.modes <= result.dft.modes else result.dft
    frames = len(store.times) - 1
    say_result(
        f"suggested: --basis {best.name} --modes {best.modes}, with {best.frames} frames or more"
    )
    if frames < best.frames:
        grid = "uniform" if result.variable == "t" else "quadratic"
        say_result(f"the store has {frames}; record with --keep {grid}:{best.frames} for that")


def _model_of(model: str | None, folder: Path, device: str) -> tuple[Denoiser | None, str]:
    """Returns the model of the arguments, or of the manifest; or why there is none."""
    name = model or _about(folder)
    if name is None:
        return None, "the store does not name its model; give it: fewstep record MODEL ..."
    try:
        return load_model(name, device), ""
    except ValueError as error:
        if model is not None:
            raise
        return None, f"its model cannot be loaded ({error})"


def _about(folder: Path) -> str | None:
    from fewstep.trajectories.manifest import read_manifest

    name = read_manifest(folder).about.get("model")
    return name if isinstance(name, str) else None


def _conditions(text: str | None, denoiser: Denoiser) -> dict[str, Any]:
    from fewstep.trajectories import Cycle, Uniform

    if text is None:
        return {}
    if text.strip() == "random":
        return {"class_labels": Uniform(chosen_labels("all", denoiser))}
    return {"class_labels": Cycle(chosen_labels(text, denoiser))}


def _keep(text: str) -> Any:
    """Returns the argument ``keep``: ``4``, ``uniform:8``, ``all``, ``knots:1,2`` or ``times:0.5,0.25``."""
    kind, _, rest = text.strip().partition(":")
    try:
        if kind == "knots":
            return [int(part) for part in rest.split(",")]
        if kind == "times":
            return [float(part) for part in rest.split(",")]
        return int(text) if text.strip().isdecimal() else text.strip()
    except ValueError:
        raise ValueError(
            f"--keep is 4, uniform:8, all, knots:5,10 or times:0.5,0.25; got {text!r:.60}"
        ) from None


def _size(number: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"

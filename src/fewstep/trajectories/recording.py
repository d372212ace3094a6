r"""Recording: trajectories of a model into a store, by any number of writers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fewstep.base.files import read_json
from fewstep.base.paths import check_path
from fewstep.base.progress import Progress, progress_of
from fewstep.base.staging import remote_of, staged
from fewstep.base.urls import is_remote
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.noise import NoiseSource
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.sampling.profile import Profile
from fewstep.sampling.protocol import Sampler
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.solvers import Solver
from fewstep.trajectories.claims import live_writer
from fewstep.trajectories.conditions import Condition, condition
from fewstep.trajectories.keeping import Keep, recorded_states
from fewstep.trajectories.manifest import (
    DTYPES,
    MANIFEST,
    Manifest,
    read_manifest,
    write_manifest,
)
from fewstep.trajectories.store import TrajectoryStore
from fewstep.trajectories.writing import Writer, unguided, wrappers, writer_of

DEFAULT_BATCH = 64


def record(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    n: int,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    plan: Plan | None = None,
    recipe: SamplerRecipe | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    grid: str | TimeGrid | None = None,
    options: Mapping[str, Any] | None = None,
    keep: Keep = 4,
    dtype: str = "float16",
    seed: int = 0,
    shard_size: int = 1024,
    batch_size: int = DEFAULT_BATCH,
    guidance: float | None = None,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    **cond: Any,
) -> TrajectoryStore:
    r"""Records probability-flow trajectories of a model in a folder, and opens it.

    Trajectory i starts at the draw of sample i of the seed, :math:`x_T = \operatorname{round}(\sigma_T
    z_i)` in the type of the store, and is integrated from that rounded state in float32: so the
    stored noise is exact. It depends on ``(seed, i)`` and its condition alone.

    The same call resumes an interrupted run; damaged shards are computed again. Any number of
    processes may make the same call at once, on any machines that share the folder: each computes
    missing shards. Shards have the same bytes from every writer on the same kind of machine; on
    others they differ by rounding.

    Cost: ``nfe`` network evaluations for each trajectory.

    Arguments:
        denoiser: The model.
        folder: The folder to write.
        n: The number of trajectories.
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"`` (the default), or a solver. It must
            be deterministic.
        nfe: The number of network evaluations, 20 by default.
        plan: A plan to run, instead of a solver; or
        recipe: a recipe, or the file of one; or
        profile: the profile of the model, or the file of one.
        grid: The name of a grid, or a grid. Grids with a name are adjusted slightly, so that
            the recorded times are among their points. The plan of a profile is not adjusted: where
            ``auto`` would take it and it has not these times, the default of the schedule is recorded.
        options: Further options of solver and grid.
        keep: The states to record after :math:`x_T`: a number M (on the quadratic grid, as
            ``"quadratic:4"``; for the schedule ``edm`` on the Karras grid), another grid
            (``"uniform:8"``, ``"karras:4"``), ``"all"``, knots of the plan by number (integers),
            or times (decimal numbers). The first and the last state are always recorded.
        dtype: The type of the states in the files: ``"float16"`` (relative error 5e-4),
            ``"float32"``, or ``"bfloat16"`` (4e-3: too coarse for most purposes).
        seed: The seed.
        shard_size: The number of trajectories of a file.
        batch_size: The trajectories in one network evaluation.
        guidance: The scale of classifier-free guidance; 1 is none.
        overwrite: Whether to delete an existing store and begin again.
        about: Information for readers, e.g. the name of the model; the trajectories do not depend on it.
        progress: ``True`` for a bar over trajectories, or a :class:`~fewstep.base.progress.Progress`.
        cond: The conditions: a number, a tensor or list of n numbers, or a rule,
            :class:`Cycle` or :class:`Uniform`.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if anything does not fit, or if the
            folder has a store with other settings (the message names the first); and if a state
            is not finite or too large for the type.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> store = fewstep.record(denoiser, "trajectories", n=8, solver="ddim", nfe=4)
        >>> store.read([0, 5]).states.shape
        torch.Size([2, 5, 2])
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"a Denoiser is needed, got {type(denoiser).__name__}; "
            "make one with fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
        )
    if about is not None:
        _check_about(about)
    check_path(folder, "folder")
    denoiser, guidance = unguided(denoiser, guidance)
    if denoiser.event_shape is None:
        raise ValueError(
            "the shape of a sample is not known; give Denoiser.wrap(..., event_shape=)"
        )
    for name, value in (("n", n), ("shard_size", shard_size), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    NoiseSource(seed, ())  # checks the seed
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        plan=plan,
        recipe=recipe,
        profile=profile,
        grid=grid,
        options=options or {},
    )
    chosen = recorded_states(denoiser, keep, request, guidance=guidance)
    rules = {name: condition(name, value, n) for name, value in sorted(cond.items())}
    sampler = chosen.recipe.build(denoiser)
    _check_conditions(sampler, rules)
    times = torch.tensor(chosen.times, dtype=torch.float64)
    alpha, sigma = (scale.tolist() for scale in denoiser.schedule.scales(times))
    manifest = Manifest(
        n=n,
        seed=seed,
        dtype=dtype,
        shard_size=min(shard_size, n),
        batch_size=min(batch_size, shard_size, n),
        guidance=chosen.recipe.guidance,
        conditions={name: rule.to_record() for name, rule in rules.items()},
        fingerprint=denoiser.fingerprint(),
        wrappers=wrappers(denoiser),
        prediction=denoiser.native.value,
        schedule=denoiser.schedule.to_record(),
        event_shape=list(denoiser.event_shape),
        sampler=chosen.recipe.to_record(),
        times=chosen.times,
        alpha=alpha,
        sigma=sigma,
        knots=chosen.knots,
        about=dict(about or {}),
    )
    with staged(folder) if is_remote(folder) else nullcontext(Path(folder)) as place:
        _begin(place, overwrite=overwrite)
        writer = Writer(place, write_manifest(place, manifest), sampler, rules)
        if (remote := remote_of(place)) is not None and not remote.exists(MANIFEST):
            remote.put(
                place / MANIFEST, MANIFEST
            )  # before the shards, which mean nothing without it
        with progress_of(progress) as shown:
            writer.run(shown)
    return TrajectoryStore.open(folder)


def resume(
    denoiser: Denoiser, folder: str | Path, *, progress: Progress | bool | None = None
) -> TrajectoryStore:
    """Resumes an unfinished store with the settings of its manifest, and opens it.

    Arguments:
        denoiser: The model of the store.
        folder: Its folder.
        progress: As for :func:`record`.

    Raises:
        ValueError: If there is no store, or it was begun with another model.
    """
    check_path(folder, "folder")
    with staged(folder) if is_remote(folder) else nullcontext(Path(folder)) as place:
        writer = writer_of(denoiser, place, read_manifest(place))
        with progress_of(progress) as shown:
            writer.run(shown)
    return TrajectoryStore.open(folder)


def _begin(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; a store of trajectories is a folder")
    shards, remote = list(folder.glob("shard-*.safetensors")), remote_of(folder)
    remote_shards = [
        name
        for name in ([] if remote is None else remote.sizes())
        if Path(name).match("shard-*.safetensors")
    ]
    if overwrite:
        if (writer := live_writer(folder)) is not None:
            raise ValueError(
                f"{str(folder)!r} is being recorded by {writer}; wait until it has finished, or use another "
                "folder"
            )
        if not (shards or remote_shards) and not _is_ours(folder / MANIFEST):
            raise ValueError(
                f"{str(folder / MANIFEST)!r} is not the manifest of a store and is not deleted; "
                "use another folder"
            )
        # The manifest last: without it the rest is not a store.
        for path in [*folder.glob("partial-*.safetensors"), *shards, folder / MANIFEST]:
            path.unlink(missing_ok=True)
        if remote is not None:
            for name in [*remote_shards, MANIFEST]:
                remote.remove(name)
    elif (shards or remote_shards) and not (folder / MANIFEST).exists():
        raise ValueError(
            f"{str(folder)!r} has shards without a {MANIFEST}; give --overwrite (overwrite=True) "
            "to begin again, or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _is_ours(path: Path) -> bool:
    try:
        content = read_json(path) if path.exists() else {"format": Manifest.FORMAT}
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("format") == Manifest.FORMAT


def _check_conditions(sampler: Sampler, rules: Mapping[str, Condition]) -> None:
    examples = {name: rule.examples() for name, rule in rules.items()}
    most = max((len(values) for values in examples.values()), default=1)
    rows = torch.arange(most)
    sampler.denoiser.prepare(most, {k: v[rows % len(v)] for k, v in examples.items()})


def _check_about(about: object) -> None:
    try:
        if not isinstance(about, Mapping):
            raise TypeError(f"got {type(about).__name__}")
        json.dumps(dict(about))
    except (TypeError, ValueError) as error:
        raise TypeError(f"about must be a mapping that JSON can hold: {error}") from None

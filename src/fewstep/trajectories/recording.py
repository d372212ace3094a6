r"""Recording: trajectories of a model into a store, by any number of writers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Clipped, Denoiser, Guided, Thresholded
from fewstep.grids import TimeGrid
from fewstep.noise import NoiseSource
from fewstep.plans import Plan
from fewstep.recipe import SamplerRecipe
from fewstep.sampling import Run, Sampler, initial
from fewstep.solvers import Solver
from fewstep.trajectories.claims import FOLDER as CLAIMS
from fewstep.trajectories.claims import PATIENCE, Claim
from fewstep.trajectories.conditions import Condition, condition
from fewstep.trajectories.keeping import Keep, kept, scales
from fewstep.trajectories.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    VERSION,
    shard_count,
    shard_rows,
    write_manifest,
)
from fewstep.trajectories.shards import check_shard, shard_file, write_shard
from fewstep.trajectories.store import TrajectoryStore, missing_shards

Progress = Callable[[int, int], None]
"""Told how many trajectories of how many are there."""

DEFAULT_BATCH = 64
DEFAULT_NFE = 20
POLL = 0.2
"""Seconds between looks at shards that other writers are at."""


def record(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    n: int,
    solver: str | Solver = "auto",
    nfe: int | None = DEFAULT_NFE,
    plan: Plan | None = None,
    recipe: SamplerRecipe | str | Path | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    options: Mapping[str, Any] | None = None,
    keep: Keep = 4,
    dtype: str = "float16",
    seed: int = 0,
    shard_size: int = 1024,
    batch_size: int = DEFAULT_BATCH,
    guidance: float | None = None,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool | Progress = False,
    **cond: Any,
) -> TrajectoryStore:
    r"""Records probability-flow trajectories of a model in a folder, and opens it.

    Trajectory i starts at the draw of sample i of the seed, :math:`x_T = \operatorname{round}(\sigma_T
    z_i)` in the type of the store, and is integrated from that rounded state in float32: so what
    is stored of the noise is exact. It depends on ``(seed, i)`` and its condition alone.

    The same call again goes on where it was interrupted; damaged shards are made anew. Any number
    of processes may make the same call at once, on any machines that share the folder: each takes
    shards that are missing. Shards are the same bytes whoever writes them on the same kind of
    machine; on others they differ by rounding.

    Arguments:
        denoiser: The model.
        folder: Where to write.
        n: How many trajectories.
        solver: A name in :data:`fewstep.SOLVERS`, ``"dopri5"``, ``"auto"``, or a solver. It must
            not draw noise on its way.
        nfe: The number of network calls.
        plan: A plan to run, instead of a solver; or
        recipe: a recipe, or the file of one.
        grid: The name of a grid, or a grid. Grids that have a name are bent a little, so that
            the kept times are among their points.
        head_start: The time above which the Gaussian solution replaces network calls.
        options: Further options of solver and grid.
        keep: Which states to keep after :math:`x_T`: a number M (on the quadratic grid, as
            ``"quadratic:4"``), another grid (``"uniform:8"``, ``"karras:4"``), ``"all"``, knots of
            the plan by number (integers), or times (decimal numbers). The first and the last state
            are always kept.
        dtype: The type of the states in the files: ``"float16"`` (relative error 5e-4),
            ``"float32"``, or ``"bfloat16"`` (4e-3: too coarse for most purposes).
        seed: The seed.
        shard_size: The number of trajectories of a file.
        batch_size: How many trajectories go through the network at a time.
        guidance: The scale of classifier-free guidance; 1 is none.
        overwrite: Whether to delete a store that is there and begin anew.
        about: What readers should know, e.g. the name of the model; it determines nothing.
        progress: Whether to show a progress bar, or a function that is told (done, n).
        cond: The conditions: a number, a tensor or list of n numbers, or a rule,
            :class:`Cycle` or :class:`Uniform`.

    Raises:
        ValueError, TypeError: Before the first network call, if anything does not fit, or if the
            folder has a store with other settings (the message names the first); and if a state
            is not finite or too large for the type.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"a Denoiser is needed, got {type(denoiser).__name__}; "
            "make one with fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
        )
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
    chosen = kept(
        denoiser,
        keep,
        solver=solver,
        nfe=nfe,
        plan=plan,
        recipe=recipe,
        grid=grid,
        head_start=head_start,
        options=options or {},
        guidance=guidance,
    )
    rules = {name: condition(name, value, n) for name, value in sorted(cond.items())}
    made = chosen.recipe.build(denoiser)
    _check_conditions(made, rules)
    alpha, sigma = scales(denoiser.schedule, chosen.times)
    scale = chosen.recipe.guidance
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": denoiser.fingerprint(),
        "wrappers": _wrappers(denoiser),
        "prediction": denoiser.native.value,
        "schedule": denoiser.schedule.to_config(),
        "event_shape": list(denoiser.event_shape),
        "sampler": _content(chosen.recipe),
        "guidance": None if scale == 1 else scale,
        "times": chosen.times,
        "alpha": alpha,
        "sigma": sigma,
        "knots": chosen.knots,
        "dtype": dtype,
        "n": n,
        "shard_size": min(shard_size, n),
        "batch_size": min(batch_size, shard_size, n),
        "seed": seed,
        "conditions": {name: rule.to_json() for name, rule in rules.items()},
        "about": dict(about or {}),
    }
    folder = Path(folder)
    _begin(folder, overwrite=overwrite)
    writer = Writer(folder, write_manifest(folder, manifest), made, rules)
    with _telling(progress) as tell:
        writer.run(tell)
    return TrajectoryStore.open(folder)


@dataclass(frozen=True)
class Writer:
    """Makes the shards of a store.

    Attributes:
        folder: The folder of the store.
        manifest: Its manifest.
        sampler: The sampler that the manifest describes.
        rules: The conditions that the manifest describes.
    """

    folder: Path
    manifest: Mapping[str, Any]
    sampler: Sampler
    rules: Mapping[str, Condition]

    def run(self, tell: Progress = lambda done, n: None) -> None:
        """Makes all shards that are missing or damaged, beside other writers."""
        count, n = shard_count(self.manifest), self.manifest["n"]
        there = set(range(count)) - set(missing_shards(self.folder, self.manifest))
        for shard in sorted(there):
            # Damaged before this run; what appears during it was just written, and whole.
            if check_shard(self.folder, self.manifest, shard) is not None:
                shard_file(self.folder, shard).unlink(missing_ok=True)
        self._sweep()
        while missing := missing_shards(self.folder, self.manifest):
            tell(n - sum(len(shard_rows(self.manifest, s)) for s in missing), n)
            # Each writer in an order of its own, so that two seldom want the same.
            random.Random(f"{os.getpid()} {time.time_ns()}").shuffle(missing)
            if not any([self._take(shard, tell) for shard in missing]):
                time.sleep(POLL)  # all that is missing is under way elsewhere
        tell(n, n)
        self._sweep()

    def _take(self, shard: int, tell: Progress) -> bool:
        """Makes a shard unless it is there or claimed; returns whether it did."""
        if shard_file(self.folder, shard).exists():
            return False
        claim = Claim(self.folder, shard)
        if not claim.take():
            return False
        try:
            if not shard_file(self.folder, shard).exists():
                self.make(shard, claim.renew, tell)
        finally:
            claim.drop()
        return True

    def make(
        self,
        shard: int,
        renew: Callable[[], None] = lambda: None,
        tell: Progress = lambda done, n: None,
    ) -> Path:
        """Integrates the trajectories of a shard and writes it, whether it is there or not."""
        rows = shard_rows(self.manifest, shard)
        n = self.manifest["n"]
        absent = sum(
            len(shard_rows(self.manifest, s)) for s in missing_shards(self.folder, self.manifest)
        )
        states, conditions = [], []
        size = self.manifest["batch_size"]
        for first in range(0, len(rows), size):
            x, cond = self.integrate(rows[first : first + size])
            states.append(x)
            conditions.append(cond)
            renew()
            tell(n - absent + sum(map(len, states)), n)
        tensors = {"states": torch.cat(states), "index": torch.tensor(rows, dtype=torch.int64)}
        for name in self.rules:
            tensors[f"condition.{name}"] = torch.cat([cond[name] for cond in conditions])
        return write_shard(self.folder, self.manifest, shard, tensors)

    def integrate(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Returns some trajectories, (B, S, \*) in the store's type, and their conditions."""
        seed = self.manifest["seed"]
        values = {name: rule.at(rows, seed=seed, name=name) for name, rule in self.rules.items()}
        return self.follow(rows, values), values

    def follow(self, rows: Sequence[int], values: Mapping[str, Tensor]) -> Tensor:
        r"""Returns trajectories under given conditions, (B, S, \*), on the CPU."""
        dtype = DTYPES[self.manifest["dtype"]]
        model = self.sampler.denoiser
        source = NoiseSource(self.manifest["seed"], rows)
        # Rounded first: the trajectory of the rounded start is what is stored.
        start = self.sampler.start(initial(model, source)).to(dtype).float()
        self._check(start[None], rows)
        cond = model.prepare(len(rows), {k: v.to(start.device) for k, v in values.items()})
        run = Run(source, cond, save=True, times=self.manifest["times"])
        done = self.sampler.run(start, run)
        assert done.states is not None
        states = done.states.to(dtype)
        self._check(states, rows)
        return states.transpose(0, 1).cpu().contiguous()

    def _check(self, states: Tensor, rows: Sequence[int]) -> None:
        fine = states.isfinite().flatten(2).all(2)
        if not bool(fine.all()):
            frame, place = (~fine).nonzero()[0].tolist()
            dtype = self.manifest["dtype"]
            most = torch.finfo(DTYPES[dtype]).max
            raise ValueError(
                f"state {frame} of trajectory {rows[place]} does not fit into {dtype}, whose "
                f"largest number is {most:g}; record with dtype float32"
            )

    def _sweep(self) -> None:
        """Removes what writers that were killed left behind."""
        for path in self.folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > PATIENCE:
                    path.unlink()
            except OSError:
                continue  # somebody else was faster
        for path in (self.folder / CLAIMS).glob("*"):
            if path.name.isdigit() and Claim(self.folder, int(path.name)).is_abandoned():
                Claim(self.folder, int(path.name)).drop()


def _begin(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; a store of trajectories is a folder")
    shards = list(folder.glob("shard-*.safetensors"))
    if overwrite:
        # The manifest last: without it the rest is no store.
        for path in [*shards, folder / MANIFEST]:
            path.unlink(missing_ok=True)
    elif shards and not (folder / MANIFEST).exists():
        raise ValueError(
            f"{str(folder)!r} has shards without a {MANIFEST}; give --overwrite (overwrite=True) "
            "to begin anew, or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _check_conditions(made: Sampler, rules: Mapping[str, Condition]) -> None:
    examples = {name: rule.examples() for name, rule in rules.items()}
    most = max((len(values) for values in examples.values()), default=1)
    rows = torch.arange(most)
    made.denoiser.prepare(most, {k: v[rows % len(v)] for k, v in examples.items()})


def _content(recipe: SamplerRecipe) -> dict[str, Any]:
    import json

    return json.loads(recipe.to_json())


def _wrappers(denoiser: Denoiser) -> list[dict[str, Any]]:
    """Returns what is wrapped around the model, from the outside in: it is not in its fingerprint."""
    found: list[dict[str, Any]] = []
    while isinstance(denoiser, (Guided, Clipped, Thresholded)):
        options = {
            key: value
            for key in ("scale", "low", "high", "quantile", "limit")
            if (value := getattr(denoiser, key, None)) is not None
        }
        found.append({"kind": type(denoiser).__name__.lower(), **options})
        denoiser = denoiser.inner
    return found


@contextmanager
def _telling(progress: bool | Progress) -> Iterator[Progress]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, n: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar("recording", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, n: bar.update(task, completed=done, total=n)

"""``fewstep verify``: whether files and folders are whole."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.base.progress import progress_of
from fewstep.base.records import Record
from fewstep.cli._common import follows, say_result

if TYPE_CHECKING:
    from fewstep.base.verifying import Reader, State

WIDTH = len("without checksum")


def verify(*paths: Path) -> int:
    """Check files and folders that fewstep wrote: a line for each file, and what is wrong with it.

    Files are ok, damaged, without checksum (of an early version, or edited; its form was
    checked), or unknown (of another program, or of a later version). The exit code is 1 if one is damaged, or all are unknown.

    Args:
        paths: Files or folders: results, models, operators, trajectories, unfinished runs, caches.
    """
    from fewstep.base.verifying import files_under, verify_file

    if not paths:
        raise ValueError("give at least one PATH to verify")
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no file or folder {str(path)!r}")
    files = [file for path in paths for file in files_under(path)]
    readers = _readers()
    counts: Counter[State] = Counter()
    with progress_of(follows()) as progress:
        progress.stage("verifying", len(files))
        for file in files:
            verdict = verify_file(file, readers)
            counts[verdict.state] += 1
            about = f" ({verdict.kind})" if verdict.kind else ""
            reason = f": {verdict.reason}" if verdict.reason else ""
            say_result(f"{verdict.state:{WIDTH}}  {file}{about}{reason}")
            progress.tick()
    order: tuple[State, ...] = ("ok", "damaged", "without checksum", "unknown")
    listed = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    say_result(f"{len(files)} files: {listed}")
    if counts["unknown"] == len(files):
        say_result("there is no file that this fewstep reads")
    return 1 if counts["damaged"] or counts["unknown"] == len(files) else 0


def _readers() -> dict[str, Reader]:
    """Returns what reads and checks a file, by format or kind."""
    from fewstep.base.runs import RunRecord
    from fewstep.base.verifying import Reader
    from fewstep.metrics.features import FeaturesRecord
    from fewstep.metrics.reference import ReferenceRecord
    from fewstep.models.folder import ModelRecord
    from fewstep.operators.folder import OperatorRecord
    from fewstep.plans.plan import Plan
    from fewstep.plans.serial import PlanRecord
    from fewstep.sampling.profile import FORMAT, GRIDS_FORMAT, VERSION, Profile
    from fewstep.sampling.recipe import RecipeRecord, SamplerRecipe
    from fewstep.trajectories.manifest import Manifest

    records: tuple[type[Record], ...] = (RunRecord, FeaturesRecord, ReferenceRecord)
    folders: tuple[type[Record], ...] = (ModelRecord, OperatorRecord)
    return {
        **{record.FORMAT: Reader(record.load, record.VERSION) for record in records},
        **{r.FORMAT: Reader(partial(_with_weights, r), r.VERSION) for r in folders},
        PlanRecord.FORMAT: Reader(Plan.load, PlanRecord.VERSION),
        RecipeRecord.FORMAT: Reader(SamplerRecipe.load, RecipeRecord.VERSION),
        FORMAT: Reader(Profile.load, VERSION),
        GRIDS_FORMAT: Reader(Profile.load, VERSION),
        Manifest.FORMAT: Reader(_store, Manifest.VERSION),
        "shard of trajectories": Reader(_shard),
    }


def _with_weights(record: type[Record], file: Path) -> None:
    record.load(file)
    weights = file.with_suffix(".safetensors")
    if not weights.exists():
        raise ValueError(f"its weights {weights.name} are missing")


def _store(file: Path) -> None:
    from fewstep.trajectories.manifest import read_manifest, shard_count
    from fewstep.trajectories.store import missing_shards

    manifest = read_manifest(file.parent)
    if missing := missing_shards(file.parent, manifest):
        raise ValueError(
            f"{len(missing)} of {shard_count(manifest)} shards are missing, the first is {missing[0]}; give "
            "the command that began it again"
        )


def _shard(file: Path) -> None:
    from fewstep.trajectories.manifest import read_manifest
    from fewstep.trajectories.shards import check_shard

    manifest = read_manifest(file.parent)
    number = file.stem.removeprefix("shard-")
    if not number.isdigit():
        raise ValueError("its name is not that of a shard")
    if (problem := check_shard(file.parent, manifest, int(number))) is not None:
        raise ValueError(f"{problem}; give the command that recorded it again")

"""The folder of a comparison: its settings, and one finished cell after another."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import (
    read_json,
    read_tensors_and_metadata,
    sweep,
    write_json,
    write_tensors,
)
from fewstep.base.runs import difference, digest_of
from fewstep.base.sharing import live_claims, sweep_claims
from fewstep.base.urls import is_remote
from fewstep.comparison.scores import estimate_from_record, estimate_record
from fewstep.metrics import Estimate

FORMAT, VERSION = "fewstep.comparison", 1
STATE, CELLS = "comparison.json", "cells"
REPORT, RESULTS = "report.html", "results.json"
REFERENCE = "reference"
OF, CELL, BATCH = "of", "cell", "batch"
"""The entries that say what a file is of: files that were swapped, or of another comparison, are noticed."""


@dataclass(frozen=True)
class Cell:
    """A sampler at a budget, with its measurements.

    Attributes:
        name: The name of the sampler.
        nfe: Its number of evaluations.
        identity: A checksum of its settings.
        passes: The passes through the network for each sample (with guidance two per evaluation).
        seconds: The seconds for each image in the fastest batch, the median one and the slowest.
        stochastic: Whether it drew noise after the initial draw.
        end: The nearer end of the reference: ``"lowest level"`` or ``"sigma = 0"``.
        scores: The estimates by name.
        failed: The metrics that are not defined, with the reason.
        about: Further facts, such as the solver and its times.
    """

    name: str
    nfe: int
    identity: str
    passes: int
    seconds: tuple[float, float, float]
    stochastic: bool
    end: str
    scores: Mapping[str, Estimate]
    failed: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """Its name and budget."""
        return self.name, self.nfe

    def to_record(self) -> dict[str, Any]:
        """Returns it as a JSON object."""
        return {
            "sampler": self.name,
            "nfe": self.nfe,
            "identity": self.identity,
            "calls_per_image": self.passes,
            "seconds_per_image": list(self.seconds),
            "stochastic": self.stochastic,
            "end": self.end,
            "scores": {name: estimate_record(value) for name, value in self.scores.items()},
            "failed": dict(self.failed),
            "about": dict(self.about),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Cell:
        """Returns the cell of a record."""
        return cls(
            name=record["sampler"],
            nfe=record["nfe"],
            identity=record["identity"],
            passes=record["calls_per_image"],
            seconds=tuple(record["seconds_per_image"]),
            stochastic=record["stochastic"],
            end=record["end"],
            scores={name: estimate_from_record(value) for name, value in record["scores"].items()},
            failed=record["failed"],
            about=record["about"],
        )


class Store:
    """The files of a comparison.

    Arguments:
        folder: The folder; it need not exist yet.
    """

    def __init__(self, folder: str | Path) -> None:
        if is_remote(folder):
            raise ValueError(
                f"compare writes to folders of this machine, got {folder!r}; fewstep compare --out takes URLs"
            )
        self.folder = Path(folder)
        self._cells = self._question = ""

    def moved(self, folder: str | Path) -> Store:
        """Returns the same comparison in a folder to which its files were copied."""
        other = copy.copy(self)
        other.folder = Path(folder)
        return other

    def open(
        self,
        question: Mapping[str, Any],
        cells: Sequence[tuple[str, int, str]],
        *,
        extend: bool,
        overwrite: bool,
        join: bool = False,
    ) -> None:
        """Prepares a folder in which the comparison starts or is resumed.

        Arguments:
            question: The inputs that determine all numbers: model, seed, number of samples, data.
            cells: Name, budget and identity of each cell, the reference's first.
            extend: Whether samplers or budgets may be added to a finished comparison.
            overwrite: Whether to remove existing results.
            join: Whether other processes may be at work on the same cells, or have just finished them.

        Raises:
            ValueError: If the folder holds something else, a comparison with other settings, or one
                that others are at work on.
        """
        self._cells = digest_of([list(cell) for cell in cells])
        self._question = digest_of(question)
        state = self.folder / STATE
        before = None
        if state.exists():
            try:
                before = _read_state(state)
            except ValueError as error:
                if not overwrite:
                    raise ValueError(f"{error}; give --overwrite or another --out") from None
        folders = [self.folder / CELLS, *self.folder.glob(f"{CELLS}/*.parts")]
        live = any(live_claims(folder) for folder in folders)
        same = before is not None and before.get("cells") == self._cells
        if live and not (join and same and not overwrite):
            raise ValueError(
                f"{str(self.folder)!r} is being written by another run; wait until it has finished, "
                "or give another --out"
            )
        if before is not None and not overwrite:
            self._check(before, question, extend or (join and same))
            if join and before.get("finished") and same:
                return  # late, or resumed although it is finished: what is damaged is made again
        elif any((self.folder / name).exists() for name in (REPORT, RESULTS, CELLS)):
            if not overwrite:
                raise ValueError(
                    f"{str(self.folder)!r} exists; give --overwrite or another --out (it has no {STATE})"
                )
        if overwrite:
            self.clear()
        if not live:
            for folder in (self.folder, *folders):
                sweep(folder)
                sweep_claims(folder)
            for name, nfe, identity in cells:  # damaged cells, and others of the same name
                if self.find(name, nfe, identity) is None:
                    self.file(name, nfe, ".json").unlink(missing_ok=True)
        self._write(question, finished=False)

    def _check(self, before: Any, question: Mapping[str, Any], extend: bool) -> None:
        asked = before["question"]
        # Early versions did not store what the reference's name stands for.
        now = {k: v for k, v in question.items() if k in asked or k != "reference_identity"}
        changed = difference(asked, now)
        if changed is not None:
            raise ValueError(
                f"{str(self.folder)!r} holds a comparison with other settings ({changed}); give "
                "--overwrite or another --out"
            )
        if before.get("finished") and not extend:
            raise ValueError(
                f"{str(self.folder)!r} exists; give --extend to keep its cells and add others, "
                "--overwrite or another --out"
            )

    def finish(self, question: Mapping[str, Any]) -> None:
        """Marks the report as written."""
        self._write(question, finished=True)

    def is_finished(self) -> bool:
        """Returns whether the report of these cells has been written."""
        try:
            state = _read_state(self.folder / STATE)
        except ValueError:
            return False
        return bool(state.get("finished")) and state.get("cells") == self._cells

    def _write(self, question: Mapping[str, Any], *, finished: bool) -> None:
        write_json(
            self.folder / STATE,
            {
                "format": f"{FORMAT}.state",
                "version": VERSION,
                "question": dict(question),
                "cells": self._cells,
                "finished": finished,
            },
        )

    def clear(self) -> None:
        """Removes all files of a comparison."""
        shutil.rmtree(self.folder / CELLS, ignore_errors=True)
        names = (STATE, REPORT, RESULTS)
        ours = [self.folder / name for name in names]
        for pattern in ("best-*.json", "samples-*.png"):
            ours += self.folder.glob(pattern)
        for path in ours:
            path.unlink(missing_ok=True)

    def file(self, name: str, nfe: int, suffix: str) -> Path:
        """Returns the file of a cell."""
        plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("._")[:60]
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / CELLS / f"{plain}-{nfe}-{digest}{suffix}"

    def find(self, name: str, nfe: int, identity: str) -> Cell | None:
        """Returns the finished cell of the same sampler; ``None`` if it is missing or damaged."""
        try:
            record = read_json(self.file(name, nfe, ".json"), what="cell")
            cell = Cell.from_record(record)
            if record.get(OF, self._mark(cell)) != self._mark(cell):  # early versions have none
                return None
            self.tensors(cell)  # verifies their checksums, and that they are this cell's
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return cell if cell.identity == identity else None

    def all(self) -> list[Cell]:
        """Returns all finished cells, in the order of their names."""
        cells = []
        for file in sorted((self.folder / CELLS).glob("*.json")):
            try:
                cells.append(Cell.from_record(read_json(file, what="cell")))
            except (ValueError, KeyError, TypeError):
                continue
        return cells

    def write(
        self, cell: Cell, tensors: Mapping[str, Tensor] | None = None, *, keep_parts: bool = False
    ) -> None:
        """Writes a cell: first its tensors, then the JSON that marks it as complete."""
        if tensors is not None:
            file = self.file(cell.name, cell.nfe, ".safetensors")
            write_tensors(file, tensors, {CELL: self._mark(cell)})
        record = {**cell.to_record(), OF: self._mark(cell)}
        write_json(self.file(cell.name, cell.nfe, ".json"), record)
        if not keep_parts:
            shutil.rmtree(self.file(cell.name, cell.nfe, ".parts"), ignore_errors=True)

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """Returns the features and squared distances of a cell's samples, and the images for pictures."""
        file = self.file(cell.name, cell.nfe, ".safetensors")
        tensors, metadata = read_tensors_and_metadata(file, what="cell")
        if metadata.get(CELL, self._mark(cell)) != self._mark(cell):
            raise ValueError(f"cell {str(file)!r} has the samples of another one")
        return tensors

    def _mark(self, cell: Cell) -> str:
        """Returns what a cell's files are of: the sampler and the comparison."""
        return f"{cell.name}, {cell.nfe}: {cell.identity}, {self._asked()}"

    def _asked(self) -> str:
        """Returns the checksum of the comparison's inputs, from its folder if it is only read."""
        if not self._question:
            self._question = digest_of(_read_state(self.folder / STATE)["question"])
        return self._question

    def part(self, name: str, nfe: int, identity: str, start: int) -> Path:
        """Returns the file of a batch."""
        return self.file(name, nfe, ".parts") / f"{identity[:12]}-{start:09d}.safetensors"

    def read_part(self, path: Path, rows: int, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """Returns a batch if it is stored and intact; a damaged one is drawn again."""
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors_and_metadata(path, what="batch")
        except ValueError:
            return None
        whole = all(key in tensors and len(tensors[key]) == rows for key in keys)
        mark = self._batch_mark(path)
        return tensors if whole and metadata.get(BATCH, mark) == mark else None

    def write_part(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes a batch."""
        write_tensors(path, tensors, {BATCH: self._batch_mark(path)})

    def _batch_mark(self, path: Path) -> str:
        return f"{path.parent.name}/{path.name}, {self._asked()}"


def _read_state(file: Path) -> dict[str, Any]:
    state = read_json(file, what="comparison")
    if not isinstance(state, dict) or not isinstance(state.get("question"), dict):
        raise ValueError(f"comparison {str(file)!r} is damaged: it has no settings")
    if (kind := (state.get("format"), state.get("version"))) != (f"{FORMAT}.state", VERSION):
        raise ValueError(
            f"comparison {str(file)!r} has format and version {kind!r:.60}; this fewstep reads "
            f"{(f'{FORMAT}.state', VERSION)}"
        )
    return state


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of all batches put together."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

"""The folder of a comparison: its question, and one finished cell after another."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.files import read_json, read_tensors, write_json, write_tensors
from fewstep.comparison.scores import from_json, to_json
from fewstep.metrics import Estimate

FORMAT, VERSION = "fewstep.comparison", 1
STATE, CELLS = "comparison.json", "cells"
REPORT, RESULTS = "report.html", "results.json"
REFERENCE = "reference"


@dataclass(frozen=True)
class Cell:
    """A sampler at a budget, with what was measured.

    Attributes:
        name: The name of the sampler.
        nfe: Its number of evaluations.
        identity: A checksum of what it does.
        calls: The network calls for each image (twice the evaluations with guidance).
        seconds: The seconds for each image in the fastest batch, the median one and the slowest.
        stochastic: Whether it drew noise on the way.
        end: Which end of the reference it came closer to: ``"lowest level"`` or ``"sigma = 0"``.
        scores: The estimates by name.
        failed: The metrics that could not be made, with the reason.
        about: What else is known, such as the recipe.
    """

    name: str
    nfe: int
    identity: str
    calls: int
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

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "sampler": self.name,
            "nfe": self.nfe,
            "identity": self.identity,
            "calls_per_image": self.calls,
            "seconds_per_image": list(self.seconds),
            "stochastic": self.stochastic,
            "end": self.end,
            "scores": {name: to_json(value) for name, value in self.scores.items()},
            "failed": dict(self.failed),
            "about": dict(self.about),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cell:
        """Returns the cell that :meth:`to_json` wrote."""
        return cls(
            name=content["sampler"],
            nfe=content["nfe"],
            identity=content["identity"],
            calls=content["calls_per_image"],
            seconds=tuple(content["seconds_per_image"]),
            stochastic=content["stochastic"],
            end=content["end"],
            scores={name: from_json(value) for name, value in content["scores"].items()},
            failed=content["failed"],
            about=content["about"],
        )


class Store:
    """The files of a comparison.

    Arguments:
        folder: The folder; it need not be there yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def open(self, question: Mapping[str, Any], *, extend: bool, overwrite: bool) -> None:
        """Leaves a folder in which the comparison starts or goes on.

        Arguments:
            question: What decides all numbers: model, seed, number of samples, data.
            extend: Whether a finished comparison may go on with more samplers or budgets.
            overwrite: Whether what is there is thrown away.

        Raises:
            ValueError: If the folder holds something else, or the answer to another question.
        """
        state = self.folder / STATE
        before = None
        if state.exists():
            try:
                before = read_json(state, what="the state of a comparison")
            except ValueError:
                before = {}
        if before is not None and not overwrite:
            self._check(before, question, extend)
        elif any((self.folder / name).exists() for name in (REPORT, RESULTS, CELLS)):
            if not overwrite:
                raise ValueError(f"{str(self.folder)!r} exists; give --overwrite or another --out")
        if overwrite:
            self.clear()
        self._write(question, finished=False)

    def _check(self, before: Any, question: Mapping[str, Any], extend: bool) -> None:
        asked = before.get("question") if isinstance(before, dict) else None
        if asked != question:
            key = next((k for k in question if (asked or {}).get(k) != question[k]), "")
            told = f" ({key} {(asked or {}).get(key)!r:.40}, now {question.get(key)!r:.40})"
            raise ValueError(
                f"{str(self.folder)!r} holds a comparison with other settings{told if asked else ''}"
                "; give --overwrite or another --out"
            )
        if before.get("finished") and not extend:
            raise ValueError(
                f"{str(self.folder)!r} exists; give --extend to keep its cells and add others, "
                "--overwrite or another --out"
            )

    def finish(self, question: Mapping[str, Any]) -> None:
        """Notes that the report is written."""
        self._write(question, finished=True)

    def _write(self, question: Mapping[str, Any], *, finished: bool) -> None:
        write_json(
            self.folder / STATE,
            {
                "format": f"{FORMAT}.state",
                "version": VERSION,
                "question": dict(question),
                "finished": finished,
            },
        )

    def clear(self) -> None:
        """Removes everything that a comparison writes."""
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
        """Returns the finished cell, if it is there, whole, and of the same sampler."""
        try:
            found = Cell.from_json(read_json(self.file(name, nfe, ".json"), what="cell"))
        except (ValueError, KeyError, TypeError):
            return None
        tensors = self.file(name, nfe, ".safetensors").exists()
        return found if tensors and found.identity == identity else None

    def all(self) -> list[Cell]:
        """Returns all finished cells, in the order of their names."""
        found = []
        for file in sorted((self.folder / CELLS).glob("*.json")):
            try:
                found.append(Cell.from_json(read_json(file, what="cell")))
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def write(
        self, cell: Cell, tensors: Mapping[str, Tensor] | None = None, *, keep_parts: bool = False
    ) -> None:
        """Writes a cell: first its tensors, then the JSON that says that it is whole."""
        if tensors is not None:
            write_tensors(self.file(cell.name, cell.nfe, ".safetensors"), tensors)
        write_json(self.file(cell.name, cell.nfe, ".json"), cell.to_json())
        if not keep_parts:
            shutil.rmtree(self.file(cell.name, cell.nfe, ".parts"), ignore_errors=True)

    def tensors(self, cell: Cell) -> dict[str, Tensor]:
        """Returns what was kept of a cell's samples: features, squares, and those that are shown."""
        return read_tensors(self.file(cell.name, cell.nfe, ".safetensors"))

    def part(self, name: str, nfe: int, identity: str, start: int) -> Path:
        """Returns the file of a batch."""
        return self.file(name, nfe, ".parts") / f"{identity[:12]}-{start:09d}.safetensors"

    def read_part(self, path: Path, rows: int, keys: Sequence[str]) -> dict[str, Tensor] | None:
        """Returns a batch if it is there and whole; a damaged one is drawn again."""
        if not path.exists():
            return None
        try:
            found = read_tensors(path)
        except ValueError:
            return None
        whole = all(key in found for key in keys) and all(
            len(value) == rows for key, value in found.items() if key in keys
        )
        return found if whole else None


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of all batches put together."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

"""The log of a training run: JSON lines, and optionally TensorBoard."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.base.extras import install_hint
from fewstep.base.files import FULL, json_line, loads_json, no_space, write_atomic

logger = logging.getLogger("fewstep")

LOG, BOARD = "log.jsonl", "tensorboard"


class LossLog:
    """``log.jsonl``, and optionally TensorBoard.

    Arguments:
        out: The folder.
        start: The step at which the run is resumed; later rows are dropped.
        tensorboard: Whether to write for TensorBoard too.
        rows: The rows up to that step, from the checkpoint; left out, as by early versions, those of
            the file that can be read.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        tensorboard: bool,
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.path = out / LOG
        whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        self.rows = [json_line(row) for row in rows] if whole and rows else _rows(self.path, start)
        write_atomic(self.path, "".join(f"{row}\n" for row in self.rows))
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                hint = install_hint("distill")
                raise ValueError(f"tensorboard is missing: {hint}") from None
            self.board = SummaryWriter(str(out / BOARD), purge_step=start + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row: ``step``, ``loss``, ``losses`` of the frames, and in some rows ``heldout``."""
        self.rows.append(json_line(row))
        line = f"{self.rows[-1]}\n"
        try:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise (
                no_space(error, self.path, len(line)) if error.errno in FULL else error
            ) from None
        if self.board is not None:
            self.board.add_scalar("loss", row["loss"], row["step"])
            for name in ("losses", "heldout"):
                for frame, value in enumerate(row.get(name, [])):
                    self.board.add_scalar(f"{name}/frame{frame + 1}", value, row["step"])

    def records(self) -> list[dict[str, Any]]:
        """Returns the rows, without their checksums."""
        return [loads_json(row, what="a row of the log") for row in self.rows]

    def close(self) -> None:
        """Flushes what TensorBoard buffers."""
        if self.board is not None:
            self.board.close()


def _rows(path: Path, start: int) -> list[str]:
    """Returns the lines of a log up to a step; those that are damaged are left out, with a warning."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = [_step_of(line) for line in lines]
    if damaged := steps[:-1].count(math.inf):  # the last may be half a line
        logger.warning("%s: %d damaged lines are left out", path, damaged)
    return [line for line, step in zip(lines, steps, strict=True) if step <= start]


def _step_of(row: str) -> float:
    try:
        return float(loads_json(row, what="a row")["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a truncated line
        return math.inf

"""The log of a training run: JSON lines, and optionally TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fewstep.base.files import write_atomic

LOG, BOARD = "log.jsonl", "tensorboard"


class LossLog:
    """``log.jsonl``, and optionally TensorBoard.

    Arguments:
        out: The folder.
        start: The step at which the run is resumed; later rows are dropped.
        tensorboard: Whether to write for TensorBoard too.
    """

    def __init__(self, out: Path, start: int, tensorboard: bool) -> None:
        self.path = out / LOG
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        before = [row for row in rows if _step_of(row) <= start]
        write_atomic(self.path, "".join(f"{row}\n" for row in before))
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard is missing: pip install fewstep[distill]") from None
            self.board = SummaryWriter(str(out / BOARD), purge_step=start + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row: ``step``, ``loss``, ``losses`` of the frames, and in some rows ``heldout``."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self.board is not None:
            self.board.add_scalar("loss", row["loss"], row["step"])
            for name in ("losses", "heldout"):
                for frame, value in enumerate(row.get(name, [])):
                    self.board.add_scalar(f"{name}/frame{frame + 1}", value, row["step"])

    def close(self) -> None:
        """Flushes what TensorBoard buffers."""
        if self.board is not None:
            self.board.close()


def _step_of(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # a truncated line
        return math.inf

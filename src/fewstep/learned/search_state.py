r"""The state of a search, as one file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.base.files import read_tensors_and_metadata, write_tensors

STATE = "state.safetensors"


@dataclass
class State:
    """The state of a search: everything in a checkpoint.

    Attributes:
        tensors: ``vector`` (the parameters), ``average`` (their moving average), ``best``, those of
            the optimizer (``adam.INDEX.NAME``), of what an objective learns (``objective.NAME...``), and ``moved`` (offsets of the training noises).
        stage: The index of the stage.
        step: The number of steps done in it.
        updates: The number of updates of the optimizer in it.
        start: The judgement at the start of the stage: score, precision, recall.
        best_score: The best score of the stage.
        stale: The judgements since the last better one.
        skipped: The steps that were skipped because a number was not finite.
        norms: The value of each objective at the very start.
        history: The judgements so far.
    """

    tensors: dict[str, Tensor]
    stage: int = 0
    step: int = 0
    updates: int = 0
    start: dict[str, float] | None = None
    best_score: float = math.inf
    stale: int = 0
    skipped: int = 0
    norms: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the state as one file, so that tensors and counts belong together."""
        record = {
            key: getattr(self, key)
            for key in ("stage", "step", "updates", "start", "best_score", "stale", "skipped")
        }
        record |= {"norms": self.norms, "history": self.history}
        # Python's JSON writes and reads infinity; the file's metadata are texts anyway.
        write_tensors(folder / STATE, self.tensors, {"state": json.dumps(record)})

    def check(self) -> None:
        """Raises ``ValueError`` unless the entries have their types."""
        kinds: dict[str, Any] = {"norms": dict, "history": list, "best_score": (int, float)}
        kinds |= dict.fromkeys(("stage", "step", "updates", "stale", "skipped"), int)
        for key, kind in kinds.items():
            if not isinstance(getattr(self, key), kind):
                raise ValueError(f"{key} is {getattr(self, key)!r:.40}")

    @classmethod
    def load(cls, folder: Path) -> State | None:
        """Returns the state in a folder, or ``None`` if there is none.

        Raises:
            ValueError: If it is damaged.
        """
        file = folder / STATE
        if not file.exists():
            return None
        try:
            tensors, metadata = read_tensors_and_metadata(file)
            state = cls(tensors, **json.loads(metadata["state"]))
            state.check()
            return state
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint {str(file)!r} is damaged: {error}") from None

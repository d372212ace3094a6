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
            the optimizer (``adam.INDEX.NAME``), of what an objective learns (``objective.NAME...``), ``moved`` (offsets of the training noises), ``first`` (the parameters at the
            start of the stage) and ``values`` (the values of all candidates of an evolution strategy).
        stage: The index of the stage.
        step: The number of steps done in it.
        updates: The number of updates of the optimizer in it.
        start: The judgement at the start of the stage: score, precision, recall.
        best_score: The best score of the stage.
        stale: The judgements since the last better one.
        skipped: The steps that were skipped because a number was not finite.
        slower: The factor of the learning rate.
        norms: The value of each objective at the very start.
        history: The judgements so far.
        losses: The losses of the steps since the last judgement.
    """

    tensors: dict[str, Tensor]
    stage: int = 0
    step: int = 0
    updates: int = 0
    start: dict[str, float] | None = None
    best_score: float = math.inf
    stale: int = 0
    skipped: int = 0
    slower: float = 1.0
    norms: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def save(self, folder: Path, search: str = "") -> None:
        """Writes the state as one file, so that tensors and counts belong together.

        Arguments:
            folder: The folder.
            search: A digest of the search.
        """
        record = {
            key: getattr(self, key)
            for key in (
                "stage",
                "step",
                "updates",
                "start",
                "best_score",
                "stale",
                "skipped",
                "slower",
            )
        }
        record |= {"norms": self.norms, "history": self.history, "losses": self.losses}
        # Python's JSON writes and reads infinity; the file's metadata are texts anyway.
        metadata = {"state": json.dumps(record), "search": search}
        write_tensors(folder / STATE, self.tensors, metadata)

    def check(self) -> None:
        """Raises ``ValueError`` unless the entries have their types, and all tensors are there."""
        for name in ("vector", "average", "best"):
            if name not in self.tensors:
                raise ValueError(f"it has no tensor {name!r}")
            if self.tensors[name].shape != self.tensors["vector"].shape:
                raise ValueError(f"its tensors 'vector' and {name!r} have different shapes")
        kinds: dict[str, Any] = {
            "norms": dict,
            "history": list,
            "losses": list,
            "best_score": (int, float),
            "slower": (int, float),
        }
        kinds |= dict.fromkeys(("stage", "step", "updates", "stale", "skipped"), int)
        for key, kind in kinds.items():
            if not isinstance(getattr(self, key), kind):
                raise ValueError(f"{key} is {getattr(self, key)!r:.40}")

    @classmethod
    def load(cls, folder: Path, search: str = "") -> State | None:
        """Returns the state in a folder, or ``None`` if there is none.

        Arguments:
            folder: The folder.
            search: A digest of the search.

        Raises:
            ValueError: If it is damaged, or of another search.
        """
        file = folder / STATE
        if not file.exists():
            return None
        try:
            tensors, metadata = read_tensors_and_metadata(file)
            if metadata.get("search", search) != search:  # early versions have none
                raise ValueError("it is of another search")
            state = cls(tensors, **json.loads(metadata["state"]))
            state.check()
            return state
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the checkpoint {str(file)!r} is damaged: {error}; give overwrite (--overwrite) to begin "
                "again"
            ) from None

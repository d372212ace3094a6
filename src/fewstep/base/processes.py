"""The processes that ``torchrun``, ``accelerate launch`` or Slurm's ``srun`` started together.

They share the work of a command without talking to each other: each takes parts that nobody has, from its
own share first (see :mod:`fewstep.base.sharing`). So a process that is lost delays only the part that it
held, one that is late helps with what is left, and results do not depend on their number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
"""The environment variables of rank, number and rank on the machine: of torch's launchers, of Slurm."""


@dataclass(frozen=True)
class Processes:
    """This process among those that were started together.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        local_rank: Its number on this machine, which selects its device.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether this is number 0, which writes what is said to people."""
        return self.rank == 0

    def own_first(self, items: Sequence[T]) -> list[T]:
        """Returns all items, beginning with this process's share: consecutive, about an equal part."""
        start = len(items) * self.rank // self.count
        return [*items[start:], *items[:start]]


def processes(environ: Mapping[str, str] | None = None) -> Processes:
    """Returns this process among those of its launch, from environment variables; alone without them.

    Arguments:
        environ: The variables; left out, those of the process.

    Raises:
        ValueError: If they do not fit together.
    """
    environment = os.environ if environ is None else environ
    for names in VARIABLES:
        rank, count, local = (environment.get(name) for name in names)
        if rank is None or count is None:
            continue
        numbers = [rank, count, local if local is not None else rank]
        if not all(text.isascii() and text.isdigit() for text in numbers):
            raise ValueError(
                f"{names[0]} and {names[1]} must be numbers, got {rank!r:.20} and {count!r:.20}"
            )
        team = Processes(*map(int, numbers))
        if team.rank >= max(team.count, 1):
            raise ValueError(
                f"{names[0]} is {rank}, but {names[1]} says that there are {count} processes"
            )
        if team.several:
            return team
    return Processes()

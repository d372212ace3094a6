"""Claims: which writer computes which shard. They only save work; results do not depend on them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fewstep.base.locks import Lock

FOLDER = "claims"


class Claim(Lock):
    """The lock of a shard; see :class:`fewstep.base.locks.Lock`.

    Arguments:
        folder: The folder of the store.
        shard: The number of the shard.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        super().__init__(folder / FOLDER / f"{shard:05d}")
        self.shard = shard

    def take(self) -> bool:
        while True:
            try:
                return super().take()
            except FileNotFoundError:
                continue  # another writer removed the last claim, and the folder, in between

    def drop(self) -> None:
        """Releases the claim, and removes the folder of claims if it was the last."""
        super().drop()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def live_writer(folder: Path) -> str | None:
    """Returns in words a writer that has a claim in a store and may be alive, or ``None``."""
    for path in sorted((folder / FOLDER).glob("*")):
        if path.name.isdigit():
            claim = Claim(folder, int(path.name))
            claim.sweep()
            if path.exists():
                owner = claim.owner()
                return f"process {owner.get('pid')} on {owner.get('host')}"
    return None

"""Claims: who is at which shard. They only save work; without them results are the same."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

FOLDER = "claims"
PATIENCE = 120.0
"""A claim that was not renewed for so many seconds is taken to be of a writer that died."""


class Claim:
    """A file that says that this process is at a shard; hold it with ``with``.

    Arguments:
        folder: The folder of the store.
        shard: The number of the shard.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self._path = folder / FOLDER / f"{shard:05d}"

    def take(self) -> bool:
        """Takes the claim unless a writer that is alive has it; returns whether it is ours."""
        if self.is_abandoned():
            self._path.unlink(missing_ok=True)
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        while True:
            self._path.parent.mkdir(exist_ok=True)
            try:
                with open(self._path, "x", encoding="utf-8") as stream:
                    stream.write(holder)
            except FileExistsError:
                return False
            except FileNotFoundError:
                continue  # somebody dropped the last claim, and the folder, in between
            return True

    def renew(self) -> None:
        """Says that its holder is alive."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def drop(self) -> None:
        """Gives the claim up; the last one takes the folder of claims with it."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()

    def is_abandoned(self) -> bool:
        """Whether its holder is gone: not renewed for long, or a process of ours that ended."""
        try:
            if time.time() - self._path.stat().st_mtime > PATIENCE:
                return True
            holder = json.loads(self._path.read_text(encoding="utf-8"))
            # Elsewhere than on POSIX, asking for a process would end it.
            if holder["host"] != socket.gethostname() or os.name != "posix":
                return False
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError, TypeError):
            return False  # gone, or about to be written, or the process of somebody else
        return False

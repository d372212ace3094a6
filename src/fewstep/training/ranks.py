"""Processes that compute every step together: if one is lost, the others end, and say which.

Each rank has a lock with a heartbeat in the folder of the run (:class:`fewstep.base.locks.Lock`). A thread of each
watches those of the others: a process of the same machine that has ended is seen within seconds, one of another
machine after two minutes without a heartbeat. What waits for it in an exchange of tensors fails, or, if it does not
within :data:`GRACE` seconds, the process is ended. The same command then resumes from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fewstep.base.files import read_json, write_json
from fewstep.base.locks import HEARTBEAT, Lock, beating
from fewstep.base.memory import is_out_of_memory
from fewstep.base.processes import Processes, processes

FOLDER = ".ranks"

LOOK, GRACE, ARRIVAL = 1.0, 10.0, 600.0
"""Seconds between two looks at the others, until a process that waits for a lost one is ended, and in which all have to
come."""

CODE = 2
"""The exit code of a process that is ended."""


class LostRank(ValueError):
    """Another process of the launch is gone, without which no step can be computed."""


class Ranks:
    """The watch over the other processes; see the module.

    Arguments:
        folder: The folder of the run, which all of them see.
        own: This process among them.
    """

    def __init__(self, folder: Path, own: Processes) -> None:
        self.place, self.own = folder / FOLDER, own
        self.lock = Lock(self._lock(own.rank))
        self._others = [rank for rank in range(own.count) if rank != own.rank]
        self._began, self._connected = time.monotonic(), False
        self._stop = threading.Event()

    def connected(self) -> None:
        """All processes have come: from now on their files are those of this launch."""
        self._connected = True

    def lost(self) -> str | None:
        """Returns in a sentence which process is gone, or ``None``."""
        if not self._connected:
            if time.monotonic() - self._began < ARRIVAL:
                return None
            missing = [str(rank) for rank in self._others if not self._has_come(rank)]
            named = f"rank {' and '.join(missing[:3])}" if missing else "another process"
            return self._sentence(named, f"did not come within {ARRIVAL / 60:.0f} minutes")
        for rank in self._others:
            lock, ended = Lock(self._lock(rank)), self._ended(rank)
            owner = lock.owner()
            if ended.exists():
                return self._sentence(f"rank {rank}", f"has ended: {_reason(ended)}")
            if lock.is_abandoned():
                who = f"rank {rank} (process {owner.get('pid')} on {owner.get('host')})"
                return self._sentence(who, "is lost: it was killed, or its machine is gone")
        return None

    def _sentence(self, who: str, what: str) -> str:
        return (
            f"{who} of {self.own.count} {what}; every step needs all of them, so this rank {self.own.rank} ends. "
            "The same command resumes from the last checkpoint (torchrun --max-restarts N gives it again by itself)"
        )

    def _lock(self, rank: int) -> Path:
        return self.place / f"rank-{rank}"

    def _ended(self, rank: int) -> Path:
        return self.place / f"rank-{rank}.json"

    def _has_come(self, rank: int) -> bool:
        lock = Lock(self._lock(rank))
        return lock.path.exists() and not lock.is_abandoned()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK):
            sentence = self.lost()
            if sentence is not None and not self._stop.wait(GRACE):
                sys.stderr.write(f"error: {sentence}\n")
                sys.stderr.flush()
                os._exit(CODE)  # it waits for the lost one, where no exception arrives

    @contextlib.contextmanager
    def watching(self) -> Iterator[Ranks]:
        """Watches within the block; an error there because another process is gone becomes :class:`LostRank`."""
        is_new = not self.place.parent.exists()
        self._ended(self.own.rank).unlink(missing_ok=True)
        # Not acquired but replaced: an earlier launch, which was killed, may have left one.
        self.lock.take_over()
        thread = threading.Thread(target=self._watch, name="watch over ranks", daemon=True)
        thread.start()
        try:
            with beating(self.lock.renew, HEARTBEAT, f"heartbeat of rank {self.own.rank}"):
                yield self
            self._sweep()
        except BaseException as error:
            self._stop.set()  # this process does not wait any more: its end is bounded
            sentence = None
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                sentence = self._found()
            self._leave(error)
            if sentence is None:
                raise
            raise LostRank(sentence) from error
        finally:
            self._stop.set()
            self.lock.drop()
            with contextlib.suppress(OSError):
                self.place.rmdir()
                if is_new:
                    self.place.parent.rmdir()  # if nothing was written

    def _sweep(self) -> None:
        """Removes what earlier launches have left; this one has ended well."""
        for path in self.place.glob("rank-*"):
            if path.suffix == ".json":
                path.unlink(missing_ok=True)
            else:
                Lock(path).sweep()

    def _found(self) -> str | None:
        """Returns which process is gone, after an error that may be due to that."""
        until = time.monotonic() + GRACE / 2
        while (sentence := self.lost()) is None and time.monotonic() < until:
            time.sleep(LOOK / 10)
        return sentence

    def _leave(self, error: BaseException) -> None:
        """Writes why this process ends, for those that wait for it."""
        reason = " ".join(f"{error or type(error).__name__}".split())[:300]
        with contextlib.suppress(OSError):
            write_json(self._ended(self.own.rank), {"reason": reason})


def _reason(file: Path) -> str:
    try:
        return str(read_json(file, what="reason", checksum=True)["reason"])
    except (ValueError, KeyError, TypeError):
        return "its own message says why"


@contextlib.contextmanager
def watching(folder: str | Path | None) -> Iterator[Ranks | None]:
    """Watches over the other processes of the launch, if there are some and they have a folder."""
    own = processes()
    if folder is None or not own.several:
        yield None
        return
    with Ranks(Path(folder), own).watching() as ranks:
        yield ranks

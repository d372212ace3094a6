"""Work that several processes share through a folder: each claims parts that no other process has.

There is no barrier and no coordinator. A part is claimed by a lock file with a heartbeat
(:class:`fewstep.base.locks.Lock`) and done when its file exists. A process that ended leaves claims that the
others remove: at once on the same machine, after two minutes on another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from fewstep.base.locks import HEARTBEAT, Lock, beating
from fewstep.base.progress import SILENT, Progress

T = TypeVar("T")

POLL, SOON = 0.2, 5.0
"""Seconds between checks of parts that others compute, and until the progress shows their owner."""

CLAIM = ".claim"
"""The ending of the lock file of a part."""


class Sharing(Generic[T]):
    """Parts to compute together with other processes.

    .. code-block:: python

        with Sharing(parts, file) as work:
            while work.unfinished():
                for part in work.claimed():
                    ...  # writes file(part), atomically

    A claim is released when its file exists, so a consumer may ask for a part more before it has written
    the last. One thread renews the heartbeats of all claims.

    Arguments:
        items: The parts, in the order in which this process tries them.
        file: Returns the file of a part; it exists when the part is done.
        done: Returns whether a part is done, if that is more than its file; once true it stays so.
        ready: Returns whether a part can be computed yet: whether the parts that it needs are done.
        over: Returns whether all is done, and the files are gone again.
        progress: Shows which process it waits for.
    """

    def __init__(
        self,
        items: Sequence[T],
        file: Callable[[T], Path],
        *,
        done: Callable[[T], bool] | None = None,
        ready: Callable[[T], bool] = lambda _: True,
        over: Callable[[], bool] = lambda: False,
        progress: Progress = SILENT,
    ) -> None:
        self._left = list(items)
        self._done = done or (lambda item: file(item).exists())
        self._file, self._ready, self._over, self._progress = file, ready, over, progress
        self._held: dict[Path, tuple[T, Lock]] = {}
        self._idle: float | None = None  # since when others have all that is left
        self._beating = beating(self._renew, HEARTBEAT, "heartbeat of claims")

    def unfinished(self) -> bool:
        """Returns whether parts are left; waits a moment if others have claimed all of them."""
        self._release()
        self._left = [item for item in self._left if not self._done(item)]
        if not self._left or self._over():
            return False
        if self._idle is not None:
            if time.monotonic() - self._idle > SOON:
                self._show(self._file(self._left[0]))
            time.sleep(POLL)
        return True

    def claimed(self) -> Iterator[T]:
        """Yields, without waiting, the parts that nobody has; each is this process's to compute."""
        took = False
        for item in self._left:
            if self._done(item) or not self._ready(item):
                continue
            self._release()
            if self._over():
                return
            # A part may be finished, and its claim released, between the look and the claim.
            if not self._take(item) or self._done(item):
                continue
            took = True
            yield item
        self._idle = None if took else self._idle or time.monotonic()

    def _take(self, item: T) -> bool:
        file = self._file(item)
        lock = Lock(_claim(file))
        if file in self._held or not lock.take():
            return False
        self._held[file] = item, lock
        return True

    def _release(self) -> None:
        for file in [file for file, (item, _) in self._held.items() if self._done(item)]:
            self._held.pop(file)[1].drop()

    def _show(self, file: Path) -> None:
        owner = Lock(_claim(file)).owner()
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
        self._progress.stage(f"waiting for {who}, which computes {file.stem}")
        self._idle = float("inf")

    def _renew(self) -> None:
        for _, lock in list(self._held.values()):
            lock.renew()

    def __enter__(self) -> Sharing[T]:
        self._beating.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._beating.__exit__(None, None, None)
        for file, (item, lock) in self._held.items():
            lock.drop()
            if self._over() or self._done(item):  # a claim after the end made the folder anew
                with contextlib.suppress(OSError):
                    file.parent.rmdir()
        self._held.clear()


def live_claims(folder: Path) -> bool:
    """Returns whether a folder of parts has a claim whose owner may be alive."""
    claims: Iterable[Path] = folder.glob(f"*{CLAIM}") if folder.is_dir() else ()
    return any(Lock(path).is_alive() is not False for path in claims)


def sweep_claims(folder: Path) -> None:
    """Removes the claims of killed processes on parts of a folder."""
    for path in folder.glob(f"*{CLAIM}") if folder.is_dir() else ():
        Lock(path).sweep()


def _claim(file: Path) -> Path:
    return file.with_name(f"{file.name}{CLAIM}")

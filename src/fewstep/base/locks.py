"""Lock files: they name the process that works on something, so that two do not at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.base.files import write_atomic
from fewstep.base.temporary import temporary_path

PATIENCE = 120.0
"""Seconds without a heartbeat after which the owner of a lock, on another machine, is taken to be
dead. Network file systems may show a change a minute late."""

UNREADABLE_PATIENCE = 10.0
"""The same for a lock without an owner; ours are written atomically and have one."""

HEARTBEAT = 5.0
"""Seconds between two heartbeats."""

_seen: dict[Path, tuple[object, float]] = {}
"""The last state of a lock that this process saw, and since when by its monotonic clock."""


@contextlib.contextmanager
def beating(beat: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Calls a function every so many seconds, in a thread of this name, until the block ends."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            beat()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Lock:
    """A file with its owner and heartbeats; the process that creates it owns the lock.

    Its age is measured by the observer's monotonic clock, as the time since the file last changed: so
    neither a clock that is set nor one that differs between machines matters.

    Arguments:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = secrets.token_hex(8)

    def take(self) -> bool:
        """Acquires the lock unless a live owner has it; returns whether it is ours."""
        self.sweep()
        try:
            write_atomic(self.path, self._content(), new=True)
        except (FileExistsError, FileNotFoundError):
            return False  # not found: the owner swept the folder while this file was temporary
        return True

    def take_over(self) -> None:
        """Makes the lock ours, whoever has it."""
        write_atomic(self.path, self._content())

    def _content(self) -> str:
        owner = {**_machine(), "pid": os.getpid(), "token": self._token}
        owner |= {"process_start": _process_start(os.getpid()), "since": time.strftime("%F %T")}
        return json.dumps(owner)

    def renew(self) -> None:
        """Renews the heartbeat: the owner is alive."""
        with contextlib.suppress(OSError):
            if not self.is_lost():
                os.utime(self.path)

    def is_lost(self) -> bool:
        """Whether another process took the lock over, since this one gave no heartbeat for long."""
        owner = self.owner()
        return owner.get("token") != self._token if owner else not self.path.exists()

    def drop(self) -> None:
        """Releases the lock, if it is still ours."""
        if self.owner().get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _seen.pop(self.path, None)

    def owner(self) -> Mapping[str, Any]:
        """Returns the owner in the lock: host, pid, since; empty if it cannot be read."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def is_alive(self) -> bool | None:
        """Whether the owner is alive, if it is a process of this machine; else ``None``."""
        return _is_alive(self.owner())

    def is_abandoned(self) -> bool:
        """Whether the owner is gone: a process of this machine that ended, or no heartbeat."""
        try:
            changed = self.path.stat().st_mtime_ns
        except OSError:
            _seen.pop(self.path, None)
            return False
        owner = self.owner()
        alive = _is_alive(owner)
        if alive is not None:
            return not alive
        state, now = (changed, json.dumps(owner)), time.monotonic()
        before, since = _seen.get(self.path, (None, now))
        if before != state:
            _seen[self.path] = state, now
            return False
        return now - since > (PATIENCE if owner else UNREADABLE_PATIENCE)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Renews the heartbeat from a thread, and releases the lock at the end; acquire it first."""
        try:
            with beating(self.renew, HEARTBEAT, f"heartbeat of {self.path.name}"):
                yield
        finally:
            self.drop()

    def sweep(self) -> None:
        """Removes the lock if its owner is gone."""
        if not self.is_abandoned():
            return
        # Renamed first, which succeeds for one of many; a lock acquired meanwhile is restored.
        before = self.owner().get("token")
        aside = temporary_path(self.path)
        try:
            os.rename(self.path, aside)
        except OSError:
            return
        if Lock(aside).owner().get("token") != before:
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)
        _seen.pop(self.path, None)


def _machine() -> dict[str, str]:
    """Returns an id of the namespace of process ids: containers may share a host's name."""
    machine = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine["processes"] = os.readlink("/proc/self/ns/pid")
    return machine


def _process_start(pid: int) -> str | None:
    """Returns the start time of a process, in ticks since boot, or ``None`` if not known."""
    fields = _status(pid)
    return fields[19] if len(fields) > 19 else None


def _status(pid: int) -> list[str]:
    """Returns the fields of ``/proc/PID/stat`` after the name, the state first; none if not known."""
    try:
        # The name, in parentheses, may have spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _has_ended(pid: int) -> bool:
    """Returns whether a process has ended although its number exists: its parent has not waited for it."""
    if _status(pid)[:1] not in (["Z"], ["X"]):
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) <= 1  # no thread outlives the main one
    except OSError:
        return True


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Returns whether a process of this machine is alive, ``None`` if it is not known."""
    here = _machine()
    pid = owner.get("pid")
    # Except on POSIX, os.kill(pid, 0) would end the process.
    if os.name != "posix" or not isinstance(pid, int) or pid < 1:
        return None
    if any(owner.get(key) != value for key, value in here.items()):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    if _has_ended(pid):
        return False
    started = owner.get("process_start")
    return started is None or started == _process_start(pid)

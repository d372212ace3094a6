"""Locks: files that say which process works on something, so that two do not at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.base.files import write_atomic

PATIENCE = 120.0
"""Seconds without a heartbeat after which the owner of a lock, on another machine, is taken to be
dead. Network file systems may show a change a minute late."""

UNREADABLE_PATIENCE = 10.0
"""The same for a lock that does not say whose it is: ours are written atomically."""

HEARTBEAT = 5.0
"""Seconds between two heartbeats."""

_seen: dict[Path, tuple[object, float]] = {}
"""The state in which this process saw a lock last, and since when by its monotonic clock."""


class Lock:
    """A file that says that its owner is alive; whoever creates it has it.

    Its age is measured by the observer's monotonic clock, as the time since the file last changed: so
    neither a clock that is set nor one that differs between machines matters.

    Arguments:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = secrets.token_hex(8)

    def take(self) -> bool:
        """Takes the lock unless an owner that is alive has it; returns whether it is ours."""
        self.sweep()
        owner = {**_machine(), "pid": os.getpid(), "token": self._token}
        owner |= {"process_start": _process_start(os.getpid()), "since": time.strftime("%F %T")}
        try:
            write_atomic(self.path, json.dumps(owner), new=True)
        except FileExistsError:
            return False
        return True

    def renew(self) -> None:
        """Gives a heartbeat: says that the owner is alive."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def drop(self) -> None:
        """Gives the lock up, if it is still ours."""
        if self.owner().get("token") == self._token:
            self.path.unlink(missing_ok=True)
        _seen.pop(self.path, None)

    def owner(self) -> Mapping[str, Any]:
        """Returns what the lock says of its owner: host, pid, since; empty if it cannot be read."""
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
        """Gives heartbeats from a thread, and drops the lock at the end; take it first."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                self.renew()

        thread = threading.Thread(target=beat, name=f"heartbeat of {self.path.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.drop()

    def sweep(self) -> None:
        """Removes the lock if its owner is gone."""
        if not self.is_abandoned():
            return
        # Renamed first, which succeeds for one of many; what was taken meanwhile is put back.
        before = self.owner().get("token")
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.tmp")
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
    """Returns what tells where process numbers mean the same: containers may share a host's name."""
    found = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found["processes"] = os.readlink("/proc/self/ns/pid")
    return found


def _process_start(pid: int) -> str | None:
    """Returns when a process started, in ticks since the machine did, or ``None`` if not known."""
    try:
        # The name, in parentheses, may have spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Returns whether a process of this machine is alive, ``None`` if it is not known."""
    here = _machine()
    pid = owner.get("pid")
    # Elsewhere than on POSIX, asking for a process would end it.
    if os.name != "posix" or not isinstance(pid, int) or pid < 1:
        return None
    if any(owner.get(key) != value for key, value in here.items()):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is somebody else's
    started = owner.get("process_start")
    return started is None or started == _process_start(pid)

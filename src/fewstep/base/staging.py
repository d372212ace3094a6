"""Outputs and inputs on other file systems: computed in a local staging folder, and copied there.

One process at a time writes to a URL, which an owner object with heartbeats ensures.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.base.locks import PATIENCE, Lock, beating
from fewstep.base.processes import processes
from fewstep.base.urls import OWNER, WHOLE, Remote, is_internal, show_as

logger = logging.getLogger("fewstep")

FETCHED = ".fetched.json"
"""The file of a staging folder with the objects that were copied there."""

BEAT, POLL = 10.0, 1.0
"""Seconds between two heartbeats of the owner object, and between two looks at that of another."""

SHARDS = "shard-*"
"""The objects of a store of trajectories that are copied one by one, and not kept in the staging folder."""

_remotes: dict[Path, Remote] = {}
_opened: dict[str, Path] = {}


def remote_of(folder: Path) -> Remote | None:
    """Returns the remote folder that a local one stages, or ``None``."""
    return _remotes.get(folder)


@contextlib.contextmanager
def owned(remote: Remote) -> Iterator[None]:
    """Owns the URL: another writer is refused meanwhile.

    The owner object is created if it is absent, in one operation where the file system has one
    (memory, local, S3, Google Cloud Storage). Elsewhere it is written and read again, so that of two writers
    that begin within the same moment both may be let in.

    Raises:
        ValueError: If a process that may be alive owns it.
    """
    with tempfile.TemporaryDirectory() as folder:
        lock = Lock(Path(folder) / "owner")
        lock.take()
        mine = dict(lock.owner())
        _own(remote, mine, Path(folder) / "other")
    numbers = itertools.count(1)

    def beat() -> None:
        content = json.dumps({**mine, "beat": next(numbers)}).encode()
        with contextlib.suppress(OSError):
            remote.fs.pipe_file(_owner(remote), content)

    try:
        with beating(beat, BEAT, f"heartbeat of {remote.url}"):
            yield
    finally:
        if _read_owner(remote).get("token") == mine["token"]:
            with contextlib.suppress(OSError):
                remote.fs.rm_file(_owner(remote))


def _owner(remote: Remote) -> str:
    return f"{remote.root.rstrip('/')}{OWNER}"


def _read_owner(remote: Remote) -> Mapping[str, Any]:
    remote.fs.invalidate_cache()
    try:
        content = json.loads(remote.fs.cat_file(_owner(remote)))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _own(remote: Remote, mine: Mapping[str, Any], copy: Path) -> None:
    first, begun = None, time.monotonic()
    while not _create(remote, json.dumps(mine).encode()):
        other = _read_owner(remote)
        if not other:
            continue  # just released
        copy.write_text(json.dumps(dict(other)))
        alive, first = Lock(copy).is_alive(), first or other
        if alive is False or (alive is None and time.monotonic() - begun > PATIENCE):
            with contextlib.suppress(OSError):
                remote.fs.rm_file(_owner(remote))
            continue
        if alive or other != first:
            raise ValueError(
                f"{remote.url!r} is being written by process {other.get('pid')} on {other.get('host')}, "
                f"since {other.get('since')}; wait until it has finished, or give another URL"
            )
        if time.monotonic() - begun < POLL:
            logger.warning("waiting for a heartbeat of the owner of %s", remote.url)
        time.sleep(POLL)


def _create(remote: Remote, content: bytes) -> bool:
    place = _owner(remote)
    if remote.protocol not in WHOLE:
        remote.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
    try:
        remote.fs.pipe_file(place, content, mode="create")
        return True
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):
        pass  # no such operation: written, and read again
    if _read_owner(remote):
        return False
    remote.fs.pipe_file(place, content)
    return _read_owner(remote) == json.loads(content)


@contextlib.contextmanager
def staged(url: str, *, folder: bool = True) -> Iterator[Path]:
    """Gives a local folder or file in whose place a URL is written when the block ends without an error.

    Existing objects are copied there first, so that what is refused, extended or replaced locally is so
    remotely too; of a store of trajectories not the shards. After an error the staging folder stays, and
    the same command resumes from it on this machine.

    Arguments:
        url: The URL.
        folder: Whether it is a folder; else one object, and those that are written beside it.

    Raises:
        ValueError: If another process writes there, or several processes of a launch would.
    """
    if processes().several:
        raise ValueError(
            f"several processes write together in a folder that all of them see, not to {url!r}; give a "
            "folder, or start one process for each URL"
        )
    remote = Remote(url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "remote"
    stage = cache / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    local = stage / remote.url.rpartition("/")[2]
    top, parent = local, remote
    if not folder:
        top, parent = stage, Remote(remote.url.rpartition("/")[0] or remote.url)
    with owned(remote):
        before, done = _fetched(remote, local, stage, folder=folder), False
        _remotes[local] = remote
        show_as(local, remote.url)
        try:
            yield local
            _publish(parent, top, before)
            done = True
        except BaseException:
            done = not _changed(top, before)
            raise
        finally:
            del _remotes[local]
            if done:
                shutil.rmtree(stage, ignore_errors=True)


def _fetched(
    remote: Remote, local: Path, stage: Path, *, folder: bool
) -> dict[Path, tuple[int, int]]:
    """Copies existing objects to the staging folder; returns their sizes and times there."""
    names = list(remote.sizes()) if folder else [""] if remote.exists() else []
    log = stage / FETCHED
    try:
        known = json.loads(log.read_text())
    except (OSError, ValueError):
        known = {}
    before = {}
    for name in names:
        file = local / name if name else local
        if Path(name).match(SHARDS):
            continue
        # One that an interrupted run has changed is kept.
        if not file.exists() or list(_look(file)) == known.get(name):
            remote.get(name, file)
        before[file] = _look(file)
        known[name] = _look(file)
    local.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(known))
    return before


def _changed(top: Path, before: Mapping[Path, tuple[int, int]]) -> bool:
    """Returns whether anything was written to a staging folder since it was filled."""
    return any(before.get(file) != _look(file) for file in _files(top))


def _files(top: Path) -> list[Path]:
    """Returns the files to copy, in the order in which they were written."""
    files = [path for path in top.rglob("*") if path.is_file()] if top.is_dir() else []
    ours = [file for file in files if not is_internal(file.relative_to(top).as_posix())]
    return sorted(ours, key=lambda path: path.stat().st_mtime_ns)


def _publish(remote: Remote, top: Path, before: Mapping[Path, tuple[int, int]]) -> None:
    """Copies new and changed files in the order in which they were written, and removes those that are gone."""
    for file in _files(top):
        if before.get(file) != _look(file):
            remote.put(file, file.relative_to(top).as_posix())
    for file in before:
        if not file.exists():
            remote.remove(file.relative_to(top).as_posix())


def _look(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def opened(url: str) -> Path:
    """Returns a local folder that stands for a remote one, for reading; objects are copied when they are needed.

    Small objects are copied at once, shards of a store when :meth:`Remote.get` is called for them. The folder
    is removed at the end of the process.

    Raises:
        ValueError: If there is nothing.
    """
    remote = Remote(url)
    if remote.url not in _opened:
        names = remote.sizes()
        if not names:
            raise ValueError(f"there is nothing at {url!r}")
        local = Path(_temporary()) / remote.url.rpartition("/")[2]
        for name in names:
            if not Path(name).match(SHARDS):
                remote.get(name, local / name)
        _opened[remote.url] = local
        _remotes[local] = remote
        show_as(local, remote.url)
    return _opened[remote.url]


def fetched(url: str) -> Path:
    """Returns a local copy of a remote file or folder."""
    remote = Remote(url)
    if not remote.exists():
        return opened(url)
    local = Path(_temporary()) / remote.url.rpartition("/")[2]
    remote.get("", local)
    show_as(local, remote.url)
    return local


def _temporary() -> str:
    import atexit

    folder = tempfile.mkdtemp(prefix="fewstep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

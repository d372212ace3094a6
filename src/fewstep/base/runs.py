"""Folders of resumable runs: identity, lock, parts, finish.

A run that is not finished is a folder with

- ``unfinished.json``: the *inputs*, a JSON object of everything that determines the result (the
  fingerprint of the model, digests of the data, settings). With other inputs a run is refused, and
  the message names the first that changed;
- ``parts/``: the finished parts, each file with a checksum and the digest of the inputs. A part that is
  damaged or of other inputs is computed again;
- ``.lock``: the process that works on it. A second run waits for an owner on another machine, and is
  refused if the owner is alive.

Use::

    folder = RunFolder(out, "run of fewstep sample", outputs=["samples.safetensors"])
    with folder.running({"model": denoiser.fingerprint(), "seed": seed}, overwrite=overwrite):
        tensors = folder.read_tensors("000")
        if tensors is None:
            folder.write_tensors("000", {"samples": ...})
        ...
        folder.finish()
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.base.files import (
    make_folder,
    read_json,
    read_tensors_and_metadata,
    sha256,
    sweep,
    write_json,
    write_tensors,
)
from fewstep.base.locks import Lock
from fewstep.base.progress import SILENT, Progress
from fewstep.base.records import Record
from fewstep.base.temporary import LITTER

if TYPE_CHECKING:
    from torch import Tensor

STATE, PARTS, LOCK = "unfinished.json", "parts", ".lock"

PART_NAMES = (".safetensors", ".json", ".claim")
"""The endings of the names of parts and claims on them."""

MOST_LISTED = 10_000
"""The most files whose digests are stored one by one; of more, one digest of all of them."""

PLEASE_OVERWRITE = "give its command again, --overwrite or another --out"


def hash_inputs(
    path: str | Path | None, *, without: str | Path | None = None
) -> dict[str, Any] | None:
    """Returns the identity of a file or a folder: size and SHA-256 of each file.

    All contents are read once.

    Arguments:
        path: A file or a folder; for anything else (``None``, an embedded name) the result is ``None``.
        without: A folder to exclude, if the output is in the input.
    """
    if path is None or not Path(path).exists():
        return None
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    ours = [file for file in files if not LITTER.fullmatch(file.name)]
    if without is not None:
        ours = [file for file in ours if Path(without).resolve() not in file.resolve().parents]
    each = {
        file.name if file == root else file.relative_to(root).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in ours
    }
    digest = digest_of(each)
    if len(each) > MOST_LISTED:
        return {"count": len(each), "sha256": digest}
    return {"count": len(each), "sha256": digest, "files": each}


def digest_of(value: Any) -> str:
    """Returns the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def difference(before: Any, after: Mapping[str, Any]) -> str | None:
    """Returns in words the first input that has changed, in the order of ``after``.

    Short values are named ("seed 0, now 1"), digests are not ("another model"); of files the name.
    """
    plain = json.loads(json.dumps(after))
    if not isinstance(before, dict):
        return "settings that cannot be read"
    before, plain = _digests(before, plain)
    simple = [k for k in plain if not _is_large(before.get(k)) and not _is_large(plain[k])]
    for key in [*simple, *(k for k in plain if k not in simple), *before]:
        old, new = before.get(key), plain.get(key)
        if old == new or _same_digest(old, new):
            continue
        name = key.replace("_", " ")
        files = _files(old), _files(new)
        if files[0] is not None and files[1] is not None and files[0] != files[1]:
            return f"{name}: {_file_difference(files[0], files[1])}"
        if key in simple:
            return f"{name} {_short(old)}, now {_short(new)}"
        return f"another {name}"
    return None


def _same_digest(old: Any, new: Any) -> bool:
    """Returns whether two inputs have one digest: their files may be others, but not what is read."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return False
    return "sha256" in old and old["sha256"] == new.get("sha256")


def _digests(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Returns inputs in which a digest is an object on both sides; earlier versions had it alone."""
    both = {key for key in before if isinstance(after.get(key), dict) and _is_large(before[key])}
    both |= {key for key in before if isinstance(before[key], dict) and _is_large(after.get(key))}

    def objects(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {"sha256": value} if key in both and isinstance(value, str) else value
            for key, value in values.items()
        }

    return objects(before), objects(after)


def _is_large(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    )


def _files(value: Any) -> dict[str, Any] | None:
    files = value.get("files") if isinstance(value, dict) else None
    return files if isinstance(files, dict) else None


def _file_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    name = next((k for k in sorted({*old, *new}) if old.get(k) != new.get(k)), "")
    what = "is new" if name not in old else "is gone" if name not in new else "has changed"
    return f"the file {name!r:.80} {what}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


Changed = Callable[[Any, Mapping[str, Any]], str | None]
"""Takes the inputs of an unfinished run and those of now, and returns what has changed, or ``None``."""


class RunRecord(Record, name="fewstep.run", version=1, what="unfinished run"):
    """The file with the inputs of a run."""

    what: str
    inputs: dict[str, Any]


class RunFolder:
    """The folder of a resumable run; see the module.

    Arguments:
        folder: The folder; it need not exist yet.
        what: The name of the run, for messages: "run of fewstep sample".
        outputs: The names of the result files, or patterns ("recipe-*.json").
        state: The name of the file with the inputs.
        parts: The name of the folder of parts.
        forgets_empty: Whether a run that has neither parts nor outputs yet gives way to one with other
            inputs.
    """

    def __init__(
        self,
        folder: str | Path,
        what: str,
        *,
        outputs: Sequence[str],
        state: str = STATE,
        parts: str = PARTS,
        forgets_empty: bool = False,
    ) -> None:
        self.folder, self.what = Path(folder), what
        self.outputs = list(outputs)
        self.state, self.parts = self.folder / state, self.folder / parts
        self._forgets_empty = forgets_empty
        self._digest = ""
        self._lock: Lock | None = None

    @contextmanager
    def running(
        self,
        inputs: Mapping[str, Any],
        *,
        overwrite: bool = False,
        changed: Changed = difference,
        earlier: Callable[[], Mapping[str, Any] | None] = lambda: None,
        progress: Progress = SILENT,
    ) -> Iterator[None]:
        """Locks the folder and begins the run, or resumes it if its inputs are these.

        Arguments:
            inputs: Everything that determines the result, as a JSON object.
            overwrite: Whether to delete results, or a run with other inputs.
            changed: Returns in words the first input that has changed, ``None`` if the run may be
                resumed; or raises ``ValueError`` with a message of its own.
            earlier: Returns the inputs of a run that may be resumed without ``unfinished.json``, since it was
                finished or is of an earlier version; ``None`` if there is none.
            progress: Shows the process that the run waits for.

        Raises:
            ValueError: If the folder has results, a run with other inputs, or a live run.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{str(self.folder)!r} is a file; it must be a folder")
        with locked(self.folder, progress=progress) as self._lock:
            self._begin(inputs, overwrite=overwrite, changed=changed, earlier=earlier)
            yield

    def join(
        self,
        inputs: Mapping[str, Any],
        *,
        finished: Callable[[str], bool],
        progress: Progress = SILENT,
    ) -> bool:
        """Begins the run, or joins processes that work on it; returns whether anything is left to do.

        Parts are then shared by :class:`~fewstep.base.sharing.Sharing`, and one process ends the run in
        :meth:`finishing`.

        Arguments:
            inputs: As for :meth:`running`.
            finished: Returns whether the results in the folder are those of inputs with this digest.
            progress: Shows the process that the run waits for.

        Raises:
            ValueError: If the folder has results, or a run, of other inputs.
        """
        with locked(self.folder, progress=progress, wait=True):
            self._digest = digest_of(inputs)
            if not self.state.exists() and self._results() and finished(self._digest):
                return False
            self._begin(inputs, overwrite=False)
            self.parts.mkdir(exist_ok=True)
            return True

    @property
    def digest(self) -> str:
        """The digest of the inputs, once the run has begun."""
        return self._digest

    def is_over(self) -> bool:
        """Returns whether the run has been finished, by this or another process."""
        return not self.state.exists()

    @contextmanager
    def finishing(self, *, progress: Progress = SILENT) -> Iterator[bool]:
        """Locks the folder to write the results; gives whether that is left to do."""
        with locked(self.folder, progress=progress, wait=True):
            yield not self.is_over()

    def _begin(
        self,
        inputs: Mapping[str, Any],
        *,
        overwrite: bool,
        changed: Changed = difference,
        earlier: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self._digest = digest_of(inputs)
        before = what = None
        try:
            if self.state.exists() or not overwrite:
                before = earlier()
            if before is None and self.state.exists():
                before = self._read_state()
                if self._forgets_empty and not (self._results() or self._part_files()):
                    before = None
        except ValueError as error:
            if not overwrite:
                raise ValueError(f"{error}; give --overwrite or another --out") from None
            before, what = {}, "damaged"
        try:
            what = what or (None if before is None else changed(before, inputs))
        except ValueError:
            if not overwrite:
                raise
            what = "other settings"
        if before is not None and what is None:
            self._resume(before, inputs)
            return
        if not overwrite and what is not None:
            unfinished = "an unfinished run" if self.state.exists() else "a run"
            raise ValueError(
                f"{str(self.folder)!r} has {unfinished} with other settings ({what}); "
                f"{PLEASE_OVERWRITE}"
            )
        if not overwrite and (self._results() or self._part_files()):
            if self._results():  # killed while it removed the parts
                for path in self._part_files():
                    if path.name.endswith(PART_NAMES):
                        path.unlink(missing_ok=True)
                with suppress(OSError):
                    self.parts.rmdir()
            raise ValueError(f"{str(self.folder)!r} exists; give --overwrite or another --out")
        sweep(self.folder)
        shutil.rmtree(self.parts, ignore_errors=True)
        for path in self._results():
            path.unlink(missing_ok=True)
        RunRecord(what=self.what, inputs=dict(inputs)).save(self.state)

    def _part_files(self) -> list[Path]:
        files = self.parts.iterdir() if self.parts.is_dir() else ()
        return [path for path in files if path != self.state and not LITTER.fullmatch(path.name)]

    def _resume(self, before: Any, inputs: Mapping[str, Any]) -> None:
        from fewstep.base.sharing import live_claims

        if not live_claims(self.parts):  # another process may be writing there
            sweep(self.folder)
            sweep(self.parts)
        if not self.state.exists() or before != json.loads(json.dumps(inputs)):
            RunRecord(what=self.what, inputs=dict(inputs)).save(self.state)

    def _read_state(self) -> Any:
        record = RunRecord.load(self.state)
        if record.what != self.what:
            raise ValueError(
                f"{str(self.folder)!r} has an unfinished {record.what:.60}; this is a {self.what}"
            )
        return record.inputs

    def _results(self) -> list[Path]:
        return [path for name in self.outputs for path in self.folder.glob(name)]

    def check(self) -> None:
        """Raises ``ValueError`` if another run took the folder over while this process was suspended."""
        if self._lock is not None and self._lock.is_lost():
            raise ValueError(
                f"{str(self.folder)!r} was taken over by another run, since this process gave no sign of life for "
                "minutes (it was suspended, or the file system was away); nothing more is written"
            )

    def finish(self) -> None:
        """Removes state and parts; the results remain."""
        self.check()
        # The state goes first: without it a folder with results is finished, parts or not.
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def tensors_file(self, name: str) -> Path:
        """Returns the file of a part of tensors."""
        return self.parts / f"{name}.safetensors"

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a part of tensors."""
        self.check()
        about = {"inputs": self._digest, "part": name}
        write_tensors(self.tensors_file(name), tensors, about)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Returns a part, or ``None`` if it is missing, damaged, or of other inputs."""
        try:
            tensors, metadata = read_tensors_and_metadata(self.tensors_file(name), checksum=True)
        except ValueError:
            return None
        return tensors if self._is_own(metadata, name) else None

    def record_file(self, name: str) -> Path:
        """Returns the file of a part of JSON."""
        return self.parts / f"{name}.json"

    def write_record(self, name: str, value: Any) -> None:
        """Writes a part of JSON."""
        self.check()
        content = {"inputs": self._digest, "part": name, "value": value}
        write_json(self.record_file(name), content)

    def read_record(self, name: str) -> Any:
        """Returns a part of JSON, or ``None`` if it is missing, damaged, or of other inputs."""
        try:
            content = read_json(self.record_file(name), what="a part", checksum=True)
        except ValueError:
            return None
        return content.get("value") if self._is_own(content, name) else None

    def _is_own(self, about: Any, name: str) -> bool:
        """Returns whether a part is of these inputs, and not another part under this name."""
        own = isinstance(about, dict) and about.get("inputs") == self._digest
        return own and about.get("part", name) == name

    def record(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns a part of JSON; computes and writes it if it is missing."""
        value = self.read_record(name)
        if value is None:
            value = make()
            self.write_record(name, value)
        return value


@contextmanager
def locked(folder: Path, *, progress: Progress = SILENT, wait: bool = False) -> Iterator[Lock]:
    """Holds the lock of a folder, which is created if it does not exist.

    Arguments:
        folder: The folder.
        progress: Shows the process that it waits for.
        wait: Whether to wait for a live process too: one of the same launch, which is brief.

    Raises:
        ValueError: If a live process has it; at once on the same machine, and on another
            after its next heartbeat. A lock without heartbeats is taken over after two minutes.
        OSError: If the folder cannot be made.
    """
    lock = Lock(folder / LOCK)
    is_new = not folder.exists()
    if is_new and folder.is_symlink():
        raise ValueError(
            f"{str(folder)!r} is a link to {os.readlink(folder)!r}, which does not exist"
        )
    make_folder(folder)  # raises where none can be made
    first, start, shown, vanished = None, time.monotonic(), False, 0
    while not lock.take():
        owner = lock.owner()
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        try:
            beat = lock.path.stat().st_mtime_ns
        except OSError as error:
            vanished += 1
            if vanished > VANISHED:
                raise ValueError(f"{str(folder)!r} cannot be locked: {error}") from error
            continue  # just released
        first = first or beat
        if not wait and owner and (lock.is_alive() or beat != first):
            raise ValueError(
                f"{str(folder)!r} is being written by another run ({who}); wait until it has "
                "finished, or give another --out"
            )
        if not shown and time.monotonic() - start > SOON:
            progress.stage(f"waiting for {'' if wait else 'a heartbeat of '}{who}")
            shown = True
        time.sleep(POLL)
    try:
        with lock.held():
            yield lock
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


VANISHED = 1000
"""How often a lock may be neither free nor there before the folder itself is at fault."""

POLL, SOON = 0.2, 5.0
"""Seconds between two checks of a lock, and until the progress shows its owner."""

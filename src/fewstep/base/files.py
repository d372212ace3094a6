"""Atomic writes of JSON and safetensors files, each with a checksum inside; no pickle anywhere.

A JSON object has the key :data:`CHECKSUM` last, a safetensors file has it in its metadata. Reading
verifies and removes it; files without one (written by hand, by other programs, or by an earlier version)
are read unchecked, and the log names each once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fewstep.base.paths import check_path
from fewstep.base.sealing import CHECKSUM, with_checksum
from fewstep.base.temporary import LITTER, target_of, temporary_path
from fewstep.base.urls import Remote, is_remote, write_remote

if TYPE_CHECKING:
    from torch import Tensor


UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""The errors of file systems on which a folder cannot be synced."""

LITTER_AGE = 86_400.0
"""The age in seconds at which temporary files of a shared folder are litter."""

MOST_NESTED = 64
"""The most levels of nesting that a JSON file may have."""

MOST_JSON = 1 << 24
"""The most bytes of JSON that are parsed; parsed they may take thirty times as many."""

MOST_HEADER = 1 << 24
"""The most bytes of a safetensors file's header, which is JSON too."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The errors of a full disk, an exhausted quota, and a limit of the size of files."""

logger = logging.getLogger("fewstep")

_unchecked: set[str] = set()
"""The files without a checksum that the log has named."""


def write_atomic(
    path: str | Path,
    content: bytes | str | Iterable[bytes | memoryview],
    *,
    new: bool = False,
    size: int | None = None,
) -> Path:
    """Writes a file atomically: temporary file, fsync, rename, fsync of the folder.

    After a power cut the file is whole, and there if this function had returned. A whole PNG or HTML page gets a
    checksum (:mod:`fewstep.base.sealing`).

    Arguments:
        path: The file.
        content: Its content, whole or in pieces.
        new: Whether it must not exist yet.
        size: The number of bytes, for messages, if the pieces are not a sequence.

    Raises:
        FileExistsError: If it should be ``new`` and exists: of many writers one succeeds.
        OSError: If there is no space left; the message names the file and the number of bytes.
    """
    check_path(path, "path")
    data = content.encode() if isinstance(content, str) else content
    pieces = [with_checksum(data)] if isinstance(data, bytes) else data
    if is_remote(path):
        write_remote(path, list(pieces), new=new)
        return Path(path)
    path = Path(path)
    if not isinstance(pieces, Sequence):
        return _write_once(path, pieces, new, size)
    size = sum(map(len, pieces)) if size is None else size
    for _ in range(2):
        try:
            return _write_once(path, pieces, new, size)
        except FileNotFoundError:
            pass  # another process removed the temporary file, or the folder, as leftovers
    return _write_once(path, pieces, new, size)


def _write_once(
    path: Path, pieces: Iterable[bytes | memoryview], new: bool, size: int | None
) -> Path:
    temporary = temporary_path(path)
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        with contextlib.suppress(OSError):
            temporary.unlink()  # before the free space is measured
        raise no_space(error, path, size) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def check_writable(path: str | Path) -> None:
    """Raises unless a file can be written there, for long work that writes its result at the end.

    Raises:
        TypeError: If it is no path.
        OSError: If it is a folder, or in a folder that is none or that cannot be written to.
    """
    check_path(path, "path")
    if is_remote(path):
        return
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give the path of a file", str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file and no folder", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written to", str(folder))


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, which a power cut does not undo."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk: a rename alone may be undone by a power cut."""
    if os.name != "posix":
        return  # other systems do not open folders
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in UNSYNCED:
                raise
        finally:
            os.close(handle)


def no_space(error: OSError, path: Path, size: int | None) -> OSError:
    """Returns the error for a file that could not be written because the disk is full.

    Arguments:
        error: The error of the system.
        path: The file.
        size: The bytes that were to be written, if that is known.
    """
    needed = "its content" if size is None else f"{_amount(size)} of content"
    free = ""
    with contextlib.suppress(OSError):
        free = f", {_amount(shutil.disk_usage(path.parent).free)} are free"
    limited = error.errno == errno.EFBIG
    what = "the size of files is limited (ulimit -f)" if limited else "no space left"
    fix = "raise the limit" if limited else "free some space"
    text = f"{what}: {needed} could not be written{free}; {fix} and give the same command again"
    return OSError(error.errno, text, str(path))


def _amount(count: float) -> str:
    """Returns a number of bytes in words: ``1.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except OSError:
        # A file system without hard links: not atomic there, but no better way exists.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def sweep(folder: Path, *, older: float | None = None, of: str | None = None) -> None:
    """Removes temporary files that killed processes left; only the one writer of a folder may.

    Arguments:
        folder: The folder.
        older: The least age in seconds, where others may be writing.
        of: The name of the file whose temporary files are removed; left out, those of all.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if LITTER.fullmatch(path.name) and (of is None or target_of(path.name) == of):
            with contextlib.suppress(FileNotFoundError):
                if older is None or time.time() - path.stat().st_mtime > older:
                    path.unlink()


def write_json(path: str | Path, value: Any, *, new: bool = False) -> Path:
    """Writes a JSON file atomically; floats round-trip, NaN and infinity are refused.

    An object gets a checksum, which :func:`read_json` verifies and removes.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    plain = json.loads(text)
    if isinstance(plain, dict) and CHECKSUM not in plain:
        text = json.dumps({**plain, CHECKSUM: _json_digest(plain)}, indent=1)
    return write_atomic(path, text + "\n", new=new)


def _json_digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of its formatting."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def json_line(value: Mapping[str, Any]) -> str:
    """Returns an object as a line of JSON with a checksum, which :func:`loads_json` verifies and removes."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    return json.dumps({**plain, CHECKSUM: _json_digest(plain)})


def read_json(
    path: str | Path,
    *,
    what: str = "file",
    checksum: bool = False,
    infinite: bool = False,
    foreign: bool = False,
) -> Any:
    """Reads a JSON file.

    Arguments:
        path: The file.
        what: The kind of file, for messages.
        checksum: Whether it must have a checksum, as for files that only fewstep writes.
        infinite: Whether numbers may be infinite, as other libraries write them.
        foreign: Whether it is another library's, without a checksum by nature.

    Raises:
        ValueError: If it is missing, unreadable, not JSON, too large, or does not match its
            checksum; the message names the file.
    """
    check_path(path, f"the path of a {what}")
    name = f"{what} {str(path)!r}"
    if is_remote(path):
        content = Remote(path).read()
    else:
        content = read_limited(path, what=name)
    value = loads_json(content, what=name, checksum=checksum, infinite=infinite)
    if not foreign and CHECKSUM.encode() not in content:
        _mention(path)
    return value


def read_limited(path: str | Path, *, what: str, most: int = MOST_JSON) -> bytes:
    """Returns the content of a file that has at most so many bytes; of a larger one nothing is read.

    Raises:
        ValueError: If it is missing, unreadable or larger.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read(most + 1) if size <= most else b""
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from None
    _check_size(max(size, len(content)), what, most)
    return content


def _check_size(size: int, what: str, most: int) -> None:
    if size > most:
        raise ValueError(f"{what} has {_amount(size)}; at most {_amount(most)} are read")


def _mention(path: str | Path) -> None:
    """Names a file without a checksum in the log, once in a process."""
    if str(path) not in _unchecked:
        _unchecked.add(str(path))
        logger.info(
            "%s has no checksum: it is of an early version, of another program, or was edited; "
            "it is read unchecked",
            path,
        )


def loads_json(
    text: str | bytes, *, what: str, checksum: bool = False, infinite: bool = False
) -> Any:
    """Parses JSON, refusing NaN, infinity, repeated keys and absurd nesting with a clear error.

    Raises:
        ValueError: Also if the text is longer than :data:`MOST_JSON`, or has a checksum (see
            :func:`write_json`) that is not its own.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"{what} must be a text, got {type(text).__name__}")
    _check_size(len(text), what, MOST_JSON)
    try:
        value = json.loads(
            text,
            parse_float=_finite,
            parse_constant=_infinity if infinite else _refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    layer = [value]
    for _ in range(MOST_NESTED):
        layer = [child for node in layer for child in _children(node)]
        if not layer:
            return _checked(value, what, checksum)
    # Deeper values would overflow the stack when they are printed or compared.
    raise ValueError(f"{what} is not valid JSON: it is nested too deeply")


def _checked(value: Any, what: str, required: bool) -> Any:
    if not isinstance(value, dict) or CHECKSUM not in value:
        if required:
            raise ValueError(f"{what} is damaged: it has no checksum")
        return value
    written = value.pop(CHECKSUM)
    if written != _json_digest(value):
        raise ValueError(
            f"{what} is damaged: its checksum does not match; if you edited it, delete its "
            f"{CHECKSUM!r}"
        )
    return value


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number that a file may have")
    return number


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a file may have")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    pairs_by_key: dict[str, Any] = {}
    for key, value in pairs:
        if key in pairs_by_key:
            raise ValueError(f"the key {key!r:.60} is repeated")
        pairs_by_key[key] = value
    return pairs_by_key


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    checksum: bool = True,
) -> Path:
    """Writes a safetensors file atomically; the same tensors and metadata are the same bytes.

    Arguments:
        path: The file.
        tensors: The tensors, on any device.
        metadata: Texts by name.
        checksum: Whether it gets a checksum, which :func:`read_tensors` checks.
    """
    from safetensors.torch import save

    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header, data = _split(save(ready))
    header["__metadata__"] = dict(sorted((metadata or {}).items()))
    if checksum:
        header["__metadata__"][CHECKSUM] = _tensors_digest(header, data)
    elif not metadata:
        del header["__metadata__"]
    return write_atomic(path, (_encoded(header), data))


def write_rows(
    path: str | Path,
    name: str,
    shape: Sequence[int],
    pieces: Callable[[], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes one tensor that comes in pieces of its rows, with only a piece in memory at a time.

    The bytes are those of :func:`write_tensors` for the whole tensor. The pieces are asked for twice: the
    checksum is in the header, before the data.

    Arguments:
        path: The file.
        name: The name of the tensor.
        shape: Its shape.
        pieces: Returns the pieces, in order, of one type.
        metadata: Texts by name.

    Raises:
        ValueError: If the pieces do not make a tensor of this shape.
    """
    from safetensors.torch import save

    def data() -> Iterator[bytes]:
        count = 0
        for piece in pieces():
            if piece.dtype != first.dtype or piece.shape[1:] != first.shape[1:]:
                raise ValueError(f"the pieces of {name!r} differ in type or shape")
            count += len(piece)
            yield bytes(_split(save({name: piece.detach().cpu().contiguous()}))[1])
        if (count, *first.shape[1:]) != tuple(shape):
            raise ValueError(f"{name!r} has {count} rows of {tuple(first.shape[1:])}, not {shape}")

    first = next(iter(pieces()))
    header, _ = _split(save({name: first[:1].detach().cpu().contiguous()}))
    size = first.element_size() * math.prod(shape)
    header[name] |= {"shape": list(shape), "data_offsets": [0, size]}
    header["__metadata__"] = dict(sorted((metadata or {}).items()))
    digest = hashlib.sha256(_json_digest(header).encode())
    for block in data():
        digest.update(block)
    header["__metadata__"][CHECKSUM] = digest.hexdigest()
    start = _encoded(header)
    return write_atomic(path, itertools.chain([start], data()), size=len(start) + size)


def _encoded(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data so
    return len(text).to_bytes(8, "little") + text


def read_tensors(
    path: str | Path, *, what: str = "file", foreign: bool = False
) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Arguments:
        path: The file.
        what: The kind of file, for messages.
        foreign: Whether it is another program's, or verified by a checksum elsewhere.

    Raises:
        ValueError: If the file is missing, is not safetensors, or does not match its checksum;
            the message names it.
    """
    return read_tensors_and_metadata(path, what=what, foreign=foreign)[0]


def read_tensors_and_metadata(
    path: str | Path, *, what: str = "file", checksum: bool = False, foreign: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file with its metadata.

    Arguments:
        path: The file.
        what: The kind of file, for messages.
        checksum: Whether it must have a checksum, as for files that only fewstep writes.
        foreign: Whether it is another program's, or verified by a checksum elsewhere.

    Raises:
        ValueError: As :func:`read_tensors`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = f"{what} {str(path)!r}"
    try:
        with open(path, "rb") as stream:
            _check_header(stream, name)
            raw = stream.read()
        tensors = load(raw)
        header, data = _split(raw)
        metadata = {str(k): str(v) for k, v in (header.get("__metadata__") or {}).items()}
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} is not a safetensors file: {error}") from None
    written = metadata.pop(CHECKSUM, None)
    if written is None and checksum:
        raise ValueError(f"{name} is damaged: it has no checksum")
    if written is not None and written != _tensors_digest(header, data):
        raise ValueError(f"{name} is damaged: its checksum does not match")
    if written is None and not foreign:
        _mention(path)
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file without its tensors; no checksum is verified.

    Raises:
        ValueError: If the file is missing or is not safetensors; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as stream:
            _check_header(stream, "it")
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"file {str(path)!r} is not a safetensors file: {error}") from None
    metadata.pop(CHECKSUM, None)
    return metadata


def check_tensors(path: str | Path) -> tuple[list[str], dict[str, str], bool]:
    """Verifies a safetensors file block by block.

    Returns:
        The names of its tensors, its metadata, and whether it has a checksum.

    Raises:
        ValueError: If it is not a safetensors file, or does not match its checksum.
    """
    metadata = read_metadata(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        names = [name for name in header if name != "__metadata__"]
        written = (header.get("__metadata__") or {}).get(CHECKSUM)
        if written is None:
            return names, metadata, False
        digest = _header_digest(header)
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != written:
        raise ValueError("its checksum does not match")
    return names, metadata, True


def _check_header(stream: BinaryIO, name: str) -> None:
    """Raises unless a safetensors file has the header that it says; the stream is at its start then."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"its header would have {length} bytes, {name} has {size}")
    _check_size(length, f"the header of {name}", MOST_HEADER)
    stream.seek(0)


def _split(raw: bytes) -> tuple[dict[str, Any], memoryview]:
    """Returns the header of a safetensors file and its data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]


def _tensors_digest(header: Mapping[str, Any], data: memoryview) -> str:
    """Returns the SHA-256 of names, types, shapes, metadata and data."""
    digest = _header_digest(header)
    digest.update(data)
    return digest.hexdigest()


def _header_digest(header: Mapping[str, Any]) -> hashlib._Hash:
    metadata = {k: v for k, v in header["__metadata__"].items() if k != CHECKSUM}
    return hashlib.sha256(_json_digest({**header, "__metadata__": metadata}).encode())


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

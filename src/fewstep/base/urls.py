"""Files and folders on other file systems, by URL: ``s3://bucket/run``, ``gs://``, ``memory://``, ``file://``.

Objects are copied atomically: one appears complete or not at all. On object stores that is how they work;
elsewhere a copy gets its name when it is complete. It needs fsspec, and its package for the protocol (``s3fs`` for
``s3://``).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

from fewstep.base.extras import install_hint
from fewstep.base.temporary import temporary_name, temporary_path

URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://(.*)", re.DOTALL)
"""A protocol of at least two letters: ``C:`` is a drive."""

WHOLE = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "hf"})
"""The protocols whose objects appear complete; on others a copy is renamed when it is complete."""

OWNER = ".fewstep-owner.json"
"""The ending of the object that names the process which writes to a URL."""

_names: dict[str, str] = {}


def is_remote(path: object) -> TypeGuard[str]:
    """Returns whether this is a URL, not a path of this machine."""
    return isinstance(path, str) and URL.fullmatch(path) is not None


def show_as(local: Path, url: str) -> None:
    """Lets :func:`shown` write a URL for a local path."""
    _names[str(local)] = url


def shown(text: str) -> str:
    """Returns a text with URLs instead of the local paths that stand for them."""
    for local, url in _names.items():
        text = text.replace(local, url)
    return text


class Remote:
    """A folder, or one object, on another file system.

    Arguments:
        url: Its URL.

    Raises:
        ValueError: If fsspec, its package for the protocol, or the protocol is missing.
    """

    def __init__(self, url: str) -> None:
        found = URL.fullmatch(url)
        if found is None or not found[2].strip("/"):
            raise ValueError(
                f"a URL is PROTOCOL://PLACE, for example s3://bucket/run, got {url!r}"
            )
        self.protocol, self.url = found[1].lower(), url.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise ValueError(f"{url!r} needs fsspec: {install_hint('remote')}") from None
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise ValueError(f"{url!r} needs another package: {error}") from None
        except ValueError as error:
            raise ValueError(
                f"{url!r}: {error}; fsspec knows {', '.join(sorted(WHOLE & set(fsspec.available_protocols())))}, "
                "file and others"
            ) from None

    def place(self, name: str) -> str:
        """Returns the path of an object on its file system; an empty name is the URL itself."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def sizes(self) -> dict[str, int]:
        """Returns the objects below the URL, by relative name, with their sizes."""
        self.fs.invalidate_cache()
        if not self.fs.isdir(self.root):
            return {}
        found = self.fs.find(self.root, detail=True)
        start = len(self.root.rstrip("/")) + 1
        names = {path[start:]: int(about.get("size") or 0) for path, about in found.items()}
        return {name: size for name, size in names.items() if not is_internal(name)}

    def exists(self, name: str = "") -> bool:
        """Returns whether an object exists."""
        self.fs.invalidate_cache()
        return bool(self.fs.isfile(self.place(name)))

    def read(self, name: str = "") -> bytes:
        """Returns the content of an object.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            return bytes(self.fs.cat_file(self.place(name)))
        except OSError as error:
            raise ValueError(
                f"{self.url + '/' + name if name else self.url!r} cannot be read: {error.strerror or error}"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object atomically."""
        with self._complete(name) as place:
            self.fs.pipe_file(place, content)

    def put(self, file: Path, name: str) -> None:
        """Copies a local file to an object atomically."""
        with self._complete(name) as place:
            self.fs.put_file(str(file), place)

    def get(self, name: str, file: Path) -> None:
        """Copies an object to a local file, which appears complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(file)
        try:
            self.fs.get_file(self.place(name), str(temporary))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes an object, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.place(name))

    @contextlib.contextmanager
    def _complete(self, name: str) -> Iterator[str]:
        place = self.place(name)
        if self.protocol in WHOLE:
            yield place
            return
        folder, _, last = place.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/{temporary_name(last)}"
        try:
            yield temporary
            self.fs.mv(temporary, place)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(temporary)


def is_internal(name: str) -> bool:
    """Returns whether a file is only of use here: locks, temporary files, owner objects."""
    return any(part.startswith(".") for part in name.split("/")) or name.endswith(OWNER)


def write_remote(url: str, pieces: Sequence[bytes | memoryview], *, new: bool = False) -> None:
    """Writes an object atomically.

    Raises:
        FileExistsError: If it should be ``new`` and exists.
    """
    remote = Remote(url)
    if new and remote.exists():
        raise FileExistsError(url)
    remote.write("", b"".join(pieces))

"""Verification of files: the kind of each, by its content, and whether it is whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fewstep.base.files import (
    MOST_JSON,
    check_tensors,
    loads_json,
    read_limited,
    sha256,
)
from fewstep.base.sealing import CHECKSUM, PNG, checked, is_page
from fewstep.base.temporary import LITTER

State = Literal["ok", "damaged", "without checksum", "unknown"]


class Reader(NamedTuple):
    """The reader of a format.

    Attributes:
        read: Reads a file and checks it; raises a :class:`ValueError` if it is damaged.
        version: The version of the format that it reads.
    """

    read: Callable[[Path], object]
    version: int = 1


KEYS = {
    frozenset({"inputs", "part", "value"}): "part of a run",
    frozenset({"inputs", "value"}): "part of a run",
    frozenset({"recipe", "step", "loss"}): "checkpoint",
    frozenset({"sampler", "nfe", "identity", "scores"}): "cell of a comparison",
    frozenset({"family", "objective", "search", "seed"}): "settings of a search",
}
"""The kinds of JSON files without an entry ``format``, by some of their keys."""

METADATA = {
    "inputs": "part of a run",
    "step": "tensors of a checkpoint",
    "state": "state of a search",
    "key": "samples of a teacher",
    "cell": "samples of a cell",
    "batch": "batch of a cell",
    "fewstep": "shard of trajectories",
}
"""The kinds of safetensors files, by an entry of their metadata."""


class Verdict(NamedTuple):
    """The result for one file.

    Attributes:
        path: The file.
        kind: What it is, in words; empty if that is not known.
        state: Whether it is whole: by its checksum, or, without one, by its form.
        reason: The defect, or what is known of an unknown file.
    """

    path: Path
    kind: str
    state: State
    reason: str = ""


def files_under(path: Path) -> Iterator[Path]:
    """Yields a file, or the files of a folder and its folders, in the order of their names."""
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            yield Path(folder) / name


def verify_file(path: Path, readers: Mapping[str, Reader]) -> Verdict:
    """Returns the verdict on a file; of large ones only a block is in memory at a time.

    Arguments:
        path: The file.
        readers: For formats (``fewstep.plan``) and kinds of safetensors files, what reads a file of it.

    Raises:
        ValueError: If it is missing.
    """
    if LITTER.fullmatch(path.name):
        return Verdict(
            path, "temporary file", "unknown", "of a run that is at work, or was killed"
        )
    try:
        with open(path, "rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".jsonl":
            return _lines(path)
        if path.suffix == ".json" or start.lstrip().startswith(b"{"):
            return _json(path, readers)
        if path.suffix == ".safetensors" or start[8:10] == b'{"':
            return _tensors(path, readers)
        if path.suffix == ".png" or start.startswith(PNG):
            return _picture(path)
        if is_page(start):
            return _page(path)
    except ValueError as error:
        return Verdict(path, path.suffix.removeprefix("."), "damaged", str(error))
    return Verdict(path, "", "unknown")


def _json(path: Path, readers: Mapping[str, Reader]) -> Verdict:
    content = read_limited(path, what="it")
    has_checksum = CHECKSUM.encode() in content
    if path.suffix != ".json" and not has_checksum:
        return Verdict(path, *_lock(content))
    value = loads_json(content, what="it", infinite=not has_checksum)
    kind, reader = _kind(value), None
    if not kind and not has_checksum:
        return Verdict(path, "", "unknown", "JSON of another program")
    if isinstance(value, dict) and isinstance(value.get("format"), str):
        reader = readers.get(value["format"])
    if reader is not None:
        version = value.get("version")
        if version != reader.version:
            reason = f"of version {version!r:.20}; this fewstep reads {reader.version}"
            return Verdict(path, kind, "unknown", reason)
        reader.read(path)
    return Verdict(path, kind or "JSON", "ok" if has_checksum else "without checksum")


def _lock(content: bytes) -> tuple[str, State, str]:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return "", "unknown", ""
    if isinstance(owner, dict) and {"pid", "host", "token"} <= set(owner):
        return "lock", "without checksum", f"of process {owner['pid']} on {owner['host']}"
    return "", "unknown", "JSON of another program"


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    named = value.get("format")
    if isinstance(named, str) and named.startswith("fewstep."):
        return named.removeprefix("fewstep.").replace(".", " ")
    return next((kind for keys, kind in KEYS.items() if keys <= set(value)), "")


def _tensors(path: Path, readers: Mapping[str, Reader]) -> Verdict:
    names, metadata, whole = check_tensors(path)
    kind = next((kind for key, kind in METADATA.items() if key in metadata), "")
    if "fewstep" in metadata:
        reader = readers.get(kind)
        if reader is not None:
            reader.read(path)
            return Verdict(path, kind, "ok")
    kind = kind or ("samples" if names == ["samples"] else "tensors")
    # The description of weights has their checksum: they belong to it.
    about = path.with_suffix(".json")
    wanted = _sha256_in(about) if about.is_file() else None
    if wanted is not None and sha256(path) != wanted:
        raise ValueError(f"its checksum is not the one in {about.name}; copy both again")
    return Verdict(path, kind, "ok" if whole or wanted is not None else "without checksum")


def _sha256_in(about: Path) -> str | None:
    try:
        value = loads_json(read_limited(about, what="it"), what="it")
    except ValueError:
        return None  # which is said of that file
    digest = value.get("sha256") if isinstance(value, dict) else None
    return digest if isinstance(digest, str) else None


def _lines(path: Path) -> Verdict:
    content = read_limited(path, what="it", most=16 * MOST_JSON)
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            loads_json(line, what="it")
        except ValueError as error:
            what = "does not match its checksum" if CHECKSUM in str(error) else "is not JSON"
            raise ValueError(f"line {number} {what}; the run makes it again") from None
    has_checksums = all(CHECKSUM.encode() in line for line in lines)
    return Verdict(path, "log", "ok" if has_checksums else "without checksum")


def _picture(path: Path) -> Verdict:
    """Verifies the CRC that each block of a PNG has, and the checksum of the whole if it is ours."""
    with open(path, "rb") as stream:
        if stream.read(8) != PNG:
            raise ValueError("it is not a PNG")
        kind = b""
        while head := stream.read(8):
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            check, left = zlib.crc32(kind), length
            while left and (block := stream.read(min(left, 1 << 20))):
                check, left = zlib.crc32(block, check), left - len(block)
            if left or stream.read(4) != check.to_bytes(4, "big"):
                raise ValueError("its checksums do not match, or it is cut")
    if kind != b"IEND":
        raise ValueError("it is cut")
    checked(read_limited(path, what="it", most=16 * MOST_JSON))
    return Verdict(path, "picture", "ok")


def _page(path: Path) -> Verdict:
    has_checksum = checked(read_limited(path, what="it", most=16 * MOST_JSON))
    return Verdict(path, "page", "ok" if has_checksum else "without checksum")

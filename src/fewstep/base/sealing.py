"""Checksums inside of pictures and pages: the SHA-256 of all other bytes of the file.

A PNG has it in a text block before its end, an HTML page in a comment after its end, so that every program
reads both as before.
"""

from __future__ import annotations

import hashlib
import re
import zlib

CHECKSUM = "content_sha256"
"""The key of the checksum in the files that we write."""

PNG = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
"""The last block of a PNG."""

BLOCK = 4 + 4 + len(CHECKSUM) + 1 + 64 + 4
"""The bytes of the text block: length, kind, key, zero, digest, CRC."""

PAGE, PAGE_END = b"<!doctype html", b"</html>"
COMMENT = re.compile(rb"<!-- %s: ([0-9a-f]{64}) -->\n\Z" % CHECKSUM.encode())


def with_checksum(content: bytes) -> bytes:
    """Returns a PNG or a page with its checksum; anything else, or one that has one, as it is."""
    if content.startswith(PNG) and content.endswith(END):
        start = content[: -len(END)]
        block = b"tEXt" + CHECKSUM.encode() + b"\0" + _digest(content)
        whole = (len(block) - 4).to_bytes(4, "big") + block + zlib.crc32(block).to_bytes(4, "big")
        return content if _png_checksum(content) is not None else start + whole + END
    if is_page(content) and content.rstrip().lower().endswith(PAGE_END):
        text = content.rstrip() + b"\n"
        return text + b"<!-- " + CHECKSUM.encode() + b": " + _digest(text) + b" -->\n"
    return content


def is_page(content: bytes) -> bool:
    """Returns whether something is the beginning of an HTML page."""
    return content[: len(PAGE)].lower() == PAGE


def checked(content: bytes) -> bool:
    """Returns whether a PNG or a page has a checksum.

    Raises:
        ValueError: If it has one that is not its own, or a page is cut.
    """
    if content.startswith(PNG):
        written = _png_checksum(content)
        plain = content[: -BLOCK - len(END)] + END
    else:
        match = COMMENT.search(content)
        written, plain = (match[1], content[: match.start()]) if match else (None, b"")
        if match is None and not content.rstrip().lower().endswith(PAGE_END):
            raise ValueError("it is cut, or was edited after its end")
    if written is not None and written != _digest(plain):
        raise ValueError("its checksum does not match")
    return written is not None


def _png_checksum(content: bytes) -> bytes | None:
    block = content[-BLOCK - len(END) : -len(END)]
    key = b"tEXt" + CHECKSUM.encode() + b"\0"
    return block[4 + len(key) : -4] if block[4:].startswith(key) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()

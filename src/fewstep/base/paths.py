"""Checks of the paths that callers give."""

from __future__ import annotations

import os


def check_path(path: object, name: str) -> None:
    """Raises unless an argument is a path or a URL.

    An empty text is none, although :class:`pathlib.Path` takes it for the current folder: most often it comes from
    a variable that is not set.

    Arguments:
        path: The argument; ``None`` if it was left out.
        name: Its name, for the message.

    Raises:
        TypeError: If it is neither text nor path.
        ValueError: If it is empty.
    """
    if path is None:
        return
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")
    if isinstance(path, str) and not path.strip():
        raise ValueError(
            f"{name} must be a path, got {path!r}; is a variable not set? '.' is the current folder"
        )

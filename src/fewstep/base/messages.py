"""Errors as messages for a user: one text for the command line and the studio."""

from __future__ import annotations

from fewstep.base.memory import is_out_of_memory


def message_of(error: BaseException) -> str:
    """Returns the text of an error: of a file that cannot be read its path and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def is_mistake(error: BaseException) -> bool:
    """Returns whether an error is about a user's input or the machine's memory, and no defect of the code."""
    return isinstance(error, (ValueError, TypeError, OSError)) or is_out_of_memory(error)

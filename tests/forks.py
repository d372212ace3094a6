"""A process that has not yet imported fewstep, without importing torch and diffusers again."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import pytest

FORKS = "ignore:.*fork.*:DeprecationWarning"
"""What Python 3.12 warns of where threads are running: the child touches none of them."""


def in_fork(work: Callable[[], None]) -> None:
    """Calls a function in a fork that has forgotten fewstep; what it raises fails the test.

    Starting a process costs a second for torch and three for diffusers; a fork some milliseconds.
    """
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "the child ended early"
        try:
            for name in [name for name in sys.modules if name.partition(".")[0] == "fewstep"]:
                del sys.modules[name]
            work()
            text = ""
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(write, text.encode()[-4096:])
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert not text, text

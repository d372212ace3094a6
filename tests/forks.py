"""A process that has not yet imported fewstep, without importing torch and diffusers again."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import pytest

FORKS = "ignore:.*fork.*:DeprecationWarning"
"""What Python 3.12 warns of where threads are running: the child touches none of them."""


class Fork:
    """A fork that has forgotten fewstep and the tests' own modules, and calls a function.

    Starting a process costs a second for torch and three for diffusers; a fork some milliseconds.

    Arguments:
        work: The function; it imports what it needs of fewstep itself.
        fresh: Whether it forgets; without it is a worker of this process.
        environment: Variables of the environment.
    """

    def __init__(
        self, work: Callable[[], object], *, fresh: bool = True, **environment: str
    ) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("no fork on this system")
        read, write = os.pipe()
        self.pid = os.fork()
        self._code: int | None = None
        if self.pid == 0:
            self._run(work, fresh, environment, write)
        os.close(write)
        self._said = os.fdopen(read)

    @staticmethod
    def _run(
        work: Callable[[], object], fresh: bool, environment: dict[str, str], write: int
    ) -> None:
        code = 1
        try:
            for name in list(sys.modules) if fresh else ():
                if name.partition(".")[0] == "fewstep" or name.startswith("tiny_"):
                    del sys.modules[name]
            os.environ.update(environment)
            work()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4096:])
        finally:
            os._exit(code)

    def has_ended(self) -> bool:
        """Returns whether the process has ended, and leaves it to :meth:`wait`."""
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self._code is not None or os.waitid(os.P_PID, self.pid, how) is not None

    def wait(self) -> int:
        """Returns the exit code once the process has ended; what was raised there is raised here."""
        if self._code is None:
            with self._said:
                text = self._said.read()
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            assert not text, text
        return self._code


def in_fork(work: Callable[[], object]) -> None:
    """Calls a function in a fork; what it raises fails the test."""
    assert Fork(work).wait() == 0

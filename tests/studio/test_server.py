"""The command ``fewstep studio``, without a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from fewstep.base.extras import install_hint
from fewstep.base.interrupts import Terminated
from fewstep.studio import server
from fewstep.studio.server import address_of, bound, end_runs, is_local
from fewstep.studio.session import Sessions


@pytest.fixture
def installed(monkeypatch):
    """As if the extra were installed."""
    monkeypatch.setattr(server, "find_spec", lambda name: object())


def test_without_the_extra_the_message_says_how_to_install_it(command, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert command("studio", code=2) == (
        f"error: the studio needs NiceGUI: {install_hint('studio')}\n"
    )


def test_it_serves_this_machine_only_unless_asked(installed):
    with bound("127.0.0.1", 0) as listening:
        assert is_local(listening)
        assert address_of(listening).startswith("http://127.0.0.1:")
    with bound("0.0.0.0", 0) as listening:
        assert not is_local(listening)


def test_an_address_that_cannot_be_had_is_an_error_before_anything_starts(installed, command):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = command("studio", "--port", port, code=2)
    assert f"cannot serve at 127.0.0.1, port {port}" in message
    assert "--port 0" in message
    assert "from 0 to 65535" in command("studio", "--port", 70000, code=2)
    assert "is no address" in command("studio", "--host", "no.such.host.invalid", code=2)


def test_a_model_that_cannot_be_loaded_is_an_error_before_serving(installed, command):
    assert "Unknown model 'fashon'" in command("studio", "fashon", "--port", 0, code=2)


INTERRUPTED_WHILE_SAMPLING = """
import os
import signal

import torch

from fewstep.studio import server
from fewstep.studio.models import Models, Observed
from fewstep.studio.settings import SampleRequest, SamplerSettings

server.PATIENCE = 0.01
matrix = torch.ones(1000, 1000)
evaluate = Observed.raw


def evaluate_slowly(self, x, t, **cond):
    if self.count == 2:
        os.kill(os.getpid(), signal.SIGINT)
    for _ in range(20):  # in torch, without the interpreter's lock, while the server ends
        matrix @ matrix
    return evaluate(self, x, t, **cond)


Observed.raw = evaluate_slowly
with server.bound("127.0.0.1", 0) as listening:
    app = server.application("mixture-smooth", device="cpu")
    session = app.state.sessions.new(Models())
    request = SampleRequest("mixture-smooth", (SamplerSettings(nfe=500),), reference=False)
    start = lambda: session.sample(request)
    app.router.on_startup.append(start)
    server.serve(listening, app)
assert not session.busy
(ended,) = session.events()[-1:]
print(ended, flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_while_sampling_ends_the_process_cleanly():
    """A thread in torch at the end of the interpreter would abort it (SIGABRT)."""
    pytest.importorskip("nicegui", reason="the extra studio")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_SAMPLING],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ended(cancelled=True)" in done.stdout
    assert done.stderr in ("", "waiting for the last evaluation; Ctrl-C again ends at once\n")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_second_ctrl_c_does_not_wait_for_the_run(stop, code, monkeypatch):
    class Busy(Sessions):
        def wait(self, seconds=None):
            raise stop

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    end_runs(Busy())
    assert codes == [code]

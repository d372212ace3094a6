"""The command ``fewstep studio``, without a browser."""

from __future__ import annotations

import socket

import pytest

from fewstep.studio import server
from fewstep.studio.server import address_of, bound, is_local


@pytest.fixture
def installed(monkeypatch):
    """As if the extra were installed."""
    monkeypatch.setattr(server, "find_spec", lambda name: object())


def test_without_the_extra_the_message_says_how_to_install_it(command, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert command("studio", code=2) == (
        "error: the studio needs NiceGUI: pip install fewstep[studio]\n"
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

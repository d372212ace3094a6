"""The server of the studio: this machine only, unless another address is asked for."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import warnings
import webbrowser
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fewstep.base.extras import install_hint
from fewstep.base.interrupts import Terminated

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fewstep.studio.session import Sessions

logger = logging.getLogger("fewstep")

PATIENCE = 2.0
"""The seconds that a cancelled run has to end, before something is said."""

LOCAL_NAMES = ["127.0.0.1", "localhost", "[::1]"]
"""The names by which a browser of this machine asks for a page of this machine."""


def check_installed() -> None:
    """Raises ``ValueError`` with the command to install it, if NiceGUI is missing."""
    if find_spec("nicegui") is None:
        raise ValueError(f"the studio needs NiceGUI: {install_hint('studio')}")


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that is bound to an address, before anything else starts.

    Arguments:
        host: The address or name.
        port: The port, 0 for any that is free.

    Raises:
        ValueError: If NiceGUI is not installed, or the address cannot be had.
    """
    check_installed()
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host {host!r} is no address: {error.strerror or error}") from None
    with closing(listening):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot serve at {host}, port {port}: {error.strerror or error}; give another --port, or "
                "--port 0 for any that is free"
            ) from None
        yield listening


def address_of(listening: socket.socket) -> str:
    """Returns the address of the page."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_local(listening: socket.socket) -> bool:
    """Returns whether only this machine reaches a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def application(model: str, *, device: str = "auto", local: bool = True) -> FastAPI:
    """Returns the web application.

    Arguments:
        model: The model that a page begins with.
        device: The device of all models.
        local: Whether requests that name another host are refused: a page of another site cannot reach
            this machine under a name of its own then.

    Raises:
        ValueError: If NiceGUI is not installed, or the model cannot be loaded.
    """
    from fewstep.studio.models import Models

    check_installed()
    models = Models()
    models.get(model, device)

    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from fewstep.studio.page import install

    app = FastAPI(openapi_url=None)
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)
    app.state.sessions = install(app, models, model, device)
    return app


def serve(listening: socket.socket, app: FastAPI, *, open_browser: bool = False) -> None:
    """Serves the studio until it is interrupted.

    Arguments:
        listening: A bound socket.
        app: The application.
        open_browser: Whether the page is opened in the browser of this machine.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    )
    if open_browser:
        webbrowser.open(address_of(listening))
    try:
        with warnings.catch_warnings():
            # NiceGUI looks at every object in memory, and one of torch's warns when it is looked at.
            warnings.filterwarnings("ignore", "`torch.distributed.reduce_op`", FutureWarning)
            server.run(sockets=[listening])
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):
            raise
    finally:
        end_runs(app.state.sessions)


def end_runs(sessions: Sessions) -> None:
    """Cancels all runs and waits for their ends; a second Ctrl-C ends the process without them.

    The interpreter must not end before: a thread that is in torch then aborts the process (SIGABRT).
    """
    try:
        sessions.cancel()
        sessions.wait(PATIENCE)
        if sessions.busy:
            logger.warning("waiting for the last evaluation; Ctrl-C again ends at once")
            sessions.wait()
    except KeyboardInterrupt as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(143 if isinstance(stop, Terminated) else 130)  # as other commands do

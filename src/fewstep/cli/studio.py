"""``fewstep studio``: samplers side by side on a page in the browser."""

from __future__ import annotations

from fewstep.cli._common import Flag, check_device, say

LOOPBACK = "127.0.0.1"
PORT = 8470


def studio(
    model: str = "fashion",
    *,
    host: str = LOOPBACK,
    port: int = PORT,
    device: str = "auto",
    open_browser: Flag = False,
) -> None:
    """Show samplers side by side on a page in the browser, evaluation by evaluation.

    The page is served until Ctrl-C, to this machine only unless --host says otherwise. It needs
    no network. Anyone who can open it can run models and name files of this machine.

    Args:
        model: The model that the page begins with: an embedded name (see `fewstep models`), or a folder.
        host: The address to serve at; 0.0.0.0 is every address of this machine.
        port: The port.
        device: Where to run: auto, cpu, cuda, mps.
        open_browser: Open the page in the browser of this machine.
    """
    from fewstep.studio.server import address_of, application, bound, is_local, serve

    place = device if device == "auto" else check_device(device)
    with bound(host, port) as listening:
        local = is_local(listening)
        app = application(model, device=place, local=local)
        if not local:
            say(
                "other machines reach this address: who opens it can run models and name files of this one"
            )
        say(f"fewstep studio: {address_of(listening)} (Ctrl-C ends it)")
        serve(listening, app, open_browser=open_browser)

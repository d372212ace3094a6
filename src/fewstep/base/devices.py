"""Devices by name: ``"auto"`` is the best available one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fewstep.base.processes import processes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("fewstep")


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Returns the device of that name, checked to be usable.

    Arguments:
        device: A device of torch (``"cpu"``, ``"cuda:1"``), or ``"auto"``: CUDA, else MPS, else the
            CPU; the log says which. Of processes that were started together on one machine
            (``torchrun``) each gets a GPU of its own, unless its number is given.

    Raises:
        ValueError: If it is not available.
    """
    import torch

    if device == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = str(_own_cuda(torch.device("cuda")))
        elif torch.backends.mps.is_available():
            name = "mps"
        logger.info("auto chose the device %s", name)
        return torch.device(name)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is not available"
        raise ValueError(
            f"device {str(device)!r:.40} cannot be used: {reason:.200}; 'cpu' always works"
        ) from None
    if chosen.type == "meta":
        raise ValueError("device 'meta' holds no numbers; 'cpu' always works")
    return _own_cuda(chosen)


def _own_cuda(device: torch.device) -> torch.device:
    """Returns the GPU of this process if several were started together on this machine."""
    import torch

    team = processes()
    if device.type != "cuda" or device.index is not None or not team.several:
        return device
    # Slurm may show each process its own GPU alone, which is number 0 then.
    return torch.device("cuda", team.local_rank % torch.cuda.device_count())

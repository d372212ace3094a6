"""Devices by name: ``"auto"`` is the best available one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("fewstep")


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Returns the device of that name, checked to be usable.

    Arguments:
        device: A device of torch (``"cpu"``, ``"cuda:1"``), or ``"auto"``: CUDA, else MPS, else the
            CPU; the log says which.

    Raises:
        ValueError: If it is not available.
    """
    import torch

    if device == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        logger.info("auto chose the device %s", name)
        return torch.device(name)
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is not available"
        raise ValueError(
            f"device {str(device)!r:.40} cannot be used: {reason:.200}; 'cpu' always works"
        ) from None
    if found.type == "meta":
        raise ValueError("device 'meta' holds no numbers; 'cpu' always works")
    return found

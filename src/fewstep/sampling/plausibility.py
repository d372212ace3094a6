r"""A check of the size of samples: a wrongly described model mostly returns implausible values."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Wrapper

logger = logging.getLogger("fewstep")

USUAL = 10.0
"""The expected magnitude of data whose statistics are not known."""

ABSURD = 30.0
"""Samples that exceed the data by this factor are not plausible."""

_warned: weakref.WeakSet[Denoiser] = weakref.WeakSet()


def peak(x: Tensor) -> float:
    """Returns the largest magnitude, NaN if there is one: one pass over the memory, and one read of the device.

    (The infinity norm takes 15 times as long on a CPU, where it is not vectorised.)
    """
    return float(torch.stack(torch.aminmax(x)).abs().max())


def warn_if_absurd(denoiser: Denoiser, size: float, sigma: float) -> None:
    r"""Warns, once for each model, if samples are far larger than data can be.

    Arguments:
        denoiser: The model; ``data_mean`` and ``data_std`` give the size of its data.
        size: The largest magnitude of the samples.
        sigma: The standard deviation :math:`\sigma` of the noise that remains in them.
    """
    while isinstance(denoiser, Wrapper):  # the description is that of the network inside
        denoiser = denoiser.inner
    if size <= ABSURD or denoiser in _warned:
        return
    scale = USUAL
    if denoiser.data_mean is not None and denoiser.data_std is not None:
        mean, std = (torch.as_tensor(v).abs() for v in (denoiser.data_mean, denoiser.data_std))
        scale = float(mean.max() + std.max())
    if size <= ABSURD * (scale + sigma):
        return
    _warned.add(denoiser)
    logger.warning(
        "the samples reach %.3g, %.3g times as far as %s: prediction=%r or the schedule %r may not be "
        "what the network was trained with; fewstep.studies.model_check(denoiser, data) and the command "
        "'fewstep analyze' show which are",
        size,
        size / (scale + sigma),
        "data usually do" if denoiser.data_std is None else "the data of this model",
        denoiser.native.value,
        denoiser.schedule.name,
    )

r"""What a student is trained to make small: distances between states, and the weights of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.operators.layout import scales
from fewstep.registry import unknown
from fewstep.schedules import NoiseSchedule

Distance = Callable[[Tensor, Tensor], Tensor]
r"""Takes two batches of states (N, \*) and returns their distances (N); differentiable."""


def l1(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute difference."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """The mean square of the difference."""
    return (a - b).square().flatten(1).mean(1)


def huber(a: Tensor, b: Tensor, *, delta: float = 0.1) -> Tensor:
    r"""The mean of :math:`\sqrt{d^2 + \delta^2} - \delta`: square below delta, absolute above."""
    return (((a - b).square() + delta**2).sqrt() - delta).flatten(1).mean(1)


DISTANCES: dict[str, Distance] = {"l1": l1, "l2": l2, "huber": huber}
WEIGHTS = ("snr", "uniform")


def distance_of(name: str, given: Distance | None) -> Distance:
    """Returns the distance of that name, or the user's own, which is called ``"custom"``.

    Raises:
        ValueError: If the name is unknown, or says ``"custom"`` and none is given.
    """
    if given is not None:
        if not callable(given):
            raise TypeError(f"distance must be callable, got {type(given).__name__}")
        return given
    if name == "custom":
        raise ValueError("the loss 'custom' needs distance=, a callable of two batches of states")
    if name not in DISTANCES:
        raise ValueError(unknown("loss", name, [*DISTANCES, "custom"]))
    return DISTANCES[name]


def loss_weights(
    schedule: NoiseSchedule,
    times: Sequence[float],
    weights: str | Sequence[float] = "snr",
    *,
    lambda_max: float = 1e4,
) -> Tensor:
    r"""Returns the weight of each time, with shape (M), float64.

    .. math:: \lambda(t) = \operatorname{clip}(\alpha_t / \sigma_t, 1, \lambda_{max})

    for ``"snr"``, 1 for ``"uniform"``, or the given numbers. At :math:`\sigma = 0` the weight is
    the cap. With the published cap of 10,000 the last of four frames has 99.9 % of the weight.

    References:
        | Fast Sampling of Diffusion Models via Operator Learning (Zheng et al., 2023), section 4
        | https://arxiv.org/abs/2211.13449

    Arguments:
        schedule: The schedule.
        times: The times of the frames.
        weights: ``"snr"``, ``"uniform"``, or a number for each time.
        lambda_max: The cap of ``"snr"``.

    Raises:
        ValueError: If the weights are none of these, or the cap is below 1.
    """
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise ValueError(unknown("weights", weights, list(WEIGHTS)))
        if weights == "uniform":
            return torch.ones(len(times), dtype=torch.float64)
        if not 1 <= lambda_max < float("inf"):
            raise ValueError(f"lambda_max must be at least 1, got {lambda_max!r}")
        alpha, sigma = scales(schedule, torch.tensor(list(times), dtype=torch.float64))
        return (alpha / sigma).clamp(1, lambda_max)
    table = torch.tensor([float(w) for w in weights], dtype=torch.float64)
    if len(table) != len(times):
        raise ValueError(f"there are {len(times)} frames but {len(table)} weights")
    if not bool(((table >= 0) & table.isfinite()).all()) or not float(table.sum()):
        raise ValueError(f"weights must be numbers that are not negative, got {list(weights)}")
    return table

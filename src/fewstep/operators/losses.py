r"""What a student is trained to make small: distances between states, and the weights of times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.base.registry import unknown
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.networks.unet import SmallUNet

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


Stages = Callable[[Tensor], Sequence[Tensor]]
r"""Takes states (N, \*) and returns what several stages of a network see in them, (N, C, \*) each."""


class FeatureDistance:
    r"""The mean absolute difference, and that of what a network sees in the states.

    Features have unit length over the channels at each place,

    .. math:: d(a, b) = \overline{|a - b|} + w \sum_l \overline{\| \phi_l(a) - \phi_l(b) \|^2}

    References:
        | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018)
        | https://arxiv.org/abs/1801.03924

    Cost: two passes through the network that looks, one of them with a gradient.

    Arguments:
        look: What gives the features: :class:`ModelFeatures`, or ``Features.load(...).stages``.
        weight: The weight w.
    """

    def __init__(self, look: Stages, *, weight: float = 1.0) -> None:
        self.look, self.weight = look, weight

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances.

        Raises:
            ValueError: If the features have no gradient.
        """
        with torch.no_grad():
            wanted = self.look(b)
        total = l1(a.float(), b.float())
        for one, two in zip(self.look(a), wanted, strict=True):
            if a.requires_grad and not one.requires_grad:
                raise ValueError(
                    "the features have no gradient, so nothing could be learned from them (a "
                    "TorchScript file that takes bytes rounds its images)"
                )
            sides = [side.float().reshape(*side.shape[:2], -1) for side in (one, two)]
            unit = [functional.normalize(side, dim=1) for side in sides]
            total = total + self.weight * (unit[0] - unit[1]).square().sum(1).mean(1)
        return total


class ModelFeatures:
    """What the stages on the way down of the model's own U-Net see in a state of little noise.

    Features without another network and without data.

    Arguments:
        denoiser: The model.
        rho: The ratio of noise to data at the time that is told to the network.

    Raises:
        ValueError: If the model's network has no way down (``encode``) to look at.
    """

    def __init__(self, denoiser: Denoiser, *, rho: float = 0.1) -> None:
        network = getattr(denoiser, "network", None)
        if not isinstance(network, SmallUNet):
            raise ValueError(
                f"the loss 'features' needs a network with encode(), a {type(network).__name__} "
                "has none; give features= (a feature extractor), or distance= instead"
            )
        self.network = copy.deepcopy(network).requires_grad_(False)
        schedule = denoiser.schedule
        lam = -torch.tensor(rho, dtype=torch.float64).log()
        self.time = float(schedule.time(lam).clamp(schedule.t_min, schedule.t_max))

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Returns the features."""
        if next(self.network.parameters()).device != x.device:
            self.network = self.network.to(x.device)
        _, _, found = self.network.encode(x, torch.full((len(x),), self.time, device=x.device))
        return found


DISTANCES: dict[str, Distance] = {"l1": l1, "l2": l2, "huber": huber}
LOSSES = (*DISTANCES, "features", "custom")
WEIGHTS = ("snr", "uniform")


def distance_of(
    name: str, given: Distance | None, denoiser: Denoiser, features: str | None = None
) -> Distance:
    """Returns the distance of that name, or the user's own, which is called ``"custom"``.

    Arguments:
        name: A name in ``LOSSES``.
        given: The user's own.
        denoiser: The model.
        features: The feature extractor of ``"features"``, as of :meth:`Features.load`; left out,
            :class:`ModelFeatures`.

    Raises:
        ValueError: If the name is unknown, says ``"custom"`` and none is given, or the extractor
            is unknown or looks at other images than the model's.
    """
    if given is not None:
        if not callable(given):
            raise TypeError(f"distance must be callable, got {type(given).__name__}")
        return given
    if name == "features":
        if features is None:
            return FeatureDistance(ModelFeatures(denoiser))
        from fewstep.metrics.features import Features

        look = Features.load(features).stages
        if denoiser.event_shape is not None:
            look(torch.zeros((1, *denoiser.event_shape)))  # what does not fit is told beforehand
        return FeatureDistance(look)
    if name == "custom":
        raise ValueError("the loss 'custom' needs distance=, a callable of two batches of states")
    if name not in DISTANCES:
        raise ValueError(unknown("loss", name, list(LOSSES)))
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
        alpha, sigma = schedule.scales(torch.tensor(list(times), dtype=torch.float64))
        return (alpha / sigma).clamp(1, lambda_max)
    table = torch.tensor([float(w) for w in weights], dtype=torch.float64)
    if len(table) != len(times):
        raise ValueError(f"there are {len(times)} frames but {len(table)} weights")
    if not bool(((table >= 0) & table.isfinite()).all()) or not float(table.sum()):
        raise ValueError(f"weights must be numbers that are not negative, got {list(weights)}")
    return table

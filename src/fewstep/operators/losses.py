r"""Distillation losses: distances between states, and the weights of the frames."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.base.registry import Registry, unknown
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.networks.unet import SmallUNet

Distance = Callable[[Tensor, Tensor], Tensor]
r"""Takes states and the teacher's (N, \*), returns distances (N), differentiable in the first."""

Stages = Callable[[Tensor], Sequence[Tensor]]
r"""Takes states (N, \*), returns the features of several stages of a network, (N, C, \*) each."""

CUSTOM = "custom"
"""The name of a loss that is a user's callable."""


class Loss(ABC):
    r"""A distance :math:`d(a, b) \ge 0` between a student's states and the teacher's, both (N, \*).

    A distillation minimises :math:`\frac1M \sum_m \lambda_m \frac1B \sum_b d(\hat x^b(t_m), x^b(t_m))`
    over M frames and B trajectories, with the weights of :func:`loss_weights`; the units are those
    of d. A subclass writes :meth:`build` and :meth:`__call__`; a line in :data:`LOSSES` then registers it
    for ``distill``, recipes and the command line.

    Cost: no evaluation of teacher or student; a loss in features has its own network.

    Attributes:
        takes_features: Whether it uses a feature extractor, which the recipe may name.
    """

    takes_features: ClassVar[bool] = False

    @classmethod
    def build(cls, denoiser: Denoiser, features: str | None) -> Loss:
        """Returns the loss for a model.

        Arguments:
            denoiser: The teacher.
            features: The feature extractor that the recipe names, or ``None``.

        Raises:
            ValueError: If it is not possible for this model.
        """
        del denoiser, features
        return cls()

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        r"""Returns the distance of each state a from b, shape (N), differentiable in a."""


def mean_slope(x: Tensor, later: Tensor, keep: Tensor, gain: Tensor) -> Tensor:
    r"""Returns the mean slope of a trajectory between two of its states, (B, \*): the target of a flow map.

    .. math:: F = \frac{y_s - y_t}{\kappa_s - \kappa_t} = \frac{x_s - a x_t}{b}

    in the coordinates :math:`y = x / \sigma`, :math:`\kappa = \alpha / \sigma` of the probability-flow ODE, in which
    its slope is the predicted data. So a target is in the units of data, and is the sample itself for
    a last time of zero noise. It comes from recorded states: no derivative of the network and no network in the
    target. States at neighbouring times in half precision make it noisy, by about :math:`10^{-3} / b`.

    References:
        | CMT: Mid-Training for Efficient Learning of Consistency, Mean Flow, and Flow Map Models (Hu et al., 2025)
        | https://arxiv.org/abs/2509.24526

    Arguments:
        x: The states at the first times t, with shape (B, \*).
        later: The states at the second times s, with shape (B, \*).
        keep: The factor a of the first state, :math:`\sigma_s / \sigma_t`.
        gain: The factor b of the slope, :math:`\alpha_s - \alpha_t \sigma_s / \sigma_t`.
    """
    return (later - keep * x) / gain


class L1(Loss):
    """The mean absolute difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(1)


class L2(Loss):
    """The mean square of the difference."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)


class Huber(Loss):
    r"""The mean of :math:`\sqrt{d^2 + \delta^2} - \delta`: square below delta, absolute above.

    Arguments:
        delta: The difference between the two regimes.
    """

    def __init__(self, delta: float = 0.1) -> None:
        self.delta = delta

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        root = ((a - b).square() + self.delta**2).sqrt()
        return (root - self.delta).flatten(1).mean(1)


class FeatureLoss(Loss):
    r"""The mean absolute difference, and that of features of several stages of a network.

    Features have unit length over the channels at each place,

    .. math:: d(a, b) = \overline{|a - b|} + w \sum_l \overline{\| \phi_l(a) - \phi_l(b) \|^2}

    References:
        | The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018)
        | https://arxiv.org/abs/1801.03924

    Cost: two passes through the extractor, one of them with a gradient.

    Arguments:
        stages: The feature extractor: :class:`ModelFeatures`, or ``Features.load(...).stages``.
        weight: The weight w.
    """

    takes_features = True

    def __init__(self, stages: Stages, *, weight: float = 1.0) -> None:
        self.stages, self.weight = stages, weight
        self.pixels = L1()

    @classmethod
    def build(cls, denoiser: Denoiser, features: str | None) -> FeatureLoss:
        if features is None:
            return cls(ModelFeatures(denoiser))
        from fewstep.metrics.features import Features

        stages = Features.load(features).stages
        if denoiser.event_shape is not None:
            stages(torch.zeros((1, *denoiser.event_shape)))  # raises for another shape
        return cls(stages)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances.

        Raises:
            ValueError: If the features have no gradient.
        """
        with torch.no_grad():
            target = self.stages(b)
        total = self.pixels(a.float(), b.float())
        for one, two in zip(self.stages(a), target, strict=True):
            if a.requires_grad and not one.requires_grad:
                raise ValueError(
                    "the features have no gradient, so they cannot be a loss (a "
                    "TorchScript file that takes bytes rounds its images)"
                )
            sides = [side.float().reshape(*side.shape[:2], -1) for side in (one, two)]
            unit = [functional.normalize(side, dim=1) for side in sides]
            total = total + self.weight * (unit[0] - unit[1]).square().sum(1).mean(1)
        return total


class ModelFeatures:
    """The features of the encoder stages of the model's own U-Net, at little noise.

    Features without another network and without data.

    Arguments:
        denoiser: The model.
        rho: The ratio of noise to data at the conditioning timestep.

    Raises:
        ValueError: If the model's network has no encoder (``encode``).
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
        _, _, features = self.network.encode(x, torch.full((len(x),), self.time, device=x.device))
        return features


LOSSES: Registry[type[Loss]] = Registry(
    "loss", {"l1": L1, "l2": L2, "huber": Huber, "features": FeatureLoss}
)
"""The distillation losses by name. A new one is a subclass of :class:`Loss` and a line here."""
WEIGHTS = ("snr", "uniform")


def loss_of(
    name: str, distance: Distance | None, denoiser: Denoiser, features: str | None = None
) -> Distance:
    """Returns the loss of a name, or the user's callable, whose name is ``"custom"``.

    Arguments:
        name: A name in :data:`LOSSES`.
        distance: The user's callable.
        denoiser: The teacher.
        features: The feature extractor, as of :meth:`Features.load`; left out, the loss's own.

    Raises:
        TypeError: If ``distance`` is not callable.
        ValueError: If the name is unknown, is ``"custom"`` and none is given, or the extractor
            is unknown or accepts images of another shape than the model's.
    """
    if distance is not None:
        if not callable(distance):
            raise TypeError(f"distance must be callable, got {type(distance).__name__}")
        return distance
    if name == CUSTOM:
        raise ValueError("the loss 'custom' needs distance=, a callable of two batches of states")
    return LOSSES[name].build(denoiser, features)


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

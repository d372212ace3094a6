r"""Correctors: training signals for the samples of a student that need no recorded target."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.base.registry import Registry
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Guided
from fewstep.operators.flow_map import FlowMap
from fewstep.training.checkpoints import generator

GRAIN = (3.3, 4.3)
r"""The least and the most :math:`\log(\alpha / \sigma)` at which grain is removed: noise of 0.037 to 0.014."""

LEVELS = (-4.5, 4.5)
r"""The least and the most :math:`\log(\alpha / \sigma)` at which scores are compared.

Published are 98 % to 2 % of the times, -4.5 to 2.5; students differ from their teachers by grain too, which is
below the noise there."""


class Corrector(ABC):
    r"""A training signal for samples :math:`x` (B, \*) of a flow map, beside the loss on recorded trajectories.

    A regression on recorded pairs averages where neighbouring noises lead to different samples; a corrector compares
    distributions instead. A subclass writes :meth:`build` and :meth:`losses`; a line in :data:`CORRECTORS` then
    registers it for ``distill``, recipes and the command line. What it trains besides the student is in the
    checkpoints and not in the finished student.

    Attributes:
        about: A sentence about it.
        columns: The numbers that it adds to a row of the log.
    """

    about: ClassVar[str]
    columns: ClassVar[int] = 0

    @property
    def network(self) -> nn.Module | None:
        """Its own network, which an optimizer of its own trains, or ``None``."""
        return None

    @classmethod
    @abstractmethod
    def build(cls, teacher: Denoiser, student: FlowMap, example: Mapping[str, Any]) -> Corrector:
        """Returns the corrector of a student, on the student's device.

        Arguments:
            teacher: The model that the trajectories are of, with their guidance.
            student: The student.
            example: Conditions of one sample.
        """

    @abstractmethod
    def losses(
        self, x: Tensor, first: Tensor, cond: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns the loss of each sample (B), that of its own network (B), and numbers for the log, (B, columns).

        The gradient of the first goes to the student, through x; that of the second must not. Of both losses only the
        gradients matter.

        Arguments:
            x: Samples of the student, with shape (B, \*).
            first: The numbers of the knots from which they were made, in one step, (B).
            cond: Their conditions.
            draws: Their random numbers.
        """


class Draws:
    """Random numbers for some rows of a step: each row's depend on its place in the whole batch of all processes.

    Arguments:
        seed: The seed of the run.
        part: The number of the forward pass.
        total: The rows of the whole batch.
        places: The places of these rows in it.
        device: The device of the result.
    """

    def __init__(
        self, seed: int, part: int, total: int, places: Sequence[int], device: torch.device
    ) -> None:
        self.address, self.total, self.device = (seed, "draws", part), total, device
        self.places = torch.as_tensor(list(places), dtype=torch.int64)

    def of(self, rows: Tensor) -> Draws:
        """Returns those of some of these rows."""
        some = copy.copy(self)
        some.places = self.places[rows.cpu()]
        return some

    def uniform(self, name: str) -> Tensor:
        """Returns uniform numbers, (B), float64."""
        draw = generator(*self.address, name)
        drawn = torch.rand(self.total, generator=draw, dtype=torch.float64)
        return drawn[self.places].to(self.device)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        r"""Returns normal numbers, (B, \*)."""
        draw = generator(*self.address, name)
        return torch.randn((self.total, *shape), generator=draw)[self.places].to(self.device)


class Denoised(Corrector):
    r"""Moves samples towards what the teacher makes of them when it takes their grain for noise.

    .. math:: \nabla_\theta = \left( \frac{\partial x}{\partial \theta} \right)^{\!\top}
        \frac{x - D_{teacher}(\alpha_t x, t)}{\overline{| x - D_{teacher}(\alpha_t x, t) |}}

    at low noise levels t (:data:`GRAIN`), and no noise is added. A student in one step leaves grain of the size of
    these levels, which a loss on recorded pairs hardly sees beside the difference of the images. At these levels the
    teacher's data are unique but for that grain, so modes are not let go, as with the same gradient at high noise.

    Cost: one evaluation of the teacher for each sample.

    Arguments:
        teacher: The teacher.
    """

    about = "the teacher's prediction at little noise: removes grain"
    columns = 1

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher

    @classmethod
    def build(cls, teacher: Denoiser, student: FlowMap, example: Mapping[str, Any]) -> Denoised:
        del example
        return cls(copy.deepcopy(teacher).to(next(student.parameters()).device))

    def losses(
        self, x: Tensor, first: Tensor, cond: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        del first
        sample = x.detach().float()
        t, alpha, _ = _times(self.teacher, draws.uniform("grain"), GRAIN)
        with torch.no_grad():
            clean = self.teacher(_column(alpha, sample) * sample, t, prediction="x0", **cond)
            difference = sample - clean.float()
        size = difference.abs().flatten(1).mean(1)
        loss = (difference / _column(size.clamp_min(1e-6), x) * x.float()).flatten(1).mean(1)
        return loss, torch.zeros_like(loss), size[:, None]


class ScoreDifference(Corrector):
    r"""The difference of two scores at the student's samples with noise: distribution matching distillation.

    .. math:: \nabla_\theta = \left( \frac{\partial x}{\partial \theta} \right)^{\!\top}
        \frac{D_{fake}(z, t) - D_{teacher}(z, t)}{\overline{| x - D_{teacher}(z, t) |}}, \qquad
        z = \alpha_t x + \sigma_t \varepsilon

    with the data D that teacher and a second network predict. That is the gradient of the Kullback-Leibler divergence
    of the noised samples from the teacher's distribution, up to the weight of each noise level. The second network
    starts as the teacher and is trained to denoise the student's samples,

    .. math:: \overline{(1 + \alpha_t^2 / \sigma_t^2) | D_{fake}(z, t) - x |^2}

    It has the second time of a flow map, which tells it the knot that a sample was made from, so that each kind of
    step is matched by itself. Alone the divergence lets modes go; the recorded pairs, which are trained
    beside it, hold them.

    Cost: for each sample one evaluation of the teacher, and a forward and a backward pass of the second network with one
    evaluation more: five evaluations, where the student's own pass is three.

    References:
        | One-step Diffusion with Distribution Matching Distillation (Yin et al., 2023)
        | https://arxiv.org/abs/2311.18828

    Arguments:
        teacher: The teacher.
        fake: The second network, as a flow map of the student's layout.
    """

    about = "the teacher's score minus that of a second network, trained on the student's samples"
    columns = 2

    def __init__(self, teacher: Denoiser, fake: FlowMap) -> None:
        self.teacher, self.fake = teacher, fake

    @classmethod
    def build(
        cls, teacher: Denoiser, student: FlowMap, example: Mapping[str, Any]
    ) -> ScoreDifference:
        inner = teacher.inner if isinstance(teacher, Guided) else teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fake = FlowMap(inner, student.layout, example=dict(example))
        device = next(student.parameters()).device
        fake.requires_grad_(False)
        fake.network.requires_grad_(True)
        return cls(copy.deepcopy(teacher).to(device), fake.to(device))

    @property
    def network(self) -> nn.Module:
        return self.fake.network

    def losses(
        self, x: Tensor, first: Tensor, cond: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        sample = x.detach().float()
        z, t, _ = self._noised(sample, draws, "score")
        with torch.no_grad():
            teacher = self.teacher(z, t, prediction="x0", **cond).float()
            fake = self.fake.predicted_data(z, t, first, **cond).float()
            distance = (sample - teacher).abs().flatten(1).mean(1)
            gradient = (fake - teacher) / _column(distance.clamp_min(1e-6), sample)
        # Of this product the gradient with respect to x is the one above, over the number of values.
        loss = (gradient * x.float()).flatten(1).mean(1)
        z, t, weight = self._noised(sample, draws, "denoising")
        predicted = self.fake.predicted_data(z, t, first, **cond).float()
        own = weight * (predicted - sample).square().flatten(1).mean(1)
        size = gradient.square().flatten(1).mean(1).sqrt()
        return loss, own, torch.stack([size, own.detach()], 1)

    def _noised(self, x: Tensor, draws: Draws, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Returns samples with noise, the times, and the weights of the denoising loss."""
        t, alpha, sigma = _times(self.teacher, draws.uniform(f"{name} times"), LEVELS)
        noise = draws.normal(f"{name} noise", x.shape[1:]).to(x)
        z = _column(alpha, x) * x + _column(sigma, x) * noise
        return z, t, (1 + (alpha / sigma).square()).to(x)


def _times(
    model: Denoiser, share: Tensor, levels: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the times of uniform numbers (B) between two levels of noise, and their scales; on the CPU, float64."""
    schedule, (low, high) = model.schedule, levels
    t = schedule.time(low + (high - low) * share.cpu()).clamp(schedule.t_min, schedule.t_max)
    alpha, sigma = schedule.scales(t)
    return t, alpha, sigma


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


CORRECTORS: Registry[type[Corrector]] = Registry(
    "corrector", {"denoised": Denoised, "score-difference": ScoreDifference}
)
"""The correctors by name. A new one is a subclass of :class:`Corrector` and a line here."""

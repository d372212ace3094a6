r"""Batches of a training run: states, conditioning timesteps, targets and weights of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, mixture
from fewstep.models.preconditioning import Preconditioned
from fewstep.training.checkpoints import generator
from fewstep.training.data import ImageData
from fewstep.training.recipe import TrainRecipe

LOG_MEAN, LOG_STD = -1.2, 1.2
"""Mean and deviation of the logarithm of the noise level in EDM's training (table 1)."""

CHUNK = 4096
"""The images in a batch when the statistics of the data are computed."""


@dataclass(frozen=True)
class Batch:
    r"""The tensors of one training step.

    Attributes:
        x: The network's input, (B, C, H, W): the state, in EDM's preconditioning timesteps
            :math:`c_\text{in}`.
        t: The conditioning timesteps, (B).
        target: The target of the network's output, (B, C, H, W).
        labels: The classes, (B), or ``None``.
        weight: The weights of the squared errors, (B, 1, 1, 1), or ``None`` for 1.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    labels: Tensor | None = None
    weight: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the network."""
        return (self.x, self.t) if self.labels is None else (self.x, self.t, self.labels)

    def loss(self, predicted: Tensor) -> Tensor:
        """Returns the weighted mean square of the error, a scalar."""
        error = (predicted.float() - self.target).square()
        return (error if self.weight is None else self.weight * error).mean()

    def part(self, rows: slice) -> Batch:
        """Returns some rows of the batch."""
        return Batch(*(None if v is None else v[rows] for v in self._tensors()))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.x)

    def pinned(self) -> Batch:
        """Returns the batch in pinned memory, from which copies to a GPU are asynchronous."""
        return Batch(*(None if v is None else v.pin_memory() for v in self._tensors()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        if device.type == "cpu":
            return self
        moved = (None if v is None else v.to(device, non_blocking=True) for v in self._tensors())
        return Batch(*moved)  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.t, self.target, self.labels, self.weight


class Batches:
    """The batches of a recipe on images: the batch of step i depends on (seed, i) alone.

    It is thread-safe.

    Attributes:
        data: The images.
        recipe: The recipe.
        schedule: Its noise schedule.
        preconditioning: EDM's coefficients, or ``None``.
        null_label: The label that stands for no class; ``None`` for a network without classes.
    """

    def __init__(
        self, data: ImageData, recipe: TrainRecipe, *, null_label: int | None = None
    ) -> None:
        self.data, self.recipe, self.null_label = data, recipe, null_label
        self.schedule = recipe.noise_schedule()
        self._prediction = Prediction.of(recipe.prediction)
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self._statistics: tuple[Tensor, Tensor] | None = None
        self.preconditioning: Preconditioned | None = None
        if recipe.preconditioning == "edm":
            s = self._spread() if recipe.sigma_data is None else recipe.sigma_data
            self.preconditioning = Preconditioned(torch.nn.Identity(), sigma_data=s)

    def __call__(self, step: int) -> Batch:
        """Returns the batch of a step."""
        recipe, schedule = self.recipe, self.schedule
        index = self._index(step)
        n = len(index)
        draws = generator(recipe.seed, "step", step)
        x0 = self._images(index, step)
        t = self._times(n, draws)
        alpha, sigma = (_spread_out(f(t)) for f in (schedule.alpha, schedule.sigma))
        eps = torch.randn(x0.shape, generator=draws)
        labels = None
        if self.data.labels is not None and self.null_label is not None:
            drop = torch.rand(n, generator=draws) < recipe.label_dropout
            labels = torch.where(drop, self.null_label, self.data.labels[index])
        x = alpha * x0 + sigma * eps
        if self.preconditioning is not None:
            c_skip, c_out, c_in, c_noise = self.preconditioning.coefficients(schedule.sigma(t))
            c_skip, c_out, c_in = (_spread_out(c) for c in (c_skip, c_out, c_in))
            return Batch(c_in * x, c_noise.float(), (x0 - c_skip * x) / c_out, labels)
        if self._prediction is Prediction.X0:
            weight = (alpha / sigma).square().clamp(min=1)
            return Batch(x, t.float(), x0, labels, weight)
        p, q = mixture(self._prediction, alpha, sigma)
        return Batch(x, t.float(), q * eps + p * x0, labels)

    @property
    def conditioning_range(self) -> float:
        """The length of the interval of the network's conditioning timesteps."""
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        if self.preconditioning is not None:
            ends = self.preconditioning.coefficients(self.schedule.sigma(ends))[3]
        return float(ends[1] - ends[0])

    def preconditioning_record(self) -> dict[str, Any] | None:
        """Returns the preconditioning as stored in a model folder, or ``None``."""
        preconditioning = self.preconditioning
        return (
            None
            if preconditioning is None
            else {"kind": "edm", "sigma_data": preconditioning.sigma_data}
        )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation of each coordinate, (C, H, W), float64, for head starts."""
        if self._statistics is None:
            data = self.data
            total = torch.zeros(data.event_shape, dtype=torch.float64)
            squares = torch.zeros_like(total)
            for start in range(0, len(data), CHUNK):
                part = data.floats(slice(start, start + CHUNK), self.recipe.range).double()
                total += part.sum(0)
                squares += part.square().sum(0)
            mean, square = total / len(data), squares / len(data)
            if self.recipe.flip:  # each image counts twice, once mirrored
                mean, square = ((m + m.flip(-1)) / 2 for m in (mean, square))
            self._statistics = mean, (square - mean.square()).clamp(min=0).sqrt()
        return self._statistics

    def _spread(self) -> float:
        """Returns the deviation of all values of the data, about their common mean."""
        mean, std = self.statistics()
        value = float((std.square() + (mean - mean.mean()).square()).mean().sqrt())
        if not value > 0:
            raise ValueError(
                "all images are the same, so sigma_data cannot be measured; give sigma_data"
            )
        return value

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.randperm(
            len(self.data), generator=generator(self.recipe.seed, "epoch", epoch)
        )

    def _index(self, step: int) -> Tensor:
        n = self.recipe.batch_size
        epoch, place = divmod(step, max(1, len(self.data) // n))
        return self._order(epoch)[place * n : (place + 1) * n]

    def _images(self, index: Tensor, step: int) -> Tensor:
        x0 = self.data.floats(index, self.recipe.range)
        if self.recipe.flip:
            # An address of its own: times and noise are the same with and without.
            coins = torch.rand(len(index), generator=generator(self.recipe.seed, "flip", step))
            x0 = torch.where(_spread_out(coins) < 0.5, x0.flip(-1), x0)
        return x0

    def _times(self, n: int, draws: torch.Generator) -> Tensor:
        """Returns n times, float64; stratified, so that a batch covers the whole range."""
        schedule, recipe = self.schedule, self.recipe
        u = (torch.rand(n, generator=draws, dtype=torch.float64) + torch.arange(n)) / n
        uniform = schedule.t_min + u * (schedule.t_max - schedule.t_min)
        inner = u.clamp(1e-4, 1 - 1e-4)
        if recipe.density == "log-normal":
            lam = -(LOG_MEAN + LOG_STD * torch.special.ndtri(inner))
        else:
            # A cosine schedule has lambda = log cot(pi u / 2); the same u through our schedule.
            lam = -torch.log(torch.tan(inner * (math.pi / 2)))
        dense = schedule.time(lam).clamp(schedule.t_min, schedule.t_max)
        pick = torch.rand(n, generator=draws) < recipe.uniform_times
        return torch.where(pick, uniform, dense)


def _spread_out(values: Tensor) -> Tensor:
    """Returns values (B) as float32 (B, 1, 1, 1)."""
    return values.float().reshape(-1, 1, 1, 1)

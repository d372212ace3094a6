r"""Adversarial objectives: a small relativistic discriminator, trained beside the sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise import generator_at
from fewstep.learned.judges import IMAGE
from fewstep.learned.objective import Batch, Given, Objective, Outcome
from fewstep.metrics.features import extractor

WIDTH = 32
RATE = 1e-3
"""The learning rate of the discriminator."""


def discriminator(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    r"""Returns a network from samples of a shape to a number each: (B, \*) to (B, 1).

    Three convolutions of stride 2 and the mean over what is left, or two hidden layers for
    vectors; some 60 thousand parameters. No normalisation, which gradient penalties do not go
    with.

    Arguments:
        shape: The shape of a sample.
        generator: The source of the initial weights.
    """
    layers: list[nn.Module] = []
    if len(shape) == IMAGE:
        channels = shape[0]
        for width in (WIDTH, 2 * WIDTH, 2 * WIDTH):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=2), nn.LeakyReLU(0.2)]
            channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        channels = int(torch.Size(shape).numel())
        layers.append(nn.Flatten())
        for _ in range(2):
            layers += [nn.Linear(channels, 2 * WIDTH), nn.LeakyReLU(0.2)]
            channels = 2 * WIDTH
    network = nn.Sequential(*layers, nn.Linear(channels, 1))
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                draw = torch.randn(p.shape, generator=generator)
                p.copy_(draw * (1.5 / p[0].numel()) ** 0.5)
            else:
                p.zero_()
    return network


class Adversarial(Objective):
    r"""A relativistic adversarial loss against the teacher's samples from the same noise.

    .. math:: L = \frac1B \sum_b f\big(D(\hat x^b) - D(x^b)\big), \qquad f(u) = \log(1 + e^u)

    with samples x and the teacher's :math:`\hat x`. Before each step of the sampler the discriminator does
    one step of Adam on

    .. math:: \frac1B \sum_b f\big(D(x^b) - D(\hat x^b)\big)
        + \frac{\gamma}{2} \frac1B \sum_b \left( \|\nabla D(x^b)\|^2 + \|\nabla D(\hat x^b)\|^2 \right)

    The sampler has some tens of parameters and cannot fool it by much, so that one small network
    and few steps are enough; the penalty (``penalty``) keeps it smooth.

    References:
        | GAS: Improving Discretization of Diffusion ODEs via Generalized Adversarial Solver (Oganov et al., 2025)
        | https://arxiv.org/abs/2510.17699
        | The GAN is dead; long live the GAN! A Modern GAN Baseline (Huang et al., 2024)
        | https://arxiv.org/abs/2501.05441

    Arguments:
        penalty: The weight :math:`\gamma` of the gradient penalties.
        seed: The seed of the initial weights.
    """

    wants_pairs: ClassVar[bool] = True

    def __init__(self, *, penalty: float = 1.0, seed: int = 0) -> None:
        self.penalty, self.seed = penalty, seed
        self.network: nn.Sequential | None = None
        self.optimizer: torch.optim.Adam | None = None
        self._stored: Mapping[str, Tensor] = {}

    @classmethod
    def build(cls, given: Given) -> Adversarial:
        return cls(penalty=given.settings.penalty, seed=given.seed)

    def compared(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns what the discriminator sees of the samples, and its counterparts."""
        assert batch.target is not None
        return x[: batch.pairs], batch.target

    def learn(self, outcome: Outcome, batch: Batch) -> None:
        with torch.no_grad():
            fake, real = self.compared(outcome.x, batch)
        network = self._network(fake)
        assert self.optimizer is not None
        for p in network.parameters():
            p.requires_grad_(True)
        with torch.enable_grad():
            fake, real = (side.detach().to(fake).requires_grad_() for side in (fake, real))
            on_fake, on_real = network(fake), network(real)
            loss = nn.functional.softplus(on_fake - on_real).mean()
            for value, side in ((on_fake, fake), (on_real, real)):
                (slope,) = torch.autograd.grad(value.sum(), side, create_graph=True)
                loss = loss + self.penalty / 2 * slope.flatten(1).square().sum(1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if bool(loss.detach().isfinite()):
            self.optimizer.step()

    def loss(self, outcome: Outcome, batch: Batch) -> Tensor:
        fake, real = self.compared(outcome.x, batch)
        network = self._network(fake)
        for p in network.parameters():
            p.requires_grad_(False)
        return nn.functional.softplus(network(real.to(fake)) - network(fake)).mean()

    def _network(self, like: Tensor) -> nn.Sequential:
        """Returns the discriminator, created (or restored) for the first samples that it sees."""
        if self.network is None:
            generator = generator_at("search", "discriminator", self.seed)
            network = discriminator(tuple(like.shape[1:]), generator)
            self.network = network.to(device=like.device, dtype=like.dtype)
            self.optimizer = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.0, 0.99))
            self._load()
        return self.network

    def state(self) -> dict[str, Tensor]:
        if self.network is None or self.optimizer is None:
            return dict(self._stored)
        tensors = {f"network.{k}": v.detach().cpu() for k, v in self.network.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v.detach().cpu() for k, v in moments.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._stored = dict(tensors)
        self.network = None

    def _load(self) -> None:
        if not self._stored:
            return
        assert self.network is not None
        assert self.optimizer is not None
        own = {k: v for k, v in self._stored.items() if k.startswith("network.")}
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in own.items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in self._stored.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        if moments:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


class AdversarialData(Adversarial):
    r"""The same against real data, in the features of the loss.

    .. math:: L = \frac1B \sum_b f\big(D(r^b) - D(\phi(x^b))\big)

    with features :math:`\phi` of the samples and those r of as many real ones, drawn anew in each step; both
    are scaled to a root mean square of 1.

    Arguments:
        real: Features of real samples, with shape (M, D).
        extract: The feature extractor.
        penalty: The weight of the gradient penalties.
        seed: The seed of the initial weights and of the choice of real samples.
    """

    wants_pairs = False
    needs_data = True
    features = True
    anchor = (("endpoint", 1.0),)

    def __init__(
        self,
        real: Tensor,
        extract: Callable[[Tensor], Tensor],
        *,
        penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(penalty=penalty, seed=seed)
        self.extract = extract
        self.scale = float(1 / real.square().mean().sqrt())
        self.real = real * self.scale

    @classmethod
    def build(cls, given: Given) -> AdversarialData:
        assert given.reference is not None
        return cls(
            given.reference.features.to(given.dtype),
            extractor(given.reference.extractor),
            penalty=given.settings.penalty,
            seed=given.seed,
        )

    def compared(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        fake = self.extract(x).flatten(1) * self.scale
        return fake, batch.drawn(self.real, len(x), self.seed).to(fake)

r"""A sampler as a torch module: noise in, samples out, for export and compilation as one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.plans.execute import functional
from fewstep.sampling.plan_sampler import PlanSampler


class SamplerModule(nn.Module):
    r"""The network and all steps of a deterministic sampler as one module.

    .. code-block:: python

        sampler = fewstep.sampling.sample.sampler(model, solver="unipc3", nfe=8)
        graph = torch.export.export(SamplerModule(sampler), (noise,))

    Without checks of the samples, and with the number of steps unrolled: what is exported needs torch only.

    Arguments:
        sampler: A sampler with a plan that draws no noise after the initial draw.

    Raises:
        TypeError: If it has no plan.
        ValueError: If it draws noise.
    """

    values: Tensor
    times: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, sampler: PlanSampler) -> None:
        super().__init__()
        if not isinstance(sampler, PlanSampler):
            raise TypeError(f"a sampler with a plan is needed, got {type(sampler).__name__}")
        if sampler.residual is not None:
            raise ValueError(
                "a sampler with a spatial residual cannot be exported; take its plan alone"
            )
        if sampler.plan.n_noise:
            raise ValueError(
                f"{sampler.plan.name} draws noise, which a graph does not; take a deterministic solver"
            )
        plan = sampler.native
        self.structure, self.denoiser = plan.structure, sampler.denoiser
        self.register_buffer("values", plan.values.detach())
        self.register_buffer("times", plan.times.detach())
        # The start is linear in the noise; its numbers are read here, as a graph reads none.
        shape = () if sampler.denoiser.event_shape is None else sampler.denoiser.event_shape
        offset = sampler.start(torch.zeros(1, *shape, dtype=torch.float64))
        scale = sampler.start(torch.ones(1, *shape, dtype=torch.float64)) - offset
        self.register_buffer("offset", offset)
        self.register_buffer("scale", scale)

    def forward(self, noise: Tensor, **cond: Any) -> Tensor:
        r"""Returns the samples, (B, \*), of standard normal noise (B, \*) and conditions, one for each sample."""
        if not torch.compiler.is_compiling():
            self.denoiser.accepts.check_names(list(cond))

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser.raw(x, t.expand(x.shape[0]), **cond)

        x = self.offset.to(noise) + self.scale.to(noise) * noise
        return functional(self.structure, self.values, self.times, network, x)


def exported(sampler: PlanSampler, noise: Tensor, **cond: Any) -> Any:
    """Returns the graph of a sampler, as :func:`torch.export.export` does, for a batch of this shape.

    Arguments:
        sampler: A sampler with a plan that draws no noise.
        noise: Noise of the shape of a batch.
        cond: Conditions, as those of :func:`fewstep.sample`.

    Raises:
        ValueError, TypeError: If the shape of the noise or a condition does not fit.
    """
    shape = sampler.denoiser.event_shape
    if shape is not None and tuple(noise.shape[1:]) != tuple(shape):
        raise ValueError(
            f"noise must have shape (n, {', '.join(map(str, shape))}), got {tuple(noise.shape)}"
        )
    cond = sampler.denoiser.prepare(len(noise), cond)
    module = SamplerModule(sampler).eval()
    with torch.no_grad():
        return torch.export.export(module, (noise,), cond)

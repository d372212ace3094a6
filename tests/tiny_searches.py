"""What the tests of learned samplers share: a model, a base, a run."""

from __future__ import annotations

import math

import torch

import fewstep
from fewstep.learned import Base
from fewstep.models import exact
from fewstep.plans.execute import execute
from fewstep.sampling.request import SamplerRequest

VP = fewstep.schedule("vp-linear")
MODEL = exact.sharp(VP, std=0.05)


def onto_zero(steps: int, kind: str, schedule=VP) -> list[float]:
    """K evaluations, the last step onto the data: linear, quadratic or even in the log-SNR."""
    if kind == "logsnr":
        times = fewstep.grid("log-rho", schedule, steps).times.tolist()[:-1]
    else:
        power = {"linear": 1, "quadratic": 2}[kind]
        times = [schedule.t_max * (1 - i / steps) ** power for i in range(steps)]
    return [*times, schedule.t_zero]


def base_of(solver: str, steps: int, kind: str = "quadratic", **options) -> Base:
    return Base.of(
        VP,
        SamplerRequest(solver, nfe=steps, options={"times": onto_zero(steps, kind), **options}),
    )


def run(plan, *, model=MODEL, dtype=torch.float64, n: int = 20):
    x = torch.randn((n, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = [
        torch.randn((n, 2), generator=torch.Generator().manual_seed(9 + i), dtype=torch.float64)
        for i in range(plan.n_noise)
    ]

    def network(y, t):
        return model(y, t, prediction=plan.prediction)

    return execute(plan, network, x.to(dtype), draw=lambda i: z[i].to(dtype))


# The mixture of the reference experiments: eight modes on a ring, uneven, off the centre.
ANGLES = [2 * math.pi * k / 8 for k in range(8)]
RING = exact.GaussianMixture(
    [(math.cos(a) + 0.3, math.sin(a) - 0.2) for a in ANGLES],
    [0.08] * 8,
    [1 + 2 * k / 7 for k in range(8)],
    VP,
)

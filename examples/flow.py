"""A rectified flow with time 0 at noise and 1 at data, as many papers and repositories write it."""

import torch
from torch import Tensor

import fewstep

schedule = fewstep.schedule("flow")  # x = (1 - t) x0 + t z: here time 1 is noise
exact = fewstep.exact.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2], [0.5, 0.5], schedule)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """A model of the other convention: dx/dt = x0 - z, time 0 is noise."""
    return -exact(x, float(1 - t[0]), prediction="flow")


denoiser = fewstep.Denoiser.wrap(
    velocity, schedule=schedule, prediction="flow", event_shape=(2,), time_reversed=True
)
noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
fine = fewstep.sample(denoiser, noise=noise, solver="tab3", nfe=200)
for solver, nfe in (("euler", 10), ("heun", 11), ("unipc2", 10), ("auto", 10)):
    x = fewstep.sample(denoiser, noise=noise, solver=solver, nfe=nfe)
    far = float((x - fine).square().mean().sqrt())
    print(f"{solver:8} {nfe} evaluations: {far:.4f} from the fine solution")

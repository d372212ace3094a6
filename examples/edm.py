"""An EDM network: sigma is its time, its preconditioning is its own; steps one by one."""

import torch
from torch import Tensor

import fewstep

schedule = fewstep.schedule("edm")  # sigma from 0.002 to 80
exact = fewstep.exact.GaussianMixture([[-0.5, 0.0], [0.5, 0.2]], [0.1, 0.1], [0.4, 0.6], schedule)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma), as published networks return it after their preconditioning."""
    return exact(x, float(sigma[0]), prediction="x0")


denoiser = fewstep.Denoiser.wrap(denoise, schedule=schedule, prediction="x0", event_shape=(2,))
plan = fewstep.plan("heun", schedule, steps=6)
print(plan)
for step in fewstep.steps(denoiser, 4, plan=plan, seed=1):
    print(f"step {step.index}: sigma {float(step.t):8.3f}, first sample {step.x[0].tolist()}")

stochastic = fewstep.sample(denoiser, 500, solver="edm-stochastic", nfe=35)
deterministic = fewstep.sample(denoiser, 500, solver="auto", nfe=8)
for name, x in (("edm-stochastic, 35", stochastic), ("auto, 8", deterministic)):
    print(f"{name}: right mode {float((x[:, 0] > 0).double().mean()):.2f} (its weight: 0.6)")
assert torch.isfinite(deterministic).all()

"""A model measured once, without data and without training; then sampled with its profile."""

import tempfile
from pathlib import Path

import torch

import fewstep

denoiser = fewstep.load("mixture-sharp")
profile = fewstep.fit(denoiser, nfe=(5, 10))
for row in profile.table():
    print(row)

noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
fine = fewstep.sample(denoiser, noise=noise, solver="tab3", nfe=300)
for nfe in (5, 10):
    default = fewstep.sample(denoiser, noise=noise, nfe=nfe)
    fitted = fewstep.sample(denoiser, noise=noise, nfe=nfe, profile=profile)
    errors = [float((x - fine).square().mean().sqrt()) for x in (default, fitted)]
    print(f"{nfe} evaluations: default {errors[0]:.4f}, measured {errors[1]:.4f}")

with tempfile.TemporaryDirectory() as folder:
    path = profile.save(Path(folder) / "profile.json")
    again = fewstep.sample(denoiser, noise=noise, nfe=5, profile=path)
    print(
        "the same from the file:",
        torch.equal(again, fewstep.sample(denoiser, noise=noise, nfe=5, profile=profile)),
    )

"""A sampler of four evaluations, searched for one model by gradients through its samples."""

import tempfile
from pathlib import Path

import torch

import fewstep

denoiser = fewstep.load("mixture-smooth")
tuned = fewstep.tune(
    denoiser,
    nfe=4,
    family="gs",
    objective="endpoint",
    search={"steps": 40, "pairs": 256, "heldout": 128, "test": 256, "batch_size": 64},
)
print(f"on noise that the search has not seen: {tuned.verdict.state}")
print("\n".join(tuned.verdict.reasons))

noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
fine = fewstep.sample(denoiser, noise=noise, solver="tab3", nfe=300)
samples = {
    "default": fewstep.sample(denoiser, noise=noise, nfe=4),
    "tuned": fewstep.sample(denoiser, noise=noise, recipe=tuned.recipe),
}
for name, x in samples.items():
    print(f"{name}: {float((x - fine).square().mean().sqrt()):.4f} from the fine solution")

with tempfile.TemporaryDirectory() as folder:
    path = tuned.recipe.save(Path(folder) / "four.json")
    again = fewstep.sample(denoiser, noise=noise, recipe=path)
    print("the same from the file:", torch.equal(again, samples["tuned"]))

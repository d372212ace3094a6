"""Starting from an image (strength), and keeping a part of it (mask), with the embedded model."""

import torch

import fewstep

denoiser = fewstep.load("fashion")
shirt = fewstep.sample(denoiser, 1, nfe=10, seed=3, class_labels=6)
images = shirt.expand(4, -1, -1, -1)

variants = fewstep.sample(denoiser, image=images, strength=0.5, nfe=6, seed=0, class_labels=6)
print(f"strength 0.5: {float((variants - images).square().mean().sqrt()):.3f} from the image")

keep = torch.zeros(1, 28, 28)
keep[:, :14] = 1  # the upper half stays
edited = fewstep.sample(
    denoiser, image=images, mask=1 - keep, strength=1.0, nfe=10, seed=0, class_labels=6
)
kept = float(((edited - images) * keep).square().mean().sqrt())
print(f"the half that stays: {kept:.3f} from the image; the other is new")

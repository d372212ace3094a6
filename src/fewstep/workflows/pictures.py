"""Pictures of samples for the folders of trained models."""

from __future__ import annotations

import io

from fewstep.diffusion.noise import NoiseSource
from fewstep.sampling.batches import run_batch
from fewstep.sampling.protocol import Sampler

PICTURE = "samples.png"
SHOWN = 40
"""The number of samples in a picture."""


def picture_of(sampler: Sampler, *, classes: int | None, seed: int, title: str) -> bytes:
    """Returns a PNG of samples, with the classes in turn.

    Cost: the sampler's evaluations for 40 samples.
    """
    from fewstep.reporting.plots import picture

    model = sampler.denoiser
    cond = {"class_labels": [i % classes for i in range(SHOWN)]} if classes else {}
    source = NoiseSource(seed, range(SHOWN))
    samples = run_batch(sampler, source, model.prepare(SHOWN, cond)).x.float().cpu()
    decode = getattr(model, "decode", None)
    buffer = io.BytesIO()
    picture(samples if decode is None else decode(samples), title=title).save(buffer, "PNG")
    return buffer.getvalue()

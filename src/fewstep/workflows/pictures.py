"""Pictures of samples for the folders of trained models."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from fewstep.diffusion.noise import NoiseSource
from fewstep.sampling.batches import run_batch
from fewstep.sampling.protocol import Sampler

PICTURE = "samples.png"
SHOWN = 40
"""The number of samples in a picture."""


def picture_of(
    sampler: Sampler, *, conditions: Mapping[str, Any] | None = None, seed: int, title: str
) -> bytes:
    """Returns a PNG of 40 samples.

    Arguments:
        sampler: The sampler.
        conditions: The conditions of the 40 samples.
        seed: The seed of their noise.
        title: The title.

    Cost: the sampler's evaluations for 40 samples.
    """
    from fewstep.reporting.plots import picture

    model = sampler.denoiser
    source = NoiseSource(seed, range(SHOWN))
    samples = (
        run_batch(sampler, source, model.prepare(SHOWN, dict(conditions or {}))).x.float().cpu()
    )
    decode = getattr(model, "decode", None)
    buffer = io.BytesIO()
    picture(samples if decode is None else decode(samples), title=title).save(buffer, "PNG")
    return buffer.getvalue()

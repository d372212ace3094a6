"""Noising from the schedule, for training scripts, img2img and inpainting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.schedules import Flow, NoiseSchedule


class Noising:
    """Noising at any timesteps, whatever the grid is."""

    schedule: NoiseSchedule
    alphas_cumprod: Tensor

    def _scales(self, like: Tensor, timesteps: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(timesteps).to(like.device)
        if isinstance(self.schedule, Flow):
            count = self.config["num_train_timesteps"]  # type: ignore[attr-defined]
            sigma = t.to(torch.float32) / count
            alpha = 1 - sigma
        elif t.is_floating_point():
            times = t.to(torch.float64 if like.device.type != "mps" else torch.float32)
            alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        else:
            products = self.alphas_cumprod.to(like.device)[t]
            alpha, sigma = products.sqrt(), (1 - products).sqrt()
        shape = (-1, *[1] * (like.ndim - 1)) if t.ndim else ()
        return alpha.to(like.dtype).reshape(shape), sigma.to(like.dtype).reshape(shape)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Returns :math:`\alpha x_0 + \sigma \varepsilon` at any timesteps, on the grid or off it, shape (B) or (1)."""
        alpha, sigma = self._scales(original_samples, timesteps)
        return alpha * original_samples + sigma * noise.to(original_samples.device)

    def scale_noise(
        self, sample: Tensor, timestep: Tensor | float, noise: Tensor | None = None
    ) -> Tensor:
        """The same in the words of flow pipelines; ``noise`` is needed."""
        if noise is None:
            raise ValueError("scale_noise needs the noise")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Returns the target of v-prediction, :math:`\alpha \varepsilon - \sigma x_0`."""
        alpha, sigma = self._scales(sample, timesteps)
        return alpha * noise - sigma * sample

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Any:
        """Returns the sample: the state is what the network sees."""
        del timestep
        return sample

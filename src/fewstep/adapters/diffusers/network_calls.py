"""Adapters of the networks of diffusers: from states, times and named conditions to their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers.folder_conditions import check_shape
from fewstep.adapters.diffusers.text_encoders import TextEncoders
from fewstep.models.calling import NetworkCall, computing_dtype

AESTHETIC_SCORES = (6.0, 2.5)
"""The aesthetic scores in the pipeline of SDXL's refiner, with a prompt and without."""


class DiffusersCall(NetworkCall):
    """A network of diffusers as ``call(x, t, **conditions)``, computing in the network's own type.

    Arguments:
        network: The network.
        channels: The channels of the state.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def _ready(self, value: Tensor, x: Tensor) -> Tensor:
        """Returns a condition on the device of the state, in the network's type."""
        kind = computing_dtype(self.network) if value.is_floating_point() else None
        return value.to(device=x.device, dtype=kind)

    def _state(self, x: Tensor, extra_channels: Any = None) -> Tensor:
        """Returns the network's input: the state, with further channels if the network has them."""
        more = int(self.network.config.in_channels) - self.channels
        if more and x.ndim == 4:
            shape = (more, *x.shape[2:])
            x = torch.cat(
                [x, check_shape("extra_channels", extra_channels, shape, len(x)).to(x)], 1
            )
        return self._ready(x, x)

    def _states(self, value: Any, x: Tensor, width: int | None) -> Tensor:
        return self._ready(check_shape("encoder_hidden_states", value, (None, width), len(x)), x)

    @staticmethod
    def _like(value: Tensor, x: Tensor) -> Tensor:
        # The second half of twice the channels is a learned variance.
        return value[:, : x.shape[1]].to(x.dtype)


class ImageCall(DiffusersCall):
    """``UNet2DModel``."""

    def forward(
        self, x: Tensor, t: Tensor, *, class_labels: Any = None, extra_channels: Any = None
    ) -> Tensor:
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=x.device)
        state = self._state(x, extra_channels)
        return self._like(self.network(state, t, class_labels=labels, return_dict=False)[0], x)


class ClassesCall(DiffusersCall):
    """``DiTTransformer2DModel``."""

    def forward(self, x: Tensor, t: Tensor, *, class_labels: Any = None) -> Tensor:
        null = int(self.network.config.num_embeds_ada_norm)
        labels = (
            torch.full((len(x),), null, device=x.device) if class_labels is None else class_labels
        )
        labels = torch.as_tensor(labels, device=x.device).expand(len(x))
        value = self.network(self._state(x), timestep=t, class_labels=labels, return_dict=False)[0]
        return self._like(value, x)


class TextCall(DiffusersCall):
    """``UNet2DConditionModel`` with its text encoders, guidance embedding and ControlNet.

    Arguments:
        network: The network.
        channels: The channels of the state.
        encoders: The text encoders, or ``None``.
        controlnet: A ``ControlNetModel``, or ``None``.
        pixels: The pixels of a picture for each position of the state, along a side.
        aesthetic: Whether an aesthetic score is among the sizes, as in SDXL's refiner.
    """

    def __init__(
        self,
        network: Any,
        channels: int,
        *,
        encoders: TextEncoders | None = None,
        controlnet: Any = None,
        pixels: int = 8,
        aesthetic: bool = False,
    ) -> None:
        super().__init__(network, channels)
        self.encoders, self.controlnet = encoders, controlnet
        self.pixels, self.aesthetic = pixels, aesthetic

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        prompt: Any = None,
        encoder_hidden_states: Any = None,
        text_embeds: Any = None,
        time_ids: Any = None,
        image_embeds: Any = None,
        hint: Any = None,
        class_labels: Any = None,
        guidance_scale: Any = None,
        extra_channels: Any = None,
        controlnet_cond: Any = None,
        conditioning_scale: float = 1.0,
    ) -> Tensor:
        config, n = self.network.config, len(x)
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt] * n
        from_image = config.encoder_hid_dim_type == "image_proj"
        if encoder_hidden_states is None and self.encoders is not None and not from_image:
            encoder_hidden_states, text_embeds = self.encoders(prompts, x.device)
        if not from_image:
            width = config.encoder_hid_dim or config.cross_attention_dim
            width = width if isinstance(width, int) else None
            encoder_hidden_states = self._states(encoder_hidden_states, x, width)
        added: dict[str, Tensor] = {}
        if config.addition_embed_type == "text_time":
            if time_ids is None:
                time_ids = self._sizes(x, prompts)
            added = self._added_sizes(x, text_embeds, time_ids)
        elif config.addition_embed_type == "text_image" and text_embeds is not None:
            added["text_embeds"] = self._ready(
                check_shape("text_embeds", text_embeds, (None,), n), x
            )
        if image_embeds is not None:
            width = None if not from_image else config.encoder_hid_dim
            embeds = check_shape("image_embeds", image_embeds, (width,), n)
            added["image_embeds"] = self._ready(embeds, x)
        if hint is not None:
            added["hint"] = self._ready(check_shape("hint", hint, (None, None, None), n), x)
        options: dict[str, Any] = {"encoder_hidden_states": encoder_hidden_states}
        if added:
            options["added_cond_kwargs"] = added
        if config.time_cond_proj_dim is not None:
            scale = _each("guidance_scale", guidance_scale, x) - 1
            options["timestep_cond"] = self._ready(
                guidance_embedding(scale, int(config.time_cond_proj_dim)), x
            )
        if class_labels is not None:
            labels = torch.as_tensor(class_labels, device=x.device)
            options["class_labels"] = self._ready(labels.expand(n, *labels.shape[1:]), x)
        state = self._state(x, extra_channels)
        if self.controlnet is not None:
            options |= self._control(x, t, options, controlnet_cond, conditioning_scale)
        return self._like(self.network(state, t, return_dict=False, **options)[0], x)

    def _sizes(self, x: Tensor, prompts: list[Any]) -> Tensor:
        """Returns SDXL's sizes for uncropped pictures of the state's size, (B, 6) or (B, 5)."""
        height, width = (int(side) * self.pixels for side in x.shape[-2:])
        if not self.aesthetic:
            return torch.tensor([[height, width, 0, 0, height, width]]).expand(len(x), 6)
        with_prompt, without = AESTHETIC_SCORES
        scores = [without if prompt is None else with_prompt for prompt in prompts]
        return torch.tensor([[height, width, 0, 0, score] for score in scores])

    def _added_sizes(self, x: Tensor, text_embeds: Any, time_ids: Any) -> dict[str, Tensor]:
        config, n = self.network.config, len(x)
        pooled = check_shape("text_embeds", text_embeds, (None,), n)
        ids = check_shape("time_ids", time_ids, (None,), n)
        numbers = pooled.shape[1] + int(config.addition_time_embed_dim) * ids.shape[1]
        wanted = int(config.projection_class_embeddings_input_dim)
        if numbers != wanted:
            raise ValueError(
                f"text_embeds (n, {pooled.shape[1]}) and time_ids (n, {ids.shape[1]}) become {numbers} numbers, "
                f"but the network takes {wanted}: time_ids are 6 numbers (5 with an aesthetic score) "
                f"and each becomes {int(config.addition_time_embed_dim)}"
            )
        return {"text_embeds": self._ready(pooled, x), "time_ids": self._ready(ids, x)}

    def _control(
        self, x: Tensor, t: Tensor, options: dict[str, Any], picture: Any, scale: Any
    ) -> dict[str, Any]:
        """Returns what the ControlNet adds to the blocks of the network."""
        channels = int(self.controlnet.config.conditioning_channels)
        sides = (int(side) * self.pixels for side in x.shape[-2:])
        picture = check_shape("controlnet_cond", picture, (channels, *sides), len(x))
        if isinstance(scale, Tensor):
            raise ValueError("conditioning_scale is one number for all samples")
        down, mid = self.controlnet(
            self._ready(x, x),
            t,
            controlnet_cond=self._ready(picture, x),
            conditioning_scale=float(scale),
            return_dict=False,
            **{
                k: v
                for k, v in options.items()
                if k in ("encoder_hidden_states", "added_cond_kwargs")
            },
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class FlowTextCall(DiffusersCall):
    """``SD3Transformer2DModel``, given embeddings of the text."""

    def forward(
        self, x: Tensor, t: Tensor, *, encoder_hidden_states: Any, pooled_projections: Any
    ) -> Tensor:
        config = self.network.config
        pooled = check_shape(
            "pooled_projections", pooled_projections, (int(config.pooled_projection_dim),), len(x)
        )
        value = self.network(
            hidden_states=self._state(x),
            timestep=t,
            encoder_hidden_states=self._states(
                encoder_hidden_states, x, int(config.joint_attention_dim)
            ),
            pooled_projections=self._ready(pooled, x),
            return_dict=False,
        )[0]
        return self._like(value, x)


class FluxCall(DiffusersCall):
    """``FluxTransformer2DModel``: latents (B, C, H, W) are packed in patches of 2 x 2, as its pipeline does."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        guidance_scale: Any = None,
    ) -> Tensor:
        config, n = self.network.config, len(x)
        states = self._states(encoder_hidden_states, x, int(config.joint_attention_dim))
        pooled = check_shape(
            "pooled_projections", pooled_projections, (int(config.pooled_projection_dim),), n
        )
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"the latents must have shape (n, {self.channels}, H, W) with even sides, "
                f"got {tuple(x.shape)}"
            )
        height, width = x.shape[2] // 2, x.shape[3] // 2
        packed = x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(height, width, 3, device=x.device)
        places[..., 1] += torch.arange(height, device=x.device)[:, None]
        places[..., 2] += torch.arange(width, device=x.device)[None]
        scale = None
        if config.guidance_embeds:
            scale = _each("guidance_scale", guidance_scale, x)
        value = self.network(
            hidden_states=self._ready(packed.reshape(n, height * width, -1), x),
            timestep=t / 1000,  # the network multiplies by 1000 again
            guidance=scale,
            encoder_hidden_states=states,
            pooled_projections=self._ready(pooled, x),
            txt_ids=torch.zeros(states.shape[1], 3, device=x.device),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        patches = value.reshape(n, height, width, self.channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape).to(x.dtype)


class PixArtCall(DiffusersCall):
    """``PixArtTransformer2DModel``, given embeddings of the text and their mask.

    Arguments:
        network: The network.
        channels: The channels of the state.
        pixels: The pixels of a picture for each position of the state, along a side.
    """

    def __init__(self, network: Any, channels: int, *, pixels: int = 8) -> None:
        super().__init__(network, channels)
        self.pixels = pixels

    def forward(
        self, x: Tensor, t: Tensor, *, encoder_hidden_states: Any, encoder_attention_mask: Any
    ) -> Tensor:
        config, n = self.network.config, len(x)
        states = self._states(encoder_hidden_states, x, config.caption_channels)
        mask = check_shape("encoder_attention_mask", encoder_attention_mask, (states.shape[1],), n)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            height, width = (float(self.pixels * side) for side in x.shape[-2:])
            added["resolution"] = self._ready(torch.tensor([[height, width]]).repeat(n, 1), x)
            added["aspect_ratio"] = self._ready(torch.tensor([[height / width]]).repeat(n, 1), x)
        value = self.network(
            self._state(x),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.to(x.device),
            timestep=t,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return self._like(value, x)


def guidance_embedding(scale: Tensor, size: int) -> Tensor:
    r"""Returns the embedding of a guidance scale w, (B) to (B, size): sines and cosines of :math:`1000 w f_i`.

    The frequencies are :math:`f_i = 10000^{-i / (h - 1)}`, i < h = size / 2 rounded down; an odd size is
    filled up with a zero. This is what a consistency model of latents is conditioned on, with
    w = ``guidance_scale`` - 1.

    References:
        | Latent Consistency Models (Luo et al., 2023)
        | https://arxiv.org/abs/2310.04378
    """
    half = size // 2
    places = torch.arange(half, dtype=torch.float32, device=scale.device)
    frequencies = torch.exp(places * -torch.log(torch.tensor(10000.0)) / max(half - 1, 1))
    angles = 1000 * scale.float()[:, None] * frequencies
    features = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(features, (0, size % 2))


def _each(name: str, value: Any, x: Tensor) -> Tensor:
    """Returns a number, or one for each sample, as a tensor (B)."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(x)):
        raise ValueError(f"{name} must be one number or {len(x)}, got {tuple(numbers.shape)}")
    return numbers.expand(len(x))

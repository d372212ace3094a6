"""Tiny pipelines of diffusers with random weights, and what the tests over them share."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

MARKS = [
    pytest.mark.peer,
    pytest.mark.usefixtures("quiet_diffusers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
"""Of the test files over diffusers, which warns about itself."""

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The noise levels of latent diffusion."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int = 0, **kind: Any) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), **kind)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _seeded(build: Any) -> Any:
    """Caches a pipeline's parts, made with fixed random weights."""

    @functools.cache
    @functools.wraps(build)
    def made(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **options)

    return made


TEXT_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
"""What the networks over latents with a text condition have in common."""


@_seeded
def unet2d(classes: int | None = None) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).eval()


@_seeded
def vae(channels: int = 4, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **(
            {}
            if shift is None
            else {"shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False}
        ),
    ).eval()


@_seeded
def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()


@_seeded
def unet_text(xl: bool = False, sizes: int = 6, **options: Any) -> Any:
    """A network with a text condition; ``sizes``: how many sizes one of SDXL takes."""
    from diffusers import UNet2DConditionModel

    extra: dict[str, Any] = {}
    if xl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": sizes * 4 + 16,
        }
    parts = {
        **TEXT_UNET,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        **extra,
        **options,
    }
    return UNet2DConditionModel(**parts).eval()


@_seeded
def controlnet(**options: Any) -> Any:
    """A ControlNet whose last layers, which start at zero, have weights."""
    from diffusers import ControlNetModel

    net = ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        # Tiny pipelines shrink pictures by two.
        conditioning_embedding_out_channels=(4, 8),
        **options,
    ).eval()
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_()
        net.controlnet_cond_embedding.conv_out.weight.normal_()
    return net


@_seeded
def unet3d() -> Any:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        **TEXT_UNET,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ).eval()


@_seeded
def clip_text(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        projection_dim=16,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tokenizer(folder: Path) -> Any:
    """A tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


@_seeded
def flux_transformer(guidance: bool = True) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    ).eval()


@_seeded
def pixart_transformer() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    ).eval()


@_seeded
def sd3_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    ).eval()


@_seeded
def unet1d() -> Any:
    from diffusers import UNet1DModel

    return UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        sample_size=64,
        sample_rate=64,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ).eval()


def stable_diffusion(scheduler: Any, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """A pipeline of Stable Diffusion's family; ``parts`` are added, or replace the usual ones."""
    import diffusers

    usual = {
        "vae": vae(),
        "text_encoder": clip_text(),
        "tokenizer": None,
        "unet": unet_text(),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return getattr(diffusers, kind)(**{**usual, **parts})


def sdxl(scheduler: Any, kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    """A pipeline of SDXL's family; without text encoders, if none are given."""
    import diffusers

    usual = {
        "vae": vae(),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": unet_text(True),
        "scheduler": scheduler,
        "add_watermarker": False,
    }
    return getattr(diffusers, kind)(**{**usual, **parts})


def sd3(scheduler: Any) -> Any:
    import diffusers

    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=scheduler,
        vae=vae(4, 0.1),
        **dict.fromkeys(names),
    )


def flux(scheduler: Any, guidance: bool = True) -> Any:
    import diffusers

    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2")]
    return diffusers.FluxPipeline(
        transformer=flux_transformer(guidance),
        scheduler=scheduler,
        vae=vae(4, 0.1),
        **dict.fromkeys(names),
    )


def pixart(scheduler: Any) -> Any:
    import diffusers

    return diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=pixart_transformer(),
        scheduler=scheduler,
    )

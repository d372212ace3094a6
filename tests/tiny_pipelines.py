"""Tiny pipelines of diffusers with random weights, and what the tests over them share."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class NetworkCall:
    """One call of a pipeline's network: its first argument, its timestep, the other arguments, its output."""

    x: torch.Tensor
    t: float
    given: dict[str, Any]
    output: torch.Tensor


def first_call(pipe: Any, **arguments: Any) -> NetworkCall:
    """Runs two steps of a pipeline; returns the first call of its network."""
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    calls: list[NetworkCall] = []

    def keep(_: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "sample")
        x = next((named[name] for name in names if name in named), args[0] if args else None)
        t = torch.as_tensor(named["timestep"] if "timestep" in named else args[1])
        value = output[0] if isinstance(output, tuple) else output.sample
        calls.append(NetworkCall(x.detach(), float(t.flatten()[0]), named, value.detach()))

    hook = network.register_forward_hook(keep, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(num_inference_steps=2, generator=seeded(), **arguments)
    finally:
        hook.remove()
    return calls[0]


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


def piece_tokenizer() -> Any:
    """A tokenizer of T5's kind that knows single letters."""
    from transformers import T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0)


def byte_tokenizer() -> Any:
    """A tokenizer of Qwen2's kind that knows single letters."""
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    return Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


@_seeded
def t5_encoder(multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    if multilingual:
        return UMT5EncoderModel(UMT5Config(num_heads=2, **sizes)).eval()
    return T5EncoderModel(T5Config(num_heads=2, **sizes)).eval()


@_seeded
def vision_language() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_parameters": {
            "mrope_section": [1, 1, 2],
            "rope_type": "default",
            "rope_theta": 1e4,
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def with_text_parts(pipe: Any, folder: Path) -> Any:
    """Gives a pipeline the tokenizers and text encoders that it was made without, so that it can be saved and loaded."""
    optional = set(type(pipe)._optional_components)
    for name, parameter in inspect.signature(type(pipe).__init__).parameters.items():
        kind = str(parameter.annotation)
        if name in optional or getattr(pipe, name, 0) is not None:
            continue
        parts = {
            "CLIPTokenizer": lambda: tokenizer(folder),
            "T5Tokenizer": piece_tokenizer,
            "AutoTokenizer": piece_tokenizer,
            "Qwen2Tokenizer": byte_tokenizer,
            "CLIPTextModelWithProjection": lambda: clip_text(True),
            "CLIPTextModel": clip_text,
            "UMT5EncoderModel": lambda: t5_encoder(True),
            "T5EncoderModel": t5_encoder,
            "Qwen2_5_VL": vision_language,
        }
        build = next((make for part, make in parts.items() if part in kind), None)
        if build is not None:
            pipe.register_modules(**{name: build()})
    return pipe


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


def cogvideo(scheduler: Any) -> Any:
    import diffusers

    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_cogvideo_parts()[0],
        transformer=_cogvideo_parts()[1],
        scheduler=scheduler,
    )


@_seeded
def _cogvideo_parts() -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    return autoencoder.eval(), transformer.eval()


def ltx(scheduler: Any) -> Any:
    import diffusers

    autoencoder, transformer = _ltx_parts()
    return diffusers.LTXPipeline(
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


@_seeded
def _ltx_parts() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    return autoencoder.eval(), transformer.eval()


def wan(scheduler: Any) -> Any:
    import diffusers

    autoencoder, transformer = _wan_parts()
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        scheduler=scheduler,
        transformer=transformer,
    )


@_seeded
def _wan_parts() -> Any:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    autoencoder = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return autoencoder.eval(), transformer.eval()


def qwen(scheduler: Any) -> Any:
    import diffusers

    autoencoder, transformer = _qwen_parts()
    return diffusers.QwenImagePipeline(
        scheduler=scheduler,
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


@_seeded
def _qwen_parts() -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return autoencoder.eval(), transformer.eval()


def kandinsky(scheduler: Any) -> Any:
    import diffusers

    network, movq = _kandinsky_parts()
    return diffusers.KandinskyV22Pipeline(unet=network, scheduler=scheduler, movq=movq)


@_seeded
def _kandinsky_parts() -> Any:
    from diffusers import UNet2DConditionModel, VQModel

    network = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return network.eval(), movq.eval()


def stable_video(scheduler: Any) -> Any:
    import diffusers

    network, autoencoder, encoder, processor = _stable_video_parts()
    return diffusers.StableVideoDiffusionPipeline(
        vae=autoencoder,
        image_encoder=encoder,
        unet=network,
        scheduler=scheduler,
        feature_extractor=processor,
    )


@_seeded
def _stable_video_parts() -> Any:
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    network = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    autoencoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        latent_channels=4,
    )
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            intermediate_size=16,
            patch_size=4,
        )
    )
    processor = CLIPImageProcessor(crop_size=16, size=16)
    return network.eval(), autoencoder.eval(), encoder.eval(), processor


def text_to_video(scheduler: Any) -> Any:
    import diffusers

    return diffusers.TextToVideoSDPipeline(
        vae=vae(), text_encoder=clip_text(), tokenizer=None, unet=unet3d(), scheduler=scheduler
    )

"""fewstep.load on pipelines of many kinds: the prediction is that of the pipeline's own network evaluation, or the error names what is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import fewstep
import tiny_pipelines as tiny

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = tiny.MARKS
LATENT = tiny.LATENT
noise = tiny.normal

SIZE = {"height": 16, "width": 16}
PICTURE = torch.rand(1, 3, 16, 16, generator=tiny.seeded(3))
MASK = (torch.rand(1, 1, 16, 16, generator=tiny.seeded(4)) > 0.5).float()
STATES = noise((1, 16, 16), 1)
POOLED = noise((1, 16), 2)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("words"))


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **LATENT, **options)


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def first_call(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Runs a pipeline; returns the input, the timestep and the output of its first network evaluation."""
    call = tiny.first_call(pipe, output_type="latent", **arguments)
    return call.x, call.t, call.output


def saved(pipe: Any, folder: Any, **options: Any) -> Any:
    pipe.save_pretrained(folder, **options)
    return fewstep.load(folder, device="cpu")


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return tiny.relative(got, want) < 1e-4


def test_sdxl_with_its_two_encoders_and_guidance(tmp_path, words):
    pipe = tiny.sdxl(
        ddim(),
        text_encoder=tiny.clip_text(),
        text_encoder_2=tiny.clip_text(True),
        tokenizer=words,
        tokenizer_2=words,
        unet=tiny.unet_text(True, cross_attention_dim=32),
    )
    x, t, want = first_call(pipe, prompt="a b", guidance_scale=4.0, **SIZE)
    model = saved(pipe, tmp_path)
    assert model.event_shape == (4, 8, 8)
    assert close(model(x[1:], t, prompt="a b"), want[1:])
    # No prompt is an embedding of zero, the empty prompt is not.
    assert close(model(x[:1], t), want[:1])
    assert not close(model(x[:1], t, prompt=""), want[:1])
    from fewstep.models.wrappers import Guided

    both = torch.lerp(want[:1], want[1:], 4.0)
    assert close(Guided(model, 4.0)(x[1:], t, prompt=["a b"]), both)
    assert fewstep.sample(model, 2, nfe=2, prompt=["a", "b"], guidance=2.0).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="say the same thing"):
        fewstep.sample(model, 1, nfe=2, prompt="a", text_embeds=POOLED)
    with pytest.raises(ValueError, match=r"give encoder_hidden_states= \(the embeddings"):
        fewstep.sample(model, 1, nfe=2, text_embeds=POOLED)


def test_sdxl_without_encoders_takes_embeddings(tmp_path):
    pipe = tiny.sdxl(ddim())
    text = {"prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
    x, t, want = first_call(pipe, guidance_scale=1.0, **text, **SIZE)
    model = saved(pipe, tmp_path)
    given = {"encoder_hidden_states": STATES, "text_embeds": POOLED}
    assert close(model(x, t, **given), want)
    ids = torch.tensor([[16, 16, 0, 0, 16, 16]])
    assert close(model(x, t, time_ids=ids, **given), want)
    assert not close(model(x, t, time_ids=2 * ids, **given), want)
    with pytest.raises(ValueError, match=r"without a text encoder; give encoder_hidden_states="):
        fewstep.sample(model, 1, nfe=2, prompt="a")
    with pytest.raises(ValueError, match=r"needs more: give encoder_hidden_states=.*text_embeds="):
        fewstep.sample(model, 1, nfe=2)
    with pytest.raises(ValueError, match="time_ids are 6 numbers"):
        model(x, t, time_ids=ids[:, :5], **given)
    with pytest.raises(ValueError, match=r"shape \(1, any, 16\), got \(1, 16, 8\)"):
        model(x, t, encoder_hidden_states=STATES[..., :8], text_embeds=POOLED)
    with pytest.raises(ValueError, match=r"model\.null_condition = \{'encoder_hidden_states'"):
        fewstep.sample(model, 1, nfe=2, guidance=2.0, **given)
    model.null_condition = {name: value[0] * 0 for name, value in given.items()}
    guided = fewstep.sample(model, 1, nfe=2, guidance=2.0, **given)
    assert not close(guided, fewstep.sample(model, 1, nfe=2, **given))


def test_a_refiner_takes_the_aesthetic_score(tmp_path, words):
    pipe = tiny.sdxl(
        ddim(),
        "StableDiffusionXLImg2ImgPipeline",
        text_encoder_2=tiny.clip_text(True),
        tokenizer_2=words,
        unet=tiny.unet_text(True, 5),
        requires_aesthetics_score=True,
    )
    x, t, want = first_call(pipe, prompt="a b", image=PICTURE, strength=0.9, guidance_scale=3.0)
    model = saved(pipe, tmp_path)
    assert close(model(x[1:], t, prompt="a b"), want[1:])
    assert close(model(x[:1], t), want[:1])
    with pytest.raises(ValueError, match=r"time_ids= \(the sizes"):
        fewstep.sample(model, 1, nfe=2, encoder_hidden_states=STATES, text_embeds=POOLED)


EXTRA = {
    "inpainting": (
        "StableDiffusionInpaintPipeline",
        9,
        {"image": PICTURE, "mask_image": MASK, **SIZE},
        "the mask",
    ),
    "editing": (
        "StableDiffusionInstructPix2PixPipeline",
        8,
        {"image": PICTURE, "image_guidance_scale": 1.0},
        "the image to edit",
    ),
}


@pytest.mark.parametrize("name", list(EXTRA))
def test_networks_with_further_channels(tmp_path, words, name):
    kind, channels, arguments, what = EXTRA[name]
    unet = tiny.unet_text(in_channels=channels)
    pipe = tiny.stable_diffusion(ddim(), kind, tokenizer=words, unet=unet)
    x, t, want = first_call(pipe, prompt="a b", guidance_scale=1.0, **arguments)
    model = saved(pipe, tmp_path)
    assert model.event_shape == (4, 8, 8)
    assert close(model(x[:, :4], t, prompt="a b", extra_channels=x[:, 4:]), want)
    with pytest.raises(ValueError, match=f"needs more: give extra_channels= .*{what}"):
        fewstep.sample(model, 1, nfe=2, prompt="a b")
    shape = rf"extra_channels must be a tensor with shape \(1, {channels - 4}, 8, 8\)"
    with pytest.raises(ValueError, match=shape):
        fewstep.sample(model, 1, nfe=2, prompt="a b", extra_channels=x[:, 4:6])
    more = {"extra_channels": x[:, 4:], "prompt": "a b"}
    guided = fewstep.sample(model, 3, nfe=2, batch_size=2, guidance=2.0, **more)
    assert guided.shape == (3, 4, 8, 8)


def test_further_channels_of_an_unknown_pipeline_are_refused(tmp_path, words):
    pipe = tiny.stable_diffusion(ddim(), tokenizer=words, unet=tiny.unet_text(in_channels=9))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 5 channels besides those of the state"):
        fewstep.load(tmp_path)


def test_enlarging_takes_a_level_of_noise(tmp_path, words):
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=tiny.vae(),
        text_encoder=tiny.clip_text(),
        tokenizer=words,
        unet=tiny.unet_text(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim(),
    )
    picture = PICTURE[..., :8, :8]
    x, t, want = first_call(pipe, prompt="a b", image=picture, guidance_scale=1.0, noise_level=20)
    model = saved(pipe, tmp_path)
    got = model(x[:, :4], t, prompt="a b", extra_channels=x[:, 4:], class_labels=20)
    assert close(got, want)
    with pytest.raises(ValueError, match=r"give class_labels= .*, and extra_channels= "):
        fewstep.sample(model, 1, nfe=2, prompt="a b")
    with pytest.raises(ValueError, match="from 0 to 999"):
        model(x[:, :4], t, prompt="a", extra_channels=x[:, 4:], class_labels=1000)


@pytest.mark.parametrize("large", [False, True], ids=["sd", "sdxl"])
def test_a_controlnet_is_not_ignored(tmp_path, words, large):
    if large:
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        control = tiny.controlnet(**extra, projection_class_embeddings_input_dim=40)
        pipe = tiny.sdxl(ddim(), "StableDiffusionXLControlNetPipeline", controlnet=control)
        text = {"prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
        given = {"encoder_hidden_states": STATES, "text_embeds": POOLED}
    else:
        control = tiny.controlnet()
        pipe = tiny.stable_diffusion(
            ddim(), "StableDiffusionControlNetPipeline", tokenizer=words, controlnet=control
        )
        text, given = {"prompt": "a b"}, {"prompt": "a b"}
    arguments = {**text, "image": PICTURE, "controlnet_conditioning_scale": 0.7}
    x, t, want = first_call(pipe, guidance_scale=1.0, **arguments)
    model = saved(pipe, tmp_path)
    controlled = {**given, "controlnet_cond": PICTURE}
    assert close(model(x, t, conditioning_scale=0.7, **controlled), want)
    assert not close(model(x, t, conditioning_scale=0.2, **controlled), want)
    with pytest.raises(ValueError, match=r"controlnet_cond= \(the picture .* 2 x the latents"):
        fewstep.sample(model, 1, nfe=2, **given)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 16, 16\)"):
        fewstep.sample(model, 1, nfe=2, **given, controlnet_cond=PICTURE[..., :8])
    if not large:
        assert fewstep.sample(model, 2, nfe=2, guidance=2.0, **controlled).shape == (2, 4, 8, 8)


def test_several_controlnets_are_refused(tmp_path, words):
    pipe = tiny.stable_diffusion(
        ddim(),
        "StableDiffusionControlNetPipeline",
        tokenizer=words,
        controlnet=[tiny.controlnet(), tiny.controlnet()],
    )
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"MultiControlNetModel, which is not supported"):
        fewstep.load(tmp_path)


def test_a_distilled_network_takes_its_guidance_as_an_input(tmp_path, words):
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=tiny.vae(),
        text_encoder=tiny.clip_text(),
        tokenizer=words,
        unet=tiny.unet_text(time_cond_proj_dim=9),
        scheduler=diffusers.LCMScheduler(**LATENT),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    x, t, want = first_call(pipe, prompt="a b", guidance_scale=7.5, **SIZE)
    model = saved(pipe, tmp_path)
    assert close(model(x, t, prompt="a b", guidance_scale=7.5), want)
    assert close(model(x, t, prompt="a b", guidance_scale=torch.tensor([7.5])), want)
    assert not close(model(x, t, prompt="a b", guidance_scale=2), want)
    with pytest.raises(ValueError, match=r"guidance_scale= .*guidance_scale=8\.5\)"):
        fewstep.sample(model, 1, nfe=2, prompt="a b")
    with pytest.raises(ValueError, match="scale of guidance as an input: give guidance_scale="):
        fewstep.sample(model, 1, nfe=2, prompt="a b", guidance=7.5)


def test_a_network_without_a_size_takes_noise(tmp_path, words):
    pipe = tiny.stable_diffusion(ddim(), tokenizer=words, unet=tiny.unet_text(sample_size=None))
    model = saved(pipe, tmp_path)
    assert model.event_shape is None
    with pytest.raises(ValueError, match="shape of a sample is not known; give noise="):
        fewstep.sample(model, 1, nfe=2, prompt="a")
    assert fewstep.sample(model, noise=noise((1, 4, 6, 8)), nfe=2).shape == (1, 4, 6, 8)


def test_weights_of_a_variant(tmp_path, words):
    pipe = tiny.stable_diffusion(ddim(), tokenizer=words)
    model = saved(pipe, tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    x = noise((1, 4, 8, 8))
    want = tiny.unet_text()(x, 500, encoder_hidden_states=STATES).sample
    assert close(model(x, 500.0, encoder_hidden_states=STATES), want)
    assert fewstep.sample(model, 1, nfe=2, prompt="a b").dtype == torch.float32
    file = tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "unet" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="several variants and no plain ones: bf16, fp16"):
        fewstep.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
    ],
)
def test_names_of_variants(tmp_path, name, variant):
    from fewstep.adapters.diffusers.weights import variant_of

    (tmp_path / name).touch()
    assert variant_of(tmp_path) == variant


def test_sd3_without_embeddings_says_what_is_missing(tmp_path):
    pipe = tiny.sd3(euler())
    text = {"prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
    x, t, want = first_call(pipe, guidance_scale=1.0, **text, **SIZE)
    model = saved(pipe, tmp_path)
    given = {"encoder_hidden_states": STATES, "pooled_projections": POOLED}
    assert close(model(x, t / 1000, prediction="flow", **given), want)
    with pytest.raises(ValueError, match=r"needs more: give encoder_hidden_states= .*pooled_pro"):
        fewstep.sample(model, 1, nfe=2)
    with pytest.raises(ValueError, match=r"not run here; give encoder_hidden_states="):
        fewstep.sample(model, 1, nfe=2, prompt="a b")
    with pytest.raises(ValueError, match=r"pooled_projections must be .*\(1, 16\), got \(1, 8\)"):
        fewstep.sample(model, 1, nfe=2, **{**given, "pooled_projections": POOLED[:, :8]})


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_packs_its_latents(tmp_path, guidance):
    pipe = tiny.flux(euler(), guidance)
    text = {"prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}
    x, t, want = first_call(pipe, guidance_scale=3.5, height=16, width=24, **text)
    model = saved(pipe, tmp_path)

    def unpacked(value: torch.Tensor) -> torch.Tensor:
        return pipe._unpack_latents(value, 16, 24, pipe.vae_scale_factor)

    given = {"encoder_hidden_states": STATES, "pooled_projections": POOLED}
    scale = {"guidance_scale": 3.5} if guidance else {}
    got = model(unpacked(x), t, prediction="flow", **given, **scale)
    assert close(got, unpacked(want))
    z = noise((2, 4, 8, 12))
    assert fewstep.sample(model, noise=z, nfe=2, **given, **scale).shape == z.shape
    with pytest.raises(ValueError, match="even sides"):
        fewstep.sample(model, noise=z[..., 1:], nfe=2, **given, **scale)
    wrong = {} if guidance else {"guidance_scale": 3.5}
    with pytest.raises(ValueError, match="guidance_scale"):
        fewstep.sample(model, noise=z, nfe=2, **given, **wrong)


def test_pixart_takes_the_mask_of_its_tokens(tmp_path):
    pipe = tiny.pixart(ddim())
    mask = torch.tensor([[1] * 9 + [0] * 7])
    text = {"prompt_embeds": STATES, "prompt_attention_mask": mask, "negative_prompt": None}
    sizes = {**SIZE, "use_resolution_binning": False}
    x, t, want = first_call(pipe, guidance_scale=1.0, **text, **sizes)
    model = saved(pipe, tmp_path)
    given = {"encoder_hidden_states": STATES, "encoder_attention_mask": mask}
    assert model.event_shape == (4, 8, 8)
    assert close(model(x, t, **given), want[:, :4])
    with pytest.raises(ValueError, match="give encoder_attention_mask= "):
        fewstep.sample(model, 1, nfe=2, encoder_hidden_states=STATES)


def test_classes_of_a_pixel_network(tmp_path):
    pipe = diffusers.DDPMPipeline(tiny.unet2d(5), diffusers.DDPMScheduler(clip_sample=False))
    model = saved(pipe, tmp_path)
    x = noise((2, 3, 8, 8))
    want = tiny.unet2d(5)(x, 300, class_labels=torch.tensor([3, 4])).sample
    assert close(model(x, 300.0, class_labels=[3, 4]), want)
    with pytest.raises(ValueError, match="needs more: give class_labels="):
        fewstep.sample(model, 1, nfe=2)
    with pytest.raises(ValueError, match="from 0 to 4"):
        fewstep.sample(model, 1, nfe=2, class_labels=5)


def index(folder: Any, title: str, network: str, kind: str, scheduler: Any, **parts: Any) -> None:
    """Writes the configurations of a pipeline, without weights."""
    entries = {network: ["diffusers", kind], "scheduler": ["diffusers", type(scheduler).__name__]}
    text = json.dumps({"_class_name": title, **entries, **parts})
    (folder / "model_index.json").write_text(text)
    (folder / network).mkdir()
    (folder / network / "config.json").write_text(json.dumps({"_class_name": kind}))
    scheduler.save_pretrained(folder / "scheduler")


@pytest.mark.parametrize(
    ("title", "network", "kind", "parts", "message"),
    [
        ("QwenImagePipeline", "transformer", "QwenImageTransformer2DModel", {}, r"t: 1000 \* t\)"),
        ("LTXPipeline", "transformer", "LTXVideoTransformer3DModel", {}, r"schedule\('flow'\)"),
        (
            "StableDiffusionAdapterPipeline",
            "unet",
            "UNet2DConditionModel",
            {"adapter": ["diffusers", "T2IAdapter"]},
            r"component 'adapter' \(T2IAdapter\)",
        ),
        (
            "FluxControlNetPipeline",
            "transformer",
            "FluxTransformer2DModel",
            {"controlnet": ["diffusers", "FluxControlNetModel"]},
            "FluxControlNetModel, which is not supported",
        ),
        (
            "StableDiffusionLatentUpscalePipeline",
            "unet",
            "UNet2DConditionModel",
            {},
            "scales the input and the output",
        ),
    ],
)
def test_what_is_not_known_is_refused_with_a_way_out(
    tmp_path, title, network, kind, parts, message
):
    index(tmp_path, title, network, kind, euler(), **parts)
    with pytest.raises(ValueError, match=message) as caught:
        fewstep.load(tmp_path)
    assert "Denoiser.wrap" in str(caught.value)


def test_a_text_network_alone_has_no_noise_levels(tmp_path, words):
    tiny.stable_diffusion(ddim(), tokenizer=words).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give the folder of its pipeline: ") as caught:
        fewstep.load(tmp_path / "unet")
    assert str(tmp_path) in str(caught.value)


def test_the_statistics_of_latents_are_used(tmp_path, words):
    """As SDXL's pipeline decodes: latents * std / scaling_factor + mean."""
    pipe = tiny.stable_diffusion(ddim(), tokenizer=words)
    model = saved(pipe, tmp_path)
    model.vae.register_to_config(
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]
    )
    z = noise((1, 4, 8, 8))
    row = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    want = tiny.vae().decode(z * row / tiny.vae().config.scaling_factor + row / 10).sample
    assert close(model.decode(z), want)


def test_an_autoencoder_that_is_not_run_is_said_when_decoding(tmp_path, words):
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    model = saved(tiny.stable_diffusion(ddim(), tokenizer=words, vae=small), tmp_path)
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        model.decode(fewstep.sample(model, 1, nfe=2))

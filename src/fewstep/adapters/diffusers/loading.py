"""Denoisers from folders that diffusers saved: schedule, prediction and times are read from its configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapters.diffusers.configurations import conventions_of, family_of
from fewstep.adapters.diffusers.folder_conditions import FolderConditions
from fewstep.adapters.diffusers.network_calls import (
    ClassesCall,
    DiffusersCall,
    FlowTextCall,
    FluxCall,
    ImageCall,
    PixArtCall,
    TextCall,
)
from fewstep.adapters.diffusers.text_encoders import TextEncoders, read_text_encoders
from fewstep.adapters.diffusers.weights import variant_of
from fewstep.base.files import read_json
from fewstep.base.memory import Halving, in_parts
from fewstep.base.paths import check_path
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Flow, NoiseSchedule, VPSigma
from fewstep.models.conditions import AcceptedConditions
from fewstep.models.denoiser import WrappedNetwork
from fewstep.models.preconditioning import Preconditioned

NETWORKS = {
    "UNet2DModel": "image",
    "DiTTransformer2DModel": "classes",
    "UNet2DConditionModel": "text",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "flow",
    "FluxTransformer2DModel": "flux",
}
"""The known networks, with the kind of their arguments."""

LEVELS_OF_ITS_OWN = {
    "image": "DDPM's linear betas",
    "classes": "DDPM's linear betas",
    "flow": "a flow",
    "flux": "a flow",
}
"""The kinds whose networks come with one family of noise levels, which is taken for a network alone."""

USED = (
    "unet",
    "transformer",
    "scheduler",
    "vae",
    "controlnet",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)
"""The components of a pipeline that are read."""

WITHOUT_EFFECT = (
    "safety_checker",
    "feature_extractor",
    "image_processor",
    "watermarker",
    "image_encoder",
    "image_normalizer",
    "image_noising_scheduler",
    "low_res_scheduler",
    "depth_estimator",
    "bert",
    "vqvae",
    "movq",
)
"""The components that look at results, or prepare conditions or pictures: the network's output is the same."""

AROUND_THE_NETWORK = {
    "StableDiffusionLatentUpscalePipeline": "scales the input and the output of its network by itself",
    "MarigoldDepthPipeline": "puts the latents of the image before those of the prediction",
    "MarigoldNormalsPipeline": "puts the latents of the image before those of the prediction",
    "MarigoldIntrinsicsPipeline": "puts the latents of the image before those of the prediction",
    "ConsistencyModelPipeline": "samples with the boundary conditions of consistency models",
}
"""Pipelines of known networks that compute something else with them than the network's own prediction."""

EXTRA_CHANNELS = {
    "PaintByExample": "the latents of the masked image, then the mask (1 channel, 1 where it is kept)",
    "Inpaint": "the mask (1 channel, 1 where it is painted), then the latents of the masked image, scaled "
    "by the autoencoder's scaling_factor",
    "InstructPix2Pix": "the latents of the image to edit, vae.encode(image).latent_dist.mode(), not scaled",
    "Depth2Img": "the depth map in [-1, 1], in the size of the latents",
    "SuperResolution": "the picture to enlarge in [-1, 1], in the size of the state",
    "Upscale": "the picture to enlarge in [-1, 1], noised by the pipeline's low_res_scheduler to the level "
    "class_labels",
}
"""What pipelines put behind the channels of the state, by a part of their name."""

CONDITIONED_OTHERWISE = {
    "CosineDPMSolverMultistepScheduler": "conditions its network on the angle 2 atan(sigma) / pi",
}
"""Schedulers that have a plan, but whose conditioning is not that of EDM."""

WRAP_IT = "load it with diffusers and wrap its network with fewstep.Denoiser.wrap"

EMBEDDINGS = "of pipe.encode_prompt"
MEANING = {
    "encoder_hidden_states": f"the embeddings of the prompt, (n, tokens, width), the prompt_embeds {EMBEDDINGS}",
    "encoder_attention_mask": f"1 for each token that counts, (n, tokens), the prompt_attention_mask {EMBEDDINGS}",
    "text_embeds": f"the pooled embeddings of the prompt, (n, width), the pooled_prompt_embeds {EMBEDDINGS}",
    "pooled_projections": f"the pooled embeddings of the prompt, (n, width), the pooled_prompt_embeds {EMBEDDINGS}",
    "time_ids": "the sizes: (n, 6), height, width, top, left, height, width; with an aesthetic score (n, 5), "
    "height, width, top, left, score",
    "image_embeds": "the embeddings of an image, (n, width), what the prior of the pipeline returns",
    "hint": "the picture that controls the result, (n, 3, H, W)",
    "guidance_scale": "the scale of guidance that this network was distilled with as an input, one number "
    "or one for each sample, e.g. guidance_scale={}",
    "controlnet_cond": "the picture for the ControlNet in [0, 1], (n, {}, {} x the latents' sides)",
    "class_labels": "the class of each sample, a level of noise, or an embedding (n, width), as this "
    "network was trained",
}
"""The description of each condition, for messages."""


class DiffusersModel(WrappedNetwork):
    """A network of diffusers.

    Attributes:
        vae: The autoencoder of a latent model, or ``None``.
        undecodable: Why :meth:`decode` cannot decode, if a latent model's autoencoder was not loaded.
    """

    vae: Any  # without a value: a class attribute would hide the submodule
    undecodable: str | None = None

    @property
    def latents(self) -> bool:  # type: ignore[override]
        """Whether the samples are latents of an autoencoder, loaded or not."""
        return self.undecodable is not None or getattr(self, "vae", None) is not None

    @torch.no_grad()
    def decode(self, x: Tensor, *, batch_size: int = 8) -> Tensor:
        """Returns the pictures of latents, (B, C, H, W) in the autoencoder's range, usually [-1, 1].

        A model of pixels returns its samples as they are.

        Raises:
            ValueError: If the autoencoder was not loaded; the message says why.
        """
        if self.undecodable is not None:
            raise ValueError(self.undecodable)
        if self.vae is None:
            return x
        weights = next(self.vae.parameters())
        config = self.vae.config
        scale: Any = float(config.scaling_factor)
        shift: Any = float(getattr(config, "shift_factor", None) or 0.0)
        means, stds = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if means is not None and stds is not None:
            shape = (1, -1, *[1] * (x.ndim - 2))
            scale = scale / torch.tensor(stds).to(weights).reshape(shape)
            shift = torch.tensor(means).to(weights).reshape(shape)
        vae, halving = self.vae, Halving()
        halving.most = batch_size

        def decoded(rows: range) -> Tensor:
            part = x[rows.start : rows.stop].to(weights) / scale + shift
            return vae.decode(part, return_dict=False)[0].to(x.dtype)

        return in_parts(decoded, len(x), halving)


def load_denoiser(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> DiffusersModel:
    """Loads a network or pipeline that diffusers saved, as a denoiser; weights by safetensors only.

    ============================ ====================================================================
    network                      conditions
    ============================ ====================================================================
    ``UNet2DModel``              ``class_labels`` if it was trained with classes
    ``DiTTransformer2DModel``    ``class_labels``; left out, no class
    ``UNet2DConditionModel``     ``prompt``, if the text encoders are CLIP's; or ``encoder_hidden_states``
                                 (SDXL: and ``text_embeds``). SDXL's ``time_ids`` are those of an uncropped
                                 picture of the samples' size, if they are left out. ``guidance_scale``
                                 for a network that has it as an input (LCM); ``class_labels`` (a level of
                                 noise, an embedding), ``image_embeds``, ``hint`` for those that take them
    ``PixArtTransformer2DModel`` ``encoder_hidden_states``, ``encoder_attention_mask``
    ``SD3Transformer2DModel``    ``encoder_hidden_states``, ``pooled_projections``
    ``FluxTransformer2DModel``   the same; ``guidance_scale`` if it was distilled with it
    ============================ ====================================================================

    A network with more input channels than the state has (inpainting, editing, enlarging) takes
    ``extra_channels``. With a ControlNet, ``controlnet_cond`` is its picture and ``conditioning_scale`` its
    weight. Missing conditions are an error before the first evaluation. Weights of a variant (``*.fp16.safetensors``) are
    read where there are no others. A component of a pipeline that would change what the network computes and is not
    known is refused. A network alone comes without noise levels: a ``UNet2DModel`` and DiT get those of DDPM, a
    flow-matching transformer a flow, others are refused.

    Arguments:
        folder: The folder.
        device: The device of the network.
        dtype: The type of its weights; left out, float32.

    Raises:
        ValueError: If the folder is not a known model, or has no safetensors.
    """
    check_path(folder, "folder")
    folder = Path(folder)
    dtype = dtype or torch.float32
    if not (folder / "model_index.json").is_file():
        network = _part(folder, dtype)
        kind = NETWORKS.get(type(network).__name__)
        if kind is None:
            raise ValueError(
                f"{str(folder)!r} holds {_what(network)}, not a network that denoises"
            )
        if kind not in LEVELS_OF_ITS_OWN:
            above = folder.resolve().parent
            hint = ""
            if (above / "model_index.json").is_file():
                hint = f": {str(above)!r}"
            raise ValueError(
                f"the network {str(folder)!r} alone does not say the noise levels it was trained with; give the "
                f"folder of its pipeline{hint}"
            )
        return _denoiser(_Folder(folder, "", {}, network, None), dtype).to(device)
    index = read_json(folder / "model_index.json", what="pipeline", foreign=True)
    title = str(index.get("_class_name"))
    parts = {name: entry for name, entry in index.items() if _is_part(entry)}
    name = next((k for k in ("unet", "transformer") if k in parts), None)
    if name is None:
        raise ValueError(
            f"the pipeline {str(folder)!r} ({title}) has neither unet nor transformer, but {', '.join(parts)}"
        )
    _check_pipeline(folder, title, parts)
    if "scheduler" not in parts:
        raise ValueError(
            f"the pipeline {str(folder)!r} ({title}) was saved without a scheduler, which says its noise levels"
        )
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file, what="scheduler", infinite=True, foreign=True)  # lambda_min_clipped
    network = _part(folder / name, dtype, config)
    return _denoiser(_Folder(folder, title, index, network, config), dtype).to(device)


@dataclass(frozen=True)
class _Folder:
    """The contents of a folder: its pipeline's name, index and parts, the network, the scheduler's configuration."""

    path: Path
    title: str
    index: Mapping[str, Any]
    network: Any
    scheduler: Mapping[str, Any] | None

    @property
    def kind(self) -> str:
        return NETWORKS[type(self.network).__name__]

    def has(self, part: str) -> bool:
        return _is_part(self.index.get(part))


def _is_part(value: object) -> bool:
    """Returns whether an entry of a pipeline's index is a component that was saved."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _check_pipeline(folder: Path, title: str, parts: Mapping[str, Any]) -> None:
    """Refuses pipelines that use more of the network than its prediction."""
    where = f"the pipeline {str(folder)!r} ({title})"
    if title in AROUND_THE_NETWORK:
        raise ValueError(f"{where} {AROUND_THE_NETWORK[title]}; {WRAP_IT}")
    for name, (_, kind) in parts.items():
        if name == "controlnet":
            if kind != "ControlNetModel" or "unet" not in parts:
                raise ValueError(
                    f"{where} has a {kind}, which is not supported and would change what the network "
                    f"computes; one ControlNetModel of a UNet is. {WRAP_IT[0].upper()}{WRAP_IT[1:]}"
                )
        elif name not in (*USED, *WITHOUT_EFFECT):
            raise ValueError(
                f"{where} has the component {name!r} ({kind}), which may change what the network computes and "
                f"is not supported; {WRAP_IT}"
            )


def _part(folder: Path, dtype: torch.dtype, scheduler: Mapping[str, Any] | None = None) -> Any:
    import diffusers

    config = read_json(folder / "config.json", what="model", foreign=True)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in (*NETWORKS, "AutoencoderKL", "ControlNetModel"):
        known = ", ".join([*NETWORKS, "AutoencoderKL"])
        raise ValueError(
            f"the folder {str(folder)!r} holds a {kind!r}; known: {known}. Load it with diffusers and "
            f"wrap it: {_how_to_wrap(scheduler)}"
        )
    try:
        model = getattr(diffusers, kind).from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=variant_of(folder),
        )
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the model {str(folder)!r} cannot be loaded: {error}") from None
    return model.eval().requires_grad_(False)


def _what(network: Any) -> str:
    kind = type(network).__name__
    return f"a {kind}" if kind == "ControlNetModel" else f"an autoencoder ({kind})"


def _how_to_wrap(scheduler: Mapping[str, Any] | None) -> str:
    """Returns the call that makes a denoiser of a network that is not known, as far as its scheduler says."""
    schedule, prediction, times = "...", "...", ""
    if scheduler is not None:
        on, native, to_model_time = _conventions(scheduler, False)
        prediction = repr(native.value)
        schedule = f"fewstep.schedule({on.name!r})"
        if not isinstance(on, (Flow, VPSigma)):
            schedule = "PlanScheduler.from_config(pipe.scheduler.config).schedule"
        if to_model_time is not None:
            flow = isinstance(on, Flow)
            times = ", to_model_time=" + (
                f"lambda t: {scheduler.get('num_train_timesteps', 1000)} * t"
                if flow
                else "lambda t: 0.25 * t.log()"
            )
    return f"fewstep.Denoiser.wrap(lambda x, t: ..., schedule={schedule}, prediction={prediction}{times})"


def _conventions(
    config: Mapping[str, Any] | None, flow: bool
) -> tuple[NoiseSchedule, Prediction, Callable[[Tensor], Tensor] | None]:
    """Returns schedule, prediction, and the conditioning timestep of a time (``None``: the time)."""
    given = dict(config or {})
    if given.get("_class_name") in CONDITIONED_OTHERWISE:
        raise ValueError(
            f"{given['_class_name']} {CONDITIONED_OTHERWISE[given['_class_name']]}; wrap its network "
            "yourself with Denoiser.wrap"
        )
    if flow and not given:
        given["prediction_type"] = "flow_prediction"
    schedule, prediction, count = conventions_of(given)
    if isinstance(schedule, Flow):
        return schedule, prediction, lambda t: t * count
    if isinstance(schedule, VPSigma):
        return schedule, prediction, lambda t: 0.25 * t.log()
    return schedule, prediction, None


def _channels(saved: _Folder) -> int:
    """Returns the channels of the state: those of the prediction, without a learned variance."""
    config = saved.network.config
    entering = int(config.in_channels)
    leaving = int(config.out_channels or entering)
    if saved.kind == "flux":
        if leaving != entering:
            raise ValueError(
                f"the network in {str(saved.path)!r} takes {entering} channels for {leaving} predicted: further "
                f"pictures, which are not supported for Flux; {WRAP_IT}"
            )
        return entering // 4  # packed in patches of 2 x 2
    if leaving == 2 * entering:
        return entering
    variance = str((saved.scheduler or {}).get("variance_type") or "")
    if leaving % 2 == 0 and (variance.startswith("learned") or saved.title.startswith("IF")):
        leaving //= 2
    if leaving > entering or (leaving < entering and saved.kind not in ("image", "text")):
        raise ValueError(
            f"the network in {str(saved.path)!r} takes {entering} channels and predicts {leaving}"
        )
    return leaving


def _denoiser(saved: _Folder, dtype: torch.dtype) -> DiffusersModel:
    network, kind, config = saved.network, saved.kind, saved.network.config
    schedule, prediction, to_model_time = _conventions(saved.scheduler, kind in ("flow", "flux"))
    channels = _channels(saved)
    vae, undecodable, pixels = _autoencoder(saved, dtype)
    null: dict[str, Any] = {}
    accepts: FolderConditions | None = None
    if kind == "image":
        call: DiffusersCall = ImageCall(network, channels)
    elif kind == "classes":
        call, null = (
            ClassesCall(network, channels),
            {"class_labels": int(config.num_embeds_ada_norm)},
        )
    elif kind == "text":
        accepts, call, null = _text_call(saved, channels, pixels, dtype)
    elif kind == "pixart":
        call = PixArtCall(network, channels, pixels=pixels)
    else:
        call = (FluxCall if kind == "flux" else FlowTextCall)(network, channels)
    if accepts is None:
        accepts = _other_conditions(saved, call)
    accepts = _with_extra_channels(saved, channels, accepts)
    asked: nn.Module = call
    if saved.scheduler is not None and family_of(saved.scheduler) == "edm":
        sign = -1.0 if saved.scheduler.get("prediction_type") == "v_prediction" else 1.0
        data = float(saved.scheduler.get("sigma_data", 0.5))
        asked = Preconditioned(call, sigma_data=data, sign=sign)
    # Flux has no size of its own, and some networks were saved without one: noise= says it.
    size = getattr(config, "sample_size", None)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    known = [int(side) for side in sides if side is not None]
    shape = (channels, *known) if len(known) == len(sides) else None
    model = DiffusersModel(
        asked,
        schedule=schedule,
        prediction=prediction,
        event_shape=shape,
        to_model_time=to_model_time,
        null_condition=null,
    )
    model.vae, model.undecodable = vae, undecodable
    model.accepts = accepts
    if not null:
        model.unguided = _why_unguided(kind, accepts)
    return model


def _autoencoder(saved: _Folder, dtype: torch.dtype) -> tuple[Any, str | None, int]:
    """Returns the autoencoder, or why it cannot decode, and the pixels of a picture for each latent, along a side."""
    for name in ("vae", "movq", "vqvae"):
        if not saved.has(name):
            continue
        kind = saved.index[name][1]
        if kind == "AutoencoderKL":
            vae = _part(saved.path / name, dtype)
            return vae, None, 2 ** (len(vae.config.block_out_channels) - 1)
        reason = (
            f"the samples are latents of a {kind}, which is not run here; decode them with its "
            "pipeline in diffusers"
        )
        return None, reason, 8
    return None, None, 8  # what pipelines take without one


def _text_call(
    saved: _Folder, channels: int, pixels: int, dtype: torch.dtype
) -> tuple[FolderConditions, TextCall, dict[str, Any]]:
    """Returns the conditions of a ``UNet2DConditionModel``, its call, and its null condition."""
    network, config, path = saved.network, saved.network.config, saved.path
    added, projected = config.addition_embed_type, config.encoder_hid_dim_type
    if added not in (None, "text", "text_time", "text_image", "image", "image_hint"):
        raise ValueError(
            f"the network in {str(path)!r} has addition_embed_type={added!r}, which is not known; {WRAP_IT}"
        )
    if projected not in (None, "text_proj", "text_image_proj", "image_proj"):
        raise ValueError(
            f"the network in {str(path)!r} has encoder_hid_dim_type={projected!r}, such as an IP adapter leaves; "
            "save the pipeline again after pipe.unload_ip_adapter()"
        )
    large = added == "text_time"
    zeros = large and bool(saved.index.get("force_zeros_for_empty_prompt", True))
    aesthetic = large and bool(saved.index.get("requires_aesthetics_score", False))
    encoders: TextEncoders | None = None
    reason: str | None = None
    replacing = {"encoder_hidden_states"}
    required: set[str] = set()
    if large:
        replacing |= {"text_embeds", "time_ids"} if aesthetic else {"text_embeds"}
    if projected == "image_proj":
        replacing, reason = set(), "this network takes no prompt, but an image's embeddings"
    elif added in ("text_image", "image", "image_hint") or projected == "text_image_proj":
        reason = (
            "the prompt of this network is encoded together with an image, which is not done here"
        )
        if added == "text_image":
            replacing.add("text_embeds")
    else:
        encoders, reason_found = read_text_encoders(
            path,
            [name for name, entry in saved.index.items() if _is_part(entry)],
            pooled=large,
            zeros_for_none=zeros,
            dtype=dtype,
        )
        reason = reason_found or None
    if added in ("text_image", "image", "image_hint") or projected in (
        "text_image_proj",
        "image_proj",
    ):
        required.add("image_embeds")
    if added == "image_hint":
        required.add("hint")
    if network.class_embedding is not None:
        required.add("class_labels")
    if config.time_cond_proj_dim is not None:
        required.add("guidance_scale")
    controlnet: Any = None
    meaning = dict(MEANING, guidance_scale=MEANING["guidance_scale"].format("8.5"))
    if saved.has("controlnet"):
        controlnet = _part(path / "controlnet", dtype)
        required.add("controlnet_cond")
        meaning["controlnet_cond"] = meaning["controlnet_cond"].format(
            controlnet.config.conditioning_channels, pixels
        )
    names = {"prompt", *replacing, *required}
    if large:
        names.add("time_ids")
    if controlnet is not None:
        names.add("conditioning_scale")
    accepts = FolderConditions(
        names=frozenset(names),
        required=frozenset(required),
        plain=frozenset({"guidance_scale", "conditioning_scale"}),
        num_classes=_num_classes(network),
        owner=_owner(saved),
        meaning=meaning,
        instead_of_prompt=frozenset(replacing),
        no_prompt=reason,
    )
    call = TextCall(
        network,
        channels,
        encoders=encoders,
        controlnet=controlnet,
        pixels=pixels,
        aesthetic=aesthetic,
    )
    guided = encoders is not None and config.time_cond_proj_dim is None
    # Without a prompt SDXL has embeddings of zero, which no text has.
    return accepts, call, {"prompt": None if large else ""} if guided else {}


def _owner(saved: _Folder) -> str:
    return f"the network of this {saved.title}" if saved.title else "the network"


def _num_classes(network: Any) -> int | None:
    """Returns the number of classes of a U-Net that has a table of them."""
    config = network.config
    if config.class_embed_type is not None or config.num_class_embeds is None:
        return None
    return int(config.num_class_embeds)


def _other_conditions(saved: _Folder, call: DiffusersCall) -> FolderConditions:
    """Returns the conditions of a network that takes no prompts."""
    network, config = saved.network, saved.network.config
    required = set(AcceptedConditions.of(call).required)
    names = set(required)
    classes: int | None = None
    if saved.kind == "image":
        classes = _num_classes(network)
        required = {"class_labels"} if network.class_embedding is not None else set()
        names = set(required)
    elif saved.kind == "classes":
        names, classes = {"class_labels"}, int(config.num_embeds_ada_norm)
    elif saved.kind == "flux" and config.guidance_embeds:
        required.add("guidance_scale")
        names = set(required)
    takes_text = "encoder_hidden_states" in required
    return FolderConditions(
        names=frozenset(names | ({"prompt"} if takes_text else set())),
        required=frozenset(required),
        plain=frozenset({"guidance_scale"}),
        num_classes=classes,
        owner=_owner(saved),
        meaning=dict(MEANING, guidance_scale=MEANING["guidance_scale"].format("3.5")),
        instead_of_prompt=frozenset(required - {"guidance_scale"}) if takes_text else frozenset(),
        no_prompt="the text encoders of this model are not run here" if takes_text else None,
    )


def _with_extra_channels(
    saved: _Folder, channels: int, accepts: FolderConditions
) -> FolderConditions:
    """Adds the channels that a network takes behind those of the state."""
    more = int(saved.network.config.in_channels) - channels
    if saved.kind == "flux" or more == 0:
        return accepts
    what = next((v for k, v in EXTRA_CHANNELS.items() if k in saved.title), None)
    if what is None:
        raise ValueError(
            f"the network in {str(saved.path)!r} takes {more} channels besides those of the state, and it is not "
            f"known what a {saved.title or 'network alone'} puts there; {WRAP_IT}"
        )
    size = "the state's sides"
    return replace(
        accepts,
        names=frozenset({*(accepts.names or ()), "extra_channels"}),
        required=accepts.required | {"extra_channels"},
        meaning={
            **accepts.meaning,
            "extra_channels": f"{what}; (n, {more}, {size})",
        },
    )


def _why_unguided(kind: str, accepts: FolderConditions) -> str:
    """Returns why guidance is refused, with a hint."""
    if "guidance_scale" in accepts.required:
        return (
            "this network was distilled with the scale of guidance as an input: give guidance_scale= as "
            "a condition, and leave guidance out"
        )
    if accepts.instead_of_prompt:
        names = ", ".join(f"{name!r}: ..." for name in sorted(accepts.instead_of_prompt))
        return (
            "guidance needs the embeddings of the empty prompt, without the dimension of the batch: "
            f"model.null_condition = {{{names}}}"
        )
    return (
        "this network was not trained to do without its condition, as far as its folder says; if it was, say "
        "with which value: model.null_condition = {'class_labels': ...}"
        if kind == "image" and accepts.required
        else "guidance needs a condition, and this network takes none that could be left out"
    )

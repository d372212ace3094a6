"""Denoisers from folders that diffusers saved: schedule, prediction and times are read from its configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapters.diffusers.configurations import conventions_of, family_of
from fewstep.base.files import read_json
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import Flow, NoiseSchedule, VPSigma
from fewstep.models.calling import NetworkCall
from fewstep.models.denoiser import Denoiser, WrappedNetwork
from fewstep.models.preconditioning import Preconditioned

NETWORKS = {
    "UNet2DModel": "image",
    "DiTTransformer2DModel": "classes",
    "UNet2DConditionModel": "text",
    "SD3Transformer2DModel": "flow",
}
"""The networks that are known, and how each is called."""


CONDITIONED_OTHERWISE = {
    "CosineDPMSolverMultistepScheduler": "conditions its network on the angle 2 atan(sigma) / pi",
}
"""Schedulers that have a plan, but whose conditioning is not that of EDM."""


class DiffusersModel(WrappedNetwork):
    """A network of diffusers.

    Attributes:
        vae: The autoencoder of a latent model, or ``None``.
    """

    vae: Any  # without a value: a class attribute would hide the submodule

    @torch.no_grad()
    def decode(self, x: Tensor, *, batch_size: int = 8) -> Tensor:
        """Returns the pictures of latents, (B, C, H, W) in the autoencoder's range, usually [-1, 1].

        A model of pixels returns its samples as they are.
        """
        if self.vae is None:
            return x
        weights = next(self.vae.parameters())
        scale = float(self.vae.config.scaling_factor)
        shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        parts = [
            self.vae.decode(part.to(weights) / scale + shift, return_dict=False)[0].to(x.dtype)
            for part in x.split(batch_size)
        ]
        return torch.cat(parts)


class _Call(NetworkCall):
    """Calls a network of diffusers as ``network(x, t, **conditions)`` in its own type."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def _type(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @staticmethod
    def _like(value: Tensor, x: Tensor) -> Tensor:
        # The second half of twice the channels is a learned variance.
        return value[:, : x.shape[1]].to(x.dtype)


class _Image(_Call):
    def forward(self, x: Tensor, t: Tensor, *, class_labels: Any = None) -> Tensor:
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=x.device)
        value = self.network(x.to(self._type()), t, class_labels=labels, return_dict=False)[0]
        return self._like(value, x)


class _Classes(_Call):
    def forward(self, x: Tensor, t: Tensor, *, class_labels: Any = None) -> Tensor:
        null = int(self.network.config.num_embeds_ada_norm)
        labels = (
            torch.full((len(x),), null, device=x.device) if class_labels is None else class_labels
        )
        labels = torch.as_tensor(labels, device=x.device).expand(len(x))
        value = self.network(
            x.to(self._type()), timestep=t, class_labels=labels, return_dict=False
        )[0]
        return self._like(value, x)


class _Text(_Call):
    """Latent diffusion with a text encoder; prompts are encoded once and remembered."""

    def __init__(self, network: Any, encoder: Any, tokenizer: Any) -> None:
        super().__init__(network)
        self.encoder, self.tokenizer = encoder, tokenizer
        self._known: dict[str, Tensor] = {}

    def _encode(self, prompt: str, device: torch.device) -> Tensor:
        if prompt not in self._known:
            if self.encoder is None or self.tokenizer is None:
                raise ValueError(
                    "this model was saved without a text encoder or tokenizer; give "
                    "encoder_hidden_states= instead of prompt="
                )
            tokens = self.tokenizer(
                [prompt],
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            with torch.no_grad():
                self._known[prompt] = self.encoder(tokens.to(device))[0]
        return self._known[prompt]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        prompt: Any = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            texts = [prompt or ""] * len(x) if not isinstance(prompt, list) else prompt
            encoder_hidden_states = torch.cat([self._encode(p or "", x.device) for p in texts])
        states = encoder_hidden_states.to(device=x.device, dtype=self._type())
        value = self.network(
            x.to(self._type()), t, encoder_hidden_states=states, return_dict=False
        )[0]
        return self._like(value, x)


class _FlowText(_Call):
    """A flow-matching transformer, given embeddings of the text."""

    def forward(
        self, x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        kind = self._type()
        value = self.network(
            hidden_states=x.to(kind),
            timestep=t,
            encoder_hidden_states=encoder_hidden_states.to(device=x.device, dtype=kind),
            pooled_projections=pooled_projections.to(device=x.device, dtype=kind),
            return_dict=False,
        )[0]
        return self._like(value, x)


def load_denoiser(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Loads a network or pipeline that diffusers saved, as a denoiser; weights by safetensors only.

    Known are ``UNet2DModel`` (also from a DDPM or DDIM pipeline), DiT, Stable Diffusion's
    ``UNet2DConditionModel`` (conditions ``prompt``, or ``encoder_hidden_states``; the empty prompt
    is none), and the transformer of SD3 (``encoder_hidden_states`` and ``pooled_projections``); with
    a scheduler in EDM's preconditioning too. A
    network alone comes without a schedule: the linear one of DDPM and epsilon-prediction are taken
    for a ``UNet2DModel``, and a flow for a flow-matching transformer.

    Arguments:
        folder: The folder.
        device: Where to put the network.
        dtype: The type of its weights; left out, float32.

    Raises:
        ValueError: If the folder is not a known model, or has no safetensors.
    """
    folder = Path(folder)
    dtype = dtype or torch.float32
    if not (folder / "model_index.json").is_file():
        return _denoiser(_part(folder, dtype), None, {}, folder).to(device)
    index = read_json(folder / "model_index.json", what="pipeline")
    parts = {k: v for k, v in index.items() if isinstance(v, list) and v[-1] is not None}
    name = next((k for k in ("unet", "transformer") if k in parts), None)
    if name is None:
        raise ValueError(
            f"the pipeline {str(folder)!r} ({index.get('_class_name')}) has neither unet nor transformer"
        )
    network = _part(folder / name, dtype)
    extra: dict[str, Any] = {}
    if "vae" in parts:
        extra["vae"] = _part(folder / "vae", dtype)
    if (
        "text_encoder" in parts
        and "tokenizer" in parts
        and type(network).__name__ != "SD3Transformer2DModel"
    ):
        extra["encoder"], extra["tokenizer"] = _text(folder)
    config = read_json(folder / "scheduler" / "scheduler_config.json", what="scheduler")
    return _denoiser(network, config, extra, folder).to(device)


def _part(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    config = read_json(folder / "config.json", what="model")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in NETWORKS and kind != "AutoencoderKL":
        known = ", ".join([*NETWORKS, "AutoencoderKL"])
        raise ValueError(f"the folder {str(folder)!r} holds a {kind!r}; known: {known}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"the folder {str(folder)!r} has no safetensors; weights in other files are not loaded, "
            "as they may run code. Save it again with safe_serialization=True"
        )
    try:
        model = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the model {str(folder)!r} cannot be loaded: {error}") from None
    return model.eval().requires_grad_(False)


def _text(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", use_safetensors=True, local_files_only=True
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return encoder.eval().requires_grad_(False), tokenizer


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


def _denoiser(
    network: Any, config: Mapping[str, Any] | None, extra: Mapping[str, Any], folder: Path
) -> DiffusersModel:
    kind = NETWORKS.get(type(network).__name__)
    if kind is None:
        raise ValueError(f"{str(folder)!r} holds an autoencoder, not a network that denoises")
    schedule, prediction, to_model_time = _conventions(config, kind == "flow")
    null: dict[str, Any] = {}
    if kind == "image":
        call: _Call = _Image(network)
    elif kind == "classes":
        call = _Classes(network)
        null = {"class_labels": int(network.config.num_embeds_ada_norm)}
    elif kind == "text":
        call = _Text(network, extra.get("encoder"), extra.get("tokenizer"))
        null = {"prompt": ""}
    else:
        call = _FlowText(network)
    asked: nn.Module = call
    if config is not None and family_of(config) == "edm":
        sign = -1.0 if config.get("prediction_type") == "v_prediction" else 1.0
        data = float(config.get("sigma_data", 0.5))
        asked = Preconditioned(call, sigma_data=data, sign=sign)
    size = network.config.sample_size
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    model = DiffusersModel(
        asked,
        schedule=schedule,
        prediction=prediction,
        event_shape=(int(network.config.in_channels), *map(int, sides)),
        to_model_time=to_model_time,
        null_condition=null,
        num_classes=_classes(network),
    )
    model.vae = extra.get("vae")
    return model


def _classes(network: Any) -> int | None:
    """Returns the number of classes of a network that takes class labels."""
    for key in ("num_class_embeds", "num_embeds_ada_norm"):
        found = network.config.get(key)
        if type(found) is int:
            return found
    return None

"""The text encoders of a saved pipeline, as far as prompts can be encoded here: CLIP, one or two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.adapters.diffusers.weights import variant_of
from fewstep.base.files import read_json

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""The text encoders that are run here; the embeddings of others are given."""


class TextEncoders(nn.Module):
    """Encodes prompts as Stable Diffusion or SDXL does; each prompt once.

    Arguments:
        encoders: The text encoders.
        tokenizers: Their tokenizers.
        pooled: Whether the embeddings are those of SDXL: the last but one layer of all encoders, and
            the pooled output of the last one. Otherwise the last layer of the only encoder.
        zeros_for_none: Whether no prompt (``None``) is embedded as zeros, not as the empty prompt.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        *,
        pooled: bool = False,
        zeros_for_none: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = list(tokenizers)
        self.pooled, self.zeros_for_none = pooled, zeros_for_none
        self._known: dict[str, tuple[Tensor, Tensor | None]] = {}

    def forward(
        self, prompts: Sequence[str | None], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the embeddings (B, L, D) of prompts, and the pooled ones (B, P) if there are."""
        rows = [self._row(prompt, device) for prompt in prompts]
        states = torch.cat([states for states, _ in rows])
        pooled = [p for _, p in rows if p is not None]
        return states, torch.cat(pooled) if pooled else None

    @torch.no_grad()
    def _row(self, prompt: str | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        text = prompt or ""
        if not isinstance(text, str):
            raise ValueError(f"prompt must be a text, or one for each sample, got {prompt!r:.60}")
        if text not in self._known:
            self._known[text] = self._encoded(text, device)
        states, pooled = (
            None if embedding is None else embedding.to(device) for embedding in self._known[text]
        )
        assert states is not None
        if prompt is None and self.zeros_for_none:
            return states * 0, None if pooled is None else pooled * 0
        return states, pooled

    def _encoded(self, text: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        layers: list[Tensor] = []
        summary: Tensor | None = None
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            tokens = tokenizer(
                [text],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            options: dict[str, Any] = {}
            if not self.pooled and getattr(encoder.config, "use_attention_mask", False):
                options["attention_mask"] = tokens.attention_mask.to(device)
            output = encoder(
                tokens.input_ids.to(device), output_hidden_states=self.pooled, **options
            )
            layers.append(output.hidden_states[-2] if self.pooled else output[0])
            if self.pooled and summary is None and output[0].ndim == 2:
                summary = output[0]
        return torch.cat(layers, -1), summary


def read_text_encoders(
    folder: Path,
    parts: Sequence[str],
    *,
    pooled: bool,
    zeros_for_none: bool,
    dtype: torch.dtype,
) -> tuple[TextEncoders | None, str]:
    """Returns the text encoders of a pipeline, or ``None`` and why prompts cannot be encoded.

    Arguments:
        folder: The folder of the pipeline.
        parts: The names of the components that are in it.
        pooled: See :class:`TextEncoders`.
        zeros_for_none: Likewise.
        dtype: The type of their weights.

    Raises:
        ValueError: If a file is damaged.
    """
    names = [n for n in ("text_encoder", "text_encoder_2", "text_encoder_3") if n in parts]
    if not names:
        return None, "this model was saved without a text encoder"
    kinds = [_architecture(folder / name) for name in names]
    strange = [kind for kind in kinds if kind not in CLIP]
    if strange:
        return None, f"its text encoder, a {strange[0]}, is not run here"
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in names]
    if any(name not in parts for name in tokenizers):
        return None, "this model was saved without a tokenizer"
    if pooled and kinds[-1] != "CLIPTextModelWithProjection":
        return None, "the last text encoder has no projection, whose output is needed"
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    encoders: list[nn.Module] = []
    for name, kind in zip(names, kinds, strict=True):
        model = CLIPTextModel if kind == "CLIPTextModel" else CLIPTextModelWithProjection
        try:
            encoder = model.from_pretrained(
                folder / name,
                use_safetensors=True,
                local_files_only=True,
                variant=variant_of(folder / name),
                dtype=dtype,
            )
        except (OSError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the text encoder {str(folder / name)!r} cannot be loaded: {error}"
            ) from None
        encoders.append(encoder.eval().requires_grad_(False))
    read = [
        CLIPTokenizer.from_pretrained(folder / name, local_files_only=True) for name in tokenizers
    ]
    return TextEncoders(encoders, read, pooled=pooled, zeros_for_none=zeros_for_none), ""


def _architecture(folder: Path) -> str:
    config = read_json(folder / "config.json", what="text encoder", foreign=True)
    names = config.get("architectures") if isinstance(config, dict) else None
    return str(names[0]) if names else "model of unknown class"

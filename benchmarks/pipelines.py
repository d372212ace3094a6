"""Every pipeline family of diffusers that can be built offline, with tiny networks and random weights.

Usage: python benchmarks/pipelines.py [--only sd,flux] [--json benchmarks/results/pipelines.json]

For each family, the largest difference relative to the largest value:

- "own solver": samples with diffusers' own scheduler, and with `PlanScheduler` and the same method from its configuration.
- "tab3": whether another solver runs in the pipeline: the largest value of its samples.
- "save, load": samples before the pipeline with `PlanScheduler` was saved, and after `load_pipeline`.
- "fewstep.load": the output of the pipeline's first network evaluation, and the prediction of the loaded model there.

What is refused prints its reason. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

import fewstep
from _common import print_table, say_what_runs, version
from fewstep.adapters.diffusers import PlanScheduler, load_pipeline, plan_from_scheduler
from fewstep.base.files import write_json
from fewstep.diffusion.schedules import Flow

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny_pipelines as tiny

COLUMNS = ("own solver", "tab3", "save, load", "fewstep.load")
STEPS = 6
RESULTS = Path(__file__).parent / "results" / "pipelines.json"

STATES, NULL = tiny.normal((1, 16, 16), 1), tiny.normal((1, 16, 16), 2)
TEXT = {"prompt_embeds": STATES, "negative_prompt_embeds": NULL}
POOLED = {
    "pooled_prompt_embeds": STATES[:, 0],
    "negative_pooled_prompt_embeds": NULL[:, 0],
}
MASKS = {
    "prompt_attention_mask": torch.ones(1, 16),
    "negative_prompt_attention_mask": torch.ones(1, 16),
}
SIZE = {"height": 16, "width": 16}
VIDEO = {**SIZE, "num_frames": 9}
PICTURE = torch.rand(1, 3, 16, 16, generator=tiny.seeded(3))
MASK = (torch.rand(1, 1, 16, 16, generator=tiny.seeded(4)) > 0.5).float()
LATENT = {**tiny.LATENT, "steps_offset": 1}
FLOW = ("ddim", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
PP2M = ("dpmpp-2m", "DPMSolverMultistepScheduler", LATENT)
DDIM = ("ddim", "DDIMScheduler", {**LATENT, "clip_sample": False})


@dataclass(frozen=True)
class Family:
    """A family: how its pipeline is built, called, and which method its scheduler has.

    Attributes:
        build: From a scheduler to a pipeline.
        method: Our solver (``"its plan"``: what :func:`plan_from_scheduler` reads), diffusers' scheduler of
            the same method, its configuration.
        arguments: What the pipeline is called with.
        conditions: What ``fewstep.load`` takes and the network's arguments do not show.
        output: The type of the results, latents if the pipeline knows them.
        steps: The number of steps.
    """

    build: Callable[[Any], Any]
    method: tuple[str, str, Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    output: str = "latent"
    steps: int = STEPS

    def scheduler(self) -> Any:
        return getattr(diffusers, self.method[1])(**self.method[2])


def sd(kind: str = "", **unet: Any) -> Callable[[Any], Any]:
    network = tiny.unet_text(**unet)
    return lambda s: tiny.stable_diffusion(s, f"StableDiffusion{kind}Pipeline", unet=network)


def controlled(scheduler: Any) -> Any:
    kind = "StableDiffusionControlNetPipeline"
    return tiny.stable_diffusion(scheduler, kind, controlnet=tiny.controlnet())


def sdxl_controlled(scheduler: Any) -> Any:
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    control = tiny.controlnet(addition_embed_type="text_time", **sizes)
    return tiny.sdxl(scheduler, "StableDiffusionXLControlNetPipeline", controlnet=control)


def upscaling(scheduler: Any) -> Any:
    return diffusers.StableDiffusionUpscalePipeline(
        vae=tiny.vae(),
        text_encoder=tiny.clip_text(),
        tokenizer=None,
        unet=tiny.unet_text(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=scheduler,
    )


def deepfloyd(scheduler: Any) -> Any:
    return diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=tiny.unet_text(in_channels=3, out_channels=6),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def latent_consistency(scheduler: Any) -> Any:
    network = tiny.unet_text(time_cond_proj_dim=8)
    return tiny.stable_diffusion(scheduler, "LatentConsistencyModelPipeline", unet=network)


CONTROL = {"controlnet_cond": PICTURE}
CONTINUOUS = {
    **LATENT,
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "use_karras_sigmas": True,
    "timestep_spacing": "leading",
}
FLOW_UNIPC = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}

FAMILIES: dict[str, Family] = {
    "DDPM": Family(
        lambda s: diffusers.DDPMPipeline(tiny.unet2d(), s),
        ("ddpm", "DDPMScheduler", {"clip_sample": False}),
        output="np",
    ),
    "DDPM, clipping": Family(
        lambda s: diffusers.DDPMPipeline(tiny.unet2d(), s),
        ("ddpm", "DDPMScheduler", {"clip_sample": True}),
        output="np",
    ),
    "DDIM": Family(
        lambda s: _with_scheduler(diffusers.DDIMPipeline, s),
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
        output="np",
    ),
    "DiT": Family(
        lambda s: diffusers.DiTPipeline(tiny.dit(), tiny.vae(), s),
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
        {"class_labels": [7]},
        output="np",
    ),
    "Stable Diffusion": Family(sd(), PP2M, {**TEXT, **SIZE}),
    "Stable Diffusion, v": Family(
        sd(), (*PP2M[:2], {**LATENT, "prediction_type": "v_prediction"}), {**TEXT, **SIZE}
    ),
    "Stable Diffusion img2img": Family(
        sd("Img2Img"), PP2M, {**TEXT, "image": PICTURE, "strength": 0.6}
    ),
    "Stable Diffusion inpaint": Family(
        sd("Inpaint"),
        PP2M,
        {**TEXT, **SIZE, "image": PICTURE, "mask_image": MASK, "strength": 0.8},
    ),
    "Stable Diffusion inpaint, 9 channels": Family(
        sd("Inpaint", in_channels=9),
        PP2M,
        {**TEXT, **SIZE, "image": PICTURE, "mask_image": MASK},
    ),
    "InstructPix2Pix": Family(
        sd("InstructPix2Pix", in_channels=8), DDIM, {**TEXT, "image": PICTURE}
    ),
    "Stable Diffusion ControlNet": Family(controlled, PP2M, {**TEXT, "image": PICTURE}, CONTROL),
    "Stable Diffusion upscale": Family(upscaling, DDIM, {**TEXT, "image": PICTURE[..., :8, :8]}),
    "Stable Diffusion SAG": Family(sd("SAG"), DDIM, {**TEXT, **SIZE, "sag_scale": 0.0}),
    "Stable Diffusion panorama": Family(sd("Panorama"), DDIM, {**TEXT, **SIZE}),
    "latent consistency": Family(
        latent_consistency,
        ("its plan", "LCMScheduler", tiny.LATENT),
        {"prompt_embeds": STATES, **SIZE, "guidance_scale": 7.5},
        {"guidance_scale": 7.5},
    ),
    "DeepFloyd IF": Family(
        deepfloyd,
        (*PP2M[:2], {"variance_type": "learned_range"}),
        {**TEXT, "height": 8, "width": 8},
        output="pt",
    ),
    "SDXL": Family(tiny.sdxl, PP2M, {**TEXT, **POOLED, **SIZE}),
    "SDXL img2img": Family(
        lambda s: tiny.sdxl(s, "StableDiffusionXLImg2ImgPipeline"),
        PP2M,
        {**TEXT, **POOLED, "image": PICTURE, "strength": 0.6},
    ),
    "SDXL inpaint, 9 channels": Family(
        lambda s: tiny.sdxl(
            s, "StableDiffusionXLInpaintPipeline", unet=tiny.unet_text(True, in_channels=9)
        ),
        PP2M,
        {**TEXT, **POOLED, **SIZE, "image": PICTURE, "mask_image": MASK, "strength": 1.0},
    ),
    "SDXL ControlNet": Family(
        sdxl_controlled, PP2M, {**TEXT, **POOLED, "image": PICTURE}, CONTROL
    ),
    "SD3": Family(tiny.sd3, FLOW, {**TEXT, **POOLED, **SIZE}),
    "Flux": Family(
        tiny.flux,
        FLOW,
        {**SIZE, "prompt_embeds": STATES, "pooled_prompt_embeds": STATES[:, 0]},
        {"guidance_scale": 3.5},
    ),
    "PixArt-alpha": Family(
        tiny.pixart,
        PP2M,
        {**TEXT, **MASKS, **SIZE, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "Qwen-Image": Family(
        tiny.qwen,
        FLOW,
        {
            "prompt_embeds": STATES,
            "prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long),
            "height": 32,
            "width": 32,
        },
    ),
    "Kandinsky 2.2": Family(
        tiny.kandinsky,
        ("ddim", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
        {
            "image_embeds": STATES[:, 0],
            "negative_image_embeds": NULL[:, 0],
            "height": 32,
            "width": 32,
        },
    ),
    "text to video": Family(tiny.text_to_video, PP2M, {**TEXT, **SIZE, "num_frames": 3}),
    "Stable Video Diffusion": Family(
        tiny.stable_video,
        ("ddim", "EulerDiscreteScheduler", CONTINUOUS),
        {**SIZE, "image": PICTURE, "num_frames": 2, "max_guidance_scale": 2.5},
    ),
    "CogVideoX": Family(
        tiny.cogvideo,
        (
            "ddim",
            "CogVideoXDDIMScheduler",
            {
                **tiny.LATENT,
                "prediction_type": "v_prediction",
                "snr_shift_scale": 3.0,
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
                "clip_sample": False,
            },
        ),
        {**TEXT, **VIDEO},
        steps=5,  # divides 1000; see docs/diffusers.md
    ),
    "LTX": Family(tiny.ltx, FLOW, {**TEXT, **MASKS, "height": 32, "width": 32, "num_frames": 9}),
    "Wan": Family(tiny.wan, ("unipc2", "UniPCMultistepScheduler", FLOW_UNIPC), {**TEXT, **VIDEO}),
}
"""The families that can be built."""

REFUSED = {
    "Wuerstchen, Stable Cascade": "DDPMWuerstchenScheduler",
    "consistency models": "CMStochasticIterativeScheduler",
    "Dance Diffusion": "IPNDMScheduler",
    "Stable Audio": "CosineDPMSolverMultistepScheduler",
    "Sana Sprint": "SCMScheduler",
    "aMUSEd": "AmusedScheduler",
    "EDM": "EDMEulerScheduler",
    "score SDE (VE)": "ScoreSdeVeScheduler",
    "Helios": "HeliosScheduler",
}
"""The families whose scheduler is refused."""


def _with_scheduler(kind: Any, scheduler: Any) -> Any:
    """Puts a scheduler in the place of the one that a pipeline puts in by itself."""
    pipe = kind(tiny.unet2d(), diffusers.DDIMScheduler(clip_sample=False))
    pipe.scheduler = scheduler
    return pipe


def draw(pipe: Any, family: Family) -> Tensor:
    """Returns the result of a pipeline."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some pipelines pass no generator to the scheduler
    found = pipe(
        num_inference_steps=family.steps,
        generator=tiny.seeded(),
        output_type=family.output,
        **family.arguments,
    )
    value = found.frames if hasattr(found, "frames") else found.images
    if isinstance(value, (list, tuple)):
        value = torch.stack([torch.as_tensor(np.asarray(v)) for v in value])
    return torch.as_tensor(value)


def conditions(call: tiny.NetworkCall, family: Family) -> dict[str, Any]:
    """Returns the conditions that a network evaluation shows, in the words of ``fewstep.load``."""
    known = (
        "encoder_hidden_states",
        "class_labels",
        "pooled_projections",
        "encoder_attention_mask",
    )
    found = {k: call.given[k] for k in known if call.given.get(k) is not None}
    added = call.given.get("added_cond_kwargs") or {}
    found |= {k: v for k, v in added.items() if v is not None}
    for name, value in family.conditions.items():
        rows = isinstance(value, Tensor)
        found[name] = value.expand(len(call.x), *value.shape[1:]) if rows else value
    return found


def difference_of_load(pipe: Any, folder: Path, family: Family) -> float:
    """Returns how far the loaded model is from the first network evaluation of its pipeline."""
    tiny.with_text_parts(pipe, folder / "words").save_pretrained(folder)
    model = fewstep.load(folder, device="cpu")
    call = tiny.first_call(pipe, output_type=family.output, **family.arguments)
    x, want, t = call.x, call.output, call.t
    if hasattr(pipe, "_unpack_latents"):
        sides = (family.arguments["height"], family.arguments["width"], pipe.vae_scale_factor)
        x, want = (pipe._unpack_latents(value, *sides) for value in (x, want))
    elif isinstance(model.schedule, Flow):
        t = t / 1000
    given = conditions(call, family)
    channels = model.event_shape[0] if model.event_shape else x.shape[1]
    if x.shape[1] > channels:
        given["extra_channels"] = x[:, channels:]
        x = x[:, :channels]
    return tiny.relative(model(x, t, prediction=model.native, **given), want[:, :channels])


def attempt(measure: Callable[[], float]) -> float | str:
    """Returns a number, or the reason why there is none."""
    try:
        return measure()
    except ValueError as error:
        return re.sub(r"'/[^']*/(\w+)'", r"'FOLDER/\1'", str(error).splitlines()[0])
    except Exception as error:
        return f"FAILED, {type(error).__name__}: {str(error).splitlines()[0]}"


def measured(family: Family) -> dict[str, float | str]:
    """Returns the four numbers of a family, or reasons."""
    solver, _, _ = family.method
    native = family.scheduler()

    def own() -> float:
        if solver == "its plan":
            plan = plan_from_scheduler(native, family.steps).to_json()
            ours = PlanScheduler.from_config(native.config, recipe=plan)
        else:
            ours = PlanScheduler.from_config(native.config, solver=solver)
        want = draw(family.build(family.scheduler()), family)
        return tiny.relative(draw(family.build(ours), family), want)

    def other() -> float:
        ours = PlanScheduler.from_config(native.config, solver="tab3")
        found = draw(family.build(ours), family)
        if not bool(torch.isfinite(found).all()):
            raise ValueError("the samples are not finite")
        return float(found.abs().max())

    def kept() -> float:
        pipe = family.build(PlanScheduler.from_config(native.config, solver="tab3"))
        want = draw(pipe, family)
        with tempfile.TemporaryDirectory() as folder:
            tiny.with_text_parts(pipe, Path(folder) / "words").save_pretrained(folder)
            return tiny.relative(draw(load_pipeline(folder), family), want)

    def loaded() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return difference_of_load(family.build(family.scheduler()), Path(folder), family)

    return dict(zip(COLUMNS, map(attempt, (own, other, kept, loaded)), strict=True))


def refused(scheduler: str) -> str:
    """Returns why a scheduler is refused.

    Raises:
        RuntimeError: If it is not.
    """
    config = {"_class_name": scheduler}
    kind = getattr(diffusers, scheduler, None)
    if kind is not None:
        given = {"mask_token_id": 1} if scheduler == "AmusedScheduler" else {}
        config = {**kind(**given).config, **config}
    try:
        PlanScheduler.from_config(config)
    except ValueError as error:
        return str(error)
    raise RuntimeError(f"{scheduler} is not refused")


def shown(value: float | str, notes: list[str]) -> str:
    """Returns a cell: a number, or the number of a note."""
    if isinstance(value, float):
        return f"{value:.1e}"
    if value not in notes:
        notes.append(value)
    word = "failed" if value.startswith("FAILED") else "refused"
    return f"{word} [{notes.index(value) + 1}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    say_what_runs(
        f"Tiny networks with random weights, {STEPS} steps.", ("diffusers", "transformers")
    )
    wanted = [part.strip().lower() for part in options.only.split(",") if part.strip()]
    chosen = {
        name: family
        for name, family in FAMILIES.items()
        if not wanted or any(part in name.lower() for part in wanted)
    }
    found = {name: measured(family) for name, family in chosen.items()}
    reasons = {} if wanted else {name: refused(kind) for name, kind in REFUSED.items()}
    notes: list[str] = []
    rows = [
        (name, FAMILIES[name].method[0], *(shown(row[c], notes) for c in COLUMNS))
        for name, row in found.items()
    ]
    rows += [(name, "", shown(text, notes), "", "", "") for name, text in reasons.items()]
    print_table(("family", "solver", *COLUMNS), rows)
    for number, note in enumerate(notes, 1):
        print(f"{number}. {note}")
    if options.json is not None:
        write_json(options.json, record(found, reasons))


def record(found: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    """Returns what is written: the results and where they come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": str(date.today()),
        "commit": commit,
        "command": " ".join(["python", "benchmarks/pipelines.py", *sys.argv[1:]]),
        "versions": {
            "fewstep": fewstep.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
        "steps": STEPS,
        "families": dict(found),
        "refused": dict(reasons),
    }


if __name__ == "__main__":
    main()

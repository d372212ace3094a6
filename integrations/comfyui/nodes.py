"""The nodes. What they do is in ``fewstep.adapters.comfyui``; here is ComfyUI's interface only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.samplers
import folder_paths
import torch
from comfy.k_diffusion import sampling as k_diffusion_sampling

import fewstep
from fewstep.adapters import comfyui

CATEGORY = "sampling/fewstep"
PROFILES = "fewstep"
"""The folder of profiles and recipes in ComfyUI's output folder."""


def _folder() -> Path:
    return Path(folder_paths.get_output_directory()) / PROFILES


def _files() -> list[str]:
    folder = _folder()
    return sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []


def _steps(**options: Any) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": 10, "min": 1, "max": 1000, **options})


class FewstepSampler:
    """A SAMPLER of a solver."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = "A solver of fewstep, for SamplerCustom."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        solvers = ["auto", *(name for name in fewstep.SOLVERS if name != "multistep")]
        return {
            "required": {"solver": (solvers, {"default": "auto"})},
            "optional": {
                "eta": (
                    "FLOAT",
                    {
                        "default": -1.0,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "The share of noise of solvers that have the option; -1 is their default.",
                    },
                )
            },
        }

    def sampler(self, solver: str, eta: float = -1.0) -> tuple[Any]:
        """Returns the sampler."""
        options = {} if eta < 0 else {"eta": eta}
        if options and solver != "auto":
            fewstep.solvers.solver(solver, **options)  # says so if it has no eta
        return (comfy.samplers.KSAMPLER(comfyui.sampler_function(solver, **options)),)


class FewstepSigmas:
    """The SIGMAS of a grid."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "sigmas"
    CATEGORY = CATEGORY
    DESCRIPTION = "The noise levels of a grid of fewstep, for SamplerCustom."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        grids = [
            name for name in fewstep.GRIDS if name not in ("explicit", "lambda", "exponential")
        ]
        return {
            "required": {
                "model": ("MODEL",),
                "grid": (grids, {"default": "logistic"}),
                "steps": _steps(),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            }
        }

    def sigmas(self, model: Any, grid: str, steps: int, denoise: float = 1.0) -> tuple[Any]:
        """Returns the levels."""
        sampling = model.get_model_object("model_sampling")
        options = {} if denoise == 1 else {"strength": denoise}
        return (comfyui.sigmas(sampling, grid, steps, **options),)


class FewstepMeasured:
    """A SAMPLER and SIGMAS of a profile or a recipe."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "measured"
    CATEGORY = CATEGORY
    DESCRIPTION = "What was measured of a model: its best sampler for a number of steps, and its noise levels."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        return {
            "required": {
                "model": ("MODEL",),
                "file": (_files() or ["(measure a model first)"],),
                "steps": _steps(),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, file: str, steps: int) -> float:
        """Returns the time at which the file was written."""
        del model, steps
        path = _folder() / file
        return path.stat().st_mtime if path.is_file() else 0.0

    def measured(self, model: Any, file: str, steps: int) -> tuple[Any, Any]:
        """Returns the sampler and the levels."""
        path = _folder() / file
        sampling = model.get_model_object("model_sampling")
        levels = comfyui.sigmas_of(comfyui.load(path), sampling, steps)
        return comfy.samplers.KSAMPLER(comfyui.file_function(path)), levels


class FewstepMeasure:
    """Measures the loaded model."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "measure"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Measures which sampler suits the model with its prompt and guidance (fewstep fit); writes a profile."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent": ("LATENT",),
                "cfg": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "budgets": ("STRING", {"default": "5,8,10"}),
                "trajectories": ("INT", {"default": 8, "min": 4, "max": 64}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "name": ("STRING", {"default": "profile"}),
            }
        }

    OTHERS: ClassVar[str] = "/\\:"

    def measure(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        cfg: float,
        budgets: str,
        trajectories: int,
        seed: int,
        name: str,
    ) -> tuple[str]:
        """Returns the profile as a table; it is written to output/fewstep/NAME.json."""
        numbers = comfyui.parse_budgets(budgets)
        if not name or any(c in name for c in self.OTHERS) or name.startswith("."):
            raise ValueError(f"name must be the plain name of a file, got {name!r}")
        found: list[Any] = []
        function = comfyui.measure_function(found.append, numbers, seed=seed)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        shape = (trajectories, *latent["samples"].shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        levels = comfyui.sigmas(model.get_model_object("model_sampling"), "log-rho", 2)
        guider.sample(
            noise, torch.zeros(shape), comfy.samplers.KSAMPLER(function), levels, seed=seed
        )
        _folder().mkdir(parents=True, exist_ok=True)
        found[0].save(_folder() / f"{name}.json")
        return (comfyui.report(found[0]),)


NODE_CLASS_MAPPINGS = {
    "FewstepSampler": FewstepSampler,
    "FewstepSigmas": FewstepSigmas,
    "FewstepMeasured": FewstepMeasured,
    "FewstepMeasure": FewstepMeasure,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FewstepSampler": "Sampler (fewstep)",
    "FewstepSigmas": "Sigmas (fewstep)",
    "FewstepMeasured": "Measured sampler (fewstep)",
    "FewstepMeasure": "Measure model (fewstep)",
}


def register() -> None:
    """Adds solvers and grids to KSampler's lists; once, and nothing that is there is replaced."""
    for solver in comfyui.SAMPLERS:
        name = comfyui.listed(solver)
        if name in comfy.samplers.SAMPLER_NAMES:
            continue
        setattr(k_diffusion_sampling, f"sample_{name}", comfyui.sampler_function(solver))
        for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES):
            if name not in names:
                names.append(name)
    for grid in comfyui.SCHEDULERS:
        name = comfyui.listed(grid)
        if name in comfy.samplers.SCHEDULER_NAMES:
            continue
        handler = comfy.samplers.SchedulerHandler(comfyui.scheduler_function(grid))
        comfy.samplers.SCHEDULER_HANDLERS[name] = handler
        comfy.samplers.SCHEDULER_NAMES.append(name)

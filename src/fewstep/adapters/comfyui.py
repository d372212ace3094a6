r"""What the ComfyUI node pack in ``integrations/comfyui`` stands on: samplers, noise levels and measurements.

Nothing of ComfyUI is imported: its objects are recognised by what they do. A *model sampling* is what
``model.get_model_object("model_sampling")`` returns: it has the table ``sigmas``, ``timestep(sigma)`` and
``noise_scaling(sigma, noise, latent)``. A *model* is what ComfyUI hands to a sampler function:
``model(x, sigma, **extra_args)`` returns the denoised data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters import kdiffusion
from fewstep.base.files import read_json
from fewstep.diffusion.grids import GRIDS
from fewstep.diffusion.grids import grid as make_grid
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule, Tabulated
from fewstep.models.denoiser import Denoiser
from fewstep.sampling.profile import FORMAT, GRIDS_FORMAT, Profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve_plan
from fewstep.solvers import SOLVERS
from fewstep.studies.fit import fit

SAMPLERS = (
    *("auto", "tab2", "tab3", "unipc2", "unipc3", "dpmpp-3m", "logrhoab2", "res-3m"),
    *("res-2s", "res-3s", "krogstad-4s", "accelerated-ddim", "er-sde", "sa-solver"),
)
"""The solvers that are added to KSampler's list, as ``fewstep_tab3``: those that ComfyUI has not, or has otherwise."""

SCHEDULERS = ("logistic", "quadratic", "polyexponential")
"""The grids that are added to its list of schedulers, as ``fewstep_logistic``."""

OF_TIMESTEPS = frozenset(
    {"uniform", "quadratic", "power", "normal", "sgm-uniform", "simple", "beta"}
)
"""The grids that are placed in timesteps; of a flow these are shifted as the model says."""


def is_flow(model_sampling: Any) -> bool:
    """Whether a model's states are those of a rectified flow, (1 - sigma) of the data and sigma of the noise."""
    half = torch.tensor([0.5])
    data = model_sampling.noise_scaling(half, torch.zeros(1, 1), torch.ones(1, 1))
    return abs(float(data) - 0.5) < 1e-6


def schedule_of(model_sampling: Any) -> NoiseSchedule:
    """Returns the noise schedule of a model.

    A table whose timesteps are its indices is :class:`fewstep.diffusion.schedules.Tabulated`; a rectified flow is
    one; all others are EDM's, whose time is sigma.
    """
    sigmas = model_sampling.sigmas.detach().double().cpu()
    if is_flow(model_sampling):
        return _flow(min(float(sigmas[-1]), kdiffusion.PURE_NOISE))
    ends = model_sampling.timestep(model_sampling.sigmas[[0, -1]]).double().tolist()
    # What is kept must not be made of tensors of inference mode, in which ComfyUI runs.
    if len(sigmas) > 1 and ends == [0.0, float(len(sigmas) - 1)]:
        return _table(tuple(sigmas.tolist()))
    return _edm(float(sigmas[0]), float(sigmas[-1]))


@functools.lru_cache(maxsize=8)
def _flow(high: float) -> Flow:
    return Flow(high)


@functools.lru_cache(maxsize=8)
def _edm(low: float, high: float) -> EDM:
    return EDM(low, high)


@functools.lru_cache(maxsize=8)
def _table(sigmas: tuple[float, ...]) -> Tabulated:
    with torch.inference_mode(False):
        levels = torch.tensor(sigmas, dtype=torch.float64)
        return Tabulated(alphas_cumprod=1 / (1 + levels.square()))


def sigmas(model_sampling: Any, grid: str, steps: int, **options: Any) -> Tensor:
    """Returns the noise levels of a grid for a model, (K + 1), float32, the last one 0.

    Arguments:
        model_sampling: The model sampling.
        grid: A name in :data:`fewstep.GRIDS`, or that of ComfyUI.
        steps: The number of steps K.
        options: Options of the grid.

    Raises:
        ValueError, TypeError: If the grid is unknown, or does not have such steps or options.
    """
    schedule = schedule_of(model_sampling)
    ours, meant = GRIDS.own(grid)
    GRIDS[ours]
    time_grid = make_grid(ours, schedule, steps, **{"to_zero": True, **meant, **options})
    if not isinstance(schedule, Flow):
        return time_grid.rho.float()
    levels = time_grid.sigma
    # A flow may begin at pure noise there.
    top = float(model_sampling.sigmas[-1])
    if top > float(levels[0]):
        levels = torch.cat([levels.new_tensor([top]), levels[1:]])
    if ours in OF_TIMESTEPS:
        shift = _shift(model_sampling)
        levels = shift * levels / (1 + (shift - 1) * levels)
    return levels.float()


def _shift(model_sampling: Any) -> float:
    """Returns the shift of a flow, from the middle of its table: m / (m + 1) at half of the time."""
    table = model_sampling.sigmas
    middle = float(table[len(table) // 2 - 1]) if len(table) > 1 else 0.5
    return middle / (1 - middle)


def sampler_function(solver: str, **options: Any) -> Callable[..., Tensor]:
    """Returns a sampler function of ComfyUI, ``f(model, x, sigmas, extra_args, callback, disable)``.

    Arguments:
        solver: A name in :data:`fewstep.SOLVERS`, or ``"auto"``.
        options: Options of the solver.

    Raises:
        ValueError: If there is no such solver.
    """
    if solver != "auto":
        SOLVERS[solver]

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        noise_sampler: kdiffusion.NoiseSampler | None = None,
    ) -> Tensor:
        del disable  # ComfyUI shows its own progress, through the callback
        if len(sigmas) < 2:
            return x
        sampling = model_sampling_of(model)
        flow, schedule = is_flow(sampling), schedule_of(sampling)
        top = float(sampling.sigmas[-1])
        if float(sigmas[0]) > top * 1.001:  # levels of the user's, beyond the model's
            schedule = None
        return kdiffusion.sampler(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            solver=solver,
            schedule=schedule,
            flow=flow,
            noise_sampler=noise_sampler,
            seed=_seed(extra_args) if noise_sampler is None else None,
            **options,
        )

    sample.__name__ = f"sample_fewstep_{solver.replace('-', '_')}"
    return sample


def file_function(path: str | Path) -> Callable[..., Tensor]:
    """Returns a sampler function of a file: a profile (of :func:`fewstep.fit`) or a recipe.

    The noise levels given to it say where it begins and, of a profile, in how many steps.

    Raises:
        ValueError: If the file is neither.
    """
    content = load(path)

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        del disable
        return kdiffusion.sampler(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            flow=is_flow(model_sampling_of(model)),
            seed=_seed(extra_args),
            profile=content if isinstance(content, Profile) else None,
            recipe=content if isinstance(content, SamplerRecipe) else None,
        )

    return sample


def load(path: str | Path) -> Profile | SamplerRecipe:
    """Reads a profile or a recipe, by what the file says it is."""
    content = read_json(Path(path), what="profile or recipe")
    kind = content.get("format") if isinstance(content, dict) else None
    return Profile.load(path) if kind in (FORMAT, GRIDS_FORMAT) else SamplerRecipe.load(path)


def model_sampling_of(model: Any) -> Any:
    """Returns the model sampling of what ComfyUI hands to a sampler function."""
    guider = getattr(model, "inner_model", None)
    patcher = getattr(guider, "model_patcher", None)
    if patcher is not None:
        return patcher.get_model_object("model_sampling")
    sampling = getattr(getattr(guider, "inner_model", None), "model_sampling", None)
    if sampling is None:
        raise TypeError(
            f"{type(model).__name__} has no model sampling; use a sampler node of ComfyUI, or "
            "fewstep.adapters.kdiffusion.sampler"
        )
    return sampling


def _seed(extra_args: Mapping[str, Any] | None) -> int | None:
    seed = (extra_args or {}).get("seed")
    return seed if isinstance(seed, int) else None


def denoiser_of(model: Any, x: Tensor, extra_args: Mapping[str, Any] | None = None) -> Denoiser:
    r"""Returns a model, with its conditioning and guidance, as a :class:`fewstep.Denoiser`.

    Arguments:
        model: What ComfyUI hands to a sampler function.
        x: A state, for its shape and device, (B, \*).
        extra_args: What it hands along.
    """
    sampling = model_sampling_of(model)
    schedule, flow = schedule_of(sampling), is_flow(sampling)
    extra = dict(extra_args or {})

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scale = alpha + sigma if flow else alpha
        wide = scale.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return model(x / wide, (sigma / scale).to(x), **extra)

    return Denoiser.wrap(
        network,
        schedule=schedule,
        prediction="x0",
        event_shape=tuple(x.shape[1:]),
        device=x.device,
    )


def measure_function(
    done: Callable[[Profile], Any], budgets: Sequence[int], *, seed: int = 0
) -> Callable[..., Tensor]:
    """Returns a sampler function that measures the model (:func:`fewstep.fit`) instead of sampling.

    ComfyUI loads the model and prepares its conditioning as for any run; the batch is the number of trajectories.

    Arguments:
        done: Gets the profile.
        budgets: The numbers of evaluations to measure for.
        seed: The seed of the measurement.
    """

    def measure(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        del sigmas, callback, disable
        # ComfyUI is in inference mode, whose tensors cannot be used elsewhere.
        with torch.inference_mode(False), torch.no_grad():
            denoiser = denoiser_of(model, x, extra_args)
            done(fit(denoiser, tuple(budgets), n=len(x), seed=seed))
        return x

    return measure


def sigmas_of(content: Profile | SamplerRecipe, model_sampling: Any, steps: int) -> Tensor:
    """Returns the noise levels of a profile for a number of steps, or of a recipe.

    Raises:
        ValueError: If it was made for another schedule than the model's.
    """
    schedule, flow = schedule_of(model_sampling), is_flow(model_sampling)
    if isinstance(content, Profile):
        plan = resolve_plan(content.schedule, SamplerRequest(profile=content, nfe=steps)).plan
    else:
        plan = content.plan_for(schedule)
    first = float(plan.grid.rho[0])
    top = float(schedule.rho(torch.tensor(schedule.t_max, dtype=torch.float64)))
    if abs(first - top) > 1e-3 * top and not plan.head:
        raise ValueError(
            f"the file begins at sigma / alpha = {first:.5g}, the model at {top:.5g}: it was made for another model"
        )
    rho = plan.grid.rho
    return (rho / (1 + rho) if flow else rho).float()


def listed(name: str) -> str:
    """Returns the name of a solver or a grid in ComfyUI's lists."""
    return f"fewstep_{name.replace('-', '_')}"


def scheduler_function(grid: str) -> Callable[[Any, int], Tensor]:
    """Returns a scheduler of ComfyUI, ``f(model_sampling, steps)``."""
    GRIDS[grid]
    return lambda model_sampling, steps: sigmas(model_sampling, grid, steps)


def parse_budgets(text: str) -> tuple[int, ...]:
    """Returns numbers of evaluations as they are written, ``5,8,10``.

    Raises:
        ValueError: If it is not a list of positive integers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"budgets are numbers of evaluations such as 5,8,10; got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def report(profile: Profile) -> str:
    """Returns a profile as lines of text: what is recommended for each number of evaluations."""
    lines = []
    for row in profile.table():
        error = "" if row["error"] is None else f", error {row['error']:.3g}"
        if error and row["default_error"] is not None:
            error += f" (default {row['default_error']:.3g})"
        lines.append(f"{row['steps']} steps: {row['solver']}{error}")
    return "\n".join(lines)

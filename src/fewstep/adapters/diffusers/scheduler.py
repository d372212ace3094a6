r"""``PlanScheduler``: any solver, plan or recipe of ours in a pipeline of diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from fewstep.adapters.diffusers.configurations import (
    alphas_cumprod,
    betas,
    check_config,
    class_of,
    completed,
    family_of,
    is_continuous,
    positive_levels,
    prediction_of,
    schedule_of,
)
from fewstep.adapters.diffusers.keys import KEYS, MODEL_KEYS
from fewstep.adapters.diffusers.noising import Noising
from fewstep.adapters.diffusers.recipes import (
    read_recipe,
    solver_name,
    spacing_name,
    without_scaling,
)
from fewstep.adapters.diffusers.stepping import Stepping
from fewstep.base.registry import unknown
from fewstep.diffusion.grids import GRIDS
from fewstep.diffusion.schedules import Flow
from fewstep.sampling.profile import Profile, names_profile
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import check_sources
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers import solver as make_solver
from fewstep.solvers.base import NO_PLAN

READS_ALPHA_TO_ONE = ("ddim", "gddim", "pndm")
"""Solvers whose twins end where ``set_alpha_to_one`` says; the others' do not read it."""


class PlanScheduler(Stepping, Noising, SchedulerMixin, ConfigMixin):
    r"""Any fewstep solver, plan or recipe as a scheduler of diffusers.

    Cost: one network evaluation for each entry of ``timesteps``.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from fewstep.adapters.diffusers import PlanScheduler
        >>> scheduler = PlanScheduler.from_config(DDIMScheduler().config, solver="tab3")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist(), scheduler.plan.nfe
        ([999, 749, 500, 250], 4)

    All coefficients are planned in float64 by :meth:`set_timesteps`; a step is a linear row of the
    plan and reads nothing from the device. The state is kept in float32 or float64, whatever the
    pipeline's type is. The state of a run belongs to the thread that made it, so that one pipeline
    may serve many threads at once.

    **Steps.** ``num_inference_steps`` counts the solver's steps, as in diffusers. For multistep
    methods these are network evaluations. A method of k stages makes up to k evaluations a step; each stage is
    in ``timesteps`` and ``order`` is k (pndm: three more evaluations in each of its first three steps).
    With ``count="calls"`` it is a budget of network evaluations: the most steps that fit into it.

    **Where it steps.** Without ``grid``, at the timesteps that the configuration describes
    (``timestep_spacing``, ``steps_offset``, ``use_karras_sigmas``, ...), those of the solver's
    twin in diffusers; for ``solver="auto"`` on the grid that belongs to the choice.
    ``grid="auto"`` is the solver's own grid in fewstep. Between training timesteps :math:`\lambda` is
    linear in time (diffusers: :math:`\sigma / \alpha`), and the network is conditioned on the fractional
    time, in float32; ``integer_times`` moves steps to training timesteps instead.

    **Mid-way starts** (img2img: ``set_begin_index``, or a first ``step`` at a later timestep) get a
    plan of their own on the rest of the grid.

    **Pure noise.** With a zero terminal signal-to-noise ratio the last
    :math:`\alpha` is taken as 1e-6, and flow models are conditioned on :math:`\sigma = 1` while the
    coefficients are those of 1 - 1e-6. Coefficients are merged with the prediction's in float64,
    so that nothing is amplified for v, x0 and flow predictions. An epsilon-prediction has no information
    on the data there: for it the last :math:`\alpha` is half of the one before.

    **Clipping and thresholding** of configurations that ask for them are applied to the predicted
    data of each evaluation: exact for any solver. DDIM keeps the predicted noise as it is, as in
    diffusers, unless ``step`` is asked for ``use_clipped_model_output``.

    Arguments:
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"``, or a family (``"tab"``, ``"rhoab"``,
            ``"logrhoab"``, ``"dpmpp"``, ``"unipc"``) whose order is ``solver_order``.
        solver_options: Options of the solver, e.g. ``{"eta": 0.5}``; the statistics of ``dpm-solver-v3`` may be the path of
            a profile, whose numbers are then stored in the configuration.
        solver_order: The order of a solver given by its family.
        grid: A name in :data:`fewstep.GRIDS`, ``"auto"``, ``"auto:FILE"`` for the grids that
            ``fewstep analyze`` fitted, or nothing: see above.
        grid_options: Options of the grid, e.g. ``{"rho": 5.0}``.
        recipe: A recipe or a plan, as a path or as JSON text, instead of a solver. The text is
            stored in the configuration, so that it is saved with the pipeline.
        profile: The file of what was measured of the model (:func:`fewstep.fit`), for the solver
            ``"auto"``; the same as ``grid="auto:FILE"``. A start in mid-schedule takes UniPC-3 on
            the rest of the measured times, since measured weights hold from the first step on.
        count: What ``num_inference_steps`` counts: ``"steps"`` or ``"calls"``.
        integer_times: Whether the network is conditioned on integer timesteps only.
        num_train_timesteps: The number of training timesteps.
        beta_start: The first :math:`\beta`.
        beta_end: The last.
        beta_schedule: ``"linear"``, ``"scaled_linear"`` or ``"squaredcos_cap_v2"``.
        trained_betas: All :math:`\beta`, instead.
        prediction_type: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"flow_prediction"``.
            A configuration of a flow scheduler, which has no such key, means the last.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"``; left out, that of the
            solver's twin.
        steps_offset: Added to the timesteps of ``"leading"``.
        final_sigmas_type: ``"zero"`` or ``"sigma_min"``, the level at which sampling ends; left
            out, that of the solver's twin. Flow models end at zero.
        set_alpha_to_one: The same in the words of DDIM and PNDM, used without ``final_sigmas_type``.
        lower_order_final: Whether the order falls in the last steps, below 15 steps (unipc:
            always), for the solvers whose twins do so.
        rescale_betas_zero_snr: Whether the last level has no signal.
        snr_shift_scale: By what the signal-to-noise ratio of all levels is divided (CogVideoX).
        timestep_type: ``"continuous"``, with v-prediction: the network is conditioned on
            :math:`\frac14 \ln \sigma` of any level (Stable Video Diffusion).
        sigma_min: The lowest level of Karras, exponential and beta spacing, and of a continuous model.
        sigma_max: The highest.
        original_inference_steps: The number of evenly spaced times at which the network was distilled (LCM, TCD);
            a count of steps then chooses among those. Left out, among all training timesteps.
        lambda_min_clipped: Grids in timesteps start at the first level whose :math:`\lambda` is
            at least this.
        use_karras_sigmas: Spacing in :math:`(\sigma / \alpha)^{1/7}`.
        use_exponential_sigmas: Spacing in :math:`\lambda`.
        use_beta_sigmas: Spacing by quantiles of a beta distribution; needs scipy.
        use_lu_lambdas: Spacing in :math:`\lambda`.
        use_flow_sigmas: Whether the model is a flow model, spaced as by diffusers' DPM-Solver.
        flow_shift: The shift of flow levels; it multiplies ``shift``.
        shift: The shift of flow levels.
        use_dynamic_shifting: Whether the shift comes from ``set_timesteps(mu=...)``; if not, mu
            is not used, as in diffusers.
        time_shift_type: ``"exponential"`` or ``"linear"``, what mu means.
        base_shift: Read by pipelines that compute mu.
        max_shift: Likewise.
        base_image_seq_len: Likewise.
        max_image_seq_len: Likewise.
        shift_terminal: The level that the last flow level is stretched to.
        invert_sigmas: Must be false: time must grow with the noise.
        interpolation_type: Must be ``"linear"``.
        stochastic_sampling: Must be false: take a stochastic solver.
        clip_sample: Whether the predicted data are clipped.
        clip_sample_range: To which range.
        thresholding: Whether the predicted data are thresholded dynamically.
        dynamic_thresholding_ratio: The quantile of that.
        sample_max_value: The largest threshold.
        variance_type: ``"fixed_large"`` is the option of the solver ddpm. If the network returns
            twice as many channels as the state has, the second half, a variance, is not used.
        noise_seed: Seeds the draws of a run of a stochastic solver whose pipeline passes no generator
            to ``step`` (Flux and other flow pipelines); left out, torch's global generator draws.
        algorithm_type: Kept for other schedulers made from this configuration.
        solver_type: Likewise.

    Raises:
        ValueError: If an option is not known or cannot be followed; the message names it.
    """

    __module__ = "fewstep.adapters.diffusers"  # what saved pipelines name
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 - the base's convention
    _compatibles += ["FlowMatchEulerDiscreteScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        solver: str = "auto",
        solver_options: dict[str, Any] | None = None,
        solver_order: int = 2,
        grid: str | None = None,
        grid_options: dict[str, Any] | None = None,
        recipe: str | None = None,
        profile: str | None = None,
        count: str = "steps",
        integer_times: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str | None = None,
        steps_offset: int = 0,
        final_sigmas_type: str | None = None,
        set_alpha_to_one: bool | None = None,
        lower_order_final: bool = True,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        timestep_type: str = "discrete",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        original_inference_steps: int | None = None,
        lambda_min_clipped: float = -math.inf,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        interpolation_type: str = "linear",
        stochastic_sampling: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        noise_seed: int | None = None,
        algorithm_type: str | None = None,
        solver_type: str | None = None,
    ) -> None:
        check_config(self.config, type(self).__name__)
        prediction_of(self.config)
        is_continuous(self.config)
        _one_of("count", count, ["steps", "calls"])
        _one_of("time_shift_type", time_shift_type, ["exponential", "linear"])
        if grid not in (None, "auto") and not names_profile(grid):
            GRIDS[grid]
        chosen = [use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas]
        if sum(map(bool, chosen)) > 1:
            raise ValueError(
                "only one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and "
                "use_lu_lambdas can be on"
            )
        name = solver_name(solver, solver_order)
        for key, value in (("solver_options", solver_options), ("grid_options", grid_options)):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{key} must be a dict of options, got {value!r:.60}")
        if profile is not None and not isinstance(profile, (str, Path)):
            raise ValueError(f"profile must be the path of a profile, got {profile!r:.60}")
        check_sources(
            SamplerRequest(
                None if solver == "auto" else name,
                grid=grid,
                options={**(solver_options or {}), **(grid_options or {})},
                recipe=recipe,
                profile=profile,
            )
        )
        if profile is not None:
            Profile.load(profile)  # for its message, if it cannot be read
        method = None
        if name != "auto":  # wrong names and options end here
            solver_options = self._with_statistics(name, solver_options)
            method = make_solver(name, **(solver_options or {}))
            if method.adaptive:
                raise ValueError(NO_PLAN.format(name))
        self.betas = betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = positive_levels(alphas_cumprod(self.config), prediction_type)
        self.schedule = schedule_of(self.config, self.alphas_cumprod)
        self._recipe: SamplerRecipe | None = None
        if recipe is not None:
            self._recipe, text = read_recipe(recipe)
            self.register_to_config(recipe=text)
            if self._recipe.plan is not None:
                self._recipe.plan.check_schedule(self.schedule)
        spaced = None if method is None else make_solver(spacing_name(solver, name))
        self._settle(spaced, timestep_spacing, final_sigmas_type, set_alpha_to_one)
        self.order = 1
        if count == "steps" and name not in ("auto", "pndm") and self._recipe is None:
            method = make_solver(name)
            self.order = method.nfe(3) - method.nfe(2)
        # Of the twins only Heun's, whose state is x / alpha, begins at the exact sigma.
        exact = name == "heun" and self.config["timestep_spacing"] != "leading"
        self.init_noise_sigma: float = self.schedule.prior_std() if exact else 1.0
        if self._recipe is not None and self._recipe.plan is not None:
            self.init_noise_sigma = without_scaling(self._recipe.plan)[1]
        self._reset(*self._initial_tensors())

    def _with_statistics(self, name: str, options: dict[str, Any] | None) -> dict[str, Any] | None:
        """Returns the options of a solver with the statistics of a profile in place of its path, also in the configuration."""
        key = SOLVERS[name]().measured
        path = (options or {}).get(key) if key is not None else None
        if key is None or not isinstance(path, str):
            return options
        options = {**(options or {}), key: [list(row) for row in Profile.load(path).of_model()]}
        self.register_to_config(solver_options=options)
        return options

    def _settle(
        self, method: Solver | None, spaces: str | None, final: str | None, to_one: bool | None
    ) -> None:
        """Writes what was left to the solver's twin into the configuration."""
        if spaces is None:
            spaces = "linspace" if method is None else method.spacing
        _one_of("timestep_spacing", spaces, ["linspace", "leading", "trailing"])
        if final is None:
            above = method is not None and method.ends_above_zero
            if to_one is not None and method is not None and method.name in READS_ALPHA_TO_ONE:
                above = not to_one
            final = "sigma_min" if above else "zero"
        _one_of("final_sigmas_type", final, ["zero", "sigma_min"])
        if to_one is None:
            to_one = final == "zero"
        self.register_to_config(
            timestep_spacing=spaces, final_sigmas_type=final, set_alpha_to_one=to_one
        )
        used = self.config.get("_use_default_values")
        if used is not None:
            # Schedulers made from this one get the model's values, not their own defaults for them.
            defaults = [k for k in used if k not in MODEL_KEYS or self.config[k] is None]
            self.register_to_config(_use_default_values=sorted(defaults))

    def _initial_tensors(self) -> tuple[Tensor, Tensor]:
        count = self.config["num_train_timesteps"]
        if isinstance(self.schedule, Flow):
            sigmas = torch.linspace(1, 1 / count, count)
            return sigmas * count, sigmas
        timesteps = torch.arange(count - 1, -1, -1, dtype=torch.float32)
        return timesteps, ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Makes the scheduler from the configuration of any other; ``kwargs`` replace its values.

        As everywhere in diffusers, what the other left at its defaults becomes our default; except
        what belongs to the model: its noise levels, prediction, shift and clipping. Flow schedulers
        have no ``prediction_type``: theirs is ``"flow_prediction"``. ``docs/diffusers.md`` lists all
        keys and what becomes of them.

        Raises:
            ValueError: If a key of the configuration changes levels, times or the prediction in a way
                that is not understood, or it is of EDM's preconditioning: those pipelines leave the
                scaling of the network's input to the scheduler, which this one does not do.
            TypeError: If there is no such option.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"config must be a configuration, such as pipe.scheduler.config, got {config!r:.60}"
            )
        known = inspect.signature(cls.__init__).parameters
        strange = [k for k in kwargs if k not in known and k not in KEYS]
        if strange and not return_unused_kwargs:
            raise TypeError(unknown("option of PlanScheduler", strange[0], list(known)))
        check_config({**config, **kwargs}, class_of(config) or cls.__name__)
        # With betas it is one of ours that went through EDM's class.
        edm = family_of(config) == "edm" or "sigma_data" in config
        if edm and "beta_schedule" not in config:
            raise ValueError(
                "PlanScheduler does not scale a network's input as EDM's preconditioning asks "
                "(sigma_data); load the pipeline with fewstep.load(folder) and use fewstep.sample"
            )
        config = {k: v for k, v in completed(config).items() if k not in _replaced(kwargs)}
        used = config.get("_use_default_values")
        if used is not None:
            defaults = [
                k for k in used if edm or k not in MODEL_KEYS or config[k] == known[k].default
            ]
            config = {**config, "_use_default_values": defaults}
        if family_of(config) == "flow" and "prediction_type" not in config:
            kwargs.setdefault("prediction_type", "flow_prediction")
        return super().from_config(dict(config), return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def _replaced(kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Returns the keys of an earlier sampler that a new solver, recipe or profile replaces."""
    whole = [key for key in ("recipe", "profile") if kwargs.get(key) is not None]
    if whole:
        keys = {"solver", "solver_options", "grid", "grid_options", "recipe", "profile"}
    else:
        keys = {"recipe", "profile"} if "solver" in kwargs else set()
    return frozenset(keys - set(kwargs))


def _one_of(name: str, value: object, known: list[str]) -> None:
    if value not in known:
        raise ValueError(unknown(name, value, known))

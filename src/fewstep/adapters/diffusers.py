r"""fewstep in diffusers: our plans in their pipelines, their schedulers as plans, their models as denoisers.

This module's path is permanent: saved pipelines name it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import (
    KarrasDiffusionSchedulers,
    SchedulerMixin,
    SchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.adapters import _spacing as spacing
from fewstep.adapters._loading import load_denoiser as load_denoiser
from fewstep.adapters._probing import plan_from_scheduler as plan_from_scheduler
from fewstep.analysis import convert_plan
from fewstep.execute import Execution
from fewstep.grids import GRIDS, TimeGrid
from fewstep.planning import choose
from fewstep.plans import Eval, Lin, Plan, Structure
from fewstep.prediction import Prediction, coefficients
from fewstep.recipe import SamplerRecipe
from fewstep.registry import unknown
from fewstep.schedules import Flow
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers import solver as make_solver

__all__ = ["PlanScheduler", "load_denoiser", "load_pipeline", "plan_from_scheduler"]

PREDICTIONS = {
    "epsilon": Prediction.EPS,
    "sample": Prediction.X0,
    "v_prediction": Prediction.V,
    "flow_prediction": Prediction.FLOW,
}
"""What diffusers calls the predictions."""

LOWERED_BELOW = 15
"""Below so many steps diffusers lowers the order of the last ones (``lower_order_final``)."""

ENDS_ABOVE_ZERO = ("tab", "rhoab", "logrhoab", "ipndm", "pndm", "rho-", "ei-score", "euler")
"""Solvers that end at the lowest trained level unless told otherwise, as DEIS and PNDM there."""

LOWERS_FINAL = ("logrhoab", "dpmpp", "unipc")
"""Solvers whose twins obey ``lower_order_final``."""

LARGEST_JUMP = 200.0
"""The most by which one step of several stages may divide sigma / alpha: that is its amplification."""

OF_THE_MODEL = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""What a configuration says about the noise levels."""

MOST_CACHED = 32


class _Setup(NamedTuple):
    """What ``set_timesteps`` decides; shared among threads and never changed.

    Attributes:
        plan: The plan, in the prediction that the pipeline's network makes or in the solver's own.
        grid: The grid, or ``None`` for a stored plan.
        solver: The solver, or ``None`` for a stored plan.
        told: What the network is told at each call.
        factors: For each call the map from the network's answer to the plan's, or ``None``.
        reshapes: Whether the predicted data are clipped or thresholded.
    """

    plan: Plan
    grid: TimeGrid | None
    solver: Solver | None
    told: tuple[float, ...]
    factors: tuple[tuple[float, float], ...] | None
    reshapes: bool


class _Run:
    """The state of one run on one thread."""

    def __init__(self, setup: _Setup | None, timesteps: Tensor, sigmas: Tensor) -> None:
        self.setup, self.timesteps, self.sigmas = setup, timesteps, sigmas
        self.active = setup
        self.pointer, self.size = timesteps.data_ptr(), timesteps.element_size()
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self.offset = 0
        self.execution: Execution | None = None
        self.sample: Tensor | None = None
        self.dtype = torch.float32
        self.generator: Any = None
        self.variance_noise: Tensor | None = None
        self.like: Tensor | None = None

    def expects(self, timestep: Any) -> bool:
        """Returns whether this is the next entry of ``timesteps`` itself; reads nothing from the device."""
        if not isinstance(timestep, Tensor) or self.step_index is None:
            return False
        return timestep.data_ptr() == self.pointer + self.step_index * self.size

    def draw(self, index: int) -> Tensor:
        """Draws with the generator of the step that asks."""
        del index
        like = self.like
        assert like is not None
        if self.variance_noise is not None:
            noise = self.variance_noise
        else:
            noise = randn_tensor(
                like.shape, generator=self.generator, device=like.device, dtype=like.dtype
            )
        return noise.to(self.dtype)


class _PerThread:
    """A value for each thread; copies of it start with the value of the copying thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self) -> _Run | None:
        return getattr(self._local, "run", None)

    def set(self, run: _Run) -> None:
        self._local.run = run

    def __deepcopy__(self, memo: dict[int, Any]) -> _PerThread:
        import copy

        made = _PerThread()
        if (run := self.get()) is not None:
            made.set(copy.deepcopy(run, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _PerThread, ()


class PlanScheduler(SchedulerMixin, ConfigMixin):
    r"""Any fewstep solver, plan or recipe as a scheduler of diffusers.

    .. code-block:: python

        pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, solver="tab3")

    All coefficients are planned in float64 by :meth:`set_timesteps`; a step is a linear row of the
    plan and reads nothing from the device. The state is kept in float32 or float64, whatever the
    pipeline's type is. The state of a run belongs to the thread that made it, so that one pipeline
    may serve many threads at once.

    **Steps.** ``num_inference_steps`` counts the solver's steps, as in diffusers. For multistep
    methods these are network calls. A method of k stages makes up to k calls a step; each stage is
    in ``timesteps`` and ``order`` is k (pndm: three more calls in each of its first three steps).
    With ``count="calls"`` it is a budget of network calls: the most steps that fit into it.

    **Where it steps.** Without ``grid``, at the timesteps that the configuration describes
    (``timestep_spacing``, ``steps_offset``, ``use_karras_sigmas``, ...), those of the solver's
    twin in diffusers; for ``solver="auto"`` on the grid that belongs to the choice.
    ``grid="auto"`` is the solver's own grid in fewstep. Between trained levels :math:`\lambda` is
    linear in time (diffusers: :math:`\sigma / \alpha`), and the network is told the fractional
    time, in float32; ``integer_times`` moves steps to trained levels instead.

    **Mid-way starts** (img2img: ``set_begin_index``, or a first ``step`` at a later timestep) get a
    plan of their own on the rest of the grid.

    **Where nothing is left of the data.** With a zero terminal signal-to-noise ratio the last
    :math:`\alpha` is taken as 1e-6, and flow models are told :math:`\sigma = 1` while the
    coefficients are those of 1 - 1e-6. Coefficients are merged with the prediction's in float64,
    so that nothing is amplified for v, x0 and flow predictions. An epsilon-prediction cannot say
    what the data are there: for it the last :math:`\alpha` is half of the one before.

    **Clipping and thresholding** of configurations that ask for them are applied to the predicted
    data of each call (``use_clipped_model_output`` has no further effect): exact for any solver.

    Arguments:
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"``, or a family (``"tab"``, ``"rhoab"``,
            ``"logrhoab"``, ``"dpmpp"``, ``"unipc"``) whose order is ``solver_order``.
        solver_options: Options of the solver, e.g. ``{"eta": 0.5}``.
        solver_order: The order of a solver given by its family.
        grid: A name in :data:`fewstep.GRIDS`, ``"auto"``, or nothing: see above.
        grid_options: Options of the grid, e.g. ``{"rho": 5.0}``.
        recipe: A recipe or a plan, as a path or as JSON text, instead of a solver. The text is
            stored in the configuration, so that it is saved with the pipeline.
        count: What ``num_inference_steps`` counts: ``"steps"`` or ``"calls"``.
        integer_times: Whether the network is told whole timesteps only.
        num_train_timesteps: The number of trained levels.
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
        invert_sigmas: Not supported; must be false.
        clip_sample: Whether the predicted data are clipped.
        clip_sample_range: To which range.
        thresholding: Whether the predicted data are thresholded dynamically.
        dynamic_thresholding_ratio: The quantile of that.
        sample_max_value: The largest threshold.
        variance_type: ``"fixed_large"`` is the option of the solver ddpm. If the network returns
            twice as many channels as the state has, the second half, a variance, is not used.
        algorithm_type: Kept for other schedulers made from this configuration.
        solver_type: Likewise.
    """

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
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        algorithm_type: str | None = None,
        solver_type: str | None = None,
    ) -> None:
        del beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr
        _one_of("prediction_type", prediction_type, list(PREDICTIONS))
        _one_of("count", count, ["steps", "calls"])
        _one_of("time_shift_type", time_shift_type, ["exponential", "linear"])
        if grid not in (None, "auto"):
            GRIDS[grid]
        if invert_sigmas:
            raise ValueError("invert_sigmas is not supported: time must grow with the noise")
        chosen = [use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas]
        if sum(map(bool, chosen)) > 1:
            raise ValueError(
                "only one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and "
                "use_lu_lambdas can be on"
            )
        name = _solver_name(solver, solver_order)
        if name != "auto":
            make_solver(name, **(solver_options or {}))  # wrong names and options end here
        self.betas = spacing.betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = spacing.levels(torch.cumprod(self.alphas, dim=0), prediction_type)
        self.schedule = spacing.schedule_of(self.config, self.alphas_cumprod)
        self._recipe: SamplerRecipe | None = None
        if recipe is not None:
            self._recipe, text = _read_recipe(recipe)
            self.register_to_config(recipe=text)
            if self._recipe.plan is not None:
                self._recipe.plan.check_schedule(self.schedule)
        self._settle(name, timestep_spacing, final_sigmas_type, set_alpha_to_one)
        self.order = 1
        if count == "steps" and name not in ("auto", "pndm") and self._recipe is None:
            method = make_solver(name)
            self.order = method.nfe(3) - method.nfe(2)
        # Of the twins only Heun's, whose state is x / alpha, begins at the exact sigma.
        exact = name == "heun" and self._settings.timestep_spacing != "leading"
        self.init_noise_sigma: float = self.schedule.prior_std() if exact else 1.0
        if self._recipe is not None and self._recipe.plan is not None:
            self.init_noise_sigma = _without_scaling(self._recipe.plan)[1]
        self._cache: dict[Any, _Setup] = {}
        self._initial = self._initial_tensors()
        self._latest: tuple[_Setup, Tensor, Tensor] | None = None
        self._runs = _PerThread()

    def _settle(
        self, name: str, spaces: str | None, final: str | None, to_one: bool | None
    ) -> None:
        """Writes what was left to the solver's twin into the configuration."""
        if spaces is None:
            spaces = "leading" if name in ("ddim", "ddpm", "pndm") else "linspace"
        _one_of("timestep_spacing", spaces, ["linspace", "leading", "trailing"])
        if final is None:
            above = name.startswith(ENDS_ABOVE_ZERO) if to_one is None else not to_one
            final = "sigma_min" if above else "zero"
        _one_of("final_sigmas_type", final, ["zero", "sigma_min"])
        self.register_to_config(
            timestep_spacing=spaces, final_sigmas_type=final, set_alpha_to_one=final == "zero"
        )

    def _initial_tensors(self) -> tuple[Tensor, Tensor]:
        count = self._settings.num_train_timesteps
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
        its noise levels, which belong to the model. Flow schedulers have no ``prediction_type``:
        theirs is ``"flow_prediction"``.
        """
        if isinstance(config, Mapping) and "_use_default_values" in config:
            kept = [k for k in config["_use_default_values"] if k not in OF_THE_MODEL]
            config = {**config, "_use_default_values": kept}
        if isinstance(config, Mapping) and not {"prediction_type", "beta_schedule"} & set(config):
            if {"shift", "invert_sigmas", "shift_terminal", "base_image_seq_len"} & set(config):
                kwargs.setdefault("prediction_type", "flow_prediction")
        return super().from_config(dict(config), return_unused_kwargs, **kwargs)

    @property
    def _settings(self) -> Any:
        """The configuration: diffusers declares a dict and lets its keys be read as attributes."""
        return self.config

    # What a run is doing: attributes of the thread.

    def _run(self) -> _Run:
        run = self._runs.get()
        if run is None:
            if self._latest is None:
                run = _Run(None, *self._initial)
            else:
                run = _Run(*self._latest)
            self._runs.set(run)
        return run

    @property
    def timesteps(self) -> Tensor:
        """What the network is told at each call, on the device given to :meth:`set_timesteps`."""
        return self._run().timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        run = self._run()  # some pipelines put them back in another type
        if run.setup is None or value.shape != run.timesteps.shape:
            raise ValueError(
                "timesteps cannot be exchanged, as the plan belongs to them; "
                "call set_timesteps(timesteps=[...])"
            )
        run.timesteps = value
        run.pointer, run.size = value.data_ptr(), value.element_size()

    @property
    def sigmas(self) -> Tensor:
        r"""The levels :math:`\sigma / \alpha` (of a flow: :math:`\sigma`) at the calls and at the end, float32."""
        return self._run().sigmas

    @property
    def num_inference_steps(self) -> int | None:
        """The number of entries of ``timesteps``, once they are set."""
        run = self._run()
        return None if run.setup is None else len(run.timesteps)

    @property
    def plan(self) -> Plan | None:
        """The plan of this thread's run (or of the next, if it has not begun)."""
        run = self._run()
        return None if run.active is None else run.active.plan

    @property
    def step_index(self) -> int | None:
        """The index in ``timesteps`` of the next step, once a run has begun."""
        return self._run().step_index

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        run = self._run()
        if value is not None:
            raise ValueError(
                "a run cannot be moved; use set_begin_index before it, or set_timesteps"
            )
        run.step_index, run.execution, run.sample = None, None, None

    @property
    def begin_index(self) -> int | None:
        """The index at which a run begins; ``None`` if its first timestep says so."""
        return self._run().begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index in ``timesteps`` at which the next run begins."""
        run = self._run()
        run.begin_index = begin_index
        run.step_index, run.execution, run.sample = None, None, None

    def __len__(self) -> int:
        return int(self._settings.num_train_timesteps)

    # Planning.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        r"""Plans a run, for this thread.

        Arguments:
            num_inference_steps: The number of steps (see the class).
            device: The device of ``timesteps``.
            timesteps: The times at which steps begin, decreasing, instead.
            sigmas: The levels at which steps begin, instead: :math:`\sigma / \alpha`, for flow
                models :math:`\sigma` before the shift. A last 0 is the end. With ``timesteps``,
                these are what the network is told.
            mu: The shift of flow levels, with ``use_dynamic_shifting``.

        Raises:
            ValueError: If there is no such plan; the message has the mend.
        """
        if timesteps is None and sigmas is None:
            if num_inference_steps is None:
                raise ValueError("give num_inference_steps, timesteps or sigmas")
            n = num_inference_steps
            if isinstance(n, bool) or int(n) != n or n < 1:
                raise ValueError(f"num_inference_steps must be a positive integer, got {n!r}")
            num_inference_steps = int(n)
        times = None if timesteps is None else tuple(float(t) for t in timesteps)
        levels = None if sigmas is None else tuple(float(s) for s in sigmas)
        if self._settings.use_dynamic_shifting:
            mu = None if mu is None else float(mu)
        else:
            mu = None
        offset = self._settings.steps_offset  # pipelines may replace it after the making
        flags = (self._settings.clip_sample, self._settings.thresholding)
        key = (num_inference_steps, times, levels, mu, offset, *flags)
        setup = self._cached(key, lambda: self._setup(num_inference_steps, times, levels, mu))
        values = torch.tensor(setup.told, dtype=torch.float64)
        whole = bool((values == values.round()).all()) and not isinstance(self.schedule, Flow)
        told = values.to(torch.int64 if whole else torch.float32).to(device)
        self._latest = (setup, told, self._levels(setup))
        self._runs.set(_Run(*self._latest))

    def _cached(self, key: Any, make: Any) -> _Setup:
        found = self._cache.get(key)
        if found is None:
            found = make()
            if len(self._cache) >= MOST_CACHED:
                self._cache = {}
            self._cache[key] = found
        return found

    def _levels(self, setup: _Setup) -> Tensor:
        ends = setup.plan.knots[-1:]
        times = torch.cat([setup.plan.times, ends])
        zero = float(ends) <= self.schedule.t_zero
        inner = times[:-1] if zero else times
        if isinstance(self.schedule, Flow):
            levels = inner
        else:
            levels = self.schedule.rho(inner)
        if zero:
            levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
        return levels.float()

    def _setup(
        self,
        steps: int | None,
        times: tuple[float, ...] | None,
        levels: tuple[float, ...] | None,
        mu: float | None,
    ) -> _Setup:
        recipe = self._recipe
        if recipe is not None and recipe.plan is not None:
            plan, _ = _without_scaling(recipe.plan)
            if times is not None or levels is not None or steps != plan.nfe:
                raise ValueError(
                    f"the recipe is a plan of {plan.nfe} network calls at its own times; "
                    f"call it with num_inference_steps={plan.nfe}"
                )
            return self._finish(plan, None, None, self._told(plan.times, None))
        method, grid = self._method_and_grid(steps, times, levels, mu)
        plan = method.plan(grid)
        told = self._told(plan.times, times if levels is not None else None)
        return self._finish(plan, grid, method, told)

    def _method_and_grid(
        self,
        steps: int | None,
        times: tuple[float, ...] | None,
        levels: tuple[float, ...] | None,
        mu: float | None,
    ) -> tuple[Solver, TimeGrid]:
        config, schedule = self._settings, self.schedule
        name = _solver_name(config.solver, config.solver_order)
        options = dict(config.solver_options or {})
        own_grid, grid_options = config.grid, dict(config.grid_options or {})
        count = len(levels or times or ()) or steps
        assert count is not None
        if self._recipe is not None:
            if steps is not None and steps != self._recipe.nfe:
                raise ValueError(
                    f"the recipe is for {self._recipe.nfe} network calls; call it with "
                    f"num_inference_steps={self._recipe.nfe}"
                )
            name, options = self._recipe.name, dict(self._recipe.options)
            own_grid, grid_options = self._recipe.grid or "auto", {}
            if self._recipe.head_start is not None:
                raise ValueError(
                    "a recipe with a head start needs the moments of the data, which a pipeline "
                    "does not know; use fewstep.sample"
                )
        if name == "auto":
            choice = choose(schedule, count)
            name, options = choice.solver, {**choice.options, **options}
            own_grid = own_grid or choice.grid or "auto"
        from fewstep.planning import GRID_OPTIONS

        grid_options = {
            **{k: options.pop(k) for k in list(options) if k in GRID_OPTIONS},
            **grid_options,
        }
        if name == "ddpm" and config.variance_type == "fixed_large":
            options.setdefault("variance", "large")
        method = make_solver(name, **options)
        to_zero = config.final_sigmas_type == "zero" or isinstance(schedule, Flow)
        if steps is not None and times is None and levels is None and config.count == "calls":
            count = _most_steps(method, steps, to_zero)
        if self._recipe is not None and steps is not None:
            to_zero_recipe = bool({**method.default_grid[1], **grid_options}.get("to_zero", False))
            count = method.steps_for(steps, ends_at_zero=to_zero_recipe)
        if name.startswith(LOWERS_FINAL) and "lower_final" not in options:
            lowered = config.lower_order_final and (count < LOWERED_BELOW or "unipc" in name)
            method = replace(method, lower_final=bool(lowered))  # type: ignore[type-var,call-arg]
        if levels is not None:
            if times is not None and len(times) != len(levels):
                raise ValueError(
                    f"timesteps and sigmas must have the same length, got {len(times)} and {len(levels)}"
                )
            if isinstance(schedule, Flow):
                ends = [s for s in levels if s != 0]
                factor = spacing.shift_factor(config, mu)
                levels = tuple(
                    spacing.shift(torch.tensor(ends, dtype=torch.float64), factor).tolist()
                )
            grid = spacing.from_sigmas(schedule, levels, to_zero=to_zero)
        elif times is not None:
            scale = config.num_train_timesteps if isinstance(schedule, Flow) else 1
            grid = spacing.from_times(schedule, [t / scale for t in times], to_zero=to_zero)
        elif own_grid is None:
            grid = spacing.spaced(schedule, config, name, count, mu, to_zero)
        elif own_grid == "auto":
            grid = method.make_grid(schedule, count, None, **grid_options)
        else:
            grid = method.make_grid(schedule, count, own_grid, **grid_options)
        grid = grid.rounded() if config.integer_times else grid
        if method.nfe(2) > 2 and grid.steps > 1:
            jump = float(grid.rho[0] / grid.rho[1])
            if jump > LARGEST_JUMP and not grid.is_last_zero(0):
                raise ValueError(
                    f"the first step of this grid divides sigma / alpha by {jump:.3g}, which "
                    f"{method.name} amplifies, as its stages are weighted in sigma / alpha; "
                    "use grid='karras', or a multistep solver such as 'tab3' or 'unipc3'"
                )
        return method, grid

    def _told(self, times: Tensor, given: tuple[float, ...] | None) -> tuple[float, ...]:
        if given is not None and len(given) == len(times):
            return given
        if isinstance(self.schedule, Flow):
            count = self._settings.num_train_timesteps
            # The clamped start stands for 1.
            told = [count * (1.0 if t >= spacing.FLOW_START else t) for t in times.tolist()]
        else:
            near = times.round()
            told = torch.where((times - near).abs() < 1e-4, near, times).tolist()
        return tuple(float(round(t)) if self._settings.integer_times else t for t in told)

    def _finish(
        self,
        plan: Plan,
        grid: TimeGrid | None,
        method: Solver | None,
        told: tuple[float, ...],
    ) -> _Setup:
        """Puts the plan into the network's prediction where that makes the steps cheaper or safer."""
        if plan.head:
            raise ValueError(
                "a plan with a head start needs the moments of the data, which a pipeline does not "
                "know; use fewstep.sample"
            )
        first = plan.structure.rows[0]
        if not (isinstance(first, Eval) and first.of == 0):
            raise ValueError(
                f"{plan.name} changes the state before its first network call, which a pipeline "
                "makes before it asks the scheduler; start it where it does not"
            )
        native = PREDICTIONS[self._settings.prediction_type]
        reshapes = bool(self._settings.clip_sample or self._settings.thresholding)
        if reshapes:
            plan = convert_plan(plan, Prediction.X0)
        elif native is not plan.prediction:
            merged = convert_plan(plan, native)
            risky = float(plan.scales[:, 0].min()) < 1e-3
            if risky or merged.structure.n_values <= plan.structure.n_values + 2 * plan.nfe:
                plan = merged
        _ = plan.numbers, plan.structure.dies  # so that a compiled step finds them made
        if native is plan.prediction:
            return _Setup(plan, grid, method, told, None, reshapes)
        shifts, factors = coefficients(
            native, plan.prediction, alpha=plan.scales[:, 0], sigma=plan.scales[:, 1]
        )
        pairs = tuple(zip(shifts.tolist(), factors.tolist(), strict=True))
        return _Setup(plan, grid, method, told, pairs, reshapes)

    def _rest(self, setup: _Setup, index: int, told: float | None, eta: float) -> _Setup:
        """Returns the plan from an index of ``timesteps`` on, or from a time between two of them."""
        method = setup.solver
        if eta:
            if method is None or method.name != "ddim":
                name = setup.plan.name if method is None else method.name
                raise ValueError(
                    f"eta = {eta:g} is an option of the solver 'ddim'; {name} takes its own options "
                    "from solver_options"
                )
            method = replace(method, eta=float(eta))  # type: ignore[type-var,call-arg]
        if method is None or setup.grid is None:
            raise ValueError(
                f"a stored plan cannot begin at index {index} of its timesteps: what it would need "
                "from before is not there. Use a solver, or begin at 0"
            )
        grid = setup.grid
        if told is not None:
            flow = isinstance(self.schedule, Flow)
            start = told / self._settings.num_train_timesteps if flow else told
            later = grid.times[grid.times < start]
            if not len(later):
                return self._rest(setup, _last_start(setup), None, eta)
            first = torch.tensor([start], dtype=torch.float64)
            part = TimeGrid(grid.schedule, torch.cat([first, later]), grid.ends_at_zero)
            plan = method.plan(part)
            return self._finish(plan, part, method, self._told(plan.times, None))
        step = _step_at(setup, index)
        part = TimeGrid(grid.schedule, grid.times[step:], grid.ends_at_zero)
        plan = method.plan(part)
        rest = self._finish(plan, part, method, setup.told[index:])
        same = len(plan.times) == len(rest.told) and torch.allclose(
            plan.times, setup.plan.times[index:], atol=1e-9
        )
        if not same:
            raise ValueError(
                f"{method.name} cannot begin at index {index} of its timesteps: its first steps make "
                "other calls than its later ones. Use a solver that makes the same calls in each "
                "step, e.g. 'ipndm', 'tab3' or 'heun'"
            )
        return rest

    # Sampling.

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        r"""Takes the network's answer and returns the next input of the network, or the sample.

        Arguments:
            model_output: The network's answer at ``sample``.
            timestep: The entry of ``timesteps`` at which it was asked.
            sample: The state, as the last step returned it or as it was edited since.
            eta: The option of the solver ``ddim``, from the first step of a run on.
            use_clipped_model_output: Without effect: with clipping on, all follows from the
                clipped data.
            generator: Draws the noise of stochastic solvers; one, or one a sample.
            variance_noise: That noise itself.
            return_dict: Whether to return an object with ``prev_sample``, or a tuple.

        Raises:
            ValueError: If the timestep is not the next of the run.
        """
        run = self._runs.get() or self._run()
        execution = run.execution
        if execution is None or execution.call is None:
            execution = self._begin(run, timestep, sample, eta)
        else:
            if torch.compiler.is_compiling() or not run.expects(timestep):
                self._check_next(run, timestep)
            if sample is not run.sample:
                execution.replace(sample.to(run.dtype))
        index = run.step_index
        assert index is not None
        assert run.active is not None
        x = execution.call.x  # type: ignore[union-attr]
        answer = model_output
        if answer.shape != x.shape and answer.ndim > 1 and answer.shape[1] == 2 * x.shape[1]:
            answer = answer[:, : x.shape[1]]  # the rest is a learned variance
        run.generator, run.variance_noise, run.like = generator, variance_noise, answer
        if answer.dtype != run.dtype:
            answer = answer.to(run.dtype)
        factors = run.active.factors
        if factors is not None:
            shift, factor = factors[index - run.offset]
            answer = torch.mul(answer, factor).add_(x, alpha=shift)
        if run.active.reshapes:
            answer = self._reshape(answer)
        execution.advance(answer)
        run.step_index = index + 1
        call = execution.call
        previous = execution.result if call is None else call.x
        if previous.dtype != sample.dtype:
            previous = previous.to(sample.dtype)
        run.sample = previous
        run.generator = run.variance_noise = run.like = None
        if not return_dict:
            return (previous,)
        return SchedulerOutput(prev_sample=previous)

    def _begin(self, run: _Run, timestep: Tensor | float, sample: Tensor, eta: float) -> Execution:
        if run.setup is None:
            raise ValueError("the scheduler has no timesteps yet: call set_timesteps first")
        told = None
        index = run.begin_index
        if index is None or run.step_index is not None:  # a run after a finished one finds its own
            index, told = self._find(run, timestep)
        if not 0 <= index < len(run.timesteps):
            raise ValueError(
                f"a run begins at an index from 0 to {len(run.timesteps) - 1}, got {index}"
            )
        setup = run.setup
        if index or told is not None or eta:
            key = (id(setup), index, told, float(eta))
            setup = self._cached(key, lambda: self._rest(run.setup, index, told, eta))  # type: ignore[arg-type]
        run.active, run.step_index = setup, len(run.timesteps) - setup.plan.nfe
        run.offset = run.step_index
        run.dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        run.execution = Execution(
            setup.plan, sample.to(run.dtype), draw=run.draw, keep_inputs=True
        )
        return run.execution

    def _find(self, run: _Run, timestep: Tensor | float) -> tuple[int, float | None]:
        """Returns the index of a first timestep, or the first index below it and the time itself."""
        assert run.setup is not None
        if isinstance(timestep, Tensor) and (place := _place(timestep, run.timesteps)) is not None:
            return place, None
        value = float(timestep)
        for index, told in enumerate(run.setup.told):
            if abs(told - value) < 1e-3 and _starts(run.setup, index):
                return index, None
        return 0, value

    def _check_next(self, run: _Run, timestep: Tensor | float) -> None:
        if torch.compiler.is_compiling():
            return
        index = run.step_index
        assert index is not None
        if isinstance(timestep, Tensor):
            place = _place(timestep, run.timesteps)
            if place == index or (place is None and timestep.device.type != "cpu"):
                return
        told = float(run.setup.told[index]) if run.setup is not None else 0.0
        if run.active is not run.setup and run.active is not None:
            told = run.active.told[index - run.offset]
        if abs(float(timestep) - told) > 1e-3 * max(1.0, abs(told)):
            raise ValueError(
                f"step {index} of this run is at timestep {told:g}, got {float(timestep):g}; "
                "call set_timesteps before each run"
            )

    def _reshape(self, x0: Tensor) -> Tensor:
        if self._settings["thresholding"]:
            sizes = x0.flatten(1).abs()
            place = self._settings["dynamic_thresholding_ratio"] * (sizes.shape[1] - 1)
            low = int(place)
            below = sizes.kthvalue(low + 1, dim=1).values
            above = sizes.kthvalue(min(low + 2, sizes.shape[1]), dim=1).values
            most = max(1.0, self._settings["sample_max_value"])
            bound = torch.lerp(below, above, place - low).clamp(min=1.0, max=most)
            bound = bound.reshape(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-bound, bound) / bound
        bound = self._settings["clip_sample_range"]
        return x0.clamp(-bound, bound)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Returns the sample: the state is what the network sees."""
        del timestep
        return sample

    # Noising, for training, img2img and inpainting: from the schedule, whatever the grid is.

    def _scales(self, like: Tensor, timesteps: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(timesteps).to(like.device)
        if isinstance(self.schedule, Flow):
            sigma = t.to(torch.float32) / self._settings.num_train_timesteps
            alpha = 1 - sigma
        elif t.is_floating_point():
            times = t.to(torch.float64 if like.device.type != "mps" else torch.float32)
            alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        else:
            products = self.alphas_cumprod.to(like.device)[t]
            alpha, sigma = products.sqrt(), (1 - products).sqrt()
        shape = (-1, *[1] * (like.ndim - 1)) if t.ndim else ()
        return alpha.to(like.dtype).reshape(shape), sigma.to(like.dtype).reshape(shape)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Returns :math:`\alpha x_0 + \sigma \varepsilon` at any timesteps, on the grid or off it, shape (B) or (1)."""
        alpha, sigma = self._scales(original_samples, timesteps)
        return alpha * original_samples + sigma * noise.to(original_samples.device)

    def scale_noise(
        self, sample: Tensor, timestep: Tensor | float, noise: Tensor | None = None
    ) -> Tensor:
        """The same in the words of flow pipelines; ``noise`` is needed."""
        if noise is None:
            raise ValueError("scale_noise needs the noise")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Returns the target of v-prediction, :math:`\alpha \varepsilon - \sigma x_0`."""
        alpha, sigma = self._scales(sample, timesteps)
        return alpha * noise - sigma * sample

    def index_for_timestep(
        self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Returns the index at which a step at this timestep begins, the last one if there is none."""
        told = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        setup = self._run().setup
        places = [i for i, t in enumerate(told) if abs(t - float(timestep)) < 1e-3]
        if schedule_timesteps is None and setup is not None:
            places = [i for i in places if _starts(setup, i)] or places
        return places[0] if places else len(told) - 1

    def previous_timestep(self, timestep: Tensor | float) -> Any:
        """Returns the timestep after this one on the grid (-1 at the end), or one less before planning."""
        run = self._run()
        if run.setup is None:
            return timestep - 1
        later = [t for t in run.setup.told if t < float(timestep) - 1e-3]
        return torch.tensor(later[0] if later else -1.0).to(run.timesteps.dtype)


def _one_of(name: str, value: object, known: list[str]) -> None:
    if value not in known:
        raise ValueError(unknown(name, value, known))


def _solver_name(solver: str, order: int) -> str:
    """Returns the registered name that a family and an order stand for."""
    families = {
        "tab": [f"tab{k}" for k in range(4)],
        "rhoab": [f"rhoab{k}" for k in range(4)],
        "logrhoab": [f"logrhoab{k}" for k in range(4)],
        "dpmpp": ["ddim", "dpmpp-2m", "dpmpp-3m"],
        "unipc": ["ddim", "unipc2", "unipc3"],
    }
    if solver in families:
        members = families[solver]
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= len(members):
            raise ValueError(
                f"solver_order of {solver!r} must be from 1 to {len(members)}, got {order!r}"
            )
        return members[order - 1]
    if solver != "auto":
        SOLVERS[solver]
    return solver


def _most_steps(method: Solver, calls: int, to_zero: bool) -> int:
    fitting = [k for k in range(1, calls + 1) if method.nfe(k, ends_at_zero=to_zero) <= calls]
    if not fitting:
        raise ValueError(f"{method.name} needs more than {calls} network calls for a step")
    return fitting[-1]


def _read_recipe(recipe: str) -> tuple[SamplerRecipe, str]:
    text = recipe if recipe.lstrip().startswith("{") else None
    if text is None:
        SamplerRecipe.load(recipe)  # for its message, if it cannot be read
        text = Path(recipe).read_text(encoding="utf-8")
    made = SamplerRecipe.from_json(text)
    if made.kind == "adaptive":
        raise ValueError("an adaptive recipe has no steps beforehand, which a pipeline needs")
    return made, json.dumps(json.loads(text))


def _without_scaling(plan: Plan) -> tuple[Plan, float]:
    """Returns the plan without a first row that only scales the initial state, and what it begins with.

    The second is the factor of a standard normal draw: what pipelines call ``init_noise_sigma``.
    """
    rows = plan.structure.rows
    start = float(plan.schedule.sigma(plan.knots[0].detach()))
    first = rows[0]
    if not (isinstance(first, Lin) and first.terms == (0,)):
        return plan, 1.0
    if any(isinstance(row, Lin) and 0 in row.terms for row in rows[1:]):
        return plan, 1.0
    moved: list[Any] = []
    for row in rows[1:]:
        if isinstance(row, Lin):
            row = row._replace(terms=tuple(r - 1 for r in row.terms), offset=row.offset - 1)
        elif isinstance(row, Eval):
            row = row._replace(of=row.of - 1)
        moved.append(row)
    structure = Structure(plan.prediction, tuple(moved), plan.structure.result - 1)
    return replace(plan, structure=structure, values=plan.values[1:]), start * float(
        plan.values[0]
    )


def _place(timestep: Tensor, timesteps: Tensor) -> int | None:
    """Returns which entry of ``timesteps`` this is a view of; reads nothing from the device."""
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    if timestep.numel() != 1:
        return None
    index, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return index if not rest and 0 <= index < len(timesteps) else None


def _step_at(setup: _Setup, index: int) -> int:
    """Returns the number of the step that begins at an index of the calls."""
    assert setup.solver is not None
    assert setup.grid is not None
    grid, method = setup.grid, setup.solver
    calls = method.nfe(grid.steps, ends_at_zero=grid.ends_at_zero)
    for step in range(grid.steps):
        rest = method.nfe(grid.steps - step, ends_at_zero=grid.ends_at_zero)
        if calls - rest == index:
            return step
    raise ValueError(
        f"index {index} of the timesteps is inside of a step of {method.name}; begin where a step does"
    )


def _starts(setup: _Setup, index: int) -> bool:
    if setup.solver is None:
        return index == 0
    try:
        _step_at(setup, index)
    except ValueError:
        return False
    return True


def _last_start(setup: _Setup) -> int:
    return max(index for index in range(setup.plan.nfe) if _starts(setup, index))


def load_pipeline(path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Loads a pipeline that was saved with a :class:`PlanScheduler`.

    Importing this module is what ``DiffusionPipeline.from_pretrained`` needs; some pipelines
    (DDIM's) then exchange the scheduler for their own, which is undone here.

    Arguments:
        path: The folder of the pipeline.
        kwargs: Further arguments of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: If there is no such folder.
    """
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"the folder {str(path)!r} holds no pipeline: it has no model_index.json")
    kwargs.setdefault("use_safetensors", True)
    pipe = DiffusionPipeline.from_pretrained(folder, **kwargs)
    if "scheduler" not in kwargs and not isinstance(pipe.scheduler, PlanScheduler):
        file = folder / "scheduler" / "scheduler_config.json"
        if file.is_file() and json.loads(file.read_text())["_class_name"] == "PlanScheduler":
            pipe.scheduler = PlanScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipe

"""From the configuration of a PlanScheduler to a plan: which solver, on which grid, in which prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers import spacing as spacing
from fewstep.adapters.diffusers.configurations import FLOW_START, PREDICTIONS
from fewstep.adapters.diffusers.recipes import solver_name, spacing_name, without_scaling
from fewstep.adapters.diffusers.runs import Setup
from fewstep.adapters.diffusers.stages import check_jump, last_start, most_steps, step_at
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import Flow, NoiseSchedule, VPSigma
from fewstep.plans.buffers import buffer_schedule
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan, plan_for
from fewstep.plans.structure import Eval
from fewstep.sampling.auto import AUTO
from fewstep.sampling.planning import GRID_OPTIONS, Planned
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import resolve_plan
from fewstep.solvers import Solver
from fewstep.solvers import solver as make_solver
from fewstep.solvers.multistep import Multistep

LOWERED_BELOW = 15
"""Below so many steps diffusers lowers the order of the last ones (``lower_order_final``)."""

IN_TIME = ("euler", "euler-maruyama")
"""Solvers that step in time itself."""

NO_HEAD = (
    "{} with a head start needs the moments of the data, which a pipeline does not know; use "
    "fewstep.sample"
)


@dataclass(frozen=True)
class Request:
    """The arguments of ``set_timesteps``.

    Attributes:
        steps: ``num_inference_steps``, or ``None``.
        times: The timesteps, or ``None``.
        levels: The sigmas, or ``None``.
        mu: The shift of flow levels, or ``None``.
        distilled: The times, falling, among which a count of steps chooses; ``None``: among all.
    """

    steps: int | None
    times: tuple[float, ...] | None = None
    levels: tuple[float, ...] | None = None
    mu: float | None = None
    distilled: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Planner:
    """Makes the setups of one configuration.

    Attributes:
        config: The configuration of the scheduler.
        schedule: Its noise schedule.
        alphas_cumprod: Its noise levels, one for each training timestep.
        recipe: Its recipe, or ``None``.
    """

    config: Mapping[str, Any]
    schedule: NoiseSchedule
    alphas_cumprod: Tensor
    recipe: SamplerRecipe | None

    @property
    def _flow(self) -> bool:
        return isinstance(self.schedule, Flow)

    def setup(self, arguments: Request) -> Setup:
        """Returns the setup of a whole run."""
        recipe = self.recipe
        if recipe is not None and recipe.plan is not None:
            plan, _ = without_scaling(recipe.plan)
            own = f"the recipe is a plan of {plan.nfe} network evaluations at its own levels"
            ends = plan.knots[-1:][plan.ends_at_zero :]  # none, where the end is zero noise
            arguments = self._own_levels(arguments, own, plan.nfe, torch.cat([plan.times, ends]))
            if arguments.steps != plan.nfe:
                raise ValueError(f"{own}; call it with num_inference_steps={plan.nfe}")
            return self._finish(plan, None, None, self._conditioning(plan.times, None))
        if recipe is not None:
            own = f"the recipe is for {recipe.nfe} network evaluations on its own grid"
            arguments = self._own_levels(arguments, own, recipe.nfe, None)
        elif self.config["profile"] is not None:
            arguments = self._own_levels(arguments, "the profile has its own levels")
        elif self.config["grid"] is not None:
            arguments = self._own_levels(
                arguments, f"grid={self.config['grid']!r} has its own levels"
            )
        planned = self._planned(arguments)
        plan, grid, method = planned.plan, planned.grid, planned.solver
        both = arguments.times is not None and arguments.levels is not None
        conditioning = self._conditioning(plan.times, arguments.times if both else None)
        return self._finish(plan, grid, method, conditioning)

    def _own_levels(
        self, arguments: Request, own: str, count: int | None = None, times: Tensor | None = None
    ) -> Request:
        """Returns the request as one for a count, where levels of our own are meant.

        Pipelines of flow models always pass the levels 1, 1 - 1/N, ..., 1/N, which say the count and
        nothing else; and the own levels may be given back.
        """
        if arguments.times is None and arguments.levels is None:
            return arguments
        points = [s for s in arguments.levels or arguments.times or () if s != 0]
        if self._flow and arguments.levels is not None and _is_even(points):
            return Request(len(points), mu=arguments.mu)
        if times is not None and count is not None and count <= len(points) <= len(times):
            rho = times if self._flow else self.schedule.rho(times)
            want = (
                rho.tolist() if arguments.levels is not None else self._conditioning(times, None)
            )
            if all(
                abs(a - b) <= 1e-3 * max(abs(b), 1e-3) for a, b in zip(points, want, strict=False)
            ):
                return Request(count, mu=arguments.mu)
        name = "sigmas" if arguments.levels is not None else "timesteps"
        number = "" if count is None else f" with num_inference_steps={count}"
        raise ValueError(
            f"{own}, got other {name} as well; leave {name} out{number}, or take a solver without them: "
            "PlanScheduler.from_config(config, recipe=None, grid=None, solver='tab3')"
        )

    def rest(self, setup: Setup, index: int, conditioning: float | None, eta: float) -> Setup:
        """Returns the setup from an index of ``timesteps`` on, or from a time between two of them."""
        method, grid = setup.solver, setup.grid
        if eta:
            if method is None or method.name != "ddim":
                name = setup.plan.name if method is None else method.name
                raise ValueError(
                    f"eta = {eta:g} is an option of the solver 'ddim'; {name} takes its own options "
                    "from solver_options"
                )
            method = replace(method, eta=float(eta))  # type: ignore[type-var,call-arg]
        if method is None or grid is None:
            raise ValueError(
                f"a stored plan begins at its first timestep, not at index {index}: what its later "
                "rows read from before is not there. For img2img and inpainting take a solver "
                "(PlanScheduler.from_config(config, recipe=None, solver='tab3')), or strength=1"
            )
        if isinstance(method, Multistep) and method.weights:
            # Measured weights hold from the first step on; their times are good for others too.
            method = make_solver("unipc3")
        if conditioning is not None:
            start = self._time_of(conditioning)
            later = grid.times[grid.times < start]
            if not len(later):
                return self.rest(setup, last_start(setup), None, eta)
            first = torch.tensor([start], dtype=torch.float64)
            part = TimeGrid(grid.schedule, torch.cat([first, later]), grid.ends_at_zero)
            plan = method.plan(part)
            return self._finish(plan, part, method, self._conditioning(plan.times, None))
        part = TimeGrid(grid.schedule, grid.times[step_at(setup, index) :], grid.ends_at_zero)
        plan = method.plan(part)
        rest = self._finish(plan, part, method, setup.conditioning[index:])
        same = len(plan.times) == len(rest.conditioning) and torch.allclose(
            plan.times, setup.plan.times[index:], atol=1e-9
        )
        if not same:
            raise ValueError(
                f"{method.name} cannot begin at index {index} of its timesteps: its first steps make "
                "other evaluations than its later ones. Use a solver that makes the same evaluations "
                "in each step, e.g. 'ipndm', 'tab3' or 'heun'"
            )
        return rest

    def _planned(self, arguments: Request) -> Planned:
        """Returns the plan, made by the one resolver: from the recipe, or from the configuration."""
        config, schedule, recipe = self.config, self.schedule, self.recipe
        if recipe is not None:
            if arguments.steps != recipe.nfe:
                raise ValueError(
                    f"the recipe is for {recipe.nfe} network evaluations; call it with "
                    f"num_inference_steps={recipe.nfe}"
                )
            request, what = recipe.request(), "a recipe"
        else:
            request, what = self._request(arguments), "a profile"
        planned = resolve_plan(schedule, request, integer_times=config["integer_times"])
        if planned.head_start is not None:
            raise ValueError(NO_HEAD.format(what))
        check_jump(planned.solver, planned.grid)
        return planned

    def _request(self, arguments: Request) -> SamplerRequest:
        """Returns the configuration as a request: a solver on a grid of diffusers, or on one of ours."""
        config = self.config
        name = solver_name(config["solver"], config["solver_order"])
        options = dict(config["solver_options"] or {})
        points = [
            s
            for s in arguments.levels or arguments.times or ()
            if s != 0 or arguments.levels is None
        ]
        count = len(points) or arguments.steps
        if count is None:
            raise ValueError("sigmas must have a level above zero")
        to_zero = config["final_sigmas_type"] == "zero" or self._flow
        method = None
        if name != AUTO:
            if name == "ddpm" and config["variance_type"] in ("fixed_large", "fixed_large_log"):
                options.setdefault("variance", "large")
            of_solver = {k: v for k, v in options.items() if k not in GRID_OPTIONS}
            method = make_solver(name, **of_solver)
            if not points and config["count"] == "calls":
                count = most_steps(method, count, to_zero)
            if method.lowers_final:
                few = count < LOWERED_BELOW or method.always_lowers_final
                options.setdefault("lower_final", bool(config["lower_order_final"] and few))
        if config["profile"] is not None:
            return SamplerRequest(AUTO, steps=count, profile=config["profile"])
        no_grid = arguments.distilled is None and method is None
        if not points and (no_grid or config["grid"] is not None):
            grid = None if config["grid"] == AUTO else config["grid"]
            options |= config["grid_options"] or {}
            if method is None and grid is None and self._flow:
                # A shift of flow levels moves every half log-SNR by the same.
                factor = spacing.shift_factor(config, arguments.mu)
                options.setdefault("center", math.log(1 / factor))
            return SamplerRequest(name, steps=count, grid=grid, options=options)
        if not points and arguments.distilled is not None:
            arguments = replace(arguments, times=spacing.chosen_times(arguments.distilled, count))
        peer = None if method is None else make_solver(spacing_name(config["solver"], name))
        grid = self._diffusers_grid(arguments, peer, count, to_zero)
        if grid.ends_at_zero and self.schedule.discrete and name in IN_TIME:
            raise ValueError(
                f"{name} steps in time, and training timesteps have no time with sigma = 0. Set "
                "final_sigmas_type='sigma_min' and leave timestep 0 out, or take solver='ddim', Euler's "
                "method in sigma / alpha, as EulerDiscreteScheduler's"
            )
        return SamplerRequest(name, grid=grid, options=options)

    def _diffusers_grid(
        self, arguments: Request, method: Solver | None, count: int, to_zero: bool
    ) -> TimeGrid:
        """Returns the grid that the configuration describes, by count or by given points."""
        config, schedule, times, levels = (
            self.config,
            self.schedule,
            arguments.times,
            arguments.levels,
        )
        if times is not None and levels is not None and len(times) != len(levels):
            raise ValueError(
                f"timesteps and sigmas must have the same length, got {len(times)} and {len(levels)}"
            )
        if isinstance(schedule, Flow):
            points = levels
            if points is None and times is not None:
                points = tuple(self._time_of(t) for t in times)
            steps = None if points is not None else count
            return spacing.flow_grid(
                schedule, config, method, steps=steps, points=points, mu=arguments.mu
            )
        if times is None and levels is None:
            assert method is not None  # auto without given points has a grid of its own
            return spacing.spaced(schedule, config, method, count, self.alphas_cumprod, to_zero)
        if times is not None and levels is None and isinstance(schedule, VPSigma):
            raise ValueError(
                "timesteps of a model with timestep_type='continuous' are 0.25 ln(sigma); give sigmas"
            )
        return spacing.given_points(
            schedule,
            config,
            times=times if levels is None else None,
            sigmas=levels,
            to_zero=to_zero,
        )

    def _conditioning(self, times: Tensor, given: tuple[float, ...] | None) -> tuple[float, ...]:
        """Returns the conditioning timesteps of evaluations at these times."""
        if given is not None and len(given) == len(times):
            return given
        if self._flow:
            count = self.config["num_train_timesteps"]
            # The clamped start stands for 1.
            conditioning = [count * (1.0 if t >= FLOW_START else t) for t in times.tolist()]
        elif isinstance(self.schedule, VPSigma):
            conditioning = (0.25 * times.log()).tolist()
        else:
            near = times.round()
            conditioning = torch.where((times - near).abs() < 1e-4, near, times).tolist()
        return tuple(float(round(t)) if self.config["integer_times"] else t for t in conditioning)

    def _time_of(self, conditioning: float) -> float:
        """Returns the time that a conditioning timestep stands for."""
        if self._flow:
            return conditioning / self.config["num_train_timesteps"]
        return math.exp(4 * conditioning) if isinstance(self.schedule, VPSigma) else conditioning

    def _finish(
        self,
        plan: Plan,
        grid: TimeGrid | None,
        method: Solver | None,
        conditioning: tuple[float, ...],
    ) -> Setup:
        """Puts the plan into the network's prediction, or into that of the data to reshape them."""
        if plan.head:
            raise ValueError(
                "a plan with a head start needs the moments of the data, which a pipeline does not "
                "know; use fewstep.sample"
            )
        first = plan.structure.rows[0]
        if not (isinstance(first, Eval) and first.of == 0):
            raise ValueError(
                f"{plan.name} changes the state before its first evaluation, which a pipeline "
                "makes before it asks the scheduler; start it where it does not"
            )
        native = PREDICTIONS[self.config["prediction_type"]]
        to_data, alphas = None, None
        if self.config["clip_sample"] or self.config["thresholding"]:
            plan = convert_plan(plan, Prediction.X0)
            alpha, sigma = plan.scales.unbind(1)
            maps = coefficients(native, Prediction.X0, alpha=alpha, sigma=sigma)
            to_data = tuple(zip(*(m.tolist() for m in maps), strict=True))
            if method is not None and method.name == "ddim":
                alphas = tuple(alpha.tolist())
        else:
            plan = plan_for(plan, native)
        for dtype in (torch.float32, torch.float64):  # a compiled step finds them ready
            buffer_schedule(plan, dtype, keep_inputs=True, keep_states=False)
        residual = None if self.recipe is None else self.recipe.residual
        if residual is not None and to_data is not None:
            raise ValueError(
                "the recipe has a spatial residual, which was learned without clipping; switch clip_sample "
                "and thresholding off"
            )
        return Setup(plan, grid, method, conditioning, to_data, alphas, residual)


def _is_even(points: list[float]) -> bool:
    """Returns whether these are the levels 1, 1 - 1/N, ..., 1/N that pipelines of flow models pass."""
    n = len(points)
    return all(abs(s - (1 - i / n)) < 1e-5 for i, s in enumerate(points))

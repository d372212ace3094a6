"""From the configuration of a PlanScheduler to a plan: which solver, on which grid, in which prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers import spacing as spacing
from fewstep.adapters.diffusers.probing import PREDICTIONS
from fewstep.adapters.diffusers.runs import Setup
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import Flow, NoiseSchedule
from fewstep.plans.buffers import buffer_schedule
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import convert_plan, plan_for
from fewstep.plans.structure import Eval, Lin, Structure
from fewstep.sampling.fitted import is_fitted, read_fitted
from fewstep.sampling.planning import GRID_OPTIONS, choose
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.solvers import SOLVERS, Solver
from fewstep.solvers import solver as make_solver

LOWERED_BELOW = 15
"""Below so many steps diffusers lowers the order of the last ones (``lower_order_final``)."""

LARGEST_JUMP = 200.0
"""The most by which one step of several stages may divide sigma / alpha: that is its amplification."""

NO_HEAD = (
    "{} with a head start needs the moments of the data, which a pipeline does not know; use "
    "fewstep.sample"
)


@dataclass(frozen=True)
class Request:
    """What ``set_timesteps`` was asked for.

    Attributes:
        steps: ``num_inference_steps``, or ``None``.
        times: The timesteps, or ``None``.
        levels: The sigmas, or ``None``.
        mu: The shift of flow levels, or ``None``.
    """

    steps: int | None
    times: tuple[float, ...] | None = None
    levels: tuple[float, ...] | None = None
    mu: float | None = None


@dataclass(frozen=True)
class Planner:
    """Makes the setups of one configuration.

    Attributes:
        config: The configuration of the scheduler.
        schedule: Its noise schedule.
        recipe: Its recipe, or ``None``.
    """

    config: Mapping[str, Any]
    schedule: NoiseSchedule
    recipe: SamplerRecipe | None

    @property
    def _flow(self) -> bool:
        return isinstance(self.schedule, Flow)

    def setup(self, asked: Request) -> Setup:
        """Returns the setup of a whole run."""
        recipe = self.recipe
        if recipe is not None and recipe.plan is not None:
            plan, _ = without_scaling(recipe.plan)
            if asked.times is not None or asked.levels is not None or asked.steps != plan.nfe:
                raise ValueError(
                    f"the recipe is a plan of {plan.nfe} network calls at its own times; "
                    f"call it with num_inference_steps={plan.nfe}"
                )
            return self._finish(plan, None, None, self._told(plan.times, None))
        method, grid = self._method_and_grid(asked)
        plan = method.plan(grid)
        told = self._told(plan.times, asked.times if asked.levels is not None else None)
        return self._finish(plan, grid, method, told)

    def rest(self, setup: Setup, index: int, told: float | None, eta: float) -> Setup:
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
        if told is not None:
            start = told / self.config["num_train_timesteps"] if self._flow else told
            later = grid.times[grid.times < start]
            if not len(later):
                return self.rest(setup, _last_start(setup), None, eta)
            first = torch.tensor([start], dtype=torch.float64)
            part = TimeGrid(grid.schedule, torch.cat([first, later]), grid.ends_at_zero)
            plan = method.plan(part)
            return self._finish(plan, part, method, self._told(plan.times, None))
        part = TimeGrid(grid.schedule, grid.times[_step_at(setup, index) :], grid.ends_at_zero)
        plan = method.plan(part)
        made = self._finish(plan, part, method, setup.told[index:])
        same = len(plan.times) == len(made.told) and torch.allclose(
            plan.times, setup.plan.times[index:], atol=1e-9
        )
        if not same:
            raise ValueError(
                f"{method.name} cannot begin at index {index} of its timesteps: its first steps make "
                "other calls than its later ones. Use a solver that makes the same calls in each "
                "step, e.g. 'ipndm', 'tab3' or 'heun'"
            )
        return made

    def _method_and_grid(self, asked: Request) -> tuple[Solver, TimeGrid]:
        config, schedule = self.config, self.schedule
        name, options, own_grid, grid_options = self._named(asked)
        count = len(asked.levels or asked.times or ()) or asked.steps
        assert count is not None
        fitted = read_fitted(own_grid, schedule) if is_fitted(own_grid) else None
        if name == "auto" and fitted is not None:
            name = fitted.solver_for(count)
        if name == "auto":
            choice = choose(schedule, count)
            other = None if own_grid == "auto" else own_grid
            name, options = choice.solver, {**choice.options_on(other), **options}
            own_grid = other or choice.grid or "auto"
        grid_options = {
            **{k: options.pop(k) for k in list(options) if k in GRID_OPTIONS},
            **grid_options,
        }
        if name == "ddpm" and config["variance_type"] == "fixed_large":
            options.setdefault("variance", "large")
        method = make_solver(name, **options)
        to_zero = config["final_sigmas_type"] == "zero" or self._flow
        if asked.steps is not None and asked.times is None and asked.levels is None:
            if config["count"] == "calls":
                count = _most_steps(method, asked.steps, to_zero)
        if self.recipe is not None and asked.steps is not None:
            ends = bool({**method.default_grid[1], **grid_options}.get("to_zero", False))
            count = method.steps_for(asked.steps, ends_at_zero=ends)
        if method.lowers_final and "lower_final" not in options:
            few = count < LOWERED_BELOW or method.always_lowers_final
            lowered = config["lower_order_final"] and few
            method = replace(method, lower_final=bool(lowered))  # type: ignore[type-var,call-arg]
        grid = self._given_grid(asked, to_zero)
        if grid is None and own_grid is None:
            grid = spacing.spaced(schedule, config, method, count, asked.mu, to_zero)
        elif grid is None and fitted is not None:
            grid, head = fitted.fit(method.name, count)
            if head:
                raise ValueError(NO_HEAD.format("the fitted grid"))
        elif grid is None:
            chosen = None if own_grid == "auto" else own_grid
            grid = method.make_grid(schedule, count, chosen, **grid_options)
        grid = grid.rounded() if config["integer_times"] else grid
        _check_jump(method, grid)
        return method, grid

    def _named(self, asked: Request) -> tuple[str, dict[str, Any], str | None, dict[str, Any]]:
        """Returns solver, options, grid and grid's options, of the recipe or of the configuration."""
        config, recipe = self.config, self.recipe
        if recipe is None:
            name = solver_name(config["solver"], config["solver_order"])
            options, grid_options = config["solver_options"], config["grid_options"]
            return name, dict(options or {}), config["grid"], dict(grid_options or {})
        if asked.steps is not None and asked.steps != recipe.nfe:
            raise ValueError(
                f"the recipe is for {recipe.nfe} network calls; call it with "
                f"num_inference_steps={recipe.nfe}"
            )
        if recipe.head_start is not None:
            raise ValueError(NO_HEAD.format("a recipe"))
        return recipe.name, dict(recipe.options), recipe.grid or "auto", {}

    def _given_grid(self, asked: Request, to_zero: bool) -> TimeGrid | None:
        """Returns the grid of given sigmas or timesteps, if there are any."""
        config, schedule, times, levels = self.config, self.schedule, asked.times, asked.levels
        if levels is not None:
            if times is not None and len(times) != len(levels):
                raise ValueError(
                    f"timesteps and sigmas must have the same length, got {len(times)} and {len(levels)}"
                )
            if self._flow:
                ends = torch.tensor([s for s in levels if s != 0], dtype=torch.float64)
                factor = spacing.shift_factor(config, asked.mu)
                levels = tuple(spacing.shift(ends, factor).tolist())
            return spacing.from_sigmas(schedule, levels, to_zero=to_zero)
        if times is not None:
            scale = config["num_train_timesteps"] if self._flow else 1
            return spacing.from_times(schedule, [t / scale for t in times], to_zero=to_zero)
        return None

    def _told(self, times: Tensor, given: tuple[float, ...] | None) -> tuple[float, ...]:
        if given is not None and len(given) == len(times):
            return given
        if self._flow:
            count = self.config["num_train_timesteps"]
            # The clamped start stands for 1.
            told = [count * (1.0 if t >= spacing.FLOW_START else t) for t in times.tolist()]
        else:
            near = times.round()
            told = torch.where((times - near).abs() < 1e-4, near, times).tolist()
        return tuple(float(round(t)) if self.config["integer_times"] else t for t in told)

    def _finish(
        self, plan: Plan, grid: TimeGrid | None, method: Solver | None, told: tuple[float, ...]
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
                f"{plan.name} changes the state before its first network call, which a pipeline "
                "makes before it asks the scheduler; start it where it does not"
            )
        native = PREDICTIONS[self.config["prediction_type"]]
        to_data = None
        if self.config["clip_sample"] or self.config["thresholding"]:
            plan = convert_plan(plan, Prediction.X0)
            alpha, sigma = plan.scales.unbind(1)
            maps = coefficients(native, Prediction.X0, alpha=alpha, sigma=sigma)
            to_data = tuple(zip(*(m.tolist() for m in maps), strict=True))
        else:
            plan = plan_for(plan, native)
        for dtype in (torch.float32, torch.float64):  # a compiled step finds them made
            buffer_schedule(plan, dtype, keep_inputs=True, keep_states=False)
        return Setup(plan, grid, method, told, to_data)


def solver_name(solver: str, order: int) -> str:
    """Returns the registered name that a family and an order stand for.

    Raises:
        ValueError: If there is no such solver, or it has no such order.
    """
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


def read_recipe(recipe: str) -> tuple[SamplerRecipe, str]:
    """Returns the recipe of a path or of a text, and that text."""
    text = recipe if recipe.lstrip().startswith("{") else None
    if text is None:
        SamplerRecipe.load(recipe)  # for its message, if it cannot be read
        text = Path(recipe).read_text(encoding="utf-8")
    made = SamplerRecipe.from_json(text)
    if made.kind == "adaptive":
        raise ValueError("an adaptive recipe has no steps beforehand, which a pipeline needs")
    return made, json.dumps(json.loads(text))


def without_scaling(plan: Plan) -> tuple[Plan, float]:
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
    scaled = start * float(plan.values[0])
    return replace(plan, structure=structure, values=plan.values[1:]), scaled


def starts(setup: Setup, index: int) -> bool:
    """Returns whether a step, and not only one of its stages, begins at an index of the calls."""
    if setup.solver is None:
        return index == 0
    try:
        _step_at(setup, index)
    except ValueError:
        return False
    return True


def _step_at(setup: Setup, index: int) -> int:
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


def _last_start(setup: Setup) -> int:
    return max(index for index in range(setup.plan.nfe) if starts(setup, index))


def _most_steps(method: Solver, calls: int, to_zero: bool) -> int:
    fitting = [k for k in range(1, calls + 1) if method.nfe(k, ends_at_zero=to_zero) <= calls]
    if not fitting:
        raise ValueError(f"{method.name} needs more than {calls} network calls for a step")
    return fitting[-1]


def _check_jump(method: Solver, grid: TimeGrid) -> None:
    if method.nfe(2) <= 2 or grid.steps < 2 or grid.is_last_zero(0):
        return
    jump = float(grid.rho[0] / grid.rho[1])
    if jump > LARGEST_JUMP:
        raise ValueError(
            f"the first step of this grid divides sigma / alpha by {jump:.3g}, which "
            f"{method.name} amplifies, as its stages are weighted in sigma / alpha; "
            "use grid='karras', or a multistep solver such as 'tab3' or 'unipc3'"
        )

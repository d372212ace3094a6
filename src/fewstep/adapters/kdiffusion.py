r"""Samplers with the signature of k-diffusion's, for its models and for everything that calls them.

.. code-block:: python

    from fewstep.adapters import kdiffusion

    x = torch.randn(4, 3, 64, 64) * sigmas[0]
    images = kdiffusion.sampler(model, x, sigmas, solver="unipc3")

A model is ``model(x, sigma, **extra_args)`` with x (B, \*) and sigma (B), and returns the denoised data: one of
k-diffusion's wrappers (``Denoiser`` with its ``sigma_data``, ``CompVisDenoiser``, ``VDenoiser``, ...) or a
model of ComfyUI. States are :math:`x = x_0 + \sigma z`; with ``flow=True`` they are those of a rectified
flow, :math:`x = (1 - \sigma) x_0 + \sigma z`, as ComfyUI has them for flow models.

Nothing of k-diffusion is imported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.base.progress import progress_of
from fewstep.diffusion.brownian import BrownianSource
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule, schedule_from_record
from fewstep.models.denoiser import Denoiser
from fewstep.plans.execute import Execution
from fewstep.plans.intervals import draw_intervals
from fewstep.plans.plan import Plan
from fewstep.plans.rewriting import plan_for
from fewstep.plans.structure import Eval, Lin
from fewstep.sampling.planning import is_adaptive
from fewstep.sampling.profile import Profile
from fewstep.sampling.protocol import Run
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import Contradiction, SamplerRequest, as_text
from fewstep.sampling.resolve import check_sources, resolve, resolve_plan
from fewstep.solvers import SOLVERS

Model = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""Returns a standard normal draw with the shape of the state, for the step from one sigma to another."""

PURE_NOISE = 1 - 1e-6
"""The first level of a flow that begins at 1, where nothing of the data is left and eps-methods are not defined."""


def sampler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    solver: str = "auto",
    recipe: SamplerRecipe | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    plan: Plan | None = None,
    grid: str | None = None,
    schedule: NoiseSchedule | None = None,
    flow: bool = False,
    noise_sampler: NoiseSampler | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    r"""Samples along the noise levels with any solver, recipe, profile or plan.

    Arguments:
        model: ``model(x, sigma, **extra_args)``, which returns the denoised data, (B, \*).
        x: The initial state at ``sigmas[0]``, with shape (B, \*).
        sigmas: The noise levels, decreasing, with shape (K + 1); the last may be 0. They are the grid; with
            ``grid``, ``recipe``, ``profile`` or ``plan`` they say its ends (and, of a grid or profile, the number
            of steps) only; a last 0 stands for the end of a recipe, profile or plan too.
        extra_args: Further arguments of the model.
        callback: Called at each network evaluation with a dictionary: ``x`` and ``denoised`` (B, \*), ``i`` (the
            number of the step), ``sigma`` (at its start), ``sigma_hat`` (of the evaluation), ``evaluation`` (its number).
            An adaptive solver counts evaluations as steps, and says the largest level of the batch.
        disable: ``False`` shows a progress bar.
        solver: A name in :data:`fewstep.SOLVERS`, or that of k-diffusion or ComfyUI (see ``fewstep solvers``); also with
            the prefix ``sample_`` of k-diffusion's functions.
        recipe: A recipe, or the path of one, instead of a solver; or
        profile: the profile of the model, or its path; or
        plan: a plan.
        grid: The name of a grid between the first and the last positive level, instead of the levels themselves.
        schedule: The schedule whose time the solver steps in; left out, that of EDM (time is sigma), or of a
            rectified flow. Solvers that do not depend on a time are the same on each.
        flow: Whether states are those of a rectified flow.
        noise_sampler: The source of noise, as k-diffusion has it: ``noise_sampler(sigma, sigma_next)``. Left out,
            increments of one Brownian motion for each sample, the same at any number of steps.
        seed: The seed of that, without ``noise_sampler``; left out, drawn from torch's generator.
        options: Options of the solver and the grid, e.g. ``eta=0.5``.

    Returns:
        The state at the last level, with the shape and the type of ``x``.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if something does not fit.
    """
    levels, solver = _levels(x, sigmas, flow), _plain(solver)
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, sigma), got {type(model).__name__}")
    _check_arguments(extra_args, callback, noise_sampler, seed)
    extra = {} if extra_args is None else dict(extra_args)
    given = {"recipe": recipe, "profile": profile, "plan": plan}
    sources = [name for name, value in given.items() if value is not None]
    own = None if solver == "auto" else solver
    check_sources(SamplerRequest(own, grid=grid, options=options, **given))
    if sources and schedule is not None:
        raise Contradiction(f"a {sources[0]} has its schedule already; leave schedule out")
    if not sources and is_adaptive(_our_name(solver)):
        if schedule is not None:
            raise Contradiction(
                f"{solver} steps in the noise level itself, whatever the schedule; leave schedule out"
            )
        return _adaptive(model, x, levels, extra, callback, solver, grid, flow, options)
    # Plans are kept: made of tensors of inference mode they could be used nowhere else.
    with torch.inference_mode(False):
        resolved = _planned(levels, solver, recipe, profile, plan, grid, schedule, flow, options)
        native = plan_for(resolved, Prediction.X0)
        view = _View.of(native, flow)
    if seed is None and noise_sampler is None and resolved.n_noise:
        seed = int(torch.randint(2**62, ()))
    _check_ends(view, levels, sources or (["schedule"] if schedule else []))
    state = x if x.dtype in (torch.float32, torch.float64) else x.float()
    draw = _draws(resolved, flow, state, noise_sampler, seed)
    steps = _steps(native)
    ones = x.new_ones([len(x)])
    like = sigmas if sigmas.is_floating_point() else sigmas.float()
    starts = [like.new_tensor(level) for level in view.knots]
    places = [like.new_tensor(level) for level in view.levels]
    with torch.no_grad(), progress_of(disable is False) as shown:
        shown.stage("sampling", native.nfe)
        execution = Execution(native, state * view.scale, draw=draw, keep_inputs=True)
        while (request := execution.request) is not None:
            k = request.at
            state_seen = (request.x / view.scales[k]).to(x.dtype)
            denoised = model(state_seen, (places[k] * ones).to(x.dtype), **extra)
            _check_output(denoised, x)
            if callback is not None:
                callback(
                    {
                        "x": state_seen,
                        "i": steps[k],
                        "sigma": starts[steps[k]],
                        "sigma_hat": places[k],
                        "denoised": denoised,
                        "evaluation": k,
                    }
                )
            execution.advance(denoised.to(state.dtype))
            shown.tick()
        return (execution.result / view.end_scale).to(x.dtype)


def named(solver: str, **options: Any) -> Callable[..., Tensor]:
    """Returns :func:`sampler` with a solver and its options, for a place that takes a sampler of k-diffusion.

    Raises:
        ValueError, TypeError: If there is no such solver, or it has no such option.
    """
    solver = _plain(solver)
    if solver != "auto":
        SOLVERS[solver]
    function = functools.partial(sampler, solver=solver, **options)
    functools.update_wrapper(function, sampler)
    function.__name__ = f"sample_{_our_name(solver).replace('-', '_')}"  # type: ignore[attr-defined]
    return function


def _plain(solver: str) -> str:
    """Returns a name without the prefix of k-diffusion's functions."""
    if not isinstance(solver, str):
        raise TypeError(f"solver must be a name, got {type(solver).__name__}")
    return solver.removeprefix("sample_")


def _our_name(solver: str) -> str:
    return SOLVERS.own(solver)[0]


def _levels(x: Tensor, sigmas: Tensor, flow: bool) -> list[float]:
    """Returns the noise levels as numbers, checked; of a flow the first is below 1."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise TypeError(f"x must be a floating tensor with shape (B, ...), got {_shape(x)}")
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must be a tensor of at least 2 noise levels, got {_shape(sigmas)}"
        )
    levels = sigmas.detach().double().cpu().tolist()
    for k, (one, two) in enumerate(itertools.pairwise(levels)):
        if not two < one:
            raise ValueError(
                f"sigmas must decrease strictly, got sigmas[{k}] = {one:g} and sigmas[{k + 1}] = {two:g}"
            )
    if not levels[-1] >= 0 or not levels[0] < float("inf"):
        raise ValueError(
            f"sigmas must be finite and at least 0, got {levels[0]:g} to {levels[-1]:g}"
        )
    if flow:
        if levels[0] > 1:
            raise ValueError(f"the noise levels of a flow are at most 1, got {levels[0]:g}")
        levels[0] = min(levels[0], PURE_NOISE)
    return levels


def _shape(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_output(
    output: object, x: Tensor, what: str = "the model must return the denoised data"
) -> None:
    if not isinstance(output, Tensor) or output.shape != x.shape:
        raise ValueError(f"{what} with the shape of x, {tuple(x.shape)}, got {_shape(output)}")


@functools.lru_cache(maxsize=64)
def _edm(low: float, high: float) -> EDM:
    return EDM(low, high)


@functools.lru_cache(maxsize=64)
def _flow(high: float) -> Flow:
    return Flow(max(high, 0.002))


def _planned(
    levels: list[float],
    solver: str,
    recipe: Any,
    profile: Any,
    plan: Plan | None,
    grid: str | None,
    schedule: NoiseSchedule | None,
    flow: bool,
    options: Mapping[str, Any],
) -> Plan:
    """Returns the plan of a call; all that needs no network is checked here."""
    if plan is not None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
        return plan
    steps, to_zero = len(levels) - 1, levels[-1] == 0
    if profile is not None:
        if isinstance(profile, (str, Path)):
            profile = Profile.load(profile)
        request = SamplerRequest(profile=profile, nfe=steps)
        return resolve_plan(profile.schedule, request).plan
    if recipe is not None:
        if isinstance(recipe, (str, Path)):
            recipe = SamplerRecipe.load(recipe)
        if recipe.kind not in ("solver", "plan"):
            raise ValueError(f"a recipe of kind {recipe.kind!r} has no plan; use fewstep.sample")
        if (own := recipe.plan_alone()) is not None:
            return own
        if recipe.schedule is None:
            raise ValueError(
                "this recipe is for any schedule; give its solver and options, or a recipe that names its schedule"
            )
        return recipe.plan_for(schedule_from_record(recipe.schedule))
    lowest = levels[-2] if to_zero else levels[-1]
    if schedule is None:
        ends = (lowest, levels[0]) if lowest < levels[0] else (levels[0] * 1e-3, levels[0])
        schedule = _flow(levels[0]) if flow else _edm(*ends)
    times = [_time(schedule, level, flow) for level in levels if level > 0]
    if grid is not None:
        if ends := sorted({"t_start", "t_end", "to_zero", "strength"} & set(options)):
            raise Contradiction(
                f"sigmas has the ends of the grid, got {as_text(ends)} as well; leave "
                f"{'it' if len(ends) == 1 else 'them'} out"
            )
        span = {"t_start": times[0], "t_end": times[-1], "to_zero": to_zero}
        request = SamplerRequest(solver, steps=steps, grid=grid, options={**span, **options})
        return resolve_plan(schedule, request).plan
    if to_zero:
        times.append(schedule.t_zero)
    time_grid = TimeGrid(schedule, torch.tensor(times, dtype=torch.float64), to_zero)
    return resolve_plan(schedule, SamplerRequest(solver, grid=time_grid, options=options)).plan


def _time(schedule: NoiseSchedule, level: float, flow: bool) -> float:
    """Returns the time of a noise level."""
    if isinstance(schedule, EDM) and not flow:
        return level
    if isinstance(schedule, Flow) and flow:
        return level
    rho = torch.tensor(level / (1 - level) if flow else level, dtype=torch.float64)
    time = float(schedule.time(-rho.log()))
    # The ends of a table, in float32, may lie a rounding outside of it.
    if schedule.t_max < time < schedule.t_max + 1e-3 * (schedule.t_max - schedule.t_min):
        return schedule.t_max
    return time


class _View(NamedTuple):
    """A plan as the model sees it: noise levels, and the factors from its states to the plan's.

    Attributes:
        scale: The factor of the initial state.
        scales: The factors at the evaluations.
        end_scale: The factor of the sample.
        levels: The noise levels of the evaluations.
        knots: Those of the knots.
    """

    scale: float
    scales: list[float]
    end_scale: float
    levels: list[float]
    knots: list[float]

    @classmethod
    def of(cls, plan: Plan, flow: bool) -> _View:
        grid = plan.grid
        alpha, sigma = plan.scales.detach().unbind(1)
        total, knots = (alpha + sigma, grid.alpha + grid.sigma) if flow else (alpha, grid.alpha)
        knots = knots.detach()
        return cls(
            float(knots[0]),
            total.tolist(),
            float(knots[-1]),
            (sigma / total).tolist(),
            (grid.sigma.detach() / knots).tolist(),
        )


def _check_ends(view: _View, levels: list[float], sources: list[str]) -> None:
    what = sources[0] if sources else "grid"
    if abs(view.knots[0] - levels[0]) > 1e-3 * levels[0]:
        raise ValueError(
            f"x has the noise level sigmas[0] = {levels[0]:.5g}, but the {what} begins at {view.knots[0]:.5g}; "
            "give sigmas and x of its first level"
        )
    if levels[-1] > 0 and abs(view.knots[-1] - levels[-1]) > 1e-3 * levels[-1]:
        raise ValueError(
            f"the last of sigmas is {levels[-1]:.5g}, but the {what} ends at {view.knots[-1]:.5g}; give sigmas "
            "with its last level, or with a last 0"
        )


def _check_arguments(extra_args: Any, callback: Any, noise_sampler: Any, seed: Any) -> None:
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args must be a dict, got {type(extra_args).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    if noise_sampler is not None and not callable(noise_sampler):
        raise TypeError(f"noise_sampler must be callable, got {type(noise_sampler).__name__}")
    if seed is not None:
        NoiseSource(seed, ())  # checks it
        if noise_sampler is not None:
            raise Contradiction(
                "noise_sampler and seed are both the source of noise; give one of them"
            )


def _steps(plan: Plan) -> list[int]:
    """Returns in which step each evaluation is."""
    steps, step = list[int](), 0
    for row in plan.structure.rows:
        if isinstance(row, Eval):
            steps.append(min(step, len(plan.knots) - 2))
        elif isinstance(row, Lin) and row.state is not None:
            step = row.state
    return steps


def _draws(
    plan: Plan, flow: bool, state: Tensor, noise_sampler: NoiseSampler | None, seed: int | None
) -> Callable[[int], Tensor] | None:
    if not plan.n_noise:
        return None
    intervals = draw_intervals(plan)
    shape = state.shape[1:]
    if noise_sampler is None:
        source: NoiseSource = BrownianSource(seed or 0, range(len(state)), intervals)
        return lambda k: source.draw(k, shape, dtype=state.dtype, device=state.device)
    if None in intervals:
        raise ValueError(
            f"{plan.name} adds noise that belongs to no step from one level to another; leave noise_sampler out"
        )
    rho = torch.exp(-torch.tensor(intervals, dtype=torch.float64))
    levels = (rho / (1 + rho) if flow else rho).to(state.device, state.dtype)

    def draw(k: int) -> Tensor:
        start, end = levels[k].unbind()
        drawn = noise_sampler(start, end)
        _check_output(drawn, state, "noise_sampler must return noise")
        return drawn.to(state)

    return draw


def _adaptive(
    model: Model,
    x: Tensor,
    levels: list[float],
    extra: Mapping[str, Any],
    callback: Callable[[dict[str, Any]], Any] | None,
    solver: str,
    grid: str | None,
    flow: bool,
    options: Mapping[str, Any],
) -> Tensor:
    """Runs an adaptive solver from the first to the last positive level; onto 0 the denoised data are the end."""
    if grid is not None:
        raise ValueError(f"{solver} chooses its steps while it runs; leave grid out")
    positive = [level for level in levels if level > 0]
    if len(positive) < 2:
        raise ValueError(f"{solver} needs two positive noise levels, got {levels}")
    high, low = positive[0], positive[-1]
    if extra and len(x) > 1:
        raise ValueError(
            f"{solver} evaluates samples that need more steps without the others, so extra_args for a batch of "
            f"{len(x)} do not fit; sample one at a time, or use another solver"
        )
    schedule = _flow(high) if flow else _edm(low, high)

    counter = itertools.count()

    def network(y: Tensor, sigma: Tensor) -> Tensor:
        denoised = model(y, sigma.to(y.dtype), **extra)
        if callback is not None:
            number, level = next(counter), sigma.max()
            called = {"x": y, "i": number, "sigma": level, "sigma_hat": level}
            callback({**called, "denoised": denoised, "evaluation": number})
        return denoised

    denoiser = Denoiser.wrap(
        network, schedule=schedule, prediction=Prediction.X0, event_shape=tuple(x.shape[1:])
    )
    span = {"t_start": high, "t_end": low}
    adaptive = resolve(denoiser, SamplerRequest(solver, options={**span, **options})).sampler
    state = x if x.dtype in (torch.float32, torch.float64) else x.float()
    end = adaptive.run(state, Run(NoiseSource(0, range(len(x))))).x
    if levels[-1] == 0:
        with torch.no_grad():
            end = network(end, end.new_full([len(x)], low))
    return end.to(x.dtype)

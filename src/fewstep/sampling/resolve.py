r"""The resolver: from a request to a sampler and its recipe, or to a plan.

Every entry point (``sample``, ``steps``, ``record``, ``compare``, ``tune``, ``plan``, ``PlanScheduler``, the commands) turns its
arguments into a :class:`SamplerRequest` and calls one of two functions:

- :func:`resolve` has a model, and uses the model's schedule, fingerprint, guidance and built-in sampler;
- :func:`resolve_plan` has a schedule only: for plans without a model, and for adapters. Its result has the plan, the
  solver object and the grid::

      made = resolve_plan(schedule, SamplerRequest("auto", nfe=8), integer_times=True)
      made.plan, made.solver, made.grid, made.chosen

The rules for arguments that are given together, all of them here:

=====================  ================================================================================
plan, recipe, profile  one of them, with nothing but its own nfe (or steps); a profile allows any
nfe, steps             one of them; with given times only their own number
grid, times            ``times`` alone are the grid ``explicit``; with another grid a contradiction
head_start             not with ``t_start`` or ``strength``, nor with an image; with given times only their first
image                  needs a start: ``strength``, ``t_start``, or a plan or grid that begins below the largest time
strength               needs an image; not with ``t_start``, nor with given times
auto                   the model's profile (``denoiser.profile``), if it has one, and else the
                       static default; a given grid is used
dopri5                 its own options, ``t_start``, ``t_end``, ``strength`` only; no plan, nfe, steps, grid, head start
a built-in sampler     ``auto``, its own budgets and options only; no image
=====================  ================================================================================

Each contradiction is a :class:`~fewstep.sampling.request.Contradiction` with one text at every entry point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.diffusion.grids import GRIDS, TimeGrid, check_start
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser, matches
from fewstep.models.wrappers import Guided
from fewstep.plans.plan import Plan
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.auto import AUTO
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.planning import (
    GRID_OPTIONS,
    Planned,
    check_adaptive,
    check_options,
    is_adaptive,
    planned,
    solver_options,
)
from fewstep.sampling.profile import Profile, names_profile, read_profile
from fewstep.sampling.protocol import BuiltInSampler, Sampler, refusal
from fewstep.sampling.recipe import SamplerRecipe, recipe_of
from fewstep.sampling.request import UNSET, Contradiction, SamplerRequest, as_text
from fewstep.solvers import SOLVERS, Solver

logger = logging.getLogger("fewstep")

DEFAULT_NFE = 10
"""The budget if none is given."""

SOURCES = ("plan", "recipe", "profile")

SPAN = frozenset({"t_start", "t_end", "strength"})
"""The options that set the interval of an adaptive solver."""


@dataclass(frozen=True)
class Resolved:
    """A resolved request: the sampler, and its recipe.

    Attributes:
        sampler: The sampler; its ``denoiser`` has the guidance around it.
        chosen: What ``auto`` chose, in one line, or ``None``.
    """

    sampler: Sampler
    chosen: str | None = None
    _recipe: Callable[[], SamplerRecipe] = field(repr=False, kw_only=True)

    @cached_property
    def recipe(self) -> SamplerRecipe:
        """The recipe, for files and display; resolved again it is the same sampler."""
        return self._recipe()


def resolve(
    denoiser: Denoiser,
    request: SamplerRequest,
    *,
    guidance: float | None = None,
    image: bool = False,
    force: bool = False,
    default_nfe: int = DEFAULT_NFE,
) -> Resolved:
    """Returns the sampler that a request describes for a model, and its recipe.

    Plans are cached: the second call costs a look-up. No network evaluation.

    Arguments:
        denoiser: The model.
        request: The request.
        guidance: The scale of classifier-free guidance, 1 for none; it replaces that of a recipe.
        image: Whether the run starts from an image instead of noise, which needs a first time.
        force: Whether to use a recipe or profile although it was made for another model.
        default_nfe: The number of network evaluations if neither nfe nor steps nor times are given.

    Raises:
        Contradiction: If parts of the request contradict each other or the model.
        ValueError: If a name is unknown, a budget cannot be met, or a file cannot be read.
        TypeError: If something has the wrong type, or an option is unknown.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> resolved = fewstep.resolve(denoiser, fewstep.SamplerRequest("tab3", nfe=10))
        >>> resolved.sampler.nfe, resolved.recipe.name
        (10, 'tab3')
    """
    check_denoiser(denoiser)
    if not isinstance(request, SamplerRequest):
        raise TypeError(f"request must be a SamplerRequest, got {type(request).__name__}")
    check_sources(request)
    request = _with_measured(denoiser.schedule, request, denoiser, guidance, force=force)
    if isinstance(request.profile, (str, Path, Profile)):
        budget = request.steps or request.nfe or default_nfe
        _check_operator(denoiser, request, guidance, image=image)
        profile = read_profile(request.profile, denoiser.schedule)
        _check_profile(profile, denoiser, guidance, force=force)
        inner = profile.request(nfe=None if request.steps else budget, steps=request.steps)
        return _of_solver(denoiser, inner, guidance, image=image, chose=True)
    recipe = request.recipe
    if recipe is not UNSET:
        loaded = recipe if isinstance(recipe, SamplerRecipe) else _loaded(recipe)
        return _of_recipe(denoiser, request, loaded, guidance, image=image, force=force)
    _check_operator(denoiser, request, guidance, image=image)
    if (own := denoiser.built_in_sampler()) is not None:
        return _of_operator(own, request)
    if isinstance(request.plan, Plan):
        plan = request.plan
        _check_budget(request, "plan", plan)
        _check_image(plan, {}, image=image)
        sampler = PlanSampler(plan, _guided(denoiser, guidance))
        return Resolved(
            sampler,
            _recipe=lambda: SamplerRecipe(
                kind="plan", name=plan.name, plan=plan, guidance=_stored(guidance)
            ),
        )
    if is_adaptive(request.solver):
        return _of_adaptive(denoiser, request, guidance, image=image)
    profile = None if image else own_profile(denoiser, request, guidance, default_nfe)
    if profile is not None:
        budget = None if request.steps else request.nfe or default_nfe
        request = profile.request(nfe=budget, steps=request.steps)
        return _of_solver(denoiser, request, guidance, image=image, chose=True)
    return _of_solver(denoiser, request, guidance, image=image, default_nfe=default_nfe)


def resolve_plan(
    schedule: NoiseSchedule,
    request: SamplerRequest,
    *,
    integer_times: bool = False,
    default_nfe: int | None = None,
) -> Planned:
    """Returns the plan that a request describes on a schedule, with its solver and its grid.

    Arguments:
        schedule: The noise schedule.
        request: The request. A plan or a recipe of a plan has no solver: give those to
            :func:`resolve`, or run them as they are.
        integer_times: Whether the grid is rounded to training timesteps.
        default_nfe: The budget if none is given; left out, a budget must be given.

    Raises:
        Contradiction, ValueError, TypeError: As :func:`resolve`.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {schedule!r}; make one with fewstep.schedule(name)"
        )
    check_sources(request)
    request = _with_measured(schedule, request)
    if request.plan is not UNSET:
        raise TypeError("this is a plan already; run it as it is")
    chose = request.profile is not UNSET
    if isinstance(request.profile, (str, Path, Profile)):
        profile = read_profile(request.profile, schedule)
        request = profile.request(
            nfe=request.nfe or (None if request.steps else default_nfe),
            steps=request.steps,
        )
    elif request.recipe is not UNSET:
        recipe = (
            request.recipe
            if isinstance(request.recipe, SamplerRecipe)
            else _loaded(request.recipe)
        )
        if recipe.kind != "solver":
            raise TypeError(f"a recipe of kind {recipe.kind!r} is not of a solver")
        resolved = planned(schedule, recipe.request(), integer_times=integer_times)
        _check_budget(request, "recipe", resolved.plan)
        return resolved
    chose = chose or (names_profile(request.grid) and request.solver in (UNSET, AUTO))
    request = _unfolded(schedule, request, default_nfe)
    resolved = planned(schedule, request, integer_times=integer_times, default_nfe=default_nfe)
    return replace(resolved, chosen=_measured(resolved)) if chose else resolved


def plan(
    solver: str | Solver,
    schedule: NoiseSchedule,
    *,
    nfe: int | None = None,
    steps: int | None = None,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    profile: Profile | str | Path | None = None,
    integer_times: bool = False,
    **options: Any,
) -> Plan:
    r"""Returns the plan of a solver.

    Cost: no network evaluation; a run of the plan makes ``Plan.nfe`` for each sample.

    Arguments:
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"``, or a solver.
        schedule: The noise schedule.
        nfe: The number of network evaluations; or
        steps: the number of steps. Neither is needed if the grid has its times.
        grid: A name in :data:`fewstep.GRIDS`, ``"auto:FILE"`` for the times of a profile (and, with
            solver ``"auto"``, its solver), or a grid; left out, the solver's own.
        head_start: A time below the schedule's largest: the evaluations above it are replaced by the
            Gaussian solution with the mean and the variance of the data.
        profile: The profile of a model, or its path; with solver ``"auto"``.
        integer_times: Whether the grid is rounded to training timesteps.
        options: Options of the grid (``t_start`` or ``strength``, ``t_end``, ``to_zero``, ``power``, ``rho``,
            ``times``) and of the solver.

    Raises:
        ValueError: If a name is unknown, the budget cannot be met (the message has the
            nearest budgets), or two arguments contradict each other.
        TypeError: If neither solver nor grid have such an option (the message has theirs).

    Example:
        >>> plan = fewstep.plan("tab3", fewstep.schedule("vp-linear"), nfe=10)
        >>> plan.nfe, plan.n_noise, plan.prediction.value
        (10, 0, 'eps')
    """
    request = SamplerRequest(
        solver,
        nfe,
        steps,
        grid,
        head_start,
        options,
        profile=profile,
    )
    return resolve_plan(schedule, request, integer_times=integer_times).plan


def check_denoiser(denoiser: object) -> None:
    """Raises ``TypeError`` unless a model is a :class:`Denoiser`; the message says how to create one."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"a Denoiser is needed, got {type(denoiser).__name__}; "
            "make one with fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
        )


def check_sources(request: SamplerRequest) -> None:
    """Raises :class:`Contradiction` for a plan, recipe or profile with anything beside it, or two budgets."""
    profile = request.profile
    if profile is not UNSET and not isinstance(profile, (str, Path, Profile)):
        raise TypeError(
            f"profile must be a Profile or the path of one, got {type(profile).__name__}"
        )
    sources = [name for name in SOURCES if getattr(request, name) is not UNSET]
    if len(sources) > 1:
        raise Contradiction(f"{as_text(sources)} each are a whole sampler; give one of them")
    if request.nfe is not UNSET and request.steps is not UNSET:
        raise Contradiction(
            f"give nfe or steps, not both; got nfe={request.nfe} and steps={request.steps}"
        )
    if sources:
        ours = (*sources, "nfe", "steps")
        if sources == ["profile"] and request.solver == AUTO:
            ours = (*ours, "solver")  # auto uses the profile
        extra = [name for name in request.given if name not in ours]
        if extra:
            raise Contradiction(
                f"a {sources[0]} has its solver, times and options already, got {as_text(extra)} as "
                f"well; leave {'it' if len(extra) == 1 else 'them'} out"
            )


def _of_operator(own: BuiltInSampler, request: SamplerRequest) -> Resolved:
    """Returns the built-in sampler of a budget; the recipe has its fixed options, and others that are not the default."""
    configured = own.configured(request.nfe or own.nfe, **request.options)
    options = {k: v for k, v in configured.options.items() if v != own.options[k]}
    options |= configured.fixed
    return Resolved(
        configured,
        _recipe=lambda: SamplerRecipe(
            kind="operator", name="operator", nfe=configured.nfe, options=options
        ),
    )


def _check_operator(
    denoiser: Denoiser, request: SamplerRequest, guidance: float | None, *, image: bool
) -> None:
    own: BuiltInSampler | None = denoiser.built_in_sampler()
    if own is None:
        return
    allowed = {"nfe", *own.options}
    given = [
        n
        for n in request.given
        if n not in allowed and not (n == "solver" and request.solver == AUTO)
    ]
    given += ["image"] * image + ["guidance"] * (guidance not in (None, 1))
    if request.nfe is not UNSET and request.nfe not in own.budgets:
        given.insert(0, f"nfe={request.nfe}")
    if given:
        raise Contradiction(refusal(own, as_text(given)))


def _check_budget(request: SamplerRequest, kind: str, plan: Plan) -> None:
    if request.nfe is not UNSET and request.nfe != plan.nfe:
        raise Contradiction(
            f"this {kind} makes {plan.nfe} evaluations, not {request.nfe}; leave nfe out, or use "
            f"another {kind}"
        )
    steps = len(plan.knots) - 1
    if request.steps is not UNSET and request.steps != steps:
        raise Contradiction(
            f"this {kind} has {steps} steps, not {request.steps}; leave steps out, or use another "
            f"{kind}"
        )


def _check_image(
    plan: Plan, options: Mapping[str, Any], *, image: bool, whole: bool = False
) -> None:
    """Raises unless an image has a first time, and a share of the grid an image.

    Arguments:
        plan: The plan.
        options: The options of its grid.
        image: Whether there is an image.
        whole: Whether the plan begins where nobody asked it to.
    """
    if image and plan.head:
        raise Contradiction(
            "an image and a head start both set the initial state; leave one of them out (strength "
            "sets how much noise the image gets)"
        )
    first = plan.schedule.t_max if whole else float(plan.knots[0].detach())
    _check_start(plan.schedule, first, options, image=image)


def _check_start(
    schedule: NoiseSchedule, first: float, options: Mapping[str, Any], *, image: bool
) -> None:
    asked = options.get("strength") is not None or options.get("t_start") is not None
    if image and not asked and first >= schedule.t_max * (1 - 1e-9):
        raise Contradiction(
            f"an image needs a start: this sampler begins at t = {first:g}, the largest time, where "
            "almost nothing of an image remains; give strength= (above 0 and at most 1, the share "
            f"of the grid that is run), or the option t_start, a time up to {schedule.t_max:g}"
        )
    if options.get("strength") is not None and not image:
        raise Contradiction(
            "strength is the share of the grid that is run from an image, and there is no image; "
            "give image=, or leave strength out"
        )


def _check_profile(
    profile: Profile, denoiser: Denoiser, guidance: float | None, *, force: bool
) -> None:
    if force:
        return
    if profile.fingerprint and not matches(denoiser, profile.fingerprint):
        raise ValueError(
            "the profile was measured on another model (fingerprint "
            f"{profile.fingerprint[:12]}…); measure this model, or use it all the same: force=True "
            "(--force)"
        )
    scale = _scale(denoiser, guidance)
    if profile.guidance is not None and profile.guidance != scale:
        raise ValueError(
            f"the profile was measured with guidance {profile.guidance:g}, this run has {scale:g}; "
            "measure the model with that guidance, or use it all the same: force=True (--force)"
        )


def own_profile(
    denoiser: Denoiser, request: SamplerRequest, guidance: float | None, default_nfe: int
) -> Profile | None:
    """Returns the model's profile, if the request is for ``auto`` and the profile covers it.

    Arguments:
        denoiser: The model.
        request: The request.
        guidance: The scale of guidance; a profile holds for its own.
        default_nfe: The budget if the request has none.
    """
    base = denoiser.inner if isinstance(denoiser, Guided) else denoiser
    profile = base.profile
    free = request.solver in (UNSET, AUTO) and not set(request.given) - {"solver", "nfe", "steps"}
    if profile is None or not free or not profile.recommended:
        return None
    scale, budget = _scale(denoiser, guidance), request.steps or request.nfe or default_nfe
    if profile.guidance not in (None, scale):
        logger.info(
            "the model's profile was measured with guidance %g, this run has %g: auto uses the "
            "static default; measure it with fewstep fit --guidance %g",
            profile.guidance,
            scale,
            scale,
        )
        return None
    known = profile.recommended
    return profile if min(known) <= budget <= max(known) else None


def _of_solver(
    denoiser: Denoiser,
    request: SamplerRequest,
    guidance: float | None,
    *,
    image: bool,
    default_nfe: int | None = None,
    chose: bool = False,
) -> Resolved:
    schedule = denoiser.schedule
    chose = chose or (names_profile(request.grid) and request.solver in (UNSET, AUTO))
    request = _unfolded(schedule, request, default_nfe)
    integer = denoiser.integer_times
    resolved = planned(schedule, request, integer_times=integer, default_nfe=default_nfe)
    # A first time that auto or the solver's own grid chose is no start for an image.
    chosen_start = resolved.chosen is not None or resolved.grid_name is None
    own = chosen_start and "t_start" not in request.options
    options = {k: v for k, v in resolved.options.items() if not (own and k == "t_start")}
    _check_image(resolved.plan, {**options, **request.options}, image=image, whole=own)
    chosen = _measured(resolved) if chose else resolved.chosen
    if chosen is not None:
        logger.info("auto chose %s", chosen)

    def recipe() -> SamplerRecipe:
        return replace(recipe_of(schedule, resolved), guidance=_stored(guidance))

    return Resolved(
        PlanSampler(resolved.plan, _guided(denoiser, guidance)), chosen, _recipe=recipe
    )


def _of_adaptive(
    denoiser: Denoiser, request: SamplerRequest, guidance: float | None, *, image: bool
) -> Resolved:
    check_adaptive(request, plan=False)
    options = dict(request.options)
    solver = request.solver
    if isinstance(solver, str):
        name = solver
        check_options(name, None, options, solver_options(name), SPAN)
    else:
        assert isinstance(solver, Solver)
        name = solver.name
        own = {key: getattr(solver, key) for key in solver_options(name)}
        if others := sorted(set(options) - SPAN):
            raise Contradiction(f"a solver object already has its options, got {as_text(others)}")
        options = {**own, **options}
    schedule = denoiser.schedule
    if "t_start" in options:
        check_start(schedule, options["t_start"])
    first = float(options.get("t_start") or schedule.t_max)
    _check_start(schedule, first, options, image=image)
    if "strength" in options:
        # It has no grid, so the share is one of log rho, in which it integrates.
        ends = {key: options.get(key) for key in SPAN}
        options["t_start"] = float(GRIDS["log-rho"](schedule, 1, **ends).times[0])
        del options["strength"]
    sampler = AdaptiveSampler(_guided(denoiser, guidance), **options)
    return Resolved(
        sampler,
        _recipe=lambda: SamplerRecipe(
            kind="adaptive", name=name, options=options, guidance=_stored(guidance)
        ),
    )


def _of_recipe(
    denoiser: Denoiser,
    request: SamplerRequest,
    recipe: SamplerRecipe,
    guidance: float | None,
    *,
    image: bool,
    force: bool,
) -> Resolved:
    own: BuiltInSampler | None = denoiser.built_in_sampler()
    if recipe.kind != "operator" and own is not None:
        raise Contradiction(refusal(own, "recipe"))
    if guidance is not None:
        recipe = replace(recipe, guidance=_stored(guidance))
    elif isinstance(denoiser, Guided) and recipe.guidance not in (None, denoiser.scale):
        raise Contradiction(
            f"the model is guided with scale {denoiser.scale:g}, the recipe with "
            f"{recipe.guidance:g}; give the model without guidance"
        )
    if recipe.kind == "adaptive":
        check_adaptive(replace(request, solver=recipe.name, recipe=UNSET), plan=False)
    sampler = recipe.build(denoiser, force=force)
    if recipe.kind == "operator":
        _check_operator(denoiser, replace(request, recipe=UNSET), guidance, image=image)
        if request.nfe is not UNSET and request.nfe != sampler.nfe:
            raise Contradiction(
                f"this recipe makes {sampler.nfe} evaluations, not {request.nfe}; leave nfe out, or use "
                "another recipe"
            )
    if isinstance(sampler, PlanSampler):
        _check_budget(request, "recipe", sampler.plan)
        automatic = (
            recipe.kind == "solver" and recipe.grid is None and "t_start" not in recipe.options
        )
        _check_image(sampler.plan, recipe.options, image=image, whole=automatic)
    elif isinstance(sampler, AdaptiveSampler):
        first = sampler.t_start or denoiser.schedule.t_max
        _check_start(denoiser.schedule, first, recipe.options, image=image)
    return Resolved(sampler, _recipe=lambda: recipe)


def _unfolded(
    schedule: NoiseSchedule, request: SamplerRequest, default_nfe: int | None
) -> SamplerRequest:
    """Returns a request with the times of ``auto:FILE``."""
    if not names_profile(request.grid):
        return request
    extra = sorted(GRID_OPTIONS & set(request.options))
    extra += ["head_start"] if request.head_start is not UNSET else []
    if extra:
        raise Contradiction(
            f"the grid {request.grid!r} has its times already, got {as_text(extra)} as well; leave "
            f"{'it' if len(extra) == 1 else 'them'} out"
        )
    profile = read_profile(request.grid, schedule)
    solver = request.solver if request.solver not in (UNSET, AUTO) else None
    unfolded = profile.request(
        nfe=request.nfe or (None if request.steps else default_nfe),
        steps=request.steps,
        solver=solver,  # type: ignore[arg-type]
    )
    return replace(unfolded, options={**unfolded.options, **request.options})


def _with_measured(
    schedule: NoiseSchedule,
    request: SamplerRequest,
    denoiser: Denoiser | None = None,
    guidance: float | None = None,
    *,
    force: bool = False,
) -> SamplerRequest:
    """Returns a request with the statistics of its solver: those of the profile in the option, or else of the model's.

    Without any the solver has a documented default, which the log says.
    """
    solver = request.solver
    named = isinstance(solver, str) and solver != AUTO and solver in SOLVERS
    option = SOLVERS[solver]().measured if named else None  # type: ignore[index]
    if option is None:
        return request
    given = request.options.get(option)
    if isinstance(given, (str, Path, Profile)):
        profile = read_profile(given, schedule)
        if denoiser is not None:
            _check_profile(profile, denoiser, guidance, force=force)
        return replace(request, options={**request.options, option: profile.of_model()})
    if given is not None or names_profile(request.grid):
        return request
    own = None
    if denoiser is not None:
        own = (denoiser.inner if isinstance(denoiser, Guided) else denoiser).profile
    if own is not None and own.statistics and denoiser is not None:
        scale = _scale(denoiser, guidance)
        if own.guidance in (None, scale):
            return replace(request, options={**request.options, option: own.statistics})
    logger.warning(
        "%s has no %s of this model%s and takes its default, data prediction; measure them with fewstep fit, and "
        "give the profile as the option %s",
        solver,
        option,
        "" if guidance in (None, 1) else " with this guidance",
        option,
    )
    return request


def _measured(resolved: Planned) -> str:
    return (
        f"{resolved.solver.name} at the times of the profile with {resolved.plan.nfe} evaluations"
    )


def _loaded(recipe: Any) -> SamplerRecipe:
    if isinstance(recipe, str) or hasattr(recipe, "__fspath__"):
        return SamplerRecipe.load(recipe)
    raise TypeError(
        f"recipe must be a SamplerRecipe or the path of one, got {type(recipe).__name__}"
    )


def _guided(denoiser: Denoiser, guidance: float | None) -> Denoiser:
    if not denoiser.null_condition:
        denoiser.accepts.check_arguments({"guidance": guidance})
    return denoiser if guidance in (None, 1) else Guided(denoiser, guidance)  # type: ignore[arg-type]


def _stored(guidance: float | None) -> float | None:
    return None if guidance in (None, 1) else guidance


def _scale(denoiser: Denoiser, guidance: float | None) -> float:
    if guidance is not None:
        return float(guidance)
    return denoiser.scale if isinstance(denoiser, Guided) else 1.0

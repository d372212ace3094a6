"""The samplers of a comparison, as texts (names with options, files, peers) or as callables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.base.files import loads_json
from fewstep.diffusion.grids import GRIDS, TimeGrid
from fewstep.models.denoiser import Denoiser
from fewstep.plans.plan import Plan
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.profile import PREFIX, Profile, is_profile
from fewstep.sampling.protocol import Sampler
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import Resolved, resolve
from fewstep.solvers import Solver

SYNTAX = "NAME[@GRID[:VALUE]][+OPTION=VALUE]..."
"""The syntax of a sampler; it may also be the path of a file or of an operator's folder."""

GRID_VALUE = {"power": "power", "karras": "rho"}
"""The option that the value after a grid's name sets."""

PEERS = "diffusers:"

Build = Callable[[Denoiser, int], Sampler]
"""Takes a denoiser and a number of network evaluations, returns the sampler."""


@dataclass(frozen=True)
class Entry:
    """A sampler of a comparison, at any budget or at its own.

    Attributes:
        name: Its name in tables.
        build: Returns it for a denoiser and a budget.
        recipe: Returns its recipe, or ``None`` if this kind of sampler has none.
        nfe: The one number of network evaluations that it can make; ``None`` if it has a budget.
    """

    name: str
    build: Build
    recipe: Callable[[Denoiser, int], SamplerRecipe | None]
    nfe: int | None = None


def read_entries(samplers: Any) -> list[Entry]:
    """Returns the samplers of a comparison.

    Arguments:
        samplers: One as :func:`entry_of` takes it, texts with commas between, several in a list, or a mapping
            from names to them or to functions (denoiser, nfe) -> sampler.

    Raises:
        ValueError: If there is none, one is named twice, or a text cannot be read.
        TypeError: If one is of another kind.
    """
    if isinstance(samplers, Mapping):
        entries = [_named(name, one) for name, one in samplers.items()]
    elif isinstance(samplers, str):
        entries = [read_entry(text) for text in _split(samplers)]
    elif isinstance(samplers, Sequence) and not _is_pair(samplers):
        entries = _told_apart([entry_of(one) for one in samplers])
    else:
        entries = [entry_of(samplers)]
    if not entries:
        raise ValueError("give at least one sampler to compare, for example tab3,ddim")
    names = [one.name for one in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"the sampler {twice[0]!r} is named twice; from Python a mapping gives samplers names"
        )
    return entries


def entry_of(thing: Any) -> Entry:
    """Returns the entry of one sampler.

    Arguments:
        thing: A text for :func:`read_entry`; a pair (solver, grid); a solver, a request, a profile, a recipe,
            a plan or a tuned sampler; or a sampler, which makes its own number of evaluations.

    Raises:
        ValueError: If a text cannot be read.
        TypeError: If it is something else.
    """
    if isinstance(thing, str):
        return read_entry(thing)
    if isinstance(thing, Path):
        return read_entry(str(thing))
    if _is_pair(thing):
        request = SamplerRequest(solver=thing[0], grid=thing[1])
    elif isinstance(thing, Solver):
        request = SamplerRequest(solver=thing)
    elif isinstance(thing, Profile):
        request = SamplerRequest(profile=thing)
    elif isinstance(thing, Plan):
        request = SamplerRequest(plan=thing)
    elif isinstance(thing, SamplerRecipe):
        request = SamplerRequest(recipe=thing)
    elif isinstance(thing, SamplerRequest):
        request = thing
    elif isinstance(getattr(thing, "recipe", None), SamplerRecipe):  # of fewstep.tune
        request = SamplerRequest(recipe=thing.recipe)
    elif all(hasattr(thing, name) for name in ("denoiser", "nfe", "start", "run")):
        return _sampler(thing)
    else:
        raise TypeError(
            "a sampler of a comparison is a text, a pair (solver, grid), a Solver, SamplerRequest, Profile, "
            f"SamplerRecipe, Plan, TunedSampler or a sampler, got {type(thing).__name__}"
        )
    return _request(request)


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """Returns entries of which those with a budget of their own have it in their names if others are named so."""
    names = [one.name for one in entries]
    return [
        replace(one, name=f"{one.name} ({one.nfe})")
        if one.nfe is not None and names.count(one.name) > 1
        else one
        for one in entries
    ]


def _is_pair(thing: Any) -> bool:
    """Whether it is a solver and a grid in a tuple; two texts in a list are two samplers."""
    return (
        isinstance(thing, tuple)
        and len(thing) == 2
        and isinstance(thing[0], (str, Solver))
        and (isinstance(thing[1], TimeGrid) or (isinstance(thing[1], str) and _is_grid(thing[1])))
    )


def _is_grid(name: str) -> bool:
    return name.startswith(PREFIX) or GRIDS.own(name)[0] in GRIDS


def _named(name: str, thing: Any) -> Entry:
    if callable(thing) and not isinstance(thing, Denoiser) and not hasattr(thing, "run"):
        build: Build = thing  # type: ignore[assignment]
        return _prepared(name, build)
    return replace(entry_of(thing), name=name)


def _request(request: SamplerRequest) -> Entry:
    """Returns the entry of a request; its budget is its own, or each of the comparison."""
    own = request.nfe
    if request.plan is not None:
        own = request.plan.nfe if own is None else own
    elif isinstance(request.recipe, SamplerRecipe):
        recipe = request.recipe
        if recipe.kind == "adaptive":
            raise ValueError(
                f"the recipe of {recipe.name!r} is adaptive, so it has no number of evaluations beforehand"
            )
        own = (recipe.plan.nfe if recipe.plan is not None else recipe.nfe) if own is None else own

    def resolved(denoiser: Denoiser, nfe: int) -> Resolved:
        whole = request.nfe is not None or request.steps is not None
        return resolve(denoiser, request if whole else replace(request, nfe=nfe))

    return Entry(
        _name_of(request),
        lambda denoiser, nfe: resolved(denoiser, nfe).sampler,
        lambda denoiser, nfe: resolved(denoiser, nfe).recipe,
        own,
    )


def _name_of(request: SamplerRequest) -> str:
    """Returns a name for tables, in the syntax of texts where there is one."""
    if request.plan is not None:
        return request.plan.name
    if request.recipe is not None:
        return getattr(request.recipe, "name", None) or Path(request.recipe).stem
    if request.profile is not None:
        return (
            Path(request.profile).stem if isinstance(request.profile, (str, Path)) else "profile"
        )
    solver, grid = request.solver, request.grid
    name = "auto" if solver is None else solver if isinstance(solver, str) else solver.name
    if grid is not None:
        name += f"@{grid if isinstance(grid, str) else 'times'}"
    given = {**request.options, "head_start": request.head_start, "steps": request.steps}
    for key, value in given.items():
        if value is not None:
            name += f"+{key}={value}" if isinstance(value, (str, int, float)) else f"+{key}"
    return name


def _sampler(sampler: Sampler) -> Entry:
    def build(denoiser: Denoiser, _: int) -> Sampler:
        shapes = sampler.denoiser.event_shape, denoiser.event_shape
        if None not in shapes and shapes[0] != shapes[1]:
            raise ValueError(f"it makes samples of shape {shapes[0]}, the model {shapes[1]}")
        return sampler

    if sampler.nfe is None:
        raise ValueError(
            "a sampler of a comparison needs a number of evaluations beforehand; freeze one of its runs with "
            "fewstep.sampling.adaptive.freeze"
        )
    name = sampler.plan.name if isinstance(sampler, PlanSampler) else type(sampler).__name__
    return replace(_prepared(name, build), nfe=sampler.nfe)


def read_entry(text: str) -> Entry:
    """Returns the sampler that a text describes.

    It is one of

    - the name of a solver, or ``auto``, optionally with a grid and options: ``tab3``,
      ``tab3@power:1.5``, ``unipc3@karras``, ``ddim+eta=0.5``, ``tab3@auto:grid.json``;
    - a scheduler of diffusers with options: ``diffusers:UniPC+solver_order=3``;
    - the path of a recipe, a plan, a tuned sampler or a profile (``.json``), of a folder with a recipe for
      each budget (``recipe-5.json``, as ``fewstep analyze`` writes them, or ``best-5.json``), or
      of an operator's folder.

    Raises:
        ValueError: If it cannot be read; names are checked when it is built.
    """
    text = text.strip()
    if not text:
        raise ValueError(f"a sampler is written as {SYNTAX} or as the path of a file, got nothing")
    if text.startswith(PEERS):
        name, options = _options(text.removeprefix(PEERS), text)
        return _peer(text, name, options)
    if (Path(text) / "operator.json").is_file():
        return _operator(Path(text))
    if re.fullmatch(r"[^@+]+\.json", text):
        return _file(Path(text))
    if files := _recipes(Path(text)):
        return _folder(text, files)
    if "/" in text.split("@")[0]:
        raise ValueError(f"there is no file or operator {text!r:.80}; a sampler is {SYNTAX}")
    head, options = _options(text, text)
    name, at, grid = head.partition("@")
    if not name or (at and not grid):
        raise ValueError(f"a sampler is written as {SYNTAX}, got {text!r:.80}")
    return _solver(text, name, *_grid(grid, options))


def identity(sampler: Sampler) -> str:
    """Returns a checksum of a sampler's settings, without running it."""
    if isinstance(sampler, PlanSampler):
        about: Any = json.loads(sampler.plan.to_json())
        if sampler.residual is not None:
            about["residual"] = sampler.residual.digest()
    else:
        about = {"kind": type(sampler).__qualname__, "nfe": sampler.nfe}
        config = getattr(getattr(sampler, "scheduler", None), "config", None)
        for key, value in (config or {}).items():
            if not key.startswith("_"):  # such as options, in any order
                about[f"config.{key}"] = str(value)
        for key in ("steps", "stepping", "setting", "options", "rtol", "atol"):
            if hasattr(sampler, key):
                about[key] = str(getattr(sampler, key))
        if getattr(sampler, "scheduler", None) is None:
            about["model"] = sampler.denoiser.fingerprint()
    about = {"sampler": about, "guidance": getattr(sampler.denoiser, "scale", None)}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _options(text: str, whole: str) -> tuple[str, dict[str, Any]]:
    head, *pairs = text.split("+")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key.isidentifier() or key in options:
            raise ValueError(
                f"an option is +KEY=VALUE, once each; got {pair!r:.40} in {whole!r:.80}"
            )
        try:
            options[key] = loads_json(value, what="the value")
        except ValueError:
            options[key] = value
    return head.strip(), options


def _grid(text: str, options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    name, colon, value = text.partition(":")
    if not colon or name not in GRID_VALUE:
        return text or None, options
    try:
        return name, {GRID_VALUE[name]: float(value), **options}
    except ValueError:
        raise ValueError(
            f"the value of the grid {name!r} is a number, for example {name}:2, got {value!r:.40}"
        ) from None


def _solver(name: str, solver: str, grid: str | None, options: dict[str, Any]) -> Entry:
    options = dict(options)
    head_start, steps = options.pop("head_start", None), options.pop("steps", None)

    def resolved(denoiser: Denoiser, nfe: int) -> Resolved:
        request = SamplerRequest(
            solver, nfe=nfe, steps=steps, grid=grid, head_start=head_start, options=options
        )
        return resolve(denoiser, request)

    return Entry(
        name,
        lambda denoiser, nfe: resolved(denoiser, nfe).sampler,
        lambda denoiser, nfe: resolved(denoiser, nfe).recipe,
    )


def _file(path: Path) -> Entry:
    if is_profile(path):
        return replace(_request(SamplerRequest(profile=Profile.load(path))), name=path.stem)
    recipe = SamplerRecipe.load(path)
    if recipe.kind == "adaptive":
        raise ValueError(
            f"{str(path)!r} is adaptive, so it has no number of evaluations beforehand"
        )
    nfe = recipe.plan.nfe if recipe.plan is not None else recipe.nfe

    def build(denoiser: Denoiser, _: int) -> Sampler:
        return resolve(denoiser, SamplerRequest(recipe=recipe)).sampler

    return Entry(path.stem, build, lambda _, __: recipe, nfe)


def _recipes(folder: Path) -> dict[int, Path]:
    """Returns the recipes of a folder by their number of evaluations."""
    names = [
        (re.fullmatch(r"(?:recipe|best)-(\d+)\.json", f.name), f) for f in folder.glob("*.json")
    ]
    return {int(match[1]): file for match, file in sorted(names, key=lambda n: n[1]) if match}


def _folder(text: str, files: Mapping[int, Path]) -> Entry:
    def recipe(_: Denoiser, nfe: int) -> SamplerRecipe:
        if nfe not in files:
            known = ", ".join(map(str, sorted(files)))
            raise ValueError(
                f"the folder {text!r} has recipes for {known} evaluations, not for {nfe}"
            )
        return SamplerRecipe.load(files[nfe])

    def build(denoiser: Denoiser, nfe: int) -> Sampler:
        return resolve(denoiser, SamplerRequest(recipe=recipe(denoiser, nfe), nfe=nfe)).sampler

    return Entry(text.rstrip("/"), build, recipe)


def _operator(folder: Path) -> Entry:
    from fewstep.loading import load

    model = load(folder)
    budgets = model.built_in_sampler().budgets

    def build(denoiser: Denoiser, nfe: int) -> Sampler:
        if model.event_shape != denoiser.event_shape:
            raise ValueError(
                f"the operator {str(folder)!r} has samples of shape {model.event_shape}, the "
                f"model {denoiser.event_shape}"
            )
        device = next((p.device for p in denoiser.parameters()), None)
        return model.to(device).built_in_sampler().configured(nfe)

    # With one budget it is compared at that; a flow map at those that are asked for.
    only = budgets[0] if len(budgets) == 1 else None
    return Entry(folder.name, build, lambda _, __: None, only)


def _peer(text: str, name: str, options: dict[str, Any]) -> Entry:
    def build(denoiser: Denoiser, nfe: int) -> Sampler:
        from fewstep.adapters.diffusers.peers import diffusers_sampler

        return diffusers_sampler(denoiser, name, nfe, **options)

    return Entry(text, build, _peer_recipe(build))


def _peer_recipe(build: Build) -> Callable[[Denoiser, int], SamplerRecipe | None]:
    def recipe(denoiser: Denoiser, nfe: int) -> SamplerRecipe | None:
        """The plan that is equal to the scheduler, if there is one."""
        from fewstep.adapters.diffusers import plan_from_scheduler

        sampler: Any = build(denoiser, nfe)
        if not denoiser.schedule.discrete:
            return None  # its plan would be for its noise levels, not for the model's own times
        try:
            plan = plan_from_scheduler(
                sampler.scheduler, sampler.steps, **sampler.setting, **sampler.stepping
            )
        except (ValueError, TypeError):
            return None
        # The same levels up to the rounding of float32.
        return SamplerRecipe("plan", plan.name, plan=replace(plan, schedule=denoiser.schedule))

    return recipe


def _prepared(name: str, build: Build) -> Entry:
    def recipe(denoiser: Denoiser, nfe: int) -> SamplerRecipe | None:
        sampler = build(denoiser, nfe)
        return (
            SamplerRecipe("plan", name, plan=sampler.plan, residual=sampler.residual)
            if isinstance(sampler, PlanSampler)
            else None
        )

    return Entry(name, build, recipe)

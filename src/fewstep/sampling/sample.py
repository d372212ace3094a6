r"""Sampling: ``sample`` and ``steps``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.base.progress import Progress, progress_of
from fewstep.diffusion.grids import TimeGrid
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction, convert
from fewstep.models.compiling import compiled
from fewstep.models.conditions import Conditions
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import INPAINTING, Inpainted
from fewstep.plans.execute import Evaluation
from fewstep.plans.plan import Plan
from fewstep.sampling.adaptive import AdaptiveSampler
from fewstep.sampling.batches import initial_noise, run_batches
from fewstep.sampling.plan_sampler import PlanSampler
from fewstep.sampling.profile import Profile
from fewstep.sampling.protocol import DEFAULT_BATCH, Run, Sampler, Trajectory
from fewstep.sampling.recipe import SamplerRecipe
from fewstep.sampling.request import SamplerRequest
from fewstep.sampling.resolve import check_denoiser, resolve
from fewstep.solvers import Solver


@dataclass(frozen=True)
class Step:
    r"""The state after a step of :func:`steps`.

    Attributes:
        index: The number of the step, from 0.
        t: The time of the state.
        x: The state, with shape (B, \*). Changing it in place changes the following steps.
        x0: The data predicted by the step's last network evaluation.
        eps: The noise predicted by it.
    """

    index: int
    t: float
    x: Tensor
    x0: Tensor
    eps: Tensor


def sampler(
    denoiser: Denoiser,
    *,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    steps: int | None = None,
    plan: Plan | None = None,
    recipe: SamplerRecipe | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    force: bool = False,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    guidance: float | None = None,
    **options: Any,
) -> Sampler:
    r"""Returns the sampler that these arguments of :func:`sample` describe.

    It is the object that :func:`sample` runs: ``start`` maps noise (B, \*) to the initial state, ``run`` the
    initial state to a :class:`Trajectory`. ``options`` are those of solver and grid.

    Cost: no network evaluation; of a run ``.nfe`` for each sample.

    Raises:
        ValueError, TypeError: As :func:`fewstep.resolve`.

    Example:
        >>> from fewstep.sampling.sample import sampler
        >>> sampler(fewstep.load("mixture-smooth"), solver="heun", nfe=9).nfe
        9
    """
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        steps=steps,
        plan=plan,
        recipe=recipe,
        profile=profile,
        grid=grid,
        head_start=head_start,
        options=options,
    )
    return resolve(denoiser, request, guidance=guidance, force=force).sampler


def sample(
    denoiser: Denoiser,
    n: int | None = None,
    *,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    steps: int | None = None,
    plan: Plan | None = None,
    recipe: SamplerRecipe | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    force: bool = False,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    options: Mapping[str, Any] | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
    noise: Tensor | None = None,
    batch_size: int | None = None,
    save: str | None = None,
    progress: Progress | bool | None = None,
    guidance: float | None = None,
    brownian: bool = False,
    compile: bool | str | None = None,
    **cond: Any,
) -> Any:
    r"""Draws samples.

    Sample i depends on ``(seed, i)`` alone: not on the batch size, the device count or restarts.

    Cost: ``nfe`` network evaluations for each sample (``dopri5``: as many as the tolerance needs).

    Arguments:
        denoiser: The model.
        n: The number of samples; left out, that of ``noise``.
        solver: A name in :data:`fewstep.SOLVERS`, ``"auto"`` (the default), or a solver.
        nfe: The number of network evaluations, 10 by default; or
        steps: the number of the solver's steps.
        plan: A plan to run, instead of a solver; or
        recipe: a recipe, or the path of one; or
        profile: the profile of the model, or the path of one.
        force: Whether to use a recipe or a profile although it was made for another model.
        grid: The name of a grid, ``"auto:FILE"`` for the times of a profile, or a grid; left out,
            the solver's own.
        head_start: The time above which the Gaussian solution replaces network evaluations.
        options: Further options of solver and grid, e.g. ``{"eta": 0.5, "t_end": 0.01}``.
        image: Data to start from, with shape (n, \*) or (\*): it is noised to the first time of the
            grid, :math:`\alpha x_0 + \sigma z`. It needs ``strength``, the option ``t_start``, or a
            plan or grid that begins below the largest time.
        strength: The share of the grid that the image goes through, above 0 and at most 1: the first
            time is the point with that share of the grid remaining, on the axis in which the grid is even
            (see :func:`fewstep.diffusion.grids.power`). All ``nfe`` evaluations are made on that
            share: ``nfe=6, strength=0.6`` are the last 6 steps of 10, where diffusers has ``num_inference_steps=10``.
        mask: Inpainting: 1 where samples are new, 0 where they are the ``image``, with the shape of a sample or one
            that broadcasts to it; see :class:`fewstep.guidance.Inpainted`. Without ``strength`` the rest begins from noise.
        seed: The seed.
        first: The number of the first sample, to draw a part of a larger run.
        noise: The initial draw, with shape (n, \*), of unit variance; its type, float32 or
            float64, is the state's.
        batch_size: The samples in one network evaluation.
        save: ``"states"`` to get a :class:`Trajectory` with the states at all grid points.
        progress: ``True`` for a progress bar, or a :class:`fewstep.base.progress.Progress`.
        compile: Whether to compile the network with ``torch.compile``: ``True``, or its mode
            (``"reduce-overhead"``, with CUDA graphs). It takes a minute, once a process, and samples differ
            by rounding.
        guidance: The scale of classifier-free guidance; 1 is none.
        brownian: Whether a stochastic solver's draws are increments of one Brownian motion for each sample
            (:class:`fewstep.diffusion.brownian.BrownianSource`): the same noise at any number of steps.
        cond: The conditions, e.g. ``class_labels``; tensors and lists of n values are split
            among the batches.

    Returns:
        The samples, with shape (n, \*), or a :class:`Trajectory`.

    Raises:
        ValueError, TypeError: Before the first network evaluation, if anything does not fit; and if
            the network returns NaN (which evaluation, which time).

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> samples = fewstep.sample(denoiser, 8, solver="tab3", nfe=10, seed=0)
        >>> torch.allclose(samples[2:4], fewstep.sample(denoiser, 2, first=2, solver="tab3", nfe=10))
        True
    """
    if save not in (None, "states"):
        raise ValueError(f"save must be None or 'states', got {save!r}")
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        steps=steps,
        plan=plan,
        recipe=recipe,
        profile=profile,
        grid=grid,
        head_start=head_start,
        options=_options(options, strength),
    )
    check_denoiser(denoiser)
    if mask is not None and image is None and "mask" in (denoiser.accepts.names or ()):
        cond, mask = {**cond, "mask": mask}, None  # the network's own condition
    denoiser.accepts.check_arguments({"image": image, "noise": noise, "strength": strength})
    begins = image is not None and (mask is None or _starts(request))
    chosen = resolve(denoiser, request, guidance=guidance, image=begins, force=force).sampler
    if mask is not None:
        chosen = inpainting(chosen, image, mask)
    if brownian:
        if not isinstance(chosen, PlanSampler) or not chosen.plan.n_noise:
            raise ValueError(
                "brownian=True is for solvers that draw noise in their steps; this one draws none, leave it out"
            )
        chosen = replace(chosen, brownian=True)
    denoiser = chosen.denoiser
    n = _count(n, noise, image, denoiser)
    if mask is not None:
        n = len(noise) if n is None and isinstance(noise, Tensor) else n
        count = n if isinstance(n, int) else 1
        cond = {**cond, INPAINTING: _image(image, count, denoiser, noise)}
    n, noise, conditions = _checked(denoiser, n, noise, cond, first)
    image = _image(image, n, denoiser, noise) if begins else None
    size = batch_size if batch_size is not None else min(n, DEFAULT_BATCH)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"first must be an integer that is not negative, got {first!r}")
    NoiseSource(seed, ())  # checks the seed

    parts: list[Trajectory] = []
    batches = -(-n // size)
    with compiled(denoiser, compile), progress_of(progress) as shown:
        shown.stage("sampling", None if chosen.nfe is None else chosen.nfe * batches)
        for _, part in run_batches(
            chosen,
            range(first, first + n),
            seed=seed,
            conditions=conditions,
            batch_size=size,
            noise=noise,
            image=image,
            save=save == "states",
            progress=shown,
        ):
            parts.append(part)
    if save is None:
        return torch.cat([p.x for p in parts])
    states = torch.cat([p.states for p in parts if p.states is not None], dim=1)
    evaluations = sum(p.nfe * len(p.x) for p in parts) / n
    return Trajectory(torch.cat([p.x for p in parts]), parts[0].times, states, evaluations)


def steps(
    denoiser: Denoiser,
    n: int | None = None,
    *,
    seed: int = 0,
    noise: Tensor | None = None,
    guidance: float | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
    options: Mapping[str, Any] | None = None,
    solver: str | Solver | None = None,
    nfe: int | None = None,
    steps: int | None = None,
    plan: Plan | None = None,
    recipe: SamplerRecipe | str | Path | None = None,
    profile: Profile | str | Path | None = None,
    force: bool = False,
    grid: str | TimeGrid | None = None,
    head_start: float | None = None,
    **cond: Any,
) -> Iterator[Step]:
    """Samples step by step, for previews, edits or an early stop. Arguments as for :func:`sample`.

    The last ``.x`` is the sample. All arguments are checked before the first step.

    Cost: that of :func:`sample`, spread over the steps.

    Raises:
        ValueError, TypeError: As :func:`sample`, or if the sampler has no steps known beforehand.

    Example:
        >>> denoiser = fewstep.load("mixture-smooth")
        >>> for step in fewstep.steps(denoiser, 4, solver="ddim", nfe=3):
        ...     print(step.index, tuple(step.x0.shape))
        0 (4, 2)
        1 (4, 2)
        2 (4, 2)
    """
    request = SamplerRequest(
        solver=solver,
        nfe=nfe,
        steps=steps,
        plan=plan,
        recipe=recipe,
        profile=profile,
        grid=grid,
        head_start=head_start,
        options=_options(options, strength),
    )
    check_denoiser(denoiser)
    denoiser.accepts.check_arguments({"image": image, "noise": noise, "strength": strength})
    chosen = resolve(
        denoiser, request, guidance=guidance, image=image is not None, force=force
    ).sampler
    denoiser = chosen.denoiser
    n, noise, conditions = _checked(denoiser, _count(n, noise, image, denoiser), noise, cond)
    image = _image(image, n, denoiser, noise)
    if not isinstance(chosen, PlanSampler):
        raise ValueError("only samplers with a plan can be run step by step")
    source = NoiseSource(seed, range(n))
    z = initial_noise(denoiser, source, noise)
    x = chosen.start(z) if image is None else chosen.start(z, image)
    run = Run(source, conditions.at(range(n), x.device))
    return _follow(chosen, x, run)


def _follow(sampler: PlanSampler, x: Tensor, run: Run) -> Iterator[Step]:
    plan, reached = sampler.plan, list[tuple[int, Tensor]]()
    knots = plan.knots.tolist()
    with torch.no_grad():
        execution, evaluate = sampler._begin(x, run, lambda k, state: reached.append((k, state)))
    while (request := execution.request) is not None:
        with torch.no_grad():
            # The state may be overwritten when the run continues, so predictions come first.
            output = evaluate(request.x, request.at)
            x0, eps = _predictions(sampler.native, request, output)
            execution.advance(output)
        for knot, state in reached:
            yield Step(knot - 1, knots[knot], state, x0, eps)
        reached.clear()


def _predictions(plan: Plan, request: Evaluation, output: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the data and the noise that an output of the network predicts."""
    alpha, sigma = plan.scales[request.at].detach()
    x0, eps = (
        convert(output, request.x, alpha=alpha, sigma=sigma, source=plan.prediction, target=target)
        for target in (Prediction.X0, Prediction.EPS)
    )
    return x0, eps


def inpainting(sampler: Sampler, image: Tensor | None, mask: Tensor) -> Sampler:
    """Returns a sampler whose model keeps the images given as the condition ``inpainting`` where the mask is 0.

    Raises:
        ValueError: If there is no image, or the sampler is not one of a plan or adaptive.
    """
    if image is None:
        raise ValueError("a mask keeps a part of an image; give image= too")
    if not isinstance(sampler, (PlanSampler, AdaptiveSampler)):
        raise ValueError("a model with a built-in sampler cannot inpaint; leave mask out")
    return replace(sampler, denoiser=Inpainted(sampler.denoiser, None, mask))


def _starts(request: SamplerRequest) -> bool:
    """Whether a request says where an image begins."""
    return any(request.options.get(name) is not None for name in ("strength", "t_start"))


def _options(options: Mapping[str, Any] | None, strength: float | None) -> Mapping[str, Any]:
    given = {} if options is None else options
    if strength is None or not isinstance(given, Mapping):
        return given
    if given.get("strength") is not None:
        raise ValueError("strength is given twice, as an argument and as an option")
    return {**given, "strength": strength}


def _count(
    n: int | None, noise: Tensor | None, image: Tensor | None, denoiser: Denoiser
) -> int | None:
    """Returns n; left out, the number of images if there are several and no noise."""
    shape = denoiser.event_shape
    if n is not None or noise is not None or shape is None or not isinstance(image, Tensor):
        return n
    return len(image) if image.ndim == len(shape) + 1 else None


def _checked(
    denoiser: Denoiser,
    n: int | None,
    noise: Tensor | None,
    cond: Mapping[str, Any],
    first: int = 0,
) -> tuple[int, Tensor | None, Conditions]:
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.dtype not in (torch.float32, torch.float64):
            got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise must be a float32 or float64 tensor, got {got}")
        if noise.ndim < 2:
            raise ValueError(f"noise must have shape (n, ...), got {tuple(noise.shape)}")
        if denoiser.event_shape is not None and tuple(noise.shape[1:]) != denoiser.event_shape:
            raise ValueError(
                f"noise must have shape (n, {', '.join(map(str, denoiser.event_shape))}), "
                f"got {tuple(noise.shape)}"
            )
        n = len(noise) if n is None else n
        if n != len(noise):
            raise ValueError(f"noise has {len(noise)} rows, but n is {n}")
        if not noise.is_meta and not bool(noise.isfinite().all()):
            raise ValueError("noise must be finite, got NaN or infinity")
    elif denoiser.event_shape is None:
        raise ValueError(
            "the shape of a sample is not known; give noise=, or Denoiser.wrap(..., event_shape=)"
        )
    if n is None:
        raise ValueError("give n, the number of samples, or noise, or a batch of images")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be a positive integer, got {n!r}")
    return n, noise, Conditions.of(denoiser, n, cond, first=first)


def _image(
    image: Tensor | None, n: int, denoiser: Denoiser, noise: Tensor | None
) -> Tensor | None:
    if image is None:
        return None
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a floating tensor in the model's range, got {got}")
    if not bool(image.isfinite().all()):
        raise ValueError("image must be finite, got NaN or infinity")
    shape = denoiser.event_shape or (None if noise is None else tuple(noise.shape[1:]))
    if shape is not None and tuple(image.shape) == tuple(shape):
        image = image.expand(n, *shape)
    if (
        not image.ndim
        or len(image) != n
        or (shape is not None and tuple(image.shape[1:]) != tuple(shape))
    ):
        raise ValueError(
            f"image must have shape {tuple(shape or ())} or ({n}, ...), got {tuple(image.shape)}"
        )
    return image

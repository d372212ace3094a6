"""Reads the coefficient table off a scheduler of diffusers, by feeding it unit vectors.

A scheduler whose steps are affine in the initial state, the model outputs and its normal
draws is a table of numbers. With one coordinate for each of these, a single run of the scheduler
shows the whole table.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewstep.adapters.diffusers.configurations import (
    check_class,
)

NOT_AFFINE = {
    "clip_sample": "clips the predicted sample",
    "thresholding": "divides by a quantile of the predicted sample",
    "clip_denoised": "clips the predicted sample",
}
"""The options of a scheduler that make it something else than a table, and what they do."""


class Table(NamedTuple):
    """The table of a scheduler with K evaluations and M draws, float64.

    Columns: the initial standard normal draw, the K outputs, the M further draws.

    Attributes:
        inputs: The network's inputs, shape (K, 1 + K + M).
        output: The sample, shape (1 + K + M).
        times: The conditioning timestep of each evaluation.
        draws: The number M of draws.
    """

    inputs: Tensor
    output: Tensor
    times: list[float]
    draws: int


class Draws(TorchFunctionMode):
    """Replaces normal draws by what ``make(index, shape)`` returns."""

    def __init__(self, make: Callable[[int, tuple[int, ...]], Tensor]) -> None:
        super().__init__()
        self.make, self.count = make, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            like = args[0] if args else kwargs.get("size")
            shape = tuple(like.shape) if func is torch.randn_like else _shape(like, args)
            self.count += 1
            dtype = kwargs.get("dtype") or (like.dtype if func is torch.randn_like else None)
            return self.make(self.count - 1, shape).to(dtype or torch.float32)
        return func(*args, **kwargs)


class _Brownian:
    """Brownian motion along sigma, from independent draws: what DPM-Solver-SDE makes its noise of.

    Called with two levels it returns the normalised increment between them. The first of a step's two
    increments is a part of the second, so the second is made of it and of a draw for the rest.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._last: tuple[float, float, Tensor] | None = None

    def __call__(self, level: Any, to: Any) -> Tensor:
        start, end = float(level), float(to)
        new = torch.randn(self._like.shape, dtype=self._like.dtype)
        if self._last is not None and math.isclose(self._last[0], start, rel_tol=1e-5):
            _, middle, first = self._last
            near, far = start - middle, middle - end
            new = (near**0.5 * first + far**0.5 * new) / (near + far) ** 0.5
        self._last = (start, end, new)
        return new


def _shape(first: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(args) if isinstance(first, int) else tuple(first)


def check_affine(scheduler: Any) -> None:
    """Refuses options that make a scheduler's step depend on the data.

    Raises:
        ValueError: If one is on; the message names it.
    """
    config: Mapping[str, Any] = scheduler.config
    name = type(scheduler).__name__
    check_class(name)
    if config.get("invert_sigmas"):
        raise ValueError(
            f"{name} has invert_sigmas=True: its time falls while the noise grows, and a plan's time grows "
            "with it. Make it with invert_sigmas=False"
        )
    for option, does in NOT_AFFINE.items():
        if config.get(option):
            raise ValueError(
                f"{name} is not a plan: its option {option!r} {does}. Make it with {option}=False "
                "and put fewstep.Clipped or fewstep.Thresholded around the network instead"
            )
    if str(config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            f"{name} is not a plan: its option 'variance_type' = {config['variance_type']!r} "
            "multiplies draws by what the network returns. Make it with a fixed variance"
        )


@contextlib.contextmanager
def _refusals(scheduler: Any, steps: int | None) -> Iterator[None]:
    """Converts errors inside a scheduler into one with its name; our own errors pass unchanged."""
    try:
        yield
    except UnknownArgumentError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reasons = (
            f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        )
        raise ValueError(
            f"{type(scheduler).__name__} cannot be run with num_inference_steps={steps}: {reasons}"
        ) from error


class UnknownArgumentError(TypeError):
    """An argument that a scheduler's ``step`` does not take."""


def probe(
    scheduler: Any,
    num_inference_steps: int | None,
    *,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
) -> Table:
    """Returns the table of a scheduler.

    The scheduler is copied first, and runs in float64 as far as it lets itself.

    Arguments:
        scheduler: A scheduler of diffusers.
        num_inference_steps: The number of steps.
        set_timesteps: Further arguments of its ``set_timesteps``.
        step: Further arguments of its ``step``, e.g. ``{"eta": 0.5}``.

    Raises:
        ValueError: If it is not affine: the message names the option, if one is to blame.
    """
    check_affine(scheduler)
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    with _refusals(scheduler, num_inference_steps):
        one = Runner(scheduler, num_inference_steps, set_timesteps, step)
        evaluations = len(one.timesteps)
        draws = one.run(zeros, [zeros] * evaluations, lambda i, shape: torch.zeros(shape)).draws
    width = 1 + evaluations + draws
    # Beside the unit vectors, two random mixtures of them, to see that the scheduler superposes.
    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(width, 2, generator=generator, dtype=torch.float64)
    basis = torch.cat([torch.eye(width, dtype=torch.float64), mixtures], 1)[:, None, None, None]
    run = Runner(scheduler, num_inference_steps, set_timesteps, step).run(
        basis[0],
        list(basis[1 : 1 + evaluations]),
        lambda i, shape: basis[1 + evaluations + i].expand(shape),
    )
    rows = torch.stack([*run.inputs, run.output]).reshape(evaluations + 1, width + 2)
    table, mixed = rows[:, :width], rows[:, width:]
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"{type(scheduler).__name__} returns NaN or infinity at these {evaluations} evaluations, so it has no plan"
        )
    size = table.abs() @ mixtures.abs() + 1
    if not bool(((table @ mixtures - mixed).abs() <= 1e-4 * size).all()):
        raise ValueError(
            f"{type(scheduler).__name__} is not a plan: its steps do not superpose, so what it does "
            "depends on the data (an option that clips, normalises or adapts)"
        )
    return Table(table[:-1].clone(), table[-1].clone(), run.times, draws)


class Run(NamedTuple):
    """One run of a scheduler: the network's inputs and the sample."""

    inputs: list[Tensor]
    output: Tensor
    times: list[float]
    draws: int


class Runner:
    """Runs a copy of a scheduler as a pipeline does, with given outputs and draws."""

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int | None,
        set_timesteps: Mapping[str, Any] | None = None,
        step: Mapping[str, Any] | None = None,
    ) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        arguments = dict(set_timesteps or {})
        if num_inference_steps is not None:
            arguments.setdefault("num_inference_steps", num_inference_steps)
        self.scheduler.set_timesteps(**arguments)
        self.timesteps = self.scheduler.timesteps
        self.step = dict(step or {})
        known = inspect.signature(self.scheduler.step).parameters
        if unknown := sorted(set(self.step) - set(known)):
            raise UnknownArgumentError(f"{type(scheduler).__name__}.step takes no {unknown[0]!r}")

    def run(
        self,
        noise: Tensor,
        outputs: list[Tensor] | Callable[[Tensor, int, float], Tensor],
        draw: Callable[[int, tuple[int, ...]], Tensor],
    ) -> Run:
        """Runs from a standard normal draw; ``outputs`` are given, or ``f(input, call, time)``."""
        scheduler = self.scheduler
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        inputs: list[Tensor] = []
        times: list[float] = []
        scales = hasattr(scheduler, "scale_model_input")
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = _Brownian(noise)
        with Draws(draw) as mode:
            for k, t in enumerate(self.timesteps):
                scaled = scheduler.scale_model_input(x, t) if scales else x
                preconditioned = hasattr(scheduler, "precondition_outputs")
                y = x if preconditioned else scaled
                conditioning = self._level(k) if preconditioned else float(t)
                output = outputs(y, k, conditioning) if callable(outputs) else outputs[k]
                inputs.append(y)
                times.append(conditioning)
                if preconditioned:
                    output = self._network_output(x, output, conditioning)
                x = scheduler.step(output, t, x, return_dict=False, **self.step)[0]
        return Run(inputs, x, times, mode.count)

    def _level(self, k: int) -> float:
        return float(self.scheduler.sigmas[k])

    def _network_output(self, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
        """Returns the output of a preconditioned network whose prediction is ``x0``."""
        level = torch.tensor(sigma, dtype=torch.float64)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        offset = self.scheduler.precondition_outputs(x, zero, level)
        scale = self.scheduler.precondition_outputs(zero, one, level)
        return (x0 - offset) / scale

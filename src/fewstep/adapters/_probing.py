"""Reads the coefficient table off a scheduler of diffusers, by feeding it unit vectors.

A scheduler whose steps are affine in the initial state, the network's answers and its normal
draws is a table of numbers. With one coordinate for each of these, a single run of the scheduler
shows the whole table.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NOT_AFFINE = {
    "clip_sample": "clips the predicted sample",
    "thresholding": "divides by a quantile of the predicted sample",
    "clip_denoised": "clips the predicted sample",
}
"""The options of a scheduler that make it something else than a table, and what they do."""


class Table(NamedTuple):
    """What a scheduler does with K calls and M draws, float64.

    Columns: the initial standard normal draw, the K answers, the M further draws.

    Attributes:
        inputs: The network's inputs, shape (K, 1 + K + M).
        output: The sample, shape (1 + K + M).
        times: What the network was told at each call.
        draws: The number M of draws.
    """

    inputs: Tensor
    output: Tensor
    times: list[float]
    draws: int


class _Draws(TorchFunctionMode):
    """Answers requests for normal draws with what ``make(index, shape)`` returns."""

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


def _shape(first: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(args) if isinstance(first, int) else tuple(first)


def check_affine(scheduler: Any) -> None:
    """Refuses options that make a scheduler's step depend on the data.

    Raises:
        ValueError: If one is on; the message names it.
    """
    config: Mapping[str, Any] = scheduler.config
    name = type(scheduler).__name__
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
    one = Runner(scheduler, num_inference_steps, set_timesteps, step)
    calls = len(one.timesteps)
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    draws = one.run(zeros, [zeros] * calls, lambda i, shape: torch.zeros(shape)).draws
    width = 1 + calls + draws
    # Beside the unit vectors, two random mixtures of them, to see that the scheduler superposes.
    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(width, 2, generator=generator, dtype=torch.float64)
    basis = torch.cat([torch.eye(width, dtype=torch.float64), mixtures], 1)[:, None, None, None]
    run = Runner(scheduler, num_inference_steps, set_timesteps, step).run(
        basis[0], list(basis[1 : 1 + calls]), lambda i, shape: basis[1 + calls + i].expand(shape)
    )
    rows = torch.stack([*run.inputs, run.output]).reshape(calls + 1, width + 2)
    table, mixed = rows[:, :width], rows[:, width:]
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"{type(scheduler).__name__} returns NaN or infinity at these {calls} calls, so it has no plan"
        )
    size = table.abs() @ mixtures.abs() + 1
    if not bool(((table @ mixtures - mixed).abs() <= 1e-4 * size).all()):
        raise ValueError(
            f"{type(scheduler).__name__} is not a plan: its steps do not superpose, so what it does "
            "depends on the data (an option that clips, normalises or adapts)"
        )
    return Table(table[:-1].clone(), table[-1].clone(), run.times, draws)


class Run(NamedTuple):
    """One run of a scheduler, seen from the network."""

    inputs: list[Tensor]
    output: Tensor
    times: list[float]
    draws: int


class Runner:
    """Runs a copy of a scheduler as a pipeline does, with given answers and draws."""

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
            raise TypeError(f"{type(scheduler).__name__}.step takes no {unknown[0]!r}")

    def run(
        self,
        noise: Tensor,
        answers: list[Tensor] | Callable[[Tensor, int, float], Tensor],
        draw: Callable[[int, tuple[int, ...]], Tensor],
    ) -> Run:
        """Runs from a standard normal draw; ``answers`` are given, or ``f(input, call, time)``."""
        scheduler = self.scheduler
        x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        inputs: list[Tensor] = []
        times: list[float] = []
        scales = hasattr(scheduler, "scale_model_input")
        with _Draws(draw) as mode:
            for k, t in enumerate(self.timesteps):
                scaled = scheduler.scale_model_input(x, t) if scales else x
                preconditioned = hasattr(scheduler, "precondition_outputs")
                y = x if preconditioned else scaled
                told = self._level(k) if preconditioned else float(t)
                answer = answers(y, k, told) if callable(answers) else answers[k]
                inputs.append(y)
                times.append(told)
                if preconditioned:
                    answer = self._network_answer(x, answer, told)
                x = scheduler.step(answer, t, x, return_dict=False, **self.step)[0]
        return Run(inputs, x, times, mode.count)

    def _level(self, k: int) -> float:
        return float(self.scheduler.sigmas[k])

    def _network_answer(self, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
        """Returns what a preconditioned network must say for the prediction to be ``x0``."""
        level = torch.tensor(sigma, dtype=torch.float64)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        offset = self.scheduler.precondition_outputs(x, zero, level)
        scale = self.scheduler.precondition_outputs(zero, one, level)
        return (x0 - offset) / scale

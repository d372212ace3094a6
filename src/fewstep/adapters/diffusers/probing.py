"""Reads the coefficient table off a scheduler of diffusers, by feeding it unit vectors.

A scheduler whose steps are affine in the initial state, the network's answers and its normal
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
    FLOW_START,
    check_class,
    family_of,
    is_continuous,
    positive_levels,
    prediction_of,
)
from fewstep.diffusion.prediction import Prediction, mixture
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule, Tabulated, VPSigma
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure

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


class Draws(TorchFunctionMode):
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
    """Makes what a scheduler stumbles over into an error with its name; ours pass as they are."""
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
        said = (
            f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        )
        raise ValueError(
            f"{type(scheduler).__name__} cannot be run with num_inference_steps={steps}: {said}"
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
        calls = len(one.timesteps)
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
            raise UnknownArgumentError(f"{type(scheduler).__name__}.step takes no {unknown[0]!r}")

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
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = _Brownian(noise)
        with Draws(draw) as mode:
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


def plan_from_scheduler(scheduler: Any, num_inference_steps: int | None, **kwargs: Any) -> Plan:
    """Returns what a scheduler of diffusers does in a run, as a plan.

    The plan starts from the same standard normal draw (scaled as the scheduler scales it) and makes
    the same calls and draws. Its times are what the network is told (trained levels; for flow
    models sigma; for EDM-preconditioned schedulers sigma, and the network is then the
    preconditioned one, which predicts the data).

    Arguments:
        scheduler: The scheduler; it is copied, not changed.
        num_inference_steps: The number of its steps; ``None`` with ``timesteps`` or ``sigmas``.
        kwargs: Further arguments of its ``set_timesteps`` or of its ``step``, e.g. ``eta``.

    Raises:
        ValueError: If it is not affine; the message names the option that is to blame.
        TypeError: If it takes no such argument.
    """
    check_class(type(scheduler).__name__)
    sets = inspect.signature(scheduler.set_timesteps).parameters
    setting = {k: v for k, v in kwargs.items() if k in sets}
    stepping = {k: v for k, v in kwargs.items() if k not in sets}
    check_affine(scheduler)
    schedule, prediction = _schedule(scheduler), _prediction(scheduler)
    table = probe(scheduler, num_inference_steps, set_timesteps=setting, step=stepping)
    times = torch.tensor(table.times, dtype=torch.float64)
    if isinstance(schedule, Flow):
        times = times / scheduler.config["num_train_timesteps"]
    elif isinstance(schedule, VPSigma):
        times = (4 * times).exp()
    times = times.clamp(max=schedule.t_max)
    return _plan(table, times, schedule, prediction, type(scheduler).__name__)


def _prediction(scheduler: Any) -> Prediction:
    if hasattr(scheduler, "precondition_outputs"):
        return Prediction.X0
    config = scheduler.config
    if _is_flow(scheduler) and "prediction_type" not in config:
        return Prediction.FLOW
    return prediction_of(config)


def _is_flow(scheduler: Any) -> bool:
    return family_of({**scheduler.config, "_class_name": type(scheduler).__name__}) == "flow"


def _schedule(scheduler: Any) -> NoiseSchedule:
    config = scheduler.config
    if hasattr(scheduler, "precondition_outputs"):
        # The ends of the range are reached up to float32.
        return EDM(config["sigma_min"] * (1 - 1e-5), config["sigma_max"] * (1 + 1e-5))
    if _is_flow(scheduler):
        return Flow(t_max=FLOW_START)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so the noise schedule that its "
            "coefficients belong to is not known"
        )
    products = positive_levels(
        scheduler.alphas_cumprod, config.get("prediction_type", "epsilon")
    ).double()
    if not is_continuous(config):
        return Tabulated(products)
    ends = ((1 - products) / products).sqrt()[[0, -1]].tolist()
    low, high = (
        config.get(key) or end for key, end in zip(("sigma_min", "sigma_max"), ends, strict=True)
    )
    return VPSigma(min(low, ends[0]) * (1 - 1e-5), max(high, ends[1]) * (1 + 1e-5))


def _plan(
    table: Table, times: Tensor, schedule: NoiseSchedule, prediction: Prediction, name: str
) -> Plan:
    rows = torch.cat([table.inputs, table.output[None]])
    start = float(schedule.sigma(times[0]))
    scale = float(rows[0, 0]) / start
    # Below the rounding of the scheduler's own float32 it is no scaling.
    scale = scale if abs(scale - 1) > 2e-6 else 1.0
    rows[:, 0] /= float(rows[0, 0]) if scale != 1 else start
    writer = _Writer(len(times), table.draws)
    # Written even if it is 1, so that a PlanScheduler starts there too and not at variance 1.
    writer.lin({writer.initial: scale})
    writer.evaluate(writer.last)
    for k in range(1, len(rows)):
        writer.state(rows, k)
        if k < len(times):
            writer.evaluate(writer.last)
    end = _end(rows, times, schedule, prediction)
    last = torch.tensor(schedule.t_zero, dtype=torch.float64) if end is None else end
    return Plan(
        Structure(prediction, tuple(writer.rows), writer.last),
        torch.tensor(writer.values, dtype=torch.float64),
        times,
        torch.stack([times[0], last]),
        schedule,
        name=name,
        ends_at_zero=end is None,
    )


class _Writer:
    """Writes rows of a plan from rows of a table, as short as they can be."""

    def __init__(self, calls: int, draws: int) -> None:
        self.calls, self.draws = calls, draws
        self.rows: list[Row] = []
        self.values: list[float] = []
        self.initial = self.last = 0
        self.states: list[int] = []
        self.answers: list[int] = []
        self.noises: list[int] = []

    def lin(self, terms: dict[int, float]) -> None:
        self.rows.append(Lin(tuple(terms), len(self.values)))
        self.values += terms.values()
        self.last = len(self.rows)

    def evaluate(self, register: int) -> None:
        self.states.append(register)
        self.rows.append(Eval(register, len(self.answers)))
        self.answers.append(len(self.rows))

    def state(self, table: Tensor, k: int) -> None:
        """Writes row k of the table: from one of the last states if that leaves few other terms."""
        row = table[k]
        known = len(self.answers)
        best: tuple[int, dict[int, float], Tensor, float] | None = None
        for j in range(max(0, k - 4), k):
            if float(table[j, 0]) == 0 or not math.isfinite(float(row[0] / table[j, 0])):
                continue
            factor = float(row[0] / table[j, 0])
            rest = row - factor * table[j]
            size = float(max(row.abs().max(), abs(factor) * table[j].abs().max()))
            rest = torch.where(rest.abs() <= 3e-7 * size, 0.0, rest)
            rest[0] = 0.0
            terms = int((rest != 0).sum()) + 1
            if abs(factor) <= 1e3 and (best is None or terms < len(best[1])):
                best = (j, dict.fromkeys(range(terms), 0.0), rest, factor)
        full = int((row != 0).sum())
        if best is None or full <= len(best[1]):
            terms_of, rest = {self._state(0): float(row[0])}, row.clone()
            rest[0] = 0.0
        else:
            terms_of, rest = {self.states[best[0]]: best[3]}, best[2]
        for m in range(self.draws):
            if float(rest[1 + self.calls + m]) != 0:
                while len(self.noises) <= m:
                    self.rows.append(Noise(len(self.noises)))
                    self.noises.append(len(self.rows))
        for place in range(known):
            if float(rest[1 + place]) != 0:
                terms_of[self.answers[place]] = float(rest[1 + place])
        for m in range(self.draws):
            if float(rest[1 + self.calls + m]) != 0:
                terms_of[self.noises[m]] = float(rest[1 + self.calls + m])
        self.lin(terms_of)

    def _state(self, k: int) -> int:
        return self.states[k]


def _end(
    rows: Tensor, times: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor | None:
    r"""Returns the time of the sample, from what is left of the data; ``None`` at :math:`\sigma = 0`."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    p, _ = mixture(prediction, alpha, sigma)
    calls = len(times)
    left = float(rows[-1, 0] * alpha[0] + rows[-1, 1 : 1 + calls] @ p)
    if isinstance(schedule, EDM) or not left < 1 - 1e-5 or left <= 0:
        return None
    if isinstance(schedule, Flow):
        return torch.tensor(1 - left, dtype=torch.float64)
    lam = torch.tensor(math.log(left) - 0.5 * math.log1p(-(left**2)), dtype=torch.float64)
    return schedule.time(lam).clamp(schedule.t_min, float(times[-1]))

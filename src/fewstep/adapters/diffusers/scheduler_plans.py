"""Schedulers of diffusers as plans: rows written from the table of what a scheduler does."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from fewstep.adapters.diffusers.configurations import (
    FLOW_START,
    check_class,
    family_of,
    is_continuous,
    positive_levels,
    prediction_of,
)
from fewstep.adapters.diffusers.probing import Table, check_affine, probe
from fewstep.diffusion.prediction import Prediction, mixture
from fewstep.diffusion.schedules import EDM, Flow, NoiseSchedule, Tabulated, VPSigma
from fewstep.plans.plan import Plan
from fewstep.plans.structure import Eval, Lin, Noise, Row, Structure


def plan_from_scheduler(scheduler: Any, num_inference_steps: int | None, **kwargs: Any) -> Plan:
    """Returns the run of a scheduler of diffusers as a plan.

    The plan starts from the same standard normal draw (scaled as the scheduler scales it) and makes
    the same evaluations and draws. Its times are the conditioning timesteps (training timesteps; for flow
    models sigma; for EDM-preconditioned schedulers sigma, and the network is then the
    preconditioned one, which predicts the data).

    Cost: no network evaluation.

    Arguments:
        scheduler: The scheduler; it is copied, not changed.
        num_inference_steps: The number of its steps; ``None`` with ``timesteps`` or ``sigmas``.
        kwargs: Further arguments of its ``set_timesteps`` or of its ``step``, e.g. ``eta``.

    Raises:
        ValueError: If it is not affine; the message names the option that is to blame.
        TypeError: If it takes no such argument.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> from fewstep.adapters.diffusers import plan_from_scheduler
        >>> plan_from_scheduler(DDIMScheduler(clip_sample=False), 5).nfe
        5
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

    def __init__(self, evaluations: int, draws: int) -> None:
        self.evaluations, self.draws = evaluations, draws
        self.rows: list[Row] = []
        self.values: list[float] = []
        self.initial = self.last = 0
        self.states: list[int] = []
        self.outputs: list[int] = []
        self.noises: list[int] = []

    def lin(self, terms: dict[int, float]) -> None:
        self.rows.append(Lin(tuple(terms), len(self.values)))
        self.values += terms.values()
        self.last = len(self.rows)

    def evaluate(self, register: int) -> None:
        self.states.append(register)
        self.rows.append(Eval(register, len(self.outputs)))
        self.outputs.append(len(self.rows))

    def state(self, table: Tensor, k: int) -> None:
        """Writes row k of the table: from one of the last states if that leaves few other terms."""
        row = table[k]
        known = len(self.outputs)
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
            if float(rest[1 + self.evaluations + m]) != 0:
                while len(self.noises) <= m:
                    self.rows.append(Noise(len(self.noises)))
                    self.noises.append(len(self.rows))
        for place in range(known):
            if float(rest[1 + place]) != 0:
                terms_of[self.outputs[place]] = float(rest[1 + place])
        for m in range(self.draws):
            if float(rest[1 + self.evaluations + m]) != 0:
                terms_of[self.noises[m]] = float(rest[1 + self.evaluations + m])
        self.lin(terms_of)

    def _state(self, k: int) -> int:
        return self.states[k]


def _end(
    rows: Tensor, times: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor | None:
    r"""Returns the time of the sample, from what is left of the data; ``None`` at :math:`\sigma = 0`."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    p, _ = mixture(prediction, alpha, sigma)
    evaluations = len(times)
    left = float(rows[-1, 0] * alpha[0] + rows[-1, 1 : 1 + evaluations] @ p)
    if isinstance(schedule, EDM) or not left < 1 - 1e-5 or left <= 0:
        return None
    if isinstance(schedule, Flow):
        return torch.tensor(1 - left, dtype=torch.float64)
    lam = torch.tensor(math.log(left) - 0.5 * math.log1p(-(left**2)), dtype=torch.float64)
    return schedule.time(lam).clamp(schedule.t_min, float(times[-1]))

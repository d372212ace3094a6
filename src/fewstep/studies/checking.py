r"""Is a model what it is said to be? Its denoising error tells, beside that of every other reading."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.studies.conventions import (
    AS_CLAIMED,
    RANGES,
    Claim,
    Probe,
    between,
    conventions_for,
    range_of,
    schedules_to_try,
)

LEVELS = (-2.5, -1.25, 0.0, 1.25, 2.5)
r"""The half log-SNR :math:`\lambda` at which models are asked; the same for every schedule."""

CLEAR = 0.02
"""A reading must be better by this share, and by three standard errors, to contradict the claim."""

SETTLED = 0.5
"""A change of one aspect that brings the merit below this, and to half, is not looked behind."""

MOST = 4.0
"""Errors are cut off here: beyond, a reading is just wrong."""

NUMBERS = 8192
"""The least number of coordinates of a batch, all samples together."""

ASPECTS = ("prediction", "schedule", "time", "range")


@dataclass(frozen=True)
class Reading:
    """One way to read a model, with how well it denoises then.

    Attributes:
        claim: The way.
        merit: The error of its velocity relative to that of the best Gaussian denoiser of the
            same data: below 1 it knows more of the data than mean and variance, above 1 less.
        errors: The same for each sample and level, (B, L), for comparisons in pairs.
    """

    claim: Claim
    merit: float
    errors: Tensor


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`model_check` found.

    Attributes:
        claimed: The reading that the user gave.
        best: The likely right one: the claimed one unless another is clearly better.
        readings: All that were tried, the best first.
        source: On what: ``"data"`` or ``"samples"``.
        low: The 0.5 % quantile of the data or samples, in the model's own range.
        high: The 99.5 % quantile.
    """

    claimed: Reading
    best: Reading
    readings: tuple[Reading, ...]
    source: str
    low: float
    high: float

    @property
    def wrong(self) -> tuple[str, ...]:
        """The aspects in which the model is not what it is said to be."""
        one, two = self.claimed.claim, self.best.claim
        return tuple(a for a in ASPECTS if getattr(one, a) != getattr(two, a))

    @property
    def ok(self) -> bool:
        """Whether the claim stands and the model denoises better than a Gaussian would."""
        return not self.wrong and self.claimed.merit < 1

    def say(self) -> str:
        """Returns the verdict in words."""
        on = "real data" if self.source == "data" else "its own samples"
        merit = f"its denoising error on {on} is {self.claimed.merit:.3g} of a Gaussian's"
        if self.ok:
            return f"The model is what it is said to be: {merit}, and no other reading is better."
        if not self.wrong:
            return (
                f"The model denoises no better than mean and variance alone would ({merit}), and no "
                "other reading is better: it may be untrained, or the data are not what it was trained on."
            )
        claim = self.best.claim
        mends = {
            "prediction": f"prediction={claim.prediction.value!r}",
            "schedule": f"schedule=fewstep.schedule({claim.schedule.name!r})",
            "time": "" if claim.time == AS_CLAIMED else f"to_model_time={claim.to_model_time()}",
            "range": f"data in {claim.range}",
        }
        named = ", ".join(mends[a] for a in self.wrong)
        return (
            f"The model is probably not what it is said to be: {merit}; "
            f"with {named} it is {self.best.merit:.3g}."
        )

    def to_record(self) -> dict[str, Any]:
        """Returns the numbers as JSON has them."""

        def reading(item: Reading) -> dict[str, Any]:
            return {**item.claim.to_record(), "merit": item.merit}

        return {
            "ok": self.ok,
            "wrong": list(self.wrong),
            "verdict": self.say(),
            "source": self.source,
            "low": self.low,
            "high": self.high,
            "claimed": reading(self.claimed),
            "best": reading(self.best),
            "readings": [reading(item) for item in self.readings],
        }


def model_check(
    denoiser: Denoiser,
    data: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> ModelCheck:
    r"""Checks prediction, schedule, time convention and data range of a model on a batch.

    Data are noised at five levels :math:`\lambda`, the same for every schedule; the network's answer
    is read in each way and compared with the truth in the velocity of unit scale,

    .. math:: m = \frac{\sum_\lambda E \, \| \hat v - v \|^2}{\sum_\lambda E \, \| v_G - v \|^2}, \qquad
        v = \frac{\alpha \varepsilon - \sigma x_0}{\sqrt{\alpha^2 + \sigma^2}}

    with the optimal denoiser :math:`v_G` of Gaussian data of the same mean and variance. A wrong
    reading denoises worse, whatever its prediction. First each aspect is changed alone; if that
    leaves doubt, schedules and times are tried together, then the ranges.

    Without data the same is done with samples that each reading draws itself (10 calls of DDIM),
    which a wrong one mostly does not find likely afterwards. That is weaker evidence: the claim then
    stands if its merit is below 1, and else the reading below 1 that changes least is named.
    The range is then told, not tested.

    Cost: some 20 network calls for each of n samples and 5 levels; in case of doubt 5 times that.

    Arguments:
        denoiser: The model.
        data: Real data in the range that the model is said to have, with shape (N, \*).
        n: The size of the batch; data are repeated with other noise if there are less. Left out,
            8, and more where samples are small: nearness of two schedules shows in averages only.
        seed: The seed of the noise.
        cond: The conditions, of the first n of these data.

    Raises:
        ValueError: If the data do not have the model's shape, or without data its shape is unknown.
    """
    shape = denoiser.event_shape
    if data is not None:
        got, shape = tuple(data.shape[1:]), shape or tuple(data.shape[1:])
        if got != shape or not len(data):
            raise ValueError(
                f"data must have shape (N, {', '.join(map(str, shape))}), got {tuple(data.shape)}"
            )
    if shape is None:
        raise ValueError("the shape of a sample is not known; give data")
    if n is None:
        # Without data no two readings are weighed against each other, so less will do.
        enough = NUMBERS if data is not None else NUMBERS // 16
        n = max(8, math.ceil(enough / math.prod(shape)))
    if data is not None:
        rows = torch.arange(n) % len(data)
        data = data[rows]
    bench = _Bench(denoiser, data, n, shape, seed, denoiser.prepare(n, cond or {}))
    return bench.check()


class _Bench:
    """The batch, and what has been measured on it."""

    def __init__(
        self,
        denoiser: Denoiser,
        data: Tensor | None,
        n: int,
        shape: tuple[int, ...],
        seed: int,
        cond: Mapping[str, Any],
    ) -> None:
        self.probe = Probe(denoiser, cond)
        self.data = data
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        double = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if double else torch.float32
        source = NoiseSource(seed, range(n))
        self.noise = [
            source.draw(k, shape, dtype=dtype, device=device) for k in range(len(LEVELS))
        ]
        if data is not None:
            self.data = data.to(device=device, dtype=dtype)
        self.start = Claim(self.probe.claimed.native, self.probe.claimed.schedule)
        self.found: dict[tuple[Any, ...], list[Reading]] = {}
        self.readings: list[Reading] = []

    def check(self) -> ModelCheck:
        schedules = schedules_to_try(self.start.schedule)
        self.range = None if self.data is None else range_of(self.data)
        others = [name for name in RANGES if name != self.range] if self.range else []
        self.measure(replace(self.start, schedule=s) for s in schedules)
        self.measure(replace(self.start, time=t) for t in conventions_for(self.start.schedule))
        self.measure(replace(self.start, range=r) for r in others)
        claimed = next(r for r in self.readings if r.claim == self.start)
        if self.data is None:
            return self._result(claimed, _least_change(claimed, self.readings))
        best = _likely(claimed, self.readings)
        if (best is not claimed or best.merit >= 1) and best.merit > min(
            SETTLED, claimed.merit / 2
        ):
            self.measure(
                replace(self.start, schedule=s, time=t)
                for s in schedules
                for t in conventions_for(s)
            )
            best = _likely(claimed, self.readings)
            self.measure(replace(best.claim, range=r) for r in others)
            if _likely(claimed, self.readings).merit >= 1:
                self.measure(
                    replace(self.start, schedule=s, time=t, range=r)
                    for s in schedules
                    for t in conventions_for(s)[1:3]
                    for r in others
                )
        return self._result(claimed, _likely(claimed, self.readings))

    def _result(self, claimed: Reading, likely: Reading) -> ModelCheck:
        shown = self.data if self.data is not None else self._samples(self.start)
        ends = torch.tensor([0.005, 0.995], dtype=torch.float64)
        sorted_values = shown.detach().cpu().double().flatten().sort().values
        low, high = sorted_values[(ends * (len(sorted_values) - 1)).round().long()].tolist()
        self.readings.sort(key=lambda r: r.merit)
        source = "data" if self.data is not None else "samples"
        return ModelCheck(claimed, likely, tuple(self.readings), source, low, high)

    def measure(self, claims: Iterable[Claim]) -> None:
        """Measures readings that were not measured before, each with all predictions."""
        for claim in claims:
            key = (claim.schedule, claim.time, claim.range)
            if key not in self.found:
                self.found[key] = list(self._read(claim))
                self.readings += self.found[key]

    def _read(self, claim: Claim) -> Iterable[Reading]:
        if self.data is not None:
            scale, shift = (1.0, 0.0)
            if self.range is not None and claim.range != AS_CLAIMED:
                scale, shift = between(self.range, claim.range)
            yield from self._errors(claim, self.data * scale + shift, tuple(Prediction))
            return
        for prediction in Prediction:
            own = replace(claim, prediction=prediction)
            samples = self._samples(own)
            if bool(samples.isfinite().all()):
                yield from self._errors(own, samples, (prediction,))

    def _errors(
        self, claim: Claim, x0: Tensor, predictions: tuple[Prediction, ...]
    ) -> Iterable[Reading]:
        mean, var = _moments(x0)
        errors: dict[Prediction, list[Tensor]] = {p: [] for p in predictions}
        baseline = 0.0
        for lam, z in zip(LEVELS, self.noise, strict=True):
            t = float(claim.schedule.time(torch.tensor(lam, dtype=torch.float64)))
            alpha, sigma = _scales(claim.schedule, t)
            size = math.hypot(alpha, sigma)
            x = alpha * x0 + sigma * z
            # v is a function of x and x0 alone, so all errors are those of x0 in these units.
            unit = size / sigma
            shrunk = mean + alpha * var / (alpha**2 * var + sigma**2) * (x - alpha * mean)
            baseline += float(((shrunk - x0) * unit).square().mean())
            answer = self.probe.answer(claim, x, t)
            for p in predictions:
                if answer is None:
                    errors[p].append(torch.full((len(x),), math.inf, dtype=torch.float64))
                    continue
                a, b = coefficients(
                    p,
                    Prediction.X0,
                    alpha=torch.tensor(alpha, dtype=torch.float64),
                    sigma=torch.tensor(sigma, dtype=torch.float64),
                )
                wrong = ((a * x + b * answer - x0) * unit).square().flatten(1).mean(1)
                errors[p].append(wrong.double().cpu())
        if not baseline > 0:  # all samples are alike: nothing to compare with
            return
        for p, parts in errors.items():
            relative = torch.stack(parts, 1) * len(LEVELS) / baseline
            relative = relative.nan_to_num(math.inf).clamp(max=MOST)
            yield Reading(replace(claim, prediction=p), float(relative.mean()), relative)

    def _samples(self, claim: Claim) -> Tensor:
        """Returns samples that the model draws if it is read so: 10 steps of DDIM."""
        s = claim.schedule
        steps = torch.linspace(s.t_max, s.t_min, 11, dtype=torch.float64).tolist()
        alpha, sigma = _scales(s, steps[0])
        x = sigma * self.noise[0]
        for now, then in itertools.pairwise(steps):
            answer = self.probe.answer(claim, x, now)
            if answer is None:
                return torch.full_like(x, math.nan)
            a, b = coefficients(
                claim.prediction,
                Prediction.EPS,
                alpha=torch.tensor(alpha, dtype=torch.float64),
                sigma=torch.tensor(sigma, dtype=torch.float64),
            )
            eps = a * x + b * answer
            next_alpha, next_sigma = _scales(s, then)
            x = next_alpha / alpha * x + (next_sigma - next_alpha / alpha * sigma) * eps
            alpha, sigma = next_alpha, next_sigma
        return x / alpha


def _likely(claimed: Reading, readings: Iterable[Reading]) -> Reading:
    """Returns the best reading if it is clearly better than the claimed one, which else stands."""
    best = min(readings, key=lambda r: r.merit)
    gain = (claimed.errors - best.errors).mean(1)
    doubt = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    clear = best.merit < (1 - CLEAR) * claimed.merit and float(gain.mean()) > 3 * doubt
    if not clear:
        return claimed
    # Of readings that are as good, the one that changes least.
    near = [r for r in readings if r.merit <= (1 + CLEAR / 2) * best.merit]
    return min(near, key=lambda r: (_changes(claimed.claim, r.claim), r.merit))


def _least_change(claimed: Reading, readings: Iterable[Reading]) -> Reading:
    """Returns the claimed reading if it denoises its own samples, or the nearest that does."""
    if claimed.merit < 1:
        return claimed
    consistent = [r for r in readings if r.merit < 1]
    # A wrong prediction is the commonest slip, and the one that samples tell best.
    order = {a: k for k, a in enumerate(ASPECTS)}

    def rank(r: Reading) -> tuple[int, int, float]:
        changed = [a for a in ASPECTS if getattr(r.claim, a) != getattr(claimed.claim, a)]
        return len(changed), sum(order[a] for a in changed), r.merit

    return min(consistent, key=rank, default=claimed)


def _changes(one: Claim, two: Claim) -> int:
    return sum(getattr(one, a) != getattr(two, a) for a in ASPECTS)


def _scales(s: NoiseSchedule, t: float) -> tuple[float, float]:
    time = torch.tensor(t, dtype=torch.float64)
    return float(s.alpha(time)), float(s.sigma(time))


def _moments(x0: Tensor) -> tuple[Tensor, Tensor]:
    # One mean and one variance of all coordinates: a batch is too small for one of each.
    return x0.mean(), x0.var(unbiased=False)

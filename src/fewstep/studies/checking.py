r"""Checks the description of a model by its denoising error, compared with that under other hypotheses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.grids import grid
from fewstep.diffusion.noise import NoiseSource
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.kept import KeptEvaluations
from fewstep.studies.conventions import (
    AS_CLAIMED,
    NEGATED,
    RANGES,
    Hypothesis,
    Probe,
    between,
    conventions_for,
    range_of,
    schedules_to_try,
)

LEVELS = (-2.5, -1.25, 0.0, 1.25, 2.5)
r"""The half log-SNR :math:`\lambda` at which models are evaluated; the same for every schedule."""

CLEAR = 0.02
"""A hypothesis must be better by this share, and by three standard errors, to contradict the claim."""

SETTLED = 0.5
"""After a change of one aspect that brings the error below this, and to half, no others are tried."""

MOST = 4.0
"""Errors are clipped to this: a hypothesis with a larger one is wrong, however large it is."""

NUMBERS = 8192
"""The least number of coordinates of a batch, all samples together."""

TOGETHER = 1 << 22
"""The most numbers in a tensor of the errors of several predictions."""

SHOWN = 3
"""The most undecided hypotheses that the verdict names."""

NEAR = 0.005
"""Conditioning timesteps that differ by less than this share of their range are the same."""

ASPECTS = ("prediction", "negated", "schedule", "time", "range")


@dataclass(frozen=True)
class Tested:
    """A hypothesis about a network, with how well the network denoises under it.

    Attributes:
        hypothesis: The hypothesis.
        relative_error: The squared error of its velocity relative to that of the best Gaussian
            denoiser of the same data: below 1 it knows more of the data than mean and variance.
        errors: The same for each sample and level, (B, L), for comparisons in pairs.
    """

    hypothesis: Hypothesis
    relative_error: float
    errors: Tensor

    @property
    def doubt(self) -> float:
        """The standard error of the relative error; 0 for one sample."""
        if len(self.errors) < 2:
            return 0.0
        return float(self.errors.mean(1).std()) / math.sqrt(len(self.errors))


@dataclass(frozen=True)
class ModelCheck:
    """The result of :func:`model_check`.

    Attributes:
        claimed: The hypothesis that the user gave.
        best: The most likely one: the claimed one unless another is clearly better.
        hypotheses: All tested hypotheses, the best first.
        undecided: Those that differ from the best and are not distinguishable from it on these data.
        source: The images of the test: ``"data"`` or ``"samples"``.
        low: The 0.5 % quantile of the data or samples, in the model's own range.
        high: The 99.5 % quantile.
    """

    claimed: Tested
    best: Tested
    hypotheses: tuple[Tested, ...]
    undecided: tuple[Tested, ...]
    source: str
    low: float
    high: float

    @property
    def wrong(self) -> tuple[str, ...]:
        """The aspects in which the model differs from the claimed hypothesis."""
        return _changed(self.claimed.hypothesis, self.best.hypothesis)

    @property
    def ok(self) -> bool:
        """Whether only the claimed hypothesis fits and the model denoises better than a Gaussian."""
        return self.outcome == "passed"

    @property
    def outcome(self) -> str:
        """``"passed"``, ``"undecided"`` (several hypotheses are as good) or ``"failed"``."""
        if any(item is self.claimed for item in self.undecided):
            return "undecided"
        if self.wrong or not self.claimed.relative_error < 1:
            return "failed"
        return "undecided" if self.undecided else "passed"

    def summary(self) -> str:
        """Returns the verdict in words."""
        on = "real data" if self.source == "data" else "its own samples"
        error = f"its denoising error on {on} is {self.claimed.relative_error:.3g} of a Gaussian's"
        claim, best = self.claimed.hypothesis, self.best.hypothesis
        if not self.wrong and not self.claimed.relative_error < 1:
            return (
                f"The model denoises no better than a Gaussian of the data ({error}), and no "
                "other hypothesis is better: it may be untrained, or the data are not what it was trained on."
            )
        if not self.wrong and not self.undecided:
            return f"The model is as claimed: {error}, and no other hypothesis is better."
        if not self.wrong or self.outcome == "undecided":
            return (
                f"The model may be as claimed: {error}; but {self._rivals(claim)} cannot "
                f"be distinguished from it on {on}."
            )
        verdict = (
            f"The model is probably not as claimed: {error}; "
            f"with {best.describe(claim)} it is {self.best.relative_error:.3g}"
        )
        if self.undecided:
            verdict += f", and {self._rivals(claim)} cannot be distinguished from that"
        return f"{verdict}."

    def _rivals(self, claim: Hypothesis) -> str:
        """Returns the undecided hypotheses, in words."""
        rivals = list(self.undecided)
        if self.outcome == "undecided":
            # What cannot be distinguished from the claim: the best one is among them.
            rivals = [item for item in (self.best, *rivals) if item is not self.claimed]
        named = [
            item.hypothesis.describe(claim) or "the claimed hypothesis" for item in rivals[:SHOWN]
        ]
        more = len(rivals) - len(named)
        return " or ".join(named) + (f" (and {more} more)" if more else "")

    def to_record(self) -> dict[str, Any]:
        """Returns the numbers as a JSON object."""

        def record(item: Tested) -> dict[str, Any]:
            return {**item.hypothesis.to_record(), "relative_error": item.relative_error}

        return {
            "ok": self.ok,
            "outcome": self.outcome,
            "wrong": list(self.wrong),
            "verdict": self.summary(),
            "source": self.source,
            "low": self.low,
            "high": self.high,
            "claimed": record(self.claimed),
            "best": record(self.best),
            "undecided": [record(item) for item in self.undecided],
            "hypotheses": [record(item) for item in self.hypotheses],
        }


def model_check(
    denoiser: Denoiser,
    data: Tensor | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    kept: KeptEvaluations | None = None,
) -> ModelCheck:
    r"""Checks prediction, its sign, schedule, conditioning timesteps and data range of a model on a batch.

    Data are noised at five levels :math:`\lambda`, the same for every schedule; the network's output
    is converted under each hypothesis and compared with the truth in the velocity of unit scale,

    .. math:: e = \frac{\sum_\lambda E \, \| \hat v - v \|^2}{\sum_\lambda E \, \| v_G - v \|^2}, \qquad
        v = \frac{\alpha \varepsilon - \sigma x_0}{\sqrt{\alpha^2 + \sigma^2}}

    with the optimal denoiser :math:`v_G` of Gaussian data of the same mean and variance. Under a wrong
    hypothesis the network denoises worse, whatever it predicts. First each aspect is changed alone; if
    the claim is then in doubt, schedules and times are tried together, then the ranges. Hypotheses whose errors
    do not differ by more than chance from the best one's are listed as undecided.

    Without data the same is done with samples that the network draws under each hypothesis (10
    evaluations of DDIM), which under a wrong one mostly are not likely data afterwards. That is weaker
    evidence: the claim then stands if its relative error is below 1, and else the hypothesis below 1
    that changes least is named. Without data the range is reported, not tested.

    Cost: some 20 evaluations for each of n samples and 5 levels; in case of doubt 5 times that.

    Arguments:
        denoiser: The model.
        data: Real data in the model's claimed range, with shape (N, \*).
        n: The size of the batch; data are repeated with other noise if there are fewer. Left out,
            8, and more where samples are small: similar schedules differ in averages only.
        seed: The seed of the noise.
        cond: The conditions, of the first n of these data.
        kept: Keeps the evaluations of an interrupted check.

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
        # Without data no hypotheses are compared in pairs, so fewer samples are enough.
        enough = NUMBERS if data is not None else NUMBERS // 16
        n = max(8, math.ceil(enough / math.prod(shape)))
    if data is not None:
        rows = torch.arange(n) % len(data)
        data = data[rows.to(data.device)]
    bench = _Bench(denoiser, data, n, shape, seed, denoiser.prepare(n, cond or {}), kept)
    return bench.check()


class _Bench:
    """The batch, and the hypotheses measured on it."""

    def __init__(
        self,
        denoiser: Denoiser,
        data: Tensor | None,
        n: int,
        shape: tuple[int, ...],
        seed: int,
        cond: Mapping[str, Any],
        kept: KeptEvaluations | None,
    ) -> None:
        self.probe = Probe(denoiser, cond, kept)
        device = denoiser.device
        tensors = [*denoiser.parameters(), *denoiser.buffers()]
        double = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if double else torch.float32
        source = NoiseSource(seed, range(n))
        self.noise = [
            source.draw(k, shape, dtype=dtype, device=device) for k in range(len(LEVELS))
        ]
        self.data = None if data is None else data.to(device=device, dtype=dtype)
        self.claim = Hypothesis(self.probe.claimed.native, self.probe.claimed.schedule)
        self.measured = set[tuple[Any, ...]]()
        self._of_schedule: dict[NoiseSchedule, tuple[list[float], list[float], list[float]]] = {}
        self._grids: dict[NoiseSchedule, tuple[list[float], list[float], list[float]]] = {}
        self.tested: list[Tested] = []

    def check(self) -> ModelCheck:
        schedules = schedules_to_try(self.claim.schedule)
        self.range = None if self.data is None else range_of(self.data)
        others = [name for name in RANGES if name != self.range] if self.range else []
        self.measure(replace(self.claim, schedule=s) for s in schedules)
        self.measure(replace(self.claim, time=t) for t in conventions_for(self.claim.schedule))
        self.measure(replace(self.claim, range=r) for r in others)
        claimed = next(r for r in self.tested if r.hypothesis == self.claim)
        if self.data is None:
            return self._result(claimed, _least_change(claimed, self.tested))
        best = _likely(claimed, self.tested)
        if (best is not claimed or best.relative_error >= 1) and best.relative_error > min(
            SETTLED, claimed.relative_error / 2
        ):
            self.measure(
                replace(self.claim, schedule=s, time=t)
                for s in schedules
                for t in conventions_for(s)
            )
            best = _likely(claimed, self.tested)
            self.measure(replace(best.hypothesis, range=r) for r in others)
            if _likely(claimed, self.tested).relative_error >= 1:
                self.measure(
                    replace(self.claim, schedule=s, time=t, range=r)
                    for s in schedules
                    for t in conventions_for(s)[1:3]
                    for r in others
                )
        return self._result(claimed, _likely(claimed, self.tested))

    def _result(self, claimed: Tested, best: Tested) -> ModelCheck:
        shown = self.data if self.data is not None else self._samples(self.claim)
        ends = torch.tensor([0.005, 0.995], dtype=torch.float64)
        sorted_values = shown.detach().cpu().double().flatten().sort().values
        low, high = sorted_values[(ends * (len(sorted_values) - 1)).round().long()].tolist()
        self.tested.sort(key=lambda item: item.relative_error)
        undecided = self._undecided(best)
        source = "data" if self.data is not None else "samples"
        return ModelCheck(claimed, best, tuple(self.tested), undecided, source, low, high)

    def _undecided(self, best: Tested) -> tuple[Tested, ...]:
        """Returns the hypotheses that are not distinguishable from the best, one of each kind."""
        if not best.relative_error < 1:
            return ()
        known, rivals = [self._signature(best.hypothesis)], []
        for item in self.tested:
            if self.data is None:
                # Each has samples of its own, so there are no pairs to compare, and chance is in both.
                most = (1 + CLEAR) * best.relative_error + 2 * math.hypot(best.doubt, item.doubt)
                rival = item.relative_error <= most
            else:
                rival = not _clearly_better(best, item)
            if rival and item is not best:
                signature = self._signature(item.hypothesis)
                if not any(_same(signature, other) for other in known):
                    known.append(signature)
                    rivals.append(item)
        return tuple(rivals)

    def _signature(self, hypothesis: Hypothesis) -> tuple[Any, Tensor, Tensor]:
        """Returns what defines the network's evaluations under a hypothesis: kind, conditioning timesteps, scales."""
        schedule = hypothesis.schedule
        times = schedule.time(torch.tensor(LEVELS, dtype=torch.float64))
        data_range = hypothesis.range if hypothesis.range != self.range else AS_CLAIMED
        kind = (hypothesis.prediction, hypothesis.negated, data_range)
        conditioning = self.probe.conditioning(hypothesis, times).cpu()
        return kind, conditioning, schedule.alpha(times)

    def measure(self, hypotheses: Iterable[Hypothesis]) -> None:
        """Measures hypotheses that were not measured before, each with all predictions."""
        for hypothesis in hypotheses:
            key = (hypothesis.schedule, hypothesis.time, hypothesis.range)
            if key not in self.measured and not self._as_claimed(hypothesis):
                self.measured.add(key)
                self.tested += self._test(hypothesis)

    def _as_claimed(self, hypothesis: Hypothesis) -> bool:
        """Whether a convention of times is the claimed one under another name."""
        if hypothesis.time == AS_CLAIMED or hypothesis.schedule != self.claim.schedule:
            return False
        claimed = replace(hypothesis, time=AS_CLAIMED)
        return _same(self._signature(hypothesis), self._signature(claimed))

    def _test(self, hypothesis: Hypothesis) -> Iterable[Tested]:
        kinds = [(p, False) for p in Prediction]
        # With data the other sign costs no evaluation; without, it needs runs of its own.
        if self.data is not None or hypothesis.schedule == self.claim.schedule:
            kinds += [(p, True) for p in NEGATED]
        if self.data is not None:
            scale, shift = (1.0, 0.0)
            if self.range is not None and hypothesis.range != AS_CLAIMED:
                scale, shift = between(self.range, hypothesis.range)
            yield from self._errors(hypothesis, self.data * scale + shift, kinds)
            return
        for prediction, negated in kinds:
            own = replace(hypothesis, prediction=prediction, negated=negated)
            samples = self._samples(own)
            if bool(samples.isfinite().all()):
                yield from self._errors(own, samples, [(prediction, negated)])

    def _errors(
        self, hypothesis: Hypothesis, x0: Tensor, kinds: list[tuple[Prediction, bool]]
    ) -> Iterable[Tested]:
        mean, var = _moments(x0)
        every = [replace(hypothesis, prediction=p, negated=negated) for p, negated in kinds]
        levels: list[Tensor] = []
        baseline = 0.0
        times, alphas, sigmas = self._levels(hypothesis.schedule)
        for t, alpha, sigma, z in zip(times, alphas, sigmas, self.noise, strict=True):
            size = math.hypot(alpha, sigma)
            x = alpha * x0 + sigma * z
            # v depends on x and x0 alone, so all errors are those of x0 in these units.
            unit = size / sigma
            shrunk = mean + alpha * var / (alpha**2 * var + sigma**2) * (x - alpha * mean)
            baseline += float(((shrunk - x0) * unit).square().mean())
            output = self.probe.output(hypothesis, x, t)
            if output is None:
                levels.append(torch.full((len(kinds), len(x)), math.inf, dtype=torch.float64))
                continue
            factors = [
                (a, own.sign * b)
                for own in every
                for a, b in (_factors(own.prediction, Prediction.X0, alpha, sigma),)
            ]
            pairs = torch.tensor(factors, dtype=x.dtype, device=x.device)
            a, b = pairs.T.reshape(2, len(kinds), *[1] * x.ndim)
            together = max(1, TOGETHER // x.numel())
            squares = [
                ((one * x + two * output - x0) * unit).square().flatten(2).mean(2)
                for one, two in zip(a.split(together), b.split(together), strict=True)
            ]
            levels.append(torch.cat(squares).cpu().double())
        if not baseline > 0:  # all samples are equal: nothing to compare with
            return
        relative = torch.stack(levels, 2) * len(LEVELS) / baseline
        relative = relative.nan_to_num(math.inf).clamp(max=MOST)
        for own, errors in zip(every, relative, strict=True):
            yield Tested(own, float(errors.mean()), errors)

    def _levels(self, s: NoiseSchedule) -> tuple[list[float], list[float], list[float]]:
        """Returns times, alpha and sigma of the levels in a schedule."""
        if s not in self._of_schedule:
            times = s.time(torch.tensor(LEVELS, dtype=torch.float64))
            self._of_schedule[s] = (
                times.tolist(),
                s.alpha(times).tolist(),
                s.sigma(times).tolist(),
            )
        return self._of_schedule[s]

    def _samples(self, hypothesis: Hypothesis) -> Tensor:
        """Returns samples that the network draws under a hypothesis: 10 steps of DDIM.

        They are where pictures take shape, whatever the schedule's time: even steps in the time of ``edm``
        leave noise.
        """
        s = hypothesis.schedule
        if s not in self._grids:
            times = grid("logistic", s, 10).times
            self._grids[s] = (times.tolist(), s.alpha(times).tolist(), s.sigma(times).tolist())
        steps = zip(*self._grids[s], strict=True)
        now, alpha, sigma = next(steps)
        x = sigma * self.noise[0]
        for then, next_alpha, next_sigma in steps:
            output = self.probe.output(hypothesis, x, now)
            if output is None:
                return torch.full_like(x, math.nan)
            a, b = _factors(hypothesis.prediction, Prediction.EPS, alpha, sigma)
            eps = a * x + hypothesis.sign * b * output
            x = next_alpha / alpha * x + (next_sigma - next_alpha / alpha * sigma) * eps
            now, alpha, sigma = then, next_alpha, next_sigma
        return x / alpha


def _clearly_better(one: Tested, two: Tested) -> bool:
    """Whether the first error is lower by more than a share of it and than chance, in pairs."""
    gain = (two.errors - one.errors).mean(1)
    doubt = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    lower = one.relative_error < (1 - CLEAR) * two.relative_error
    return lower and float(gain.mean()) > 3 * doubt


def _likely(claimed: Tested, tested: Iterable[Tested]) -> Tested:
    """Returns the best hypothesis if it is clearly better than the claimed one, else that."""
    best = min(tested, key=lambda item: item.relative_error)
    if not _clearly_better(best, claimed):
        return claimed
    # Of equally good hypotheses, the one that changes least.
    near = [r for r in tested if r.relative_error <= (1 + CLEAR / 2) * best.relative_error]
    return min(
        near,
        key=lambda r: (len(_changed(claimed.hypothesis, r.hypothesis)), r.relative_error),
    )


def _least_change(claimed: Tested, tested: Iterable[Tested]) -> Tested:
    """Returns the claimed hypothesis if it denoises its own samples, or the nearest that does."""
    if claimed.relative_error < 1:
        return claimed
    consistent = [r for r in tested if r.relative_error < 1]
    # A wrong prediction is the most common mistake, and the one that samples show best.
    order = {a: k for k, a in enumerate(ASPECTS)}

    def rank(r: Tested) -> tuple[int, int, float]:
        changed = _changed(claimed.hypothesis, r.hypothesis)
        return len(changed), sum(order[a] for a in changed), r.relative_error

    return min(consistent, key=rank, default=claimed)


def _changed(one: Hypothesis, two: Hypothesis) -> tuple[str, ...]:
    return tuple(a for a in ASPECTS if getattr(one, a) != getattr(two, a))


def _same(one: tuple[Any, Tensor, Tensor], two: tuple[Any, Tensor, Tensor]) -> bool:
    """Whether two hypotheses are nearly the same function of the state and the noise level."""
    if one[0] != two[0]:
        return False
    span = float(one[1].max() - one[1].min())
    times = float((one[1] - two[1]).abs().max()) <= NEAR * max(span, 1e-12)
    return times and bool(torch.allclose(one[2], two[2], rtol=NEAR, atol=1e-6))


@functools.lru_cache(4096)
def _factors(
    source: Prediction, target: Prediction, alpha: float, sigma: float
) -> tuple[float, float]:
    """Returns ``coefficients`` at one level, which many hypotheses share."""
    scales = (torch.tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    a, b = coefficients(source, target, **dict(zip(("alpha", "sigma"), scales, strict=True)))
    return float(a), float(b)


def _moments(x0: Tensor) -> tuple[Tensor, Tensor]:
    # One mean and one variance of all coordinates: a batch is too small for one of each.
    return x0.mean(), x0.var(unbiased=False)

r"""Sampling to a tolerance, freezing what it did into a plan, and likelihoods.

All three integrate one equation. With :math:`y = x / \alpha`, :math:`\rho = \sigma / \alpha` and
:math:`u = \log\rho`, the probability-flow ODE of every schedule is

.. math:: \frac{dy}{d\rho} = \varepsilon(x, t), \qquad \frac{dy}{du} = \rho \, \varepsilon(x, t).

References:
    | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), rhoRK-DEIS
    | https://arxiv.org/abs/2204.13902
    | A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980)
    | https://doi.org/10.1016/0771-050X(80)90013-3
    | Solving Ordinary Differential Equations I (Hairer, Nørsett & Wanner, 1993), sections II.4 to II.6
    | https://doi.org/10.1007/978-3-540-78862-1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Guided
from fewstep.grids import TimeGrid, grid
from fewstep.noise import NoiseSource
from fewstep.plans import Plan
from fewstep.prediction import Prediction
from fewstep.sampling import DEFAULT_BATCH, Run, Trajectory
from fewstep.schedules import NoiseSchedule
from fewstep.solvers.base import check_number
from fewstep.solvers.rk import RhoHeun, RhoKutta3, RhoMidpoint, RhoRK4
from fewstep.tape import Form, Tape

# The tableau of Dormand and Prince: nodes, stages (the last is the solution of order 5, and the
# first stage of the next step), the difference to order 4, and the bump of the interpolant.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_BUMP = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)

STATES = 32
"""The number of intervals, even in log rho, between the states that ``save="states"`` keeps."""

PROBE = -2
"""The index of the first probe of a likelihood; the next are below it, away from all other draws."""

_FIXED = {method.name: method for method in (RhoMidpoint, RhoHeun, RhoKutta3, RhoRK4)}


@dataclass(frozen=True)
class AdaptiveSampler:
    r"""Dormand–Prince 5(4) on the transformed ODE, with a step size for each sample.

    .. math:: y_{n+1} = y_n + h \sum_i b_i \rho_i \varepsilon_i, \qquad
        e = h \sum_i (b_i - \hat b_i) \rho_i \varepsilon_i, \qquad
        \operatorname{rms}\left( \frac{e / \nu_{n+1}}
        {a + r \max(|y_n| / \nu_n, |y_{n+1}| / \nu_{n+1})} \right) \le 1, \quad \nu = \sqrt{1 + \rho^2}

    with h in :math:`\log\rho`. The error is measured on :math:`y / \nu = x / \sqrt{\alpha^2 + \sigma^2}`:
    for variance preserving schedules that is x itself, and for all others the state that the
    variance preserving schedule would have, so that the same data take the same steps whatever
    the schedule. There an early error reaches the sample about as large as it was made, while y
    starts some hundred times larger than the data. Tolerances are for data of about unit size.

    Every sample has its own time, step size, acceptance and end: the network gets times of shape
    (B), and samples that are done leave the batch. The step sizes are controlled by the last two
    errors (PI); the first comes from the size of the first two slopes.

    Cost: 2 network calls to begin and 6 for each step, accepted or not.

    Attributes:
        denoiser: The model.
        rtol: The relative tolerance r of each step.
        atol: The absolute tolerance a of each step.
        t_start: The time to start from; left out, the schedule's largest.
        t_end: The time to end at; left out, the schedule's smallest.
        max_steps: The most steps of a sample, accepted or not.
        image: Where to start from instead of the prior: data, noised to ``t_start``.

    Raises:
        ValueError: If an option is out of range.
    """

    denoiser: Denoiser
    _: KW_ONLY
    rtol: float = 1e-5
    atol: float = 1e-5
    t_start: float | None = None
    t_end: float | None = None
    max_steps: int = 1000
    image: Tensor | None = None

    def __post_init__(self) -> None:
        _check_tolerances(self.rtol, self.atol, self.max_steps)
        _span(self.denoiser.schedule, self.t_start, self.t_end)

    @property
    def nfe(self) -> None:
        """The number of network calls: not known beforehand."""
        return None

    def start(self, noise: Tensor) -> Tensor:
        r"""Returns the initial state that standard normal noise stands for.

        That is :math:`\sigma z` of the prior, or :math:`\alpha x_0 + \sigma z` of an image.
        """
        schedule = self.denoiser.schedule
        t = _span(schedule, self.t_start, self.t_end).times[0]
        x = float(schedule.sigma(t)) * noise
        return x if self.image is None else float(schedule.alpha(t)) * self.image.to(noise) + x

    def run(self, x: Tensor, run: Run) -> Trajectory:
        r"""Returns the samples that start at a state.

        Arguments:
            x: The state at ``t_start``, with shape (B, \*), float32 or float64.
            run: The conditions, and what to keep: the states are those at ``run.times``, from
                ``t_start`` to ``t_end``, or else at 33 times, even in log rho; the same for all
                samples, by the interpolant of order 4.

        Raises:
            ValueError: If the times to keep do not go from the start to the end; if the network
                returns NaN or infinity; or if a sample needs more steps than allowed, or smaller
                ones than its numbers can resolve.
        """
        done = self._integrate(
            x, run.cond, run.noise.samples, save=run.save, on_call=run.on_call, keep=run.times
        )
        times = done.times if run.save else done.times[-1:]
        return Trajectory(done.x, times, done.states, sum(done.calls) / len(done.calls))

    def _integrate(
        self,
        x: Tensor,
        cond: Mapping[str, Any],
        samples: Sequence[int],
        *,
        save: bool = False,
        on_call: Callable[[], None] | None = None,
        keep: Sequence[float] | None = None,
    ) -> _Solution:
        times = _span(self.denoiser.schedule, self.t_start, self.t_end).times
        if keep is not None:
            kept = grid("explicit", self.denoiser.schedule, None, times=keep).times
            if not torch.equal(kept[[0, -1]], times[[0, -1]]):
                raise ValueError(
                    f"the times to keep must go from {times[0]:g} to {times[-1]:g}, got "
                    f"{kept[0]:g} to {kept[-1]:g}"
                )
            times = kept
        network = _Field(self.denoiser, x, cond, on_call)
        return _Integration(network, times, self.rtol, self.atol, self.max_steps, samples).run(
            x, save=save
        )


def freeze(sampler: AdaptiveSampler, x: Tensor, *, row: int | None = None, **cond: Any) -> Plan:
    r"""Runs an adaptive sampler and returns the steps that it accepted as a plan.

    The plan has no error estimate and no rejected steps: N accepted steps cost 6 N network calls,
    since the seventh stage of a step is the first of the next and the last step needs none. It
    gives the frozen sample again, to rounding, and serves any other sample.

    Arguments:
        sampler: The sampler.
        x: Initial states, with shape (B, \*), as from ``sampler.start(noise)``.
        row: Which of them to freeze; left out, the one with the most steps (the first of these).
        cond: The conditions of the run.

    Raises:
        ValueError: If a state or condition does not fit, and as :meth:`AdaptiveSampler.run`.
    """
    if row is not None and not 0 <= row < len(x):
        raise ValueError(f"row must be from 0 to {len(x) - 1}, got {row!r}")
    ready = sampler.denoiser.prepare(len(x), cond)
    knots = sampler._integrate(x, ready, range(len(x))).knots
    points = max(knots, key=len) if row is None else knots[row]
    schedule = sampler.denoiser.schedule
    ends = _span(schedule, sampler.t_start, sampler.t_end).times
    return _plan(schedule, torch.tensor(points, dtype=torch.float64), ends)


def _plan(schedule: NoiseSchedule, u: Tensor, ends: Tensor) -> Plan:
    """Writes steps between points u, log rho, on a tape."""
    places = [_Place.at(schedule, point, ends) for point in u.unbind()]
    times = torch.stack([place.t for place in places])
    tape = Tape(TimeGrid(schedule, times), Prediction.EPS)
    x, slope = tape.evaluate(tape.x, places[0].t)
    for i, (start, end) in enumerate(itertools.pairwise(places)):
        h = u[i + 1] - u[i]
        inner = [_Place.at(schedule, u[i] + c * h, ends) for c in _NODES[1:-2]]
        stages, slopes = [start, *inner, end], [slope]
        for coefficients, place in zip(_STAGES[1:-1], stages[1:], strict=True):
            form = _form(x, slopes, _weights(coefficients, h, start, stages, place))
            slopes.append(tape.evaluate(form, place.t)[1])
        form = _form(x, slopes, _weights(_STAGES[-1], h, start, stages, end))
        x = tape.state(form, i + 1)
        if i + 2 < len(places):
            _, slope = tape.evaluate(x, end.t)
    return tape.finish(x, "dopri5-frozen")


def _form(x: Form, slopes: Sequence[Form], weights: _Weights) -> Form:
    form = weights.ratio * x
    for j, weight in zip(weights.terms, weights.values, strict=True):
        form = form + weight * slopes[j]
    return form


class LogLikelihood(NamedTuple):
    r"""What :func:`log_likelihood` returns.

    Attributes:
        nats: The logarithm of the density, with shape (B), float64.
        bits_per_dim: :math:`-\text{nats} / (d \log 2)` in the model's own range, with shape (B).
            For images of 256 levels scaled to [-1, 1], add :math:`\log_2 127.5 = 6.99` to
            compare with densities in levels.
        nfe: The number of network calls for each sample (the mean, if it differs). The backward
            passes are not counted: one for each probe, or with ``exact`` one for each dimension.
    """

    nats: Tensor
    bits_per_dim: Tensor
    nfe: float


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    seed: int = 0,
    exact: bool = False,
    probes: int = 1,
    probe: str = "rademacher",
    solver: str | None = None,
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
    batch_size: int | None = None,
    guidance: float | None = None,
    first: int = 0,
    **cond: Any,
) -> LogLikelihood:
    r"""Returns the log-likelihood of data under the model's probability-flow ODE.

    The data are taken as states at the schedule's smallest time :math:`t_0`, and carried to the
    largest, T, together with the change of volume:

    .. math:: \log p(x_{t_0}) = \log N(x_T; 0, \sigma_T^2 I) + d \, (\log\alpha_T - \log\alpha_{t_0})
        + \int_{\rho_{t_0}}^{\rho_T} \alpha \, \operatorname{div}_x \varepsilon \, d\rho

    So this is the density of data with the little noise of :math:`t_0`, in the model's own range.
    It is the density of what the sampler draws if it is solved exactly, the start from
    :math:`N(0, \sigma_T^2 I)` included. The divergence is exact, or Hutchinson's estimate
    :math:`v^\top \partial_x \varepsilon \, v` with probes v held fixed along the way: unbiased, with
    the error of a mean over ``probes``. Sample i depends on ``(seed, i)`` alone.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), appendix D.2
        | https://arxiv.org/abs/2011.13456
        | FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl et al., 2019)
        | https://arxiv.org/abs/1810.01367

    Arguments:
        denoiser: The model; its output must be differentiable in the state. Parameters need no
            gradients.
        x: The data, with shape (n, \*), float32 or float64.
        seed: The seed of the probes.
        exact: Whether the divergence is exact: d backward passes for each network call.
        probes: The number of probes; each costs a backward pass for each network call.
        probe: What a probe is: ``"rademacher"`` (signs) or ``"normal"``.
        solver: ``"dopri5"`` (the default without ``steps``), or with a fixed number of steps in
            rho ``"rho-midpoint"``, ``"rho-heun"``, ``"rho-kutta3"`` (the default with ``steps``)
            or ``"rho-rk4"``, on the Karras grid.
        steps: The number of fixed steps.
        rtol: The relative tolerance of ``dopri5``; it holds for the change of volume per
            dimension as well.
        atol: Its absolute tolerance.
        max_steps: Its most steps.
        batch_size: How many samples go through the network at a time.
        guidance: The scale of classifier-free guidance; 1 is none.
        first: The number of the first sample, to do a part of a larger run.
        cond: The conditions, e.g. ``class_labels``.

    Raises:
        ValueError, TypeError: Before the first network call, if anything does not fit; and if
            the network returns NaN, is not differentiable, or cannot meet the tolerance.
    """
    _check_state(denoiser, x)
    _check_positive("probes", probes)
    _check_positive("batch_size", DEFAULT_BATCH if batch_size is None else batch_size)
    if probe not in ("rademacher", "normal"):
        raise ValueError(f"probe must be 'rademacher' or 'normal', got {probe!r}")
    _check_tolerances(rtol, atol, max_steps)
    method = _method(solver, steps)
    ready = denoiser.prepare(len(x), cond)
    if guidance is not None and guidance != 1:
        denoiser = Guided(denoiser, guidance)
    schedule = denoiser.schedule
    times = grid("karras", schedule, steps or STATES).times.flip(0)

    nats: list[Tensor] = []
    calls: list[int] = []
    for rows in torch.arange(len(x)).split(batch_size or DEFAULT_BATCH):
        part = x.detach()[rows.to(x.device)]
        samples = [first + i for i in rows.tolist()]
        probed = None if exact else _probes(NoiseSource(seed, samples), part, probes, probe)
        network = _Field(denoiser, part, _select(ready, len(x), rows), divergence=True)
        network.probes = probed
        if method is None:
            done = _Integration(network, times[[0, -1]], rtol, atol, max_steps, samples).run(part)
        else:
            done = _fixed(network, method, times, part, samples)
        calls += done.calls
        assert done.volume is not None
        nats.append(_log_prior(schedule, times, done.x) + done.volume)
    total = torch.cat(nats)
    dimensions = x[0].numel()
    return LogLikelihood(total, -total / (dimensions * math.log(2)), sum(calls) / len(calls))


def _log_prior(schedule: NoiseSchedule, times: Tensor, x: Tensor) -> Tensor:
    """Returns the terms of the log-likelihood outside of the integral."""
    flat = x.reshape(len(x), -1).to(_exact_type(x))
    log_alpha = schedule.log_alpha(times[[0, -1]])
    log_sigma = float(schedule.log_sigma(times[-1]))
    each = float(log_alpha[1] - log_alpha[0]) - log_sigma - 0.5 * math.log(2 * math.pi)
    return flat.shape[1] * each - flat.square().sum(1) / (2 * math.exp(2 * log_sigma))


def _probes(source: NoiseSource, x: Tensor, number: int, kind: str) -> Tensor:
    r"""Returns probes with shape (number, B, \*)."""
    draws = [
        source.draw(PROBE - k, x.shape[1:], dtype=x.dtype, device=x.device) for k in range(number)
    ]
    v = torch.stack(draws)
    return v if kind == "normal" else torch.where(v < 0, -1.0, 1.0).to(x)


def _method(solver: str | None, steps: int | None) -> type[RhoHeun] | None:
    """Returns the class of a solver with fixed steps, or ``None`` for the adaptive one."""
    if solver is None:
        solver = "dopri5" if steps is None else "rho-kutta3"
    if steps is not None:
        _check_positive("steps", steps)
    if solver == "dopri5":
        if steps is not None:
            raise ValueError(
                f"dopri5 chooses its steps; leave out steps = {steps}, or take another solver"
            )
        return None
    if solver not in _FIXED:
        raise ValueError(
            f"the solver of a likelihood is dopri5, {', '.join(sorted(_FIXED))}; got {solver!r}"
        )
    if steps is None:
        raise ValueError(f"{solver} needs steps, a number of steps")
    return _FIXED[solver]  # type: ignore[return-value]


class _Place(NamedTuple):
    r"""A point of the integration; each part has shape () or (B).

    Attributes:
        t: The time.
        alpha: The scale of the data.
        sigma: The scale of the noise.
        rate: :math:`d\rho` by the variable of integration: rho itself if that is log rho.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    rate: Tensor

    @classmethod
    def at(cls, schedule: NoiseSchedule, u: Tensor, ends: Tensor) -> _Place:
        """Returns the place at log rho = u; rounding does not take it past the two ends."""
        t = schedule.time(-u).clamp(float(ends.min()), float(ends.max()))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return cls(t, alpha, sigma, sigma / alpha)


class _Weights(NamedTuple):
    """A linear combination of the state, with weight ``ratio``, and some of the slopes."""

    ratio: Tensor
    terms: list[int]
    values: list[Tensor]

    def apply(self, x: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """Returns the combination of a state (B, D) and slopes (B, D)."""
        # One transfer for all; each product is by element, so that rows do not mix.
        table = torch.stack([self.ratio, *self.values]).to(device=x.device, dtype=x.dtype)
        total = x * table[0, :, None]
        for place, j in enumerate(self.terms, start=1):
            total.addcmul_(slopes[j], table[place, :, None])
        return total


def _weights(
    coefficients: Sequence[float], h: Tensor, start: _Place, stages: Sequence[_Place], end: _Place
) -> _Weights:
    r"""Returns :math:`x = \alpha (x_n / \alpha_n + h \sum_j a_j \dot\rho_j \varepsilon_j)`."""
    terms = [j for j, a in enumerate(coefficients) if a]
    values = [end.alpha * h * coefficients[j] * stages[j].rate for j in terms]
    return _Weights(end.alpha / start.alpha, terms, values)


class _Slope(NamedTuple):
    r"""The network's answer (B, D), and its divergence in x (B) if that is asked for."""

    eps: Tensor
    divergence: Tensor | None


class _Field:
    """The noise that the network predicts, and its divergence, for the samples under way.

    Arguments:
        denoiser: The model.
        x: A state of the whole batch.
        cond: The conditions of the whole batch.
        on_call: Called after each network call.
        divergence: Whether to compute the divergence.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        cond: Mapping[str, Any],
        on_call: Callable[[], None] | None = None,
        *,
        divergence: bool = False,
    ) -> None:
        _check_state(denoiser, x)
        self.denoiser = denoiser
        self.divergence = divergence
        self.probes: Tensor | None = None
        self._shape = x.shape[1:]
        self._all, self._cond = cond, cond
        self._batch = len(x)
        self._on_call = on_call

    def keep(self, index: Tensor, kept: Tensor) -> None:
        """Continues with the samples ``index`` of the batch, which are the rows ``kept``."""
        self._cond = _select(self._all, self._batch, index)
        if self.probes is not None:
            self.probes = self.probes[:, kept.to(self.probes.device)]

    def __call__(self, x: Tensor, t: Tensor) -> _Slope:
        state = x.reshape(len(x), *self._shape)
        slope = self._with_divergence(state, t) if self.divergence else self._plain(state, t)
        if self._on_call is not None:
            self._on_call()
        return slope

    def _answer(self, state: Tensor, t: Tensor) -> Tensor:
        value = self.denoiser(state, t, prediction=Prediction.EPS, **self._cond)
        return value.reshape(len(state), -1).to(state.dtype)

    def _plain(self, state: Tensor, t: Tensor) -> _Slope:
        with torch.no_grad():
            return _Slope(self._answer(state, t), None)

    def _with_divergence(self, state: Tensor, t: Tensor) -> _Slope:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            value = self._answer(leaf, t)
            if self.probes is None:
                total = self._trace(leaf, value)
            else:
                total = self._estimate(leaf, value, self.probes.reshape(-1, *value.shape))
        return _Slope(value.detach(), total)

    def _trace(self, leaf: Tensor, value: Tensor) -> Tensor:
        total = torch.zeros(len(value), dtype=_exact_type(value), device=value.device)
        for d in range(value.shape[1]):
            row = _pullback(value[:, d].sum(), leaf, more=d + 1 < value.shape[1])
            total += row[:, d]
        return total

    def _estimate(self, leaf: Tensor, value: Tensor, probes: Tensor) -> Tensor:
        total = torch.zeros(len(value), dtype=_exact_type(value), device=value.device)
        for p, v in enumerate(probes):
            row = _pullback((value * v).sum(), leaf, more=p + 1 < len(probes))
            total += (row * v).sum(1)
        return total / len(probes)


def _pullback(scalar: Tensor, leaf: Tensor, *, more: bool) -> Tensor:
    """Returns the gradient of a sum over the batch, with shape (B, D)."""
    gradient = None
    if scalar.requires_grad:
        (gradient,) = torch.autograd.grad(scalar, leaf, retain_graph=more, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the network's output is not connected to its input by gradients, which a likelihood "
            "needs; take torch.no_grad, detach and numpy out of the network"
        )
    return gradient.reshape(len(leaf), -1)


class _Solution(NamedTuple):
    r"""The end of an integration.

    Attributes:
        x: The final states, with shape (B, \*).
        volume: The integral of the divergence, with shape (B), if asked for.
        calls: The number of network calls of each sample.
        knots: For each sample log rho at the accepted steps, from the start to the end.
        times: The times of the states.
        states: The states, with shape (S, B, \*), if asked for.
    """

    x: Tensor
    volume: Tensor | None
    calls: list[int]
    knots: list[list[float]]
    times: Tensor
    states: Tensor | None = None


@dataclass
class _Rows:
    """The samples under way; tensors of numbers are float64 on the CPU, with shape (A).

    Attributes:
        index: Which samples of the batch they are.
        u: Where they are, in log rho.
        h: The step to try next, signed.
        error: The error of the last accepted step.
        shrunk: Whether the last step was rejected.
        x: The states, with shape (A, D).
        volume: The integrals of the divergence.
        slope: The network's answers at the states.
    """

    index: Tensor
    u: Tensor
    h: Tensor
    error: Tensor
    shrunk: Tensor
    x: Tensor
    volume: Tensor | None
    slope: _Slope

    def keep(self, rows: Tensor) -> None:
        there = rows.to(self.x.device)
        for name in ("index", "u", "h", "error", "shrunk"):
            setattr(self, name, getattr(self, name)[rows])
        self.x = self.x[there]
        self.volume = _pick(self.volume, there)
        self.slope = _Slope(self.slope.eps[there], _pick(self.slope.divergence, there))


class _Attempt(NamedTuple):
    """A step that was tried: where it went, its stages, and the states there."""

    u: Tensor
    h: Tensor
    start: _Place
    stages: list[_Place]
    slopes: list[_Slope]
    x: Tensor
    volume: Tensor | None


@dataclass
class _Integration:
    """Dormand–Prince from one time to another, a step size for each sample.

    Attributes:
        network: The network.
        times: Times of which the first and the last are the ends; states are kept at all.
        rtol: The relative tolerance.
        atol: The absolute tolerance.
        max_steps: The most steps.
        samples: The numbers of the samples, for messages.
    """

    network: _Field
    times: Tensor
    rtol: float
    atol: float
    max_steps: int
    samples: Sequence[int]
    calls: list[int] = field(default_factory=list)
    knots: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = self.network.denoiser.schedule
        self.points = -self.schedule.lam(self.times)
        self.end = float(self.points[-1])
        self.sign = 1.0 if self.end > float(self.points[0]) else -1.0

    def run(self, x: Tensor, *, save: bool = False) -> _Solution:
        """Integrates from the first to the last time."""
        smallest = 8 * torch.finfo(x.dtype).eps
        if max(self.rtol, self.atol) < smallest:
            raise ValueError(
                f"rtol = {self.rtol:g} and atol = {self.atol:g} are below what {x.dtype} can hold; "
                f"raise one to {smallest:.1g}, or give float64 states (sample(noise=...))"
            )
        batch, shape = len(x), x.shape[1:]
        flat = x.detach().reshape(batch, -1)
        self.calls, self.knots = [0] * batch, [[float(self.points[0])] for _ in range(batch)]
        final, volume = torch.empty_like(flat), None
        states = flat.new_empty((len(self.points), *flat.shape)) if save else None
        if states is not None:
            states[0] = flat
        if self.network.divergence:
            volume = torch.zeros(batch, dtype=_exact_type(x), device=x.device)
        rows = self._begin(flat, volume)
        for _ in range(self.max_steps):
            attempt = self._try(rows)
            accepted = self._judge(rows, attempt)
            if states is not None:
                self._interpolate(states, rows, attempt, accepted)
            done = self._move(rows, attempt, accepted)
            if bool(done.any()):
                ended, there = rows.index[done].to(x.device), done.to(x.device)
                final[ended] = rows.x[there]
                if volume is not None and rows.volume is not None:
                    volume[ended] = rows.volume[there]
                left = (~done).nonzero().flatten()
                if not len(left):
                    break
                rows.keep(left)
                self.network.keep(rows.index, left)
        else:
            problem = f"is not done after max_steps = {self.max_steps} steps"
            self._give_up(rows, 0, problem, "raise max_steps, or raise rtol and atol")
        if states is not None:
            states[-1] = final
            states = states.reshape(len(states), *x.shape)
        return _Solution(
            final.reshape(batch, *shape), volume, self.calls, self.knots, self.times, states
        )

    def _place(self, u: Tensor) -> _Place:
        return _Place.at(self.schedule, u, self.times)

    def _call(self, index: Tensor, x: Tensor, t: Tensor) -> _Slope:
        for i in index.tolist():
            self.calls[i] += 1
        return self.network(x, t)

    def _begin(self, x: Tensor, volume: Tensor | None) -> _Rows:
        """Finds a first step: 1 % of the state's size over that of its slope, then by curvature."""
        index = torch.arange(len(x))
        u = self.points[0].expand(len(x)).clone()
        here = self._place(u)
        slope = self._call(index, x, here.t)
        self._check_finite(index, [slope], [here])
        size, speed = self._norms(
            x, here, [x, slope.eps], [torch.ones_like(here.sigma), here.sigma]
        )
        small = (size < 1e-5) | (speed < 1e-5)
        h = torch.where(small, 1e-6, 0.01 * size / speed).clamp(max=abs(self.end - float(u[0])))
        there = self._place(u + self.sign * h)
        weights = _weights((1.0,), self.sign * h, here, [here], there)
        ahead = self._call(index, weights.apply(x, [slope.eps]), there.t)
        self._check_finite(index, [ahead], [there])
        # The change of alpha dy/du, at the scale of the start.
        before = _column(here.sigma, x) * slope.eps
        after = _column(here.alpha * there.rate, x) * ahead.eps
        (bend,) = self._norms(x, here, [after - before], [1 / h])
        steepest = torch.maximum(speed, bend)
        guess = torch.where(
            steepest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / steepest) ** 0.2
        )
        h = torch.minimum(100 * h, guess)
        false = torch.zeros(len(x), dtype=torch.bool)
        return _Rows(index, u, self.sign * h, torch.full_like(u, 1e-4), false, x, volume, slope)

    def _norms(
        self, x: Tensor, place: _Place, vectors: list[Tensor], factors: list[Tensor]
    ) -> list[Tensor]:
        """Returns the sizes of vectors times factors, in tolerances at a state."""
        unit = _unit(place)
        bound = self.atol + self.rtol * (_column(unit, x) * x).abs()
        sizes = torch.stack([_rms(v / bound) for v in vectors]).cpu().double()
        return [size * unit * factor for size, factor in zip(sizes, factors, strict=True)]

    def _try(self, rows: _Rows) -> _Attempt:
        """Makes the stages of one step of each sample."""
        left = self.end - rows.u
        # A step that would leave next to nothing goes to the end.
        last = 1.01 * rows.h.abs() >= left.abs()
        u = torch.where(last, torch.full_like(left, self.end), rows.u + rows.h)
        h = u - rows.u
        start = self._place(rows.u)
        stages, slopes, x = [start], [rows.slope], rows.x
        for coefficients, c in zip(_STAGES[1:], _NODES[1:], strict=True):
            place = self._place(u if c == 1 else rows.u + c * h)
            weights = _weights(coefficients, h, start, stages, place)
            x = weights.apply(rows.x, [slope.eps for slope in slopes])
            stages.append(place)
            slopes.append(self._call(rows.index, x, place.t))
        volume = rows.volume
        if volume is not None:
            volume = volume + _volume(_STAGES[-1], h, stages, slopes)
        return _Attempt(u, h, start, stages, slopes, x, volume)

    def _judge(self, rows: _Rows, attempt: _Attempt) -> Tensor:
        """Returns who may step, and sets the next step sizes."""
        self._check_finite(rows.index, attempt.slopes, attempt.stages)
        error = self._error(rows, attempt)
        error = torch.where(error.isfinite(), error, torch.inf).clamp(min=1e-10)
        accepted = error <= 1
        grow = (0.9 * error**-0.17 * rows.error**0.04).clamp(0.2, 10.0)
        # Right after a rejection the step does not grow.
        grow = torch.where(rows.shrunk, grow.clamp(max=1.0), grow)
        shrink = (0.9 * error**-0.2).clamp(0.2, 1.0)
        rows.h = attempt.h * torch.where(accepted, grow, shrink)
        rows.error = torch.where(accepted, error.clamp(min=1e-4), rows.error)
        rows.shrunk = ~accepted
        least = 10 * torch.finfo(rows.x.dtype).eps * abs(self.end - float(self.points[0]))
        stuck = rows.shrunk & (rows.h.abs() < least)
        if bool(stuck.any()):
            row = int(stuck.nonzero()[0])
            problem = f"needs steps below {least:.1g} in log rho"
            self._give_up(rows, row, problem, "raise rtol and atol")
        return accepted

    def _error(self, rows: _Rows, attempt: _Attempt) -> Tensor:
        start, end = attempt.start, attempt.stages[-1]
        weights = _weights(_ERROR, attempt.h, start, attempt.stages, end)
        weights = weights._replace(ratio=torch.zeros_like(attempt.h))
        difference = weights.apply(rows.x, [slope.eps for slope in attempt.slopes])
        before = (_column(_unit(start), rows.x) * rows.x).abs()
        unit = _column(_unit(end), rows.x)
        bound = self.atol + self.rtol * torch.maximum(before, (unit * attempt.x).abs())
        error = _rms(unit * difference / bound).cpu().double()
        if rows.volume is None or attempt.volume is None:
            return error
        difference = _volume(_ERROR, attempt.h, attempt.stages, attempt.slopes).abs()
        larger = torch.maximum(rows.volume.abs(), attempt.volume.abs())
        bound = self.atol * rows.x.shape[1] + self.rtol * larger
        return torch.maximum(error, (difference / bound).cpu().double())

    def _move(self, rows: _Rows, attempt: _Attempt, accepted: Tensor) -> Tensor:
        """Steps those who may, and returns who has arrived."""
        yes = accepted.to(rows.x.device)
        last = attempt.slopes[-1]
        rows.u = torch.where(accepted, attempt.u, rows.u)
        rows.x = torch.where(yes[:, None], attempt.x, rows.x)
        divergence = rows.slope.divergence
        if rows.volume is not None and attempt.volume is not None:
            assert divergence is not None
            assert last.divergence is not None
            rows.volume = torch.where(yes, attempt.volume, rows.volume)
            divergence = torch.where(yes, last.divergence, divergence)
        rows.slope = _Slope(torch.where(yes[:, None], last.eps, rows.slope.eps), divergence)
        for i, u, moved in zip(
            rows.index.tolist(), rows.u.tolist(), accepted.tolist(), strict=True
        ):
            if moved:
                self.knots[i].append(u)
        return accepted & (rows.u == self.end)

    def _interpolate(
        self, states: Tensor, rows: _Rows, attempt: _Attempt, accepted: Tensor
    ) -> None:
        """Writes the states at the points that accepted steps passed."""
        for k, point in enumerate(self.points[1:-1], start=1):
            ahead, behind = (point - rows.u) * self.sign > 0, (point - attempt.u) * self.sign <= 0
            hit = (accepted & ahead & behind).nonzero().flatten()
            if not len(hit):
                continue
            there = hit.to(states.device)
            theta = ((point - rows.u) / attempt.h)[hit]
            h, place = attempt.h[hit], self._place(point.expand(len(hit)))
            stages = [_Place(*(part[hit] for part in at)) for at in attempt.stages]
            start, end = stages[0], stages[-1]
            rest = 1 - theta
            bump = [h * (theta * rest) ** 2 * d for d in _BUMP]
            bump[0] = bump[0] + h * theta * rest**2
            bump[-1] = bump[-1] - h * theta**2 * rest
            share = theta**2 * (3 - 2 * theta)
            ratios = [place.alpha * (1 - share) / start.alpha, place.alpha * share / end.alpha]
            values = [place.alpha * b * at.rate for b, at in zip(bump, stages, strict=True)]
            weights = _Weights(ratios[0], list(range(8)), [ratios[1], *values])
            slopes = [attempt.x[there], *(slope.eps[there] for slope in attempt.slopes)]
            states[k, rows.index[hit].to(states.device)] = weights.apply(rows.x[there], slopes)

    def _check_finite(
        self, index: Tensor, slopes: Sequence[_Slope], places: Sequence[_Place]
    ) -> None:
        """Raises if the network gave NaN or infinity at one of the last calls."""
        fine = torch.stack([_finite(slope) for slope in slopes]).cpu()
        if bool(fine.all()):
            return
        stage = int((~fine).any(1).nonzero()[0])
        row = int((~fine[stage]).nonzero()[0])
        call = self.calls[int(index[row])] - len(slopes) + stage + 1
        samples = [self.samples[i] for i in index.tolist()]
        raise ValueError(_not_finite(fine[stage], call, samples, places[stage]))

    def _give_up(self, rows: _Rows, row: int, problem: str, mend: str) -> None:
        """Raises; the message has sample, time, and what to do."""
        if getattr(self.network.denoiser, "integer_times", False):
            mend = (
                "this network rounds times to trained levels, so its output jumps between them; "
                f"take a solver with a plan, or {mend}"
            )
        elif rows.x.dtype == torch.float32:
            mend += ", or let states and network be float64"
        raise ValueError(
            f"dopri5: sample {self.samples[int(rows.index[row])]} {problem}, at "
            f"t = {float(self._place(rows.u[row]).t):.6g} on the way from {self.times[0]:g} to "
            f"{self.times[-1]:g}; {mend} (rtol = {self.rtol:g}, atol = {self.atol:g})"
        )


def _fixed(
    network: _Field, method: type[RhoHeun], times: Tensor, x: Tensor, samples: Sequence[int]
) -> _Solution:
    """Integrates state and volume by a tableau in rho, on given times."""
    schedule = network.denoiser.schedule
    flat = x.detach().reshape(len(x), -1)
    volume = torch.zeros(len(x), dtype=_exact_type(x), device=x.device)
    rhos = schedule.rho(times)
    calls = 0

    def place_at(t: Tensor) -> _Place:
        t = t.expand(len(x))
        return _Place(t, schedule.alpha(t), schedule.sigma(t), torch.ones_like(t))

    for i in range(len(times) - 1):
        h = (rhos[i + 1] - rhos[i]).expand(len(x))
        start, end = place_at(times[i]), place_at(times[i + 1])
        stages: list[_Place] = []
        slopes: list[_Slope] = []
        for row in method._matrix:
            c, place, state = sum(row), start, flat
            if c:
                place = end if c == 1 else place_at(schedule.time(-torch.log(rhos[i] + c * h[0])))
                weights = _weights(row, h, start, stages, place)
                state = weights.apply(flat, [slope.eps for slope in slopes])
            stages.append(place)
            slopes.append(network(state, place.t))
            calls += 1
            fine = _finite(slopes[-1])
            if not bool(fine.all()):
                raise ValueError(_not_finite(fine, calls, samples, place))
        volume = volume + _volume(method._weights, h, stages, slopes)
        weights = _weights(method._weights, h, start, stages, end)
        flat = weights.apply(flat, [slope.eps for slope in slopes])
    return _Solution(flat.reshape(x.shape), volume, [calls] * len(x), [], times)


def _not_finite(fine: Tensor, call: int, samples: Sequence[int], place: _Place) -> str:
    row = int((~fine).nonzero()[0])
    return (
        f"the network returned NaN or infinity at evaluation {call} of sample {samples[row]}, "
        f"t = {float(place.t[row]):.6g}, and for {int((~fine).sum()) - 1} others of the batch"
    )


def _volume(
    coefficients: Sequence[float], h: Tensor, stages: Sequence[_Place], slopes: Sequence[_Slope]
) -> Tensor:
    r"""Returns :math:`h \sum_j b_j \dot\rho_j \alpha_j \operatorname{div} \varepsilon_j`, with shape (B)."""
    total: Tensor | float = 0.0
    for j, b in enumerate(coefficients):
        divergence = slopes[j].divergence
        assert divergence is not None
        if b:
            weight = h * b * stages[j].rate * stages[j].alpha
            total = total + weight.to(divergence) * divergence
    assert isinstance(total, Tensor)
    return total


def _unit(place: _Place) -> Tensor:
    """Returns the factor that takes a state to the scale on which errors are measured."""
    return 1 / torch.sqrt(place.alpha.square() + place.sigma.square())


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype)[:, None]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def _finite(slope: _Slope) -> Tensor:
    fine = slope.eps.isfinite().all(1)
    return fine if slope.divergence is None else fine & slope.divergence.isfinite()


def _pick(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _exact_type(x: Tensor) -> torch.dtype:
    # Sums over thousands of dimensions need float64; one kind of device has none.
    return torch.float32 if x.device.type == "mps" else torch.float64


def _select(cond: Mapping[str, Any], batch: int, index: Tensor) -> dict[str, Any]:
    """Returns the conditions of some samples of a batch."""
    if len(index) == batch:
        return dict(cond)
    chosen: dict[str, Any] = {}
    for name, value in cond.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            chosen[name] = value[index.to(value.device)]
        elif isinstance(value, list) and len(value) == batch:
            chosen[name] = [value[i] for i in index.tolist()]
        elif isinstance(value, Tensor) and value.ndim and len(value) == 1:
            chosen[name] = value.expand(len(index), *value.shape[1:])
        else:
            chosen[name] = value
    return chosen


def _span(schedule: NoiseSchedule, t_start: float | None, t_end: float | None) -> TimeGrid:
    """Returns the times of the states, from start to end."""
    span = grid("log-rho", schedule, STATES, t_start=t_start, t_end=t_end)
    if span.ends_at_zero:
        raise ValueError(
            f"dopri5 integrates in log rho, which is infinite at t_end = {t_end}; take t_end > "
            f"{schedule.t_zero:g}, e.g. {schedule.t_min:g}"
        )
    return span


def _check_state(denoiser: Denoiser, x: Tensor) -> None:
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"a Denoiser is needed, got {type(denoiser).__name__}; "
            "make one with fewstep.load(name) or fewstep.Denoiser.wrap(network, ...)"
        )
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 or float64 tensor, got {got}")
    shape = denoiser.event_shape
    if not x.ndim or not len(x) or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
        wanted = "(n, ...)" if shape is None else f"(n, {', '.join(map(str, shape))})"
        raise ValueError(f"x must have shape {wanted} with n >= 1, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x has NaN or infinity in it")


def _check_tolerances(rtol: object, atol: object, max_steps: object) -> None:
    check_number("rtol", rtol)
    check_number("atol", atol)
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol cannot both be 0; the defaults are 1e-5")
    _check_positive("max_steps", max_steps)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")

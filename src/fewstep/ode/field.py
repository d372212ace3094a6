r"""The probability-flow ODE: places on the way, the network as its field, linear combinations.

With :math:`y = x / \alpha`, :math:`\rho = \sigma / \alpha` and :math:`u = \log\rho`, the
probability-flow ODE of every schedule is

.. math:: \frac{dy}{d\rho} = \varepsilon(x, t), \qquad \frac{dy}{du} = \rho \, \varepsilon(x, t).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.grids import TimeGrid, grid
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.models.conditions import select
from fewstep.models.denoiser import Denoiser

STATES = 32
"""The number of intervals, even in log rho, between the states that ``save="states"`` stores."""


class Place(NamedTuple):
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
    def at(cls, schedule: NoiseSchedule, u: Tensor, ends: Tensor) -> Place:
        """Returns the place at log rho = u; rounding does not take it past the two ends."""
        t = schedule.time(-u).clamp(float(ends.min()), float(ends.max()))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return cls(t, alpha, sigma, sigma / alpha)


class Weights(NamedTuple):
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


def stage_weights(
    coefficients: Sequence[float], h: Tensor, start: Place, stages: Sequence[Place], end: Place
) -> Weights:
    r"""Returns :math:`x = \alpha (x_n / \alpha_n + h \sum_j a_j \dot\rho_j \varepsilon_j)`."""
    terms = [j for j, a in enumerate(coefficients) if a]
    rates = torch.stack([stages[j].rate for j in terms])
    used = torch.tensor([coefficients[j] for j in terms], dtype=rates.dtype)
    # All terms in three operations: batches are small, so operations are what a step costs.
    values = end.alpha * h * used.reshape(-1, *[1] * (rates.ndim - 1)) * rates
    return Weights(end.alpha / start.alpha, terms, list(values.unbind()))


class Slope(NamedTuple):
    r"""The network's output (B, D), and its divergence in x (B) or ``None``."""

    eps: Tensor
    divergence: Tensor | None


class Field:
    """The noise that the network predicts, and its divergence, for the samples still integrated.

    Arguments:
        denoiser: The model.
        x: A state of the whole batch.
        cond: The conditions of the whole batch.
        on_evaluation: Called after each network evaluation.
        divergence: Whether to compute the divergence.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        cond: Mapping[str, Any],
        on_evaluation: Callable[[], None] | None = None,
        *,
        divergence: bool = False,
    ) -> None:
        check_state(denoiser, x)
        self.denoiser = denoiser
        self.divergence = divergence
        self.probes: Tensor | None = None
        self._shape = x.shape[1:]
        self._all, self._cond = cond, cond
        self._on_evaluation = on_evaluation

    def keep(self, index: Tensor, remaining: Tensor) -> None:
        """Continues with the samples ``index`` of the batch, which are the rows ``remaining``."""
        self._cond = select(self._all, index)
        if self.probes is not None:
            self.probes = self.probes[:, remaining.to(self.probes.device)]

    def __call__(self, x: Tensor, t: Tensor) -> Slope:
        state = x.reshape(len(x), *self._shape)
        slope = self._with_divergence(state, t) if self.divergence else self._plain(state, t)
        if self._on_evaluation is not None:
            self._on_evaluation()
        return slope

    def _output(self, state: Tensor, t: Tensor) -> Tensor:
        value = self.denoiser.evaluate(state, t, prediction=Prediction.EPS, **self._cond)
        # Copied: the stages of a step are kept, and a network may reuse the memory of its output.
        return value.reshape(len(state), -1).to(state.dtype, copy=True)

    def _plain(self, state: Tensor, t: Tensor) -> Slope:
        with torch.no_grad():
            return Slope(self._output(state, t), None)

    def _with_divergence(self, state: Tensor, t: Tensor) -> Slope:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            value = self._output(leaf, t)
            if self.probes is None:
                total = self._trace(leaf, value)
            else:
                total = self._estimate(leaf, value, self.probes.reshape(-1, *value.shape))
        return Slope(value.detach(), total)

    def _trace(self, leaf: Tensor, value: Tensor) -> Tensor:
        total = torch.zeros(len(value), dtype=exact_type(value), device=value.device)
        for d in range(value.shape[1]):
            row = _pullback(value[:, d].sum(), leaf, more=d + 1 < value.shape[1])
            total += row[:, d]
        return total

    def _estimate(self, leaf: Tensor, value: Tensor, probes: Tensor) -> Tensor:
        total = torch.zeros(len(value), dtype=exact_type(value), device=value.device)
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
            "needs; remove torch.no_grad, detach and numpy from the network"
        )
    return gradient.reshape(len(leaf), -1)


def volume_change(
    coefficients: Sequence[float], h: Tensor, stages: Sequence[Place], slopes: Sequence[Slope]
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


def finite_rows(slope: Slope) -> Tensor:
    """Returns which samples have no NaN or infinity, with shape (B)."""
    finite = slope.eps.isfinite().all(1)
    return finite if slope.divergence is None else finite & slope.divergence.isfinite()


def not_finite(finite: Tensor, evaluation: int, samples: Sequence[int], place: Place) -> str:
    """Returns the message about non-finite samples: the first of them, its time, the evaluation."""
    row = int((~finite).nonzero()[0])
    return (
        f"the network returned NaN or infinity at evaluation {evaluation} of sample {samples[row]}, "
        f"t = {float(place.t[row]):.6g}, and for {int((~finite).sum()) - 1} others of the batch"
    )


def exact_type(x: Tensor) -> torch.dtype:
    """Returns the type in which sums over the dimensions of a state are computed."""
    # Sums over thousands of dimensions need float64; MPS devices have no float64.
    return torch.float32 if x.device.type == "mps" else torch.float64


def time_span(schedule: NoiseSchedule, t_start: float | None, t_end: float | None) -> TimeGrid:
    """Returns the times of the states, from start to end."""
    span = grid("log-rho", schedule, STATES, t_start=t_start, t_end=t_end)
    if span.ends_at_zero:
        raise ValueError(
            f"dopri5 integrates in log rho, which is infinite at t_end = {t_end}; use t_end > "
            f"{schedule.t_zero:g}, e.g. {schedule.t_min:g}"
        )
    return span


def check_state(denoiser: Denoiser, x: Tensor) -> None:
    """Raises unless this is a denoiser, and finite states of its shape."""
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

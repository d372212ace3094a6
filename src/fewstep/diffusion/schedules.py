r"""Noise schedules: :math:`x_t = \alpha(t) x_0 + \sigma(t) \varepsilon` as functions of time.

Everything downstream needs only :math:`\alpha`, :math:`\sigma` and the inverse of
:math:`\lambda = \log(\alpha / \sigma)`, which is *half* the log signal-to-noise ratio.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fewstep.base.registry import Registry, check_numbers, check_options

MOST_LEVELS = 1_000_000
"""The most levels of a tabulated schedule; a guard against hostile files."""


# The default grid of Heun is EDM's, for EDM's range of noise; that of VP schedules is even in time.
VP_SUITS: Mapping[str, tuple[str, Mapping[str, Any]]] = {"karras": ("uniform", {})}
# In rho itself even steps are all in the noise; networks of that range want them around rho = 1.
EDM_SUITS = ("logistic", {"center": 0.0, "scale": 1.5})


class NoiseSchedule(ABC):
    r"""A noise schedule :math:`t \mapsto (\alpha(t), \sigma(t))`, noise growing with time.

    All methods take and return tensors of the same shape and floating type, are
    differentiable, and are meant to be called in float64.

    .. math:: x_t = \alpha(t) \, x_0 + \sigma(t) \, \varepsilon, \qquad \lambda = \log(\alpha / \sigma), \qquad
        \rho = \sigma / \alpha

    Attributes:
        t_min: The smallest time at which the network is trained well.
        t_max: The largest time, where sampling starts.
        t_limit: The largest time at which a network may be evaluated, if that is beyond ``t_max``.
        t_zero: The label of the point with :math:`\sigma = 0` in a grid; no function of the
            schedule is ever evaluated there.
        discrete: Whether times are (possibly fractional) training timesteps.
        flow_coordinate: Whether one-step methods of several stages take
            :math:`s = \sigma / (\alpha + \sigma)` as their coordinate, in which every schedule is a
            rectified flow, :math:`d(x / (\alpha + \sigma)) / ds = \varepsilon - x_0`, and not
            :math:`\rho`, which falls so steeply near pure noise that the stages amplify errors.
        time_is_rho: Whether the time is :math:`\rho` itself. Networks are then conditioned on its
            logarithm, in which the grids of other libraries that are even in "timesteps" are even.
        suits: For solvers' default grids that waste steps or diverge in this schedule's time, the grid
            to use instead.

    Example:
        >>> schedule = fewstep.schedule("vp-linear")
        >>> t = torch.tensor([0.1, 0.5], dtype=torch.float64)
        >>> torch.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(2).double())
        True
        >>> torch.allclose(schedule.time(schedule.lam(t)), t)
        True
    """

    name: str
    t_min: float
    t_max: float
    t_limit: float | None = None
    t_zero: float = 0.0
    discrete: bool = False
    flow_coordinate: bool = False
    time_is_rho: bool = False
    suits: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\log \alpha(t)`."""

    @abstractmethod
    def log_sigma(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\log \sigma(t)`."""

    @abstractmethod
    def time(self, lam: Tensor) -> Tensor:
        r"""Returns the time at which :math:`\log(\alpha / \sigma)` is ``lam``."""

    def options(self) -> dict[str, Any]:
        """Returns the options that rebuild this schedule, as JSON values."""
        return {}

    def breakpoints(self) -> Tensor | None:
        r"""Returns the times at which :math:`\lambda(t)` has a kink, or ``None``."""
        return None

    def log_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log \alpha(t)` and :math:`\log \sigma(t)`, which may share work."""
        return self.log_alpha(t), self.log_sigma(t)

    @final
    def alpha(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\alpha(t)`."""
        return self.log_alpha(t).exp()

    @final
    def sigma(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\sigma(t)`."""
        return self.log_sigma(t).exp()

    @final
    def lam(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\lambda(t) = \log(\alpha / \sigma)`, half the log-SNR."""
        log_alpha, log_sigma = self.log_scales(t)
        return log_alpha - log_sigma

    @final
    def rho(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\rho(t) = \sigma / \alpha = e^{-\lambda}`."""
        return (-self.lam(t)).exp()

    @final
    def is_zero(self, t: float) -> bool:
        r"""Whether a time is the label of :math:`\sigma = 0`: where the user's own times say that they end there."""
        return t == self.t_zero and self.t_zero < self.t_min

    @final
    def check_times(self, t: Tensor) -> None:
        r"""Raises unless a network can be evaluated at these times, which may be below ``t_min``.

        Arguments:
            t: The times. Continuous ones may be beyond ``t_max`` by the rounding of half precision, timesteps outside
                of the table by a thousandth.

        Raises:
            ValueError: If one is NaN, not above the label ``t_zero``, negative, or beyond the largest one.
        """
        if not t.numel():
            return
        low, high = (float(end) for end in t.detach().aminmax())
        top, slack = self.t_limit, 0.0
        if top is None:
            top, slack = self.t_max, 1e-3 if self.discrete else 4e-3 * self.t_max
        lowest = -slack if self.discrete else 0.0
        starts, ends = low >= lowest and low > self.t_zero, high <= top + slack
        if starts and ends:
            return
        start = "above 0" if self.t_zero == 0 else "from 0"
        hint = "; it is an index of the table" if self.discrete else ""
        raise ValueError(
            f"t must be a time of {self.name!r}, {start} and at most {top:g}, got {high if starts else low:g}{hint}"
        )

    @final
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\alpha` and :math:`\sigma` at the points of a grid, 1 and 0 at the label ``t_zero``."""
        end = t <= self.t_zero
        inside = torch.where(end, torch.full_like(t, self.t_min), t)
        alpha = torch.where(end, torch.ones_like(t), self.alpha(inside))
        return alpha, torch.where(end, torch.zeros_like(t), self.sigma(inside))

    @final
    def drift(self, t: Tensor) -> Tensor:
        r"""Returns :math:`f(t) = d \log \alpha / dt` of the forward SDE :math:`dx = f x dt + g dw`."""
        return _derivative(self.log_alpha, t)

    @final
    def diffusion(self, t: Tensor) -> Tensor:
        r"""Returns :math:`g(t)^2 = -2 \sigma^2 \, d\lambda / dt` of the forward SDE."""
        return -2 * self.sigma(t).square() * _derivative(self.lam, t)

    @final
    def prior_std(self, t: float | None = None) -> float:
        r"""Returns the standard deviation :math:`\sigma(t)` of the initial draw (default: at ``t_max``)."""
        start = self.t_max if t is None else t
        return float(self.sigma(torch.tensor(start, dtype=torch.float64)))

    @final
    def to_record(self) -> dict[str, Any]:
        """Returns the name and the options, as stored in plans, recipes and model folders."""
        return {"name": self.name, **self.options()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and self.to_record() == other.to_record()

    def __hash__(self) -> int:
        return hash(repr(self.to_record()))

    def __repr__(self) -> str:
        body = ", ".join(f"{k}={_short(v)}" for k, v in self.options().items())
        return f"{type(self).__name__}({body})"


def _short(value: object) -> str:
    return f"<{len(value)} levels>" if isinstance(value, (list, tuple)) else repr(value)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    # Reverse mode of an elementwise function: forward mode imports torch.jit, which warns.
    # Nothing is differentiated in inference mode: a derivative there would be 0, without an error.
    with torch.inference_mode(False), torch.enable_grad():
        point = t if t.requires_grad else t.detach().clone().requires_grad_()
        value = function(point).sum()
        if not value.requires_grad:  # a constant
            return torch.zeros_like(t)
        return torch.autograd.grad(value, point, create_graph=t.requires_grad)[0]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _log_sigma_vp(log_alpha: Tensor) -> Tensor:
    return 0.5 * torch.log(-torch.expm1(2 * log_alpha))


class _LinearBeta(NoiseSchedule):
    r"""Common part of the schedules with :math:`\beta(t) = \beta_0 + (\beta_1 - \beta_0) t`."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        _check(
            0 < beta_min <= beta_max < math.inf,
            f"beta_min and beta_max must satisfy 0 < beta_min <= beta_max, got {beta_min} and {beta_max}",
        )
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.t_min, self.t_max = 1e-3, 1.0

    def options(self) -> dict[str, Any]:
        return {"beta_min": self.beta_min, "beta_max": self.beta_max}

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t

    def _time_of(self, q: Tensor) -> Tensor:
        # q = integral of beta = -2 log alpha; the stable root of the quadratic.
        slope = self.beta_max - self.beta_min
        return 2 * q / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * q))


class VPLinear(_LinearBeta):
    r"""Variance preserving with linear :math:`\beta`, continuous time in [1e-3, 1].

    .. math:: \alpha^2 = e^{-\frac12 (\beta_1 - \beta_0) t^2 - \beta_0 t}, \qquad \sigma^2 = 1 - \alpha^2

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456
    """

    name = "vp-linear"
    suits = VP_SUITS

    def log_sigma(self, t: Tensor) -> Tensor:
        return _log_sigma_vp(self.log_alpha(t))

    def log_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha, _log_sigma_vp(log_alpha)

    def time(self, lam: Tensor) -> Tensor:
        return self._time_of(softplus(-2 * lam))


class SubVP(_LinearBeta):
    r"""Sub-variance preserving: the mean of :class:`VPLinear`, :math:`\sigma = 1 - \alpha^2`.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456
    """

    name = "sub-vp"
    suits = VP_SUITS

    def log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(-torch.expm1(2 * self.log_alpha(t)))

    def time(self, lam: Tensor) -> Tensor:
        # alpha solves (1 - alpha^2) / alpha = rho, and rho = e^-lam:
        # alpha = (sqrt(rho^2 + 4) - rho) / 2, so -log alpha = asinh(rho / 2).
        return self._time_of(2 * torch.asinh((-lam).exp() / 2))


class VPCosine(NoiseSchedule):
    r"""Variance preserving with a cosine, continuous time in [1e-3, 0.9946].

    .. math:: \alpha = \cos\theta, \quad \sigma = \sin\theta, \quad
        \theta = \frac{\pi}{2} \frac{t + s}{1 + s}

    Time stops at 0.9946, as in DPM-Solver: at 1 the state does not depend on the data.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021)
        | https://arxiv.org/abs/2102.09672
    """

    name = "vp-cosine"
    flow_coordinate = True
    suits = VP_SUITS

    def __init__(self, s: float = 0.008) -> None:
        _check(0 <= s < 1, f"s must be in [0, 1), got {s}")
        self.s = float(s)
        self.t_min, self.t_max = 1e-3, 0.9946

    def options(self) -> dict[str, Any]:
        return {"s": self.s}

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1 + self.s) * (math.pi / 2)

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log(torch.cos(self._angle(t)))

    def log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(torch.sin(self._angle(t)))

    def time(self, lam: Tensor) -> Tensor:
        return torch.atan((-lam).exp()) * (2 / math.pi) * (1 + self.s) - self.s


class VE(NoiseSchedule):
    r"""Variance exploding: :math:`\alpha = 1`, :math:`\sigma = \sigma_0 (\sigma_1 / \sigma_0)^t`, time in [1e-5, 1].

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021)
        | https://arxiv.org/abs/2011.13456
    """

    name = "ve"
    suits = dict.fromkeys(("quadratic", "power"), ("log-rho", {}))
    t_zero = -1.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        _check(
            0 < sigma_min < sigma_max < math.inf,
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}",
        )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.t_min, self.t_max = 1e-5, 1.0

    def options(self) -> dict[str, Any]:
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def log_sigma(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min)

    def time(self, lam: Tensor) -> Tensor:
        return (-lam - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDM(NoiseSchedule):
    r"""Time is the noise level: :math:`\alpha = 1`, :math:`\sigma = t`, time in [0.002, 80].

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022)
        | https://arxiv.org/abs/2206.00364
    """

    name = "edm"
    time_is_rho = True
    suits = dict.fromkeys(("uniform", "quadratic", "power"), EDM_SUITS)

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        _check(
            0 < sigma_min < sigma_max < math.inf,
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}",
        )
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    def options(self) -> dict[str, Any]:
        return {"sigma_min": self.t_min, "sigma_max": self.t_max}

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def time(self, lam: Tensor) -> Tensor:
        return (-lam).exp()


class VPSigma(NoiseSchedule):
    r"""Variance preserving, time is the ratio :math:`\rho = \sigma / \alpha`, in [0.002, 700].

    .. math:: \alpha = (1 + t^2)^{-1/2}, \qquad \sigma = t\, (1 + t^2)^{-1/2}

    The states of EDM, scaled as its networks see them: v-prediction at any noise level, as in Stable Video
    Diffusion.

    Arguments:
        sigma_min: The smallest ratio at which the network is trained well.
        sigma_max: The largest, where sampling starts.

    References:
        | Stable Video Diffusion (Blattmann et al., 2023)
        | https://arxiv.org/abs/2311.15127
    """

    name = "vp-sigma"
    time_is_rho = True
    suits = dict.fromkeys(("uniform", "quadratic", "power", "karras"), ("logistic", {}))

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 700.0) -> None:
        _check(
            0 < sigma_min < sigma_max < math.inf,
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}",
        )
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    def options(self) -> dict[str, Any]:
        return {"sigma_min": self.t_min, "sigma_max": self.t_max}

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log1p(t * t)

    def log_sigma(self, t: Tensor) -> Tensor:
        return t.log() - 0.5 * torch.log1p(t * t)

    def time(self, lam: Tensor) -> Tensor:
        return (-lam).exp()


class Flow(NoiseSchedule):
    r"""Rectified flow: :math:`\alpha = 1 - t`, :math:`\sigma = t`, time in [1e-3, 0.999].

    At exactly 1 the state does not depend on the data and :math:`\varepsilon`-solvers are undefined, so
    time starts at 0.999, where the data still enter the state with weight 0.001.

    Arguments:
        t_max: The largest time, below 1; pipelines of flow models start at 1 - 1e-6.

    References:
        | Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow (Liu et al., 2023)
        | https://arxiv.org/abs/2209.03003
        | Flow Matching for Generative Modeling (Lipman et al., 2023)
        | https://arxiv.org/abs/2210.02747
    """

    name = "flow"
    t_limit = 1.0
    flow_coordinate = True
    suits = dict.fromkeys(("quadratic", "power", "karras"), ("uniform", {}))

    def __init__(self, t_max: float = 0.999) -> None:
        _check(1e-3 < t_max < 1, f"t_max must be between 0.001 and 1, got {t_max}")
        self.t_min, self.t_max = 1e-3, float(t_max)

    def options(self) -> dict[str, Any]:
        return {} if self.t_max == 0.999 else {"t_max": self.t_max}

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


class Tabulated(NoiseSchedule):
    r"""Variance preserving, given at N training timesteps; time is the timestep, 0 to N - 1.

    Between two levels :math:`\lambda` is linear in the index, so that fractional times have an
    exact inverse and the ends of the table are met exactly.

    Arguments:
        alphas_cumprod: The cumulative products :math:`\alpha_n^2` of the levels, strictly
            decreasing, in (0, 1); or
        betas: the variances :math:`\beta_n` of the chain's steps, in (0, 1), of which
            :math:`\alpha_n^2 = \prod_{m \le n} (1 - \beta_m)`.
    """

    name = "tabulated"
    suits = VP_SUITS
    t_zero = -1.0
    discrete = True

    def __init__(
        self,
        alphas_cumprod: Sequence[float] | Tensor | None = None,
        betas: Sequence[float] | Tensor | None = None,
    ) -> None:
        if (alphas_cumprod is None) == (betas is None):
            raise ValueError(
                "a tabulated schedule is given by alphas_cumprod or by betas, "
                f"got {'neither' if betas is None else 'both'}"
            )
        for name, given in (("betas", betas), ("alphas_cumprod", alphas_cumprod)):
            if isinstance(given, str):
                raise TypeError(f"{name} must be a list of numbers, got {given!r:.40}")
        if betas is not None:
            steps = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
            _check(
                steps.ndim == 1 and steps.numel() >= 2,
                f"betas must be a list of at least 2 numbers, got shape {tuple(steps.shape)}",
            )
            _check(
                bool(((steps > 0) & (steps < 1)).all()),
                "betas must lie strictly between 0 and 1; "
                f"got values from {float(steps.min()):.4g} to {float(steps.max()):.4g}",
            )
            alphas_cumprod = _cumulative(steps)
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu().clone()
        _check(
            table.ndim == 1 and table.numel() >= 2,
            f"alphas_cumprod must be a list of at least 2 levels, got shape {tuple(table.shape)}",
        )
        _check(
            bool(table.isfinite().all()) and float(table.min()) > 0 and float(table.max()) < 1,
            "alphas_cumprod must lie strictly between 0 and 1; "
            f"got values from {float(table.min()):.4g} to {float(table.max()):.4g}",
        )
        _check(
            bool((table.diff() < 0).all()),
            "alphas_cumprod must decrease strictly (level 0 is the cleanest)",
        )
        with torch.inference_mode(False):  # a schedule outlives the mode in which it is made
            self._table = table.clone()
            self._lam = 0.5 * (self._table.log() - torch.log1p(-self._table))
        self._numbers: list[float] = self._lam.tolist()
        self._ascending = [-lam for lam in self._numbers]
        self.t_min, self.t_max = 0.0, float(table.numel() - 1)

    def options(self) -> dict[str, Any]:
        return {"alphas_cumprod": self._table.tolist()}

    @property
    def levels(self) -> int:
        """The number N of training timesteps."""
        return self._table.numel()

    @property
    def alphas_cumprod(self) -> Tensor:
        r"""The table :math:`\alpha_n^2`, shape (N,), float64."""
        return self._table

    def breakpoints(self) -> Tensor:
        return torch.arange(self.levels, dtype=torch.float64)

    def _lam_at(self, t: Tensor) -> Tensor:
        if isinstance(t, float):  # a number that stands for a tensor; see diffusion.scalars
            k = min(max(math.floor(t), 0), self.levels - 2)
            return self._numbers[k] + (t - k) * (self._numbers[k + 1] - self._numbers[k])
        table = self._lam.to(t)
        low = t.detach().floor().clamp(0, self.levels - 2).long()
        return table[low] + (t - low) * (table[low + 1] - table[low])

    def log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * logsigmoid(2 * self._lam_at(t))

    def log_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * logsigmoid(-2 * self._lam_at(t))

    def log_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        twice = 2 * self._lam_at(t)
        return 0.5 * logsigmoid(twice), 0.5 * logsigmoid(-twice)

    def time(self, lam: Tensor) -> Tensor:
        if isinstance(lam, float):
            k = min(max(bisect.bisect_right(self._ascending, -lam) - 1, 0), self.levels - 2)
            return k + (lam - self._numbers[k]) / (self._numbers[k + 1] - self._numbers[k])
        table = self._lam.to(lam)
        # lam decreases with the index; searchsorted wants an ascending table.
        low = torch.searchsorted(-table, -lam.detach().contiguous(), right=True) - 1
        low = low.clamp(0, self.levels - 2)
        return low + (lam - table[low]) / (table[low + 1] - table[low])


def _cumulative(betas: Tensor) -> Tensor:
    return torch.cumprod(1 - betas, dim=0)


class DDPMLinear(Tabulated):
    r"""The 1000 levels of DDPM: :math:`\beta` linear from 1e-4 to 0.02.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020)
        | https://arxiv.org/abs/2006.11239
    """

    name = "ddpm-linear"

    def __init__(
        self, beta_start: float = 1e-4, beta_end: float = 0.02, levels: int = 1000
    ) -> None:
        self._options = _beta_options(beta_start, beta_end, levels)
        super().__init__(
            _cumulative(torch.linspace(beta_start, beta_end, levels, dtype=torch.float64))
        )

    def options(self) -> dict[str, Any]:
        return dict(self._options)


class DDPMScaledLinear(Tabulated):
    r"""The 1000 levels of latent diffusion: :math:`\sqrt\beta` linear, 0.00085 to 0.012.

    References:
        | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022)
        | https://arxiv.org/abs/2112.10752
    """

    name = "ddpm-scaled-linear"

    def __init__(
        self, beta_start: float = 0.00085, beta_end: float = 0.012, levels: int = 1000
    ) -> None:
        self._options = _beta_options(beta_start, beta_end, levels)
        root = torch.linspace(beta_start**0.5, beta_end**0.5, levels, dtype=torch.float64)
        super().__init__(_cumulative(root.square()))

    def options(self) -> dict[str, Any]:
        return dict(self._options)


class DDPMCosine(Tabulated):
    r"""The 1000 levels of improved DDPM: a squared cosine, :math:`\beta \le 0.999`.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021)
        | https://arxiv.org/abs/2102.09672
    """

    name = "ddpm-cosine"
    flow_coordinate = True

    def __init__(self, s: float = 0.008, max_beta: float = 0.999, levels: int = 1000) -> None:
        _check(0 <= s < 1, f"s must be in [0, 1), got {s}")
        _check(0 < max_beta < 1, f"max_beta must be in (0, 1), got {max_beta}")
        _check_levels(levels)
        self._options = {"s": float(s), "max_beta": float(max_beta), "levels": int(levels)}
        edge = torch.arange(levels + 1, dtype=torch.float64) / levels
        curve = torch.cos((edge + s) / (1 + s) * (math.pi / 2)).square()
        super().__init__(_cumulative((1 - curve[1:] / curve[:-1]).clamp(max=max_beta)))

    def options(self) -> dict[str, Any]:
        return dict(self._options)


def _check_levels(levels: object) -> None:
    ok = isinstance(levels, int) and not isinstance(levels, bool) and 2 <= levels <= MOST_LEVELS
    _check(ok, f"levels must be an integer from 2 to {MOST_LEVELS}, got {levels!r:.40}")


def _beta_options(beta_start: float, beta_end: float, levels: int) -> dict[str, Any]:
    _check(
        0 < beta_start <= beta_end < 1,
        f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}",
    )
    _check_levels(levels)
    return {"beta_start": float(beta_start), "beta_end": float(beta_end), "levels": int(levels)}


SCHEDULES: Registry[Callable[..., NoiseSchedule]] = Registry(
    "schedule",
    {
        "vp-linear": VPLinear,
        "vp-cosine": VPCosine,
        "sub-vp": SubVP,
        "ve": VE,
        "edm": EDM,
        "vp-sigma": VPSigma,
        "flow": Flow,
        "ddpm-linear": DDPMLinear,
        "ddpm-scaled-linear": DDPMScaledLinear,
        "ddpm-cosine": DDPMCosine,
        "tabulated": Tabulated,
    },
    {"squaredcos_cap_v2": ("ddpm-cosine", {})},
    {
        "linear": "give betas: tabulated with betas=[...], or ddpm-linear with beta_start and beta_end",
        "scaled_linear": "give betas: ddpm-scaled-linear with beta_start and beta_end",
        "rectified-flow": "it is called flow",
    },
)


def schedule(name: str, **options: Any) -> NoiseSchedule:
    """Returns the noise schedule of that name.

    Arguments:
        name: One of :data:`SCHEDULES`.
        options: Its options, e.g. ``beta_max=20.0``.

    Raises:
        ValueError: If the name is unknown or an option is out of range.
        TypeError: If the schedule has no such option.

    Example:
        >>> schedule = fewstep.schedule("vp-linear", beta_max=10.0)
        >>> schedule.t_min, schedule.t_max
        (0.001, 1.0)
    """
    build = SCHEDULES[name]
    check_options(f"schedule {name!r}", build, options)
    check_numbers(f"schedule {name!r}", build, options)
    return build(**options)


def schedule_from_record(config: Mapping[str, Any]) -> NoiseSchedule:
    """Returns the schedule that :meth:`NoiseSchedule.to_record` described."""
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        raise ValueError(f"a schedule is an object with a 'name', got {config!r:.80}")
    options = {key: value for key, value in config.items() if key != "name"}
    try:
        return schedule(config["name"], **options)
    except (TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"the schedule {config['name']!r:.60} cannot be created: {error}"
        ) from None

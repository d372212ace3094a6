"""Networks in EDM's preconditioning as denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedules import EDM, NoiseSchedule
from fewstep.models.calling import NetworkCall, NetworkCaller
from fewstep.models.denoiser import Denoiser


class Preconditioned(NetworkCall):
    r"""The data that a raw network predicts, :math:`c_\text{skip} x + c_\text{out} F(c_\text{in} x, c_\text{noise})`.

    With :math:`s` the deviation of the data,

    .. math:: c_\text{skip} = \frac{s^2}{\sigma^2 + s^2}, \quad c_\text{out} = \pm \frac{\sigma s}{\sqrt{\sigma^2 + s^2}},
        \quad c_\text{in} = \frac{1}{\sqrt{\sigma^2 + s^2}}, \quad c_\text{noise} = \frac{\ln \sigma}{4}

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1
        | https://arxiv.org/abs/2206.00364

    Arguments:
        network: ``F(x, c_noise, **cond)`` with x (B, \*) and c_noise (B).
        sigma_data: The deviation s of the data.
        sign: The sign of :math:`c_\text{out}`; -1 for ``v_prediction`` in diffusers.
        to_noise: Maps :math:`\sigma` (B) to :math:`c_\text{noise}`; left out, as above.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        *,
        sigma_data: float = 0.5,
        sign: float = 1.0,
        to_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"sigma_data must be a positive number, got {sigma_data!r}")
        self.network, self.sigma_data, self.sign = network, float(sigma_data), float(sign)
        self.caller = NetworkCaller(network)
        self._to_noise = to_noise or (lambda sigma: sigma.log() / 4)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""Returns :math:`c_\text{skip}, c_\text{out}, c_\text{in}, c_\text{noise}` at noise levels, each (B)."""
        s = self.sigma_data
        size = (sigma.square() + s**2).sqrt()
        return (s / size).square(), self.sign * sigma * s / size, 1 / size, self._to_noise(sigma)

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        r"""Returns the predicted data, (B, \*), at states (B, \*) and noise levels (B)."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)

        def spread(c: Tensor) -> Tensor:
            return c.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)

        # The scales are applied in the state's precision, not the network's.
        value = self.caller(
            self.network,
            x * spread(c_in),
            c_noise,
            cond,
            prediction=Prediction.X0,
            training=True,
        )
        return x * spread(c_skip) + value * spread(c_out)


def preconditioned(
    network: Callable[..., Tensor],
    *,
    sigma_data: float = 0.5,
    sign: float = 1.0,
    to_noise: Callable[[Tensor], Tensor] | None = None,
    schedule: NoiseSchedule | None = None,
    **options: Any,
) -> Denoiser:
    r"""Returns the denoiser of a raw network that was trained with EDM's preconditioning.

    Arguments:
        network: ``F(x, c_noise, **cond)``.
        sigma_data: The deviation of the data that it was trained with.
        sign: The sign of :math:`c_\text{out}`; see :class:`Preconditioned`.
        to_noise: Maps :math:`\sigma` to :math:`c_\text{noise}`; left out, :math:`\ln(\sigma) / 4`.
        schedule: An EDM schedule with other ends than 0.002 and 80.
        options: Further arguments of :meth:`fewstep.Denoiser.wrap`, e.g. ``event_shape``.

    Raises:
        ValueError: If ``sigma_data`` is not positive, or the schedule is not EDM's.
    """
    schedule = EDM() if schedule is None else schedule
    if not isinstance(schedule, EDM):
        raise ValueError(
            f"EDM's preconditioning belongs to its schedule, got {schedule.name!r}; "
            "give fewstep.schedule('edm', sigma_min=..., sigma_max=...)"
        )
    inner = Preconditioned(network, sigma_data=sigma_data, sign=sign, to_noise=to_noise)
    return Denoiser.wrap(inner, schedule=schedule, prediction=Prediction.X0, **options)

r"""What a network predicts, and the exact affine maps between the five conventions.

With :math:`x = \alpha x_0 + \sigma \varepsilon`, each prediction is a combination
:math:`p \, x_0 + q \, \varepsilon`:

=========  ===============  ==============
name       p                q
=========  ===============  ==============
``x0``     1                0
``eps``    0                1
``v``      :math:`-\sigma`  :math:`\alpha`
``score``  0                :math:`-1 / \sigma`
``flow``   -1               1
=========  ===============  ==============
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from fewstep.base.registry import unknown


class Prediction(enum.StrEnum):
    """A prediction convention; the value is its name in options and files."""

    X0 = "x0"
    EPS = "eps"
    V = "v"
    SCORE = "score"
    FLOW = "flow"

    @classmethod
    def of(cls, name: str | Prediction) -> Prediction:
        """Returns the prediction of that name, or of diffusers' name for it.

        Raises:
            ValueError: If the name is unknown; the message has the nearest names.
        """
        try:
            return cls(DIFFUSERS.get(name, name))
        except (ValueError, TypeError):
            text = unknown("prediction", name, [p.value for p in cls], DIFFUSERS)
            names = ", ".join(f"{theirs} ({ours})" for theirs, ours in DIFFUSERS.items())
            raise ValueError(f"{text} diffusers' names are known too: {names}.") from None


DIFFUSERS = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
"""What diffusers calls the predictions (``prediction_type``)."""


def mixture(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns (p, q) of the table above: the prediction is :math:`p \, x_0 + q \, \varepsilon`."""
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match kind:
        case Prediction.X0:
            return one, zero
        case Prediction.EPS:
            return zero, one
        case Prediction.V:
            return -sigma, alpha
        case Prediction.SCORE:
            return zero, -1 / sigma
        case Prediction.FLOW:
            return -one, one


def coefficients(
    source: Prediction, target: Prediction, *, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`(a, b)` such that :math:`\text{target} = a \, x + b \, \text{source}`.

    The map is singular where information is missing: :math:`x_0 \to \varepsilon` at
    :math:`\sigma = 0`, and :math:`\varepsilon \to x_0` at :math:`\alpha = 0`.

    Arguments:
        source: What is known.
        target: What is wanted.
        alpha: The scale of the data, any shape.
        sigma: The scale of the noise, the same shape.
    """
    if source is target:
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    p, q = mixture(source, alpha, sigma)
    p_wanted, q_wanted = mixture(target, alpha, sigma)
    determinant = alpha * q - sigma * p
    a = (p_wanted * q - q_wanted * p) / determinant
    b = (alpha * q_wanted - sigma * p_wanted) / determinant
    return a, b


def convert(
    value: Tensor,
    x: Tensor,
    *,
    alpha: Tensor,
    sigma: Tensor,
    source: Prediction | str,
    target: Prediction | str,
) -> Tensor:
    r"""Returns a prediction in another convention.

    Arguments:
        value: The prediction, with shape (B, \*).
        x: The state at which it was made, with shape (B, \*).
        alpha: The scale of the data, shape () or (B).
        sigma: The scale of the noise, shape () or (B).
        source: The convention of ``value``.
        target: The convention wanted.
    """
    source, target = Prediction.of(source), Prediction.of(target)
    if source is target:
        return value
    a, b = coefficients(source, target, alpha=alpha, sigma=sigma)
    if a.ndim:
        a, b = (c.reshape(-1, *[1] * (x.ndim - 1)).to(x) for c in (a, b))
    return b * value + a * x

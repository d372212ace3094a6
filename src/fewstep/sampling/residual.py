r"""A spatial residual: tiny convolutions that correct the predictions of a plan of few evaluations."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from fewstep.base.files import read_tensors, sha256, write_tensors
from fewstep.diffusion.prediction import Prediction, coefficients
from fewstep.plans.plan import Plan

GAIN = 0.1
"""The scale of the correction, so that weights of order 1 change samples a little."""
INPUTS = 3
"""The images that a convolution reads: the state, the predicted data, and those of the evaluation before."""
SOFT = 4.0
"""Predicted data are bounded smoothly by this: at the noisy end they are far out of range."""
MOST_BYTES = 200_000
"""The largest file of a residual."""
NAMES = ("first", "first_bias", "last", "last_bias")


@dataclass(frozen=True, eq=False)
class Residual:
    r"""A correction of the predicted data at each of K evaluations, from state and predictions.

    .. math:: \hat x_0^k \mathrel{+}= 0.1 \, W_k' * \operatorname{silu}(W_k * u_k + b_k) + b_k', \qquad
        u_k = \left( \frac{y_k}{\sqrt{\alpha^2 + \sigma^2}}, \; s(\hat x_0^k), \; s(\hat x_0^{k-1}) \right)

    with :math:`s(x) = 4 \tanh(x / 4)`, convolutions 3 x 3, and zeros for the prediction before the first. The corrected
    prediction takes the place of the network's in all rows of the plan. What a plan alone can reach is the span
    of states and model outputs; this leaves it.

    Attributes:
        first: The weights W, shape (K, H, 3 C, 3, 3).
        first_bias: b, shape (K, H).
        last: The weights W', shape (K, C, H, 3, 3).
        last_bias: b', shape (K, C).
    """

    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(getattr(self, name).shape) for name in NAMES]
        k, c, h = (shapes[2] + (0, 0, 0))[:3]
        if shapes != [(k, h, INPUTS * c, 3, 3), (k, h), (k, c, h, 3, 3), (k, c)] or not k * c * h:
            raise ValueError(f"the tensors of a residual do not fit each other: {shapes}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Residual:
        return self

    @property
    def evaluations(self) -> int:
        """The number K of evaluations that it corrects."""
        return self.last.shape[0]

    @property
    def channels(self) -> int:
        """The channels C of a sample."""
        return self.last.shape[1]

    @property
    def bytes(self) -> int:
        """The size of its numbers in a file, in bytes."""
        return 4 * sum(getattr(self, name).numel() for name in NAMES)

    def detached(self) -> Residual:
        """Returns a copy in single precision, on the CPU, without gradients."""
        return Residual(*(getattr(self, n).detach().float().cpu().clone() for n in NAMES))

    def check(self, plan: Plan, shape: tuple[int, ...] | None) -> None:
        """Raises ``ValueError`` unless it fits a plan and the shape of a sample (``None``: not known)."""
        if plan.nfe != self.evaluations:
            raise ValueError(
                f"the residual corrects {self.evaluations} evaluations, the plan has {plan.nfe}"
            )
        if shape is not None and (len(shape) != INPUTS or shape[0] != self.channels):
            raise ValueError(
                f"the residual is for images of {self.channels} channels, the model's samples have "
                f"shape {tuple(shape)}"
            )

    def begin(self, prediction: Prediction, scales: Tensor) -> Correction:
        """Returns the correction of one run.

        Arguments:
            prediction: The prediction that the plan reads.
            scales: Alpha and sigma at the K evaluations, shape (K, 2).
        """
        return Correction(self, prediction, scales)

    # Files

    def tensors(self) -> dict[str, Tensor]:
        """Returns its tensors by name, in single precision."""
        return {name: getattr(self, name).detach().float().cpu() for name in NAMES}

    def digest(self) -> str:
        """Returns a checksum of its numbers."""
        total = hashlib.sha256()
        for name, tensor in self.tensors().items():
            total.update(f"{name} {tuple(tensor.shape)};".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def save(self, path: Path) -> dict[str, Any]:
        """Writes it as one safetensors file, atomically; returns its record for a recipe beside it."""
        write_tensors(path, self.tensors())
        return {"file": path.name, "sha256": sha256(path)}

    def to_record(self) -> dict[str, Any]:
        """Returns a record with the file itself, as text."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "residual.safetensors"
            record = self.save(path)
            data = base64.b64encode(path.read_bytes()).decode()
        return {"data": data, "sha256": record["sha256"]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path | None) -> Residual:
        """Returns the residual of a record.

        Arguments:
            record: With ``file`` and ``sha256``, or ``data`` and ``sha256``.
            folder: The folder of the recipe, or ``None`` for a recipe that is a text.

        Raises:
            ValueError: If its file is missing, damaged, or elsewhere than beside the recipe.
        """
        if set(record) not in ({"file", "sha256"}, {"data", "sha256"}):
            raise ValueError(f"a residual has a file or data, and sha256; got {sorted(record)}")
        if "data" in record:
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "residual.safetensors"
                try:
                    path.write_bytes(base64.b64decode(str(record["data"]), validate=True))
                except ValueError:
                    raise ValueError("the data of the residual are damaged") from None
                return cls._read(path, record)
        name = record["file"]
        if folder is None:
            raise ValueError(
                f"the recipe has a residual in the file {name!r} beside it; load the recipe by its path"
            )
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"the file of a residual is beside its recipe, got {name!r:.60}")
        return cls._read(folder / name, record)

    @classmethod
    def _read(cls, path: Path, record: Mapping[str, Any]) -> Residual:
        if not path.exists():
            raise ValueError(f"the residual {str(path)!r} is missing; it belongs to the recipe")
        if path.stat().st_size > 2 * MOST_BYTES or sha256(path) != record["sha256"]:
            raise ValueError(f"the residual {str(path)!r} is damaged, or of another recipe")
        tensors = read_tensors(path)
        try:
            return cls(*(tensors[name].float() for name in NAMES))
        except KeyError as error:
            raise ValueError(f"the residual {str(path)!r} has no tensor {error}") from None


class Correction:
    """The corrections of one run; it remembers the predicted data of the evaluation before."""

    def __init__(self, residual: Residual, prediction: Prediction, scales: Tensor) -> None:
        self.residual = residual
        alpha, sigma = scales[:, 0], scales[:, 1]
        self.shift, self.factor = coefficients(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
        self.size = (alpha.square() + sigma.square()).rsqrt()
        self.before: Tensor | None = None

    def __call__(self, k: int, x: Tensor, output: Tensor) -> Tensor:
        r"""Returns the corrected output of evaluation k at the state x (B, C, H, W)."""
        data = self.shift[k] * x + self.factor[k] * output
        before = torch.zeros_like(data) if self.before is None else _soft(self.before)
        inputs = torch.cat([self.size[k] * x, _soft(data), before], 1)
        residual = self.residual
        first, first_bias, last, last_bias = (getattr(residual, n)[k].to(data) for n in NAMES)
        hidden = silu(conv2d(inputs, first, first_bias, padding=1))
        change = GAIN * conv2d(hidden, last, last_bias, padding=1)
        self.before = data + change
        return output + change / self.factor[k]


def _soft(x: Tensor) -> Tensor:
    return SOFT * (x / SOFT).tanh()

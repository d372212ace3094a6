"""The settings of a search, with defaults that suit most models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fewstep.base.registry import unknown
from fewstep.learned.distances import Distance
from fewstep.metrics.kernel import Kernel

GRADIENTS = ("full", "cut")
OPTIMIZERS = ("adam", "cmaes")


@dataclass(frozen=True)
class Search:
    r"""Settings of a search. Numbers that are not given depend on the size of a sample.

    Attributes:
        pairs: The noises with a teacher's sample for training.
        heldout: The noises on which candidates are judged.
        test: The noises of the scores before and after, used once.
        teacher_nfe: The evaluations of the teacher.
        steps: The steps of each stage.
        batch_size: The samples of a step.
        optimizer: ``"adam"``, with gradients through all evaluations; or ``"cmaes"``, an evolution strategy
            that only compares candidates: for models without a gradient, or a reward that has none. A step is a
            generation, of 4 + 3 log(parameters) candidates.
        spread: The standard deviation of the first candidates of ``"cmaes"``, in each parameter.
        reward: For the objective ``reward``: a callable of samples (B, \*) that returns how good each is, (B).
        learning_rate: The largest rate of Adam, reached after the warm-up, then a cosine to 0. ``None``: 5e-3, halved
            until a first step of that size in every parameter raises the loss at most fourfold.
        warmup: The share of the steps during which the rate rises.
        clip: The largest norm of a gradient.
        ema: The decay of the moving average of the parameters, which is the candidate.
        evaluate_every: The steps between two judgements.
        patience: The judgements without a better one after which a stage ends.
        recall_drop: A candidate whose recall is lower than the start's by more than this share
            is rejected.
        microbatch: The samples in one network evaluation of a gradient; the gradient is that of
            the whole batch exactly.
        remat: Whether network evaluations are repeated in the backward pass: memory does not grow
            with their number, for up to half more time. ``None``: not on a CPU.
        gradient: ``"full"``, or ``"cut"``: model outputs count as constants.
        distance: The distance of ``endpoint``: ``"mse"``, ``"pseudo-huber"``, ``"features"`` or a
            callable (B, \*), (B, \*) to (B).
        kernel: The kernel of ``mmd``: ``"mixture"``, ``"cubic"``, ``"linear"``, ``"gaussian"`` or
            a callable.
        real_batch: The real samples in a step of ``mmd``.
        penalty: The weight of the gradient penalties of a discriminator.
        radius: The radius within which training noises may move to lower their distance (LD3), in
            the norm of a state. ``None``: not at all.
        sampling_batch: The batch size of sampling without gradients.
    """

    pairs: int | None = None
    heldout: int | None = None
    test: int | None = None
    teacher_nfe: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    optimizer: str = "adam"
    spread: float = 0.05
    reward: Callable[[Tensor], Tensor] | None = None
    learning_rate: float | None = None
    warmup: float = 0.02
    clip: float = 1.0
    ema: float = 0.99
    evaluate_every: int = 20
    patience: int = 6
    recall_drop: float = 0.05
    microbatch: int | None = None
    remat: bool | None = None
    gradient: str = "full"
    distance: str | Distance = "mse"
    kernel: str | Kernel = "mixture"
    real_batch: int = 1000
    penalty: float = 1.0
    radius: float | None = None
    sampling_batch: int = 64

    def __post_init__(self) -> None:
        for name in ("pairs", "heldout", "test", "teacher_nfe", "steps", "batch_size"):
            _positive(name, getattr(self, name), none=True)
        for name in ("evaluate_every", "patience", "real_batch", "sampling_batch"):
            _positive(name, getattr(self, name), none=False)
        _positive("microbatch", self.microbatch, none=True)
        for name in ("learning_rate", "clip", "penalty", "spread"):
            value = getattr(self, name)
            if name == "learning_rate" and value is None:
                continue
            if not (_number(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("warmup", "ema", "recall_drop"):
            value = getattr(self, name)
            if not (_number(value) and 0 <= value < 1):
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        if self.radius is not None and not (_number(self.radius) and self.radius > 0):
            raise ValueError(f"radius must be a positive number or None, got {self.radius!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(unknown("optimizer", self.optimizer, list(OPTIMIZERS)))
        if self.reward is not None and not callable(self.reward):
            raise TypeError(
                f"reward must be a callable of samples, got {type(self.reward).__name__}; it is given in Python"
            )
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be 'full' or 'cut', got {self.gradient!r}")

    @classmethod
    def of(cls, given: Search | Mapping[str, Any] | None) -> Search:
        """Returns the settings themselves, or those of a mapping with defaults for the rest.

        Raises:
            TypeError: If there is no setting of a name.
        """
        if isinstance(given, Search):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"search must be a Search or a mapping such as {{'steps': 300}}, got {given!r:.40}"
            )
        options = dict(given or {})
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"a search has no setting {name!r}; it has {', '.join(known)}")
        return cls(**options)

    def sizes(self, *, small: bool) -> tuple[int, int, int]:
        """Returns the numbers of pairs, of held-out noises and of test noises.

        Arguments:
            small: Whether samples are cheap (vectors).
        """
        defaults = (2048, 1000, 2000) if small else (512, 256, 1000)
        given = (self.pairs, self.heldout, self.test)
        return tuple(d if g is None else g for g, d in zip(given, defaults, strict=True))  # type: ignore[return-value]

    def to_record(self) -> dict[str, Any]:
        """Returns the settings as JSON values; callables by their names."""
        return {k: v if not callable(v) else _name(v) for k, v in _plain(self).items()}


def _plain(settings: Search) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in fields(settings)}


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(name: str, value: object, *, none: bool) -> None:
    if none and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")

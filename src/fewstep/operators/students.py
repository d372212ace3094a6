r"""What is trained: the recipe of a run, the frames it learns, and the student that suits them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewstep.base.registry import unknown
from fewstep.models.denoiser import Denoiser
from fewstep.operators.layout import OUTPUTS, Layout, well_posed_output
from fewstep.operators.losses import LOSSES, WEIGHTS
from fewstep.operators.operator import TrajectoryOperator
from fewstep.operators.temporal import BASES

MODES: dict[str, str] = {
    "dsno": "M frames, with temporal blocks",
    "folded": "M frames, without temporal blocks",
    "endpoint": "the sample alone, in one frame labelled with the noise level of the input",
    "same-parameters": "endpoint, with as many further parameters as dsno, but no time",
    "same-flops": "endpoint, made deeper until it costs as much as dsno",
}
"""The kinds of students, with a sentence about each."""

DEFAULT_FRAMES = 4


@dataclass(frozen=True)
class DistillRecipe:
    r"""Everything that determines a distillation, besides teacher and trajectories.

    The trajectories of step i depend on (seed, i) alone, so an interrupted run goes on exactly
    where it was. The learning rate rises during ``warmup`` steps, stays, and falls linearly to
    zero over the last ``decay`` share of the steps.

    Attributes:
        mode: The kind of student, a name in :data:`MODES`.
        times: The times of the frames, among those that are stored; or
        frames: their number M, spread evenly over the stored ones. The last is always the
            sample's. Left out, 4 (or all, if fewer are stored).
        modes: The modes J of temporal blocks.
        basis: ``"dft"``, ``"dct"`` or ``"dense"``.
        output: ``"convert"`` or ``"direct"``, see :class:`Layout`; ``"auto"`` takes the first
            where it is well posed (:func:`well_posed_output`).
        loss: ``"l1"``, ``"l2"``, ``"huber"``, ``"features"`` (:class:`FeatureDistance`), or
            ``"custom"``.
        features: The extractor that ``"features"`` looks with: an embedded name, a folder or a
            TorchScript file; left out, the model's own network (:class:`ModelFeatures`).
        weights: ``"snr"``, ``"uniform"``, or a number for each frame.
        lambda_max: The cap of ``"snr"``; at the published 10,000 the intermediate states are
            hardly learned.
        batch_size: The trajectories of a forward pass (of each process).
        accumulate: The forward passes of a step.
        ema: The decay of the moving average of the weights, which is what is stored.
        clip: The largest norm of the gradient; weights are scaled to a mean of 1 before.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        checkpointing: Whether activations are computed again in the backward pass.
        compile: Whether the student is compiled.
        heldout: The most trajectories that are kept for measuring; a tenth, if that is fewer.
    """

    mode: str = "dsno"
    times: list[float] | None = None
    frames: int | None = None
    modes: int = 2
    basis: str = "dft"
    output: str = "auto"
    loss: str = "l1"
    features: str | None = None
    weights: str | list[float] = "snr"
    lambda_max: float = 1e4
    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: int = 200
    decay: float = 0.3
    ema: float = 0.999
    clip: float = 1.0
    precision: str = "float32"
    checkpointing: bool = False
    compile: bool = False
    heldout: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(unknown("mode", self.mode, list(MODES)))
        if self.times is not None and self.frames is not None:
            raise ValueError("give times or frames, not both")
        for name, known in (
            ("basis", BASES),
            ("output", ("auto", *OUTPUTS)),
            ("loss", LOSSES),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), list(known)))
        if self.features is not None and self.loss != "features":
            raise ValueError(
                f"features are for the loss 'features', got the loss {self.loss!r} and "
                f"the features {self.features!r:.60}"
            )
        if isinstance(self.weights, str) and self.weights not in WEIGHTS:
            raise ValueError(unknown("weights", self.weights, list(WEIGHTS)))
        for name in ("steps", "batch_size", "accumulate", "modes", "frames", "heldout"):
            value = getattr(self, name)
            if name == "frames" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r:.40}")
        for name in ("decay", "ema"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r:.40}")
        for name in ("learning_rate", "clip", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} must be a number that is not negative, got {value!r:.40}"
                )

    def rate(self, step: int) -> float:
        """Returns the learning rate at a step."""
        falling = max(1, round(self.decay * self.steps))
        share = min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)
        return self.learning_rate * share

    @classmethod
    def from_json(cls, value: Any) -> DistillRecipe:
        """Returns the recipe that a JSON object describes; unknown keys are an error."""
        if not isinstance(value, Mapping):
            raise ValueError(f"a recipe of a distillation is a JSON object, got {value!r:.80}")
        if extra := sorted(set(value) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"a recipe of a distillation has no {extra[0]!r}; it has {known}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"the recipe of the distillation: {error}") from None


def select_frames(stored: Sequence[float], recipe: DistillRecipe) -> list[int]:
    """Returns the indices of the frames among the stored times, of which the first is the input's.

    Raises:
        ValueError: If a time is not stored, or fewer are than frames are wanted.
    """
    most = len(stored) - 1
    if most < 1:
        raise ValueError("the trajectories hold the initial states alone; record them with keep=")
    if recipe.times is not None:
        found = [_nearest(stored, t) for t in recipe.times]
        if found != sorted(set(found)):
            raise ValueError(f"times must decrease, got {recipe.times}")
    else:
        frames = recipe.frames or min(DEFAULT_FRAMES, most)
        if frames > most:
            raise ValueError(f"{frames} frames are wanted, but {most} states are stored")
        found = [round(k * most / frames) for k in range(1, frames + 1)]
    return found[-1:] if one_frame(recipe) else found


def one_frame(recipe: DistillRecipe) -> bool:
    """Whether the student gives the sample alone."""
    return recipe.mode not in ("dsno", "folded")


def _nearest(stored: Sequence[float], t: float) -> int:
    index = min(range(len(stored)), key=lambda i: abs(stored[i] - t))
    if not math.isclose(stored[index], t, rel_tol=1e-6, abs_tol=1e-9) or index == 0:
        told = ", ".join(f"{s:g}" for s in stored[1:])
        raise ValueError(f"the time {t:g} is not stored; the stored times are {told}")
    return index


def make_student(
    teacher: Denoiser,
    recipe: DistillRecipe,
    stored: Sequence[float],
    *,
    sites: Sequence[str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> TrajectoryOperator:
    """Returns the student of a recipe, as it is before training.

    Arguments:
        teacher: The model.
        recipe: What to make.
        stored: The stored times, the input's first.
        sites: The modules with a block behind; left out, those of a network that is known.
        example: Conditions of one sample, to call the network once.
    """
    indices = select_frames(stored, recipe)
    single = one_frame(recipe)
    times, start = tuple(float(stored[i]) for i in indices), float(stored[0])
    labels, output = "start" if single else "target", recipe.output
    if output == "auto":
        output = well_posed_output(teacher.schedule, teacher.native, times, start, labels)
    base = Layout(
        times=times,
        start=start,
        labels=labels,
        output=output,
        extra="temporal" if recipe.mode == "dsno" else "none",
        modes=recipe.modes,
        basis=recipe.basis,
        sites=None if sites is None else tuple(sites),
    )
    ready = dict(example or {})

    def build(**changes: Any) -> TrajectoryOperator:
        return TrajectoryOperator(teacher, replace(base, **changes), example=ready)

    if recipe.mode in ("dsno", "folded", "endpoint"):
        return build()
    frames = recipe.frames or (len(recipe.times) if recipe.times else DEFAULT_FRAMES)
    if recipe.mode == "same-parameters":
        # A matrix of channels squared has half a hidden width.
        return build(extra="pointwise", size=_matrices(recipe, frames) / 2)
    times = tuple(base.start * (1 - k / (frames + 1)) for k in range(1, frames + 1))
    goal = flops(build(extra="temporal", times=times), ready)
    one, two = (flops(build(extra="deeper", size=k), ready) for k in (1, 2))
    return build(extra="deeper", size=max(1, 1 + round((goal - one) / (two - one))))


def _matrices(recipe: DistillRecipe, frames: int) -> int:
    """Returns how many matrices a temporal block has."""
    if recipe.basis == "dense":
        return frames**2
    if recipe.basis == "dct":
        return min(recipe.modes, frames)
    kept = min(recipe.modes, frames // 2 + 1)
    return kept + min(kept - 1, (frames - 1) // 2)


def flops(operator: TrajectoryOperator, cond: Mapping[str, Any] | None = None) -> int:
    """Returns the floating-point operations of one evaluation for one sample (2 a multiplication).

    Convolutions, products of matrices and attention are counted, the rest is not.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = operator.model.event_shape
    if shape is None:
        raise ValueError("the shape of a sample is not known; Denoiser.wrap(..., event_shape=)")
    x = torch.zeros((1, *shape), device=next(operator.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        operator(x, **operator.model.prepare(1, dict(cond or {})))
    return counter.get_total_flops()

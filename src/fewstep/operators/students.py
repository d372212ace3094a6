r"""Students: the recipe of a distillation, the frames to learn, and the network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fewstep.base.registry import Registry, unknown
from fewstep.models.denoiser import Denoiser
from fewstep.operators.correctors import CORRECTORS
from fewstep.operators.flow_map import FlowMap, operator_of
from fewstep.operators.layout import (
    LABELS,
    OUTPUTS,
    SECOND_TIME,
    Layout,
    check_budgets,
    well_posed_output,
)
from fewstep.operators.losses import CUSTOM, LOSSES, WEIGHTS
from fewstep.operators.operator import Operator
from fewstep.operators.second_time import time_host
from fewstep.operators.temporal import BASES

DEFAULT_FRAMES = 4
DRAWN = (1, 4)
DEFAULT_BUDGETS = (1, 2, 4)
PAIRS = ("steps", "all")


@dataclass(frozen=True)
class DistillRecipe:
    r"""Everything that determines a distillation, besides teacher and trajectories.

    The trajectories of step i depend on (seed, i) alone, so an interrupted run is resumed exactly
    at its step. The learning rate rises during ``warmup`` steps, is constant, and falls linearly to
    zero over the last ``decay`` share of the steps.

    Attributes:
        mode: The kind of student, a name in :data:`STUDENTS`.
        times: The times of the frames, among the stored ones; or
        frames: their number M, spread evenly over the stored ones. The last is always the
            sample's. Left out, 4 (or all, if fewer are stored).
        drawn: The least and the most frames of a forward pass of a student of several frames: their number
            and times are drawn among the stored ones each time, so that the student works at other times
            too. ``"auto"``: 1 to 4, unless the basis is ``"dense"`` or each frame has its own weight;
            ``"fixed"``: always those of ``times`` or ``frames``, which in any case are the finished student's.
        budgets: The numbers of evaluations of a flow map. Its knots are the stored times (or ``times``).
        pairs: The pairs of knots that a flow map is trained on: ``"steps"``, those of its budgets: to the
            next knot, or, with fresh noise in between, to the last; or ``"all"``.
        initial: The folder of a finished student of the same layout, whose weights a run starts from instead
            of the teacher's.
        own_states: Of the steps of a flow map from a later knot, the share that starts from its own state there,
            not from the recorded one.
        consistency: Of the pairs of a flow map with a knot between, the share whose target is its own way through
            that knot, not the recorded state.
        corrector: A training signal for the samples of a flow map beside the recorded ones: a name in
            :data:`CORRECTORS`. It begins after the warmup, in which its own network is trained alone.
        corrector_weight: Its weight.
        corrector_rate: The learning rate of its own network, constant.
        modes: The modes J of temporal blocks.
        basis: ``"dft"``, ``"dct"`` or ``"dense"``.
        labels: The labels of the frames, see :class:`Layout`: ``"both"``, ``"target"`` (as published) or
            ``"start"``. ``"auto"``: ``"both"`` for students of several frames of a network whose time embedding is
            known, else ``"target"``; ``"start"`` for all others.
        output: ``"convert"`` or ``"direct"``, see :class:`Layout`; ``"auto"`` is the first
            where it is well posed (:func:`well_posed_output`).
        loss: A name in :data:`LOSSES` (``"l1"``, ``"l2"``, ``"huber"``, ``"features"``), or
            ``"custom"``.
        features: The feature extractor of ``"features"``: an embedded name, a folder or a
            TorchScript file; left out, the model's own network (:class:`ModelFeatures`).
        weights: ``"snr"``, ``"uniform"``, or a number for each frame.
        lambda_max: The cap of ``"snr"``; at the published 10,000 the intermediate states are
            hardly learned.
        batch_size: The trajectories of a forward pass (of each process).
        accumulate: The forward passes of a step.
        ema: The decay of the moving average of the weights; the average is the result.
        clip: The largest norm of the gradient; weights are scaled to a mean of 1 before.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        checkpointing: Whether activations are computed again in the backward pass, to save memory.
        compile: Whether the student is compiled.
        heldout: The most held-out trajectories for measurements; a tenth, if that is fewer.
        seed: The seed of the new layers and of the order of trajectories.
    """

    mode: str = "dsno"
    times: list[float] | None = None
    frames: int | None = None
    drawn: str | list[int] = "auto"
    budgets: list[int] | None = None
    pairs: str = "steps"
    initial: str | None = None
    own_states: float = 0.0
    consistency: float = 0.0
    corrector: str | None = None
    corrector_weight: float = 1.0
    corrector_rate: float = 2e-4
    modes: int = 2
    basis: str = "dft"
    labels: str = "auto"
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
        if self.mode not in STUDENTS:
            raise ValueError(unknown("mode", self.mode, list(STUDENTS)))
        if self.times is not None and self.frames is not None:
            raise ValueError("give times or frames, not both")
        for name, known in (
            ("basis", BASES),
            ("labels", ("auto", *LABELS)),
            ("output", ("auto", *OUTPUTS)),
            ("pairs", PAIRS),
            ("loss", (*LOSSES, CUSTOM)),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), list(known)))
        self._check_kind()
        with_features = [name for name, loss in LOSSES.items() if loss.takes_features]
        if self.features is not None and self.loss not in with_features:
            raise ValueError(
                f"features are for the loss {' or '.join(map(repr, with_features))}, got the loss {self.loss!r} and "
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
        for name in ("decay", "ema", "own_states", "consistency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r:.40}")
        for name in ("learning_rate", "clip", "warmup", "corrector_weight", "corrector_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} must be a number that is not negative, got {value!r:.40}"
                )

    def _check_kind(self) -> None:
        """Raises for settings that this kind of student does not have."""
        kind = STUDENTS[self.mode]
        if not kind.two_times:
            for name, value, default in (
                ("budgets", self.budgets, None),
                ("pairs", self.pairs, "steps"),
                ("own_states", self.own_states, 0),
                ("consistency", self.consistency, 0),
                ("corrector", self.corrector, None),
            ):
                if value != default:
                    raise ValueError(f"{name} are for the student flow-map, not for {self.mode}")
        elif self.labels != "auto":
            raise ValueError("labels are for students with frames; a flow map has its own")
        elif self.frames is not None:
            raise ValueError("a flow map has knots, not frames; give times, or leave both out")
        if self.corrector is not None:
            CORRECTORS[self.corrector]  # raises for an unknown name
        elif (self.corrector_weight, self.corrector_rate) != (1.0, 2e-4):
            raise ValueError(
                "corrector_weight and corrector_rate are for a corrector; name one: "
                f"corrector={' or '.join(map(repr, CORRECTORS))}"
            )
        if self.initial is not None and not isinstance(self.initial, str):
            raise ValueError(f"initial is the folder of a student, got {self.initial!r:.40}")
        if self.labels == ("both" if kind.one_frame else "start"):
            raise ValueError(
                "of students of one frame labels are start or target"
                if kind.one_frame
                else "frames that all have the label start are the same; labels are both or target"
            )
        if self.budgets is not None:
            check_budgets(self.budgets, 4096)
        if self.drawn in ("auto", "fixed"):
            return
        whole = isinstance(self.drawn, (list, tuple)) and all(type(n) is int for n in self.drawn)
        if not whole or len(self.drawn) != 2 or not 1 <= int(self.drawn[0]) <= int(self.drawn[1]):
            raise ValueError(
                f"drawn is auto, fixed, or the least and the most frames, got {self.drawn!r:.40}"
            )
        if kind.one_frame or kind.two_times:
            raise ValueError(f"drawn is for students of several frames, not for {self.mode}")
        if self.basis == "dense":
            raise ValueError(
                "the basis dense has a fixed number of frames; use dft or dct with drawn"
            )
        if not isinstance(self.weights, str):
            raise ValueError(
                "with drawn frames weights are snr or uniform, not one for each frame"
            )

    @property
    def frame_counts(self) -> tuple[int, int] | None:
        """The least and the most frames that are drawn, or ``None`` if frames are fixed."""
        if self.drawn != "auto":
            return None if isinstance(self.drawn, str) else (self.drawn[0], self.drawn[1])
        kind = STUDENTS[self.mode]
        varies = not kind.one_frame and not kind.two_times and self.basis != "dense"
        return DRAWN if varies and isinstance(self.weights, str) else None

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
        ValueError: If a time is not stored, or fewer times are stored than there are frames.
    """
    most = len(stored) - 1
    if most < 1:
        raise ValueError("the trajectories have the initial states alone; record them with keep=")
    if recipe.times is not None:
        indices = [_nearest(stored, t) for t in recipe.times]
        if indices != sorted(set(indices)):
            raise ValueError(f"times must decrease, got {recipe.times}")
    elif STUDENTS[recipe.mode].two_times:
        indices = list(range(1, most + 1))
    else:
        frames = recipe.frames or min(DEFAULT_FRAMES, most)
        if frames > most:
            raise ValueError(f"{frames} frames are requested, but {most} states are stored")
        indices = [round(k * most / frames) for k in range(1, frames + 1)]
    return indices[-1:] if STUDENTS[recipe.mode].one_frame else indices


def _nearest(stored: Sequence[float], t: float) -> int:
    index = min(range(len(stored)), key=lambda i: abs(stored[i] - t))
    if not math.isclose(stored[index], t, rel_tol=1e-6, abs_tol=1e-9) or index == 0:
        known = ", ".join(f"{s:g}" for s in stored[1:])
        raise ValueError(f"the time {t:g} is not stored; the stored times are {known}")
    return index


def make_student(
    teacher: Denoiser,
    recipe: DistillRecipe,
    stored: Sequence[float],
    *,
    sites: Sequence[str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Operator:
    """Returns the student of a recipe before training.

    Arguments:
        teacher: The model.
        recipe: The recipe.
        stored: The stored times, the input's first.
        sites: The modules after which blocks are inserted; left out, the known sites.
        example: Conditions of one sample, to evaluate the network once.
    """
    indices = select_frames(stored, recipe)
    kind = STUDENTS[recipe.mode]
    single = kind.one_frame
    times, start = tuple(float(stored[i]) for i in indices), float(stored[0])
    labels, output = recipe.labels, recipe.output
    if labels == "auto" and (single or kind.two_times):
        labels = "start"
    elif labels == "auto":
        labels = "target" if time_host(teacher) is None else "both"
    if output == "auto":
        # A flow map's labels are the times of its inputs.
        at, own = ((start, *times[:-1]), "target") if kind.two_times else (times, labels)
        output = well_posed_output(teacher.schedule, teacher.native, at, start, own)
    base = Layout(
        times=times,
        start=start,
        labels=labels,
        output=output,
        extra="none",
        modes=recipe.modes,
        basis=recipe.basis,
        sites=None if sites is None else tuple(sites),
    )
    return kind.build(Blueprint(teacher, recipe, base, dict(example or {})))


@dataclass(frozen=True)
class Blueprint:
    """The arguments from which a student is built.

    Attributes:
        teacher: The model.
        recipe: The recipe.
        layout: The layout of the student without blocks.
        example: Conditions of one sample, to evaluate the network once.
    """

    teacher: Denoiser
    recipe: DistillRecipe
    layout: Layout
    example: Mapping[str, Any]

    @property
    def frames(self) -> int:
        """The number of frames of the recipe, also where the student has one."""
        recipe = self.recipe
        return recipe.frames or (len(recipe.times) if recipe.times else DEFAULT_FRAMES)

    def operator(self, **changes: Any) -> Operator:
        """Returns the operator of the layout with changes."""
        layout = replace(self.layout, **changes)
        return operator_of(self.teacher, layout, example=dict(self.example))

    def cost(self, **changes: Any) -> int:
        """Returns the floating-point operations of one evaluation of that operator."""
        return flops(self.operator(**changes), self.example)


class Student(ABC):
    """A kind of student; a line in :data:`STUDENTS` registers it for recipes and the command line.

    Attributes:
        about: A sentence about it.
        one_frame: Whether it returns the sample alone, in one frame with the label of its input.
        two_times: Whether it is a flow map: conditioned on two times, trained on pairs of states.
    """

    about: ClassVar[str]
    one_frame: ClassVar[bool] = True
    two_times: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def build(blueprint: Blueprint) -> Operator:
        """Returns the student before training."""


class DSNO(Student):
    """The whole trajectory, with temporal blocks."""

    about = "M frames, with temporal blocks"
    one_frame = False

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        return blueprint.operator(extra="temporal")


class Folded(Student):
    """The whole trajectory, each frame independently."""

    about = "M frames, without temporal blocks"
    one_frame = False

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        return blueprint.operator()


class Endpoint(Student):
    """The sample alone."""

    about = "the sample alone, in one frame labelled with the noise level of the input"

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        return blueprint.operator()


class SameParameters(Student):
    """A control: the sample alone, with the parameters of temporal blocks."""

    about = "endpoint, with as many extra parameters as dsno, but without time"

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        # A matrix of channels squared corresponds to half a hidden channel width.
        size = _matrices(blueprint.recipe, blueprint.frames) / 2
        return blueprint.operator(extra="pointwise", size=size)


class SameFlops(Student):
    """A control: the sample alone, at the cost of the whole trajectory."""

    about = "endpoint, deepened until it costs as much as dsno"

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        frames, start = blueprint.frames, blueprint.layout.start
        times = tuple(start * (1 - k / (frames + 1)) for k in range(1, frames + 1))
        goal = blueprint.cost(extra="temporal", times=times)
        one, two = (blueprint.cost(extra="deeper", size=k) for k in (1, 2))
        size = max(1, 1 + round((goal - one) / (two - one)))
        return blueprint.operator(extra="deeper", size=size)


class FlowMapStudent(Student):
    """A flow map: from any knot to any later one, with one, two, four evaluations."""

    about = "a flow map, conditioned on two times: 1, 2 or 4 evaluations with one network"
    one_frame = False
    two_times = True

    @staticmethod
    def build(blueprint: Blueprint) -> Operator:
        intervals = len(blueprint.layout.times)
        budgets = blueprint.recipe.budgets
        if budgets is None:
            budgets = [n for n in DEFAULT_BUDGETS if n <= intervals]
        return blueprint.operator(extra=SECOND_TIME, budgets=tuple(budgets))


STUDENTS: Registry[type[Student]] = Registry(
    "mode",
    {
        "dsno": DSNO,
        "folded": Folded,
        "endpoint": Endpoint,
        "same-parameters": SameParameters,
        "same-flops": SameFlops,
        "flow-map": FlowMapStudent,
    },
)
"""The kinds of students by name. A new one is a subclass of :class:`Student` and a line here."""


def _matrices(recipe: DistillRecipe, frames: int) -> int:
    """Returns the number of matrices of a temporal block."""
    if recipe.basis == "dense":
        return frames**2
    if recipe.basis == "dct":
        return min(recipe.modes, frames)
    modes = min(recipe.modes, frames // 2 + 1)
    return modes + min(modes - 1, (frames - 1) // 2)


def flops(operator: Operator, cond: Mapping[str, Any] | None = None) -> int:
    """Returns the floating-point operations of one evaluation for one sample (2 a multiplication).

    Of an operator of M frames one evaluation is that of all frames.

    Only convolutions, matrix products and attention are counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shape = operator.model.event_shape
    if shape is None:
        raise ValueError("the shape of a sample is not known; Denoiser.wrap(..., event_shape=)")
    x = torch.zeros((1, *shape), device=next(operator.parameters()).device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        ready = operator.model.prepare(1, dict(cond or {}))
        if isinstance(operator, FlowMap):
            operator.step(x, 0, 1, **ready)
        else:
            operator(x, **ready)
    return counter.get_total_flops()

"""The events of a run of the studio, in the order in which they happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.plans.plan import Plan
from fewstep.sampling.profile import Profile
from fewstep.studio.models import ModelInfo
from fewstep.studio.settings import Reproduction


@dataclass(frozen=True)
class ModelLoaded:
    """A model is in memory."""

    info: ModelInfo


@dataclass(frozen=True)
class Planned:
    """A sampler was resolved; nothing was evaluated yet.

    Attributes:
        index: The number of the sampler in the request.
        title: Its name and budget.
        nfe: The number of network evaluations, ``None`` if it is not known beforehand.
        chosen: What ``auto`` chose, or ``None``.
        plan: Its plan, or ``None`` if it has none beforehand.
        recipe: Its recipe as JSON text.
        reproduction: The Python and the command that make the same samples.
        stochastic: Whether it draws noise, so that its samples are not near the reference's.
    """

    index: int
    title: str
    nfe: int | None
    chosen: str | None
    plan: Plan | None
    recipe: str
    reproduction: Reproduction
    stochastic: bool


@dataclass(frozen=True)
class Stage:
    """A stage began: its name, its number of units if known."""

    name: str
    total: int | None


@dataclass(frozen=True)
class Progressed:
    """So many units of the stage are done."""

    done: int


@dataclass(frozen=True)
class Referenced:
    """The model's own many-step solution for some conditions.

    Attributes:
        indices: The samplers that are compared with it.
        samples: The samples, (n, *).
        picture: They as PNG.
        nfe: Its number of evaluations.
    """

    indices: tuple[int, ...]
    samples: Tensor
    picture: bytes
    nfe: int


@dataclass(frozen=True)
class Frame:
    """The state of a sampler at a network evaluation, or its sample after the last.

    Attributes:
        index: The number of the sampler.
        evaluation: The number of the evaluation, from 1; of the sample the last one's.
        t: The time of the state.
        seconds: The seconds in the network so far.
        distance: The RMS distance of the predicted data (of the sample, at the end) to the reference,
            or ``None`` without one.
        state: The state as PNG, in the scale of data: divided by the root of α² + σ².
        predicted: The data predicted by the network as PNG, or ``None`` if there is no prediction.
        last: Whether it is the sample.
    """

    index: int
    evaluation: int
    t: float
    seconds: float
    distance: float | None
    state: bytes
    predicted: bytes | None
    last: bool = False


@dataclass(frozen=True)
class Sampled:
    """A sampler is done: its samples, (n, *)."""

    index: int
    samples: Tensor
    nfe: float


@dataclass(frozen=True)
class PlansDrawn:
    """The plans of the samplers as SVG: times on the axis of noise, coefficients."""

    figure: str


@dataclass(frozen=True)
class Measured:
    """A model was measured.

    Attributes:
        profile: Its profile.
        rows: For each budget and sampler the error: ``(name, nfe, RMS distance)``.
        figure: The errors against NFE as SVG.
        skipped: The peers that do not fit the model, each with the reason.
        reproduction: The Python and the command that measure the same.
    """

    profile: Profile
    rows: tuple[tuple[str, int, float], ...]
    figure: str
    skipped: tuple[str, ...]
    reproduction: Reproduction


@dataclass(frozen=True)
class Failed:
    """The run cannot go on, or one sampler of it.

    Attributes:
        message: The reason, as the library words it.
        index: The number of the sampler, or ``None`` for the whole run.
    """

    message: str
    index: int | None = None


@dataclass(frozen=True)
class Ended:
    """The run is over; ``cancelled`` if by its user."""

    cancelled: bool = False


Event = Any
"""One of the classes above."""

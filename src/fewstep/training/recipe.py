r"""The settings of a training run: :class:`TrainRecipe`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.training.data import ImageData

PREDICTIONS = ("eps", "x0", "v", "flow")
"""What a network can be trained to predict; a score is eps with another sign and scale."""

PRECONDITIONED = ("edm", "ve")
"""The schedules with alpha = 1, which EDM's preconditioning is made for."""

DEFAULT_STEPS = 4000
DEFAULT_BATCH = 64


@dataclass(frozen=True)
class TrainRecipe:
    r"""Everything that determines a training run, besides the images.

    Batch, times and noise of step i depend on (seed, i) alone, so an interrupted run is resumed
    exactly where it was. The learning rate rises during ``warmup`` steps, is constant, and falls
    linearly to zero over the last ``decay`` share of the steps; a run can therefore be extended
    as long as the rate has not begun to fall.

    Attributes:
        network: The options of :class:`fewstep.models.networks.unet.SmallUNet`. Classes are those
            of the data if ``num_classes`` is left out; ``null`` trains an unconditional network.
        schedule: The noise schedule, as :meth:`NoiseSchedule.to_record` writes it.
        prediction: ``"eps"``, ``"x0"``, ``"v"`` or ``"flow"``; the variable of the loss, see
            :func:`fewstep.training.train.train`.
        preconditioning: ``"edm"`` trains the raw network of EDM's preconditioning
            (:class:`fewstep.models.preconditioning.Preconditioned`); it needs a schedule with
            :math:`\alpha = 1` (``edm``, ``ve``) and predicts ``"x0"``.
        sigma_data: The deviation s of the data in EDM's preconditioning; left out, it is measured.
        label_dropout: The share of labels replaced by the null label, so that
            classifier-free guidance works.
        uniform_times: The share of times drawn uniformly; the others follow ``density``.
        density: ``"cosine"``: the density that a cosine schedule has in :math:`\lambda`, which is
            where images are made; or ``"log-normal"``: :math:`\ln (\sigma / \alpha)` normal with
            mean -1.2 and deviation 1.2, EDM's.
        flip: Whether images are mirrored left to right with probability 1/2.
        range: The values of black and white, [-1, 1] if left out.
        cycles: The steps at which the rate has fallen to zero and a new cycle begins: a
            finished run is extended by adding its ``steps`` here and raising ``steps``.
        later_peak: The share of the learning rate to which later cycles rise.
        ema: The decay of the moving average of the weights, which is what is stored.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        size: The height and width to which images are cropped and resized.
    """

    network: dict[str, Any]
    schedule: dict[str, Any]
    prediction: str = "v"
    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.3
    weight_decay: float = 0.01
    label_dropout: float = 0.1
    uniform_times: float = 0.5
    cycles: list[int] = field(default_factory=list)
    later_peak: float = 0.5
    ema: float = 0.999
    clip: float = 1.0
    precision: str = "bfloat16"
    compile: bool = False
    seed: int = 0
    size: int | None = None
    preconditioning: str | None = None
    sigma_data: float | None = None
    density: str = "cosine"
    flip: bool = False
    range: list[float] = field(default_factory=lambda: [-1.0, 1.0])

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, known in (
            ("prediction", PREDICTIONS),
            ("precision", ("float32", "bfloat16")),
            ("preconditioning", (None, "edm")),
            ("density", ("cosine", "log-normal")),
            ("flip", (True, False)),
            ("compile", (True, False)),
        ):
            value = getattr(self, name)
            if value not in known:
                texts = [repr(k) for k in known]
                raise ValueError(
                    f"{name} must be {', '.join(texts[:-1])} or {texts[-1]}, got {value!r:.60}"
                )
        if not isinstance(self.cycles, list) or not all(
            isinstance(end, int) and 0 < end < self.steps for end in self.cycles
        ):
            raise ValueError(f"cycles must be steps below {self.steps}, got {self.cycles!r:.60}")
        if sorted(set(self.cycles)) != self.cycles:
            raise ValueError(f"cycles must increase, got {self.cycles!r:.60}")
        for name in ("decay", "label_dropout", "uniform_times", "ema", "later_peak"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
        for name in ("learning_rate", "weight_decay", "clip", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, got {value!r}")
        if not isinstance(self.network, dict) or not isinstance(self.schedule, dict):
            raise ValueError("network and schedule of a training recipe are JSON objects")
        self._check_range()
        self._check_preconditioning()

    def _check_range(self) -> None:
        ends = self.range
        if (
            not isinstance(ends, (list, tuple))
            or len(ends) != 2
            or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in ends)
            or not -math.inf < ends[0] < ends[1] < math.inf
        ):
            raise ValueError(
                f"range must be two finite numbers, low below high, for example [-0.5, 0.5]; got {ends!r:.60}"
            )
        object.__setattr__(self, "range", [float(v) for v in ends])

    def _check_preconditioning(self) -> None:
        if self.preconditioning is None:
            if self.sigma_data is not None:
                raise ValueError(
                    f"sigma_data belongs to preconditioning 'edm', got {self.sigma_data!r} without it"
                )
            return
        if self.prediction != "x0":
            raise ValueError(
                "a network in EDM's preconditioning predicts 'x0'; "
                f"got prediction {self.prediction!r}: give 'x0', or no preconditioning"
            )
        if self.schedule.get("name") not in PRECONDITIONED:
            raise ValueError(
                "EDM's preconditioning needs the schedule 'edm' or 've', "
                f"got {self.schedule.get('name')!r}"
            )
        s = self.sigma_data
        if s is not None and (
            isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 < s < math.inf
        ):
            raise ValueError(f"sigma_data must be a positive number, got {s!r}")

    @classmethod
    def from_record(cls, value: Any) -> TrainRecipe:
        """Returns the recipe that a JSON object describes; unknown keys are an error."""
        if not isinstance(value, dict):
            raise ValueError(f"a training recipe is a JSON object, got {value!r:.80}")
        unknown = sorted(set(value) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"a training recipe has no {unknown[0]!r}; it has {known}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(f"the training recipe is not complete: {error}") from None

    def to_record(self) -> dict[str, Any]:
        """Returns the JSON object that :meth:`from_record` reads."""
        return asdict(self)

    def noise_schedule(self) -> NoiseSchedule:
        """Returns the noise schedule."""
        return schedule_from_record(self.schedule)

    def rate(self, step: int) -> float:
        """Returns the share of the learning rate at a step."""
        ends = [*self.cycles, self.steps]
        cycle = next(i for i, end in enumerate(ends) if step < end or end == self.steps)
        start, end, peak = [0, *ends][cycle], ends[cycle], self.later_peak if cycle else 1.0
        falling = max(1, round(self.decay * (end - start)))
        return peak * min(1.0, (step - start + 1) / max(1, self.warmup), (end - step) / falling)

    def continues_as(self, other: TrainRecipe, step: int) -> bool:
        """Returns whether a run of this recipe up to a step is also one of the other recipe.

        The length may differ, as long as the finished steps had the same learning rates.
        """
        varies = {"steps": 0, "cycles": [], "later_peak": 0.0, "compile": False}
        same = self.to_record() | varies == other.to_record() | varies
        return same and all(math.isclose(self.rate(k), other.rate(k)) for k in range(step))


def default_recipe(data: ImageData, *, device: str) -> TrainRecipe:
    """Returns a recipe that suits the images: a small U-Net, v-prediction, ddpm-linear."""
    _, height, width = data.event_shape
    patch = 2 if height % 2 == 0 and width % 2 == 0 and min(height, width) >= 16 else 1
    inside = min(height, width) // patch
    # One level for each halving down to about 8 pixels, at least 2, with attention on the last.
    levels = 2 if inside < 32 else 3
    network: dict[str, Any] = {
        "channels": [64, 128, 128][:levels],
        "blocks": [2] * levels,
        "attention": [levels - 1],
        "patch": patch,
        "num_classes": data.num_classes,
    }
    # Without hardware for it, bfloat16 is slower than float32 on a CPU.
    precision = "float32" if device.startswith("cpu") else "bfloat16"
    return TrainRecipe(
        network=network,
        schedule={"name": "ddpm-linear"},
        steps=DEFAULT_STEPS,
        batch_size=min(DEFAULT_BATCH, len(data)),
        precision=precision,
    )


def with_schedule(
    recipe: TrainRecipe, schedule: dict[str, Any], *, prediction: str | None = None
) -> TrainRecipe:
    """Returns a recipe for another noise schedule, with its usual prediction and preconditioning.

    ``edm`` and ``ve`` get EDM's preconditioning and density of noise levels, unless another
    prediction than ``"x0"`` is given; ``flow`` predicts ``"flow"`` with uniform times.

    Arguments:
        recipe: The recipe.
        schedule: The schedule, as :meth:`NoiseSchedule.to_record` writes it.
        prediction: The prediction; left out, the usual one, or else the recipe's.

    Raises:
        ValueError: If there is no such schedule or prediction.
    """
    name = schedule_from_record(schedule).name
    changes: dict[str, Any] = {"schedule": schedule, "preconditioning": None, "sigma_data": None}
    if name in PRECONDITIONED and prediction in (None, "x0"):
        changes |= {"prediction": "x0", "preconditioning": "edm"}
        changes |= {"uniform_times": 0.0, "density": "log-normal"}
    elif name == "flow" and prediction is None:
        changes |= {"prediction": "flow", "uniform_times": 1.0}
    elif prediction is not None:
        changes["prediction"] = prediction
    return replace(recipe, **changes)

r"""Training of a small diffusion model on the user's images: ``fewstep train``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedules import NoiseSchedule, schedule_from_record
from fewstep.models.networks.unet import SmallUNet, lay_out
from fewstep.training.checkpoints import (
    generator,
    load_checkpoint,
    new_average,
    read_checkpoint,
    save_checkpoint,
    update_average,
)
from fewstep.training.data import ImageData


@dataclass(frozen=True)
class TrainRecipe:
    r"""Everything that determines a training run, besides the images.

    Batch, times and noise of step i depend on (seed, i) alone, so an interrupted run goes on
    exactly where it was. The learning rate rises during ``warmup`` steps, stays, and falls
    linearly to zero over the last ``decay`` share of the steps; a run can therefore be made
    longer as long as it has not begun to fall.

    Attributes:
        network: The options of :class:`fewstep.models.networks.unet.SmallUNet`.
        schedule: The noise schedule, as :meth:`NoiseSchedule.to_record` writes it.
        prediction: ``"v"`` or ``"eps"``.
        label_dropout: The share of labels replaced by the null label, so that
            classifier-free guidance works.
        uniform_times: The share of times drawn uniformly; the others follow the density that
            a cosine schedule has in :math:`\lambda`, which is where images are made.
        cycles: The steps at which the rate has fallen to zero and a new cycle begins: a run that
            is finished is made longer by writing its ``steps`` here and giving more.
        later_peak: The share of the learning rate to which later cycles rise.
        ema: The decay of the moving average of the weights, which is what is stored.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be 'eps' or 'v', got {self.prediction!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
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

    @classmethod
    def from_json(cls, value: Any) -> TrainRecipe:
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


@dataclass(frozen=True)
class TrainEvent:
    """What is told after a step: its number, the number of steps, the smoothed loss."""

    step: int
    steps: int
    loss: float


def train(
    data: ImageData,
    out: str | Path,
    recipe: TrainRecipe,
    *,
    device: str | torch.device = "cpu",
    checkpoint_every: int = 250,
    on_step: Callable[[TrainEvent], None] | None = None,
) -> Path:
    r"""Trains a small diffusion model and writes it as a folder that :func:`fewstep.load` reads.

    The loss is the mean square of the error in the recipe's prediction,

    .. math:: E \, \| f_\theta(\alpha_t x_0 + \sigma_t \varepsilon, t) - v_t \|^2, \qquad
        v_t = \alpha_t \varepsilon - \sigma_t x_0

    References:
        | Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), appendix D
        | https://arxiv.org/abs/2202.00512

    Arguments:
        data: The images, and labels if the network has classes.
        out: The folder to write; if it holds a checkpoint of the same recipe, the run goes on.
        recipe: What to train, how long, with which seed.
        device: Where.
        checkpoint_every: The steps between two checkpoints.
        on_step: Called after each step.

    Raises:
        ValueError: If recipe and data do not fit, or the folder has a run of another recipe.
    """
    out = Path(out)
    noise_schedule = schedule_from_record(recipe.schedule)
    options = {"in_channels": data.event_shape[0], "num_classes": data.num_classes}
    options |= recipe.network
    if options["in_channels"] != data.event_shape[0]:
        raise ValueError(
            f"the network has {options['in_channels']} channels, the images have {data.event_shape[0]}"
        )
    patch = options.get("patch", 1)
    if not isinstance(patch, int) or patch < 1:
        raise ValueError(f"patch must be a positive integer, got {patch!r}")
    if data.event_shape[1] % patch or data.event_shape[2] % patch:
        raise ValueError(f"patch {patch} does not divide images of shape {data.event_shape}")
    options.setdefault("time_scale", 1000.0 / (noise_schedule.t_max - noise_schedule.t_min))

    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it is
        torch.manual_seed(recipe.seed)
        try:
            network = SmallUNet(**options).to(device)
        except TypeError as error:
            raise ValueError(f"the network of the training recipe: {error}") from None
    classes = network.num_classes
    if classes is not None and (data.num_classes is None or data.num_classes > classes):
        raise ValueError(
            f"the network has {classes} classes, the images have {data.num_classes or 'none'}"
        )
    if torch.device(device).type == "cpu":
        lay_out(network)
    average = new_average(network)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
    )
    start, loss_mean = _restore(out, recipe, network, average, optimizer)
    call = torch.compile(network) if recipe.compile else network

    for step in range(start, recipe.steps):
        batch = _batch(data, noise_schedule, recipe, step, null=classes)
        x, t, target, labels = (None if b is None else b.to(device) for b in batch)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, recipe)
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
        ):
            predicted = call(x, t, labels) if labels is not None else call(x, t)
        loss = (predicted.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        update_average(average, network, step, recipe.ema)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {step}; lower learning_rate")
        loss_mean = value if loss_mean is None else 0.99 * loss_mean + 0.01 * value
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            save_checkpoint(
                out,
                {"recipe": asdict(recipe)},
                step=step + 1,
                loss=loss_mean,
                network=network,
                average=average,
                optimizer=optimizer,
            )
        if on_step is not None:
            on_step(TrainEvent(step + 1, recipe.steps, loss_mean))

    return _export(out, recipe, data, noise_schedule, network.config, average, loss_mean)


def _rate(step: int, recipe: TrainRecipe) -> float:
    """Returns the share of the learning rate at a step."""
    start, end, peak = _cycle(step, recipe)
    falling = max(1, round(recipe.decay * (end - start)))
    return peak * min(1.0, (step - start + 1) / max(1, recipe.warmup), (end - step) / falling)


def _cycle(step: int, recipe: TrainRecipe) -> tuple[int, int, float]:
    """Returns the cycle that a step is in: its start, its end and its peak."""
    ends = [*recipe.cycles, recipe.steps]
    number = next(i for i, end in enumerate(ends) if step < end or end == recipe.steps)
    return ([0, *ends][number], ends[number], recipe.later_peak if number else 1.0)


def _batch(
    data: ImageData, schedule: NoiseSchedule, recipe: TrainRecipe, step: int, *, null: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n = recipe.batch_size
    per_epoch = max(1, len(data) // n)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=generator(recipe.seed, "epoch", epoch))
    index = order[place * n : (place + 1) * n]
    n = len(index)

    draws = generator(recipe.seed, "step", step)
    x0 = data.floats(index)
    u = (torch.rand(n, generator=draws, dtype=torch.float64) + torch.arange(n)) / n
    t_uniform = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    # A cosine schedule has lambda = log cot(pi u / 2); the same u through our schedule.
    lam = -torch.log(torch.tan(u.clamp(1e-4, 1 - 1e-4) * (math.pi / 2)))
    t_cosine = schedule.time(lam).clamp(schedule.t_min, schedule.t_max)
    pick = torch.rand(n, generator=draws) < recipe.uniform_times
    t = torch.where(pick, t_uniform, t_cosine)
    shape = (-1, *[1] * (x0.ndim - 1))
    alpha, sigma = (f(t).float().reshape(shape) for f in (schedule.alpha, schedule.sigma))
    eps = torch.randn(x0.shape, generator=draws)
    target = eps if recipe.prediction == "eps" else alpha * eps - sigma * x0
    labels = None
    if data.labels is not None and null is not None:
        drop = torch.rand(n, generator=draws) < recipe.label_dropout
        labels = torch.where(drop, null, data.labels[index])
    return alpha * x0 + sigma * eps, t.float(), target, labels


def _restore(
    out: Path,
    recipe: TrainRecipe,
    network: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float | None]:
    state = read_checkpoint(out)
    if state is None:
        return 0, None
    stored = TrainRecipe.from_json(state["recipe"])
    varies = {"steps": 0, "cycles": [], "later_peak": 0.0, "compile": False}
    same = asdict(stored) | varies == asdict(recipe) | varies
    # What the finished steps were made with must be what the new recipe says of them.
    if not same or any(
        not math.isclose(_rate(k, stored), _rate(k, recipe)) for k in range(state["step"])
    ):
        raise ValueError(
            f"the folder {str(out)!r} has a run of another recipe, at step {state['step']}; "
            "give the same recipe to go on, or another folder"
        )
    return load_checkpoint(
        out, steps=recipe.steps, network=network, average=average, optimizer=optimizer
    )


def _export(
    out: Path,
    recipe: TrainRecipe,
    data: ImageData,
    schedule: NoiseSchedule,
    network: dict[str, Any],
    average: dict[str, Tensor],
    loss: float | None,
) -> Path:
    from fewstep.models.folder import write_model

    mean, std = _statistics(data)
    weights = {key: value.half() for key, value in average.items()}
    return write_model(
        out,
        {**weights, "data.mean": mean.half(), "data.std": std.half()},
        network={"kind": "small-unet", **network},
        schedule=schedule,
        prediction=recipe.prediction,
        event_shape=data.event_shape,
        class_names=data.names,
        training={"recipe": asdict(recipe), "images": len(data), "loss": loss},
    )


def _statistics(data: ImageData) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each coordinate, (C, H, W), for head starts."""
    total = torch.zeros(data.event_shape, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(data), 4096):
        part = data.floats(slice(start, start + 4096)).double()
        total += part.sum(0)
        squares += part.square().sum(0)
    mean = total / len(data)
    return mean, (squares / len(data) - mean.square()).clamp(min=0).sqrt()

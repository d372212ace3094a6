"""The models of a studio: loaded once, shared by its users, evaluated by one of them at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.base.devices import find_device
from fewstep.loading import load
from fewstep.models.denoiser import Denoiser
from fewstep.models.wrappers import Wrapper

MOST_MODELS = 4
"""The most models in memory; that which was not used for longest is dropped."""


class Cancelled(Exception):
    """The user has cancelled the run; raised between two network evaluations."""


class Turns:
    """A lock that is given in the order of asking.

    A run asks for it before each evaluation, so that the evaluations of several users take turns: on one device
    together they would be no faster, and would need the memory of all.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block no other thread has its turn."""
        mine = threading.Event()
        with self._guard:
            self._waiting.append(mine)
            if len(self._waiting) == 1:
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                self._waiting.popleft()
                if self._waiting:
                    self._waiting[0].set()


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        source: Its name or folder, as it was given.
        denoiser: The model.
        turns: The turns of those who evaluate it.
    """

    source: str
    denoiser: Denoiser
    turns: Turns = field(default_factory=Turns)

    @property
    def info(self) -> ModelInfo:
        """The facts that a form needs."""
        model, own = self.denoiser, self.denoiser.built_in_sampler()
        names = model.accepts.names or frozenset()
        return ModelInfo(
            self.source,
            str(model.device),
            model.event_shape,
            model.schedule.name,
            model.native.value,
            model.accepts.num_classes if "class_labels" in names else None,
            tuple(getattr(model, "class_names", None) or ()),
            "prompt" in names,
            bool(model.null_condition) and own is None,
            None if own is None else tuple(own.budgets),
            () if model.profile is None else tuple(sorted(model.profile.recommended)),
        )


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a model that a form needs.

    Attributes:
        source: Its name or folder.
        device: Its device.
        event_shape: The shape of one sample.
        schedule: The name of its noise schedule.
        prediction: The name of its own prediction.
        classes: The number of its classes, or ``None``.
        class_names: Their names, if they have any.
        prompt: Whether it takes a text.
        guided: Whether it can be guided.
        budgets: The numbers of evaluations of its built-in sampler, or ``None`` if any solver samples it.
        measured: The budgets of its own profile.
    """

    source: str
    device: str
    event_shape: tuple[int, ...] | None
    schedule: str
    prediction: str
    classes: int | None
    class_names: tuple[str, ...]
    prompt: bool
    guided: bool
    budgets: tuple[int, ...] | None
    measured: tuple[int, ...]


class Models:
    """Models in memory, by source and device."""

    def __init__(self, most: int = MOST_MODELS) -> None:
        self._most, self._guard = most, threading.Lock()
        self._loaded: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()

    def get(self, source: str, device: str = "auto") -> LoadedModel:
        """Returns a model, loaded if it is not in memory.

        Raises:
            ValueError: If there is no such model, or the device is not available.
        """
        if not source.strip():
            raise ValueError("give a model: the name of an embedded one, or a folder")
        key = (source, str(find_device(device)))
        with self._guard:
            if key not in self._loaded:
                self._loaded[key] = LoadedModel(source, load(source, device=device))
            self._loaded.move_to_end(key)
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
            return self._loaded[key]


OnOutput = Callable[[Tensor, Tensor, Tensor], None]
"""Takes state (B, *), times (B) and native prediction (B, *) of an evaluation."""


class Observed(Wrapper):
    r"""A model whose evaluations take turns, can be cancelled, are timed and shown to a callback.

    Its predictions are those of the inner model, number for number.

    Arguments:
        inner: The model, with its guidance.
        turns: The turns of the model.
        cancelled: Whether the run has been cancelled.
        on_output: Called with state, times and native prediction after each evaluation.
    """

    def __init__(
        self,
        inner: Denoiser,
        turns: Turns,
        cancelled: Callable[[], bool],
        on_output: OnOutput | None = None,
    ) -> None:
        super().__init__(inner)
        self.profile = inner.profile
        self.seconds, self.count = 0.0, 0
        self._turns, self._cancelled, self._on_output = turns, cancelled, on_output

    def raw(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self._cancelled():
            raise Cancelled
        with self._turns.turn():
            began = time.perf_counter()
            output = self.inner.raw(x, t, **cond)
            if output.device.type == "cuda":
                torch.cuda.synchronize(output.device)
            self.seconds += time.perf_counter() - began
        self.count += 1
        if self._on_output is not None:
            self._on_output(x, t, output)
        return output

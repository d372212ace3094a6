"""One user's session: runs in a thread, and events that a page collects."""

from __future__ import annotations

import json
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fewstep.base.messages import is_mistake, message_of
from fewstep.sampling.profile import Profile
from fewstep.studio import engine
from fewstep.studio.drawing import side_by_side
from fewstep.studio.events import Ended, Event, Failed, Measured
from fewstep.studio.models import Cancelled, Models
from fewstep.studio.settings import FitRequest, Reproduction, SampleRequest

logger = logging.getLogger("fewstep")


class Session:
    """The runs of one user, one at a time, each in a thread of its own.

    Sessions share models in memory and nothing else: the measured profile, references and events belong
    to one session.

    Arguments:
        models: The models in memory.
    """

    def __init__(self, models: Models) -> None:
        self.profile: tuple[Profile, str, Reproduction] | None = None
        """The profile that was measured last, the model that it was measured on, and how."""
        self._models = models
        self._events: deque[Event] = deque()
        self._references: dict[tuple[Any, ...], tuple[Tensor, int]] = {}
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a run is going on."""
        return self._thread is not None and self._thread.is_alive()

    def load(self, source: str, device: str = "auto") -> None:
        """Begins to load a model."""
        self._start(lambda context: engine.load_model(source, device, context))

    def sample(self, request: SampleRequest) -> None:
        """Begins to run samplers."""
        self._start(lambda context: engine.run_samples(request, context), model=request.model)

    def fit(self, request: FitRequest) -> None:
        """Begins a measurement; its profile is then that of the session."""
        self._start(lambda context: engine.run_fit(request, context), model=request.model)

    def cancel(self) -> None:
        """Cancels the run before its next network evaluation."""
        self._cancelled.set()

    def events(self) -> list[Event]:
        """Returns the events since the last call, in order; :class:`Ended` is the last of a run."""
        events = list[Event]()
        while self._events:
            events.append(self._events.popleft())
        return events

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the end of the run."""
        if self._thread is not None:
            self._thread.join(seconds)

    def picture(self, request: SampleRequest, rows: Mapping[str, Tensor], title: str) -> bytes:
        """Returns the samples of a run in one picture, as PNG.

        Arguments:
            request: The request of the run.
            rows: The samples by name.
            title: A text above them.
        """
        model = self._models.get(request.model, request.device).denoiser
        return side_by_side(rows, model, title=title)

    def profile_text(self) -> str:
        """Returns the profile of the session as JSON text.

        Raises:
            ValueError: If nothing was measured yet.
        """
        if self.profile is None:
            raise ValueError("no profile was measured yet")
        return json.dumps(self.profile[0].to_record(), indent=1, allow_nan=False)

    def _start(self, run: Callable[[engine.Context], None], *, model: str = "") -> None:
        if self.busy:
            raise ValueError("a run is going on; cancel it, or wait for its end")
        cancelled = threading.Event()
        self._cancelled = cancelled
        profile = None
        if self.profile is not None and self.profile[1] == model:
            profile = self.profile[0], self.profile[2]
        context = engine.Context(
            self._models,
            lambda event: self._emit(event, model),
            cancelled.is_set,
            profile,
            self._references,
        )
        # No daemon: a thread that is in torch when the interpreter ends aborts the process.
        self._thread = threading.Thread(
            target=self._run, args=(run, context), name="fewstep studio", daemon=False
        )
        self._thread.start()

    def _emit(self, event: Event, model: str) -> None:
        if isinstance(event, Measured):
            self.profile = event.profile, model, event.reproduction
        self._events.append(event)

    def _run(self, run: Callable[[engine.Context], None], context: engine.Context) -> None:
        cancelled = False
        try:
            run(context)
        except Cancelled:
            cancelled = True
        except engine.InvalidSampler as error:
            context.emit(Failed(message_of(error), error.index))
        except Exception as error:
            if not is_mistake(error):
                logger.exception("a run of the studio has failed")
                context.emit(Failed(f"{type(error).__name__}: {message_of(error)}"))
            else:
                context.emit(Failed(message_of(error)))
        context.emit(Ended(cancelled))


class Sessions:
    """The sessions of a studio: each lives as long as its page or its run, and all end with the studio."""

    def __init__(self) -> None:
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @property
    def busy(self) -> bool:
        """Whether a run is going on in any of them."""
        return any(session.busy for session in list(self._sessions))

    def new(self, models: Models) -> Session:
        """Returns a new session."""
        session = Session(models)
        self._sessions.add(session)
        return session

    def cancel(self) -> None:
        """Cancels all runs before their next network evaluation."""
        for session in list(self._sessions):
            session.cancel()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the ends of all runs, for each at most so many seconds."""
        for session in list(self._sessions):
            session.wait(seconds)

"""The page of the studio: forms, pictures and buttons over a session; it computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicegui import run, ui

from fewstep import __version__
from fewstep.diffusion.grids import GRIDS
from fewstep.loading import EMBEDDED
from fewstep.reporting.figures import COLORS
from fewstep.solvers import SOLVERS
from fewstep.studio.drawing import data_address
from fewstep.studio.engine import LETTERS
from fewstep.studio.events import (
    Ended,
    Event,
    Failed,
    Frame,
    Measured,
    ModelLoaded,
    Planned,
    PlansDrawn,
    Progressed,
    Referenced,
    Sampled,
    Stage,
)
from fewstep.studio.models import ModelInfo, Models
from fewstep.studio.session import Session, Sessions
from fewstep.studio.settings import (
    MOST_SAMPLERS,
    FitRequest,
    Reproduction,
    SampleRequest,
    SamplerSettings,
    integer,
    real,
    required,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

STYLE = Path(__file__).with_name("studio.css")

SECONDS = 0.1
"""The seconds between two looks at the events of a session."""

RECONNECTED = 120.0
"""The seconds after which a browser that has gone is given up. A machine that samples on all its cores is slow to take
the signs of life of a browser, and a page that was given up begins from the start."""

LEFT = 20.0
"""The seconds after which the run of a browser that has gone is cancelled."""

KIND_NAMES = {
    "solver": "Solver",
    "recipe": "Recipe or plan (file)",
    "profile": "Profile (measured)",
    "student": "Student (model)",
}
DEFAULTS = ("auto", "ddim")
"""The solvers of the samplers that a page begins with."""

EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
"""A picture of nothing."""


def install(app: FastAPI, models: Models, model: str, device: str) -> Sessions:
    """Adds the page to a web application; returns the sessions of its users.

    Arguments:
        app: The application.
        models: The models in memory.
        model: The model that a page begins with.
        device: The device of all models.
    """
    sessions = Sessions()

    @ui.page("/", title="fewstep studio")
    def studio() -> None:  # pyright: ignore[reportUnusedFunction]
        session, client = sessions.new(models), ui.context.client

        async def left() -> None:
            await asyncio.sleep(LEFT)
            if not client.has_socket_connection:
                session.cancel()

        client.on_disconnect(left)
        client.on_delete(session.cancel)
        StudioPage(session, model, device)

    ui.run_with(
        app,
        title="fewstep studio",
        favicon="🎲",
        dark=None,
        language="en-US",
        reconnect_timeout=RECONNECTED,
        tailwind=False,
        show_welcome_message=False,
    )

    return sessions


class StudioPage:
    """The page of one user.

    Arguments:
        session: The session of the user.
        model: The model that the page begins with.
        device: The device of all models.
    """

    def __init__(self, session: Session, model: str, device: str) -> None:
        self.session, self.device = session, device
        self.info: ModelInfo | None = None
        self.cards: list[SamplerCard] = []
        self.samples: dict[int, Any] = {}
        self.references: dict[int, Any] = {}
        self.running: tuple[SamplerCard, ...] = ()
        self.request: SampleRequest | None = None
        self._total: int | None = None
        self._follows = True
        ui.add_css(STYLE)
        self.dark = ui.dark_mode(None)
        self.main = ui.element("div").classes("studio")
        self.main.props["data-runs"] = 0
        with self.main:
            self._head()
            self._setup(model)
            self.list = ui.element("div").classes("samplers")
            self._below()
        self._dock()
        for solver in DEFAULTS:
            self.add(solver)
        ui.timer(SECONDS, self.poll)
        self._load()

    # Parts of the page

    def _head(self) -> None:
        with ui.element("div").classes("bar"):
            ui.html(f"fewstep studio <span>{__version__}</span>", sanitize=False, tag="h1")
            self.theme = ui.button(icon="contrast", on_click=self._next_theme).props(
                'flat round aria-label="light or dark"'
            )

    def _setup(self, model: str) -> None:
        with ui.element("div").classes("card"):
            with ui.element("div").classes("setup"):
                names = list(dict.fromkeys([*EMBEDDED, model]))
                self.model = ui.select(
                    names,
                    value=model,
                    label="Model: a name, or a folder",
                    new_value_mode="add-unique",
                    on_change=self._load,
                ).props("outlined dense")
                self.model.classes("wide")
                self.n = _number("Samples", 4)
                self.seed = _number("Seed", 0)
                self.compare = ui.checkbox("Compare with the model's own solution", value=True)
                self.compare.classes("wide")
            self.facts = ui.label("").classes("facts")
            self.alarm = _alarm()

    def _below(self) -> None:
        with ui.element("div").classes("row-of-buttons").style("margin-top:12px"):
            self.more = ui.button("Add a sampler", icon="add", on_click=lambda: self.add())
            self.more.props("outline")
            self.stage = ui.label("").classes("stage").props('role=status aria-live="polite"')
            self.stage.style("margin:0")
        self.progress = ui.linear_progress(0, show_value=False, size="4px").style("margin-top:8px")
        self.progress.props('aria-label="progress"').set_visibility(False)
        with ui.element("div").classes("more"):
            with ui.element("section").classes("card"):
                ui.html("Plans", tag="h2").classes("section").style("margin-top:0")
                self.plans = ui.html("", sanitize=False).classes("drawing")
                self.plans_note = ui.label(
                    "The times of the evaluations on the axis of noise, and the weights of every plan: drawn "
                    "when a run ends."
                ).classes("note")
            with ui.element("section").classes("card"):
                self._measurement()

    def _measurement(self) -> None:
        ui.html("Measure this model", tag="h2").classes("section").style("margin-top:0")
        ui.label(
            "Runs fewstep fit: no training, no data. Finds the sampler of each budget that is nearest to the "
            "model's own solution, and compares it with its peers on noise that it has not seen."
        ).classes("note")
        with ui.element("div").classes("measure"):
            self.budgets = ui.input("NFE", value="5,8,10,15,20").props("outlined dense")
            self.trajectories = _number("Trajectories", 16)
            self.fit_labels = ui.input("Classes", placeholder="all in turn").props(
                "outlined dense"
            )
            self.fit_guidance = _number("Guidance", None)
            self.fit_prompt = ui.input("Prompt").props("outlined dense")
        with ui.element("div").classes("row-of-buttons"):
            self.fit = ui.button("Measure this model", icon="speed", on_click=self._fit)
            self.save_profile = ui.button(
                "Save profile", icon="download", on_click=self._save_profile
            ).props("outline")
            self.save_profile.set_visibility(False)
        self.errors = ui.html("", sanitize=False).classes("drawing").style("margin-top:10px")
        self.errors_table = ui.html("", sanitize=False).classes("scroll")
        self.fit_code = CodePanel("Python and command of this measurement")

    def _dock(self) -> None:
        with ui.element("div").classes("dock"), ui.element("div"):
            with ui.element("div").classes("row-of-buttons"):
                self.run = ui.button("Run", icon="play_arrow", on_click=self._run)
                self.cancel = ui.button("Cancel", icon="stop", on_click=self._cancel)
                self.cancel.props("outline").disable()
            self.slider = ui.slider(min=1, max=1, step=1, value=1, on_change=self._scrub)
            self.slider.props('aria-label="evaluation"').classes("slide").disable()
            self.where = ui.label("").classes("where")
            self.save = ui.button(icon="image", on_click=self._save_picture)
            self.save.props('flat round aria-label="save picture"').disable()
            self.save.tooltip("Save picture")

    # What a user does

    def add(self, solver: str = "auto") -> None:
        """Adds a sampler."""
        if len(self.cards) < MOST_SAMPLERS:
            with self.list:
                self.cards.append(SamplerCard(self, solver))
        self._number_cards()

    def remove(self, card: SamplerCard) -> None:
        """Removes a sampler."""
        if not self.session.busy and len(self.cards) > 1:
            self.cards.remove(card)
            card.box.delete()
            self._number_cards()

    def _number_cards(self) -> None:
        for place, card in enumerate(self.cards):
            card.rename(place)
            card.close.set_enabled(len(self.cards) > 1)
        self.more.set_enabled(len(self.cards) < MOST_SAMPLERS)

    def _next_theme(self) -> None:
        self.dark.value = {None: True, True: False, False: None}[self.dark.value]

    def _load(self) -> None:
        self._attempt(lambda: self.session.load(str(self.model.value or ""), self.device))

    def _run(self) -> None:
        for card in self.cards:
            card.alarm.text = ""
            card.alarm.set_visibility(False)
        settings = []
        for card in self.cards:
            try:
                settings.append(card.settings())
            except ValueError as error:
                _show(card.alarm, str(error))
                return
        self._attempt(lambda: self._begin(tuple(settings)))

    def _begin(self, settings: tuple[SamplerSettings, ...]) -> None:
        request = SampleRequest(
            str(self.model.value or ""),
            settings,
            n=required("the number of samples", self.n.value),
            seed=required("the seed", self.seed.value),
            device=self.device,
            reference=bool(self.compare.value),
        )
        self.session.sample(request)
        self.request, self.running = request, tuple(self.cards)
        self.samples, self.references, self._follows = {}, {}, True
        for card in self.cards:
            card.clear()
        self.save.disable()

    def _fit(self) -> None:
        def begin() -> None:
            self.session.fit(
                FitRequest(
                    str(self.model.value or ""),
                    nfe=str(self.budgets.value or ""),
                    n=required("the number of trajectories", self.trajectories.value),
                    seed=required("the seed", self.seed.value),
                    device=self.device,
                    guidance=real("guidance", self.fit_guidance.value),
                    class_labels=str(self.fit_labels.value or ""),
                    prompt=str(self.fit_prompt.value or ""),
                )
            )

        self._attempt(begin)

    def _attempt(self, begin: Callable[[], None]) -> None:
        """Begins a run; what is wrong is shown."""
        self.alarm.set_visibility(False)
        try:
            begin()
        except (ValueError, TypeError) as error:
            _show(self.alarm, str(error))
        else:
            self._set_busy(True)

    def _cancel(self) -> None:
        self.session.cancel()
        self.stage.text = "cancelling before the next evaluation …"

    def _scrub(self) -> None:
        place = int(self.slider.value or 1)
        last = max((len(card.frames) for card in self.cards), default=0)
        self._follows = place >= last
        for card in self.cards:
            card.show(place)
        self._say_where(place)

    def _say_where(self, place: int) -> None:
        most = max((card.evaluations for card in self.cards), default=0)
        shown = "sample" if place > most else f"evaluation {place} of {most}"
        self.where.text = shown if most else ""

    async def _save_picture(self) -> None:
        if not self.samples or self.request is None or self.info is None:
            return
        rows = {}
        shared = next(iter(self.references.values()), None)
        if shared is not None and len({id(v) for v in self.references.values()}) == 1:
            rows["reference"] = shared
        for index, samples in sorted(self.samples.items()):
            card = self.running[index]
            rows[f"{card.letter.content}  {card.name}"] = samples
        title = f"{Path(self.request.model).name} · seed {self.request.seed}"
        image = await run.io_bound(self.session.picture, self.request, rows, title)
        if image is not None:
            ui.download.content(image, "studio.png", "image/png")

    def _save_profile(self) -> None:
        if self.session.profile is not None:
            text = self.session.profile_text()
            ui.download.content(text.encode(), "profile.json", "application/json")

    # What happens

    def poll(self) -> None:
        """Shows what has happened since the last look."""
        events = self.session.events()
        if not events:
            return
        shown: set[int] = set()
        for event in events:
            if isinstance(event, Frame):
                self.running[event.index].frames.append(event)
                shown.add(event.index)
            else:
                self._show_event(event)
        if shown:
            self._show_frames(shown)

    def _show_frames(self, indices: set[int]) -> None:
        most = max(len(card.frames) for card in self.cards)
        self.slider.props["max"] = max(1, most)
        self.slider.enable()
        if self._follows:
            self.slider.value = most  # which shows it
            for index in indices:
                self.running[index].show(most)
        self._say_where(int(self.slider.value or 1))

    def _show_event(self, event: Event) -> None:
        match event:
            case ModelLoaded():
                self._show_model(event.info)
            case Planned():
                self.running[event.index].plan(event)
            case Stage():
                self.stage.text, self._total = event.name, event.total
                self.progress.value = 0
            case Progressed():
                self.progress.value = event.done / self._total if self._total else 0
            case Referenced():
                self.references |= dict.fromkeys(event.indices, event.samples)
                for index in event.indices:
                    self.running[index].refer(event)
            case Sampled():
                self.samples[event.index] = event.samples
            case PlansDrawn():
                self.plans.content = event.figure
                self.plans_note.set_visibility(False)
            case Measured():
                self._show_measured(event)
            case Failed():
                place = self.alarm if event.index is None else self.running[event.index].alarm
                _show(place, event.message)
            case Ended():
                self.stage.text = "cancelled" if event.cancelled else ""
                self.main.props["data-runs"] += 1
                self._set_busy(False)

    def _show_model(self, info: ModelInfo) -> None:
        if self.info == info:
            return
        self.info = info
        self.errors.content, self.errors_table.content = "", ""
        self.fit_code.box.set_visibility(False)
        self.save_profile.set_visibility(False)
        shape = "?" if info.event_shape is None else " × ".join(map(str, info.event_shape))
        facts = [f"{shape}", info.schedule, f"predicts {info.prediction}", info.device]
        if info.classes:
            facts.append(f"{info.classes} classes")
        if info.budgets is not None:
            facts.append(f"built-in sampler, NFE {', '.join(map(str, info.budgets))}")
        if info.measured:
            facts.append(f"measured for NFE {', '.join(map(str, info.measured))}")
        self.facts.text = " · ".join(facts)
        for card in self.cards:
            card.suit(info)
        self.fit_labels.set_visibility(bool(info.classes))
        self.fit_guidance.set_visibility(info.guided)
        self.fit_prompt.set_visibility(info.prompt)

    def _show_measured(self, event: Measured) -> None:
        self.errors.content = event.figure
        budgets = sorted({nfe for _, nfe, _ in event.rows})
        names = list(dict.fromkeys(name for name, _, _ in event.rows))
        known = {(name, nfe): error for name, nfe, error in event.rows}
        best = {k: min(v for (_, nfe), v in known.items() if nfe == k) for k in budgets}
        head = "".join(f"<th>NFE {k}</th>" for k in budgets)
        lines = []
        for name in names:
            cells = []
            for k in budgets:
                value = known.get((name, k))
                text = "–" if value is None else f"{value:.4f}"
                cells.append(f"<td>{f'<b>{text}</b>' if value == best[k] else text}</td>")
            lines.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
        self.errors_table.content = (
            f'<table class="table"><thead><tr><th>RMS distance</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table>"
        )
        self.fit_code.show(event.reproduction)
        self.save_profile.set_visibility(True)

    def _set_busy(self, busy: bool) -> None:
        for button in (self.run, self.fit):
            button.set_enabled(not busy)
        self.cancel.set_enabled(busy)
        self.progress.set_visibility(busy)
        if not busy:
            self.save.set_enabled(bool(self.samples))


class SamplerCard:
    """One sampler: its form, its pictures, its numbers.

    Arguments:
        page: The page.
        solver: The solver that it begins with.
    """

    def __init__(self, page: StudioPage, solver: str) -> None:
        self.page, self.frames = page, list[Frame]()
        self.name, self.evaluations = "", 0
        self._planned: Planned | None = None
        with ui.element("section").classes("card sampler") as self.box:
            self._head()
            self.alarm = _alarm()
            with ui.element("div").classes("body"):
                with ui.element("div"):
                    self._form(solver)
                with ui.element("div"):
                    with ui.element("div").classes("pictures") as self.pictures:
                        self.state = _picture("state x")
                        self.predicted = _picture("predicted x̂₀")
                        self.beside = _picture("reference", "only-wide")
                    self._numbers()
                    self.chosen = ui.label("").classes("note")
            self.own = ui.expansion("Reference").classes("w-full only-narrow")
            with self.own:
                with ui.element("div").classes("frame").style("max-width:220px"):
                    self.reference = _image("reference")
                self.reference_note = ui.label("").classes("note")
            self.own.set_visibility(False)
            self.code = CodePanel("Python and command")
            with ui.element("div").classes("row-of-buttons"):
                self.save = ui.button(
                    "Save recipe", icon="download", on_click=self._save_recipe
                ).props("outline dense padding='4px 10px'")
                self.save.disable()
        self._suit_kind()
        if page.info is not None:
            self.suit(page.info)

    def _head(self) -> None:
        with ui.element("div").classes("title"):
            self.letter = ui.html("", tag="b")
            self.heading = ui.label("")
            self.close = ui.button(icon="close", on_click=lambda: self.page.remove(self))
            self.close.props('flat round dense size=sm aria-label="remove this sampler"')

    def _form(self, solver: str) -> None:
        with ui.element("div").classes("fields"):
            self.kind = ui.select(
                KIND_NAMES, value="solver", label="Kind", on_change=self._suit_kind
            ).props("outlined dense")
            self.nfe = _number("NFE", 10)
            self.solver = ui.select(
                ["auto", *SOLVERS], value=solver, label="Solver", with_input=True
            ).props("outlined dense")
            self.grid = ui.select(
                {"": "the solver's own", **{name: name for name in GRIDS}}, value="", label="Grid"
            ).props("outlined dense")
            self.source = ui.input("File").props("outlined dense").classes("wide")
            self.labels = ui.input("Classes", value="", placeholder="3, or 0,1,2, or all")
            self.labels.props("outlined dense")
            self.guidance = _number("Guidance", None)
            self.prompt = ui.input("Prompt").props("outlined dense").classes("wide")
            self.options = ui.input("Options", placeholder="eta=0.5 t_end=0.01")
            self.options.props("outlined dense").classes("wide")

    def _numbers(self) -> None:
        with ui.element("div").classes("numbers"):
            for name in ("evaluation", "time t", "distance", "seconds"):
                with ui.element("div"):
                    ui.html(name, tag="small")
                    setattr(self, f"number_{name.split()[0]}", ui.label("–"))

    def rename(self, place: int) -> None:
        """Gives the sampler its letter and colour."""
        self.letter.content = LETTERS[place]
        self.box.style(f"--mark: {COLORS[place]}")
        if not self.heading.text:
            self.heading.text = "not run yet"

    def settings(self) -> SamplerSettings:
        """Returns the settings in the form, of the fields that are shown.

        Raises:
            ValueError: If a field does not fit.
        """

        def text(field: Any) -> str:
            return str(field.value or "").strip() if field.visible else ""

        return SamplerSettings(
            kind=self.kind.value,
            solver=text(self.solver) or "auto",
            grid=text(self.grid),
            options=text(self.options),
            source=text(self.source),
            nfe=integer("NFE", self.nfe.value),
            guidance=real("guidance", self.guidance.value) if self.guidance.visible else None,
            class_labels=text(self.labels),
            prompt=text(self.prompt),
        )

    def _suit_kind(self) -> None:
        kind = self.kind.value
        for field in (self.solver, self.grid):
            field.set_visibility(kind == "solver")
        self.options.set_visibility(kind in ("solver", "student"))
        self.source.set_visibility(kind != "solver")
        names = {
            "recipe": "File of a recipe or plan",
            "profile": "File; empty: measured here",
            "student": "Name or folder of the student",
        }
        self.source.props["label"] = names.get(kind, "File")
        if kind in ("recipe", "student"):
            self.nfe.value = None
        elif self.nfe.value is None:
            self.nfe.value = 10
        if kind == "student" and not self.source.value and self.page.info is not None:
            known = f"{self.page.info.source}-1step"
            self.source.value = known if known in EMBEDDED else ""

    def suit(self, info: ModelInfo) -> None:
        """Shows the fields that suit a model."""
        self.labels.set_visibility(bool(info.classes))
        if info.classes and not self.labels.value:
            self.labels.value = "all"
        self.guidance.set_visibility(info.guided)
        self.prompt.set_visibility(info.prompt)
        if info.budgets is not None:
            self.nfe.value, self.solver.value, self.grid.value = None, "auto", ""
        elif self.nfe.value is None and self.kind.value in ("solver", "profile"):
            self.nfe.value = 10
        points = info.event_shape is not None and len(info.event_shape) == 1
        self.pictures.classes(add="smooth" if points else "", remove="" if points else "smooth")

    def clear(self) -> None:
        """Empties the pictures before a run."""
        self.frames.clear()
        self.evaluations = 0
        for image in (self.state, self.predicted, self.reference, self.beside):
            image.props["src"] = EMPTY
        for name in ("evaluation", "time", "distance", "seconds"):
            getattr(self, f"number_{name}").text = "–"
        self.own.set_visibility(False)
        self.save.disable()

    def plan(self, event: Planned) -> None:
        """Shows what will run."""
        self._planned, self.name = event, event.title
        self.heading.text = event.title
        notes = [f"auto chose {event.chosen}"] if event.chosen else []
        if event.stochastic:
            notes.append("stochastic: its samples are others than the model's own solution")
        self.chosen.text = "; ".join(notes)
        self.code.show(event.reproduction)
        self.save.enable()

    def refer(self, event: Referenced) -> None:
        """Shows the reference."""
        for image in (self.reference, self.beside):
            image.props["src"] = data_address(event.picture)
        self.reference_note.text = f"from the same noise, with {event.nfe} evaluations"
        self.own.set_visibility(True)

    def show(self, place: int) -> None:
        """Shows the frame at a place of the slider, or the last before it."""
        if not self.frames:
            return
        self.evaluations = max(frame.evaluation for frame in self.frames)
        frame = self.frames[min(place, len(self.frames)) - 1]
        self.state.props["src"] = data_address(frame.state)
        self.predicted.props["src"] = data_address(frame.predicted or frame.state)
        total = self._planned.nfe if self._planned is not None else None
        done = f"{frame.evaluation}" if total is None else f"{frame.evaluation} / {total}"
        self.number_evaluation.text = f"{done} ✓" if frame.last else done
        self.number_time.text = f"{frame.t:.4g}"
        self.number_distance.text = "–" if frame.distance is None else f"{frame.distance:.4f}"
        self.number_seconds.text = f"{frame.seconds:.2f}"

    def _save_recipe(self) -> None:
        if self._planned is not None:
            name = f"recipe-{self.letter.content}.json"
            ui.download.content(self._planned.recipe.encode(), name, "application/json")

    number_evaluation: ui.label
    number_time: ui.label
    number_distance: ui.label
    number_seconds: ui.label


class CodePanel:
    """Python and commands to copy, behind a line.

    Arguments:
        title: The line.
    """

    def __init__(self, title: str) -> None:
        with ui.expansion(title).classes("w-full") as self.box:
            self.python = ui.html("", tag="pre").classes("code")
            self.commands = ui.html("", tag="pre").classes("code")
            with ui.element("div").classes("row-of-buttons"):
                ui.button("Copy Python", on_click=lambda: self._copy(0)).props("flat dense")
                ui.button("Copy command", on_click=lambda: self._copy(1)).props("flat dense")
        self._texts = ("", "")
        self.box.set_visibility(False)

    def show(self, reproduction: Reproduction) -> None:
        """Shows how the samples are reproduced."""
        self._texts = reproduction.python, "\n".join(reproduction.commands)
        for place, text in zip((self.python, self.commands), self._texts, strict=True):
            place.content = _escaped(text)
        self.box.set_visibility(True)

    def _copy(self, place: int) -> None:
        ui.clipboard.write(self._texts[place])
        ui.notify("copied")


def _escaped(text: str) -> str:
    from html import escape

    return escape(text, quote=False)


def _number(label: str, value: float | None) -> ui.number:
    """Returns a field for a number, without limits: those would change what was typed, and say nothing."""
    return ui.number(label, value=value).props("outlined dense")


def _alarm() -> ui.label:
    label = ui.label("").classes("alarm").props("role=alert")
    label.set_visibility(False)
    return label


def _show(alarm: ui.label, message: str) -> None:
    alarm.text = message
    alarm.set_visibility(True)


def _picture(caption: str, classes: str = "") -> ui.element:
    with ui.element("figure").classes(classes):
        ui.html(caption, tag="figcaption")
        with ui.element("div").classes("frame"):
            return _image(caption)


def _image(alt: str) -> ui.element:
    image = ui.element("img")
    image.props["alt"], image.props["src"] = alt, EMPTY
    return image

"""Reports: one self-contained HTML file with text, sortable tables, figures and pictures."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.base.extras import install_hint
from fewstep.base.files import write_atomic
from fewstep.reporting.figures import svg

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure
    from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "–"
"""The text of a table's field without a value."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its title.
        number: Whether it holds numbers, which are aligned at the right; left out, it does if all
            its fields have a value to sort by.
    """

    title: str
    number: bool | None = None


@dataclass(frozen=True)
class Cell:
    """The text of a field of a table, and the value that it is sorted by.

    Attributes:
        text: The text; ``code`` between backticks.
        value: The number that it is sorted by, or ``None`` for the text.
        interval: An interval that is shown beside it.
        classes: Classes of style.
    """

    text: str
    value: float | None = None
    interval: str = ""
    classes: str = ""


class Page:
    """A report, part after part; :meth:`write` makes one HTML file that needs nothing else.

    Texts are plain; what is between backticks is set as code. The file has no address of any
    server in it: styles, figures (SVG) and pictures (PNG) are inside.

    Arguments:
        title: The title.
        subtitle: A sentence below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle, self.footer = title, subtitle, ""
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._figures = 0
        self._macros: Any = _templates().get_template("parts.html").module

    def heading(self, text: str, *, level: int = 2) -> None:
        """Adds a heading; those of level 2 are listed at the top."""
        if level not in (2, 3):
            raise ValueError(f"the level of a heading is 2 or 3, got {level!r}")
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
        count = sum(f'id="{slug}' in part for part in self._parts)
        slug = f"{slug}-{count + 1}" if count else slug
        if level == 2:
            self._sections.append((slug, text.replace("`", "")))
        self._add("heading", text, level, slug)

    def paragraph(self, text: str) -> None:
        """Adds a paragraph."""
        self._add("paragraph", text)

    def bullets(self, items: Iterable[str]) -> None:
        """Adds a list."""
        self._add("bullets", list(items))

    def code(self, text: str) -> None:
        """Adds a block of code or a command."""
        self._add("code", text)

    def facts(self, items: Iterable[tuple[str, str, str]]) -> None:
        """Adds a row of cards: (label, value, note) each."""
        self._add("facts", list(items))

    def table(
        self,
        caption: str,
        columns: Sequence[str | Column],
        rows: Iterable[Sequence[Any]],
        *,
        marked: Iterable[int] = (),
        sortable: bool = True,
    ) -> None:
        """Adds a table; a click on the title of a column sorts it.

        Arguments:
            caption: What the table shows.
            columns: The titles; a column whose fields are all numbers is aligned at the right.
            rows: The rows, whose fields are texts, numbers, estimates (anything with ``value``,
                ``low`` and ``high``), :class:`Cell` or ``None`` for nothing.
            marked: The numbers of the rows to mark.
            sortable: Whether it can be sorted.

        Raises:
            ValueError: If a row has another number of fields than there are columns.
        """
        cells = [[_cell(value) for value in row] for row in rows]
        for number, row in enumerate(cells):
            if len(row) != len(columns):
                raise ValueError(
                    f"row {number} has {len(row)} fields for {len(columns)} columns ({caption!r})"
                )
        titles = [c if isinstance(c, Column) else Column(c) for c in columns]
        for place, column in enumerate(titles):
            fields = [row[place] for row in cells]
            present = [f for f in fields if "missing" not in f.classes]
            numeric = column.number
            if numeric is None:
                numeric = bool(present) and all(f.value is not None for f in present)
            if numeric:
                titles[place] = Column(column.title, True)
                for row in cells:
                    cell = row[place]
                    classes = f"number {cell.classes}".strip()
                    row[place] = Cell(cell.text, cell.value, cell.interval, classes)
        self._add("table", caption, titles, cells, frozenset(marked), sortable)

    def figure(self, figure: Figure, caption: str, *, alt: str) -> None:
        """Adds a figure of matplotlib as SVG; ``alt`` says in words what it shows."""
        self._figures += 1
        from markupsafe import Markup

        self._add("figure", Markup(svg(figure, alt=alt, prefix=f"f{self._figures}")), caption)

    def picture(self, image: Image.Image, caption: str, *, alt: str, fit: bool = True) -> None:
        """Adds a picture as PNG.

        Arguments:
            image: The picture.
            caption: The text below.
            alt: Its content in words.
            fit: Whether a picture that is too wide shrinks; else it is scrolled.
        """
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._add("picture", data, image.width, image.height, alt, caption, fit)

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """Folds everything that is added within the block behind a line."""
        outside, self._parts = self._parts, []
        try:
            yield
        finally:
            inside, self._parts = self._parts, outside
        self._add("details", summary, inside)

    def to_html(self) -> str:
        """Returns the file's text."""
        template = _templates().get_template("page.html")
        return template.render(
            title=self.title,
            subtitle=self.subtitle,
            footer=self.footer,
            sections=self._sections,
            parts=self._parts,
        )

    def write(self, path: str | Path) -> Path:
        """Writes the file atomically; returns its path."""
        return write_atomic(path, self.to_html())

    def _add(self, macro: str, *arguments: Any) -> None:
        self._parts.append(getattr(self._macros, macro)(*arguments))


def number(value: float, digits: int = 4) -> str:
    """Returns a number as text, with so many significant digits and a real minus sign."""
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\N{THIN SPACE}").replace("-", "\N{MINUS SIGN}")
    if not math.isfinite(value):
        return str(value)
    text = f"{value:#.{digits}g}"
    if "e" in text:
        head, _, power = text.partition("e")
        text = f"{head}e{int(power)}"
    return text.rstrip(".").replace("-", "\N{MINUS SIGN}")


def _cell(value: Any) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(MISSING, classes="missing")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            return Cell(str(value), classes="missing")
        return Cell(number(value), float(value))
    if all(hasattr(value, name) for name in ("value", "low", "high")):
        return _estimate(value)
    return Cell(str(value))


def _estimate(estimate: Any) -> Cell:
    value, low, high = estimate_texts(estimate)
    return Cell(value, float(estimate.value), f"{low} … {high}")


def estimate_texts(estimate: Any) -> tuple[str, str, str]:
    """Returns value and ends of an estimate as texts, with at least two digits of the interval's width."""
    numbers = (estimate.value, estimate.low, estimate.high)
    width = abs(estimate.high - estimate.low)
    if not 1e-6 < width < 1e6:
        value, low, high = (number(n) for n in numbers)
        return value, low, high
    decimals = max(int(width < 1000), 1 - math.floor(math.log10(width)))
    # Adding zero turns a rounded minus zero into zero.
    rounded = (f"{round(n, decimals) + 0.0:.{decimals}f}" for n in numbers)
    value, low, high = (text.replace("-", "\N{MINUS SIGN}") for text in rounded)
    return value, low, high


@cache
def _templates() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup, escape
    except ImportError:
        raise ValueError(f"reports need jinja2: {install_hint('report')}") from None

    def words(text: object, breaks: bool = False) -> Markup:
        safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
        return Markup(re.sub(r"(?<=:)(?=\S)|(?=[+@])", "<wbr>", safe) if breaks else safe)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    return environment

"""Tables of results: rows with values, printed as text and shown as HTML in notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

GAP = "  "
"""What stands between two columns of text."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: The key of its values in the rows.
        title: Its title; left out, the key.
        show: Returns a value as text.
        left: Whether it is aligned to the left, as words are; numbers are aligned to the right.
    """

    key: str
    title: str | None = None
    show: Callable[[Any], str] = str
    left: bool = False

    @property
    def heading(self) -> str:
        """The title."""
        return self.key if self.title is None else self.title

    def text(self, row: Mapping[str, Any]) -> str:
        """Returns its text in a row; a missing value and ``None`` are empty."""
        value = row.get(self.key)
        return "" if value is None else self.show(value)


class Table(list[dict[str, Any]]):
    """Rows as dictionaries; ``str(table)`` is an aligned text, in notebooks it is an HTML table.

    Arguments:
        rows: The rows, by the keys of the columns; further keys are not shown.
        columns: The columns.
        title: A line above.

    Example:
        >>> from fewstep.base.tables import Column, Table
        >>> table = Table([{"nfe": 5, "solver": "tab3"}], [Column("nfe", "NFE"), Column("solver", left=True)])
        >>> print(table)
        NFE  solver
          5  tab3
        >>> table[0]["solver"]
        'tab3'
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]], columns: Sequence[Column], *, title: str = ""
    ) -> None:
        super().__init__(rows)
        self.columns, self.title = tuple(columns), title

    def __str__(self) -> str:
        grid = [
            [c.heading for c in self.columns],
            *([c.text(r) for c in self.columns] for r in self),
        ]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [
            GAP.join(
                text.ljust(width) if column.left else text.rjust(width)
                for text, width, column in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in grid
        ]
        return "\n".join([*([self.title] if self.title else []), *lines])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        side = {True: "left", False: "right"}
        heads = [_cell("th", side[c.left], c.heading) for c in self.columns]
        body = [[_cell("td", side[c.left], c.text(row)) for c in self.columns] for row in self]
        rows = "".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(tag: str, side: str, text: str) -> str:
    return f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>'

"""Docstrings as Markdown: sections as headings and tables, formulas as MathML, names as links."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

SECTIONS = ("Arguments", "Args", "Attributes", "Returns", "Raises", "References", "Example")
LEADS = ("Cost", "Order", "Contradiction", "Columns")
"""Words that begin a paragraph, in bold on the page."""

Links = Mapping[str, str]
"""The address of each documented name, by its full path or what follows ``fewstep.``"""


@dataclass(frozen=True)
class Reference:
    """A source that a docstring names.

    Attributes:
        title: The title.
        who: The authors, as in the docstring: "Zhang & Chen", "Lu et al.".
        year: The year.
        where: What follows the year, with its comma: ", eq. (15)".
        url: The address.
    """

    title: str
    who: str
    year: str
    where: str
    url: str


def references(doc: str) -> list[Reference]:
    """Returns the sources of a docstring: pairs of lines under "References", what it is and where.

    Raises:
        ValueError: If a line is not of the form "Title (Who, year)", followed by its address.
    """
    body = re.search(r"References:\n((?:\s*\|[^\n]*\n?)+)", doc + "\n")
    lines = [x.strip().removeprefix("| ") for x in body[1].strip().splitlines()] if body else []
    found, pending = list[Reference](), list[re.Match[str]]()
    for line in lines:
        if line.startswith("https://"):
            if not pending:
                raise ValueError(f"what is at {line}?")
            one = pending.pop(0)
            title = re.sub(r"^\[\d+\] ", "", one[1].strip())
            found.append(Reference(title, one[2] or "", one[3], one[4], line))
            continue
        for part in re.split(r", and (?=k-diffusion)", line):
            parts = re.fullmatch(r"(.*?) \((?:([^()]*), )?(\d{4})\)(.*)", part)
            if parts is None:
                raise ValueError(f"{line!r} is not of the form 'Title (Who, year)'")
            pending.append(parts)
    if pending:
        raise ValueError(f"no address of {pending[0][0]!r}")
    return found


def mathml(formula: str, *, block: bool) -> str:
    """Returns a formula of LaTeX as MathML, which browsers draw without a script or a font.

    Raises:
        ValueError: It has an alignment or a command that the converter does not know.
    """
    from latex2mathml.converter import convert

    formula = " ".join(formula.split())
    if block and r"\begin" not in formula and r"\\" in formula:
        lines = [line.replace("&", "") for line in formula.split(r"\\")]
        return "\n".join(mathml(line, block=True) for line in lines)
    if r"\begin" not in formula and re.search(r"(?<!\\)&", formula):
        raise ValueError(f"an alignment of one line: {formula!r}")
    text = convert(formula, display="block" if block else "inline")
    if unknown := re.findall(r"<m[io]>(\\\w+)</m[io]>", text):
        raise ValueError(f"unknown commands {unknown} in {formula!r}")
    # Marks of Markdown within the formula are not Markdown.
    return re.sub(
        r">([^<]+)<",
        lambda m: ">" + re.sub(r"[*_`\\\[\]|~]", lambda c: f"&#{ord(c[0])};", m[1]) + "<",
        text,
    )


def _within(formula: str) -> str:
    """A formula within text: Markdown takes a tag at the beginning of a line for a block, so something precedes it."""
    return "&#8203;" + formula


def with_formulas(text: str) -> str:
    """Returns a page of Markdown with ``$…$`` and ``$$…$$`` as MathML; code stays as it is."""
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    for k in range(0, len(parts), 2):
        part = re.sub(
            r"\$\$(.+?)\$\$",
            lambda m: f"\n{mathml(m[1], block=True)}\n",
            parts[k],
            flags=re.DOTALL,
        )
        parts[k] = re.sub(
            r"(?<![\\$\w])\$(?=\S)([^$]*?\S)\$(?!\w)",
            lambda m: _within(mathml(m[1], block=False)),
            part,
        )
    return "".join(parts)


def _reference(match: re.Match[str], links: Links) -> str:
    target = match[2]
    short = target.startswith("~")
    path = target.lstrip("~")
    shown = path.rpartition(".")[2] if short else path
    found = links.get(path) or links.get(path.removeprefix("fewstep."))
    if found is None:
        owner, _, member = path.removeprefix("fewstep.").rpartition(".")
        last = links.get(path.rpartition(".")[2])
        found = links.get(owner) or (last if owner else None)
        del member
    return f"[`{shown}`]({found})" if found else f"`{shown}`"


def inline(text: str, links: Links) -> str:
    """Returns running text of a docstring as Markdown."""
    # What is in double backticks is code and nothing else, so it is set aside first.
    kept: list[str] = []

    def keep(value: str) -> str:
        kept.append(value)
        return f"\0{len(kept) - 1}\0"

    text = re.sub(r":math:`([^`]+)`", lambda m: keep(_within(mathml(m[1], block=False))), text)
    text = re.sub(r":(\w+):`([^`]+)`", lambda m: keep(_reference(m, links)), text)
    text = re.sub(r"``(.+?)``", lambda m: keep(f"`{m[1]}`"), text, flags=re.DOTALL)
    text = html.escape(text, quote=False).replace("\\*", "\\*").replace("_", "\\_")
    text = re.sub(r"(?<!\\)\*", r"\\*", text)
    text = re.sub(r"(https?://[^\s)]+)", lambda m: f"<{m[1]}>".replace("\\_", "_"), text)
    return re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)


def prose(text: str, links: Links) -> str:
    """Returns paragraphs, lists, formulas and examples as Markdown."""
    out = []
    for paragraph in re.split(r"\n\s*\n", dedent(text).strip("\n")):
        lines = paragraph.split("\n")
        first = lines[0].strip()
        if first.startswith(".. math::"):
            formula = " ".join([first.removeprefix(".. math::"), *lines[1:]])
            out.append(mathml(formula, block=True))
        elif first.startswith(".. code-block::"):
            out.append("")  # its code is the next, indented paragraph
        elif first.startswith(">>>"):
            out.append("```pycon\n" + dedent(paragraph) + "\n```")
        elif all(line.startswith("    ") for line in lines):
            out.append("```python\n" + dedent(paragraph) + "\n```")
        elif ".. math::" in paragraph:  # right below a line of text
            head, _, formula = paragraph.partition(".. math::")
            out += [inline(head.strip(), links), mathml(formula, block=True)]
        elif first.startswith("| "):
            out.append("\n".join(f"- {inline(x.strip()[2:], links)}" for x in lines))
        elif re.match(r"[-*] |\d\. ", first):
            marked = [re.match(r"(\s*(?:[-*]|\d\.) )(.*)", line) for line in lines]
            out.append(
                "\n".join(
                    m[1] + inline(m[2], links) if m else inline(line, links)
                    for m, line in zip(marked, lines, strict=True)
                )
            )
        else:
            shown = inline(" ".join(line.strip() for line in lines), links)
            lead, _, rest = shown.partition(":")
            out.append(f"**{lead}.**{rest}" if lead in LEADS else shown)
    return "\n\n".join(out)


def items(text: str, links: Links) -> list[tuple[str, str]]:
    """Returns the entries ``name: text`` of a section."""
    found = re.split(r"^(?=[\w*,. ]+:\s)", dedent(text), flags=re.MULTILINE)
    result = []
    for item in filter(str.strip, found):
        name, _, what = item.partition(":")
        result.append((name.strip(), inline(" ".join(what.split()), links)))
    return result


def sections(doc: str) -> list[tuple[str, str]]:
    """Splits a docstring at its sections; the first part has no name."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    result = [("", parts[0])]
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        # A section ends where the text is no longer indented.
        inside = re.match(r"(?:[ ]{4}.*(?:\n|$)|\s*\n)*", body)
        assert inside is not None
        result.append((name, inside[0]))
        if rest := body[inside.end() :].strip():
            result.append(("", rest))
    return result


def markdown(doc: str, links: Links, *, skip: tuple[str, ...] = ()) -> str:
    """Returns a docstring as Markdown.

    Arguments:
        doc: The docstring, as ``inspect.getdoc`` gives it.
        links: Where names are documented.
        skip: Sections to leave out.
    """
    out = []
    for name, body in sections(doc):
        if name in skip:
            continue
        if name in ("Arguments", "Args", "Attributes", "Raises"):
            shown = "Arguments" if name == "Args" else name
            rows = "\n".join(
                f"| `{key}` | {value.replace('|', '&#124;')} |"
                for key, value in items(body, links)
            )
            out.append(f"**{shown}**\n\n| | |\n|---|---|\n{rows}")
        elif name:
            out.append(f"**{name}**\n\n{prose(body, links)}")
        else:
            out.append(prose(body, links))
    return "\n\n".join(part for part in out if part.strip())


def signature(name: str, thing: Any) -> str:
    """Returns how something is called, as code: one argument a line if it is long."""
    if not callable(thing):
        return name
    called: Callable[..., Any] = thing
    try:
        found = inspect.signature(called)
    except (TypeError, ValueError):
        return name
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    try:
        text = name + str(
            found.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        )
    except ValueError:
        return name
    if len(text) > 88:
        inner = text[len(name) + 1 : -1]
        text = f"{name}(\n    " + re.sub(r", (?=[\w*])", ",\n    ", inner) + ",\n)"
    return text

"""Tables that scripts write into pages that people write: between two comments, by name."""

from __future__ import annotations


def filled(text: str, name: str, body: str) -> str:
    """Returns a page with the block of that name filled.

    Arguments:
        text: The page, with the lines ``<!-- tables: NAME -->`` and ``<!-- end: NAME -->``.
        name: The name.
        body: What stands between them, in Markdown.

    Raises:
        ValueError: If the page has no such block, or several.
    """
    start, end = f"<!-- tables: {name} -->", f"<!-- end: {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have one line {start!r} and one {end!r}")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{body.strip()}\n\n{end}{after}"

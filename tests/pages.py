"""Shared code of tests of reports: a reader of pages, and the requests of a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any


class Reader(HTMLParser):
    """Collects ids, references and whether tags close."""

    VOID = frozenset({"meta", "img", "link", "br", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        result = dict(attrs)
        self.attributes.append((tag, result))
        if "id" in result:
            self.ids.append(result["id"])
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def requests(driver: Any) -> Iterator[str]:
    """The addresses that a browser has requested since the last call."""
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]

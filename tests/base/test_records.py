"""Records: fields, types and versions of files, checked in one place."""

from __future__ import annotations

import json
import math
from dataclasses import field
from typing import Any, Literal

import pytest

from fewstep.base.records import Positive, Record
from fewstep.base.sealing import CHECKSUM


class Place(Record, name="test.place", version=2, what="place"):
    title: str
    size: Positive
    level: float | None
    kind: Literal["city", "village"] = "city"
    tags: list[str] | None = None
    open: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    rest: Any = None


PLACE = Place(title="here", size=3, level=0.5)
CONTENT = {"format": "test.place", "version": 2, "title": "here", "size": 3, "level": 0.5}


def test_defaults_are_not_written_and_everything_comes_back(tmp_path):
    assert PLACE.to_record() == CONTENT
    full = Place(
        title="", size=1, level=None, kind="village", tags=["a"], open=True, about={"b": 1}
    )
    for place in (PLACE, full):
        path = place.save(tmp_path / "place.json")
        assert CHECKSUM in json.loads(path.read_text())
        assert Place.load(path) == place


def test_files_without_a_checksum_are_read_and_edited_ones_refused(tmp_path):
    path = tmp_path / "place.json"
    path.write_text(json.dumps(CONTENT))
    assert Place.load(path) == PLACE
    PLACE.save(path)
    path.write_text(path.read_text().replace("here", "there"))
    with pytest.raises(ValueError, match=r"place '.*place.json' is damaged: its checksum"):
        Place.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "test.other"}, "the place has the format 'test.other', not 'test.place'"),
        ({"version": 3}, "the place has version 3; this fewstep reads version 2"),
        ({"extra": 1}, "the place has an unknown key 'extra'"),
        ({"title": 1}, "'title' of the place must be a text, got 1"),
        ({"size": 0}, "'size' of the place must be a positive integer, got 0"),
        ({"size": True}, "must be a positive integer, got True"),
        ({"size": 2.0}, "must be a positive integer"),
        ({"level": "x"}, "'level' of the place must be a finite number or null, got 'x'"),
        ({"level": 10**400}, "must be a finite number"),
        ({"level": math.nan}, "must be a finite number"),
        ({"level": True}, "must be a finite number"),
        ({"kind": "hamlet"}, "must be one of city, village"),
        ({"tags": ["a", 1]}, "must be a list, each a text or null"),
        ({"open": 1}, "must be true or false"),
        ({"about": []}, "must be an object"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Place.from_record({**CONTENT, **change})


def test_a_field_that_is_missing_is_named(tmp_path):
    for name in ("title", "size", "level"):
        content = {key: value for key, value in CONTENT.items() if key != name}
        with pytest.raises(ValueError, match=f"the place has no '{name}'"):
            Place.from_record(content)
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        Place.from_record([])
    with pytest.raises(ValueError, match="cannot be read"):
        Place.load(tmp_path / "nowhere.json")

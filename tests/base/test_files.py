"""Files: atomic writes, and an error for a damaged one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import stat

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewstep.base.files import (
    LITTER_AGE,
    MOST_HEADER,
    MOST_JSON,
    loads_json,
    read_json,
    read_metadata,
    read_tensors,
    read_tensors_and_metadata,
    sha256,
    sweep,
    write_atomic,
    write_json,
    write_rows,
    write_tensors,
)

FUZZ = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_writes_and_makes_folders(tmp_path):
    path = write_atomic(tmp_path / "a" / "b.txt", "é")
    assert path.read_bytes() == "é".encode()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content(tmp_path, monkeypatch, where):
    path = write_atomic(tmp_path / "file.json", "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match=r"no space left: 3 bytes.*file.json"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_interrupt_leaves_the_old_content(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "file.json", "old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_write_a_new_file_one_succeeds(tmp_path, monkeypatch, links):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = write_atomic(tmp_path / "file.json", "first", new=True)
    with pytest.raises(FileExistsError, match=r"file\.json"):
        write_atomic(path, "second", new=True)
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file.json"]


def test_json_keeps_floats_and_refuses_nan(tmp_path):
    value = {"a": [0.1, 1e-310, -0.0, 2**60], "b": None}
    assert repr(read_json(write_json(tmp_path / "x.json", value))) == repr(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", [float("nan")])
    assert not (tmp_path / "y.json").exists()


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"model '.*x.json' cannot be read: No such file"):
        read_json(tmp_path / "x.json", what="model")
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match=r"x.json' is not valid JSON: the key 'a' is repeated"):
        read_json(tmp_path / "x.json", what="model")


def test_nesting_is_limited_before_anybody_prints_it():
    assert loads_json("[" * 64 + "]" * 64, what="it") == eval("[" * 64 + "]" * 64)
    for depth in (65, 900, 10**6):
        with pytest.raises(ValueError, match="it is not valid JSON: it is nested too deeply"):
            loads_json("[" * depth + "]" * depth, what="it")


def test_tensors_round_trip_with_metadata(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).t(),
        "b": torch.arange(5),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).half(),
    }
    path = write_tensors(tmp_path / "t.safetensors", tensors, {"step": "7"})
    again = read_tensors(path)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert read_metadata(path) == {"step": "7"}
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 100, pickle.dumps(Bomb()), b"PK\3\4"]
)
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(ValueError, match=r"t.safetensors' is not a safetensors file"):
            read(path)


def test_missing_tensors(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_tensors(tmp_path / "none.safetensors")


@FUZZ
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_damaged_tensors(tmp_path, place, byte, cut):
    path = write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(4), "b": torch.ones(2, 2)})
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] = byte
    path.write_bytes(data[:place] if cut else data)
    try:
        found = read_tensors(path)
    except ValueError:
        return
    assert sum(t.numel() for t in found.values()) <= 32


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_every_flipped_bit_is_found(tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    tensors = {
        "b": torch.arange(5.0),
        "a": torch.zeros(0, 3),
        "c": torch.ones(3, dtype=torch.bool),
    }
    value = {"b": [1, 0.1], "a": {"text": "é"}}

    def read():
        if suffix == "json":
            return read_json(path, checksum=True)
        return read_tensors_and_metadata(path, checksum=True)

    if suffix == "json":
        write_json(path, value)
        assert read() == read_json(path) == value
    else:
        write_tensors(path, tensors, {"y": "1", "x": "2"})
        assert read()[1] == read_metadata(path) == {"y": "1", "x": "2"}
        assert all(torch.equal(read()[0][k], v) for k, v in tensors.items())
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        if suffix == "json" and json.loads(content) == _lenient(flipped):
            continue  # white space
        with pytest.raises(ValueError, match=f"file.{suffix}"):
            read()


def _lenient(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_an_edited_file_says_what_to_do(tmp_path):
    path = write_json(tmp_path / "recipe.json", {"nfe": 5})
    path.write_text(path.read_text().replace("5,", "6,", 1))
    with pytest.raises(ValueError, match=r"recipe.json' is damaged.*delete its 'content_sha256'"):
        read_json(path)
    path.write_text(json.dumps({"nfe": 6}))
    assert read_json(path) == {"nfe": 6}
    with pytest.raises(ValueError, match="it has no checksum"):
        read_json(path, checksum=True)


def test_the_layout_of_a_file_may_change(tmp_path):
    path = write_json(tmp_path / "file.json", {"a": 1, "b": [2.5]})
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_json(path, checksum=True) == {"a": 1, "b": [2.5]}


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2)}
    one = write_tensors(tmp_path / "one", tensors, {"x": "1", "y": "2"})
    two = write_tensors(tmp_path / "two", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert one.read_bytes() == two.read_bytes()


def test_litter_is_swept_and_nothing_else(tmp_path):
    (tmp_path / ".a.json.0123456789abcdef.tmp").write_text("")
    for name in ("a.json", ".a.tmp", ".b.0123.tmp"):
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.tmp", ".b.0123.tmp", "a.json"]
    sweep(tmp_path / "absent")


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX")
@pytest.mark.parametrize("new", [False, True])
def test_a_rename_is_on_the_disk_when_a_write_returns(tmp_path, monkeypatch, new):
    events, fsync, rename, link = [], os.fsync, os.replace, os.link

    def synced(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), rename(*names)))
    monkeypatch.setattr(os, "link", lambda *names: (events.append("rename"), link(*names)))
    write_atomic(tmp_path / "a" / "b" / "file", "content", new=new)
    # The two new folders first, each in its parent.
    assert events == ["folder", "folder", "file", "rename", "folder"]


@pytest.mark.parametrize("number", [22, 5])
def test_file_systems_that_cannot_sync_folders_are_no_error(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refused(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    if number == 22:
        write_atomic(tmp_path / "file", "content")
    else:
        with pytest.raises(OSError, match="Input/output"):
            write_atomic(tmp_path / "file", "content")


@pytest.mark.parametrize("new", [False, True])
def test_a_temporary_file_that_another_process_swept_is_written_again(tmp_path, monkeypatch, new):
    replace, link, swept = os.replace, os.link, []

    def after_a_sweep(original):
        def rename(temporary, path):
            if not swept:
                swept.append(temporary)
                os.unlink(temporary)
            original(temporary, path)

        return rename

    monkeypatch.setattr(os, "replace", after_a_sweep(replace))
    monkeypatch.setattr(os, "link", after_a_sweep(link))
    assert write_atomic(tmp_path / "file", "content", new=new).read_text() == "content"
    assert len(swept) == 1
    assert os.listdir(tmp_path) == ["file"]


# --- limits and full disks ----------------------------------------------------------------------


def test_large_json_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with open(path, "wb") as stream:
        stream.truncate(MOST_JSON + 1)  # a hole: it takes no space

    def parse(*_, **__):
        raise AssertionError("it was parsed")

    monkeypatch.setattr(json, "loads", parse)
    with pytest.raises(ValueError, match=r"plan '.*plan.json' has 16.8 MB; at most 16.8 MB"):
        read_json(path, what="plan")
    with pytest.raises(ValueError, match="the plan has"):
        loads_json("[" + " " * MOST_JSON + "]", what="the plan")


def test_a_header_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    for length, size in ((1 << 62, 100), (MOST_HEADER + 8, MOST_HEADER + 64)):
        with open(path, "wb") as stream:
            stream.write(length.to_bytes(8, "little") + b"{}")
            stream.truncate(size)
        for read in (read_tensors, read_metadata):
            with pytest.raises(ValueError, match="header"):
                read(path)


def test_files_without_a_checksum_are_named_once(tmp_path, caplog):
    path, other = tmp_path / "old.json", tmp_path / "foreign.json"
    for file in (path, other):
        file.write_text("{}")
    write_tensors(tmp_path / "old.safetensors", {"a": torch.ones(2)}, checksum=False)
    with caplog.at_level("INFO", "fewstep"):
        for _ in range(2):
            read_json(path)
            read_json(other, foreign=True)
            read_tensors(tmp_path / "old.safetensors")
    names = [text.split()[0] for text in caplog.messages]
    assert names == [str(tmp_path / name) for name in ("old.json", "old.safetensors")]
    assert all("has no checksum" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "ulimit"),
    ],
)
@pytest.mark.parametrize("write", ["json", "tensors", "rows"])
def test_a_full_disk_names_the_file_and_the_bytes(tmp_path, monkeypatch, number, words, write):
    path = tmp_path / "folder" / "file"

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    rows = [torch.zeros(500, 2)] * 2
    writes = {
        "json": lambda: write_json(path, {"a": [0] * 1000}),
        "tensors": lambda: write_tensors(path, {"a": torch.zeros(1000, 2)}),
        "rows": lambda: write_rows(path, "a", (1000, 2), lambda: iter(rows)),
    }
    with pytest.raises(OSError, match=words) as caught:
        writes[write]()
    size = "5.1 kB" if write == "json" else r"8\.\d+ kB"
    assert re.search(rf"{size} of content could not be written", caught.value.strerror)
    assert "give the same command again" in caught.value.strerror
    assert caught.value.errno == number
    assert caught.value.filename == str(path)
    assert not any(tmp_path.glob("**/*.tmp"))


def test_litter_of_others_is_left_alone(tmp_path):
    old, new = (tmp_path / f".{name}.0123456789abcdef.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    sweep(tmp_path, older=LITTER_AGE)
    assert os.listdir(tmp_path) == [new.name]
    sweep(tmp_path, of="old")
    assert os.listdir(tmp_path) == [new.name]
    sweep(tmp_path, of="new")
    assert os.listdir(tmp_path) == []

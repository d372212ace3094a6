"""``fewstep verify``: files and folders of every kind, whole and damaged."""

from __future__ import annotations

import json
import shutil

import pytest

from every_file import KINDS
from fewstep.base.files import write_json
from fewstep.metrics.reference import Reference
from tiny_models import write_tiny

CHEAP = [
    kind for kind in KINDS if not kind.costly and kind.name not in ("tuned recipe", "profile")
]


def states(text):
    """The number of files by state, from the lines of the command."""
    lines = text.splitlines()[:-1]
    return [line[:16].strip() for line in lines if line[:16].strip() in STATES]


STATES = ("ok", "damaged", "without checksum", "unknown")


@pytest.mark.parametrize("kind", CHEAP, ids=lambda kind: kind.name)
def test_every_kind_is_recognised(kind, tmp_path, command):
    folder = tmp_path / "folder"
    files = kind.made(folder)
    text = command("verify", folder)
    for file in files:
        line = next(line for line in text.splitlines() if str(folder / file) in line)
        assert line.startswith("ok "), line
        assert line.endswith(")"), line  # with its kind
    for file in files:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 16
        (folder / file).write_bytes(content)
    text = command("verify", folder, code=1)
    for file in files:
        line = next(line for line in text.splitlines() if str(folder / file) in line)
        assert line.startswith("damaged"), line


def test_files_of_others_and_edited_ones(tmp_path, command):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    with_version = {"format": "fewstep.model", "version": 99}
    write_json(tmp_path / "later.json", with_version)
    assert "there is no file that this fewstep reads" in command("verify", tmp_path, code=1)
    write_tiny(tmp_path / "model")
    about = tmp_path / "model" / "model.json"
    content = json.loads(about.read_text())
    del content["content_sha256"]
    about.write_text(json.dumps(content))
    text = command("verify", tmp_path)
    assert states(text) == ["unknown"] * 3 + ["without checksum", "ok"]
    assert "of version 99; this fewstep reads 1" in text
    assert "5 files: 1 ok, 1 without checksum, 3 unknown" in text


def test_weights_of_another_model_and_missing_ones(tmp_path, command):
    write_tiny(tmp_path / "one")
    write_tiny(tmp_path / "two", seed=1)
    weights = tmp_path / "one" / "model.safetensors"
    shutil.copy(tmp_path / "two" / "model.safetensors", weights)
    assert "its checksum is not the one in model.json" in command("verify", weights, code=1)
    weights.unlink()
    assert "its weights model.safetensors are missing" in command(
        "verify", tmp_path / "one", code=1
    )
    assert states(command("verify", tmp_path / "two")) == ["ok", "ok"]


def test_missing_shards_litter_logs_pages_and_pictures(tmp_path, command):
    from PIL import Image

    (tmp_path / ".a.json.0123456789abcdef.tmp").write_text("")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"ste')
    (tmp_path / "report.html").write_text("<!doctype html><html>")
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    lines = command("verify", tmp_path, code=1).splitlines()
    assert [line.split()[0] for line in lines[-5:-1]] == ["unknown", "ok", "damaged", "damaged"]
    assert "line 2 is not JSON" in lines[-3]
    picture = bytearray((tmp_path / "grid.png").read_bytes())
    picture[-20] ^= 1
    (tmp_path / "grid.png").write_bytes(picture)
    assert "its checksums do not match" in command("verify", tmp_path / "grid.png", code=1)


def test_a_store_with_a_missing_shard(tmp_path, command):
    store = next(kind for kind in KINDS if kind.name == "store")
    store.made(tmp_path / "f")
    (tmp_path / "f" / "store" / "shard-00001.safetensors").unlink()
    assert "1 of 3 shards are missing, the first is 1" in command("verify", tmp_path, code=1)


def test_embedded_files_are_whole(command):
    from fewstep.metrics import reference

    text = command("verify", reference.HERE)
    assert "damaged" not in states(text)
    assert states(text).count("unknown") == 1  # the licence
    assert Reference.load("fashion").name == "fashion"


def test_mistakes(tmp_path, command):
    assert "give at least one PATH" in command("verify", code=2)
    assert "there is no file or folder" in command("verify", tmp_path / "none", code=2)

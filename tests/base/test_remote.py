"""URLs: outputs appear complete, and behave as folders of this machine do."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import fewstep
from fewstep.base import staging
from fewstep.base.files import read_tensors
from fewstep.base.staging import owned, staged
from fewstep.base.urls import OWNER, Remote, is_remote
from fewstep.cli import run

fsspec = pytest.importorskip("fsspec")

SAMPLE = ["sample", "mixture-smooth", "-n", "12", "--nfe", "3", "--batch-size", "5"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "fewstep" / "remote"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return {"memory": "memory://bucket/out", "file": f"file://{tmp_path}/bucket/out"}[
        request.param
    ]


def test_urls_are_told_from_paths():
    assert is_remote("s3://bucket/x")
    assert not any(is_remote(path) for path in ("runs/x", "C://x", "C:\\x", "/tmp/a:b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope://x/y", "Protocol not known: nope; fsspec knows"),
        ("memory://", "PROTOCOL://PLACE"),
    ],
)
def test_urls_that_lead_nowhere(text, message):
    with pytest.raises(ValueError, match=message):
        Remote(text)


def test_missing_packages_are_named(monkeypatch):
    if not pytest.importorskip("importlib.util").find_spec("s3fs"):
        with pytest.raises(ValueError, match="needs another package: Install s3fs"):
            Remote("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"needs fsspec: pip install"):
        Remote("memory://bucket/x")


def test_an_object_appears_complete_or_not_at_all(url, monkeypatch, tmp_path):
    remote = Remote(url)
    remote.write("a.bin", b"whole")
    seen = []
    original = type(remote.fs).put_file

    def put(self, local, place, **options):
        original(self, local, place, **options)
        seen.append(dict(remote.sizes()))
        if len(seen) == 2:
            raise OSError("cut")

    monkeypatch.setattr(type(remote.fs), "put_file", put)
    file = tmp_path / "b.bin"
    file.write_bytes(b"12345678")
    remote.put(file, "b.bin")
    if remote.protocol == "file":
        assert seen[0] == {"a.bin": 5}  # under another name while it is copied
        file.write_bytes(b"123")
        with pytest.raises(OSError, match="cut"):
            remote.put(file, "b.bin")
    assert remote.sizes() == {"a.bin": 5, "b.bin": 8}
    assert not [p for p in remote.fs.find(remote.root) if p.endswith(".tmp")]


def test_a_sample_run_writes_what_it_writes_here(url, tmp_path, capsys, cache):
    assert run([*SAMPLE, "--out", str(tmp_path / "here")]) == 0
    capsys.readouterr()
    assert run([*SAMPLE, "--out", url]) == 0
    text = capsys.readouterr().out
    assert f"wrote {url}/grid.png" in text
    assert f"--recipe {url}/recipe.json" in text
    assert str(cache) not in text
    remote = Remote(url)
    names = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
    assert {name: remote.read(name) for name in remote.sizes()} == names
    assert not list(cache.iterdir())
    # An existing result is refused, as here; a recipe is read from its URL.
    assert run([*SAMPLE, "--out", url]) == 2
    assert f"'{url}' exists; give --overwrite" in capsys.readouterr().err
    assert not list(cache.iterdir())
    again = ["sample", "mixture-smooth", "--recipe", f"{url}/recipe.json", "-n", "2"]
    assert run([*again, "--out", str(tmp_path / "two")]) == 0
    first = read_tensors(tmp_path / "two" / "samples.safetensors")["samples"]
    here = read_tensors(tmp_path / "here" / "samples.safetensors")["samples"]
    torch.testing.assert_close(first, here[:2])


def test_what_failed_leaves_nothing_and_is_resumed(url, cache):
    def interrupted() -> None:
        with staged(url) as local:
            local.mkdir()
            (local / "part").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not Remote(url).sizes()
    with staged(url) as local:
        assert (local / "part").read_text() == "1"
    assert Remote(url).sizes() == {"part": 1}


def test_a_second_writer_is_refused(url):
    with staged(url), pytest.raises(ValueError, match="is being written by process"), staged(url):
        pass
    with staged(url):
        pass


def test_the_owner_object_of_a_dead_process_is_taken_over(url, monkeypatch):
    remote = Remote(url)
    with owned(remote):
        owner = dict(json.loads(remote.fs.cat_file(remote.root + OWNER)))
    remote.fs.pipe_file(remote.root + OWNER, json.dumps({**owner, "process_start": "1"}).encode())
    with owned(remote):
        pass
    # Of another machine: only when it has had no heartbeat for long.
    monkeypatch.setattr(staging, "POLL", 0.0)
    monkeypatch.setattr(staging, "PATIENCE", 0.05)
    remote.fs.pipe_file(remote.root + OWNER, json.dumps({**owner, "boot": "x"}).encode())
    with owned(remote):
        pass
    assert not remote.fs.exists(remote.root + OWNER)


def test_processes_of_a_launch_are_refused(url, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process for each URL"), staged(url):
        pass


def test_plans_recipes_and_profiles_by_url(url):
    plan = fewstep.plan("tab2", fewstep.schedule("vp-linear"), nfe=4)
    plan.save(f"{url}/plan.json")
    assert fewstep.Plan.load(f"{url}/plan.json").to_json() == plan.to_json()
    recipe = fewstep.SamplerRecipe(name="tab2", nfe=4)
    recipe.save(f"{url}/recipe.json")
    assert fewstep.SamplerRecipe.load(f"{url}/recipe.json") == recipe
    profile = fewstep.fit(fewstep.load("mixture-smooth"), 4, n=4)
    profile.save(f"{url}/profile.json")
    assert fewstep.Profile.load(f"{url}/profile.json") == profile
    with pytest.raises(ValueError, match="cannot be read"):
        fewstep.Plan.load(f"{url}/none.json")


def test_a_store_is_written_and_read_shard_by_shard(url, tmp_path, monkeypatch, capsys, cache):
    model = fewstep.load("mixture-smooth")
    how = {"n": 10, "solver": "ddim", "nfe": 3, "keep": 2, "shard_size": 4, "batch_size": 4}
    here = fewstep.record(model, tmp_path / "here", **how)
    original, kept = Remote.put, []

    def put(self, file, name):
        original(self, file, name)
        kept.append(name)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Remote, "put", put)
    with pytest.raises(KeyboardInterrupt):
        fewstep.record(model, url, **how)
    assert kept[0] == "manifest.json"
    assert set(Remote(url).sizes()) == set(kept)
    made = fewstep.record(model, url, **how)
    # The manifest and one shard are there; the other was cut off before it was noted as copied.
    assert (kept.count("manifest.json"), len(kept)) == (1, 5)
    rows = [9, 0, 5]
    assert torch.equal(made.read(rows).states, here.read(rows).states)
    remote = Remote(url)
    for name in ("manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3))):
        assert remote.read(name) == (tmp_path / "here" / name).read_bytes()
    with pytest.raises(ValueError, match="begun with other settings"):
        fewstep.record(model, url, **{**how, "seed": 1})
    assert run(["record", "mixture-smooth", "--verify", url]) == 0
    capsys.readouterr()
    again = [
        "record",
        "mixture-smooth",
        "-n",
        "4",
        "--solver",
        "ddim",
        "--nfe",
        "2",
        "--keep",
        "1",
    ]
    assert run([*again, "--overwrite", "--out", url]) == 0
    assert f"wrote {url}: 4 trajectories" in capsys.readouterr().out
    assert set(remote.sizes()) == {"manifest.json", "shard-00000.safetensors"}

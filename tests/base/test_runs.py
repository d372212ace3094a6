"""Folders of runs: identity, locks, parts with checksums, litter."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fewstep.base import locks, runs
from fewstep.base.files import check_writable, read_json, write_json
from fewstep.base.locks import Lock
from fewstep.base.runs import RunFolder, difference, hash_inputs, locked

INPUTS = {"model": "a" * 64, "seed": 0, "sampler": {"name": "tab3"}}


def folder_at(path):
    return RunFolder(path, "test run", outputs=["result.json", "recipe-*.json"])


def begin(path, inputs=INPUTS, **options):
    folder = folder_at(path)
    with folder.running(inputs, **options):
        folder.write_record("begun", 1)
    return folder


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owner_on(path, *, host=None, **changes):
    """A lock of another process: of this machine, or of another host."""
    lock = Lock(path)
    assert lock.take()
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"host": host or owner["host"], "token": "x"} | changes))


# --- identity -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"\(seed 0, now 1\)"),
        ({"model": "b" * 64}, r"\(another model\)"),
        ({"sampler": {"name": "ddim"}}, r"\(another sampler\)"),
        ({"model": "b" * 64, "seed": 1}, r"\(seed 0, now 1\)"),
        ({"new": True}, r"\(new None, now True\)"),
    ],
)
def test_a_run_with_other_inputs_is_refused_and_says_which(tmp_path, changes, words):
    begin(tmp_path)
    with pytest.raises(ValueError, match=rf"unfinished run with other settings {words}"):
        begin(tmp_path, INPUTS | changes)
    begin(tmp_path, INPUTS | changes, overwrite=True)
    begin(tmp_path, INPUTS | changes)


def test_files_are_inputs_by_their_content(tmp_path):
    data = tmp_path / "data"
    (data / "cats").mkdir(parents=True)
    (data / "cats" / "one.png").write_bytes(b"1")
    (data / "two.png").write_bytes(b"2")
    before = {"data": hash_inputs(data)}
    (data / ".two.png.0123456789abcdef.tmp").write_bytes(b"litter")
    os.utime(data / "two.png", (0, 0))
    assert difference(before, {"data": hash_inputs(data)}) is None
    (data / "out").mkdir()
    (data / "out" / "new").write_text("")
    assert difference(before, {"data": hash_inputs(data, without=data / "out")}) is None
    (data / "out" / "new").unlink()
    (data / "cats" / "one.png").write_bytes(b"3")  # of the same size
    changed = {"data": hash_inputs(data)}
    assert difference(before, changed) == "data: the file 'cats/one.png' has changed"
    (data / "cats" / "one.png").write_bytes(b"1")
    (data / "three.png").write_bytes(b"3")
    assert difference(before, {"data": hash_inputs(data)}) == "data: the file 'three.png' is new"
    (data / "three.png").unlink()
    (data / "two.png").unlink()
    assert difference(before, {"data": hash_inputs(data)}) == "data: the file 'two.png' is gone"
    assert hash_inputs(data / "cats" / "one.png")["count"] == 1
    assert hash_inputs(None) is hash_inputs("fashion") is None


def test_of_very_many_files_only_the_digest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "MOST_LISTED", 1)
    for name in "ab":
        (tmp_path / name).write_text(name)
    before = {"data": hash_inputs(tmp_path)}
    assert "files" not in before["data"]
    (tmp_path / "b").write_text("c")
    assert difference(before, {"data": hash_inputs(tmp_path)}) == "another data"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"model": "m"}), "has the format None, not 'fewstep.run'"),
        (json.dumps([1]), "must be a JSON object, got list"),
        ("{", "is not valid JSON"),
        (json.dumps({"format": "fewstep.run", "version": 99}), "has version 99"),
        (
            json.dumps({"format": "fewstep.run", "version": 1, "what": "study", "inputs": {}}),
            "unfinished study",
        ),
    ],
)
def test_states_that_cannot_be_resumed_are_one_sentence(tmp_path, content, words):
    (tmp_path / "unfinished.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        begin(tmp_path)
    begin(tmp_path, overwrite=True)
    begin(tmp_path)


def test_a_flipped_state_is_refused(tmp_path):
    folder = begin(tmp_path)
    folder.state.write_text(folder.state.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="checksum does not match"):
        begin(tmp_path, INPUTS | {"seed": 1})


# --- parts and results --------------------------------------------------------------------------


def test_results_are_not_overwritten_unless_asked_for(tmp_path):
    folder = folder_at(tmp_path / "out")
    with folder.running(INPUTS):
        folder.write_record("a", 1)
        write_json(tmp_path / "out" / "recipe-5.json", {})
        folder.finish()
    assert os.listdir(tmp_path / "out") == ["recipe-5.json"]
    with pytest.raises(ValueError, match="exists; give --overwrite or another --out"):
        begin(tmp_path / "out")
    begin(tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["parts", "unfinished.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        begin(tmp_path / "file")


def test_parts_are_read_again_unless_damaged_or_of_other_inputs(tmp_path):
    folder, made = folder_at(tmp_path), []

    def record():
        made.append(1)
        return [0.1, None]

    with folder.running(INPUTS):
        assert folder.read_tensors("x") is None
        folder.write_tensors("x", {"a": torch.arange(4)})
        assert folder.record("y", record) == folder.record("y", record) == [0.1, None]
        assert made == [1]
    again = folder_at(tmp_path)
    with again.running(INPUTS):
        assert torch.equal(again.read_tensors("x")["a"], torch.arange(4))
        assert again.record("y", record) == [0.1, None]
        assert made == [1]
        for path in (again.parts / "x.safetensors", again.parts / "y.json"):
            content = path.read_bytes()
            for place in range(0, len(content), 7):
                flipped = bytearray(content)
                flipped[place] ^= 4
                path.write_bytes(flipped)
                read = again.read_tensors("x") if path.suffix == ".safetensors" else None
                assert read is None
                assert again.read_record("y") is None or path.suffix == ".safetensors"
            path.write_bytes(content)
    kept = {path.name: path.read_bytes() for path in folder.parts.iterdir()}
    other = folder_at(tmp_path)
    with other.running(INPUTS | {"seed": 1}, overwrite=True):
        other.parts.mkdir()
        for name, content in kept.items():
            (other.parts / name).write_bytes(content)
        assert other.read_tensors("x") is other.read_record("y") is None


def test_litter_of_killed_runs_is_swept(tmp_path):
    folder = begin(tmp_path)
    for place in (tmp_path, folder.parts):
        (place / ".x.json.0123456789abcdef.tmp").write_text("")
    (tmp_path / ".mine.tmp").write_text("")
    begin(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "parts", "unfinished.json"]
    assert os.listdir(folder.parts) == ["begun.json"]


def test_a_run_that_has_nothing_yet_may_be_begun_anew(tmp_path):
    folder = RunFolder(tmp_path, "test run", outputs=["result.json"], forgets_empty=True)
    with folder.running(INPUTS):
        pass
    with pytest.raises(ValueError, match="seed 0, now 1"):
        begin(tmp_path, INPUTS | {"seed": 1})
    with folder.running(INPUTS | {"seed": 1}):
        folder.write_record("begun", 1)
    with pytest.raises(ValueError, match="seed 1, now 0"), folder.running(INPUTS):
        pass


def test_a_finished_run_may_be_resumed_if_its_folder_says_of_what(tmp_path):
    folder = folder_at(tmp_path)
    write_json(tmp_path / "result.json", {})
    with pytest.raises(ValueError, match="has a run with other settings"):
        with folder.running(INPUTS, earlier=lambda: INPUTS | {"seed": 1}):
            pass
    with folder.running(INPUTS, earlier=lambda: INPUTS):
        assert folder.state.exists()
        assert (tmp_path / "result.json").exists()
        folder.finish()
    with folder.running(INPUTS, earlier=lambda: INPUTS, overwrite=True):
        assert not (tmp_path / "result.json").exists()


def test_a_digest_decides_and_its_files_are_named():
    before = {"images": {"sha256": "a" * 64, "files": {"1.png": {"sha256": "1"}}}}
    renamed = {"images": {"sha256": "a" * 64, "files": {"2.png": {"sha256": "1"}}}}
    other = {"images": {"sha256": "b" * 64, "files": {"1.png": {"sha256": "2"}}}}
    assert difference(before, renamed) is None
    assert difference(before, other) == "images: the file '1.png' has changed"
    # Earlier versions wrote the digest alone.
    assert difference({"images": "a" * 64}, before) is None
    assert difference({"images": "b" * 64}, before) == "another images"


# --- locks --------------------------------------------------------------------------------------


def test_two_runs_at_once_are_refused_with_the_owner(tmp_path):
    out = tmp_path / "out"
    with folder_at(out).running(INPUTS):
        with pytest.raises(ValueError, match=f"by another run \\(process {os.getpid()} on "):
            begin(out, overwrite=True)
        assert read_json(out / "unfinished.json")["inputs"] == INPUTS
    begin(out)


def test_a_folder_that_was_only_locked_is_not_left(tmp_path):
    with locked(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="processes are looked up on POSIX")
def test_the_lock_of_a_process_that_ended_is_taken(tmp_path):
    path = tmp_path / ".lock"
    owner_on(path, pid=dead_process())
    assert Lock(path).take()
    path.unlink()
    # The number of the process is another's now.
    owner_on(path, process_start="1")
    assert Lock(path).take()


def test_the_age_of_a_lock_elsewhere_is_measured_here(tmp_path, monkeypatch):
    path, now = tmp_path / ".lock", [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    owner_on(path, host="elsewhere")
    os.utime(path, (0, 0))  # whatever the clocks say
    lock = Lock(path)
    assert not lock.take()
    now[0] += locks.PATIENCE - 1
    assert not lock.take()
    os.utime(path, (-5, -5))  # a heartbeat by a clock that went back
    assert not lock.take()
    now[0] += locks.PATIENCE - 1
    assert not lock.take()
    now[0] += 2
    assert lock.take()
    lock.drop()
    assert not path.exists()


def test_an_unreadable_lock_does_not_block_for_long(tmp_path, monkeypatch):
    path, now = tmp_path / ".lock", [1000.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    path.write_text("")
    assert not Lock(path).take()
    now[0] += locks.UNREADABLE_PATIENCE + 1
    assert Lock(path).take()


def test_a_run_waits_for_a_sign_of_life_from_elsewhere(tmp_path, monkeypatch):
    owner_on(tmp_path / ".lock", host="elsewhere")
    sleeps, stages = [], []
    now = [0.0]

    class Recorder:
        def stage(self, name, total=None, *, done=0):
            stages.append(name)

        def tick(self, amount=1, note=""):
            pass

    def sleep(seconds):
        sleeps.append(seconds)
        now[0] += seconds
        if len(sleeps) == 40:
            os.utime(tmp_path / ".lock", (1, 1))

    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.time, "sleep", sleep)
    with pytest.raises(ValueError, match="on elsewhere"), locked(tmp_path, progress=Recorder()):
        pass
    assert len(sleeps) == 40
    assert len(stages) == 1
    assert "waiting for a heartbeat of process" in stages[0]


def test_only_the_owner_drops_its_lock(tmp_path):
    first, second = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    assert first.take()
    assert not second.take()
    second.drop()
    assert first.path.exists()
    first.drop()
    assert second.take()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        Lock(tmp_path / ".lock").take()
    assert os.listdir(tmp_path) == []


def test_heartbeats_are_given_while_a_lock_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.001)
    lock = Lock(tmp_path / ".lock")
    assert lock.take()
    os.utime(lock.path, (0, 0))
    with lock.held():
        while lock.path.stat().st_mtime == 0:
            pass
    assert not lock.path.exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="states are read in /proc")
def test_a_killed_process_that_nobody_waited_for_has_no_lock(tmp_path):
    path = tmp_path / ".lock"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if Lock(path).take() else 1)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended and is still listed
    try:
        os.kill(pid, 0)
        assert path.exists()
        assert Lock(path).take()
    finally:
        os.waitpid(pid, 0)


def test_parts_that_a_killed_finish_left_are_removed(tmp_path):
    folder = begin(tmp_path)
    with folder.running(INPUTS):
        folder.write_record("a", 1)
    write_json(tmp_path / "result.json", {})
    folder.state.unlink()  # a process was killed in finish()
    (tmp_path / "parts" / "of mine.txt").write_text("")
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        begin(tmp_path)
    assert os.listdir(tmp_path / "parts") == ["of mine.txt"]
    assert (tmp_path / "result.json").exists()


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path):
    """Its process was suspended for so long that another machine took it for dead."""
    folder = folder_at(tmp_path)
    path = tmp_path / ".lock"
    with folder.running(INPUTS):
        folder.write_record("a", 1)
        path.unlink()
        owner_on(path, host="elsewhere")
        os.utime(path, (1, 1))
        folder._lock.renew()
        assert path.stat().st_mtime == 1  # the other's heartbeat is its own
        with pytest.raises(ValueError, match="was taken over by another run"):
            folder.write_record("b", 1)
        with pytest.raises(ValueError, match="was taken over by another run"):
            folder.finish()
    assert path.exists()
    assert os.listdir(folder.parts) == ["a.json"]


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    """It was waited for without end: no lock could be taken, and none was there."""
    dangling = tmp_path / "results"
    dangling.symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"is a link to .*unmounted', which does not exist"):
        with locked(dangling):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        with locked(tmp_path / "file" / "below"):
            pass
    assert not (tmp_path / "unmounted").exists()


def test_a_path_is_checked_before_long_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "profile.json")
    for wrong, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "profile.json", "is a file and no folder"),
    ]:
        with pytest.raises(OSError, match=message):
            check_writable(wrong)
    with pytest.raises(TypeError, match="path must be a path, got int"):
        check_writable(5)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]

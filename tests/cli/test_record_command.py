from __future__ import annotations

import json
import re

import pytest
import torch

import fewstep
from fewstep.cli import record as record_command
from fewstep.cli import run
from fewstep.trajectories import TrajectoryStore, writing
from tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a class-conditional model of 8 x 8 images; its name needs quotes."""
    return str(write_tiny(tmp_path_factory.mktemp("a model")))


def test_a_store_from_record_to_verify_to_stats(tiny, tmp_path, command, monkeypatch):
    monkeypatch.setattr(record_command, "FEW", 2)
    out = tmp_path / "store"
    words = ["record", tiny, "-n", 10, "--nfe", 5, "--shard-size", 4, "--seed", 3]
    words += ["--class-labels", "shoe,0", "--guidance", 1.5, "--keep", "uniform:2"]
    text = command(*words, "--out", out)
    assert f"wrote {out}: 10 trajectories, 3 states each" in text
    assert f"next: fewstep distill '{tiny}' {out} --out {out}-operator" in text
    store = TrajectoryStore.open(out)
    batch = store.read(range(10))
    assert batch.conditions["class_labels"].tolist() == [1, 0] * 5
    assert store.manifest.guidance == 1.5
    assert store.manifest.about == {"model": tiny}
    # The last knots of the plan are samples.
    start = fewstep.load(tiny)
    recipe = fewstep.SamplerRecipe.from_json(json.dumps(store.manifest.sampler))
    samples = fewstep.sample(
        start, 10, recipe=recipe, seed=3, class_labels=[1, 0] * 5, guidance=None
    )
    assert torch.allclose(batch.states[:, -1], samples, atol=2e-2, rtol=1e-2)

    text = command("record", "--verify", out)
    assert "is intact: 3 shards" in text
    assert "integrated again" in text
    text = command("record", "--stats", out)
    assert "10 trajectories" in text
    assert re.search(r"suggested: --basis (dct|dft) --modes \d+", text)
    assert "0.4995" not in text
    assert re.search(r"^ +1 +499\.5 ", text, re.MULTILINE)  # frame 1 of uniform:2


def test_an_interrupted_run_goes_on_and_says_how(tiny, tmp_path, command, monkeypatch, capsys):
    subcommand = ["record", tiny, "-n", 6, "--nfe", 2, "--keep", 1, "--shard-size", 2, "--out"]
    command(*subcommand, tmp_path / "whole")
    plain, calls = writing.write_shard, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(writing, "write_shard", interrupted)
    assert run([str(a) for a in [*subcommand, tmp_path / "cut"]]) == 130
    assert "files are saved; to resume: fewstep record" in capsys.readouterr().err
    monkeypatch.undo()
    assert "2 of 3 shards are missing" in command("record", "--stats", tmp_path / "cut", code=2)
    assert "is missing" in command("record", "--verify", tmp_path / "cut", code=1)
    command("record", tiny, "--out", tmp_path / "cut")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_damage_is_told_with_its_mend(tiny, tmp_path, command):
    command(
        "record",
        tiny,
        "-n",
        4,
        "--nfe",
        2,
        "--keep",
        1,
        "--shard-size",
        2,
        "--out",
        tmp_path / "s",
    )
    path = tmp_path / "s" / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    text = command("record", "--verify", tmp_path / "s", code=1)
    assert "shard 1 is damaged: its checksum does not match" in text
    assert f"fewstep record '{tiny}' --out {tmp_path / 's'}" in text
    command("record", tiny, "--out", tmp_path / "s")
    assert path.read_bytes() == whole


def test_a_store_whose_model_is_gone_is_still_checked(tmp_path, command):
    command("record", "mixture-smooth", "-n", 4, "--nfe", 4, "--out", tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["about"] = {"model": str(tmp_path / "gone")}
    del manifest["content_sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = command("record", "--verify", tmp_path)
    assert "nothing was integrated again: its model cannot be loaded" in text
    assert "is intact" in text
    assert "no spectrum: its model cannot be loaded" in command("record", "--stats", tmp_path)
    assert "integrated again: relative" in command(
        "record", "mixture-smooth", "--verify", tmp_path
    )
    assert "another model" in command("record", "mixture-sharp", "--verify", tmp_path, code=2)


def test_drawn_labels_and_kept_knots(tiny, tmp_path, command):
    subcommand = [
        "record",
        tiny,
        "-n",
        40,
        "--solver",
        "ddim",
        "--nfe",
        4,
        "--class-labels",
        "random",
    ]
    command(*subcommand, "--keep", "knots:1,3", "--dtype", "float32", "--out", tmp_path)
    store = TrajectoryStore.open(tmp_path)
    assert store.manifest.knots == [0, 1, 3, 4]
    assert set(store.read(range(40)).conditions["class_labels"].tolist()) == {0, 1, 2}
    assert store.read([0]).states.shape == (1, 4, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "one of --out, --verify and --stats"),
        (["MODEL", "--out", "OUT", "--verify", "OUT"], "one of --out"),
        (["--out", "OUT", "-n", "4"], "give the model"),
        (["MODEL", "--out", "OUT"], "give -n"),
        (["MODEL", "--out", "OUT", "--seed", "1"], "give -n"),
        (["MODEL", "--out", "OUT", "-n", "0"], "-n must be a positive"),
        (["MODEL", "--out", "OUT", "-n", "4", "--shard-size", "-1"], "--shard-size must be"),
        (["MODEL", "--out", "OUT", "-n", "4", "--keep", "knots:a"], "--keep is 4"),
        (["MODEL", "--out", "OUT", "-n", "4", "--keep", "cubic:4"], "grid"),
        (["MODEL", "--out", "OUT", "-n", "4", "--solver", "ddpm"], "is stochastic"),
        (["MODEL", "--out", "OUT", "-n", "4", "--dtype", "int8"], "dtype must be one of"),
        (["MODEL", "--out", "OUT", "-n", "4", "--class-labels", "random"], "not known"),
        (["MODEL", "--out", "OUT", "-n", "4", "--recipe", "x", "--nfe", "3"], "cannot be read"),
        (["MODEL", "--out", "OUT", "-n", "4", "--device", "warp"], "device 'warp'"),
        (["--verify", "OUT"], "not a store of trajectories"),
        (["--verify", "OUT", "--seed", "3"], "leave --seed out"),
        (["--stats", "OUT", "--overwrite"], "leave --overwrite out"),
    ],
)
def test_mistakes(tmp_path, command, arguments, message):
    there = {"MODEL": "mixture-smooth", "OUT": str(tmp_path / "store")}
    text = command("record", *(there.get(a, a) for a in arguments), code=2)
    assert message in text
    assert not (tmp_path / "store").exists()


def test_other_settings_need_overwrite(tmp_path, command):
    subcommand = ["record", "mixture-smooth", "--nfe", 4, "--keep", 2, "--out", tmp_path, "-n"]
    command(*subcommand, 4)
    assert "n 4, now 5; give those, --overwrite" in command(*subcommand, 5, code=2)
    command(*subcommand, 5, "--overwrite")
    assert len(TrajectoryStore.open(tmp_path)) == 5

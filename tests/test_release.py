"""What is released: one version, lower bounds of dependencies, shell completion.

Wheel, sdist and lowest versions are tried by ``make wheel-check`` and ``make test-lowest``, which need a package index.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import fewstep
from fewstep.cli import app, run

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == (
        fewstep.__version__
    )
    pack = tomllib.loads((ROOT / "integrations/comfyui/pyproject.toml").read_text())
    assert pack["project"]["version"] == fewstep.__version__


def test_every_dependency_has_a_lower_bound():
    lowest = script("lowest")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = {extra for extras, _ in lowest.STAGES.values() for extra in extras}
    assert tested | {"ray"} == set(project["optional-dependencies"])
    core, everything = lowest.wanted(()), lowest.wanted(lowest.EXTRAS)
    assert {"torch", "numpy", "safetensors", "cyclopts"} <= set(core) <= set(everything)
    assert lowest.lower_bounds(["a>=1.9,<6", "a>=1.10"]) == {"a": "1.10"}
    with pytest.raises(ValueError, match="no lower bound"):
        lowest.lower_bounds(["torch"])


def test_the_tests_of_the_lowest_versions_exist():
    for _, rooms in script("lowest").STAGES.values():
        for room in rooms.split():
            assert (ROOT / "tests" / room).exists(), room


SHELLS = ("bash", "zsh", "fish")
WORDS = {"sa": "sample", "plan d": "diff", "sample --so": "--solver", "tune fashion --nf": "--nfe"}
"""Beginnings of commands, and what completes their last word."""


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """The completion scripts by shell, as they are installed."""
    folder = tmp_path_factory.mktemp("completion")
    files = {shell: folder / f"completion.{shell}" for shell in SHELLS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for shell, file in files.items():
            words = ["--install-completion", "--shell", shell, "--output", str(file)]
            assert run(words) == 0
    return files


def shell_run(shell, *words):
    """Runs a shell without the user's settings; skips where it is not installed."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    return subprocess.run([shell, *plain, *words], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_names_every_command(shell, completion):
    text = completion[shell].read_text()
    pattern = {
        "bash": r"all_commands='(.*)'",
        "zsh": r"^ +commands=\(\n((?:.*\n)*?) +\)",
        "fish": r"((?:.*\n)*)",
    }[shell]
    names = set(re.findall(r"[\w-]+", re.findall(pattern, text, re.M)[0]))
    commands = {name for name in app() if not name.startswith("-")}
    assert {"sample", "compare", "tune"} < commands <= names


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_a_script_of_its_shell(shell, completion):
    assert shell_run(shell, "-n", str(completion[shell])).stderr == ""


def test_completion_completes_in_bash(completion):
    code = f"source {completion['bash']}\n" + "".join(
        f"COMP_WORDS=(fewstep {w}); COMP_CWORD={len(w.split())}; COMPREPLY=(); _fewstep; echo ${{COMPREPLY[*]}}\n"
        for w in WORDS
    )
    assert shell_run("bash", "-c", code).stdout.split() == list(WORDS.values())


def test_completion_completes_in_fish(completion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files are completed too
    code = f"source {completion['fish']}\n" + "".join(f"complete -C'fewstep {w}'\n" for w in WORDS)
    lines = shell_run("fish", "-c", code).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(WORDS.values())

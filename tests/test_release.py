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
    assert set(lowest.EXTRAS) | {"ray"} <= set(project["optional-dependencies"])
    core, everything = lowest.wanted(()), lowest.wanted(lowest.EXTRAS)
    assert {"torch", "numpy", "safetensors", "cyclopts"} <= set(core) <= set(everything)
    assert lowest.lower_bounds(["a>=1.9,<6", "a>=1.10"]) == {"a": "1.10"}
    with pytest.raises(ValueError, match="no lower bound"):
        lowest.lower_bounds(["torch"])


def test_the_tests_of_the_lowest_versions_exist():
    for rooms in script("lowest").STAGES.values():
        for room in rooms.split():
            assert (ROOT / "tests" / room).exists(), room


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """The completion script for bash, as it is installed."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        file = folder / "completion.bash"
        assert run(["--install-completion", "--shell", "bash", "--output", str(file)]) == 0
    return file


def test_completion_names_every_command(completion):
    text = completion.read_text()
    (names,) = re.findall(r"all_commands='(.*)'", text)
    commands = {name for name in app() if not name.startswith("-")}
    assert {"sample", "compare", "tune"} < commands <= set(names.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_completes(completion):
    words = ("sa", "plan d", "sample --so", "tune fashion --nf")
    code = f"source {completion}\n" + "".join(
        f"COMP_WORDS=(fewstep {w}); COMP_CWORD={len(w.split())}; COMPREPLY=(); _fewstep; echo ${{COMPREPLY[*]}}\n"
        for w in words
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sample", "diff", "--solver", "--nfe"]

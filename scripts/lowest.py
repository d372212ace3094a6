"""Runs tests with the lowest, or the newest, versions of the dependencies that pyproject.toml allows.

Run by ``make test-lowest`` and ``make test-newest``. In a new environment the package alone is installed and tested, then, in
the same environment, with its extras, then with the studio; at each stage every dependency is at the lower bound that pyproject.toml says, which is thereby the one
place that says it. pip refuses bounds that exclude each other. What tests with (pytest, hypothesis, scipy) is the newest at any time.

``--newest`` takes the newest of everything instead, within the upper bounds of pyproject.toml and of pip's own configuration.

PyPI has no build of torch for the CPU alone on Linux: there torch comes with gigabytes of CUDA, unless pip is
shown torch's own index (``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu``). ``--torch 2.13.0`` takes another torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("diffusers", "report", "distill", "search", "remote")
"""Ray is left out: of it only the newest is tested, by hand."""

TOOLS = (
    *("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scipy>=1.12"),
    *("prdc>=0.2", "torchsde>=0.2.6"),
)
STAGES = {
    "core": (
        (),
        "test_house.py test_loading.py cli/test_cli.py diffusion models plans solvers sampling training",
    ),
    "extras": (
        EXTRAS,
        "test_house.py adapters reporting comparison trajectories operators learned studies workflows",
    ),
    "studio": (("studio",), "studio"),
}
"""The extras of each stage, and its tests. The studio is apart: its library asks for newer versions than the others do."""


def lower_bounds(requirements: Iterable[str]) -> dict[str, str]:
    """Returns the lowest version of each package that all the requirements allow.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    bounds: dict[str, str] = {}
    for text in requirements:
        parts = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,.*)?", text.replace(" ", ""))
        if parts is None:
            raise ValueError(f"{text!r} of pyproject.toml has no lower bound; write name>=version")
        name, version = parts.groups()
        old = bounds.get(name, version)
        bounds[name] = max(old, version, key=lambda v: [int(n) for n in v.split(".")])
    return bounds


def wanted(extras: Sequence[str]) -> dict[str, str]:
    """Returns the lowest versions with these extras, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = project["optional-dependencies"]
    return lower_bounds([*project["dependencies"], *(text for e in extras for text in own[e])])


def pins(extras: Sequence[str], *, newest: bool, torch: str | None) -> dict[str, str]:
    """Returns the version of each package that is not left to pip."""
    versions = {} if newest else wanted(extras)
    return versions | ({"torch": torch} if torch is not None else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Installs and tests, stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--newest", action="store_true", help="the newest versions instead")
    parser.add_argument("--folder", type=Path, help="where the environment is kept")
    parser.add_argument("--torch", help="another torch than the lowest, or the newest")
    parser.add_argument("--only", choices=STAGES, help="one stage only")
    parser.add_argument("tests", nargs="*", help="other tests than those listed here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fewstep-versions-") as name:
        folder = given.folder or Path(name) / "environment"
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for stage, (extras, rooms) in STAGES.items():
            if given.only in (None, stage):
                versions = pins(extras, newest=given.newest, torch=given.torch)
                install(folder, extras, versions, newest=given.newest)
                test(folder, given.tests or rooms.split())


def install(
    folder: Path, extras: Sequence[str], versions: dict[str, str], *, newest: bool
) -> None:
    """Installs the package with these extras, and what tests with, and prints the versions of its dependencies."""
    file = folder / "pins.txt"
    file.write_text("".join(f"{k}=={v}\n" for k, v in versions.items()), encoding="utf-8")
    own = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pip = [folder / "bin" / "python", "-m", "pip"]
    wish = ["--upgrade", "--upgrade-strategy", "eager"] if newest else []
    words = [*pip, "install", "--quiet", "--no-cache-dir", *wish, "--constraint", file]
    subprocess.run([*words, "--editable", own, *TOOLS], check=True)
    listed = subprocess.run([*pip, "freeze"], check=True, stdout=subprocess.PIPE, text=True)
    found = dict(line.split("==") for line in listed.stdout.splitlines() if "==" in line)
    has = {name.lower().replace("_", "-"): version for name, version in found.items()}
    print(
        f"{'package alone' if not extras else 'with ' + ', '.join(extras)}:",
        ", ".join(f"{name} {has.get(name, '?')}" for name in wanted(extras)),
        flush=True,
    )


def test(folder: Path, tests: Sequence[str]) -> None:
    """Runs tests in the environment; a failure ends the run."""
    paths = [str(ROOT / "tests" / t) for t in tests]
    # Old versions are warned by newer ones that they use, which is none of ours (matplotlib 3.8 by pyparsing).
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    words += ["-m", "not slow and not studio"]
    done = subprocess.run([folder / "bin" / "python", *words, *paths], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()

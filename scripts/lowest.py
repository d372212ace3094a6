"""Runs tests with the lowest versions of the dependencies that pyproject.toml allows.

Run by ``make test-lowest``. Two environments, as users have them: the package alone, and the package with its
extras; in each every dependency is at the lower bound that pyproject.toml says, which is thereby the one place that says it.
pip refuses bounds that exclude each other. What tests with is the newest.

PyPI has no build of torch for the CPU alone on Linux: there the old torch comes with gigabytes of CUDA, unless pip is
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

TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scipy>=1.12")
ROOMS = {
    (): "test_house.py test_loading.py cli/test_cli.py diffusion models plans solvers sampling training",
    EXTRAS: "test_house.py adapters reporting comparison trajectories operators learned studies workflows",
}
"""The tests of each environment."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Installs and tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    parser.add_argument("--torch", help="another torch than the lowest")
    parser.add_argument("--only", choices=("core", "extras"), help="one environment only")
    parser.add_argument("tests", nargs="*", help="other tests than those listed here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fewstep-lowest-") as name:
        folder = given.folder or Path(name)
        for extras, rooms in ROOMS.items():
            kind = "extras" if extras else "core"
            if given.only in (None, kind):
                test(folder / kind, extras, given.torch, given.tests or rooms.split())


def test(folder: Path, extras: Sequence[str], torch: str | None, tests: Sequence[str]) -> None:
    """Makes one environment and runs its tests; a failure ends the run."""
    versions = wanted(extras)
    if torch is not None:
        versions["torch"] = torch
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pins = folder / "lowest.txt"
    pins.write_text("".join(f"{k}=={v}\n" for k, v in versions.items()), encoding="utf-8")
    print(f"{folder.name}:", ", ".join(f"{k} {v}" for k, v in versions.items()), flush=True)
    own = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.run([*pip, "--constraint", pins, "--editable", own, *TOOLS], check=True)
    paths = [str(ROOT / "tests" / t) for t in tests]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    if code := subprocess.run(pytest, cwd=ROOT, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()

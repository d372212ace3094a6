"""Builds the wheel and the sdist, installs the wheel in a new environment and samples with it, offline.

Run by ``make wheel-check``, with the standard library alone. The wheel is built from the sdist, so the sdist
is complete enough to build; that it has every file that the tests need is checked as well. In the new environment
torch comes from constraints.txt, and nothing can be imported from the repository: the commands run in another folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 30e6
"""Largest wheel, in bytes."""

OFFLINE = '''
"""Refuses every connection, so that a command that works needs no network."""
import socket


def refuse(*args, **kwargs):
    raise OSError("no network in this check")


socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
'''


def run(*words: str | Path, folder: Path | None = None, **environment: str) -> str:
    """Runs a command and returns what it printed; its failure ends the check."""
    print("$", *words, flush=True)
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(w) for w in words],
        cwd=folder,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def environment(folder: Path) -> Path:
    """Makes a virtual environment and returns its folder of programs."""
    run(sys.executable, "-m", "venv", folder)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def tracked() -> set[str]:
    """Every file of the repository, or none where there is no git."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return set()
    return set(run("git", "-C", ROOT, "ls-files").split("\n")) - {""}


def check_contents(wheel: Path, sdist: Path) -> None:
    """What ships is what is tracked: the whole package in the wheel, the whole tree in the sdist."""
    files = tracked()
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    package = {f.removeprefix("src/") for f in files if f.startswith("src/fewstep/")}
    if missing := sorted(package - in_wheel):
        sys.exit(f"not in the wheel: {missing}")
    if missing := sorted(files - in_sdist):
        sys.exit(f"not in the sdist: {missing}; see [tool.hatch.build.targets.sdist]")
    strangers = {name.partition("/")[0] for name in in_wheel} - {"fewstep"}
    if any(not name.endswith(".dist-info") for name in strangers):
        sys.exit(f"the wheel has more than the package: {sorted(strangers)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds, installs, samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where wheel and sdist are kept")
    out: Path | None = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory(prefix="fewstep-wheel-") as name:
        work = Path(name)
        builder = environment(work / "builder")
        run(builder / "python", "-m", "pip", "install", "--quiet", "build")
        dist = (out or work / "dist").resolve()
        run(builder / "python", "-m", "build", "--outdir", dist, ROOT)
        wheel = max(dist.glob("*.whl"), key=lambda p: p.stat().st_mtime)
        sdist = max(dist.glob("*.tar.gz"), key=lambda p: p.stat().st_mtime)
        size = wheel.stat().st_size
        if size > LIMIT:
            sys.exit(f"{wheel.name} has {size / 1e6:.1f} MB; the limit is {LIMIT / 1e6:.0f}")
        check_contents(wheel, sdist)

        user = environment(work / "user")
        pip = (user / "python", "-m", "pip", "install", "--quiet")
        run(*pip, "--constraint", ROOT / "constraints.txt", wheel)
        blocked = work / "blocked"
        blocked.mkdir()
        (blocked / "sitecustomize.py").write_text(OFFLINE, encoding="utf-8")
        folder = work / "elsewhere"
        folder.mkdir()

        def offline(*words: str | Path) -> str:
            return run(*words, folder=folder, PYTHONPATH=str(blocked), HOME=str(folder))

        place = offline(user / "python", "-c", "import fewstep; print(fewstep.__file__)")
        if not Path(place.strip()).resolve().is_relative_to((work / "user").resolve()):
            sys.exit(f"fewstep was imported from {place.strip()}, not from the new environment")
        version = offline(user / "fewstep", "--version").strip()
        if not wheel.name.startswith(f"fewstep-{version}-"):
            sys.exit(f"fewstep --version says {version}, the wheel is {wheel.name}")
        offline(
            *(user / "fewstep", "sample", "fashion", "-n", "4", "--nfe", "5"),
            *("--class-labels", "7", "--out", "shoes"),
        )
        offline(user / "fewstep", "sample", "fashion-1step", "-n", "4", "--out", "one")
        for wanted in ("shoes/grid.png", "shoes/recipe.json", "one/grid.png"):
            if not (folder / wanted).is_file():
                sys.exit(f"{wanted} was not written; {sorted(map(str, folder.rglob('*')))}")
        print(
            f"{wheel.name}: {size / 1e6:.1f} MB; {sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB"
        )
        print(f"fewstep {version} is installed from the wheel and samples offline")


if __name__ == "__main__":
    main()

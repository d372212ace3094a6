"""Long runs: many small samples, many tuning steps; memory and open files over time.

Usage: python benchmarks/long_runs.py [samples|tuning] [-n 100000] [--steps 10000] [--objective endpoint] [--out FILE]

``samples``: the command ``fewstep sample`` draws n samples of a two-dimensional mixture in batches, with
parts on disk, and ``fewstep.sample`` as many in Python calls of 1,000. ``tuning``: a plan of the
same model is tuned for that many steps towards a teacher. A thread reads the resident memory and the open descriptors of
the process ten times a second; printed are those after the first tenth and at the end, and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fewstep
from _common import print_table, say_what_runs
from fewstep.cli import run as command

RESULTS = Path(__file__).parent / "results" / "long_runs.json"
PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Reads memory and descriptors while something runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int]] = []
        self._stop = threading.Event()

    def __enter__(self) -> Meter:
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(0.1):
            self._read()

    def _read(self) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
        descriptors = len(os.listdir("/proc/self/fd"))
        self.seen.append((time.monotonic() - self._begun, resident, descriptors))

    def figures(self) -> dict[str, float]:
        """Returns seconds, and mebibytes and descriptors early, at the end, and at most."""
        early = self.seen[len(self.seen) // 10]
        last = self.seen[-1]
        return {
            "seconds": round(last[0], 1),
            "MiB early": round(early[1]),
            "MiB end": round(last[1]),
            "MiB most": round(max(s[1] for s in self.seen)),
            "files early": early[2],
            "files end": last[2],
            "files most": max(s[2] for s in self.seen),
        }


def metered(run: Callable[[], object]) -> dict[str, float]:
    """Runs something; returns what it took."""
    with Meter() as meter:
        run()
    return meter.figures()


def samples(n: int, folder: Path) -> dict[str, dict[str, float]]:
    """Draws n samples with the command and with calls."""
    model = fewstep.load("mixture-smooth")

    def calls() -> None:
        for first in range(0, n, 1000):
            fewstep.sample(model, 1000, nfe=5, first=first, batch_size=250)

    arguments = ["sample", "mixture-smooth", "-n", str(n), "--nfe", "5", "--batch-size", "250"]
    return {
        f"fewstep.sample, {n:,} in calls of 1,000": metered(calls),
        f"fewstep sample -n {n}": metered(lambda: command([*arguments, "--out", str(folder)])),
    }


def tuning(steps: int, objective: str, folder: Path) -> dict[str, dict[str, float]]:
    """Tunes a plan for many steps."""
    arguments = ["tune", "mixture-smooth", "--nfe", "3", "--steps", str(steps), "--keep-worse"]
    arguments += ["--objective", objective]
    for setting in ("batch_size=16", "pairs=64", "heldout=64", "test=64", f"patience={steps}"):
        arguments += ["--setting", setting]
    return {
        f"fewstep tune --objective {objective} --steps {steps}": metered(
            lambda: command([*arguments, "--out", str(folder / "tuned.json")])
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("samples", "tuning", "all"), nargs="?", default="all")
    parser.add_argument("-n", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--objective", default="endpoint")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if chosen.what != "tuning":
            results |= samples(chosen.n, Path(folder) / "samples")
        if chosen.what != "samples":
            results |= tuning(chosen.steps, chosen.objective, Path(folder))
    say_what_runs("Resident memory and open descriptors of one process.")
    names = list(next(iter(results.values())))
    print_table(("what", *names), [[what, *row.values()] for what, row in results.items()])
    known = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    chosen.out.write_text(json.dumps(known | results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Faults: kills, damage, full disks and several writers; counts of what was survived.

Usage: python benchmarks/faults.py [--part kills,damage,disk,writers] [--only sample,train] [--seconds 600] [--goal 50]

``kills``: each command is killed (SIGKILL) again and again, half of the times before a random one of its file
operations, half at a random moment, and given again until it ends. Its results must then have the bytes of a run
without kills, and no temporary files or parts may be left.
``damage``: one of every kind of file (``tests/every_file.py``) gets flipped bits, cuts and edits: it must be an
error that names the file, or be made again.
``disk``: files may not grow beyond a few bytes (RLIMIT_FSIZE), or an fsync fails with ENOSPC: one sentence that
names the file, and the same command gives the same bytes afterwards.
``writers``: two and six processes give the same command at once, with one seed and with several.

Counts are added to ``benchmarks/results/faults.json``, so it can be run in pieces; ``--new`` begins again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

NEEDED = (
    "accelerate",
    "fewstep.comparison.page",
    "fewstep.learned.page",
    "fewstep.operators.distillation",
    "fewstep.reporting.plots",
    "fewstep.studies.fit",
    "fewstep.training.train",
    "jinja2",
    "matplotlib.backends.backend_svg",
)
"""What the commands import."""

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import every_file  # noqa: E402
from fewstep.base.files import write_json  # noqa: E402
from fewstep.base.temporary import LITTER  # noqa: E402
from fewstep.cli import run  # noqa: E402
from fewstep.workflows import pictures, training  # noqa: E402
from tiny_models import write_tiny  # noqa: E402
from tiny_training import RECIPE  # noqa: E402

RESULTS = HERE / "results" / "faults.json"
PARTS = ("kills", "damage", "disk", "writers")
EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.rmtree"}
CHANGING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Command:
    """A command to disturb.

    Attributes:
        arguments: Its arguments, for a folder of inputs and the output.
        results: Patterns of the files that must be the same.
    """

    arguments: Callable[[Path, Path], Sequence[object]]
    results: Sequence[str]

    def run(self, inputs: Path, out: Path, *more: object) -> int:
        """Runs it in this process."""
        return run([*map(str, self.arguments(inputs, out)), "--device", "cpu", *map(str, more)])

    def digest(self, out: Path) -> str:
        """Returns a digest of the results, without dates and seconds."""
        found = hashlib.sha256()
        for pattern in self.results:
            files = sorted(out.glob(pattern))
            assert files, f"{pattern} is missing"
            for file in files:
                content = file.read_bytes()
                if file.suffix == ".json":
                    content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
                found.update(f"{file.relative_to(out)} {len(content)}\n".encode() + content)
        return found.hexdigest()


def _timeless(value: Any) -> Any:
    skipped = (
        "seconds",
        "pareto",
        "date",
        "content_sha256",
        "command",
        "versions",
        "out",
        "folder",
    )
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.startswith(skipped)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


SEARCH = ["pairs=8", "heldout=8", "test=8", "teacher_nfe=6", "batch_size=4", "evaluate_every=2"]
SETTINGS = [part for setting in SEARCH for part in ("--setting", setting)]
COMMANDS = {
    "sample": Command(
        lambda inputs, out: [
            "sample", "mixture-smooth", "-n", 40, "--batch-size", 4, "--nfe", 3, "--out", out,
        ],
        ["samples.safetensors", "recipe.json", "grid.png"],
    ),
    "compare": Command(
        lambda inputs, out: [
            "compare", "mixture-smooth", "--solvers", "ddim,tab1", "--nfe", 3, "-n", 8,
            "--batch-size", 2, "--reference-nfe", 6, "--out", out,
        ],
        ["results.json", "best-3.json", "samples-3.png"],
    ),
    "record": Command(
        lambda inputs, out: [
            "record", inputs / "model", "-n", 32, "--shard-size", 4, "--nfe", 4, "--keep", 2,
            "--class-labels", 1, "--out", out,
        ],
        ["manifest.json", "shard-*.safetensors"],
    ),
    "fit": Command(
        lambda inputs, out: ["fit", "mixture-smooth", "--nfe", "3,4", "-n", 4, "--out", out / "profile.json"],
        ["profile.json"],
    ),
    "tune": Command(
        lambda inputs, out: [
            "tune", "mixture-smooth", "--nfe", 2, "--objective", "endpoint", "--steps", 6, *SETTINGS,
            "--keep-worse", "--out", out / "tuned.json",
        ],
        ["tuned.json"],
    ),
    "distill": Command(
        lambda inputs, out: [
            "distill", inputs / "model", inputs / "store", "--mode", "endpoint", "--steps", 12,
            "--batch-size", 2, "--checkpoint-every", 2, "--out", out,
        ],
        ["operator.safetensors", "operator.json", "log.jsonl", "samples.png"],
    ),
    "train": Command(
        lambda inputs, out: [
            "train", inputs / "data.npz", "--recipe", inputs / "recipe.json", "--steps", 12,
            "--checkpoint-every", 2, "--out", out,
        ],
        ["model.safetensors", "model.json", "samples.png"],
    ),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Writes a model, trajectories, images and a recipe."""
    write_tiny(folder / "model")
    COMMANDS["record"].run(folder, folder / "store", "--quiet")
    chance = numpy.random.default_rng(0)
    pixels = chance.integers(0, 256, (12, 1, 8, 8), dtype=numpy.uint8)
    numpy.savez(folder / "data.npz", images=pixels)
    recipe = RECIPE.to_record()
    recipe["network"] = {**recipe["network"], "num_classes": None}
    (folder / "recipe.json").write_text(json.dumps(recipe))


# --- processes ----------------------------------------------------------------------------------


class Child:
    """A fork of this process that runs a command; a start costs milliseconds.

    Arguments:
        work: The command; its result is the exit code.
        before: What is done in the child before.
    """

    def __init__(
        self, work: Callable[[], int], before: Callable[[], object] | None = None
    ) -> None:
        self._read, write = os.pipe()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(write, 1)
                os.dup2(write, 2)
                sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(k, "wb", 0)) for k in (1, 2))
                if before is not None:
                    before()
                code = work()
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(write, f"TRACEBACK {error!r}".encode())
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(write)

    def wait(self, kill_after: float | None = None) -> tuple[int, str]:
        """Returns the exit code, negative for a signal, and the last words."""
        if kill_after is not None:
            while time.monotonic() - self.began < kill_after:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.002)
            else:
                os.kill(self.pid, signal.SIGKILL)
        with os.fdopen(self._read, "rb") as stream:
            text = stream.read().decode(errors="replace")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, text


def _kill_at(number: int) -> Callable[[], None]:
    """Makes the process kill itself before its n-th change of the file system."""
    left = [number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & CHANGING):
            return
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def _litter(out: Path) -> list[str]:
    """Returns what killed runs have left."""
    names = [p for p in out.rglob("*") if LITTER.fullmatch(p.name) or p.suffix == ".claim"]
    names += [p for name in ("parts", "unfinished.json", "claims") for p in out.glob(name)]
    return [str(p.relative_to(out)) for p in names]


# --- parts --------------------------------------------------------------------------------------


class Work:
    """Inputs, the results without faults, and the counts so far."""

    def __init__(
        self, folder: Path, counts: dict[str, Any], results: Path, deadline: float
    ) -> None:
        self.folder, self.counts, self.deadline = folder, counts, deadline
        self.results = results
        self.inputs = folder / "inputs"
        self.whole: dict[str, tuple[str, float, int]] = {}
        code, text = Child(lambda: make_inputs(self.inputs) or 0).wait()
        assert code == 0, text

    def out(self) -> Path:
        """Returns a new output folder; all have one name, which results repeat."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return self.folder / "out"

    def start(
        self, command: Command, out: Path, *more: object, before: Callable[[], None] | None = None
    ) -> Child:
        """Starts a command."""
        return Child(lambda: command.run(self.inputs, out, *more), before)

    def run_whole(self, name: str) -> tuple[str, float]:
        """Returns digest and seconds of a run without faults."""
        if name not in self.whole:
            out, begun = self.out(), time.monotonic()
            code, text = self.start(COMMANDS[name], out).wait()
            assert code == 0, f"{name}: {text}"
            self.whole[name] = COMMANDS[name].digest(out), time.monotonic() - begun, 0
        return self.whole[name][:2]

    def is_late(self) -> bool:
        """Whether the time of this call is over."""
        return time.monotonic() > self.deadline

    def count(self, part: str, name: str, what: str, example: str = "") -> None:
        """Counts, and writes the counts; of faults the first words are kept."""
        row = self.counts.setdefault(part, {}).setdefault(name, {})
        row[what] = row.get(what, 0) + 1
        if example:
            row.setdefault("examples", {}).setdefault(what, example[-500:])
        write_json(self.results, self.counts)


def kills(work: Work, name: str, goal: int) -> None:
    """Kills a command until it was killed ``goal`` times."""
    command = COMMANDS[name]
    whole, seconds = work.run_whole(name)
    done = work.counts.get("kills", {}).get(name, {}).get("kills", 0)
    chance, out = random.Random(f"{name} {done}"), work.out()
    failed = 0
    while (done < goal or out.exists()) and not work.is_late():
        at_file = chance.random() < 0.5
        before = _kill_at(round(60 * chance.random() ** 2)) if at_file else None
        after = None if at_file else seconds * chance.random()
        if done >= goal:  # to the end
            before = after = None
        code, text = work.start(command, out, before=before).wait(after)
        if code == -signal.SIGKILL:
            done += 1
            work.count("kills", name, "kills")
        elif code == 0 or (code == 2 and " exists; give " in text):  # killed after its last file
            work.count("kills", name, "runs")
            same = command.digest(out) == whole
            work.count("kills", name, "same results" if same else "OTHER RESULTS")
            if left := _litter(out):
                work.count("kills", name, "LITTER", ", ".join(left))
            out = work.out()
        else:
            failed += 1
            work.count("kills", name, f"REFUSED ({code})", text)
            if failed > 3:
                return
            out = work.out()


def damage(work: Work, name: str, bits: int) -> None:
    """Damages a kind of file."""
    kind = next(kind for kind in every_file.KINDS if kind.name == name)
    if name in work.counts.get("damage", {}):
        return
    found = collections.Counter[str]()
    examples = dict[str, str]()
    folder = work.folder / "damage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def fresh() -> Path:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        return Path(shutil.copytree(folder / "first", folder / "copy"))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        files = kind.made(folder / "first")
        whole = kind.read(fresh())
        for file in files:
            content = (folder / "first" / file).read_bytes()
            for what, damaged in every_file.damages(content, file.name, bits=bits, kind=kind):
                copy = fresh()
                if damaged is None:
                    (copy / file).unlink()
                else:
                    (copy / file).write_bytes(damaged)
                try:
                    result = "unharmed or made again" if kind.read(copy) == whole else "USED"
                except ValueError as error:
                    named = file.name in str(error) or what == "missing"
                    result = "found" if named and not kind.again else "STOPS OR NOT NAMED"
                    text = str(error)
                except BaseException as error:
                    result, text = "TRACEBACK", repr(error)
                found[result] += 1
                if result.isupper():
                    examples.setdefault(
                        result, f"{file}, {what}: {text if result != 'USED' else ''}"
                    )
    work.counts.setdefault("damage", {})[name] = {
        **found,
        **({"examples": examples} if examples else {}),
    }
    write_json(work.results, work.counts)


def disk(work: Work, name: str, goal: int) -> None:
    """Fills the disk: a limit of the size of files, and an fsync that fails."""
    command = COMMANDS[name]
    whole, _ = work.run_whole(name)
    done = work.counts.get("disk", {}).get(name, {}).get("full disks", 0)
    chance = random.Random(f"disk {name} {done}")
    while done < goal and not work.is_late():
        out, number = work.out(), chance.randrange(24)

        def limit(number: int = number) -> None:
            most = (0, 100, 300, 1000, 3000, 10_000)[number % 6]
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        def fail(number: int = number) -> None:
            original, left = os.fsync, [number]

            def fsync(handle: int) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                original(handle)

            os.fsync = fsync  # type: ignore[assignment]

        code, text = work.start(command, out, before=limit if done % 2 else fail).wait()
        done += 1
        work.count("disk", name, "full disks")
        if code == 2 and "give the same command again" in text and text.count("error:") == 1:
            work.count("disk", name, "said in a sentence")
        elif code == 0:
            work.count("disk", name, "not noticed: enough space")
        else:
            work.count("disk", name, f"OTHERWISE ({code})", text)
        more = ["--overwrite"] if code == 0 else []
        code, text = work.start(command, out, *more).wait()
        complete = code == 2 and " exists; give " in text  # the disk was full after the last file
        if complete:
            work.count("disk", name, "was complete")
        if code != 0 and not complete:
            work.count("disk", name, f"REFUSED ({code})", text)
        else:
            same = command.digest(out) == whole
            work.count("disk", name, "same results" if same else "OTHER RESULTS")
            if left := _litter(out):
                work.count("disk", name, "LITTER", ", ".join(left))


def writers(work: Work, name: str, goal: int) -> None:
    """Runs a command several times at once, on one output."""
    command = COMMANDS[name]
    whole, _ = work.run_whole(name)
    rounds = work.counts.get("writers", {}).get(name, {}).get("rounds", 0)
    while rounds < goal and not work.is_late():
        out, count = work.out(), (2, 6)[rounds % 2]
        seeds = rounds % 4 >= 2
        children = [
            work.start(command, out, *(["--seed", k] if seeds else [])) for k in range(count)
        ]
        ends = [child.wait() for child in children]
        rounds += 1
        work.count("writers", name, "rounds")
        if not any(code == 0 for code, _ in ends):
            work.count("writers", name, "NONE ENDED", str(ends))
        for code, text in ends:
            fits = code == 2 and text.count("error:") == 1
            what = (
                "ended"
                if code == 0
                else "refused in a sentence"
                if fits
                else f"OTHERWISE ({code})"
            )
            work.count("writers", name, what, "" if code == 0 or fits else text)
        if seeds:  # the results are of one of the seeds: that which ended
            own = [k for k, (code, _) in enumerate(ends) if code == 0]
            first = command.digest(out)
            again = work.out()
            same = len(own) == 1
            if same and own[0]:
                work.start(command, again, "--seed", own[0]).wait()
                same = command.digest(again) == first
            elif same:
                same = first == whole
        else:
            same = command.digest(out) == whole
        work.count("writers", name, "same results" if same else "OTHER RESULTS")


def _commit() -> str:
    """Returns the commit of the code, with + if files were changed."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--short", "../src"], capture_output=True, text=True)
    return commit.stdout.strip() + "+" * bool(changed.stdout)


def main() -> None:
    """Disturbs, counts and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--only", help="names of commands or kinds, with commas")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--goal", type=int, default=50, help="kills of each command")
    parser.add_argument("--bits", type=int, default=200, help="flipped bits of each file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the counts")
    parser.add_argument("--new", action="store_true", help="forget the counts so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in NEEDED:  # once for all forks
        importlib.import_module(name)
    # Small pictures: drawing samples for them is most of what a short training costs.
    pictures.SHOWN, training.SHOWN_NFE = 4, 2
    counts: dict[str, Any] = {}
    if options.results.exists() and not options.new:
        known = (*PARTS, "commit")
        counts = {k: v for k, v in json.loads(options.results.read_text()).items() if k in known}
    here = _commit()
    if counts.setdefault("commit", here) != here:
        counts["commit"] = "several"
    deadline = time.monotonic() + options.seconds
    chosen = options.only.split(",") if options.only else None
    with tempfile.TemporaryDirectory() as temporary:
        work = Work(Path(temporary), counts, options.results, deadline)
        for part in options.part.split(","):
            names = (
                [kind.name for kind in every_file.KINDS] if part == "damage" else list(COMMANDS)
            )
            # A few of each command at a time, so that a run that is cut has some of all.
            most = {"damage": 0, "kills": options.goal, "disk": 12, "writers": 4}[part]
            few = sorted({min(goal, most) for goal in range(10, options.goal + 10, 10)})
            for goal, name in [(goal, name) for goal in few for name in names]:
                if (chosen and name not in chosen) or work.is_late():
                    continue
                if part == "damage":
                    costly = next(k for k in every_file.KINDS if k.name == name).costly
                    damage(work, name, max(1, options.bits // 20) if costly else options.bits)
                else:
                    {"kills": kills, "disk": disk, "writers": writers}[part](work, name, goal)
                print(part, name, json.dumps(counts.get(part, {}).get(name, {})), flush=True)


if __name__ == "__main__":
    main()

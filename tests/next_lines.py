"""Carrying out the commands that are printed after "next:"."""

from __future__ import annotations

import shlex

from fewstep.cli import run

CHEAP = {
    # What makes a proposed command small enough for a test; the proposal itself stays as it is.
    "sample": ["-n", "2"],
    "analyze": ["--nfe", "3", "-n", "4", "--budget", "0"],
    "tune": "--steps 1 --setting batch_size=2 --setting pairs=4 --setting heldout=8 --setting test=8 "
    "--setting teacher_nfe=8".split(),
    "distill": ["--steps", "1", "--batch-size", "2"],
}


def proposed(text: str) -> list[str]:
    """Returns the commands after "next:" in what was printed."""
    return [line.removeprefix("next: ") for line in text.splitlines() if line.startswith("next: ")]


def carry_out(line: str, *more: str, **words: str) -> None:
    """Runs a proposed command, cheaply.

    Arguments:
        line: The command.
        more: Further arguments.
        words: What to write in place of a word like MODEL.
    """
    name, *arguments = shlex.split(line)
    assert name == "fewstep"
    arguments = [words.get(a, a) for a in arguments]
    cheap = CHEAP.get(arguments[0], [])
    if cheap[:1] == ["-n"] and "-n" in arguments:
        cheap = cheap[2:]  # a small number is carried over
    assert run([*arguments, *cheap, *more]) == 0, line

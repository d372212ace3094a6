"""The words of the field: no private vocabulary in code, documentation and tests."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

INSTEAD = {
    r"\b(?:network|model)(?:'s|s'|s)? calls?\b": "network evaluations, NFE",
    r"\b(?:\d+|few|fewer|many|number of|budget of|by|per) calls\b": "evaluations, NFE",
    r"\bcalls (?:a|per) step\b": "evaluations per step",
    r"\banswer(?:s|ed|ing)?\b": "model output, prediction",
    r"\btold\b|\bteller\b|\bwhom to tell\b|\bwhose turn\b": "conditioning timesteps, callback, message",
    r"\bwatchers?\b": "callback, progress",
    r"\btrained (?:levels?|times)\b": "training timesteps",
    r"\bmend(?:s|ed|ing)?\b": "fix, hint",
    r"\b(?:go|goes|gone|going) on (?:with|where)\b": "resume",
    r"\bbrings? its own sampler\b": "has a built-in sampler",
    r"\bwritten whole\b|\bwhole or not at all\b": "atomic",
    r"\bmerit\b": "relative error",
    r"\bmade small\b|\bmakes small\b": "objective, loss",
    r"\bas JSON has (?:it|them)\b": "as a JSON object",
    r"\bmade anew\b|\bbegin anew\b|\bto make them anew\b": "again",
    r"\bthe one (?:list|loop)\b": "the registry, the loop",
    r"\bsaid to be\b|\bcannot be told apart\b": "as claimed, not distinguishable",
    r"\bas far as can be (?:told|seen)\b": "leave it out, or name the limit",
}
"""What is not written, and what is written instead."""

ALLOWED = re.compile(
    r'"answers"|\banswers=\d|self\.answers|\(answers\)|^    answers: int|^        answers: '
)
"""An option of ``ipndm``, which recipes store."""


def files():
    for pattern in (
        "src/fewstep/**/*.py",
        "tests/**/*.py",
        "benchmarks/*.py",
        "docs/*.md",
        "*.md",
    ):
        yield from sorted(set(ROOT.glob(pattern)) - {Path(__file__)})


@functools.cache
def texts():
    return [
        (path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files()
    ]


@pytest.mark.parametrize("pattern", INSTEAD)
def test_the_words_of_the_field(pattern):
    word = re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    result = []
    for name, text in texts():
        if not word.search(text):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if word.search(line) and not ALLOWED.search(line):
                result.append(f"{name}:{number}: {line.strip()[:160]}")
    assert not result, f"write {INSTEAD[pattern]}:\n" + "\n".join(result)

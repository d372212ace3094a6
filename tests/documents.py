"""The code of the documents: which blocks there are, and how each is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from fewstep.cli import run

ROOT = Path(__file__).parents[1]

PAGES = tuple(
    sorted(
        {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"}
        | {ROOT / "integrations/comfyui/README.md"}
        | set((ROOT / "docs").rglob("*.md"))
    )
)
"""Every page for readers. CHANGES.md is a history: its commands are those of their day."""

LANGUAGES = ("python", "console", "text", "json")
"""Python and commands are run; text (drawings, output) and JSON are to be read."""

PARTS = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The file.
        line: Its first line, from 1.
        language: What stands behind the fence.
        text: What it holds.
        reason: Why it is not run, where a comment ``<!-- not run: reason -->`` stands before it.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        """The name of the page and the line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, part.start("language")) + 1,
            part["language"],
            part["text"],
            part["reason"],
        )
        for part in PARTS.finditer(text)
    ]


def execute(page: Path, names: dict[str, Any]) -> None:
    """Runs the blocks of Python of a page in order, in one namespace; an error names page and line."""
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            code = "\n" * block.line + block.text
            exec(compile(code, str(page), "exec"), names)


def commands(text: str) -> Iterator[list[str]]:
    """Returns the words of each command of a block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", line):
            if words := shlex.split(part, comments=True):
                yield words


def own_words(words: Sequence[str]) -> list[str] | None:
    """Returns the arguments of ``fewstep`` in a command, behind what launches it; None if it is no such command."""
    for start in (["fewstep"], ["-m", "fewstep.cli"]):
        for k in range(len(words) - len(start) + 1):
            if list(words[k : k + len(start)]) == start:
                return list(words[k + len(start) :])
    return None


class Evaluated(BaseException):
    """The first network evaluation was reached."""


def resolve(words: Sequence[str]) -> bool:
    """Runs a command up to its first network evaluation.

    Arguments are parsed, files read, the model loaded and the sampler resolved, so whatever is refused is refused.

    Returns:
        Whether it would evaluate a network; false if it ended by itself.
    """

    def stop(*_: Any) -> None:
        raise Evaluated

    hook = register_module_forward_pre_hook(stop)
    try:
        code = run(words)
    except Evaluated:
        return True
    finally:
        hook.remove()
        torch.set_grad_enabled(True)
    # 1 is a negative result, as of a check.
    assert code in (0, 1), f"exit code {code} of fewstep {shlex.join(words)}"
    return False

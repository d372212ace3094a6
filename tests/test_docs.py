"""Every block of code in the README and the documents runs, and every command in them.

Blocks of Python run in order, a page in one namespace, in a temporary folder with what the page speaks of
(``PREPARED``), on few samples (``SMALL``), with a tiny model in the place of ``fashion``. Commands are then carried out there up to their first network evaluation. What
cannot run has a comment before it that says why: ``<!-- not run: reason -->``; its arguments are parsed all the same.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import fewstep
from documents import PAGES, ROOT, blocks, commands, execute, own_words, resolve
from fewstep.cli import app
from fewstep.loading import EMBEDDED_FOLDER
from tiny_models import write_tiny
from tiny_pipelines import MARKS

pytestmark = MARKS[2:]  # the warnings of diffusers

SMALL: dict[str, dict[str, Any]] = {
    "fit": {"nfe": [4], "n": 4},
    "record": {"n": 4},
    "analyze": {"nfe": [3], "n": 4, "budget": 0},
    "tune": {
        "search": {
            "steps": 1,
            "batch_size": 2,
            "pairs": 4,
            "heldout": 8,
            "test": 8,
            "teacher_nfe": 8,
        },
        "keep_worse": True,
    },
    "distill": {"steps": 1, "batch_size": 2},
}
"""Arguments that make a call of the documents cheap, for the functions of ``fewstep`` that are dear."""

SERVES = {"studio"}
"""Commands that run until they are stopped; their arguments are parsed. tests/studio runs them."""

OTHERS = {
    "fewstep --install-completion": "it writes into the reader's home; tests/test_release.py installs it",
    ".venv/bin/pytest": "it is what runs here",
    ".venv/bin/pip install pre-commit": "it needs a package index",
    ".venv/bin/pre-commit install": "it writes a hook into the repository",
}
"""Beginnings of commands that no parser of ours checks, and why they are not run."""


def pipelines(folder: Path) -> dict[str, Any]:
    """Two pipelines of diffusers, without and with a text encoder."""
    diffusers = pytest.importorskip("diffusers")
    import tiny_pipelines as tiny

    plain = diffusers.DDPMScheduler(clip_sample=False)
    diffusers.DDPMPipeline(tiny.unet2d(), plain).save_pretrained(folder / "my-pipeline")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **tiny.LATENT)
    words = tiny.tokenizer(folder / "words")
    text = tiny.stable_diffusion(scheduler, tokenizer=words)
    text.save_pretrained(folder / "my-text-pipeline")
    return {"pipe": text}


def models(folder: Path) -> dict[str, Any]:
    """A model and images of the reader's own."""
    for name in ("MODEL", "MY_MODEL"):
        write_tiny(folder / name)
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=numpy.uint8)
    for name in ("IMAGES", "MY_IMAGES"):
        for k, picture in enumerate(pixels):
            file = folder / name / str(k % 10) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    return {"images": torch.from_numpy(pixels[:, None] / 127.5 - 1).float()}


def recipes(*names: str) -> Callable[[Path], dict[str, Any]]:
    """Recipes for ``fashion`` that commands further up would have written."""

    def write(folder: Path) -> dict[str, Any]:
        denoiser = fewstep.load("fashion")
        request = fewstep.SamplerRequest(solver="ddim", nfe=4)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            fewstep.resolve(denoiser, request).recipe.save(folder / name)
        return {"denoiser": denoiser}

    return write


def study(folder: Path) -> dict[str, Any]:
    """The times that an analysis writes."""
    denoiser = fewstep.load("fashion")
    fewstep.fit(denoiser, [7], n=4, class_labels=3).save(folder / "study" / "grid.json")
    return {"denoiser": denoiser}


PREPARED: dict[str, tuple[Callable[[Path], dict[str, Any]], ...]] = {
    "README.md": (models, pipelines, recipes("shoes/recipe.json")),
    "docs/analyzing.md": (models, recipes("study/recipe-8.json"), study),
    "docs/coming-from.md": (pipelines,),
    "docs/diffusers.md": (pipelines,),
    "docs/tuning.md": (recipes(),),
    "docs/distilling.md": (recipes(), lambda _: {"labels": [0, 1, 2, 3]}),
}
"""What a page takes for granted: files in the folder, names in its blocks."""


def cheap(function: Callable[..., Any], changes: dict[str, Any]) -> Callable[..., Any]:
    """The function with some of its arguments replaced."""

    def call(*args: Any, **kw: Any) -> Any:
        given = inspect.signature(function).bind_partial(*args).arguments
        return function(**{**given, **kw, **changes})

    return call


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the dear functions of ``fewstep`` cheap."""
    for name, changes in SMALL.items():
        monkeypatch.setattr(fewstep, name, cheap(getattr(fewstep, name), changes))


def check_parsed(words: list[str]) -> None:
    """Parses a command of ours without running it."""
    app().parse_args(words, exit_on_error=False, print_error=False)


def check_command(words: list[str]) -> None:
    """Checks what is not a command of ours: a target of make, an extra of pip."""
    line = " ".join(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) <= set(targets), line
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extras in re.findall(r"fewstep\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line
    else:
        assert any(line.startswith(start) for start in OTHERS), f"who checks {line!r}?"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded models, with a tiny one as ``fashion``."""
    folder = tmp_path_factory.mktemp("embedded")
    write_tiny(folder / "fashion", classes=10, size=28)
    (folder / "fashion-1step").symlink_to(EMBEDDED_FOLDER / "fashion-1step")
    return folder


def check_page(page: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Runs the Python of a page and carries out its commands; returns the names of its Python."""
    names: dict[str, Any] = {"fewstep": fewstep, "torch": torch}
    for prepare in PREPARED.get(str(page.relative_to(ROOT)), ()):
        names |= prepare(folder)
    with monkeypatch.context() as patch:
        small(patch)
        execute(page, names)
    for block in blocks(page):
        if block.language != "console":
            continue
        for words in commands(block.text):
            own = own_words(words)
            if own is None or " ".join(words) in OTHERS:
                check_command(words)
            elif block.reason is not None or own[0] in SERVES:
                check_parsed(own)
            else:
                carry_out(own)
    return names


def carry_out(words: list[str]) -> None:
    """Carries out a command up to its first evaluation, as if what it writes were not there yet."""
    out = Path(words[words.index("--out") + 1] if "--out" in words else "out")
    prepared = [p for p in Path().glob(f"{out.stem}*") if p.stem == out.stem]
    for path in prepared:
        path.rename(path.with_name(f"aside {path.name}"))
    resolve(words)
    for path in prepared:
        if path.is_dir():
            shutil.rmtree(path)
        path.with_name(f"aside {path.name}").replace(path)


WITH_CODE = [p for p in PAGES if any(b.language in ("python", "console") for b in blocks(p))]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(p.relative_to(ROOT)) for p in WITH_CODE])
@pytest.mark.usefixtures("few_hypotheses", "coarse_references", "undrawn")
def test_the_code_of_a_page_runs(page, embedded, monkeypatch, tmp_path):
    monkeypatch.setattr("fewstep.loading.EMBEDDED_FOLDER", embedded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    check_page(page, monkeypatch, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_every_block_says_what_it_is(page):
    """A block without a language, or a command in a block of text, would not be run."""
    fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    found = blocks(page)
    assert len(fences) == 2 * len(found)
    for block in found:
        where = f"{block.page}:{block.line}"
        assert block.language in ("python", "console", "text", "json"), where
        assert block.reason is None or block.language in ("python", "console"), where
        assert block.reason is None or len(block.reason.split()) >= 3, where
        if block.language == "text":
            assert not re.search(r"^(fewstep |import |from |make |pip )", block.text, re.M), where
        if block.language == "json":
            json.loads(block.text)


def inline() -> list[tuple[str, list[str]]]:
    """The commands within sentences and tables: page, words."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for span in re.findall(r"`(fewstep [^`]+)`", text):
            found += [(str(page.relative_to(ROOT)), words) for words in commands(span)]
    return found


def test_commands_in_sentences_exist():
    """Their names and their options; arguments may be left out there."""
    assert len(inline()) > 30
    for page, (_, *words) in inline():
        here, options = app(), [w for w in words if re.match(r"--?[a-z]", w)]
        while words and words[0] in list(here):
            here = here[words.pop(0)]
        where = f"{page}: {words}"
        assert here.name != ("fewstep",) or words[0].startswith("--install"), where
        known: set[str] = set()
        if here.default_command is not None:
            arguments = here.assemble_argument_collection(parse_docstring=False)
            known = {name for argument in arguments for name in argument.names}
        assert set(options) <= known | {"--install-completion", "--version", "--help"}, where

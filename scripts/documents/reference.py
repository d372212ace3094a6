"""The pages of the public names, from their docstrings."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from docstrings import Links, markdown, signature

import fewstep

PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "models": (
        "Models",
        (
            *(
                "Denoiser",
                "load",
                "preconditioned",
                "Prediction",
                "Guided",
                "Clipped",
                "Thresholded",
            ),
            *("guidance", "exact"),
        ),
    ),
    "sampling": (
        "Sampling",
        (
            *("sample", "steps", "resolve", "SamplerRequest", "SamplerRecipe", "Trajectory"),
            *("log_likelihood", "invert"),
        ),
    ),
    "schedules": (
        "Schedules and grids",
        ("NoiseSchedule", "schedule", "SCHEDULES", "TimeGrid", "grid", "GRIDS"),
    ),
    "plans": ("Plans and solvers", ("Plan", "plan", "Solver", "SOLVERS")),
    "measuring": ("Measuring and searching", ("fit", "Profile", "tune", "TunedSampler")),
    "distilling": (
        "Recording, distilling, training",
        ("record", "TrajectoryStore", "distill", "train", "TrainRecipe"),
    ),
    "comparing": (
        "Comparing and analyzing",
        ("compare", "analyze", "comparison", "studies", "metrics"),
    ),
    "adapters": (
        "Adapters",
        ("adapters.diffusers", "adapters.kdiffusion", "adapters.ray"),
    ),
}
"""Title and names of each page; a module stands for the names that it exports."""


def members(module: types.ModuleType) -> Iterator[str]:
    """Yields what a module exports."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        ]
    yield from sorted(n for n in names if not n.startswith("_"))


def entries(names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the path below ``fewstep`` and the object of each documented name."""
    for name in names:
        thing: Any = (
            importlib.import_module(f"fewstep.{name}") if "." in name else getattr(fewstep, name)
        )
        yield name, thing
        if isinstance(thing, types.ModuleType):
            for member in members(thing):
                if not isinstance(getattr(thing, member), types.ModuleType):
                    yield f"{name}.{member}", getattr(thing, member)


def methods(thing: type) -> Iterator[tuple[str, Any]]:
    """Yields the public methods and properties that a class defines, with docstrings."""
    for name, value in vars(thing).items():
        function = getattr(value, "__func__", value)
        if isinstance(value, property):
            function = value.fget
        documented = inspect.isfunction(function) or isinstance(value, property)
        if documented and not name.startswith("_") and inspect.getdoc(getattr(thing, name)):
            yield name, value


def anchor(path: str) -> str:
    """Returns the id of a name on its page."""
    return path.replace(".", "-").lower()


def links(prefix: str) -> Links:
    """Returns the address of each name, as seen from a page in a folder from which ``prefix`` leads to the reference."""
    found: dict[str, str] = {}
    for page, (_, names) in PAGES.items():
        for path, thing in entries(names):
            place = f"{prefix}{page}.md#{anchor(path)}"
            found.setdefault(path, place)
            home = getattr(thing, "__module__", None)
            if (home and inspect.isclass(thing)) or inspect.isfunction(thing):
                found.setdefault(f"{home}.{thing.__name__}".removeprefix("fewstep."), place)
                found.setdefault(thing.__name__, place)
            if inspect.isclass(thing):
                for name, _ in methods(thing):
                    member = f"{prefix}{page}.md#{anchor(f'{path}.{name}')}"
                    found.setdefault(f"{path}.{name}", member)
    return found


def pages(addresses: Links) -> dict[str, str]:
    """Returns the pages by file name."""
    result = {}
    for page, (title, names) in PAGES.items():
        parts = [f"# {title}\n"]
        for path, thing in entries(names):
            parts.append(_entry(path, thing, addresses))
        result[f"{page}.md"] = "\n\n".join(parts) + "\n"
    result["index.md"] = (
        "# Reference\n\nThe public names, from their docstrings. "
        "Everything else may change without notice.\n\n"
        "| page | names |\n|---|---|\n"
        + "\n".join(
            f"| [{title}]({page}.md) | {', '.join(f'`{n}`' for n in names)} |"
            for page, (title, names) in PAGES.items()
        )
        + "\n"
    )
    return result


def _entry(path: str, thing: Any, addresses: Links) -> str:
    doc = inspect.getdoc(thing) or ""
    level = "##" if path.count(".") == 0 or isinstance(thing, types.ModuleType) else "###"
    head = f"{level} <code>fewstep.{path}</code> {{ #{anchor(path)} }}"
    if isinstance(thing, types.ModuleType):
        return f"{head}\n\n{markdown(doc, addresses)}"
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        # A registry or another constant: its own docstring is that of its class.
        listed = ", ".join(f"`{k}`" for k in thing) if hasattr(thing, "keys") else f"`{thing!r}`"
        return f"{head}\n\n{listed}"
    name = path.rpartition(".")[2]
    parts = [head, f"```python\n{signature(name, thing)}\n```", markdown(doc, addresses)]
    if inspect.isclass(thing):
        for method, value in methods(thing):
            called = value.fget if isinstance(value, property) else getattr(thing, method)
            shown = method if isinstance(value, property) else signature(method, called)
            parts += [
                f"#### <code>{name}.{method}</code> {{ #{anchor(f'{path}.{method}')} }}",
                f"```python\n{shown}\n```",
                markdown(inspect.getdoc(called) or "", addresses),
            ]
    return "\n\n".join(parts)
